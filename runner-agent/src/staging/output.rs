//! One output, while it is published.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read as _, Seek as _},
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::fs::{FileExt as _, MetadataExt as _},
    },
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use runner_core::{
    artifact::{
        ArtifactError, ArtifactErrorKind, ArtifactKey, ByteStream, EntryKind, KnownObject, ManifestEntry,
    },
    backend::{Direction, Progress, ProgressSink},
    crash,
    spec::Output,
};
use rustix::{fs::SeekFrom, io::Errno};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use super::{
    OutputPublishing, Root, StagingError, StagingErrorKind,
    entry_name::{self, shown},
    error::About,
    fetch::blocking,
    publish::join,
    select::Selection,
    walk::{Caps, Found, Kind, WalkError, kind, walk},
};

/// Counts what was stored, and tells.
pub(super) struct Counter<'a> {
    sink: &'a dyn ProgressSink,
    bytes: AtomicU64,
    files: AtomicU64,
}

impl<'a> Counter<'a> {
    pub(super) fn new(sink: &'a dyn ProgressSink) -> Self {
        Self { sink, bytes: AtomicU64::new(0), files: AtomicU64::new(0) }
    }

    fn tell(&self) {
        self.sink.progress(Progress {
            direction: Direction::Output,
            bytes_done: self.bytes.load(Ordering::Relaxed),
            bytes_total: 0,
            files_done: self.files.load(Ordering::Relaxed),
            files_total: 0,
        });
    }
}

/// One output, while it is published.
pub(super) struct OneOutput<'a> {
    job: &'a OutputPublishing<'a>,
    index: usize,
    output: &'a Output,
    about: About,
    /// The base of a glob; else empty.
    base: String,
    /// What its files' keys begin with.
    prefix: ArtifactKey,
    counter: &'a Counter<'a>,
    max_bytes: u64,
    max_entries: u64,
    /// Bytes read so far, of all its files.
    used: Arc<AtomicU64>,
    pub(super) entries: Vec<ManifestEntry>,
    /// What was skipped → how many, and the first one's path.
    skipped: BTreeMap<&'static str, (u64, String)>,
}

/// What an attempt is called below a destination: `RUN/ATTEMPT`, the last two names of its prefix.
fn name_of(attempt_prefix: &ArtifactKey) -> &str {
    let prefix = attempt_prefix.as_str();
    prefix.rmatch_indices('/').nth(1).map_or(prefix, |(at, _)| &prefix[at + 1..])
}

impl<'a> OneOutput<'a> {
    pub(super) fn new(
        job: &'a OutputPublishing<'a>,
        index: usize,
        output: &'a Output,
        counter: &'a Counter<'a>,
        max_entries: u64,
    ) -> Result<Self, StagingError> {
        let about = About::output(index);
        let prefix = match &output.destination {
            Some(uri) => join(uri.key(), name_of(job.attempt_prefix), &about)?,
            None => join(job.attempt_prefix, &format!("outputs/{index}"), &about)?,
        };
        Ok(Self {
            job,
            index,
            output,
            about,
            base: String::new(),
            prefix,
            counter,
            max_bytes: output.max_bytes.unwrap_or(job.limits.output_bytes),
            max_entries,
            used: Arc::default(),
            entries: Vec::new(),
            skipped: BTreeMap::new(),
        })
    }

    pub(super) async fn publish(&mut self) -> Result<(), StagingError> {
        if self.output.glob {
            return self.publish_glob().await;
        }
        match self.open().await? {
            Opened::Nothing if self.output.required && !self.job.partial => {
                let what = format!("the program did not write {}, which is required", self.output.path);
                Err(self.about.error(StagingErrorKind::Absent, what))
            }
            Opened::Nothing => Ok(()),
            Opened::Other(what) => {
                let what = format!(
                    "{} is among the {what}; only files and directories are stored",
                    self.output.path
                );
                Err(self.about.error(StagingErrorKind::NotAFile, what))
            }
            Opened::Forbidden(error) => Err(self.forbidden(error)),
            Opened::File(file, mode) => {
                let name = self.output.path.rsplit('/').next().unwrap_or_default();
                let entry = self.store(OsString::from(name), file, mode).await?;
                // The one file of an output needs no path below it.
                self.entries.push(ManifestEntry { path: String::new(), ..entry });
                Ok(())
            }
            Opened::Directory(dir, mode) => {
                self.entries.push(self.directory_entry(OsStr::new(""), mode));
                self.publish_directory(dir, Selection::all()).await.map(drop)
            }
        }
    }

