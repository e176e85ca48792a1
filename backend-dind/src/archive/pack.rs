//! Makes tars for the engine to unpack.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use bytes::{Bytes, BytesMut};
use futures::{Stream, stream};
use runner_core::spec::User;
use tokio::sync::mpsc;

/// What goes over at once.
const CHUNK: usize = 256 * 1024;
/// Chunks on their way.
const CHUNKS: usize = 4;

/// Whose something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl Owner {
    pub(crate) const ROOT: Self = Self { uid: 0, gid: 0 };
}

impl From<User> for Owner {
    fn from(user: User) -> Self {
        Self { uid: user.uid, gid: user.gid }
    }
}

/// A part of a tar. Paths are relative, without a slash at either end.
#[derive(Debug)]
pub(crate) enum Part {
    /// A directory.
    Directory { path: String, owner: Owner, mode: u32 },
    /// A file in memory.
    Bytes { path: String, owner: Owner, mode: u32, bytes: Bytes },
    /// A file of this machine that only its group may read, as root's: the program cannot change it.
    Shared { path: String, local: PathBuf, gid: u32 },
    /// A directory of this machine, itself and all below it, with its modes. It is ours, so nobody changes it meanwhile.
    Tree { path: String, local: PathBuf, owner: Owner },
}

/// Makes a tar of small parts.
pub(crate) fn pack_small(parts: Vec<Part>) -> io::Result<Bytes> {
    let mut all = Vec::new();
    write(parts, &mut all)?;
    Ok(all.into())
}

/// Makes a tar while it is read. Dropping the stream ends the work.
pub(crate) fn pack(parts: Vec<Part>) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    let (sender, receiver) = mpsc::channel(CHUNKS);
    tokio::task::spawn_blocking(move || {
        let mut writer = Chunks { sender: sender.clone(), buffer: BytesMut::new() };
        let result = write(parts, &mut writer).and_then(|()| writer.send());
        if let Err(error) = result {
            // Where nobody listens any more, nobody misses it.
            let _ = sender.blocking_send(Err(error));
        }
    });
    stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) })
}

/// Collects what is written, and sends it in chunks.
struct Chunks {
    sender: mpsc::Sender<io::Result<Bytes>>,
    buffer: BytesMut,
}

