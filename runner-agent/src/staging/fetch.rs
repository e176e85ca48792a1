//! Inputs: from the object store to where the workload finds them.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use runner_core::{
    artifact::ArtifactStore,
    backend::{Direction, Progress, ProgressSink},
    spec::{RunSpec, User},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{
    MountKind, MountPlan, Root, StagingError, StagingErrorKind, StagingLimits,
    error::About,
    root::set_owner_and_mode,
    tree::{self, Source, StagedFile, Worklist},
};

/// What [`stage_inputs`] is to do.
#[derive(Clone, Copy)]
pub struct InputStaging<'a> {
    /// Whose inputs.
    pub spec: &'a RunSpec,
    /// The plan of the same spec.
    pub plan: &'a MountPlan,
    /// The attempt's staging root. `in`, `out`, `.staging` and `.staged.json` in it belong to staging.
    pub root: &'a Root,
    /// Where objects are.
    pub artifacts: &'a dyn ArtifactStore,
    /// Caps.
    pub limits: &'a StagingLimits,
    /// Told of every chunk and file.
    pub progress: &'a dyn ProgressSink,
    /// Who will own every file and directory: the workload's user. `None`: this process's user.
    pub owner: Option<User>,
}

/// What was staged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StagedInputs {
    /// Sum of the files' sizes.
    pub bytes: u64,
    /// How many files.
    pub files: u64,
}

/// Makes every mount of the plan exist below the root, and fills the read-only ones with the inputs. Output directories are
/// made empty, owned by `owner`, mode 0755. Missing parents of inputs are made with mode 0755.
///
/// Idempotent: once it has returned `Ok`, calling it again with the same root answers the same and touches nothing, until
/// the machine is started again. Where it was interrupted, all inputs are staged anew; what lies in the outputs stays.
/// Files are not synced: after a loss of power they are staged anew too. No two calls may share a root at the same time.
///
/// # Errors
/// Names the input. Retryable where the store was unavailable or this machine failed; see [`StagingErrorKind`].
pub async fn stage_inputs(job: InputStaging<'_>) -> Result<StagedInputs, StagingError> {
    let about = About::all(Direction::Input);
    let boot = boot_id();
    let root = job.root.clone();
    let marked = blocking(&about, "read the staging record", {
        let boot = boot.clone();
        move || Ok(read_marker(&root, boot.as_deref()))
    })
    .await?;
    if let Some(done) = marked {
        return Ok(done);
    }
    let list = tree::resolve(job.spec, job.plan, job.artifacts, job.limits).await?;
    let Worklist { directories, files, bytes: total } = list;

    let (root, plan, owner) = (job.root.clone(), job.plan.clone(), job.owner);
    let made: Vec<PathBuf> = directories.keys().cloned().collect();
    let parents: Vec<(usize, PathBuf)> = files.iter().map(|file| (file.input, file.at.clone())).collect();
    blocking_with(&about, move || prepare(&root, &plan, &made, &parents, owner)).await?;

    let counter = Counter {
        sink: job.progress,
        total,
        files_total: files.len() as u64,
        bytes: AtomicU64::new(0),
        files: AtomicU64::new(0),
    };
    // A call that was dropped may still have a write on its way; no later call shares a name with it.
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    let staged = StagedInputs { bytes: total, files: files.len() as u64 };
    counter.tell();
    let counter = &counter;
    stream::iter(files.into_iter().enumerate())
        .map(|(number, file)| async move {
            let partial = Path::new(PARTIAL).join(format!("{call}-{number}"));
            stage_file(&job, partial, file, counter).await
        })
        .buffer_unordered(job.limits.parallel.max(1))
        .try_collect::<()>()
        .await?;

    let (root, owner) = (job.root.clone(), job.owner);
    blocking(&about, "finish the staged inputs", move || {
        // Inner before outer, and after all files: a directory may end up without write permission.
        for (directory, mode) in directories.iter().rev() {
            root.set_directory(directory, owner, *mode)?;
        }
        root.remove_tree(Path::new(PARTIAL))?;
        write_marker(&root, boot, staged)
    })
    .await?;
    Ok(staged)
}

const PARTIAL: &str = ".staging";
const MARKER: &str = ".staged.json";
const DIRECTORY_MODE: u32 = 0o755;
/// A file of at most this size is hashed, written and put into place in one trip to a blocking thread.
const SMALL: usize = 64 * 1024;

/// Says that staging is complete, and since which start of the machine: files are not synced, so a record from before a
/// loss of power proves nothing.
#[derive(Serialize, Deserialize)]
struct Marker {
    boot: String,
    staged: StagedInputs,
}

fn boot_id() -> Option<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|id| id.trim().to_owned())
}

