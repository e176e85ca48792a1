//! Objects as files below a directory.
//!
//! Not `object_store`'s own `LocalFileSystem`, although that can sync since 0.14, because it
//! - writes aside under the object's own name plus `#1`, so a name of 255 bytes, or one that ends in `#1`, is refused;
//! - leaves that file behind when the process is killed, with nothing to tell it from an upload that goes on;
//! - syncs only the folders that a `put` made itself, so of two that meet in a new folder the one that came second answers
//!   before the folder's own entry is durable.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{
    StreamExt as _, TryStreamExt as _,
    stream::{self, BoxStream},
};
use runner_core::artifact::{
    ArtifactError, ArtifactErrorKind, ArtifactKey, ArtifactMeta, ArtifactStore, ByteStream,
};
use rustix::fs::FlockOperation;
use tokio::sync::mpsc;

/// An object store in a directory. An object of key `a/b` is the file `objects/a/b`; what is on its way lies in `partial`.
///
/// When a `put` returns, the file and every folder above it are synced. A killed process leaves a partial file at most,
/// which the next [`DirectoryArtifacts::open`] removes; it knows those that are still written to by their lock.
///
/// One anomaly is allowed: an object and a folder cannot share a name, so where `a` is an object, `a/b` cannot be one
/// (`Other`). No key that the service makes is below another.
#[derive(Debug, Clone)]
pub struct DirectoryArtifacts {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    objects: PathBuf,
    partial: PathBuf,
    next: AtomicU64,
    /// Held to read while an object is put into its folder, to write while an empty folder is removed.
    folders: RwLock<()>,
    /// Folders whose own entry is known to be durable, with all above them. A cache: forgetting costs a sync.
    durable: Mutex<HashSet<PathBuf>>,
}

/// Read at once, in bytes, at the beginning of an object: a reader that stops early holds no more than this.
const FIRST_CHUNK: u64 = 64 * 1024;
/// Read at once, in bytes, by a reader that goes on: larger reads cost less for each byte.
const CHUNK: u64 = 512 * 1024;
/// Folders that are remembered as durable.
const REMEMBERED: usize = 16 * 1024;

impl DirectoryArtifacts {
    /// Opens the store in `root`, which is made where it does not exist, and removes partial files that nobody writes any
    /// more. Blocks.
    ///
    /// # Errors
    /// Where the directory cannot be made or written.
    pub fn open(root: &Path) -> Result<Self, ArtifactError> {
        let failed = |error| mapped(error, &format!("open the object store in {}", root.display()));
        let shared = Shared {
            objects: root.join("objects"),
            partial: root.join("partial"),
            next: AtomicU64::new(0),
            folders: RwLock::default(),
            durable: Mutex::default(),
        };
        fs::create_dir_all(&shared.objects).map_err(failed)?;
        fs::create_dir_all(&shared.partial).map_err(failed)?;
        for folder in
            [&shared.objects, root, root.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(root)]
        {
            sync_folder(folder).map_err(failed)?;
        }
        shared.sweep().map_err(failed)?;
        Ok(Self { shared: Arc::new(shared) })
    }

    async fn blocking<T: Send + 'static>(
        &self,
        context: String,
        work: impl FnOnce(&Shared) -> io::Result<T> + Send + 'static,
    ) -> Result<T, ArtifactError> {
        let shared = Arc::clone(&self.shared);
        match tokio::task::spawn_blocking(move || work(&shared).map_err(|error| mapped(error, &context)))
            .await
        {
            Ok(result) => result,
            Err(stopped) => Err(stopped_error(stopped)),
        }
    }
}

impl Shared {
    fn path(&self, key: &ArtifactKey) -> PathBuf {
        self.objects.join(key.as_str())
    }

