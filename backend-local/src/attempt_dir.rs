//! An attempt's directory: what lies where, and whose it is.
//!
//! `<base>/<RUN>.<N>/`, mode 0700, appears whole by a rename and disappears by one, so that whatever carries an attempt's
//! name also carries the ownership mark. Inside, beside what `runner_agent::exec::protocol` says:
//!
//! | name | what |
//! |---|---|
//! | `owner` | the ownership mark: the service's instance |
//! | `in/N`, `out/N` | host side of the mount plan's mounts |
//! | `tmp`, `home`, `home/runner` | what the program sees as `/tmp`, `/home` and its `HOME` |
//! | `root/upper`, `root/work` | what the program changes of its image |
//! | `staged.json` | what staging the inputs came to; where it is absent, staging begins anew |
//! | `stopped` | the attempt was stopped before it had a shim: it never gets one |
//! | `published.json` | that the outputs cannot be published; what was published is found in the store |

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use runner_agent::exec::protocol::name;
use runner_core::{clock::Timestamp, id::AttemptId, spec::User};
use serde::{Serialize, de::DeserializeOwned};

use crate::remove::remove_tree;

const OWNER: &str = "owner";
/// Before the rename that makes it an attempt's directory.
const NEW: &str = ".new.";
/// After the rename that ends it.
const GONE: &str = ".gone.";

/// Names the files of one attempt. Says nothing of whether they exist.
#[derive(Debug, Clone)]
pub(crate) struct AttemptDir {
    base: PathBuf,
    path: PathBuf,
    attempt: AttemptId,
}

impl AttemptDir {
    pub(crate) fn new(base: &Path, attempt: AttemptId) -> Self {
        Self { base: base.to_owned(), path: base.join(attempt.to_string()), attempt }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn exec(&self) -> PathBuf {
        self.path.join(name::EXEC)
    }

    pub(crate) fn shim(&self) -> PathBuf {
        self.path.join(name::SHIM)
    }

    pub(crate) fn started(&self) -> PathBuf {
        self.path.join(name::STARTED)
    }

    pub(crate) fn exit(&self) -> PathBuf {
        self.path.join(name::EXIT)
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.path.join(name::LOG)
    }

    pub(crate) fn tmp(&self) -> PathBuf {
        self.path.join("tmp")
    }

    /// What is above the program's home directory. Not the program's to write to.
    pub(crate) fn homes(&self) -> PathBuf {
        self.path.join("home")
    }

    pub(crate) fn home(&self) -> PathBuf {
        self.path.join("home/runner")
    }

    pub(crate) fn upper(&self) -> PathBuf {
        self.path.join("root/upper")
    }

    pub(crate) fn staged(&self) -> PathBuf {
        self.path.join("staged.json")
    }

    pub(crate) fn stopped(&self) -> PathBuf {
        self.path.join("stopped")
    }

    pub(crate) fn published(&self) -> PathBuf {
        self.path.join("published.json")
    }

    pub(crate) fn exists(&self) -> bool {
        self.path.symlink_metadata().is_ok()
    }

    /// Makes the directory, whole, or finds it. `owner` is who may write to its scratch directories: `None` where the
    /// service's own user is the program's. `image` says whether the root is an image that is written to.
    pub(crate) fn create(&self, instance: &str, owner: Option<User>, image: bool) -> io::Result<()> {
        if self.exists() {
            return Ok(());
        }
        let new = self.base.join(format!("{NEW}{}", self.attempt));
        match private_dir(&new) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // A process was killed in the middle of the lines below.
                remove_tree(&new)?;
                private_dir(&new)?;
            }
            other => other?,
        }
        fs::write(new.join(OWNER), instance)?;
        private_dir(&new.join(name::LOG))?;
        open_dir(&new.join("home"))?;
        for scratch in ["tmp", "home/runner"] {
            let path = new.join(scratch);
            private_dir(&path)?;
            give(&path, owner)?;
        }
        if image {
            private_dir(&new.join("root"))?;
            private_dir(&new.join("root/work"))?;
            // The upper directory's own mode becomes that of `/`.
            open_dir(&new.join("root/upper"))?;
        }
        fs::rename(&new, &self.path)
    }

    /// Removes everything. Idempotent.
    pub(crate) fn remove(&self) -> io::Result<()> {
        let gone = self.base.join(format!("{GONE}{}", self.attempt));
        match fs::rename(&self.path, &gone) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                // An earlier removal was cut short, and the attempt was made anew since.
                remove_tree(&gone)?;
                fs::rename(&self.path, &gone)?;
            }
            Err(error) => return Err(error),
        }
        remove_tree(&gone)?;
        remove_tree(&self.base.join(format!("{NEW}{}", self.attempt)))
    }

    /// Says that the attempt must never get a shim.
    pub(crate) fn mark_stopped(&self, time: Timestamp) -> io::Result<()> {
        self.write(&self.stopped(), &time)
    }

    /// Writes a record that appears whole.
    pub(crate) fn write<T: Serialize>(&self, path: &Path, record: &T) -> io::Result<()> {
        let mut aside = path.as_os_str().to_owned();
        aside.push(".new");
        fs::write(&aside, serde_json::to_vec(record).map_err(io::Error::other)?)?;
        fs::rename(&aside, path)
    }
}

