//! The backend: its parts, how it is opened, and the verbs that are a few lines.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{Pod, Secret},
};
use kube::{
    Api, Client, Config,
    api::ListParams,
    config::{KubeConfigOptions, Kubeconfig},
};
use runner_agent::{
    exec::protocol::{ControlReply, ControlRequest, NOT_YET, SPOOL_FILE_BYTES},
    staging::StagingLimits,
};
use runner_core::{
    agent::{AgentAnswer, AgentAsk, AgentHub, AskError},
    backend::{
        AttemptContext, Backend, BackendError, BackendErrorKind, Health, Observation, WorkloadInput,
        WorkloadRef,
    },
    capability::Capabilities,
    clock::Clock,
    id::{AttemptId, BackendName},
    service::Meter,
    spec::{FieldViolation, RunSpec},
};
use tokio::sync::Semaphore;

use crate::{
    api::Clients,
    capability,
    config::K8sJobConfig,
    error::{self, Answer, OpenError},
    names::Names,
    observe,
    seen::JobSeen,
    watch::Watch,
};

/// Most bytes that one input may carry.
const MAX_STDIN_BYTES: usize = 64 * 1024;
/// How long input may wait for a program that does not read, or for an agent that is away.
const INPUT_DEADLINE: Duration = Duration::from_secs(10);
const INPUT_RETRY: Duration = Duration::from_millis(50);
/// How long a shim may take to forget.
const RELEASE_DEADLINE: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A watch is quiet for longer than this only where it is dead: the server ends each after some minutes.
const READ_TIMEOUT: Duration = Duration::from_secs(330);
/// How long a single request may take.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// What a Kubernetes backend is made of.
#[derive(Debug, Clone)]
pub struct K8sJobParts {
    /// Its settings.
    pub config: K8sJobConfig,
    /// Who the service is: the same after a restart, another for every data directory. The ownership mark.
    pub instance: String,
    /// Where agents are met.
    pub hub: Arc<AgentHub>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Caps on staging.
    pub staging: StagingLimits,
    /// Who counts the calls of the API server.
    pub meter: Arc<dyn Meter>,
}

/// What is held in memory of an attempt. Nothing of it is needed after a restart.
#[derive(Debug, Default)]
pub(crate) struct Workload {
    /// Held while it is made or unmade. Never held while a program is waited for.
    pub(crate) verbs: tokio::sync::Mutex<()>,
    /// Held by the one observer that publishes.
    pub(crate) publishing: tokio::sync::Mutex<()>,
    /// Held by the one caller whose input is being taken, so that inputs keep their order.
    input: tokio::sync::Mutex<()>,
    /// Log bytes that the shim was told to forget.
    released: AtomicU64,
}

/// What every verb shares.
pub(crate) struct Shared {
    pub(crate) config: K8sJobConfig,
    pub(crate) capabilities: Capabilities,
    pub(crate) names: Names,
    pub(crate) hub: Arc<AgentHub>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) staging: StagingLimits,
    pub(crate) client: Client,
    pub(crate) jobs: Api<Job>,
    pub(crate) secrets: Api<Secret>,
    pub(crate) watch: Watch,
    pub(crate) creates: Semaphore,
    workloads: Mutex<HashMap<AttemptId, Arc<Workload>>>,
}

/// Executes attempts as Jobs. See [`Backend`] for what holds.
///
/// Dropping it stops nothing: Jobs live on, and the next backend of the same service and name adopts them.
pub struct K8sJobBackend {
    shared: Arc<Shared>,
}

impl fmt::Debug for K8sJobBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("K8sJobBackend")
            .field("name", &self.shared.config.name)
            .field("namespace", &self.shared.config.namespace)
            .finish_non_exhaustive()
    }
}

impl K8sJobBackend {
    /// Opens the backend: finds the credentials and begins to watch. The cluster need not answer; whether it does is
    /// [`Backend::health`]'s to say. Needs a tokio runtime.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(parts: K8sJobParts) -> Result<Self, OpenError> {
        let K8sJobParts { config, instance, hub, clock, staging, meter } = parts;
        config.validate().map_err(OpenError::Config)?;
        let found = find(&config).await?;
        let Clients { watch, work: client } = Clients::new(found, &config.api, &config.name, &clock, &meter)?;
        let names = Names::new(&instance, &config.name);
        let jobs: Api<Job> = Api::namespaced(client.clone(), &config.namespace);
        let watched: (Api<Job>, Api<Pod>) =
            (Api::namespaced(watch.clone(), &config.namespace), Api::namespaced(watch, &config.namespace));
        let shared = Shared {
            capabilities: capability::capabilities(&config),
            watch: Watch::begin(&names, watched.0, watched.1),
            secrets: Api::namespaced(client.clone(), &config.namespace),
            creates: Semaphore::new(config.concurrent_creates),
            workloads: Mutex::default(),
            jobs,
            config,
            names,
            hub,
            clock,
            staging,
            client,
        };
        tracing::info!(backend = %shared.config.name, namespace = shared.config.namespace, "opened the Kubernetes backend");
        Ok(Self { shared: Arc::new(shared) })
    }
}