    async fn publish_glob(&mut self) -> Result<(), StagingError> {
        let pattern = self.output.pattern().map_err(|fault| {
            // Only of a spec that was not validated.
            self.about.error(StagingErrorKind::Unsupported, format!("publish {}: {fault}", self.output.path))
        })?;
        self.base = pattern.base().to_owned();
        let selection = Selection::matching(pattern, &self.job.spec.outputs, self.index);
        let matched = match self.open().await? {
            Opened::Directory(dir, _) => self.publish_directory(dir, selection).await?,
            Opened::Nothing | Opened::File(..) | Opened::Other(_) => 0,
            Opened::Forbidden(error) => return Err(self.forbidden(error)),
        };
        if matched == 0 && self.output.required && !self.job.partial {
            let what =
                format!("the program wrote nothing that {} matches, which is required", self.output.path);
            return Err(self.about.error(StagingErrorKind::Absent, what));
        }
        Ok(())
    }

    fn forbidden(&self, error: io::Error) -> StagingError {
        let what = format!("open {}: its permissions forbid it", self.output.path);
        StagingError { source: Some(error.into()), ..self.about.error(StagingErrorKind::Unreadable, what) }
    }

    /// Opens the output's place: of a glob, its base.
    async fn open(&self) -> Result<Opened, StagingError> {
        let place = &self.job.plan.outputs[self.index];
        let (root, mount) = (self.job.root.clone(), self.job.plan.mounts[place.mount].host.clone());
        let (relative, about) = (place.relative.clone(), self.about.clone());
        let context = format!("open {}", self.output.path);
        blocking(&about, context, move || open(&root, &mount, &relative)).await
    }

