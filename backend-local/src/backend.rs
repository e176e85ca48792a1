//! The backend: its parts, how it is opened, and the verbs that are a few lines.

use std::{
    fmt, fs,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use futures::stream::BoxStream;
use runner_agent::{
    exec::{
        client::{self, ControlError},
        protocol::{ControlReply, ControlRequest},
    },
    staging::{MountPlan, StagingLimits},
};
use runner_core::{
    backend::{
        AttemptContext, Backend, BackendError, BackendErrorKind, Health, Observation, WorkloadInput,
        WorkloadRef,
    },
    capability::Capabilities,
    clock::Clock,
    id::{AttemptId, BackendName},
    spec::{FieldViolation, InvalidSpec, RunSpec},
};
use tokio::sync::Semaphore;

use crate::{
    attempt_dir,
    capability::{Machine, find_agent},
    config::LocalConfig,
    error::{self, OpenError},
    logs, observe,
    watch::Watcher,
    workload::{ShimState, Workload, Workloads},
};

/// Less free space than this, and the backend takes no work: a full disk fails every run in a way that helps nobody.
const LEAST_FREE_BYTES: u64 = 256 * 1024 * 1024;
/// How long input may wait for a program that does not read.
const INPUT_DEADLINE: Duration = Duration::from_secs(10);
/// How long input waits for a shim that was just started.
const INPUT_RETRY: Duration = Duration::from_millis(10);

/// What a local backend is made of.
#[derive(Debug, Clone)]
pub struct LocalParts {
    /// Its settings.
    pub config: LocalConfig,
    /// The service's data directory. The backend uses `local` in it, and hides all of it from programs. One backend of one
    /// service at a time.
    pub data_dir: PathBuf,
    /// Who the service is: the same after a restart, another for every data directory. The ownership mark.
    pub instance: String,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Caps on staging.
    pub staging: StagingLimits,
}

/// What every verb shares.
pub(crate) struct Shared {
    pub(crate) config: LocalConfig,
    pub(crate) capabilities: Capabilities,
    pub(crate) machine: Machine,
    pub(crate) agent: PathBuf,
    pub(crate) instance: String,
    pub(crate) hidden: Vec<PathBuf>,
    pub(crate) staging: StagingLimits,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) workloads: Workloads,
    pub(crate) watcher: Watcher,
    pub(crate) starts: Semaphore,
}

/// Executes attempts as confined process trees of this machine. See [`Backend`] for what holds.
///
/// Dropping it stops nothing: programs live on, and the next backend over the same directory adopts them.
pub struct LocalBackend {
    shared: Arc<Shared>,
}

impl fmt::Debug for LocalBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalBackend")
            .field("name", &self.shared.config.name)
            .field("base", &self.shared.workloads.base())
            .finish_non_exhaustive()
    }
}

impl LocalBackend {
    /// Opens the backend over its directory: finds the agent, asks it what the machine allows, and finishes removals that
    /// a crash cut short. Workloads of an earlier process are found by the verbs that name them. Needs a tokio runtime.
    ///
    /// # Errors
    /// See [`OpenError`]. A machine that confines too little opens, and is not healthy.
    pub async fn open(parts: LocalParts) -> Result<Self, OpenError> {
        let LocalParts { config, data_dir, instance, clock, staging } = parts;
        config.validate().map_err(OpenError::Config)?;
        let agent = find_agent(&config)?;
        // What is mounted and hidden is named by its real path.
        let data_dir = fs::canonicalize(&data_dir)
            .map_err(|source| OpenError::directory("find the data directory", &data_dir, source))?;
        let base = data_dir.join("local");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&base)
            .map_err(|source| OpenError::directory("make", &base, source))?;
        let tag = format!("{}-{}", config.name, std::process::id());
        let mut machine = Machine::detect(&config, &agent, &base, tag).await?;
        machine.cgroups.set_owner(&instance);
        let sweeping = base.clone();
        let swept = tokio::task::spawn_blocking(move || attempt_dir::sweep(&sweeping))
            .await
            .unwrap_or(Ok(0))
            .map_err(|source| OpenError::directory("finish what was begun in", &base, source))?;
        tracing::info!(backend = %config.name, swept, confinement = machine.summary(&config), "opened the local backend");
        let watcher = Watcher::new(Arc::clone(&clock)).map_err(OpenError::Watch)?;
        let hidden = hidden(&config, &data_dir, machine.privileged);
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let shared = Shared {
            capabilities: machine.capabilities(&config),
            config,
            machine,
            agent,
            instance,
            hidden,
            staging,
            clock,
            workloads: Workloads::new(base),
            watcher,
            starts: Semaphore::new((cores * 2).max(4)),
        };
        Ok(Self { shared: Arc::new(shared) })
    }
}

