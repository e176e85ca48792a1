//! One service per data directory.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

const FILE: &str = "lock";

/// The exclusive right to a data directory, held until it is dropped or the process dies.
///
/// It is an advisory lock of the kernel (`flock`) on the file `lock` in the directory. A file that a dead process left
/// behind locks nothing; nobody has to clean up. The lock does not reach across machines on every network file system: a
/// data directory belongs on a local disk.
#[derive(Debug)]
pub struct DataDirLock {
    dir: PathBuf,
    file: File,
}

impl Drop for DataDirLock {
    fn drop(&mut self) {
        // Closing it would not do at once: a child process that is just being started has the file open too, until it
        // executes its program.
        if let Err(error) = self.file.unlock() {
            tracing::warn!(dir = %self.dir.display(), %error, "give back the data directory");
        }
    }
}

/// Why a data directory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another service has it. It is not waited for.
    #[error("the data directory {} is in use by another service{}", dir.display(), holder.map(|pid| format!(" (process {pid})")).unwrap_or_default())]
    Held {
        /// The directory.
        dir: PathBuf,
        /// The other's process id, where it could be read.
        holder: Option<u32>,
    },
    /// It cannot be made, or nothing can be written into it.
    #[error("the data directory {} cannot be written", dir.display())]
    NotWritable {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl DataDirLock {
    /// Makes the directory where it does not exist (mode 0700) and takes the lock. Does not wait. Blocks on the disk.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn acquire(dir: &Path) -> Result<Self, LockError> {
        let not_writable = |source| LockError::NotWritable { dir: dir.to_owned(), source };
        make_dir(dir).map_err(not_writable)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            // The holder's process id must not vanish because somebody else tries.
            .truncate(false)
            .mode(0o600)
            .open(dir.join(FILE))
            .map_err(not_writable)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(LockError::Held { dir: dir.to_owned(), holder: read_holder(&mut file) });
            }
            Err(TryLockError::Error(source)) => return Err(not_writable(source)),
        }
        // For the message of whoever is refused. The lock holds without it, so a full disk is no reason to fail here.
        let noted = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        if let Err(error) = noted {
            tracing::warn!(dir = %dir.display(), %error, "could not note the process id in the lock file");
        }
        Ok(Self { dir: dir.to_owned(), file })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// Makes `dir` and its parents; makes the new entry durable, since a store in it is to survive loss of power.
fn make_dir(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => Ok(()),
    }
}

fn read_holder(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_refused_and_told_the_directory_and_the_holder() {
        let dir = tempfile::tempdir().unwrap();
        let first = DataDirLock::acquire(dir.path()).unwrap();
        let error = DataDirLock::acquire(dir.path()).unwrap_err();
        assert!(
            matches!(&error, LockError::Held { dir: d, holder: Some(pid) } if d == dir.path() && *pid == std::process::id())
        );
        assert!(error.to_string().contains(&dir.path().display().to_string()), "{error}");
        drop(first);
        DataDirLock::acquire(dir.path()).unwrap();
    }

    #[test]
    fn a_directory_that_does_not_exist_is_made_for_its_owner_only() {
        use std::os::unix::fs::PermissionsExt as _;

        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("a/b");
        let _lock = DataDirLock::acquire(&dir).unwrap();
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_file_in_the_directory_s_place_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(DataDirLock::acquire(file.path()), Err(LockError::NotWritable { .. })));
    }
}
