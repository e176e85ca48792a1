//! Archives among the inputs: from where they were brought to the directories that they become.

use std::{
    collections::BTreeMap,
    io::{self, Read},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use runner_core::spec::User;

use super::{
    InputStaging, Root, StagingError, StagingErrorKind,
    archive::{ArchiveCaps, ArchiveError, EntrySink, unpack},
    error::About,
    fetch::blocking_with,
    root::set_owner_and_mode,
    tree::PackedTree,
};

/// What all archives came to.
#[derive(Debug, Default)]
pub(super) struct UnpackedTrees {
    pub(super) files: u64,
    pub(super) bytes: u64,
    /// Every directory, relative to the staging root, with the mode that it gets in the end.
    pub(super) directories: BTreeMap<PathBuf, u32>,
}

/// Unpacks one archive after the other, each on a blocking thread, and removes it. `transferred` bytes and `entries` count
/// against the limits already.
pub(super) async fn unpack_all(
    job: &InputStaging<'_>,
    archives: Vec<PackedTree>,
    transferred: u64,
    mut entries: u64,
) -> Result<UnpackedTrees, StagingError> {
    let mut all = UnpackedTrees::default();
    for packed in archives {
        let about = About::input(packed.input);
        let (limits, root, owner) = (job.limits.clone(), job.root.clone(), job.owner);
        let bytes_left = limits.input_bytes.saturating_sub(transferred).saturating_sub(all.bytes);
        let entries_left = limits.input_entries.saturating_sub(entries);
        let stopped = Stopped::default();
        let seen = Arc::clone(&stopped.0);
        let told = about.clone();
        let (unpacked, directories) = blocking_with(&about, move || {
            let local = |what: &str| {
                let context = format!("{what} {}", packed.what);
                let about = &told;
                move |error| about.local(context, error)
            };
            let archive = root.open_file(&packed.spool).map_err(local("open"))?;
            let size = archive.metadata().map_err(local("look at"))?.len();
            let mut sink = TreeSink {
                root: root.clone(),
                top: packed.at,
                owner,
                directories: BTreeMap::new(),
                stopped: seen,
            };
            let hidden: Vec<&str> = packed.hidden.iter().map(String::as_str).collect();
            let caps = ArchiveCaps {
                limits: &limits,
                bytes: bytes_left,
                entries: entries_left,
                hidden: &hidden,
                mode: packed.mode,
            };
            let unpacked = unpack(packed.format, archive, size, &caps, &mut sink)
                .map_err(|error| refused(&told, &packed.what, error))?;
            root.remove_file(&packed.spool).map_err(local("remove"))?;
            Ok((unpacked, sink.directories))
        })
        .await?;
        entries += unpacked.entries;
        all.files += unpacked.files;
        all.bytes += unpacked.bytes;
        all.directories.extend(directories);
    }
    Ok(all)
}

fn refused(about: &About, archive: &str, error: ArchiveError) -> StagingError {
    let context = format!("unpack {archive}: {error}");
    match (error.kind, error.source) {
        (StagingErrorKind::Local, Some(source)) => about.local(context, source),
        (kind, source) => StagingError { source: source.map(Into::into), ..about.error(kind, context) },
    }
}

/// Set when the call that waits for the thread is given up: what it would write then is somebody else's place.
#[derive(Default)]
struct Stopped(Arc<AtomicBool>);

impl Drop for Stopped {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Writes entries below a directory of the staging root.
struct TreeSink {
    root: Root,
    top: PathBuf,
    owner: Option<User>,
    directories: BTreeMap<PathBuf, u32>,
    stopped: Arc<AtomicBool>,
}

const CHUNK: usize = 256 * 1024;
const DIRECTORY_MODE: u32 = 0o755;

impl TreeSink {
    fn check(&self) -> io::Result<()> {
        if self.stopped.load(Ordering::Relaxed) {
            return Err(io::Error::other("staging was given up"));
        }
        Ok(())
    }
}

impl EntrySink for TreeSink {
    fn directory(&mut self, path: &Path, mode: Option<u32>) -> io::Result<()> {
        self.check()?;
        let at = self.top.join(path);
        // Writable until everything is in it; the archive's mode comes last.
        self.root.create_dir_all(&at, DIRECTORY_MODE)?;
        match mode {
            Some(mode) => drop(self.directories.insert(at, mode)),
            None => drop(self.directories.entry(at).or_insert(DIRECTORY_MODE)),
        }
        Ok(())
    }

    fn file(&mut self, path: &Path, mode: u32, bytes: &mut dyn Read) -> io::Result<()> {
        self.check()?;
        let mut file = self.root.create_file(&self.top.join(path), 0o600)?;
        let mut chunk = Vec::new();
        loop {
            chunk.clear();
            (&mut *bytes).take(CHUNK as u64).read_to_end(&mut chunk)?;
            if chunk.is_empty() {
                break;
            }
            self.check()?;
            io::Write::write_all(&mut file, &chunk)?;
        }
        set_owner_and_mode(file.as_fd(), self.owner, mode)
    }
}