/// The directories of the machine that programs of the image `host` must not see.
fn hidden(config: &LocalConfig, data_dir: &Path, privileged: bool) -> Vec<PathBuf> {
    let mut hidden = vec![data_dir.to_owned()];
    match &config.hidden {
        Some(paths) => hidden.extend(paths.iter().cloned()),
        // A program has the service's own rights to the service's user's home.
        None if !privileged => hidden.extend(
            std::env::var_os("HOME")
                .map(PathBuf::from)
                .filter(|home| home.is_absolute() && home.parent().is_some())
                .and_then(|home| fs::canonicalize(home).ok()),
        ),
        None => {}
    }
    hidden
}

/// Runs `work` on a thread that may block.
pub(crate) async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, BackendError> {
    tokio::task::spawn_blocking(work).await.map_err(|stopped| error::substrate(what, stopped))
}

impl Shared {
    fn workload_ref(&self, attempt: AttemptId) -> WorkloadRef {
        WorkloadRef { attempt, native: attempt.to_string() }
    }

    async fn input(&self, workload: &Arc<Workload>, input: WorkloadInput) -> Result<(), BackendError> {
        let request = match input {
            WorkloadInput::Stdin(bytes) if bytes.len() > client::MAX_STDIN_BYTES => {
                let context = format!("send {} bytes of input at once", bytes.len());
                return Err(BackendError::new(BackendErrorKind::Unsupported, false, context));
            }
            WorkloadInput::Stdin(bytes) if bytes.is_empty() => return Ok(()),
            WorkloadInput::Stdin(bytes) => ControlRequest::Stdin(bytes),
            WorkloadInput::Eof => ControlRequest::Eof,
            WorkloadInput::Resize(size) => ControlRequest::Resize(size),
        };
        let refused = |why: String| {
            let context = format!("send input to {}: {why}", workload.attempt);
            BackendError::new(BackendErrorKind::NotAttachable, false, context)
        };
        // One after the other, so that they keep their order.
        let _turn = workload.input.lock().await;
        let begun = self.clock.monotonic();
        loop {
            let dir = &workload.dir;
            if !dir.exists() {
                let context = format!("find the workload {}", workload.attempt);
                return Err(BackendError::new(BackendErrorKind::NotFound, false, context));
            }
            if dir.exit().exists() {
                return Err(refused("the program has ended".to_owned()));
            }
            let shim = match workload.shim()? {
                ShimState::Alive(shim) => shim,
                ShimState::None | ShimState::Dead => return Err(refused("no program runs".to_owned())),
            };
            let left = INPUT_DEADLINE.saturating_sub(self.clock.monotonic().saturating_sub(begun));
            let (path, again) = (dir.path().to_owned(), request.clone());
            match blocking("send input", move || client::control(&path, &again, left)).await? {
                Ok(ControlReply::Ok) => return Ok(()),
                Ok(ControlReply::Refused(why)) => return Err(refused(why)),
                // Not serving yet; or not any more, which the next turn sees.
                Err(ControlError::Gone) if !left.is_zero() => {
                    shim.wait(INPUT_RETRY).await;
                }
                Err(ControlError::Gone) => return Err(refused("its shim does not answer".to_owned())),
                // Part of it may have been taken, so it is not sent again.
                Err(error @ ControlError::Deadline(_)) => {
                    let context = format!("send input to {}: the program does not read it", workload.attempt);
                    return Err(BackendError::with_source(
                        BackendErrorKind::Substrate,
                        false,
                        context,
                        error,
                    ));
                }
                Err(error @ (ControlError::TooLong(_) | ControlError::Io(_))) => {
                    return Err(error::substrate(format!("send input to {}", workload.attempt), error));
                }
            }
        }
    }