    /// Makes a file that is locked for as long as it is open, so that a sweep leaves it alone.
    fn begin(self: &Arc<Self>) -> io::Result<Partial> {
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let path = self.partial.join(format!("{}-{number}", std::process::id()));
            let file = match File::options().read(true).write(true).create_new(true).open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error),
            };
            let partial = Partial { shared: Arc::clone(self), path, file: Some(file), size: 0 };
            // A sweep may hold the lock for a moment, and then removes the file.
            match rustix::fs::flock(partial.file()?, FlockOperation::LockExclusive) {
                Ok(()) if rustix::fs::fstat(partial.file()?)?.st_nlink > 0 => return Ok(partial),
                Ok(()) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn sweep(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.partial)? {
            let path = entry?.path();
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    fn remembered(&self) -> std::sync::MutexGuard<'_, HashSet<PathBuf>> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the folder and everything above it exist, durably.
    fn make_folder(&self, folder: &Path) -> io::Result<()> {
        if folder == self.objects || (self.remembered().contains(folder) && folder.is_dir()) {
            return Ok(());
        }
        let above = folder.parent().unwrap_or(&self.objects);
        self.make_folder(above)?;
        match fs::create_dir(folder) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(io::Error::new(
                    io::ErrorKind::NotADirectory,
                    "an object has the name of this folder",
                ));
            }
            Err(error) => return Err(error),
        }
        // Also where it existed: whoever made it may not have come to this yet.
        sync_folder(above)?;
        let mut durable = self.remembered();
        if durable.len() >= REMEMBERED {
            durable.clear();
        }
        durable.insert(folder.to_owned());
        Ok(())
    }

    /// Removes an object, and the folders that are empty then, so that their names can be objects'.
    fn delete(&self, key: &ArtifactKey) -> io::Result<()> {
        let path = self.path(key);
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if is_absent(&error) || error.kind() == io::ErrorKind::IsADirectory => return Ok(()),
            Err(error) => return Err(error),
        }
        let mut folder = path.parent();
        while let Some(at) = folder.filter(|at| *at != self.objects) {
            let _alone = self.folders.write().unwrap_or_else(PoisonError::into_inner);
            self.remembered().remove(at);
            if fs::remove_dir(at).is_err() {
                break;
            }
            folder = at.parent();
        }
        Ok(())
    }
}

/// A file on its way. Dropping it removes it.
struct Partial {
    shared: Arc<Shared>,
    path: PathBuf,
    file: Option<File>,
    size: u64,
}

impl Partial {
    fn file(&self) -> io::Result<&File> {
        self.file.as_ref().ok_or_else(|| io::Error::other("the partial file is closed"))
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.size += bytes.len() as u64;
        self.file()?.write_all(bytes)
    }

    /// Makes it the object of `key`, durably.
    fn publish(mut self, key: &ArtifactKey) -> io::Result<u64> {
        let path = self.shared.path(key);
        let folder = path.parent().unwrap_or(&self.shared.objects).to_owned();
        self.file()?.sync_all()?;
        {
            let _others = self.shared.folders.read().unwrap_or_else(PoisonError::into_inner);
            self.shared.make_folder(&folder)?;
            fs::rename(&self.path, &path)?;
            // From here on the name is not ours to remove.
            self.file = None;
            sync_folder(&folder)?;
        }
        Ok(self.size)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.file.is_some() {
            // Best effort: the next start sweeps.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[async_trait]
impl ArtifactStore for DirectoryArtifacts {
    async fn put(&self, key: &ArtifactKey, mut bytes: ByteStream) -> Result<u64, ArtifactError> {
        let context = format!("store {key}");
        let shared = Arc::clone(&self.shared);
        let mut partial = self.blocking(context.clone(), move |_| shared.begin()).await?;
        while let Some(chunk) = bytes.try_next().await? {
            partial = self
                .blocking(context.clone(), move |_| {
                    partial.write(&chunk)?;
                    Ok(partial)
                })
                .await?;
        }
        let key = key.clone();
        self.blocking(context, move |_| partial.publish(&key)).await
    }

    async fn put_bytes(&self, key: &ArtifactKey, bytes: Bytes) -> Result<(), ArtifactError> {
        let (shared, to) = (Arc::clone(&self.shared), key.clone());
        self.blocking(format!("store {key}"), move |_| {
            let mut partial = shared.begin()?;
            partial.write(&bytes)?;
            partial.publish(&to).map(drop)
        })
        .await
    }

    async fn get(
        &self,
        key: &ArtifactKey,
        range: Range<u64>,
    ) -> Result<(ArtifactMeta, ByteStream), ArtifactError> {
        let context = format!("read {key}");
        let from = key.clone();
        let (file, size) = self
            .blocking(context.clone(), move |shared| {
                let mut file = File::open(shared.path(&from)).map_err(absent)?;
                let size = object_size(&file.metadata()?)?;
                file.seek(SeekFrom::Start(range.start.min(size)))?;
                Ok((file, size))
            })
            .await?;
        let left = range.end.min(size).saturating_sub(range.start);
        let stream =
            stream::try_unfold((file, 0, left, context), |(mut file, done, left, context)| async move {
                if left == 0 {
                    return Ok(None);
                }
                let work = move || {
                    // A quarter of what was read already: a reader that goes on soon reads the most at once.
                    let wanted = left.min((done / 4).clamp(FIRST_CHUNK, CHUNK));
                    let mut chunk = Vec::with_capacity(usize::try_from(wanted).unwrap_or_default());
                    match (&mut file).take(wanted).read_to_end(&mut chunk) {
                        // Objects are only ever replaced whole, so someone else cut this file.
                        Ok(0) => Err(ArtifactError::new(
                            ArtifactErrorKind::Other,
                            format!("{context}: the file ends {left} bytes too early"),
                        )),
                        Ok(read) => {
                            let read = read as u64;
                            Ok(Some((Bytes::from(chunk), (file, done + read, left - read, context))))
                        }
                        Err(error) => Err(mapped(error, &context)),
                    }
                };
                match tokio::task::spawn_blocking(work).await {
                    Ok(result) => result,
                    Err(stopped) => Err(stopped_error(stopped)),
                }
            });
        Ok((ArtifactMeta { key: key.clone(), size }, stream.boxed()))
    }

    async fn head(&self, key: &ArtifactKey) -> Result<ArtifactMeta, ArtifactError> {
        let of = key.clone();
        let size = self
            .blocking(format!("look up {key}"), move |shared| {
                object_size(&fs::metadata(shared.path(&of)).map_err(absent)?)
            })
            .await?;
        Ok(ArtifactMeta { key: key.clone(), size })
    }

    fn list(&self, prefix: &ArtifactKey) -> BoxStream<'static, Result<ArtifactMeta, ArtifactError>> {
        let (shared, prefix) = (Arc::clone(&self.shared), prefix.clone());
        // The lister runs only as far ahead as this.
        let (sender, receiver) = mpsc::channel(256);
        // Nothing runs before the first poll: the caller may hold no runtime when it makes the stream.
        let start = async move {
            tokio::task::spawn_blocking(move || {
                if let Err(error) = list_below(&shared, &prefix, &sender) {
                    // Nobody listens any more where this fails.
                    let _ = sender.blocking_send(Err(mapped(error, &format!("list {prefix}"))));
                }
            });
            stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) })
        };
        stream::once(start).flatten().boxed()
    }

    async fn delete(&self, key: &ArtifactKey) -> Result<(), ArtifactError> {
        let of = key.clone();
        self.blocking(format!("delete {key}"), move |shared| shared.delete(&of)).await
    }

    async fn probe(&self) -> Result<(), ArtifactError> {
        crate::object::probe(self).await
    }
}

