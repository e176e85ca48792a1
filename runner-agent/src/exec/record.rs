//! Records of the attempt's directory: written whole, read whole.
//!
//! A record is written aside and renamed, so that a reader sees all of it or nothing. Nothing is synced to the disk: a
//! record has to survive the death of processes, for which the page cache is enough. After the death of the machine the
//! boot id is another one, the shim is known to be dead, and what is found is judged by the backend.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

use super::protocol::{self, ShimRecord};

/// Largest record that is read: specifications are bounded far below it.
const MAX_RECORD_BYTES: u64 = 64 << 20;

/// A record that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file system's answer.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is there and is not what it should be. It will not get better.
    #[error("{path}: {source}")]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What does not fit.
        source: serde_json::Error,
    },
}

impl RecordError {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }
}

/// Reads a record. `None`: it is not there (yet).
///
/// # Errors
/// Where it is there and cannot be read or understood.
pub(crate) fn read<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<Option<T>, RecordError> {
    let path = dir.join(name);
    let mut bytes = Vec::new();
    let whole = open_plain(&path).and_then(|file| file.take(MAX_RECORD_BYTES).read_to_end(&mut bytes));
    match whole {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(RecordError::io(&path, error)),
    }
    serde_json::from_slice(&bytes).map(Some).map_err(|source| RecordError::Malformed { path, source })
}

/// Opens a file of an attempt's directory for reading, as far as it is one. Where the shim has the program's own user, the program
/// may have put anything in its place: a link would lead to what only the reader has, a pipe would make it wait for ever.
///
/// # Errors
/// The file system's, and where it is no regular file.
pub(crate) fn open_plain(path: &Path) -> io::Result<fs::File> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).map_err(io::Error::other)?;
    let file = fs::File::options().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file"));
    }
    Ok(file)
}

/// Writes a record whole, over one of the same name.
///
/// # Errors
/// The file system's. Then the record is as it was before.
pub(crate) fn write<T: Serialize>(dir: &Path, name: &str, record: &T) -> Result<(), RecordError> {
    let (aside, path) = write_aside(dir, name, record)?;
    fs::rename(&aside, &path).map_err(|error| RecordError::io(&path, error))
}

/// Writes a record whole, only where none of its name exists. `false`: one exists, and nothing was changed. Of several
/// that try at once, one gets `true`.
///
/// # Errors
/// The file system's.
pub(crate) fn write_first<T: Serialize>(dir: &Path, name: &str, record: &T) -> Result<bool, RecordError> {
    let (aside, path) = write_aside(dir, name, record)?;
    // A link, unlike a rename, fails where the name is taken.
    let linked = fs::hard_link(&aside, &path);
    let _ = fs::remove_file(&aside);
    match linked {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(RecordError::io(&path, error)),
    }
}

fn write_aside<T: Serialize>(dir: &Path, name: &str, record: &T) -> Result<(PathBuf, PathBuf), RecordError> {
    let path = dir.join(name);
    let bytes =
        serde_json::to_vec(record).map_err(|source| RecordError::Malformed { path: path.clone(), source })?;
    // The pid keeps two writers apart.
    let aside = dir.join(format!(".{name}.{}", std::process::id()));
    // An environment may hold secrets.
    let written = fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&aside)
        .and_then(|mut file| file.write_all(&bytes));
    if let Err(error) = written {
        let _ = fs::remove_file(&aside);
        return Err(RecordError::io(&aside, error));
    }
    Ok((aside, path))
}

/// A record whose place on the disk is taken before what it says is known.
#[derive(Debug)]
pub(crate) struct Reserved {
    file: fs::File,
    aside: PathBuf,
    path: PathBuf,
}

impl Reserved {
    /// More than a record of this kind needs.
    const RECORD_BYTES: usize = 4096;

    /// Takes the place, and as much again for [`give_way`](Self::give_way).
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn take(dir: &Path, name: &str) -> Result<Self, RecordError> {
        let (aside, path) = (dir.join(format!(".{name}")), dir.join(name));
        let options = fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&aside);
        let written =
            options.and_then(|mut file| file.write_all(&[b' '; 2 * Self::RECORD_BYTES]).map(|()| file));
        match written {
            Ok(file) => Ok(Self { file, aside, path }),
            Err(error) => {
                let _ = fs::remove_file(&aside);
                Err(RecordError::io(&aside, error))
            }
        }
    }

    /// Leaves some room to others. What is left suffices for the record.
    pub(crate) fn give_way(&self) {
        let _ = self.file.set_len(Self::RECORD_BYTES as u64);
    }

    /// Writes the record into its place and gives it its name.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn write<T: Serialize>(self, record: &T) -> Result<(), RecordError> {
        let bytes = serde_json::to_vec(record)
            .map_err(|source| RecordError::Malformed { path: self.path.clone(), source })?;
        self.file
            .write_all_at(&bytes, 0)
            .and_then(|()| self.file.set_len(bytes.len() as u64))
            .and_then(|()| fs::rename(&self.aside, &self.path))
            .map_err(|error| RecordError::io(&self.path, error))
    }
}