    /// Stores what is selected of a directory. Answers how many entries that was, with those that another output has.
    async fn publish_directory(&mut self, dir: OwnedFd, selection: Selection) -> Result<u64, StagingError> {
        let caps = Caps { depth: self.job.limits.depth, entries: self.max_entries };
        // Each file in the channel is open.
        let parallel = self.job.limits.parallel.max(1);
        let (sender, receiver) = mpsc::channel(parallel);
        let walker = tokio::task::spawn_blocking(move || walk(dir, &selection, caps, &sender));
        let mut entries = Vec::new();
        let mut skipped = std::mem::take(&mut self.skipped);
        let this = &*self;
        let found =
            stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) });
        let mut stored = found
            .map(|found| async move {
                match found {
                    Ok(Found::File { path, file, mode }) => {
                        this.store(path, file, mode).await.map(Stored::Entry)
                    }
                    Ok(Found::Directory { path, mode }) => {
                        Ok(Stored::Entry(this.directory_entry(&path, mode)))
                    }
                    Ok(Found::Elsewhere) => Ok(Stored::Elsewhere),
                    Ok(Found::Skipped { path, what }) => Ok(Stored::Skipped(path, what)),
                    Err(error) => Err(this.walk_error(error)),
                }
            })
            .buffer_unordered(parallel)
            .boxed();
        let mut result = Ok(());
        let mut matched = 0;
        while let Some(next) = stored.next().await {
            match next {
                Ok(Stored::Entry(entry)) => {
                    matched += 1;
                    entries.push(entry);
                }
                Ok(Stored::Elsewhere) => matched += 1,
                Ok(Stored::Skipped(path, what)) => {
                    let first = || (0, entry_name::manifest_path(&path).0);
                    skipped.entry(what).or_insert_with(first).0 += 1;
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        // Dropping the receiver ends the walker.
        drop(stored);
        self.entries.append(&mut entries);
        self.skipped = skipped;
        match walker.await {
            Ok(()) => result.map(|()| matched),
            Err(stopped) => result.and(Err(StagingError {
                source: Some(stopped.into()),
                ..self
                    .about
                    .error(StagingErrorKind::Local, "the runtime stopped while a directory was walked")
            })),
        }
    }

    fn directory_entry(&self, path: &OsStr, mode: u32) -> ManifestEntry {
        let (path, path_encoded) = entry_name::manifest_path(path);
        ManifestEntry {
            output: self.output.path.clone(),
            base: self.base.clone(),
            path,
            path_encoded,
            kind: EntryKind::Directory,
            size: 0,
            sha256: String::new(),
            mode,
            key: None,
        }
    }

    async fn store(&self, path: OsString, file: File, mode: u32) -> Result<ManifestEntry, StagingError> {
        let (text, path_encoded) = entry_name::manifest_path(&path);
        let key = entry_name::key(&self.prefix, &path).ok_or_else(|| {
            self.about.error(
                StagingErrorKind::LimitExceeded,
                format!("no key is short enough for {}", shown(&text)),
            )
        })?;
        let reader = Arc::new(Mutex::new(Reader {
            file,
            sparse: false,
            hasher: Sha256::new(),
            size: 0,
            used: Arc::clone(&self.used),
            max_bytes: self.max_bytes,
            failed: None,
            about: self.about.clone(),
            path: text.clone(),
        }));
        let first = read_chunk(&reader, true).await;
        let result = match first {
            Err(error) => Err(error),
            Ok(first) if first.len() < CHUNK => self.job.artifacts.put_bytes(&key, first).await,
            Ok(first) => self.store_large(&key, &reader, first).await,
        };
        let mut reader = lock(&reader);
        // Why the stream failed is told better by who read the file than by who was to store it.
        if let Some(failed) = reader.failed.take() {
            return Err(failed);
        }
        result.map_err(|error| self.about.store(format!("store {key}"), error))?;
        crash::point("outputs.file-stored");
        self.counter.bytes.fetch_add(reader.size, Ordering::Relaxed);
        self.counter.files.fetch_add(1, Ordering::Relaxed);
        self.counter.tell();
        Ok(ManifestEntry {
            output: self.output.path.clone(),
            base: self.base.clone(),
            path: text,
            path_encoded,
            kind: EntryKind::File,
            size: reader.size,
            sha256: hex::encode(std::mem::take(&mut reader.hasher).finalize()),
            mode,
            key: Some(key),
        })
    }

    /// Stores a file of which this is the first chunk: read twice where that is better, else once.
    async fn store_large(
        &self,
        key: &ArtifactKey,
        reader: &Arc<Mutex<Reader>>,
        first: Bytes,
    ) -> Result<(), ArtifactError> {
        let artifacts = self.job.artifacts;
        let length = lock(reader).file.metadata().map_or(0, |metadata| metadata.len());
        if artifacts.prefers_known(length) {
            let mut chunk = first;
            while !chunk.is_empty() {
                chunk = read_chunk(reader, false).await?;
            }
            let known = lock(reader).known();
            let known = known.map_err(|error| {
                ArtifactError::with_source(ArtifactErrorKind::Other, format!("read {key} again"), error)
            })?;
            if artifacts.put_known(key, &known).await? {
                return Ok(());
            }
            lock(reader).rewind()?;
            return artifacts.put(key, rest(reader)).await.map(drop);
        }
        let bytes: ByteStream = stream::iter([Ok(first)]).chain(rest(reader)).boxed();
        artifacts.put(key, bytes).await.map(drop)
    }

    fn walk_error(&self, error: WalkError) -> StagingError {
        let limits = self.job.limits;
        match error {
            WalkError::TooDeep(path) => {
                let path = shown(&entry_name::manifest_path(&path).0);
                let what = format!("{path} is deeper than {} names", limits.depth);
                self.about.error(StagingErrorKind::LimitExceeded, what)
            }
            WalkError::TooMany => {
                let what =
                    format!("the outputs have more than {} files and directories", limits.output_entries);
                self.about.error(StagingErrorKind::LimitExceeded, what)
            }
            WalkError::Io { path, error } => {
                let path = shown(&entry_name::manifest_path(&path).0);
                let context = format!("read {path} in {}", self.output.path);
                if error.kind() == io::ErrorKind::PermissionDenied {
                    let refused = self.about.error(StagingErrorKind::Unreadable, context);
                    StagingError { source: Some(error.into()), ..refused }
                } else {
                    self.about.local(context, error)
                }
            }
        }
    }

    pub(super) fn take_notes(&mut self) -> Vec<String> {
        let output = &self.output.path;
        std::mem::take(&mut self.skipped)
            .into_iter()
            .map(|(what, (count, first))| {
                format!("{output}: {count} {what} were not stored, the first is {}", shown(&first))
            })
            .collect()
    }

    /// Removes what was stored of an output that is left out. Best effort: no manifest names it, and deleting the run
    /// deletes it too.
    pub(super) async fn discard(&mut self) {
        let job = self.job;
        stream::iter(std::mem::take(&mut self.entries).into_iter().filter_map(|entry| entry.key))
            .for_each_concurrent(job.limits.parallel.max(1), |key| async move {
                if let Err(error) = job.artifacts.delete(&key).await {
                    tracing::debug!(%key, error = %error, "an output that is left out could not be deleted");
                }
            })
            .await;
    }
}

enum Stored {
    Entry(ManifestEntry),
    Elsewhere,
    Skipped(OsString, &'static str),
}

enum Opened {
    Nothing,
    File(File, u32),
    Directory(OwnedFd, u32),
    Other(&'static str),
    Forbidden(io::Error),
}

/// Opens an output, without following any link on the way. Tells what is the output's own fault from what is not.
fn open(root: &Root, mount: &str, relative: &str) -> io::Result<Opened> {
    let mount = root.directory(Path::new(mount))?;
    open_below(&mount, relative).or_else(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => Ok(Opened::Forbidden(error)),
        io::ErrorKind::NotADirectory | io::ErrorKind::NotFound => Ok(Opened::Nothing),
        _ if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => {
            Ok(Opened::Other("places that are reached through symbolic links"))
        }
        _ => Err(error),
    })
}

fn open_below(mount: &Root, relative: &str) -> io::Result<Opened> {
    let mode = |fd: BorrowedFd<'_>| Ok::<_, io::Error>(rustix::fs::fstat(fd)?.st_mode & 0o777);
    if relative.is_empty() {
        let dir = mount.as_fd().try_clone_to_owned()?;
        let mode = mode(dir.as_fd())?;
        return Ok(Opened::Directory(dir, mode));
    }
    let relative = Path::new(relative);
    let Some(found) = mount.file_type(relative)? else { return Ok(Opened::Nothing) };
    Ok(match kind(found) {
        Kind::File => {
            let file = mount.open_file(relative)?;
            let mode = mode(file.as_fd())?;
            Opened::File(file, mode)
        }
        Kind::Directory => {
            let dir = mount.directory(relative)?.as_fd().try_clone_to_owned()?;
            let mode = mode(dir.as_fd())?;
            Opened::Directory(dir, mode)
        }
        Kind::Other(what) => Opened::Other(what),
    })
}

/// Read at once. A file that is smaller is stored without a stream.
const CHUNK: usize = 1024 * 1024;

/// What a hole of a sparse file reads as.
static ZEROS: [u8; CHUNK] = [0; CHUNK];

/// A file while it is read and hashed.
struct Reader {
    file: File,
    /// Fewer bytes on the disk than it has.
    sparse: bool,
    hasher: Sha256,
    size: u64,
    /// Bytes read so far of the whole output.
    used: Arc<AtomicU64>,
    max_bytes: u64,
    failed: Option<StagingError>,
    about: About,
    path: String,
}

/// The next chunk; a short one means the end. On failure, the reader knows why.
async fn read_chunk(reader: &Arc<Mutex<Reader>>, first: bool) -> Result<Bytes, ArtifactError> {
    let reader = Arc::clone(reader);
    let work = move || lock(&reader).read(first);
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(stopped) => Err(ArtifactError::with_source(ArtifactErrorKind::Other, "read an output", stopped)),
    }
}

fn lock(reader: &Arc<Mutex<Reader>>) -> MutexGuard<'_, Reader> {
    reader.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What was not read yet.
fn rest(reader: &Arc<Mutex<Reader>>) -> ByteStream {
    stream::try_unfold(Arc::clone(reader), |reader| async move {
        let chunk = read_chunk(&reader, false).await?;
        Ok((!chunk.is_empty()).then_some((chunk, reader)))
    })
    .boxed()
}

/// So many bytes of a file from its beginning, neither hashed nor counted.
fn again(file: Arc<File>, size: u64) -> ByteStream {
    stream::try_unfold((file, 0), move |(file, at)| async move {
        if at >= size {
            return Ok(None);
        }
        let most = usize::try_from(size - at).map_or(CHUNK, |left| left.min(CHUNK));
        let reading = Arc::clone(&file);
        let read = move || -> io::Result<Bytes> {
            let mut chunk = vec![0; most];
            reading.read_exact_at(&mut chunk, at)?;
            Ok(chunk.into())
        };
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| {
            ArtifactError::with_source(ArtifactErrorKind::Other, "read an output again", source)
        };
        let chunk = tokio::task::spawn_blocking(read).await.map_err(|stopped| failed(stopped.into()))?;
        let chunk = chunk.map_err(|error| failed(error.into()))?;
        let next = at + chunk.len() as u64;
        Ok(Some((chunk, (file, next))))
    })
    .boxed()
}

impl Reader {
    /// What was read, which was all of it.
    fn known(&self) -> io::Result<KnownObject> {
        let (file, size) = (Arc::new(self.file.try_clone()?), self.size);
        let sha256 = hex::encode(self.hasher.clone().finalize());
        Ok(KnownObject { size, sha256, open: Arc::new(move || again(Arc::clone(&file), size)) })
    }

    /// As if nothing had been read yet.
    fn rewind(&mut self) -> Result<(), ArtifactError> {
        if let Err(error) = self.file.rewind() {
            let error = self.about.local(format!("read {}", shown(&self.path)), error);
            let told = ArtifactError::new(ArtifactErrorKind::Other, error.to_string());
            self.failed = Some(error);
            return Err(told);
        }
        self.used.fetch_sub(self.size, Ordering::Relaxed);
        self.size = 0;
        self.hasher = Sha256::new();
        Ok(())
    }

    fn read(&mut self, first: bool) -> Result<Bytes, ArtifactError> {
        self.try_read(first).map_err(|error| {
            let told = ArtifactError::new(ArtifactErrorKind::Other, error.to_string());
            self.failed = Some(error);
            told
        })
    }

    fn try_read(&mut self, first: bool) -> Result<Bytes, StagingError> {
        let failed = |about: &About, path: &str, error| about.local(format!("read {}", shown(path)), error);
        if first {
            // A file that is too large by its own word is refused before it is read; a sparse one may claim terabytes.
            let metadata = self.file.metadata().map_err(|error| failed(&self.about, &self.path, error))?;
            let length = metadata.len();
            self.sparse = metadata.blocks().saturating_mul(512) < length;
            self.check(self.used.load(Ordering::Relaxed).saturating_add(length))?;
        }
        let chunk = self.chunk().map_err(|error| failed(&self.about, &self.path, error))?;
        let length = chunk.len() as u64;
        self.check(self.used.fetch_add(length, Ordering::Relaxed).saturating_add(length))?;
        self.size += length;
        self.hasher.update(&chunk);
        Ok(chunk)
    }

    /// The next chunk; a short one means the end. A hole that fills one is neither read nor held.
    fn chunk(&mut self) -> io::Result<Bytes> {
        if self.sparse && self.in_hole()? {
            return Ok(Bytes::from_static(&ZEROS));
        }
        let mut chunk = Vec::new();
        self.file.by_ref().take(CHUNK as u64).read_to_end(&mut chunk)?;
        Ok(chunk.into())
    }

    /// Whether the next chunk is all hole; then it is behind us.
    fn in_hole(&mut self) -> io::Result<bool> {
        let at = self.size;
        let end = at + CHUNK as u64;
        let hole_end = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
            Ok(data) => data,
            // No data behind it: a hole to the end of the file.
            Err(Errno::NXIO) => self.file.metadata()?.len(),
            // A file system that does not know holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(error) => return Err(error.into()),
        };
        let hole = hole_end >= end;
        rustix::fs::seek(&self.file, SeekFrom::Start(if hole { end } else { at }))?;
        Ok(hole)
    }

    fn check(&self, used: u64) -> Result<(), StagingError> {
        if used > self.max_bytes {
            let what =
                format!("the output has more than {} bytes, with {}", self.max_bytes, shown(&self.path));
            return Err(self.about.error(StagingErrorKind::LimitExceeded, what));
        }
        Ok(())
    }
}
