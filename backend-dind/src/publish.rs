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
use runner_agent::{
    backend::PublishRecord,
    staging::{MountPlan, OutputPublishing, Root, StagingLimits, publish_outputs, read_manifest},
};
use runner_core::{
    artifact::ArtifactKey,
    backend::{AttemptContext, BackendError},
    spec::{Pattern, RunSpec},
};
use tar::EntryType;

use crate::{
    archive::StreamReader, backend::Shared, convert, engine::EngineError, error, stage::Depot,
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
            Ok(published) => Ok(published.into()),
            // The outputs are still there: observing again publishes again.
            Err(error) if error.retryable => Err(error),
            Err(error) => Ok(PublishRecord::failed(&error)),
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
            let told = |failure| match failure {
                Failure::Engine(source) => error::engine(format!("fetch {}", mount.target), source),
                Failure::Local(source) => error::substrate(format!("fetch {}", mount.target), source),
            };
            let stopped = |stopped| error::substrate("fetch the outputs", stopped);
            let to = directory.clone();
            let work = move || unpack(stream, &to, wanted);
            let Unpacked { links, mut wanted } =
                tokio::task::spawn_blocking(work).await.map_err(stopped)?.map_err(told)?;
            for link in links {
                let path = Path::new(&mount.target).join(&link);
                // An engine takes paths as text.
                let Some(path) = path.to_str() else {
                    tracing::warn!(attempt = %workload.attempt, ?path, "a hard link cannot be fetched by its name");
                    continue;
                };
                let (stream, to) = (self.engine.get(&workload.name, path), directory.clone());
                let work = move || {
                    let unpacked = unpack_one(stream, &to, &link, &mut wanted);
                    (unpacked, wanted)
                };
                let (unpacked, left) = tokio::task::spawn_blocking(work).await.map_err(stopped)?;
                wanted = left;
                unpacked.map_err(told)?;
            }
        }
        Ok(())
    }
}

/// What of a mount is wanted, and how much of it is put on the disk.
#[derive(Debug)]
struct Wanted {
    /// Where the mount appears.
    target: String,
    outputs: Vec<WantedOutput>,
    entries_left: u64,
    depth: usize,
}

/// An output that lies on the mount.
#[derive(Debug)]
struct WantedOutput {
    /// Where it is looked for on the mount; empty: the whole mount.
    place: PathBuf,
    /// Of a glob: what it takes of what is there.
    pattern: Option<Pattern>,
    /// Bytes that are left of its limit, and one more.
    left: u64,
}

impl Wanted {
    fn of(spec: &RunSpec, plan: &MountPlan, mount: usize, limits: &StagingLimits) -> Self {
        let outputs = spec.outputs.iter().zip(&plan.outputs).filter(|(_, place)| place.mount == mount);
        let outputs = outputs.map(|(output, place)| WantedOutput {
            place: PathBuf::from(&place.relative),
            // A pattern that does not parse never got past admission, and publishing says so.
            pattern: output.glob.then(|| output.pattern().ok()).flatten(),
            left: output.max_bytes.unwrap_or(limits.output_bytes).saturating_add(1),
        });
        let outputs: Vec<WantedOutput> = outputs.collect();
        let deepest = outputs.iter().map(|output| output.place.components().count()).max().unwrap_or(0);
        Self {
            target: plan.mounts[mount].target.clone(),
            outputs,
            // One more than may be published, so that publishing sees that there are more.
            entries_left: limits.output_entries.saturating_add(1 + spec.outputs.len() as u64),
            // Counted from an output's own place by publishing.
            depth: limits.depth.saturating_add(deepest),
        }
    }

    /// Whether it is on the way to an output's place.
    fn is_on_the_way(&self, path: &Path) -> bool {
        self.outputs.iter().any(|output| output.place.starts_with(path))
    }

    /// The outputs that publishing would store this in: every one that is no glob and has it, else the first glob that does.
    fn owners(&self, path: &Path) -> Vec<usize> {
        let covers = |(number, output): (usize, &WantedOutput)| {
            (output.pattern.is_none() && path.starts_with(&output.place)).then_some(number)
        };
        let plain: Vec<usize> = self.outputs.iter().enumerate().filter_map(covers).collect();
        if !plain.is_empty() {
            return plain;
        }
        let matches = |output: &WantedOutput| {
            output.pattern.as_ref().is_some_and(|pattern| {
                path.ancestors().filter(|at| !at.as_os_str().is_empty()).any(|at| {
                    pattern.matches(&[self.target.as_bytes(), b"/", at.as_os_str().as_bytes()].concat())
                })
            })
        };
        self.outputs.iter().position(matches).into_iter().collect()
    }

    /// How many of a file's bytes are to be kept; `None`: it is no output's. Fewer than all only where every output that it is
    /// part of is above its limit by then, which publishing sees by the files' lengths: it stores none of that output.
    fn keep(&mut self, path: &Path, size: u64) -> Option<u64> {
        let owners = self.owners(path);
        let most = owners.iter().map(|owner| self.outputs[*owner].left.min(size)).max()?;
        for owner in owners {
            let left = &mut self.outputs[owner].left;
            *left = left.saturating_sub(size);
        }
        Some(most)
    }
}

#[derive(Debug)]
enum Failure {
    Engine(EngineError),
    Local(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Local(error)
    }
}