/// Reads a record. `None`: there is none (yet).
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(path)
}

/// A directory that the program, who is somebody else, passes through.
fn open_dir(path: &Path) -> io::Result<()> {
    // Whatever the umask is: the mode of a new directory passes through it.
    private_dir(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

/// Gives a directory that we made to the program's user.
pub(crate) fn give(path: &Path, owner: Option<User>) -> io::Result<()> {
    match owner {
        Some(user) => std::os::unix::fs::lchown(path, Some(user.uid), Some(user.gid)),
        None => Ok(()),
    }
}

/// Every attempt below `base` whose directory carries the mark of `instance`.
pub(crate) fn list(base: &Path, instance: &str) -> io::Result<Vec<AttemptId>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(base)? {
        let entry = entry?;
        let Some(attempt) = entry.file_name().to_str().and_then(|name| name.parse::<AttemptId>().ok()) else {
            continue;
        };
        match fs::read(entry.path().join(OWNER)) {
            Ok(mark) if mark == instance.as_bytes() => found.push(attempt),
            // Another service's, or nobody's that we know: not ours to touch.
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(error) => return Err(error),
        }
    }
    found.sort();
    Ok(found)
}

/// Finishes what a killed process had begun: makings and removals.
pub(crate) fn sweep(base: &Path) -> io::Result<usize> {
    let mut swept = 0;
    for entry in fs::read_dir(base)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let attempt = name.strip_prefix(NEW).or_else(|| name.strip_prefix(GONE));
        if attempt.is_some_and(|attempt| attempt.parse::<AttemptId>().is_ok())
            && entry.metadata()?.uid() == rustix::process::geteuid().as_raw()
        {
            remove_tree(&entry.path())?;
            swept += 1;
        }
    }
    Ok(swept)
}

#[cfg(test)]
mod tests {
    use runner_core::id::RunId;

    use super::*;

    fn attempt(number: u32) -> AttemptId {
        AttemptId { run: RunId::new(uuid::Uuid::from_u128(7)), number }
    }

    #[test]
    fn only_directories_with_our_mark_are_listed() {
        let base = tempfile::tempdir().unwrap();
        for (number, instance) in [(1, "ours"), (2, "theirs"), (3, "ours")] {
            AttemptDir::new(base.path(), attempt(number)).create(instance, None, false).unwrap();
        }
        fs::create_dir(base.path().join(attempt(4).to_string())).unwrap();
        fs::create_dir(base.path().join("else")).unwrap();
        fs::write(base.path().join(attempt(5).to_string()), "a file").unwrap();
        assert_eq!(list(base.path(), "ours").unwrap(), [attempt(1), attempt(3)]);
    }

    #[test]
    fn making_twice_and_removing_twice_are_fine() {
        let base = tempfile::tempdir().unwrap();
        let dir = AttemptDir::new(base.path(), attempt(1));
        dir.create("ours", None, true).unwrap();
        fs::write(dir.tmp().join("kept"), "").unwrap();
        dir.create("ours", None, true).unwrap();
        assert!(dir.tmp().join("kept").exists(), "the second making changes nothing");
        dir.remove().unwrap();
        dir.remove().unwrap();
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_process_left_is_swept_or_made_anew() {
        let base = tempfile::tempdir().unwrap();
        let half = base.path().join(format!("{NEW}{}", attempt(1)));
        fs::create_dir_all(half.join("tmp")).unwrap();
        fs::create_dir_all(base.path().join(format!("{GONE}{}", attempt(2))).join("x")).unwrap();
        fs::create_dir_all(base.path().join(".gone.not-an-attempt")).unwrap();
        let dir = AttemptDir::new(base.path(), attempt(1));
        dir.create("ours", None, false).unwrap();
        assert_eq!(sweep(base.path()).unwrap(), 1);
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 2, "the attempt, and what is not ours");
    }

    #[test]
    fn a_removal_that_was_cut_short_does_not_stop_the_next() {
        let base = tempfile::tempdir().unwrap();
        fs::create_dir_all(base.path().join(format!("{GONE}{}", attempt(1))).join("left")).unwrap();
        let dir = AttemptDir::new(base.path(), attempt(1));
        dir.create("ours", None, false).unwrap();
        dir.remove().unwrap();
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_record_reads_back_and_a_broken_one_is_an_error() {
        let base = tempfile::tempdir().unwrap();
        let dir = AttemptDir::new(base.path(), attempt(1));
        dir.create("ours", None, false).unwrap();
        assert_eq!(read::<u32>(&dir.published()).unwrap(), None);
        dir.write(&dir.published(), &7_u32).unwrap();
        assert_eq!(read::<u32>(&dir.published()).unwrap(), Some(7));
        fs::write(dir.published(), "{").unwrap();
        assert_eq!(read::<u32>(&dir.published()).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