    fn check_health(&self) -> Health {
        let sick = |detail: String| Health { healthy: false, detail };
        if let Some(fault) = self.machine.fault() {
            return sick(fault.to_owned());
        }
        if let Err(error) = rustix::fs::access(&self.agent, rustix::fs::Access::EXEC_OK) {
            return sick(format!("the agent {} cannot be executed: {error}", self.agent.display()));
        }
        let base = self.workloads.base();
        let trial = base.join(".health");
        match fs::write(&trial, b"x").and_then(|()| fs::remove_file(&trial)) {
            Ok(()) => {}
            // Another check removed it meanwhile.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && base.is_dir() => {}
            Err(error) => return sick(format!("{} cannot be written to: {error}", base.display())),
        }
        let free = match rustix::fs::statvfs(base) {
            Ok(stat) => stat.f_bavail.saturating_mul(stat.f_frsize),
            Err(error) => return sick(format!("ask {} for its free space: {error}", base.display())),
        };
        if free < LEAST_FREE_BYTES {
            return sick(format!("{} has {free} bytes free, less than {LEAST_FREE_BYTES}", base.display()));
        }
        Health { healthy: true, detail: self.machine.summary(&self.config) }
    }
}

#[async_trait]
impl Backend for LocalBackend {
    fn name(&self) -> &BackendName {
        &self.shared.config.name
    }

    fn kind(&self) -> &'static str {
        "local"
    }

    fn capabilities(&self) -> Capabilities {
        self.shared.capabilities.clone()
    }

    fn objections(&self, spec: &RunSpec) -> Vec<FieldViolation> {
        match MountPlan::new(spec) {
            Ok(_) => Vec::new(),
            Err(InvalidSpec(violations)) => violations,
        }
    }

    fn slots(&self) -> usize {
        self.shared.config.effective_slots()
    }

    async fn health(&self) -> Result<Health, BackendError> {
        let shared = Arc::clone(&self.shared);
        blocking("check the machine", move || shared.check_health()).await
    }

    fn workload_ref(&self, attempt: AttemptId) -> WorkloadRef {
        self.shared.workload_ref(attempt)
    }

    async fn ensure(&self, attempt: &AttemptContext) -> Result<WorkloadRef, BackendError> {
        self.shared.ensure(attempt).await?;
        Ok(self.shared.workload_ref(attempt.attempt))
    }

    fn observe(
        &self,
        attempt: &AttemptContext,
        cursor: u64,
    ) -> BoxStream<'static, Result<Observation, BackendError>> {
        observe::observe(Arc::clone(&self.shared), attempt.clone(), cursor)
    }

    async fn input(&self, workload: &WorkloadRef, input: WorkloadInput) -> Result<(), BackendError> {
        let known = self.shared.workloads.get(workload.attempt);
        let result = self.shared.input(&known, input).await;
        if !known.dir.exists() {
            self.shared.workloads.forget(&known);
        }
        result
    }

    async fn release(&self, workload: &WorkloadRef, offset: u64) -> Result<(), BackendError> {
        if !logs::worth_releasing(offset) {
            return Ok(());
        }
        let attempt = workload.attempt;
        let dir = attempt_dir::AttemptDir::new(self.shared.workloads.base(), attempt);
        blocking("release the log", move || logs::release(dir.path(), attempt, offset)).await?
    }

    async fn stop(&self, workload: &WorkloadRef, grace: Duration) -> Result<(), BackendError> {
        self.shared.stop(workload, grace).await
    }

    async fn remove(&self, workload: &WorkloadRef) -> Result<(), BackendError> {
        self.shared.remove(workload).await
    }

    async fn list(&self) -> Result<Vec<WorkloadRef>, BackendError> {
        let shared = Arc::clone(&self.shared);
        let list = move || {
            let base = shared.workloads.base();
            let found = attempt_dir::list(base, &shared.instance)
                .map_err(|source| error::file("list the attempts in", base, source))?;
            Ok(found.into_iter().map(|attempt| shared.workload_ref(attempt)).collect())
        };
        blocking("list the attempts", list).await?
    }
}
