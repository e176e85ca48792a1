//! Writing beneath a directory, name by name: no symbolic link is followed and nothing outside is touched, whatever
//! lies in the way and whoever changes it meanwhile.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{self, AtFlags, Mode, OFlags},
    io::Errno,
};
use tokio::io::AsyncWriteExt as _;

use crate::{clock, error::ClientError};

/// An open directory, with the path by which people know it.
#[derive(Debug)]
pub(crate) struct Directory {
    fd: OwnedFd,
    path: PathBuf,
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl Directory {
    /// Opens a directory of the caller's choice, made with its parents where it is missing. Links in the caller's own
    /// path are followed.
    pub(crate) fn open_or_create(path: &Path) -> Result<Self, ClientError> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        std::fs::create_dir_all(path)
            .map_err(|e| ClientError::io(format!("create the directory {}", path.display()), e))?;
        let fd = fs::open(path, DIRECTORY, Mode::empty())
            .map_err(|e| ClientError::io(format!("open the directory {}", path.display()), e.into()))?;
        Ok(Self { fd, path: path.to_owned() })
    }

    /// The directory `names` below this one, made where it is missing.
    pub(crate) fn descend(&self, names: &[OsString]) -> Result<Self, ClientError> {
        let fd = self.fd.try_clone().map_err(|e| ClientError::io("duplicate a descriptor", e))?;
        let mut here = Self { fd, path: self.path.clone() };
        for name in names {
            let path = here.path.join(name);
            match fs::mkdirat(&here.fd, name, Mode::from_raw_mode(0o777)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => {
                    return Err(ClientError::io(
                        format!("create the directory {}", path.display()),
                        e.into(),
                    ));
                }
            }
            let fd = match fs::openat(&here.fd, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty()) {
                Ok(fd) => fd,
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    return Err(ClientError::unsafe_path(path, "a file or symbolic link is in the way"));
                }
                Err(e) => {
                    return Err(ClientError::io(format!("open the directory {}", path.display()), e.into()));
                }
            };
            here = Self { fd, path };
        }
        Ok(here)
    }

    /// Sets the directory's permission bits. The owner keeps the right to enter and write, so that a tree can be
    /// downloaded over itself.
    pub(crate) fn set_mode(&self, mode: u32) -> Result<(), ClientError> {
        fs::fchmod(&self.fd, Mode::from_raw_mode((mode & 0o777) | 0o700))
            .map_err(|e| ClientError::io(format!("set the mode of {}", self.path.display()), e.into()))
    }

    /// Begins a file that will have this name once it is whole.
    pub(crate) fn begin_file(&self, name: &OsStr) -> Result<PartialFile, ClientError> {
        let path = self.path.join(name);
        let dir = self.fd.try_clone().map_err(|e| ClientError::io("duplicate a descriptor", e))?;
        let part = OsString::from(format!(".runner-{:016x}.part", clock::random()));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = fs::openat(&dir, &part, flags, Mode::from_raw_mode(0o666))
            .map_err(|e| ClientError::io(format!("create a file beside {}", path.display()), e.into()))?;
        let file = tokio::fs::File::from_std(File::from(fd));
        Ok(PartialFile { file, place: Place { dir, part, name: name.to_owned(), path, done: false } })
    }
}

/// A file that is not whole yet. Dropped, it leaves nothing.
#[derive(Debug)]
pub(crate) struct PartialFile {
    pub(crate) file: tokio::fs::File,
    place: Place,
}

#[derive(Debug)]
struct Place {
    dir: OwnedFd,
    part: OsString,
    name: OsString,
    path: PathBuf,
    done: bool,
}

impl PartialFile {
    /// Where it will be.
    pub(crate) fn path(&self) -> &Path {
        &self.place.path
    }

    /// Makes it durable and puts it at its place, over a file or link of that name. `mode` holds permission bits.
    pub(crate) async fn finish(self, mode: Option<u32>) -> Result<PathBuf, ClientError> {
        let Self { mut file, mut place } = self;
        let doing = format!("write {}", place.path.display());
        // Where a full disk is reported: the last write may still be under way.
        file.flush().await.map_err(|e| ClientError::io(doing.as_str(), e))?;
        if let Some(mode) = mode {
            let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode & 0o777);
            file.set_permissions(permissions).await.map_err(|e| ClientError::io(doing.as_str(), e))?;
        }
        file.sync_all().await.map_err(|e| ClientError::io(doing.as_str(), e))?;
        match fs::renameat(&place.dir, &place.part, &place.dir, &place.name) {
            Ok(()) => {
                place.done = true;
                Ok(place.path.clone())
            }
            Err(Errno::ISDIR | Errno::EXIST | Errno::NOTEMPTY) => {
                Err(ClientError::unsafe_path(place.path.clone(), "a directory is in the way"))
            }
            Err(e) => Err(ClientError::io(doing, io::Error::from(e))),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.done {
            // The best that can be done: the file has a name that says what it is.
            let _ = fs::unlinkat(&self.dir, &self.part, AtFlags::empty());
        }
    }
}
