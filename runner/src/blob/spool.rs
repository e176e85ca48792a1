//! What has come of uploads that may be resumed: a file each, in a directory of the service, until the object is stored.
//!
//! A file's name says what was promised, so nothing else needs to be kept, and a restart knows everything. The files are not
//! synced: the digest is checked over the whole before anything is stored, so bytes that a power failure took are found out.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, UNIX_EPOCH},
};

use bytes::Bytes;
use runner_artifacts::blob::BlobGrant;
use runner_core::clock::{Clock, Timestamp};
use sha2::{Digest as _, Sha256};

/// Most uploads at once, however small: each is a file.
const MAX_FILES: usize = 4096;

/// An upload that may be resumed: what was promised of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Promised {
    name: String,
    /// In bytes.
    pub(super) size: u64,
}

impl Promised {
    /// `None` where too little was promised: without size and digest, nobody could say that the pieces belong together.
    pub(super) fn of(grant: &BlobGrant) -> Option<Self> {
        let (size, sha256) = (grant.size?, grant.sha256.as_ref()?);
        let digest = Sha256::digest(format!("{}\n{size}\n{sha256}\n", grant.key));
        Some(Self { name: hex::encode(digest), size })
    }

    fn parse(name: &str) -> Option<Self> {
        let (hex, size) = name.split_once('-')?;
        let valid = hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        valid.then_some(Self { name: hex.to_owned(), size: size.parse().ok()? })
    }
}

/// The directory, and how much has been promised to it. Every method but [`Spool::held`] blocks on the disk.
#[derive(Debug)]
pub struct Spool {
    dir: PathBuf,
    max_bytes: u64,
    clock: Arc<dyn Clock>,
    known: Mutex<BTreeSet<Promised>>,
}