impl Chunks {
    fn send(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let chunk = self.buffer.split().freeze();
        self.sender.blocking_send(Ok(chunk)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= CHUNK {
            self.send()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write(parts: Vec<Part>, to: &mut impl Write) -> io::Result<()> {
    let mut tar = tar::Builder::new(to);
    for part in parts {
        match part {
            Part::Directory { path, owner, mode } => directory(&mut tar, Path::new(&path), owner, mode)?,
            Part::Bytes { path, owner, mode, bytes } => {
                let mut header = header(tar::EntryType::Regular, owner, mode, bytes.len() as u64, 0);
                tar.append_data(&mut header, &path, bytes.as_ref())?;
            }
            Part::Shared { path, local, gid } => {
                let (file, metadata) = open(&local)?;
                let owner_bits = metadata.mode() >> 6 & 0o5;
                let mode = metadata.mode() & 0o777 & !0o022 | owner_bits << 3;
                regular(&mut tar, Path::new(&path), file, &metadata, Owner { uid: 0, gid }, mode)?;
            }
            Part::Tree { path, local, owner } => tree(&mut tar, PathBuf::from(path), &local, owner)?,
        }
    }
    tar.finish()
}

fn tree<W: Write>(tar: &mut tar::Builder<W>, top: PathBuf, local: &Path, owner: Owner) -> io::Result<()> {
    let mut left = vec![(top, local.to_owned())];
    while let Some((path, local)) = left.pop() {
        let metadata = fs::symlink_metadata(&local)?;
        if !metadata.is_dir() {
            let (file, metadata) = open(&local)?;
            regular(tar, &path, file, &metadata, owner, metadata.mode() & 0o777)?;
            continue;
        }
        directory(tar, &path, owner, metadata.mode() & 0o777)?;
        let mut names =
            fs::read_dir(&local)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
        // The stack's top comes first.
        names.sort_unstable_by(|a, b| b.cmp(a));
        left.extend(names.into_iter().map(|name| (path.join(&name), local.join(&name))));
    }
    Ok(())
}

fn open(local: &Path) -> io::Result<(fs::File, fs::Metadata)> {
    let file = fs::File::open(local)?;
    let metadata = file.metadata()?;
    Ok((file, metadata))
}

fn directory<W: Write>(tar: &mut tar::Builder<W>, path: &Path, owner: Owner, mode: u32) -> io::Result<()> {
    let mut header = header(tar::EntryType::Directory, owner, mode, 0, 0);
    tar.append_data(&mut header, path, io::empty())
}

fn regular<W: Write>(
    tar: &mut tar::Builder<W>,
    path: &Path,
    file: fs::File,
    metadata: &fs::Metadata,
    owner: Owner,
    mode: u32,
) -> io::Result<()> {
    let modified = u64::try_from(metadata.mtime()).unwrap_or(0);
    let mut header = header(tar::EntryType::Regular, owner, mode, metadata.len(), modified);
    tar.append_data(&mut header, path, io::Read::take(file, metadata.len()))
}

fn header(kind: tar::EntryType, owner: Owner, mode: u32, size: u64, modified: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_uid(owner.uid.into());
    header.set_gid(owner.gid.into());
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(modified);
    header
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use futures::TryStreamExt as _;

    use super::*;

    const OWNER: Owner = Owner { uid: 7, gid: 8 };

    fn listed(tar: &[u8]) -> Vec<(String, u32, u64, u64, u64)> {
        let mut archive = tar::Archive::new(tar);
        archive
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let header = entry.header();
                let path = entry.path().unwrap().display().to_string();
                (
                    path,
                    header.mode().unwrap(),
                    header.uid().unwrap(),
                    header.gid().unwrap(),
                    header.size().unwrap(),
                )
            })
            .collect()
    }

    #[tokio::test]
    async fn a_tree_keeps_its_modes_and_gets_its_owner_and_may_be_larger_than_any_buffer() {
        let temp = tempfile::tempdir().unwrap();
        let long = "n".repeat(200);
        fs::create_dir_all(temp.path().join("sub").join(&long)).unwrap();
        fs::write(temp.path().join("sub").join(&long).join("x"), vec![3; 3 * CHUNK * CHUNKS]).unwrap();
        fs::write(temp.path().join("a"), "text").unwrap();
        fs::set_permissions(temp.path().join("a"), fs::Permissions::from_mode(0o640)).unwrap();
        let parts = vec![Part::Tree { path: "inputs".into(), local: temp.path().into(), owner: OWNER }];
        let chunks: Vec<Bytes> = pack(parts).try_collect().await.unwrap();
        let listed = listed(&chunks.concat());
        let names: Vec<&str> = listed.iter().map(|entry| entry.0.as_str()).collect();
        let deep = format!("inputs/sub/{long}");
        assert_eq!(names, ["inputs", "inputs/a", "inputs/sub", deep.as_str(), &format!("{deep}/x")]);
        assert_eq!(listed[1], ("inputs/a".into(), 0o640, 7, 8, 4));
        assert_eq!(listed[4].4, 3 * (CHUNK * CHUNKS) as u64);
    }

    #[test]
    fn a_shared_file_is_roots_and_readable_by_the_group_alone() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("f");
        for (mode, expected) in [(0o600, 0o640), (0o666, 0o644), (0o700, 0o750), (0o644, 0o644)] {
            fs::write(&file, "x").unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            let parts = vec![Part::Shared { path: "etc/f".into(), local: file.clone(), gid: 9 }];
            assert_eq!(listed(&pack_small(parts).unwrap()), [("etc/f".into(), expected, 0, 9, 1)]);
        }
    }

    #[tokio::test]
    async fn a_file_that_is_missing_fails_the_stream() {
        let parts = vec![Part::Tree { path: "x".into(), local: "/nowhere/at/all".into(), owner: OWNER }];
        assert!(pack(parts).try_collect::<Vec<Bytes>>().await.is_err());
    }
}