/// The way to the cluster, with credentials that are refreshed as Kubernetes' own tools do it.
async fn find(config: &K8sJobConfig) -> Result<Config, OpenError> {
    let options = KubeConfigOptions { context: config.context.clone(), ..KubeConfigOptions::default() };
    let credentials = |error: Box<dyn std::error::Error + Send + Sync>| OpenError::Credentials(error);
    let mut found = match &config.kubeconfig {
        Some(path) => {
            let file = Kubeconfig::read_from(path).map_err(|error| credentials(error.into()))?;
            Config::from_custom_kubeconfig(file, &options).await.map_err(|error| credentials(error.into()))?
        }
        None if config.context.is_some() => {
            Config::from_kubeconfig(&options).await.map_err(|error| credentials(error.into()))?
        }
        None => Config::infer().await.map_err(|error| credentials(error.into()))?,
    };
    found.connect_timeout = Some(CONNECT_TIMEOUT);
    found.read_timeout = Some(READ_TIMEOUT);
    Ok(found)
}

/// Bounds a request of the API server.
pub(crate) async fn bounded<T>(
    what: &str,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, BackendError> {
    match tokio::time::timeout(REQUEST_TIMEOUT, request).await {
        Ok(answer) => answer.map_err(|source| error::api(what, source)),
        Err(_) => Err(error::substrate(format!("{what}: the API server does not answer"))),
    }
}

impl Shared {
    pub(crate) fn workload_ref(&self, attempt: AttemptId) -> WorkloadRef {
        WorkloadRef { attempt, native: self.names.workload(attempt) }
    }

    pub(crate) fn workload(&self, attempt: AttemptId) -> Arc<Workload> {
        Arc::clone(self.workloads.lock().unwrap_or_else(PoisonError::into_inner).entry(attempt).or_default())
    }

    /// Forgets an attempt that nobody but the caller holds.
    pub(crate) fn forget(&self, attempt: AttemptId, held: &Arc<Workload>) {
        let mut workloads = self.workloads.lock().unwrap_or_else(PoisonError::into_inner);
        if Arc::strong_count(held) == 2 {
            workloads.remove(&attempt);
        }
        drop(workloads);
        self.hub.tidy(attempt);
    }

    /// The Job as the API server has it now. `None`: there is none.
    pub(crate) async fn job(&self, attempt: AttemptId) -> Result<Option<JobSeen>, BackendError> {
        let name = self.names.workload(attempt);
        let found = bounded("look for the Job", self.jobs.get_opt(&name)).await?;
        Ok(found
            .filter(|job| self.names.owner(job.metadata.labels.as_ref()) == Some(attempt))
            .map(|job| JobSeen::new(&job)))
    }

    async fn input(&self, attempt: AttemptId, input: WorkloadInput) -> Result<(), BackendError> {
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
            let context = format!("send input to {attempt}: {why}");
            BackendError::new(BackendErrorKind::NotAttachable, false, context)
        };
        let workload = self.workload(attempt);
        // One after the other, so that they keep their order.
        let _turn = workload.input.lock().await;
        let begun = self.clock.monotonic();
        loop {
            let left = INPUT_DEADLINE.saturating_sub(self.clock.monotonic().saturating_sub(begun));
            match self.control(attempt, &request, left).await {
                Ok(Some(ControlReply::Ok)) => return Ok(()),
                Ok(Some(ControlReply::Refused(why))) if why == NOT_YET && !left.is_zero() => {}
                Ok(Some(ControlReply::Refused(why))) => return Err(refused(&why)),
                // No shim serves: it has not begun, or it has ended.
                Ok(None) => match self.hub.ask(attempt, AgentAsk::State { patience: Duration::ZERO }).await {
                    Ok(AgentAnswer::State(state))
                        if state.exit_record.is_some() || state.stopped.is_some() =>
                    {
                        return Err(refused("the program has ended"));
                    }
                    _ if left.is_zero() => return Err(refused("no program runs")),
                    _ => {}
                },
                Err(Asked::Away) => {
                    if self.job(attempt).await?.is_none() {
                        let context = format!("find the workload {attempt}");
                        return Err(BackendError::new(BackendErrorKind::NotFound, false, context));
                    }
                    if left.is_zero() {
                        return Err(refused("its agent is not connected"));
                    }
                }
                // Part of it may have been taken, so it is not sent again.
                Err(Asked::Failed(why)) => {
                    let context = format!("send input to {attempt}: {why}");
                    return Err(BackendError::new(BackendErrorKind::Substrate, false, context));
                }
            }
            tokio::time::sleep(INPUT_RETRY).await;
        }
    }

    /// Asks the shim by way of its agent. `None`: no shim serves now.
    async fn control(
        &self,
        attempt: AttemptId,
        request: &ControlRequest,
        patience: Duration,
    ) -> Result<Option<ControlReply>, Asked> {
        let failed = |error: &dyn fmt::Display| Asked::Failed(error.to_string());
        let request = serde_json::to_vec(request).map(Bytes::from).map_err(|error| failed(&error))?;
        match self.hub.ask(attempt, AgentAsk::Control { request, patience }).await {
            Ok(AgentAnswer::Control(None)) => Ok(None),
            Ok(AgentAnswer::Control(Some(reply))) => {
                serde_json::from_slice(&reply).map(Some).map_err(|error| failed(&error))
            }
            Ok(AgentAnswer::Failed { message, .. }) => Err(Asked::Failed(message)),
            Ok(_) => Err(failed(&"its agent answers something else")),
            Err(AskError::Away) => Err(Asked::Away),
            Err(error @ AskError::Silent) => Err(failed(&error)),
        }
    }

    /// Has the shim delete what is before the offset, where that is a file or more.
    async fn release(&self, attempt: AttemptId, offset: u64) -> Result<(), BackendError> {
        let workload = self.workload(attempt);
        let before = workload.released.load(Ordering::Acquire);
        if offset < before.saturating_add(SPOOL_FILE_BYTES) {
            return Ok(());
        }
        match self.control(attempt, &ControlRequest::Release { offset }, RELEASE_DEADLINE).await {
            Ok(Some(ControlReply::Ok)) => {
                workload.released.fetch_max(offset, Ordering::AcqRel);
                Ok(())
            }
            // The program has ended, or its agent is away: what is kept too long goes with the pod.
            Ok(None | Some(ControlReply::Refused(_))) | Err(Asked::Away) => Ok(()),
            Err(Asked::Failed(why)) => Err(error::substrate(format!("release the log of {attempt}: {why}"))),
        }
    }

    async fn list(&self) -> Result<Vec<WorkloadRef>, BackendError> {
        let parameters = ListParams::default().labels(&self.names.selector());
        let jobs = bounded("list the Jobs", self.jobs.list(&parameters)).await?;
        let owner = |job: &Job| self.names.owner(job.metadata.labels.as_ref());
        Ok(jobs.iter().filter_map(owner).map(|attempt| self.workload_ref(attempt)).collect())
    }

    async fn health(&self) -> Health {
        let sick = |detail: String| Health { healthy: false, detail };
        let asked = tokio::time::timeout(REQUEST_TIMEOUT, self.client.apiserver_version()).await;
        let version = match asked {
            Ok(Ok(version)) => version.git_version,
            Ok(Err(error)) => return sick(format!("the API server does not answer: {error}")),
            Err(_) => return sick(format!("the API server does not answer in {REQUEST_TIMEOUT:?}")),
        };
        let may_list = ListParams::default().labels(&self.names.selector()).limit(1);
        match tokio::time::timeout(REQUEST_TIMEOUT, self.jobs.list(&may_list)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                let why = match error::answer(&error) {
                    Answer::Refused => "the service's account may not list Jobs",
                    Answer::NotFound | Answer::Conflict | Answer::Quota | Answer::Failed => {
                        "Jobs cannot be listed"
                    }
                };
                return sick(format!("{why} in {}: {error}", self.config.namespace));
            }
            Err(_) => return sick("Jobs cannot be listed in time".to_owned()),
        }
        let watching = if self.watch.is_complete() { "watching" } else { "not watching yet" };
        Health {
            healthy: true,
            detail: format!("Kubernetes {version}, namespace {}, {watching}", self.config.namespace),
        }
    }
}

