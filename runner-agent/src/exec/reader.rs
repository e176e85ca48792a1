//! Reads a shim's spool while it grows.

use std::{
    fs, io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use bytes::{Bytes, BytesMut};
use runner_core::log::{
    Frame,
    codec::{self, DecodeError},
};

use super::protocol::name;

/// How much is read from a file at once: more than the largest frame.
const READ_BYTES: usize = codec::HEADER + codec::MAX_PAYLOAD + 256 * 1024;

/// A spool that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The file system's answer.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What lies at a frame's place is no frame. It will not get better.
    #[error("{path} at byte {at}: {source}")]
    Corrupt {
        /// Which file.
        path: PathBuf,
        /// Where in it.
        at: u64,
        /// What is wrong.
        source: DecodeError,
    },
    /// A frame does not start where the one before ended, or the wanted offset was released.
    #[error("{path}: a frame at {got} where {expected} was expected")]
    Gap {
        /// Which file.
        path: PathBuf,
        /// The wanted offset.
        expected: u64,
        /// What is there.
        got: u64,
    },
}

/// The path of the spool file whose first frame is at `offset`.
pub(crate) fn segment_path(log: &Path, offset: u64) -> PathBuf {
    log.join(format!("{offset:020}.seg"))
}

/// Offsets of the spool's files, in order. A spool that was not begun has none.
fn segments(log: &Path) -> Result<Vec<u64>, SpoolError> {
    let fail = |source| SpoolError::Io { path: log.to_owned(), source };
    let entries = match fs::read_dir(log) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(fail(error)),
    };
    let mut offsets = Vec::new();
    for entry in entries {
        let file = entry.map_err(fail)?.file_name();
        if let Some(offset) = file.to_str().and_then(|file| file.strip_suffix(".seg")?.parse().ok()) {
            offsets.push(offset);
        }
    }
    offsets.sort_unstable();
    Ok(offsets)
}

/// Reads frames from an offset on, as they come. Any number of readers; a reader holds one open file and, while it reads,
/// half a mebibyte.
#[derive(Debug)]
pub struct SpoolReader {
    log: PathBuf,
    /// The offset that the caller has not seen yet.
    position: u64,
    file: Option<Open>,
}

#[derive(Debug)]
struct Open {
    file: fs::File,
    path: PathBuf,
    /// Offset of its first frame, which is its name.
    start: u64,
    /// Where the next frame starts in the file. Bytes after it are read anew each time: the shim takes back the half of a
    /// frame that a full disk did not take.
    at: u64,
    /// Offset of the next frame. Before `position` while a cursor within the file is looked for.
    next: u64,
}

impl SpoolReader {
    /// Reads the spool of the attempt's directory from `offset` on. The spool need not exist yet, nor reach so far.
    pub fn open(dir: &Path, offset: u64) -> Self {
        Self { log: dir.join(name::LOG), position: offset, file: None }
    }

    /// Offset up to which the caller has seen the log.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The frames that are there now, in order and without a gap from [`position`](Self::position), of about half a
    /// mebibyte at most. Empty: there are no more *now*. Where the exit record existed before this call, that is the end.
    ///
    /// # Errors
    /// See [`SpoolError`]. The reader may be used again; it goes on where it was.
    pub fn read(&mut self) -> Result<Vec<Frame>, SpoolError> {
        loop {
            if self.file.is_none() && !self.find()? {
                return Ok(Vec::new());
            }
            let Some(open) = &mut self.file else { return Ok(Vec::new()) };
            let (frames, advanced) = read_some(open, &mut self.position)?;
            if !frames.is_empty() {
                return Ok(frames);
            }
            if advanced {
                continue;
            }
            // The next file's name is the offset where this one ends. Its existence means that nothing comes to this one
            // any more, so what came since the last look is looked for once more.
            let next = segment_path(&self.log, open.next);
            if open.next == open.start || !next.exists() {
                return Ok(Vec::new());
            }
            let (frames, advanced) = read_some(open, &mut self.position)?;
            if !advanced {
                let start = open.next;
                self.file = Some(Self::open_segment(next, start)?);
            }
            if !frames.is_empty() {
                return Ok(frames);
            }
        }
    }

    /// Deletes the files whose every frame ends at or before `offset`; never the last file. Returns how many bytes of disk
    /// that freed.
    ///
    /// # Errors
    /// The file system's.
    pub fn release(&mut self, offset: u64) -> Result<u64, SpoolError> {
        let mut freed = 0;
        let starts = segments(&self.log)?;
        for pair in starts.windows(2) {
            if pair[1] > offset {
                break;
            }
            let path = segment_path(&self.log, pair[0]);
            freed += fs::metadata(&path).map_or(0, |metadata| metadata.len());
            match fs::remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(SpoolError::Io { path, source }),
            }
        }
        Ok(freed)
    }

    /// Opens the file that holds the position. `false`: there is none yet.
    fn find(&mut self) -> Result<bool, SpoolError> {
        let starts = segments(&self.log)?;
        let Some(&first) = starts.first() else { return Ok(false) };
        let Some(&start) = starts.iter().rev().find(|&&start| start <= self.position) else {
            return Err(SpoolError::Gap { path: self.log.clone(), expected: self.position, got: first });
        };
        self.file = Some(Self::open_segment(segment_path(&self.log, start), start)?);
        Ok(true)
    }

    fn open_segment(path: PathBuf, start: u64) -> Result<Open, SpoolError> {
        match super::record::open_plain(&path) {
            Ok(file) => Ok(Open { file, path, start, at: 0, next: start }),
            Err(source) => Err(SpoolError::Io { path, source }),
        }
    }
}

/// Reads once. Returns the frames at or after the position, and whether any whole frame was passed.
fn read_some(open: &mut Open, position: &mut u64) -> Result<(Vec<Frame>, bool), SpoolError> {
    let mut retried = false;
    loop {
        let mut bytes = fill(open)?;
        let mut frames = Vec::new();
        let mut advanced = false;
        let fault = loop {
            let before = bytes.len();
            match codec::decode(&mut bytes) {
                Ok(Some(frame)) => {
                    if frame.offset != open.next {
                        return Err(SpoolError::Gap {
                            path: open.path.clone(),
                            expected: open.next,
                            got: frame.offset,
                        });
                    }
                    advanced = true;
                    open.at += (before - bytes.len()) as u64;
                    open.next = frame.end();
                    if let Some(frame) = frame.from_offset(*position) {
                        *position = frame.end();
                        frames.push(frame);
                    }
                }
                Ok(None) => break None,
                Err(source) => break Some(source),
            }
        };
        match fault {
            // It may have been the half of a frame that the shim took back while it was read.
            Some(_) if !advanced && !retried => retried = true,
            Some(source) if !advanced => {
                return Err(SpoolError::Corrupt { path: open.path.clone(), at: open.at, source });
            }
            // What is good before a fault is delivered; the fault is met again by the next call.
            Some(_) | None => return Ok((frames, advanced)),
        }
    }
}

fn fill(open: &Open) -> Result<Bytes, SpoolError> {
    let fail = |source| SpoolError::Io { path: open.path.clone(), source };
    let left = open.file.metadata().map_err(fail)?.len().saturating_sub(open.at);
    let mut buffer = BytesMut::zeroed(usize::try_from(left).unwrap_or(READ_BYTES).min(READ_BYTES));
    let mut got = 0;
    while got < buffer.len() {
        match open.file.read_at(&mut buffer[got..], open.at + got as u64) {
            Ok(0) => break,
            Ok(count) => got += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(fail(error)),
        }
    }
    buffer.truncate(got);
    Ok(buffer.freeze())
}