/// What `/proc/PID/stat` says of a process, as far as it is needed here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stat {
    /// `R`, `S`, `D`, `Z` ….
    pub(crate) state: u8,
    /// The parent's pid.
    pub(crate) parent: i32,
    /// Clock ticks after boot at which it started.
    pub(crate) start_ticks: u64,
}

/// Reads `/proc/PID/stat`. `None`: there is no such process.
pub(crate) fn stat(pid: i32) -> io::Result<Option<Stat>> {
    match fs::read(format!("/proc/{pid}/stat")) {
        Ok(bytes) => parse_stat(&bytes).map(Some).ok_or_else(|| io::Error::other("malformed /proc/PID/stat")),
        // ESRCH: it ended while it was read.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn parse_stat(bytes: &[u8]) -> Option<Stat> {
    // The name, field 2, is in parentheses and may hold anything, parentheses and spaces included: the last one ends it.
    let end = bytes.iter().rposition(|&byte| byte == b')')?;
    let mut fields = std::str::from_utf8(bytes.get(end + 2..)?).ok()?.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    let parent = fields.next()?.parse().ok()?;
    let start_ticks = fields.nth(17)?.parse().ok()?;
    Some(Stat { state, parent, start_ticks })
}

/// Identifies a living process so that it can be told from one that is given its pid later.
///
/// # Errors
/// Where there is no such process, or `/proc` cannot be read.
pub(crate) fn identify(pid: i32) -> io::Result<ShimRecord> {
    let stat = stat(pid)?.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    Ok(ShimRecord { pid, start_ticks: stat.start_ticks, boot_id: boot_id()? })
}

/// This boot's id.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim_end().to_owned())
}

/// Whether the process of the record is alive: the same pid, start and boot. One that has ended and was not waited for
/// is dead.
///
/// # Errors
/// Where `/proc` cannot be read. Then nothing is known.
pub fn is_alive(record: &ShimRecord) -> io::Result<bool> {
    if boot_id()? != record.boot_id {
        return Ok(false);
    }
    Ok(stat(record.pid)?
        .is_some_and(|stat| stat.start_ticks == record.start_ticks && !matches!(stat.state, b'Z' | b'X')))
}

/// Whether an attempt's directory was ever given to a shim.
pub(crate) fn was_claimed(dir: &Path) -> bool {
    dir.join(protocol::name::SHIM).exists() || dir.join(protocol::name::EXIT).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_puts_in_a_records_place_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("secret"), "1").unwrap();
        std::os::unix::fs::symlink("secret", dir.path().join("link")).unwrap();
        let pipe = std::ffi::CString::new(dir.path().join("pipe").as_os_str().as_encoded_bytes()).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &*pipe,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        for name in ["link", "pipe", "."] {
            let read = read::<u32>(dir.path(), name);
            assert!(matches!(read, Err(RecordError::Io { .. })), "{name}: {read:?}");
        }
        assert_eq!(read::<u32>(dir.path(), "secret").unwrap(), Some(1));
    }

    #[test]
    fn a_process_name_with_parentheses_and_spaces_does_not_shift_the_fields() {
        let line = b"42 (a) R 9 (b) S 7 1 1 0 -1 4 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 1\n";
        assert_eq!(parse_stat(line), Some(Stat { state: b'S', parent: 7, start_ticks: 987_654 }));
        assert_eq!(parse_stat(b"42 (a"), None);
        assert_eq!(parse_stat(b"42 (a) S 1"), None);
    }

    #[test]
    fn we_are_alive_and_one_with_our_pid_and_another_start_or_boot_is_not() {
        #[allow(clippy::cast_possible_wrap, reason = "pids are positive i32")]
        let me = identify(std::process::id() as i32).unwrap();
        assert!(is_alive(&me).unwrap());
        assert!(!is_alive(&ShimRecord { start_ticks: me.start_ticks + 1, ..me.clone() }).unwrap());
        assert!(!is_alive(&ShimRecord { boot_id: "other".to_owned(), ..me }).unwrap());
    }

    #[test]
    fn the_first_record_stays() {
        let dir = tempfile::tempdir().unwrap();
        assert!(write_first(dir.path(), "x", &1).unwrap());
        assert!(!write_first(dir.path(), "x", &2).unwrap());
        assert_eq!(read::<i32>(dir.path(), "x").unwrap(), Some(1));
        write(dir.path(), "x", &3).unwrap();
        assert_eq!(read::<i32>(dir.path(), "x").unwrap(), Some(3));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(matches!(read::<String>(dir.path(), "x"), Err(RecordError::Malformed { .. })));
    }
}
