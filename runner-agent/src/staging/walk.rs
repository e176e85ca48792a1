//! Walks a directory that a workload wrote and may have made hostile.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
};

use rustix::{
    fs::{AtFlags, Dir, FileType},
    io::Errno,
};
use tokio::sync::mpsc;

use super::{
    root::{is_dot, open_dir_at, open_regular_at},
    select::{Selection, Standing, Verdict},
};

/// What the walk came upon. Paths are relative to where it began.
#[derive(Debug)]
pub(super) enum Found {
    Directory {
        path: OsString,
        mode: u32,
    },
    /// Opened, so that nothing can take its place any more.
    File {
        path: OsString,
        file: File,
        mode: u32,
    },
    /// Matched, but stored with another output.
    Elsewhere,
    /// Not stored, and why.
    Skipped {
        path: OsString,
        what: &'static str,
    },
}

/// Why a walk ended early.
#[derive(Debug)]
pub(super) enum WalkError {
    TooDeep(OsString),
    TooMany,
    Io { path: OsString, error: io::Error },
}

/// Caps of a walk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Caps {
    pub(super) depth: usize,
    pub(super) entries: u64,
}

struct Level {
    dir: Dir,
    path: OsString,
    standing: Standing,
}

/// Walks `top` and sends what it finds of the selection, each directory before what is in it. Blocks while the channel is full, so the
/// channel's size bounds the open files. Ends when the receiver is dropped.
///
/// Every step is taken from the handle of the directory above by one name that is not followed: a directory that is
/// swapped for a link in the middle of the walk leads nowhere.
pub(super) fn walk(
    top: OwnedFd,
    selection: &Selection,
    caps: Caps,
    found: &mpsc::Sender<Result<Found, WalkError>>,
) {
    if let Err(error) = walk_inner(top, selection, caps, found) {
        // Nobody listens any more where this fails.
        let _ = found.blocking_send(Err(error));
    }
}

fn walk_inner(
    top: OwnedFd,
    selection: &Selection,
    caps: Caps,
    found: &mpsc::Sender<Result<Found, WalkError>>,
) -> Result<(), WalkError> {
    let failed = |path: &OsStr, error: Errno| WalkError::Io { path: path.to_owned(), error: error.into() };
    let mut stack = vec![Level {
        dir: Dir::new(top).map_err(|error| failed(OsStr::new(""), error))?,
        path: OsString::new(),
        standing: selection.start(),
    }];
    let mut seen = 0u64;
    while let (stack_depth, Some(level)) = (stack.len(), stack.last_mut()) {
        let Some(entry) = level.dir.read() else {
            stack.pop();
            continue;
        };
        let entry = entry.map_err(|error| failed(&level.path, error))?;
        if is_dot(entry.file_name()) {
            continue;
        }
        seen += 1;
        if seen > caps.entries {
            return Err(WalkError::TooMany);
        }
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        let path = join(&level.path, name);
        let verdict = selection.judge(level.standing, &path, name.as_bytes());
        let (standing, taken) = match verdict {
            Verdict::Ignore => continue,
            Verdict::Elsewhere => {
                if found.blocking_send(Ok(Found::Elsewhere)).is_err() {
                    return Ok(());
                }
                continue;
            }
            Verdict::LookInside(standing) => (standing, false),
            Verdict::Take(standing) => (standing, true),
        };
        let above = level.dir.fd().map_err(|error| failed(&path, error))?;
        // As many directories are open as the entry has names.
        if stack_depth > caps.depth {
            return Err(WalkError::TooDeep(path));
        }
        let next = match look(above, name) {
            Ok(Looked::Directory(dir, mode)) => {
                let dir = Dir::new(dir).map_err(|error| failed(&path, error))?;
                stack.push(Level { dir, path: path.clone(), standing });
                if !taken {
                    continue;
                }
                Found::Directory { path, mode }
            }
            Ok(_) if !taken => continue,
            Ok(Looked::File(file, mode)) => Found::File { path, file, mode },
            Ok(Looked::Other(what)) => Found::Skipped { path, what },
            Err(error) => return Err(WalkError::Io { path, error }),
        };
        if found.blocking_send(Ok(next)).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

enum Looked {
    Directory(OwnedFd, u32),
    File(File, u32),
    Other(&'static str),
}

fn look(above: rustix::fd::BorrowedFd<'_>, name: &OsStr) -> io::Result<Looked> {
    let changed = |error: io::Error| match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOENT | Errno::LOOP | Errno::NOTDIR | Errno::NXIO) => {
            Ok(Looked::Other("entries that changed while they were looked at"))
        }
        _ => Err(error),
    };
    let stat = match rustix::fs::statat(above, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(error) => return changed(error.into()),
    };
    match kind(FileType::from_raw_mode(stat.st_mode)) {
        Kind::Directory => match open_dir_at(above, name) {
            Ok(dir) => Ok(Looked::Directory(dir, stat.st_mode & 0o777)),
            Err(error) => changed(error),
        },
        Kind::File => match open_regular_at(above, name) {
            Ok(file) => {
                let mode = rustix::fs::fstat(&file)?.st_mode & 0o777;
                Ok(Looked::File(file, mode))
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                Ok(Looked::Other("entries that changed while they were looked at"))
            }
            Err(error) => changed(error),
        },
        Kind::Other(what) => Ok(Looked::Other(what)),
    }
}

/// What a file type means to staging.
pub(super) enum Kind {
    File,
    Directory,
    /// In the plural, for a note.
    Other(&'static str),
}

pub(super) fn kind(file_type: FileType) -> Kind {
    match file_type {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Other("symbolic links"),
        FileType::Fifo => Kind::Other("FIFOs"),
        FileType::Socket => Kind::Other("sockets"),
        FileType::CharacterDevice | FileType::BlockDevice => Kind::Other("devices"),
        FileType::Unknown => Kind::Other("entries of an unknown type"),
    }
}

fn join(above: &OsStr, name: &OsStr) -> OsString {
    let mut path = above.to_owned();
    if !path.is_empty() {
        path.push("/");
    }
    path.push(name);
    path
}
