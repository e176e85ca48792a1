//! Where new runs go, as the running service knows it: the stored state, who answers, and the loops that keep both true.

use std::{
    collections::BTreeSet,
    sync::{Arc, PoisonError, RwLock, atomic::Ordering},
    time::Duration,
};

use tokio::sync::{Notify, OwnedRwLockReadGuard};

use super::{BackendEntry, Caller, Core, Parts, RunService, ServiceError, health::health, precondition};
use crate::{
    backend::Backend,
    id::{BackendName, RunId},
    spec::RunSpec,
    store::{AuditEntry, StoredAudit, StoredTraffic, TrafficSet},
    traffic::{
        Asked, Backends, By, Candidate, Change, ChangeError, Decision, NoBackend, Target, Traffic, choose,
    },
};

/// A backend is passed over once it was asked in vain so often in a row: one that is slow for a moment keeps its keys.
const MISSES: u32 = 3;
/// Who changes the traffic where no person asks.
const SERVICE: &str = "service";
/// Who changes it at the first start.
const CONFIGURATION: &str = "configuration";
/// Most bytes of a reason.
const MAX_REASON: usize = 1024;
/// Each turn that a change loses was won by another. So many in a row mean that something is wrong.
const MAX_TURNS: u32 = 32;
/// A ramp is looked at at least so often: the wall clock, which it goes by, may be set.
const LOOK: Duration = Duration::from_secs(30);

/// A change to the traffic, asked for by an operator.
#[derive(Debug, Clone)]
pub struct TrafficChange {
    /// What.
    pub change: Change,
    /// The version that it is to be made to; `None`: whichever there is.
    pub expected: Option<u64>,
    /// Why. Required.
    pub reason: String,
}

/// Where a run would go, and what is known of every backend.
#[derive(Debug)]
pub struct Explanation {
    /// Where, and why; or why nowhere.
    pub decision: Result<Decision, NoBackend>,
    /// Every configured backend, as far as this spec goes.
    pub candidates: Vec<(BackendName, Candidate)>,
}

/// The stored state, in memory. Every change goes through here, so what is known is what is stored.
#[derive(Debug)]
pub(super) struct Desk {
    current: RwLock<Arc<StoredTraffic>>,
    known: BTreeSet<BackendName>,
    changed: Notify,
    /// Held by each admission from its choice until the run is live. A change waits for those that may have chosen by the state
    /// before: once a drain has answered, no run is on its way to the backend any more.
    admissions: Arc<tokio::sync::RwLock<()>>,
}

impl Desk {
    /// Reads the state. Where there is none, the configuration's policy becomes it.
    pub(super) async fn open(parts: &Parts, known: BTreeSet<BackendName>) -> Result<Self, ServiceError> {
        let mut current = parts.store.traffic().await?.unwrap_or_default();
        if let (0, Some(policy)) = (current.version, &parts.traffic) {
            let change = Change::SetPolicy(policy.clone());
            let by = By { actor: CONFIGURATION, reason: "the first start", now: parts.clock.now() };
            let (traffic, what) = current.traffic.changed(&change, by, &known).map_err(refusal)?;
            let set = parts.store.set_traffic(0, &traffic, entry(&change, by, what)).await?;
            current = match set {
                TrafficSet::Stored { version } => StoredTraffic { version, traffic },
                // Another replica's first start was faster.
                TrafficSet::Conflict { .. } => parts.store.traffic().await?.unwrap_or(current),
            };
        }
        for backend in targets(&current.traffic).filter(|backend| !known.contains(backend)) {
            tracing::warn!(%backend, "the traffic policy names a backend that is not configured; it is passed over");
        }
        parts.meter.traffic(&current);
        let admissions = Arc::default();
        Ok(Self { current: RwLock::new(Arc::new(current)), known, changed: Notify::new(), admissions })
    }

    /// To be held from the choice of a backend until the run is live.
    pub(super) async fn admission(&self) -> OwnedRwLockReadGuard<()> {
        Arc::clone(&self.admissions).read_owned().await
    }

    pub(super) fn current(&self) -> Arc<StoredTraffic> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes over what is stored, unless something newer is known.
    fn learn(&self, stored: StoredTraffic) -> Arc<StoredTraffic> {
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        if stored.version > current.version {
            *current = Arc::new(stored);
            self.changed.notify_one();
        }
        Arc::clone(&current)
    }
}

