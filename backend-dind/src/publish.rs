//! Outputs: from the attempt's volumes, by way of a directory of the service, to the object store.
//!
//! The tar of each writable mount is read as a stream, and what an output names of it is put into a private directory; then
//! the shared staging code publishes from there, with the same rules as on every backend. What the tar says is not trusted:
//! paths are resolved beneath the directory, links are made so that they lead nowhere, counts, depths and bytes are capped.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt as _,
    path::{Component, Path, PathBuf},
};

use bytes::Bytes;
use futures::stream::BoxStream;
use runner_agent::staging::{
    MountPlan, OutputPublishing, Published, Root, StagingLimits, publish_outputs, read_manifest,
};
use runner_core::{
    artifact::ArtifactKey,
    backend::{AttemptContext, BackendError},
    spec::RunSpec,
};
use tar::EntryType;

use crate::{
    archive::StreamReader,
    backend::Shared,
    convert,
    engine::{EngineError, EngineErrorKind},
    error,
    judge::{PublishFailure, PublishRecord},
    stage::Depot,
    workload::Workload,
};

impl Shared {
    /// Publishes the outputs of an attempt whose container does not run, or finds it done.
    ///
    /// # Errors
    /// Those that may pass. What will not pass is in the record.
    pub(crate) async fn publish(
        &self,
        workload: &Workload,
        attempt: &AttemptContext,
        partial: bool,
    ) -> Result<PublishRecord, BackendError> {
        let plan = convert::mount_plan(&attempt.spec)?;
        let prefix = ArtifactKey::attempt_prefix(&attempt.tenant, attempt.attempt);
        let depot = Depot::make(&self.depots, attempt.attempt, "out")?;
        let root = depot.root()?;
        for mount in plan.mounts.iter().filter(|mount| mount.writable) {
            root.create_dir_all(Path::new(&mount.host), 0o755)
                .map_err(|source| error::substrate("make a directory for outputs", source))?;
        }
        let done = read_manifest(attempt.artifacts.as_ref(), &prefix, &self.staging).await;
        if !matches!(done, Ok(Some(_))) {
            self.fetch(workload, attempt, &plan, &root).await?;
        }
        let job = OutputPublishing {
            spec: &attempt.spec,
            plan: &plan,
            root: &root,
            attempt_prefix: &prefix,
            artifacts: attempt.artifacts.as_ref(),
            partial,
            limits: &self.staging,
            progress: attempt.progress.as_ref(),
        };
        match publish_outputs(job).await.map_err(BackendError::from) {
            Ok(published) => Ok(record(published)),
            // The outputs are still there: observing again publishes again.
            Err(error) if error.retryable => Err(error),
            Err(error) => Ok(PublishRecord {
                manifest: None,
                failure: Some(PublishFailure { message: error.chain(), retryable: false }),
                notes: Vec::new(),
            }),
        }
    }

    async fn fetch(
        &self,
        workload: &Workload,
        attempt: &AttemptContext,
        plan: &MountPlan,
        root: &Root,
    ) -> Result<(), BackendError> {
        for (number, mount) in plan.mounts.iter().enumerate().filter(|(_, mount)| mount.writable) {
            if convert::behind(plan, number) != convert::Behind::Volume {
                continue;
            }
            let stream = self.engine.get(&workload.name, &mount.target);
            let directory = root
                .directory(Path::new(&mount.host))
                .map_err(|source| error::substrate("open a directory for outputs", source))?;
            let wanted = Wanted::of(&attempt.spec, plan, number, &self.staging);
            let work = move || unpack(stream, &directory, wanted);
            let unpacked = tokio::task::spawn_blocking(work)
                .await
                .map_err(|stopped| error::substrate("fetch the outputs", stopped))?;
            unpacked.map_err(|failure| match failure {
                Failure::Engine(source) => error::engine(format!("fetch {}", mount.target), source),
                Failure::Local(source) => error::substrate(format!("fetch {}", mount.target), source),
            })?;
        }
        Ok(())
    }
}

