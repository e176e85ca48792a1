//! The service without its surfaces: admission, the life of each run, watchers, recovery.
//!
//! [`RunService`] is what a gRPC front, or any other, is built over. Everything that it knows can be rebuilt from the
//! store and the backends' lists: a restart is nothing special.

mod driver;
mod error;
mod guard;
mod health;
mod inputs;
mod live;
mod meter;
mod options;
mod reconcile;
mod removal;
mod retry;
mod shadow;
mod stream;
mod sweep;
mod traffic;
mod watchdog;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::AtomicU32},
    time::Duration,
};

use futures::stream::BoxStream;
use tokio::sync::{OwnedRwLockReadGuard, OwnedSemaphorePermit, Semaphore};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{driver::Driver, live::LiveRuns};
pub use self::{
    error::ServiceError,
    guard::{GuardReport, GuardVerdict},
    health::{BackendStatus, Readiness},
    meter::{Meter, NoMeter},
    options::Options,
    stream::{InvalidCursor, StreamBody, StreamCursor, StreamItem, StreamOptions},
    sweep::{Retention, SweepReport},
    traffic::{Explanation, TrafficChange},
};
use crate::{
    artifact::ArtifactStore,
    backend::{Backend, BackendErrorKind, WorkloadInput},
    clock::{Clock, IdGen},
    crash,
    id::{AttemptId, BackendName, IdempotencyKey, RunId, TenantId},
    limits::Limits,
    log::LogStore,
    outcome::{Cause, Outcome},
    role::Role,
    spec::RunSpec,
    state::RunState,
    store::{
        Accepted, AttemptRecord, CancelIntent, LiveLimits, NewRun, PageCursor, RunEvent, RunFilter, RunPage,
        RunRecord, Store, StoreError, StoredEvent, Timer,
    },
    task::{self, TaskKind},
    traffic::{Decision, Policy, Shadowing},
};

/// Who calls, as the credentials say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Whose runs it may see.
    pub tenant: TenantId,
    /// For audit.
    pub subject: String,
    /// What it is to the service.
    pub roles: BTreeSet<Role>,
}

/// A request to run.
#[derive(Debug, Clone)]
pub struct RunRequest {
    /// What to run.
    pub spec: RunSpec,
    /// The caller's choice of an id.
    pub run_id: Option<RunId>,
    /// The caller's own name for it.
    pub key: Option<IdempotencyKey>,
}

/// What the service is made of.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "each is documented at its trait")]
pub struct Parts {
    pub store: Arc<dyn Store>,
    pub logs: Arc<dyn LogStore>,
    pub artifacts: Arc<dyn ArtifactStore>,
    /// At least the default one. Names are unique.
    pub backends: Vec<Arc<dyn Backend>>,
    pub default_backend: BackendName,
    /// Where new runs go, for a store that says nothing about it yet.
    pub traffic: Option<Policy>,
    pub clock: Arc<dyn Clock>,
    pub ids: Arc<dyn IdGen>,
    pub limits: Limits,
    pub options: Options,
    pub meter: Arc<dyn Meter>,
}

#[derive(Debug)]
struct BackendEntry {
    backend: Arc<dyn Backend>,
    slots: Arc<Semaphore>,
    size: usize,
    /// How often in a row it was asked whether it takes work, and did not say yes.
    misses: AtomicU32,
}

/// What every part of the service shares.
#[derive(Debug)]
struct Core {
    parts: Parts,
    backends: BTreeMap<BackendName, BackendEntry>,
    live: LiveRuns,
    traffic: traffic::Desk,
    guard: guard::Reports,
    shadows: shadow::Bell,
    sweeps: sweep::Sweeps,
    stopping: CancellationToken,
    tasks: TaskTracker,
}