fn read_marker(root: &Root, boot: Option<&str>) -> Option<StagedInputs> {
    let mut text = String::new();
    root.open_file(Path::new(MARKER)).ok()?.take(4096).read_to_string(&mut text).ok()?;
    let marker: Marker = serde_json::from_str(&text).ok()?;
    (Some(marker.boot.as_str()) == boot).then_some(marker.staged)
}

fn write_marker(root: &Root, boot: Option<String>, staged: StagedInputs) -> io::Result<()> {
    let Some(boot) = boot else { return Ok(()) };
    let aside = Path::new(".staged.json.new");
    root.remove_file(aside)?;
    let mut file = root.create_file(aside, 0o600)?;
    file.write_all(&serde_json::to_vec(&Marker { boot, staged })?)?;
    root.rename(aside, Path::new(MARKER))
}

/// Clears what an interrupted staging left and makes every directory.
fn prepare(
    root: &Root,
    plan: &MountPlan,
    directories: &[PathBuf],
    files: &[(usize, PathBuf)],
    owner: Option<User>,
) -> Result<(), StagingError> {
    let about = About::all(Direction::Input);
    let local = |context: &str| {
        let (about, context) = (about.clone(), context.to_owned());
        move |error| about.local(context, error)
    };
    for old in ["in", PARTIAL] {
        root.remove_tree(Path::new(old)).map_err(local("clear an interrupted staging"))?;
    }
    root.sweep().map_err(local("clear an interrupted removal"))?;
    for side in ["in", "out", PARTIAL] {
        root.create_dir_all(Path::new(side), 0o700).map_err(local("make the staging directories"))?;
    }
    let mounts = plan.mounts.iter().filter(|mount| mount.kind == MountKind::Directory);
    let outputs = plan.directories.iter().map(|place| plan.host_path(place));
    let mut owned: Vec<PathBuf> = mounts.map(|mount| PathBuf::from(&mount.host)).chain(outputs).collect();
    for directory in &owned {
        root.create_dir_all(directory, DIRECTORY_MODE).map_err(local("make the mounts' directories"))?;
    }
    for (input, directory) in files
        .iter()
        .filter_map(|(input, file)| Some((Some(*input), file.parent()?)))
        .chain(directories.iter().map(|directory| (None, directory.as_path())))
    {
        // Files come sorted by directory more often than not.
        if owned.last().is_some_and(|last| last == directory) || directory == Path::new("in") {
            continue;
        }
        root.create_dir_all(directory, DIRECTORY_MODE).map_err(|error| {
            let about = input.map_or_else(|| about.clone(), About::input);
            about.local(format!("make the directory of {directory:?}"), error)
        })?;
        owned.push(directory.to_owned());
    }
    if owner.is_some() {
        give(root, plan, owned, owner).map_err(local("give the directories to the workload's user"))?;
    }
    Ok(())
}

/// Gives the directories, and those between them and their mounts, to the workload's user.
fn give(root: &Root, plan: &MountPlan, mut owned: Vec<PathBuf>, owner: Option<User>) -> io::Result<()> {
    let tops: Vec<&Path> = plan.mounts.iter().map(|mount| Path::new(mount.host.as_str())).collect();
    let mut between = Vec::new();
    for directory in &owned {
        between.extend(
            directory
                .ancestors()
                .skip(1)
                .take_while(|above| tops.iter().any(|top| above.starts_with(top)))
                .map(Path::to_owned),
        );
    }
    owned.append(&mut between);
    owned.sort_unstable();
    owned.dedup();
    owned.iter().try_for_each(|directory| root.set_directory(directory, owner, DIRECTORY_MODE))
}

struct Counter<'a> {
    sink: &'a dyn ProgressSink,
    total: u64,
    files_total: u64,
    bytes: AtomicU64,
    files: AtomicU64,
}

impl Counter<'_> {
    fn tell(&self) {
        self.sink.progress(Progress {
            direction: Direction::Input,
            bytes_done: self.bytes.load(Ordering::Relaxed),
            bytes_total: self.total,
            files_done: self.files.load(Ordering::Relaxed),
            files_total: self.files_total,
        });
    }
}