/// Why the shim gave no answer.
enum Asked {
    Away,
    Failed(String),
}

#[async_trait]
impl Backend for K8sJobBackend {
    fn name(&self) -> &BackendName {
        &self.shared.config.name
    }

    fn kind(&self) -> &'static str {
        "k8sjob"
    }

    fn capabilities(&self) -> Capabilities {
        self.shared.capabilities.clone()
    }

    fn objections(&self, spec: &RunSpec) -> Vec<FieldViolation> {
        capability::objections(&self.shared.config, spec)
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
        self.shared.ensure(attempt).await
    }

    fn observe(
        &self,
        attempt: &AttemptContext,
        cursor: u64,
    ) -> BoxStream<'static, Result<Observation, BackendError>> {
        observe::observe(Arc::clone(&self.shared), attempt.clone(), cursor)
    }

    async fn input(&self, workload: &WorkloadRef, input: WorkloadInput) -> Result<(), BackendError> {
        self.shared.input(workload.attempt, input).await
    }

    async fn release(&self, workload: &WorkloadRef, offset: u64) -> Result<(), BackendError> {
        self.shared.release(workload.attempt, offset).await
    }

    async fn stop(&self, workload: &WorkloadRef, grace: Duration) -> Result<(), BackendError> {
        self.shared.stop(workload.attempt, grace).await
    }

    async fn remove(&self, workload: &WorkloadRef) -> Result<(), BackendError> {
        self.shared.remove(workload.attempt).await
    }

    async fn list(&self) -> Result<Vec<WorkloadRef>, BackendError> {
        self.shared.list().await
    }
}