fn record(published: Published) -> PublishRecord {
    PublishRecord {
        manifest: Some(published.manifest),
        failure: published
            .failure
            .map(|error| PublishFailure { retryable: error.kind.retryable(), message: error.to_string() }),
        notes: published.notes,
    }
}

/// What of a mount is wanted, and how much of it is put on the disk.
#[derive(Debug)]
struct Wanted {
    /// Path on the mount, and the bytes that are left. Empty: the whole mount.
    outputs: Vec<(PathBuf, u64)>,
    entries_left: u64,
    depth: usize,
}

impl Wanted {
    fn of(spec: &RunSpec, plan: &MountPlan, mount: usize, limits: &StagingLimits) -> Self {
        let outputs = spec.outputs.iter().zip(&plan.outputs).filter(|(_, place)| place.mount == mount);
        let outputs = outputs.map(|(output, place)| {
            let most = output.max_bytes.unwrap_or(limits.output_bytes);
            (PathBuf::from(&place.relative), most.saturating_add(1))
        });
        Self {
            outputs: outputs.collect(),
            // One more than may be published, so that publishing sees that there are more.
            entries_left: limits.output_entries.saturating_add(1 + spec.outputs.len() as u64),
            depth: limits.depth,
        }
    }

    /// The outputs that an entry is part of, or on the way to.
    fn concerns(&self, path: &Path) -> bool {
        self.outputs.iter().any(|(output, _)| path.starts_with(output) || output.starts_with(path))
    }

    /// How many of a file's bytes are to be kept. Above an output's limit nothing need be: that it is above is seen by the
    /// file's length.
    fn keep(&mut self, path: &Path, size: u64) -> u64 {
        let mut most = 0;
        for (_, left) in self.outputs.iter_mut().filter(|(output, _)| path.starts_with(output)) {
            most = most.max((*left).min(size));
            *left = left.saturating_sub(size);
        }
        most
    }
}

enum Failure {
    Engine(EngineError),
    Local(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Local(error)
    }
}

/// Unpacks what is wanted of a mount's tar. Blocking.
fn unpack(
    stream: BoxStream<'static, Result<Bytes, EngineError>>,
    to: &Root,
    wanted: Wanted,
) -> Result<(), Failure> {
    let mut archive = tar::Archive::new(StreamReader::new(stream));
    let result = unpack_entries(&mut archive, to, wanted);
    match (result, archive.into_inner().take_failure()) {
        (_, Some(failure)) if failure.kind == EngineErrorKind::NotFound => {
            Err(Failure::Engine(EngineError { kind: EngineErrorKind::NotFound, source: failure.source }))
        }
        (_, Some(failure)) => Err(Failure::Engine(failure)),
        (result, None) => result,
    }
}