/// The size of an object's file. A folder is no object.
fn object_size(meta: &fs::Metadata) -> io::Result<u64> {
    if meta.is_file() { Ok(meta.len()) } else { Err(io::ErrorKind::NotFound.into()) }
}

type Listed = Result<ArtifactMeta, ArtifactError>;

fn list_below(shared: &Shared, prefix: &ArtifactKey, found: &mpsc::Sender<Listed>) -> io::Result<()> {
    let mut folders = vec![prefix.as_str().to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(shared.objects.join(&folder)) {
            Ok(entries) => entries,
            Err(error) if is_absent(&error) => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            // What is no key was not put here by us.
            let Some(name) = entry.file_name().to_str().map(|name| format!("{folder}/{name}")) else {
                continue;
            };
            let meta = match entry.metadata() {
                Ok(meta) => meta,
                Err(error) if is_absent(&error) => continue,
                Err(error) => return Err(error),
            };
            if meta.is_dir() {
                folders.push(name);
            } else if meta.is_file()
                && let Ok(key) = name.parse()
                && found.blocking_send(Ok(ArtifactMeta { key, size: meta.len() })).is_err()
            {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// To one who reads, a key below an object is one that is not there.
fn absent(error: io::Error) -> io::Error {
    if is_absent(&error) { io::ErrorKind::NotFound.into() } else { error }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn stopped_error(stopped: tokio::task::JoinError) -> ArtifactError {
    ArtifactError::with_source(ArtifactErrorKind::Unavailable, "the runtime stopped", stopped)
}

fn mapped(error: io::Error, context: &str) -> ArtifactError {
    ArtifactError::with_source(kind_of(&error), context, error)
}

/// What an I/O error means to a store.
pub(crate) fn kind_of(error: &io::Error) -> ArtifactErrorKind {
    match error.kind() {
        io::ErrorKind::NotFound => ArtifactErrorKind::NotFound,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ArtifactErrorKind::Full,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ArtifactErrorKind::Denied,
        io::ErrorKind::TimedOut
        | io::ErrorKind::Interrupted
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionRefused
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::UnexpectedEof
        | io::ErrorKind::StaleNetworkFileHandle
        | io::ErrorKind::OutOfMemory
        | io::ErrorKind::ResourceBusy => ArtifactErrorKind::Unavailable,
        // Too many open files, of this process or of the machine: both pass.
        _ if matches!(error.raw_os_error(), Some(errno::EMFILE | errno::ENFILE)) => {
            ArtifactErrorKind::Unavailable
        }
        _ => ArtifactErrorKind::Other,
    }
}

mod errno {
    use rustix::io::Errno;

    pub(super) const EMFILE: i32 = Errno::MFILE.raw_os_error();
    pub(super) const ENFILE: i32 = Errno::NFILE.raw_os_error();
}
