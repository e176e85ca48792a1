//! The backend: its parts, how it is opened, and the verbs that are a few lines.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    fmt, fs,
    os::unix::fs::DirBuilderExt as _,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use async_trait::async_trait;
use bollard::models::ImageConfig;
use futures::stream::BoxStream;
use runner_agent::{
    exec::protocol::{ControlReply, ControlRequest, SPOOL_FILE_BYTES},
    staging::StagingLimits,
};
use runner_core::{
    backend::{
        AttemptContext, Backend, BackendError, BackendErrorKind, Health, Observation, WorkloadInput,
        WorkloadRef,
    },
    capability::Capabilities,
    clock::Clock,
    id::{AttemptId, BackendName},
    spec::{FieldViolation, RunSpec},
};
use tokio::sync::Semaphore;

use crate::{
    agent::Agent,
    capability,
    config::DindConfig,
    engine::{Engine, EngineErrorKind},
    error::{self, OpenError},
    images::{ImageId, Images},
    live::{self, RequestError},
    names::Names,
    observe, stage,
    versions::{self, Findings},
    workload::{Workload, Workloads},
};

/// Most bytes that one input may carry.
const MAX_STDIN_BYTES: usize = 64 * 1024;
/// How long input may wait for a program that does not read.
const INPUT_DEADLINE: Duration = Duration::from_secs(10);
/// How long input waits for a shim that was just started.
const INPUT_RETRY: Duration = Duration::from_millis(50);
/// How long a shim may take to forget.
const RELEASE_DEADLINE: Duration = Duration::from_secs(5);
/// Images of which it is remembered what they say of themselves.
const IMAGES: usize = 256;

/// What a Docker backend is made of.
#[derive(Debug, Clone)]
pub struct DindParts {
    /// Its settings.
    pub config: DindConfig,
    /// The service's data directory. The backend uses `dind/NAME` in it, for files on their way. One backend of one service
    /// at a time.
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
    pub(crate) config: DindConfig,
    pub(crate) capabilities: Capabilities,
    pub(crate) engine: Engine,
    pub(crate) images: Images,
    /// What was last told of the engine's versions: only a change is told again.
    told: Mutex<Findings>,
    pub(crate) image_configs: ImageConfigs,
    pub(crate) agent: Agent,
    pub(crate) names: Names,
    pub(crate) depots: PathBuf,
    pub(crate) staging: StagingLimits,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) workloads: Workloads,
    pub(crate) starts: Semaphore,
}

/// What images say of themselves, the last ones that were used.
#[derive(Debug, Default)]
pub(crate) struct ImageConfigs {
    known: Mutex<KnownConfigs>,
}

#[derive(Debug, Default)]
struct KnownConfigs {
    configs: HashMap<ImageId, Arc<ImageConfig>>,
    /// The oldest comes first.
    order: VecDeque<ImageId>,
}

impl ImageConfigs {
    pub(crate) fn get(&self, image: &ImageId) -> Option<Arc<ImageConfig>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).configs.get(image).cloned()
    }

    pub(crate) fn put(&self, image: ImageId, config: Arc<ImageConfig>) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let KnownConfigs { configs, order } = &mut *known;
        if configs.insert(image.clone(), config).is_none() {
            order.push_back(image);
        }
        if order.len() > IMAGES
            && let Some(oldest) = order.pop_front()
        {
            configs.remove(&oldest);
        }
    }
}

/// Executes attempts as containers of a Docker Engine. See [`Backend`] for what holds.
///
/// Dropping it stops nothing: containers live on, and the next backend of the same service and name adopts them.
pub struct DindBackend {
    shared: Arc<Shared>,
}

impl fmt::Debug for DindBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DindBackend")
            .field("name", &self.shared.config.name)
            .field("engine", &self.shared.engine)
            .finish_non_exhaustive()
    }
}