fn unpack_entries(
    archive: &mut tar::Archive<StreamReader>,
    to: &Root,
    mut wanted: Wanted,
) -> Result<(), Failure> {
    let broken = |error: io::Error| Failure::Engine(EngineError::unreachable(error));
    // Set at the end: one without the right to write would keep its own files out.
    let mut directories: BTreeMap<PathBuf, u32> = BTreeMap::new();
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let raw = entry.path_bytes().into_owned();
        let Some(path) = below_top(Path::new(OsStr::from_bytes(&raw))) else { continue };
        if !wanted.concerns(&path) || path.components().count() > wanted.depth + 1 {
            continue;
        }
        let mode = entry.header().mode().unwrap_or(0o755) & 0o777;
        let kind = entry.header().entry_type();
        if path.as_os_str().is_empty() {
            directories.insert(path, mode);
            continue;
        }
        if wanted.entries_left == 0 {
            continue;
        }
        wanted.entries_left -= 1;
        match kind {
            EntryType::Directory => {
                to.create_dir_all(&path, 0o700)?;
                directories.insert(path, mode);
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let size = entry.size();
                let keep = wanted.keep(&path, size);
                let mut file = to.create_file(&path, 0o600)?;
                copy(&mut entry, &mut file, keep).map_err(|error| match error {
                    Copy::From(error) => broken(error),
                    Copy::To(error) => Failure::Local(error),
                })?;
                if keep < size {
                    file.set_len(size)?;
                }
                set_mode(&file, mode)?;
            }
            EntryType::Link => {
                let Some(source) = entry.link_name_bytes() else { continue };
                let Some(source) = below_top(Path::new(OsStr::from_bytes(&source))) else { continue };
                link(to, &source, &path, mode, &mut wanted)?;
            }
            EntryType::Symlink => placeholder(to, &path, Placeholder::Symlink)?,
            // Publishing says of each of them only what it was, and stores none.
            EntryType::Fifo | EntryType::Char | EntryType::Block => {
                placeholder(to, &path, Placeholder::Fifo)?
            }
            _ => {}
        }
    }
    for (directory, mode) in directories.into_iter().rev() {
        if directory.as_os_str().is_empty() {
            continue;
        }
        to.set_directory(&directory, None, mode)?;
    }
    Ok(())
}

/// A tar's path without its first name, which is the mount's own. `None`: it is not normal.
fn below_top(path: &Path) -> Option<PathBuf> {
    let mut components = path.components();
    components.next()?;
    let below = components.as_path();
    below.components().all(|part| matches!(part, Component::Normal(_))).then(|| below.to_owned())
}

enum Copy {
    From(io::Error),
    To(io::Error),
}

fn copy(from: &mut impl io::Read, to: &mut impl io::Write, keep: u64) -> Result<(), Copy> {
    let mut buffer = vec![0; 256 * 1024];
    let mut left = keep;
    while left > 0 {
        let room = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let count = match from.read(&mut buffer[..room]) {
            Ok(0) => return Err(Copy::From(io::ErrorKind::UnexpectedEof.into())),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Copy::From(error)),
        };
        to.write_all(&buffer[..count]).map_err(Copy::To)?;
        left -= count as u64;
    }
    Ok(())
}

fn set_mode(file: &std::fs::File, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    // What cannot be read by its owner was unreadable for the program too; here it must be read to be told so.
    file.set_permissions(std::fs::Permissions::from_mode(mode))
}

/// Makes a file of its own of a hard link, as publishing stores one.
fn link(to: &Root, source: &Path, path: &Path, mode: u32, wanted: &mut Wanted) -> Result<(), Failure> {
    let mut from = match to.open_file(source) {
        Ok(file) => file,
        // Its other name is outside of what is wanted. The engine gives the bytes only once.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return placeholder(to, path, Placeholder::Fifo);
        }
        Err(error) => return Err(error.into()),
    };
    let size = from.metadata()?.len();
    let keep = wanted.keep(path, size);
    let mut file = to.create_file(path, 0o600)?;
    copy(&mut from, &mut file, keep).map_err(|error| match error {
        Copy::From(error) | Copy::To(error) => error,
    })?;
    file.set_len(size)?;
    Ok(set_mode(&file, mode)?)
}

enum Placeholder {
    Symlink,
    Fifo,
}

/// Makes something of the same kind that leads nowhere.
fn placeholder(to: &Root, path: &Path, kind: Placeholder) -> Result<(), Failure> {
    let (Some(name), above) = (path.file_name(), path.parent().unwrap_or(Path::new(""))) else {
        return Ok(());
    };
    let above = if above.as_os_str().is_empty() { to.clone() } else { to.directory(above)? };
    let made = match kind {
        Placeholder::Symlink => rustix::fs::symlinkat("nowhere", above.as_fd(), name),
        Placeholder::Fifo => rustix::fs::mknodat(
            above.as_fd(),
            name,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        ),
    };
    made.map_err(|error| Failure::Local(error.into()))
}