async fn stage_file(
    job: &InputStaging<'_>,
    partial: PathBuf,
    file: StagedFile,
    counter: &Counter<'_>,
) -> Result<(), StagingError> {
    let about = About::input(file.input);
    let (mut first, mut rest) = match &file.source {
        Source::Inline(bytes) => (Some(bytes.clone()), None),
        Source::Object(key) => {
            let failed = |error| about.store(format!("read {key}"), error);
            let (meta, mut bytes) = job.artifacts.get(key, 0..u64::MAX).await.map_err(failed)?;
            if meta.size != file.size {
                let what = format!("read {key}: it has {} bytes, not the {} promised", meta.size, file.size);
                return Err(about.error(StagingErrorKind::Mismatch, what));
            }
            (bytes.try_next().await.map_err(failed)?, Some(bytes))
        }
    };
    let mut sink = Sink::new(job.root.clone(), partial, file, job.owner);
    loop {
        let chunk = match first.take() {
            Some(chunk) => Some(chunk),
            None => match &mut rest {
                Some(bytes) => bytes
                    .try_next()
                    .await
                    .map_err(|error| about.store(format!("read {}", sink.what()), error))?,
                None => None,
            },
        };
        let Some(chunk) = chunk else { break };
        let length = chunk.len() as u64;
        if sink.done.saturating_add(length) > sink.file.size {
            let what =
                format!("read {}: it has more than the {} bytes promised", sink.what(), sink.file.size);
            return Err(about.error(StagingErrorKind::Mismatch, what));
        }
        // A small file costs one trip to a blocking thread, at its end.
        if sink.held.is_none() && sink.done == 0 && chunk.len() <= SMALL {
            sink.hold(chunk);
        } else {
            sink = blocking(&about, format!("write {}", sink.what()), move || sink.write(chunk)).await?;
        }
        counter.bytes.fetch_add(length, Ordering::Relaxed);
        counter.tell();
    }
    if sink.done != sink.file.size {
        let what = format!("read {}: it ended after {} of {} bytes", sink.what(), sink.done, sink.file.size);
        return Err(about.error(StagingErrorKind::Unavailable, what));
    }
    let seen = blocking(&about, format!("write {}", sink.what()), move || sink.finish()).await?;
    if let Some((promised, found, what)) = seen {
        let what = format!("read {what}: its SHA-256 is {found}, not {promised}");
        return Err(about.error(StagingErrorKind::Mismatch, what));
    }
    counter.files.fetch_add(1, Ordering::Relaxed);
    counter.tell();
    Ok(())
}

/// A file on its way: written aside, hashed, and renamed to its place once it is whole and right.
struct Sink {
    root: Root,
    partial: PathBuf,
    file: StagedFile,
    owner: Option<User>,
    open: Option<File>,
    hasher: Sha256,
    /// Taken so far, held bytes included.
    done: u64,
    /// A first, small chunk that is not written yet.
    held: Option<Bytes>,
}

impl Sink {
    fn new(root: Root, partial: PathBuf, file: StagedFile, owner: Option<User>) -> Self {
        Self { root, partial, file, owner, open: None, hasher: Sha256::new(), done: 0, held: None }
    }

    fn what(&self) -> String {
        match &self.file.source {
            Source::Inline(_) => "the inline bytes".to_owned(),
            Source::Object(key) => key.to_string(),
        }
    }

    fn hold(&mut self, chunk: Bytes) {
        self.done += chunk.len() as u64;
        self.held = Some(chunk);
    }

    fn write(mut self, chunk: Bytes) -> io::Result<Self> {
        self.flush()?;
        self.done += chunk.len() as u64;
        self.append(&chunk)?;
        Ok(self)
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.held.take() {
            Some(held) => self.append(&held),
            None => Ok(()),
        }
    }

    fn append(&mut self, chunk: &[u8]) -> io::Result<()> {
        self.hasher.update(chunk);
        self.opened()?.write_all(chunk)
    }

    fn opened(&mut self) -> io::Result<&mut File> {
        match self.open {
            Some(ref mut file) => Ok(file),
            None => Ok(self.open.insert(self.root.create_file(&self.partial, 0o600)?)),
        }
    }

    /// Puts the file at its place. Answers (promised, found, what) where the digest is wrong; then it is not there.
    fn finish(mut self) -> io::Result<Option<(String, String, String)>> {
        self.flush()?;
        self.opened()?;
        let found = hex::encode(std::mem::take(&mut self.hasher).finalize());
        if let Some(promised) = self.file.sha256.take()
            && promised != found
        {
            return Ok(Some((promised, found, self.what())));
        }
        let (owner, mode) = (self.owner, self.file.mode);
        set_owner_and_mode(self.opened()?.as_fd(), owner, mode)?;
        self.open = None;
        self.root.rename(&self.partial, &self.file.at)?;
        Ok(None)
    }
}

impl Drop for Sink {
    /// Leaves no partial file where the transfer failed.
    fn drop(&mut self) {
        if self.open.take().is_some() {
            // Best effort: the next staging clears the directory anyway.
            let _ = self.root.remove_file(&self.partial);
        }
    }
}

/// Runs `work` on a thread that may block.
pub(super) async fn blocking<T: Send + 'static>(
    about: &About,
    context: impl Into<String>,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, StagingError> {
    let (inner, context) = (about.clone(), context.into());
    blocking_with(about, move || work().map_err(|error| inner.local(context, error))).await
}

async fn blocking_with<T: Send + 'static>(
    about: &About,
    work: impl FnOnce() -> Result<T, StagingError> + Send + 'static,
) -> Result<T, StagingError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(stopped) => Err(StagingError {
            source: Some(stopped.into()),
            ..about.error(StagingErrorKind::Local, "the runtime stopped while files were staged")
        }),
    }
}