impl DindBackend {
    /// Opens the backend: reads the agent, and removes files that a crash left on their way. The engine is not asked for
    /// anything; whether it answers is [`Backend::health`]'s to say. Needs a tokio runtime.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(parts: DindParts) -> Result<Self, OpenError> {
        let DindParts { config, data_dir, instance, clock, staging } = parts;
        config.validate().map_err(OpenError::Config)?;
        let agent = Agent::load(&config)?;
        let depots = data_dir.join("dind").join(config.name.as_str());
        let fail = |what: &'static str| {
            let path = depots.display().to_string();
            move |source| OpenError::Directory { what, path, source }
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&depots).map_err(fail("make"))?;
        stage::sweep(&depots).map_err(fail("finish what was begun in"))?;
        let engine = Engine::new(&config);
        let names = Names::new(&instance, &config.name);
        let shared = Shared {
            capabilities: capability::capabilities(&config),
            images: Images::new(
                engine.clone(),
                config.images.clone(),
                config.default_image.clone(),
                Arc::clone(&clock),
            ),
            told: Mutex::default(),
            image_configs: ImageConfigs::default(),
            starts: Semaphore::new(config.concurrent_starts),
            workloads: Workloads::new(names.clone()),
            config,
            engine,
            agent,
            names,
            depots,
            staging,
            clock,
        };
        tracing::info!(backend = %shared.config.name, host = shared.config.host, "opened the docker backend");
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The engine that it uses.
    pub fn engine(&self) -> &Engine {
        &self.shared.engine
    }
}

impl Shared {
    fn workload_ref(&self, attempt: AttemptId) -> WorkloadRef {
        WorkloadRef { attempt, native: self.names.workload(attempt) }
    }

    async fn input(&self, workload: &Workload, input: WorkloadInput) -> Result<(), BackendError> {
        let request = match input {
            WorkloadInput::Stdin(bytes) if bytes.len() > MAX_STDIN_BYTES => {
                return Err(error::unsupported(format!("send {} bytes of input at once", bytes.len())));
            }
            WorkloadInput::Stdin(bytes) if bytes.is_empty() => return Ok(()),
            WorkloadInput::Stdin(bytes) => ControlRequest::Stdin(bytes),
            WorkloadInput::Eof => ControlRequest::Eof,
            WorkloadInput::Resize(size) => ControlRequest::Resize(size),
        };
        let refused = |why: &str| {
            let context = format!("send input to {}: {why}", workload.attempt);
            BackendError::new(BackendErrorKind::NotAttachable, false, context)
        };
        // One after the other, so that they keep their order.
        let _turn = workload.input.lock().await;
        let begun = self.clock.monotonic();
        loop {
            let Some(container) = self.look(workload, &workload.name).await? else {
                let context = format!("find the workload {}", workload.attempt);
                return Err(BackendError::new(BackendErrorKind::NotFound, false, context));
            };
            if container.state.unwrap_or_default().running != Some(true) {
                return Err(refused("no program runs"));
            }
            let left = INPUT_DEADLINE.saturating_sub(self.clock.monotonic().saturating_sub(begun));
            match live::request(&self.engine, &workload.name, request.clone(), left).await {
                Ok(ControlReply::Ok) => return Ok(()),
                // The shim is there and its program is not, yet.
                Ok(ControlReply::Refused(why))
                    if why == runner_agent::exec::protocol::NOT_YET && !left.is_zero() =>
                {
                    tokio::time::sleep(INPUT_RETRY).await;
                }
                Ok(ControlReply::Refused(why)) => return Err(refused(&why)),
                // Not listening yet; or not any more, which the next turn sees.
                Err(RequestError::Gone) if !left.is_zero() => tokio::time::sleep(INPUT_RETRY).await,
                Err(RequestError::Gone) => return Err(refused("its shim does not answer")),
                Err(RequestError::Engine(source)) => {
                    return Err(error::engine(format!("send input to {}", workload.attempt), source));
                }
                // Part of it may have been taken, so it is not sent again.
                Err(error @ RequestError::Deadline(_)) => {
                    let context = format!("send input to {}: the program does not read it", workload.attempt);
                    return Err(BackendError::with_source(
                        BackendErrorKind::Substrate,
                        false,
                        context,
                        error,
                    ));
                }
            }
        }
    }

    /// Has the shim delete what is before the offset, where that is a file or more.
    async fn release(&self, workload: &Workload, offset: u64) -> Result<(), BackendError> {
        let before = workload.released.load(Ordering::Acquire);
        if offset < before.saturating_add(SPOOL_FILE_BYTES) {
            return Ok(());
        }
        let request = ControlRequest::Release { offset };
        match live::request(&self.engine, &workload.name, request, RELEASE_DEADLINE).await {
            Ok(ControlReply::Ok) => {
                workload.released.fetch_max(offset, Ordering::AcqRel);
                Ok(())
            }
            // The program has ended: all of it goes when the attempt is removed.
            Ok(ControlReply::Refused(_)) | Err(RequestError::Gone) => Ok(()),
            Err(RequestError::Engine(error))
                if matches!(
                    error.kind,
                    EngineErrorKind::NotFound | EngineErrorKind::Conflict | EngineErrorKind::Refused
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error::substrate(format!("release the log of {}", workload.attempt), error)),
        }
    }