impl Core {
    /// Starts the driver of a run that has none. `fresh`: no process has driven it before.
    fn drive(self: &Arc<Self>, record: RunRecord, timers: &[Timer], fresh: bool) {
        let Some(entry) = self.backends.get(&record.backend) else {
            tracing::error!(
                run.id = %record.id, backend = %record.backend,
                "a live run's backend is not configured any more; the run waits until it is"
            );
            return;
        };
        let Some(live) = self.live.add(record.id, &record.backend, record.last_event) else { return };
        if fresh {
            live.publish([StoredEvent {
                seq: record.last_event,
                time: record.created,
                event: RunEvent::StateChanged { position: record.position, reason: String::new() },
            }]);
        }
        self.parts.meter.live_runs(self.live.len());
        let driver = Driver::new(
            self,
            live,
            record,
            timers,
            Arc::clone(&entry.backend),
            Arc::clone(&entry.slots),
            fresh,
        );
        let tracked = self.tasks.track_future(driver.drive());
        task::spawn(TaskKind::Run, "run", tracked);
    }

    /// Stores the intent to cancel a run, and tells its driver and its watchers. `attempt` is the one that it was seen at.
    async fn cancel(
        &self,
        id: RunId,
        attempt: u32,
        by: &str,
        reason: String,
    ) -> Result<RunRecord, ServiceError> {
        let time = self.parts.clock.now();
        let in_queue = Outcome::new(attempt, Cause::Cancelled, "cancelled in the queue").with_evidence(
            "cancel",
            format!("requested by {by}: {reason}"),
            time,
        );
        let answer = self.parts.store.request_cancel(id, CancelIntent { time, reason }, in_queue).await?;
        crash::point("cancel.intent");
        let run = answer.run;
        if run.cancel.is_some()
            && let Some(live) = self.live.get(id)
        {
            if answer.newly
                && let (true, Some(outcome)) = (run.position.state.is_terminal(), &run.outcome)
            {
                live.publish([StoredEvent {
                    seq: run.last_event,
                    time,
                    event: RunEvent::Terminated { position: run.position, outcome: outcome.clone() },
                }]);
            }
            live.cancel_stored();
        }
        Ok(run)
    }

    /// Does what must be done whole: a caller that goes away between a durable step and what follows from it must not
    /// leave a run without its driver, or an intent that nobody looks at.
    async fn whole<T: Send + 'static>(
        &self,
        name: &'static str,
        work: impl Future<Output = Result<T, ServiceError>> + Send + 'static,
    ) -> Result<T, ServiceError> {
        match task::spawn(TaskKind::Call, name, self.tasks.track_future(work)).await {
            Ok(Some(result)) => result,
            Ok(None) => Err(ServiceError::Internal(format!("the task {name} panicked"))),
            Err(_) => Err(ServiceError::Unavailable("the service is shutting down".to_owned())),
        }
    }

    /// Waits. False where the service stops first.
    async fn pause(&self, duration: Duration) -> bool {
        tokio::select! {
            () = tokio::time::sleep(duration) => true,
            () = self.stopping.cancelled() => false,
        }
    }

    /// The pause after `failures` failures in a row: doubling, with jitter.
    fn backoff(&self, failures: u32) -> Duration {
        let options = &self.parts.options;
        let full = options.min_pause.saturating_mul(1 << failures.min(16)).min(options.max_pause);
        let micros = u64::try_from(full.as_micros()).unwrap_or(u64::MAX).max(1);
        full / 2 + Duration::from_micros(self.parts.ids.random() % micros) / 2
    }
}

/// Runs workloads. See the module's documentation.
#[derive(Debug, Clone)]
pub struct RunService {
    core: Arc<Core>,
}

