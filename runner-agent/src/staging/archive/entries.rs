//! What every entry of every format has to pass.

use std::{
    collections::HashMap,
    ffi::OsStr,
    hash::{BuildHasher as _, RandomState},
    io::{self, Read},
    os::unix::ffi::OsStrExt as _,
    path::Path,
};

use runner_core::spec::path;

use super::{ArchiveCaps, ArchiveError, EntrySink, ratio};
use crate::staging::{StagingErrorKind, entry_name::shown};

/// What was unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Unpacked {
    /// Files.
    pub files: u64,
    /// Files and directories, with those directories that no entry names.
    pub entries: u64,
    /// Sum of the files' sizes.
    pub bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    Directory,
}

/// Checks entries and hands them on.
pub(super) struct Entries<'a> {
    caps: &'a ArchiveCaps<'a>,
    /// Most bytes for the size of the archive.
    most: u64,
    sink: &'a mut dyn EntrySink,
    /// By hash: names may be long, and there may be many.
    seen: HashMap<u128, Kind>,
    hashers: [RandomState; 2],
    unpacked: Unpacked,
}

impl<'a> Entries<'a> {
    pub(super) fn new(caps: &'a ArchiveCaps<'a>, most: u64, sink: &'a mut dyn EntrySink) -> Self {
        Self {
            caps,
            most,
            sink,
            seen: HashMap::new(),
            hashers: [RandomState::new(), RandomState::new()],
            unpacked: Unpacked::default(),
        }
    }

    pub(super) fn finish(self) -> Unpacked {
        self.unpacked
    }

    /// How many more entries there may be.
    pub(super) fn entries_left(&self) -> u64 {
        self.caps.entries.saturating_sub(self.unpacked.entries)
    }

    /// A directory, as the archive names it.
    pub(super) fn directory(&mut self, name: &[u8], mode: u32) -> Result<(), ArchiveError> {
        let path = self.normal(name)?;
        // `./` is where everything goes, and is there already.
        if path.is_empty() || self.is_hidden(&path) {
            return Ok(());
        }
        self.parents(&path)?;
        match self.seen.insert(self.hash(&path), Kind::Directory) {
            Some(Kind::File) => return Err(conflict(&path)),
            Some(Kind::Directory) => {}
            None => self.count(&path)?,
        }
        let at = Path::new(OsStr::from_bytes(&path));
        self.sink.directory(at, Some(mode & 0o777)).map_err(|error| writing(&path, error))
    }

    /// A file of `size` bytes. All of them are taken from `bytes`, also where the file is left out.
    pub(super) fn file(
        &mut self,
        name: &[u8],
        mode: u32,
        size: u64,
        bytes: &mut dyn Read,
    ) -> Result<(), ArchiveError> {
        let path = self.normal(name)?;
        if path.is_empty() {
            return Err(ArchiveError::malformed("the archive has a file without a name"));
        }
        let mut bytes = FileBytes { bytes, left: size, fault: None };
        if self.is_hidden(&path) {
            io::copy(&mut bytes, &mut io::sink()).map_err(ArchiveError::reading)?;
            return Ok(());
        }
        let hides = |hidden: &&str| {
            hidden.as_bytes().strip_prefix(path.as_slice()).is_some_and(|rest| rest.starts_with(b"/"))
        };
        if self.caps.hidden.iter().any(hides) {
            return Err(conflict(&path));
        }
        self.parents(&path)?;
        if self.seen.insert(self.hash(&path), Kind::File).is_some() {
            return Err(conflict(&path));
        }
        self.count(&path)?;
        // By its own word first, so that nothing is written of what is too large.
        let all = self.unpacked.bytes.saturating_add(size);
        if all > self.caps.bytes {
            let what =
                format!("the inputs have more bytes than they may have together, with {}", show(&path));
            return Err(ArchiveError::limit(what));
        }
        if all > self.most {
            return Err(ratio());
        }
        let mode = self.caps.mode.unwrap_or(mode) & 0o777;
        let stored = self.sink.file(Path::new(OsStr::from_bytes(&path)), mode, &mut bytes);
        if let Some(fault) = bytes.fault.take() {
            return Err(ArchiveError { what: format!("{}: {}", show(&path), fault.what), ..fault });
        }
        stored.map_err(|error| writing(&path, error))?;
        // A sink may not want them all; the next entry begins behind them.
        io::copy(&mut bytes, &mut io::sink()).map_err(ArchiveError::reading)?;
        self.unpacked.bytes = all;
        self.unpacked.files += 1;
        Ok(())
    }