    async fn list(&self) -> Result<Vec<WorkloadRef>, BackendError> {
        let filter = self.names.filter();
        let containers = self
            .engine
            .containers(&filter)
            .await
            .map_err(|source| error::engine("list the containers", source))?;
        let volumes =
            self.engine.volumes(&filter).await.map_err(|source| error::engine("list the volumes", source))?;
        let found: BTreeSet<AttemptId> = containers
            .iter()
            .filter_map(|container| self.names.owner(container.labels.as_ref()?))
            .chain(volumes.iter().filter_map(|volume| self.names.owner(&volume.labels)))
            .collect();
        Ok(found.into_iter().map(|attempt| self.workload_ref(attempt)).collect())
    }

    /// Logs what is known against the engine, once.
    fn tell(&self, findings: &Findings) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if *told == *findings {
            return;
        }
        if !findings.weak.is_empty() || !findings.unclear.is_empty() {
            tracing::warn!(backend = %self.config.name, found = findings.summary(), "containers may escape from this engine");
        }
        told.clone_from(findings);
    }

    async fn health(&self) -> Health {
        let sick = |detail: String| Health { healthy: false, detail };
        let info = match self.engine.info().await {
            Ok(info) => info,
            Err(error) => {
                self.engine.forget_version();
                return sick(format!("the engine at {} does not answer: {error}", self.config.host));
            }
        };
        let architecture = info.architecture.unwrap_or_default();
        if architecture != self.agent.architecture {
            return sick(format!(
                "the engine is for {architecture}, the agent for {}: set `agent` in the backend's configuration",
                self.agent.architecture
            ));
        }
        for (has, what) in
            [(info.memory_limit, "memory"), (info.cpu_cfs_quota, "processor"), (info.pids_limit, "process")]
        {
            if has == Some(false) {
                return sick(format!("the engine's kernel has no {what} limits"));
            }
        }
        let findings = match self.engine.docker().await {
            Ok(docker) => {
                self.engine.answered(docker.version()).await.map(|version| versions::check(&version))
            }
            Err(error) => Err(error),
        };
        let findings = match findings {
            Ok(findings) => findings,
            Err(error) => {
                return sick(format!("the engine at {} does not answer: {error}", self.config.host));
            }
        };
        self.tell(&findings);
        if self.config.refuse_known_escapes && !findings.weak.is_empty() {
            return sick(findings.summary());
        }
        let detail = format!(
            "{}; {} {}, control groups v{}, live-restore {}",
            findings.summary(),
            info.operating_system.unwrap_or_default(),
            architecture,
            info.cgroup_version.map_or_else(|| "1".to_owned(), |version| version.to_string()),
            if info.live_restore_enabled == Some(true) { "on" } else { "off" },
        );
        Health { healthy: true, detail }
    }
}

#[async_trait]
impl Backend for DindBackend {
    fn name(&self) -> &BackendName {
        &self.shared.config.name
    }

    fn kind(&self) -> &'static str {
        "dind"
    }

    fn capabilities(&self) -> Capabilities {
        self.shared.capabilities.clone()
    }

    fn objections(&self, spec: &RunSpec) -> Vec<FieldViolation> {
        let mut found = capability::objections(spec);
        found.extend(self.shared.images.objection(spec));
        found
    }

    fn slots(&self) -> usize {
        self.shared.config.slots
    }

    async fn health(&self) -> Result<Health, BackendError> {
        Ok(self.shared.health().await)
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
        if result.as_ref().is_err_and(|error| error.kind == BackendErrorKind::NotFound) {
            self.shared.workloads.forget(&known);
        }
        result
    }

    async fn release(&self, workload: &WorkloadRef, offset: u64) -> Result<(), BackendError> {
        let known = self.shared.workloads.get(workload.attempt);
        self.shared.release(&known, offset).await
    }

    async fn stop(&self, workload: &WorkloadRef, grace: Duration) -> Result<(), BackendError> {
        self.shared.stop(workload, grace).await
    }

    async fn remove(&self, workload: &WorkloadRef) -> Result<(), BackendError> {
        self.shared.remove(workload).await
    }

    async fn list(&self) -> Result<Vec<WorkloadRef>, BackendError> {
        self.shared.list().await
    }
}
