//! Inputs: from the object store to where the workload finds them.

use std::{
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use runner_core::{
    artifact::ArtifactStore,
    backend::{Direction, ProgressSink},
    spec::{RunSpec, User},
};
use serde::{Deserialize, Serialize};

use super::{
    MountKind, MountPlan, Root, StagingError, StagingErrorKind, StagingLimits,
    error::About,
    transfer::{Counter, stage_file},
    tree::{self, Worklist},
    unpack::unpack_all,
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
    let Worklist { mut directories, files, bytes: total, archives } = list;

    let (root, plan, owner) = (job.root.clone(), job.plan.clone(), job.owner);
    let made: Vec<PathBuf> = directories.keys().cloned().collect();
    let parents: Vec<(usize, PathBuf)> = files
        .iter()
        .filter(|file| !file.at.starts_with(PARTIAL))
        .map(|file| (file.input, file.at.clone()))
        .collect();
    blocking_with(&about, move || prepare(&root, &plan, &made, &parents, owner)).await?;

    let counter = Counter {
        sink: job.progress,
        total: AtomicU64::new(total),
        files_total: files.len() as u64,
        bytes: AtomicU64::new(0),
        files: AtomicU64::new(0),
    };
    // A call that was dropped may still have a write on its way; no later call shares a name with it.
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    let known = (files.len() + directories.len()) as u64;
    counter.tell();
    let counter = &counter;
    let mut staged: StagedInputs = stream::iter(files.into_iter().enumerate())
        .map(|(number, file)| async move {
            let partial = Path::new(PARTIAL).join(format!("{call}-{number}"));
            let is_archive = file.at.starts_with(PARTIAL);
            let bytes = stage_file(&job, partial, file, counter).await?;
            // Of an archive, what is in it counts.
            Ok::<_, StagingError>(if is_archive { None } else { Some(bytes) })
        })
        .buffer_unordered(job.limits.parallel.max(1))
        .try_fold(StagedInputs::default(), |sum, bytes| async move {
            Ok(StagedInputs {
                bytes: sum.bytes + bytes.unwrap_or_default(),
                files: sum.files + u64::from(bytes.is_some()),
            })
        })
        .await?;
    let transferred = counter.bytes.load(Ordering::Relaxed);
    let unpacked = unpack_all(&job, archives, transferred, known).await?;
    staged.bytes += unpacked.bytes;
    staged.files += unpacked.files;
    // What an input says of a place comes before what an archive around it says.
    for (directory, mode) in unpacked.directories {
        directories.entry(directory).or_insert(mode);
    }

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

pub(super) const PARTIAL: &str = ".staging";
const MARKER: &str = ".staged.json";
const DIRECTORY_MODE: u32 = 0o755;

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

/// Runs `work` on a thread that may block.
pub(super) async fn blocking<T: Send + 'static>(
    about: &About,
    context: impl Into<String>,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, StagingError> {
    let (inner, context) = (about.clone(), context.into());
    blocking_with(about, move || work().map_err(|error| inner.local(context, error))).await
}

pub(super) async fn blocking_with<T: Send + 'static>(
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