/// The tar ends early, or is none.
fn broken(error: io::Error) -> Failure {
    Failure::Engine(EngineError::unreachable(error))
}

/// What unpacking leaves to do.
struct Unpacked {
    /// Hard links whose bytes came under a name that is not wanted.
    links: Vec<PathBuf>,
    wanted: Wanted,
}

/// Unpacks what is wanted of a mount's tar. Blocking.
fn unpack(
    stream: BoxStream<'static, Result<Bytes, EngineError>>,
    to: &Root,
    wanted: Wanted,
) -> Result<Unpacked, Failure> {
    let mut archive = tar::Archive::new(StreamReader::new(stream));
    let result = unpack_entries(&mut archive, to, wanted);
    match archive.into_inner().take_failure() {
        Some(failure) => Err(Failure::Engine(failure)),
        None => result,
    }
}

/// Unpacks the one file of a tar to `path`. Blocking.
fn unpack_one(
    stream: BoxStream<'static, Result<Bytes, EngineError>>,
    to: &Root,
    path: &Path,
    wanted: &mut Wanted,
) -> Result<(), Failure> {
    let mut archive = tar::Archive::new(StreamReader::new(stream));
    let result = (|| match archive.entries().map_err(broken)?.next() {
        Some(entry) => {
            let mut entry = entry.map_err(broken)?;
            let (size, mode) = (entry.size(), entry.header().mode().unwrap_or(0o644) & 0o777);
            file(&mut entry, size, mode, to, path, wanted)
        }
        None => Ok(()),
    })();
    match archive.into_inner().take_failure() {
        Some(failure) => Err(Failure::Engine(failure)),
        None => result,
    }
}

fn unpack_entries<R: io::Read>(
    archive: &mut tar::Archive<R>,
    to: &Root,
    mut wanted: Wanted,
) -> Result<Unpacked, Failure> {
    let mut links = Vec::new();
    // Set at the end: one without the right to write would keep its own files out.
    let mut directories: BTreeMap<PathBuf, u32> = BTreeMap::new();
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let raw = entry.path_bytes().into_owned();
        let Some(path) = below_top(Path::new(OsStr::from_bytes(&raw))) else { continue };
        let kind = entry.header().entry_type();
        // Other directories are made for what is in them, so that they use up no count.
        let is_wanted =
            !wanted.owners(&path).is_empty() || kind == EntryType::Directory && wanted.is_on_the_way(&path);
        // One deeper than may be published, so that publishing sees that it is too deep.
        let fits = path.components().count() <= wanted.depth + 1 && wanted.entries_left > 0;
        if path.as_os_str().is_empty() || !is_wanted || !fits {
            continue;
        }
        wanted.entries_left -= 1;
        let mode = entry.header().mode().unwrap_or(0o755) & 0o777;
        match kind {
            EntryType::Directory => {
                to.create_dir_all(&path, 0o700)?;
                directories.insert(path, mode);
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let size = entry.size();
                file(&mut entry, size, mode, to, &path, &mut wanted)?;
            }
            EntryType::Link => {
                let source = entry.link_name_bytes().map(std::borrow::Cow::into_owned).unwrap_or_default();
                let source = below_top(Path::new(OsStr::from_bytes(&source)));
                let from = source.map(|source| to.open_file(&source)).transpose();
                match from {
                    Ok(Some(mut from)) => {
                        let size = from.metadata()?.len();
                        file(&mut from, size, mode, to, &path, &mut wanted)?;
                    }
                    Ok(None) => links.push(path),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => links.push(path),
                    Err(error) => return Err(error.into()),
                }
            }
            EntryType::Symlink => placeholder(to, &path, Placeholder::Symlink)?,
            EntryType::Fifo | EntryType::Char | EntryType::Block => {
                placeholder(to, &path, Placeholder::Fifo)?
            }
            _ => {}
        }
    }
    for (directory, mode) in directories.into_iter().rev() {
        to.set_directory(&directory, None, mode)?;
    }
    Ok(Unpacked { links, wanted })
}

/// Makes a file, with as many of its bytes as are to be kept, and its whole length.
fn file(
    from: &mut impl io::Read,
    size: u64,
    mode: u32,
    to: &Root,
    path: &Path,
    wanted: &mut Wanted,
) -> Result<(), Failure> {
    let Some(keep) = wanted.keep(path, size) else { return Ok(()) };
    let mut file = match to.create_file(path, 0o600) {
        // Its directory is no output's, so it was not made.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            to.create_dir_all(path.parent().unwrap_or(Path::new("")), 0o700)?;
            to.create_file(path, 0o600)?
        }
        made => made?,
    };
    copy(from, &mut file, keep).map_err(|error| match error {
        Copy::From(error) => broken(error),
        Copy::To(error) => Failure::Local(error),
    })?;
    if keep < size {
        file.set_len(size)?;
    }
    Ok(set_mode(&file, mode)?)
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
    file.set_permissions(std::fs::Permissions::from_mode(mode))
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
    let above = if above.as_os_str().is_empty() {
        to.clone()
    } else {
        to.create_dir_all(above, 0o700)?;
        to.directory(above)?
    };
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

#[cfg(test)]
#[path = "publish_tests.rs"]
mod tests;