    /// The path without `.` names and doubled slashes; without the slash of a directory at the end.
    fn normal(&self, name: &[u8]) -> Result<Vec<u8>, ArchiveError> {
        let bad = |why: &str| {
            ArchiveError::malformed(format!("the archive has an entry {}, which {why}", show(name)))
        };
        if name.starts_with(b"/") {
            return Err(bad("is absolute"));
        }
        if name.len() > 2 * path::MAX_BYTES {
            return Err(bad("is too long a path"));
        }
        let mut normal = Vec::with_capacity(name.len());
        let mut depth = 0;
        for part in name.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => continue,
                b".." => return Err(bad("leads out of it")),
                part if part.contains(&0) => return Err(bad("contains NUL")),
                part if part.len() > path::MAX_NAME_BYTES => return Err(bad("has too long a name")),
                part => {
                    if !normal.is_empty() {
                        normal.push(b'/');
                    }
                    normal.extend_from_slice(part);
                    depth += 1;
                }
            }
        }
        if normal.len() > path::MAX_BYTES {
            return Err(bad("is too long a path"));
        }
        if depth > self.caps.limits.depth {
            let what = format!("{} is deeper than {} names", show(name), self.caps.limits.depth);
            return Err(ArchiveError::limit(what));
        }
        Ok(normal)
    }

    /// Makes the directories above a path that no entry has named.
    fn parents(&mut self, path: &[u8]) -> Result<(), ArchiveError> {
        let Some(end) = path.iter().rposition(|byte| *byte == b'/') else { return Ok(()) };
        // Mostly the one above is known, and then all are.
        match self.seen.get(&self.hash(&path[..end])) {
            Some(Kind::Directory) => return Ok(()),
            Some(Kind::File) => return Err(conflict(path)),
            None => {}
        }
        for (at, _) in path.iter().enumerate().filter(|(_, byte)| **byte == b'/') {
            let above = &path[..at];
            match self.seen.insert(self.hash(above), Kind::Directory) {
                Some(Kind::Directory) => {}
                Some(Kind::File) => return Err(conflict(path)),
                None => {
                    self.count(above)?;
                    self.sink
                        .directory(Path::new(OsStr::from_bytes(above)), None)
                        .map_err(|error| writing(above, error))?;
                }
            }
        }
        Ok(())
    }

    fn count(&mut self, path: &[u8]) -> Result<(), ArchiveError> {
        self.unpacked.entries += 1;
        if self.unpacked.entries > self.caps.entries {
            let what =
                format!("the inputs have more files and directories than they may have, with {}", show(path));
            return Err(ArchiveError::limit(what));
        }
        Ok(())
    }

    fn is_hidden(&self, path: &[u8]) -> bool {
        self.caps.hidden.iter().any(|hidden| {
            path.strip_prefix(hidden.as_bytes()).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
        })
    }

    fn hash(&self, path: &[u8]) -> u128 {
        let [a, b] = [&self.hashers[0], &self.hashers[1]].map(|hasher| u128::from(hasher.hash_one(path)));
        a << 64 | b
    }
}

/// A file's bytes: exactly as many as it has. Remembers a failure of the archive, so that it is told from one of the sink.
struct FileBytes<'a> {
    bytes: &'a mut dyn Read,
    left: u64,
    fault: Option<ArchiveError>,
}

impl Read for FileBytes<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let read = match self.bytes.read(&mut buffer[..most]) {
            Ok(0) => Err(ArchiveError::malformed("the archive is truncated")),
            Ok(read) => Ok(read),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Err(error),
            Err(error) => Err(ArchiveError::reading(error)),
        };
        match read {
            Ok(read) => {
                self.left -= read as u64;
                Ok(read)
            }
            Err(fault) => {
                let told = io::Error::other(fault.what.clone());
                self.fault = Some(fault);
                Err(told)
            }
        }
    }
}

pub(super) fn show(path: &[u8]) -> String {
    shown(&String::from_utf8_lossy(path))
}

fn conflict(path: &[u8]) -> ArchiveError {
    let what = format!("two entries claim one place, or one lies below a file: {}", show(path));
    ArchiveError { kind: StagingErrorKind::Conflict, ..ArchiveError::malformed(what) }
}

fn writing(path: &[u8], error: io::Error) -> ArchiveError {
    ArchiveError { kind: StagingErrorKind::Local, what: format!("write {}", show(path)), source: Some(error) }
}