impl RunService {
    /// Puts the parts together, adopts every live run, and starts the loops.
    ///
    /// # Errors
    /// Where the parts do not fit together, or the store does not answer.
    pub async fn start(parts: Parts) -> Result<Arc<Self>, ServiceError> {
        let mut backends = BTreeMap::new();
        for backend in &parts.backends {
            let size = backend.slots().clamp(1, Semaphore::MAX_PERMITS);
            let entry = BackendEntry {
                backend: Arc::clone(backend),
                slots: Arc::new(Semaphore::new(size)),
                size,
                misses: AtomicU32::new(0),
            };
            if backends.insert(backend.name().clone(), entry).is_some() {
                return Err(precondition(
                    "DUPLICATE_BACKEND",
                    format!("two backends are named {}", backend.name()),
                ));
            }
        }
        if !backends.contains_key(&parts.default_backend) {
            let message = format!("the default backend {} is not configured", parts.default_backend);
            return Err(precondition("UNKNOWN_BACKEND", message));
        }
        let known = backends.keys().cloned().collect();
        let traffic = traffic::Desk::open(&parts, known).await?;
        let core = Arc::new(Core {
            parts,
            backends,
            live: LiveRuns::default(),
            traffic,
            guard: guard::Reports::default(),
            shadows: shadow::Bell::default(),
            sweeps: sweep::Sweeps::default(),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        reconcile::adopt(&core).await?;
        let reconciler = core.tasks.track_future(reconcile::run(Arc::clone(&core)));
        task::spawn(TaskKind::Loop, "reconciler", reconciler);
        let ramps = core.tasks.track_future(traffic::run(Arc::clone(&core)));
        task::spawn(TaskKind::Loop, "ramps", ramps);
        let health = core.tasks.track_future(traffic::watch_health(Arc::clone(&core)));
        task::spawn(TaskKind::Loop, "health", health);
        let guard = core.tasks.track_future(guard::run(Arc::clone(&core)));
        task::spawn(TaskKind::Loop, "guard", guard);
        let shadows = core.tasks.track_future(shadow::run(Arc::clone(&core)));
        task::spawn(TaskKind::Loop, "shadows", shadows);
        let sweeper = core.tasks.track_future(sweep::run(Arc::clone(&core)));
        task::spawn(TaskKind::Loop, "sweeper", sweeper);
        Ok(Arc::new(Self { core }))
    }

    /// Accepts a run. When this returns, the run is durable. True: it is new.
    ///
    /// # Errors
    /// As the contract says under "Run"; nothing is stored then.
    pub async fn run(&self, caller: &Caller, request: RunRequest) -> Result<(RunRecord, bool), ServiceError> {
        let answer = self.admit(caller, request).await;
        match &answer {
            Err(ServiceError::Invalid(_)) => self.core.parts.meter.refused("invalid"),
            Err(ServiceError::AlreadyExists { .. }) => self.core.parts.meter.refused("already_exists"),
            Err(ServiceError::Exhausted { .. }) => self.core.parts.meter.refused("exhausted"),
            Err(ServiceError::Denied { .. }) => self.core.parts.meter.refused("denied"),
            Err(ServiceError::Unavailable(_)) => self.core.parts.meter.refused("unavailable"),
            Err(
                ServiceError::NotFound(_)
                | ServiceError::FailedPrecondition { .. }
                | ServiceError::Internal(_),
            ) => {
                self.core.parts.meter.refused("other");
            }
            Ok(_) => {}
        }
        answer
    }

    async fn admit(&self, caller: &Caller, request: RunRequest) -> Result<(RunRecord, bool), ServiceError> {
        let core = &self.core;
        let parts = &core.parts;
        if core.stopping.is_cancelled() {
            return Err(ServiceError::Unavailable("the service is shutting down".to_owned()));
        }
        if request.run_id.is_some_and(RunId::is_shadow) {
            return Err(ServiceError::field(
                "run_id",
                "INVALID",
                "is of a form that the service keeps for itself",
            ));
        }
        request.spec.validate(&caller.tenant, &parts.limits)?;
        // Of what the caller sent, before anything is filled in.
        let digest = request.spec.digest();
        let RunRequest { mut spec, run_id, key } = request;
        let id = run_id.unwrap_or_else(|| parts.ids.run_id());
        let new_run = |spec, backend, decision: Option<Decision>| NewRun {
            id,
            tenant: caller.tenant.clone(),
            key: key.clone(),
            spec: Arc::new(spec),
            digest,
            backend,
            backend_reason: decision.as_ref().map(ToString::to_string).unwrap_or_default(),
            decision,
            time: parts.clock.now(),
        };
        let (run, admission) = match self.place(caller, id, &mut spec).await {
            Ok((backend, decision, admission)) => {
                let spec = parts.limits.apply(spec, &backend.capabilities());
                (new_run(spec, decision.backend.clone(), Some(decision)), admission)
            }
            // What was accepted once is answered, though what it needed then may be gone by now. With no room, the store
            // makes nothing new.
            Err(error) => {
                let run = new_run(spec, parts.default_backend.clone(), None);
                let nothing = LiveLimits { total: 0, per_tenant: 0 };
                return match parts.store.accept(run, nothing).await? {
                    Accepted::Existing(record) => Ok((record, false)),
                    Accepted::Conflict { field } => Err(ServiceError::AlreadyExists { field }),
                    Accepted::Full { .. } | Accepted::Created(_) => Err(error),
                };
            }
        };
        let limits =
            LiveLimits { total: parts.limits.live_runs, per_tenant: parts.limits.live_runs_per_tenant };
        crash::point("run.before-accept");
        let accepting = Arc::clone(core);
        let accepting = async move {
            let _admission = admission;
            let parts = &accepting.parts;
            match parts.store.accept(run, limits).await? {
                Accepted::Created(record) => {
                    crash::point("run.accepted");
                    tracing::debug!(run.id = %record.id, tenant = %record.tenant, backend = %record.backend, "accepted");
                    parts.meter.accepted(&record.backend, record.placed_by());
                    let shadowing = record.decision.as_ref().and_then(|decision| decision.shadow.as_ref());
                    if let Some(Shadowing::No(why)) = shadowing {
                        parts.meter.shadow_skipped(*why);
                    }
                    accepting.drive(record.clone(), &[], true);
                    Ok((record, true))
                }
                Accepted::Existing(record) => Ok((record, false)),
                Accepted::Conflict { field } => Err(ServiceError::AlreadyExists { field }),
                Accepted::Full { limit, max } => {
                    Err(ServiceError::Exhausted { limit, max, retry_after: Duration::from_secs(1) })
                }
            }
        };
        core.whole("accept", accepting).await
    }

    /// Finds other runs' outputs that a valid spec names, and chooses where it goes.
    async fn place(
        &self,
        caller: &Caller,
        id: RunId,
        spec: &mut RunSpec,
    ) -> Result<(Arc<dyn Backend>, Decision, OwnedRwLockReadGuard<()>), ServiceError> {
        inputs::find(&self.core.parts, caller, spec).await?;
        let admission = self.core.traffic.admission().await;
        let (backend, decision) = self.core.route(caller, id, spec)?;
        Ok((backend, decision, admission))
    }

    /// A run of the caller's tenant.
    async fn find(&self, caller: &Caller, id: RunId) -> Result<RunRecord, ServiceError> {
        match self.core.parts.store.get(id).await? {
            Some(record) if record.tenant == caller.tenant && !id.is_shadow() => Ok(record),
            // Another tenant's run, and a shadow, are not told from one that does not exist.
            _ => Err(ServiceError::NotFound(id)),
        }
    }

    /// Asks for the end. Returns once the intent is durable.
    ///
    /// # Errors
    /// `NotFound`, or the store's failure.
    pub async fn cancel(
        &self,
        caller: &Caller,
        id: RunId,
        reason: String,
    ) -> Result<RunRecord, ServiceError> {
        let record = self.find(caller, id).await?;
        if record.position.state.is_terminal() {
            return Ok(record);
        }
        let mut reason = reason;
        if reason.len() > 1024 {
            reason.truncate(reason.floor_char_boundary(1024));
        }
        crash::point("cancel.before-intent");
        let core = Arc::clone(&self.core);
        let (attempt, by) = (record.position.attempt, caller.subject.clone());
        let cancelling = async move { core.cancel(id, attempt, &by, reason).await };
        self.core.whole("cancel", cancelling).await
    }

    /// A run and its ended attempts.
    ///
    /// # Errors
    /// `NotFound`, or the store's failure.
    pub async fn get(
        &self,
        caller: &Caller,
        id: RunId,
    ) -> Result<(RunRecord, Vec<AttemptRecord>), ServiceError> {
        let record = self.find(caller, id).await?;
        let attempts = self.core.parts.store.attempts(id).await?;
        Ok((record, attempts))
    }

    /// Whether the attempt is its run's last one and is not over: it was begun, and neither judged nor given up.
    ///
    /// # Errors
    /// The store's failure.
    pub async fn is_live_attempt(&self, attempt: AttemptId) -> Result<bool, ServiceError> {
        let Some(record) = self.core.parts.store.get(attempt.run).await? else { return Ok(false) };
        let state = record.position.state;
        Ok(record.attempt() == Some(attempt) && state != RunState::Queued && !state.is_terminal())
    }

    /// A page of the caller's runs, newest first.
    ///
    /// # Errors
    /// The store's failure.
    pub async fn list(
        &self,
        caller: &Caller,
        mut filter: RunFilter,
        after: Option<PageCursor>,
        max: usize,
    ) -> Result<RunPage, ServiceError> {
        filter.tenant = Some(caller.tenant.clone());
        Ok(self.core.parts.store.list(&filter, after, max.clamp(1, 1000)).await?)
    }

    /// Replays a run from a cursor, then follows it. The terminal event is always the last.
    ///
    /// # Errors
    /// `NotFound`, or the store's failure. Failures later on come through the stream, and end it; resume from the last
    /// cursor.
    pub async fn stream(
        self: &Arc<Self>,
        caller: &Caller,
        id: RunId,
        from: StreamCursor,
        options: StreamOptions,
    ) -> Result<BoxStream<'static, Result<StreamItem, ServiceError>>, ServiceError> {
        // Before the record is read: a run that ends in between is found in the store.
        let live = self.core.live.get(id);
        let record = self.find(caller, id).await?;
        stream::open(Arc::clone(&self.core), live, &record, from, options)
    }

    /// Sends input to a running workload.
    ///
    /// # Errors
    /// `FailedPrecondition` where the run takes no input, or not now.
    pub async fn input(&self, caller: &Caller, id: RunId, input: WorkloadInput) -> Result<(), ServiceError> {
        let record = self.find(caller, id).await?;
        match &input {
            WorkloadInput::Resize(_) if record.spec.terminal.is_none() => {
                return Err(precondition("NO_TERMINAL", "the run's spec asks for no terminal".to_owned()));
            }
            WorkloadInput::Stdin(_) | WorkloadInput::Eof
                if !record.spec.stdin && record.spec.terminal.is_none() =>
            {
                return Err(precondition("NO_STDIN", "the run's spec asks for no standard input".to_owned()));
            }
            WorkloadInput::Stdin(_) | WorkloadInput::Eof | WorkloadInput::Resize(_) => {}
        }
        let not_running = || {
            let message = format!("the run is {}, not RUNNING", record.position.state.as_str());
            precondition("NOT_RUNNING", message)
        };
        let (Some(attempt), RunState::Running) = (record.attempt(), record.position.state) else {
            return Err(not_running());
        };
        let Some(entry) = self.core.backends.get(&record.backend) else { return Err(not_running()) };
        let workload = entry.backend.workload_ref(attempt);
        entry.backend.input(&workload, input).await.map_err(|error| match error.kind {
            BackendErrorKind::NotFound | BackendErrorKind::NotAttachable => {
                precondition("NOT_ATTACHABLE", error.chain())
            }
            BackendErrorKind::Image
            | BackendErrorKind::Input
            | BackendErrorKind::Output
            | BackendErrorKind::Unschedulable
            | BackendErrorKind::Unsupported
            | BackendErrorKind::Substrate => ServiceError::Unavailable(error.chain()),
        })
    }

    /// Number of runs that this process drives.
    pub fn live_runs(&self) -> usize {
        self.core.live.len()
    }

    /// Stops admitting and driving, and waits until nothing is under way. Workloads live on; the next start adopts them.
    pub async fn shutdown(&self) {
        self.core.stopping.cancel();
        self.core.tasks.close();
        self.core.tasks.wait().await;
    }
}

fn precondition(reason: &'static str, message: String) -> ServiceError {
    ServiceError::FailedPrecondition { reason, message }
}

/// Whether the same call to the store may succeed later.
fn store_may_recover(error: &StoreError) -> bool {
    match error {
        StoreError::Full(_) | StoreError::Unavailable(_) | StoreError::Other(_) => true,
        StoreError::NotFound(_) | StoreError::Inconsistent(_) => false,
    }
}

/// A slot of a backend. `None`: an adopted workload that came when all were taken.
type Slot = Option<OwnedSemaphorePermit>;