/// Backends that a state names.
fn targets(traffic: &Traffic) -> impl Iterator<Item = &BackendName> {
    let rules = traffic.policy.rules.iter().map(|rule| &rule.to);
    let named: BTreeSet<_> = rules.chain(&traffic.policy.default).flat_map(Target::backends).collect();
    named.into_iter().chain(traffic.drained.keys())
}

fn entry(change: &Change, by: By<'_>, what: String) -> AuditEntry {
    AuditEntry {
        time: by.now,
        actor: by.actor.to_owned(),
        action: change.name().to_owned(),
        what,
        reason: by.reason.to_owned(),
    }
}

fn refusal(error: ChangeError) -> ServiceError {
    match error {
        ChangeError::Invalid(invalid) => invalid.into(),
        ChangeError::Precondition { reason, message } => precondition(reason, message),
    }
}

/// Whether a backend has said of late that it takes work.
pub(super) fn answers(entry: &BackendEntry) -> bool {
    entry.misses.load(Ordering::Relaxed) < MISSES
}

/// The backends of the process, as one version of the traffic sees them.
struct Seen<'a> {
    core: &'a Core,
    traffic: &'a Traffic,
}

impl Backends for Seen<'_> {
    fn default_backend(&self) -> &BackendName {
        &self.core.parts.default_backend
    }

    fn candidate(&self, backend: &BackendName, spec: &RunSpec) -> Option<Candidate> {
        let entry = self.core.backends.get(backend)?;
        let mut lacks = entry.backend.capabilities().lacks(spec);
        if lacks.is_empty() {
            lacks = entry.backend.objections(spec);
        }
        let drained = self.traffic.drained.contains_key(backend);
        Some(Candidate { healthy: answers(entry), drained, lacks })
    }

    fn names(&self) -> impl Iterator<Item = &BackendName> {
        self.core.backends.keys()
    }
}

impl Core {
    fn choose(&self, asked: Asked<'_>) -> Result<Decision, NoBackend> {
        let current = self.traffic.current();
        let seen = Seen { core: self, traffic: &current.traffic };
        choose(&current.traffic.policy, current.version, &seen, asked)
    }

    /// Where a new run goes.
    pub(super) fn route(
        &self,
        caller: &Caller,
        run: RunId,
        spec: &RunSpec,
    ) -> Result<(Arc<dyn Backend>, Decision), ServiceError> {
        let asked = Asked { tenant: &caller.tenant, roles: &caller.roles, run, spec };
        let decision = self.choose(asked).map_err(|error| match error {
            NoBackend::Incapable(invalid) => invalid.into(),
            NoBackend::Denied(message) => ServiceError::Denied { field: "spec.routing.backend", message },
            NoBackend::Closed(message) => precondition("NO_BACKEND", message),
        })?;
        let backend = self.backends.get(&decision.backend).map(|entry| Arc::clone(&entry.backend));
        let backend = backend
            .ok_or_else(|| ServiceError::Internal("the chosen backend is not configured".to_owned()))?;
        Ok((backend, decision))
    }

    /// Changes the traffic, durably. What is known here afterwards is what is stored.
    pub(super) async fn change_traffic(
        &self,
        actor: &str,
        TrafficChange { change, expected, reason }: &TrafficChange,
    ) -> Result<Arc<StoredTraffic>, ServiceError> {
        let store = &self.parts.store;
        for _ in 0..MAX_TURNS {
            let current = self.traffic.learn(store.traffic().await?.unwrap_or_default());
            if let Some(expected) = expected.filter(|expected| *expected != current.version) {
                let message = format!("the traffic is at version {}, not {expected}", current.version);
                return Err(precondition("VERSION_CONFLICT", message));
            }
            let by = By { actor, reason, now: self.parts.clock.now() };
            let (traffic, what) =
                current.traffic.changed(change, by, &self.traffic.known).map_err(refusal)?;
            let set = store.set_traffic(current.version, &traffic, entry(change, by, what.clone())).await?;
            if let TrafficSet::Stored { version } = set {
                tracing::info!(actor, action = change.name(), version, reason, "traffic: {what}");
                let current = self.traffic.learn(StoredTraffic { version, traffic });
                drop(self.traffic.admissions.write().await);
                self.parts.meter.traffic_changed(change.name());
                self.parts.meter.traffic(&current);
                return Ok(current);
            }
        }
        Err(ServiceError::Unavailable(format!(
            "the traffic was changed by others {MAX_TURNS} times meanwhile"
        )))
    }
}