impl Spool {
    /// Opens the directory, which is made where it does not exist. What is none of ours in it is removed.
    ///
    /// # Errors
    /// Where the directory cannot be made or read.
    pub fn open(dir: &Path, max_bytes: u64, clock: Arc<dyn Clock>) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let mut known = BTreeSet::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            match entry.file_name().to_str().and_then(Promised::parse) {
                Some(promised) => {
                    known.insert(promised);
                }
                None => remove(&entry.path())?,
            }
        }
        Ok(Self { dir: dir.to_owned(), max_bytes, clock, known: Mutex::new(known) })
    }

    fn known(&self) -> MutexGuard<'_, BTreeSet<Promised>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, promised: &Promised) -> PathBuf {
        self.dir.join(format!("{}-{}", promised.name, promised.size))
    }

    /// Makes room for an upload, if it has none yet. False: there is none.
    pub(super) fn admit(&self, promised: &Promised) -> bool {
        let mut known = self.known();
        if known.contains(promised) {
            return true;
        }
        let taken = known.iter().fold(promised.size, |sum, one| sum.saturating_add(one.size));
        let admitted = taken <= self.max_bytes && known.len() < MAX_FILES;
        if admitted {
            known.insert(promised.clone());
        }
        admitted
    }

    /// How many bytes have come.
    pub(super) fn offset(&self, promised: &Promised) -> io::Result<u64> {
        match fs::metadata(self.path(promised)) {
            Ok(found) => Ok(found.len()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Opens the file for bytes that follow those that it has.
    pub(super) fn append(&self, promised: &Promised) -> io::Result<Appending> {
        let file = fs::File::options().append(true).create(true).mode(0o600).open(self.path(promised))?;
        Ok(Appending(file))
    }

    /// Opens the file to be read from its beginning.
    pub(super) fn read(&self, promised: &Promised) -> io::Result<fs::File> {
        fs::File::open(self.path(promised))
    }

    /// Forgets an upload.
    pub(super) fn forget(&self, promised: &Promised) -> io::Result<()> {
        remove(&self.path(promised))?;
        self.known().remove(promised);
        Ok(())
    }

    /// Forgets what got nothing for so long. Answers how many uploads that were.
    ///
    /// # Errors
    /// Where a file cannot be looked at or removed.
    pub fn sweep(&self, idle: Duration) -> io::Result<usize> {
        let oldest = self.clock.now() - idle;
        let known: Vec<Promised> = self.known().iter().cloned().collect();
        let mut swept = 0;
        for promised in known {
            let modified = match fs::metadata(self.path(&promised)) {
                Ok(found) => found.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default(),
                // Admitted this moment; or nothing ever came.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let modified = Timestamp::from_micros(i64::try_from(modified.as_micros()).unwrap_or(i64::MAX));
            if modified < oldest {
                self.forget(&promised)?;
                swept += 1;
            }
        }
        Ok(swept)
    }

    /// Uploads that are on their way.
    pub fn held(&self) -> usize {
        self.known().len()
    }
}

/// A file that grows.
pub(super) struct Appending(fs::File);

impl Appending {
    pub(super) fn write(&mut self, bytes: &Bytes) -> io::Result<()> {
        self.0.write_all(bytes)
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use runner_core::clock::SystemClock;

    use super::*;

    fn promised(number: u64, size: u64) -> Promised {
        Promised { name: format!("{number:064x}"), size }
    }

    fn open(dir: &Path, max_bytes: u64) -> Spool {
        Spool::open(dir, max_bytes, Arc::new(SystemClock::new())).unwrap()
    }

    #[test]
    fn what_is_promised_is_never_more_than_there_is_room_for_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let spool = open(dir.path(), 100);
        let (first, second) = (promised(1, 60), promised(2, 41));
        assert!(spool.admit(&first) && spool.admit(&first));
        assert!(!spool.admit(&second));
        spool.append(&first).unwrap().write(&Bytes::from_static(b"abc")).unwrap();
        fs::write(dir.path().join("else"), "x").unwrap();
        drop(spool);
        let spool = open(dir.path(), 100);
        assert!(!dir.path().join("else").exists(), "what is none of ours goes");
        assert_eq!((spool.offset(&first).unwrap(), spool.offset(&second).unwrap()), (3, 0));
        assert!(!spool.admit(&second));
        spool.append(&first).unwrap().write(&Bytes::from_static(b"d")).unwrap();
        assert_eq!(fs::read(spool.path(&first)).unwrap(), b"abcd");
        spool.forget(&first).unwrap();
        spool.forget(&first).unwrap();
        assert!(spool.admit(&second) && spool.held() == 1);
    }

    #[test]
    fn what_got_nothing_for_long_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let spool = open(dir.path(), 100);
        let one = promised(1, 60);
        assert!(spool.admit(&one));
        spool.append(&one).unwrap().write(&Bytes::from_static(b"abc")).unwrap();
        assert_eq!(spool.sweep(Duration::from_secs(3600)).unwrap(), 0);
        let file = fs::File::options().write(true).open(spool.path(&one)).unwrap();
        file.set_modified(UNIX_EPOCH + Duration::from_secs(1_000_000)).unwrap();
        assert_eq!(spool.sweep(Duration::from_secs(3600)).unwrap(), 1);
        assert_eq!((spool.held(), fs::read_dir(dir.path()).unwrap().count()), (0, 0));
    }

    #[test]
    fn only_a_size_and_a_digest_together_can_be_resumed() {
        let grant = |size, sha256: Option<&str>| BlobGrant {
            key: "uploads/t/u/files/a".parse().unwrap(),
            method: runner_artifacts::blob::BlobMethod::Put,
            size,
            sha256: sha256.map(str::to_owned),
            expires: Timestamp::from_micros(0),
        };
        assert_eq!(Promised::of(&grant(None, Some("00"))), None);
        assert_eq!(Promised::of(&grant(Some(1), None)), None);
        let one = Promised::of(&grant(Some(1), Some("00"))).unwrap();
        assert_ne!(one.name, Promised::of(&grant(Some(1), Some("01"))).unwrap().name);
        assert_eq!(Promised::parse(&format!("{}-1", one.name)), Some(one));
        assert_eq!(Promised::parse("x-1"), None);
    }
}