impl RunService {
    /// Where new runs go.
    pub fn traffic(&self) -> Arc<StoredTraffic> {
        self.core.traffic.current()
    }

    /// Changes where new runs go. When this returns, the next run that is admitted goes by it, and the audit log says who changed
    /// it.
    ///
    /// # Errors
    /// Bad fields; `FailedPrecondition` where things are not so that the change can be made, `VERSION_CONFLICT` where the traffic is
    /// at another version than expected; the store's failure.
    pub async fn change_traffic(
        &self,
        caller: &Caller,
        change: TrafficChange,
    ) -> Result<Arc<StoredTraffic>, ServiceError> {
        if change.reason.trim().is_empty() {
            return Err(ServiceError::field(
                "reason",
                "REQUIRED",
                "say why, for those who read the audit log",
            ));
        }
        if change.reason.len() > MAX_REASON {
            let what = format!("may have at most {MAX_REASON} bytes");
            return Err(ServiceError::field("reason", "TOO_LARGE", what));
        }
        let (core, actor) = (Arc::clone(&self.core), caller.subject.clone());
        let changing = async move { core.change_traffic(&actor, &change).await };
        self.core.whole("change-traffic", changing).await
    }

    /// Where a run with this spec would go, without running it.
    ///
    /// # Errors
    /// Bad fields of the spec.
    pub fn explain(
        &self,
        caller: &Caller,
        run: Option<RunId>,
        spec: &RunSpec,
    ) -> Result<Explanation, ServiceError> {
        let core = &self.core;
        spec.validate(&caller.tenant, &core.parts.limits)?;
        let run = run.unwrap_or_else(|| core.parts.ids.run_id());
        let current = core.traffic.current();
        let seen = Seen { core, traffic: &current.traffic };
        let decision = core.choose(Asked { tenant: &caller.tenant, roles: &caller.roles, run, spec });
        let candidates =
            seen.names().filter_map(|name| Some((name.clone(), seen.candidate(name, spec)?))).collect();
        Ok(Explanation { decision, candidates })
    }

    /// Entries of the audit log before number `before`, newest first.
    ///
    /// # Errors
    /// The store's failure.
    pub async fn audit(&self, before: Option<u64>, max: usize) -> Result<Vec<StoredAudit>, ServiceError> {
        Ok(self.core.parts.store.audit(before, max.clamp(1, 1000)).await?)
    }
}

/// Brings ramps to their next step when it is time, until the service stops.
pub(super) async fn run(core: Arc<Core>) {
    let advance = TrafficChange {
        change: Change::AdvanceRamp,
        expected: None,
        reason: "the step was held for its time".to_owned(),
    };
    let mut failures = 0;
    loop {
        let due = core.traffic.current().traffic.ramp.as_ref().and_then(|ramp| ramp.due());
        let wait = match due.map(|due| due.since(core.parts.clock.now())) {
            Some(Duration::ZERO) => {
                match core.change_traffic(SERVICE, &advance).await {
                    // Not due: an operator, or another replica, was faster; what is stored is known now.
                    Ok(_) | Err(ServiceError::FailedPrecondition { .. }) => {
                        failures = 0;
                        continue;
                    }
                    Err(error) => {
                        tracing::warn!(%error, "bringing a ramp to its next step failed; trying again");
                        failures += 1;
                        core.backoff(failures)
                    }
                }
            }
            Some(left) => left.min(LOOK),
            None => Duration::MAX,
        };
        tokio::select! {
            () = core.stopping.cancelled() => return,
            () = core.traffic.changed.notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Asks each backend whether it takes work, until the service stops.
pub(super) async fn watch_health(core: Arc<Core>) {
    // A question costs the substrate something, and with one backend there is nothing to choose.
    while core.backends.len() > 1 {
        let ask = core.backends.iter().map(|(name, entry)| async move {
            let answer = health(entry.backend.as_ref()).await;
            let before = entry.misses.load(Ordering::Relaxed);
            let misses = if answer.healthy { 0 } else { before.saturating_add(1) };
            entry.misses.store(misses, Ordering::Relaxed);
            if (before < MISSES) != (misses < MISSES) {
                tracing::info!(backend = %name, healthy = answer.healthy, detail = answer.detail, "a backend's health changed");
            }
        });
        tokio::select! {
            () = core.stopping.cancelled() => return,
            _ = futures::future::join_all(ask) => {}
        }
        if !core.pause(core.parts.options.health_interval).await {
            return;
        }
    }
}
