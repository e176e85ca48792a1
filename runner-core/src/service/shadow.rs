//! Shadows, at work: accepts those that are to be, compares those that are over, removes those whose primary is gone.
//!
//! A shadow is a run like any other, with a driver of its own, and begins only when its primary's outcome is durable: nothing that
//! happens to it can reach its primary. All that is known here is in the store; each step is one transaction over the stage that
//! the step before left, so that a restart goes on where a crash came.

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;
use tokio::sync::Notify;

use super::{Core, RunService, ServiceError, inputs, sweep, traffic};
use crate::{
    artifact::{ArtifactError, ArtifactErrorKind},
    crash,
    id::{AttemptId, RunId},
    log::LogError,
    outcome::{Cause, Outcome},
    shadow::{Facts, LogDigest, LogDigester, Pair, PairFilter, PairRecord, Phases, Stage, Verdict, compare},
    spec::RunSpec,
    store::{Accepted, EndedRun, LiveLimits, NewRun, RunRecord, StoreError},
    traffic::{NoShadow, Shadows},
};

/// Pairs that are read at once. More than there can be shadows at once, so that one that is over is always among them.
const PAGE: usize = 4 * Shadows::MAX_AT_ONCE as usize;
/// Pairs that are compared at once. Each reads two logs.
const PARALLEL: usize = 2;
/// Events that are read of each run. A run with more has been tried so often that its phases say nothing.
const MAX_EVENTS: usize = 1000;
/// Where nothing is under way, a look so often: another process may have left something.
const IDLE: Duration = Duration::from_secs(30);
/// Who cancels a shadow.
const SERVICE: &str = "service";

/// Wakes the loop: a primary or a shadow is over, or a primary is gone.
#[derive(Debug, Default)]
pub(super) struct Bell(Notify);

impl Bell {
    pub(super) fn wake(&self) {
        self.0.notify_one();
    }
}

/// Why the work at a pair failed. The next look goes on.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Logs(#[from] LogError),
    #[error(transparent)]
    Artifacts(#[from] ArtifactError),
    #[error(transparent)]
    Sweep(#[from] sweep::SweepError),
    #[error(transparent)]
    Service(#[from] ServiceError),
}

impl RunService {
    /// Pairs with a verdict and a number below `before`, newest first.
    ///
    /// # Errors
    /// The store's failure.
    pub async fn pairs(
        &self,
        filter: &PairFilter,
        before: Option<u64>,
        max: usize,
    ) -> Result<Vec<PairRecord>, ServiceError> {
        Ok(self.core.parts.store.pairs(filter, before, max.clamp(1, 1000)).await?)
    }

    /// The pair that a run is the primary, or the shadow, of.
    ///
    /// # Errors
    /// `NotFound`, or the store's failure.
    pub async fn pair(&self, id: RunId) -> Result<PairRecord, ServiceError> {
        self.core.parts.store.pair(id).await?.ok_or(ServiceError::NotFound(id))
    }
}

/// What a look found.
#[derive(Debug, Default)]
struct Pass {
    /// Nothing is under way.
    idle: bool,
    /// Of some pair the work failed. It was told, and kept no other from its own.
    failed: bool,
}

impl Pass {
    fn tell(&mut self, pair: &Pair, result: Result<(), Fault>) {
        if let Err(error) = result {
            tracing::warn!(primary = %pair.primary, %error, "work at a shadow failed; trying again");
            self.failed = true;
        }
    }
}

/// Works at pairs until the service stops.
pub(super) async fn run(core: Arc<Core>) {
    let mut failures = 0;
    loop {
        // Dropped in the middle, a step is either done or begun anew by the next start.
        let seen = tokio::select! {
            () = core.stopping.cancelled() => return,
            seen = pass(&core) => seen,
        };
        let options = &core.parts.options;
        let wait = match seen {
            Ok(Pass { failed: false, idle }) => {
                failures = 0;
                if idle { IDLE } else { options.shadow_interval }
            }
            Ok(Pass { failed: true, .. }) => {
                failures += 1;
                core.backoff(failures).max(options.shadow_interval)
            }
            Err(error) => {
                tracing::warn!(%error, "reading the pairs failed; trying again");
                failures += 1;
                core.backoff(failures).max(options.shadow_interval)
            }
        };
        tokio::select! {
            () = core.stopping.cancelled() => return,
            () = core.shadows.0.notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Looks once at everything that is under way.
async fn pass(core: &Arc<Core>) -> Result<Pass, StoreError> {
    let store = &core.parts.store;
    let mut seen = Pass::default();
    let orphans = store.pairs_at(Stage::Orphaned, PAGE).await?;
    for record in &orphans {
        let ending = end_orphan(core, record.pair.shadow()).await;
        seen.tell(&record.pair, ending);
    }
    let running = store.pairs_at(Stage::Running, PAGE).await?;
    let pairs: Vec<Pair> = running.iter().map(|record| record.pair.clone()).collect();
    let judging = futures::stream::iter(pairs).map(|pair| async move {
        let judged = judge(core, &pair).await;
        (pair, judged)
    });
    let mut judging = judging.buffer_unordered(PARALLEL);
    while let Some((pair, judged)) = judging.next().await {
        seen.tell(&pair, judged);
    }
    drop(judging);
    let pending = store.pairs_at(Stage::Pending, PAGE).await?;
    for record in &pending {
        match begin(core, record).await {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) => seen.tell(&record.pair, Err(error)),
        }
    }
    seen.idle = orphans.is_empty() && running.is_empty() && pending.is_empty();
    Ok(seen)
}

/// What is to become of a pair whose shadow has not begun.
enum Next {
    Begin(Box<RunSpec>),
    /// There is no room, for it and for those behind it.
    Wait,
    Skip(NoShadow),
}

/// Accepts a shadow, or says why it is not to be. False: there is no room.
async fn begin(core: &Arc<Core>, record: &PairRecord) -> Result<bool, Fault> {
    let pair = &record.pair;
    let version = core.traffic.current().version;
    let spec = match next(core, record).await? {
        Next::Begin(spec) => spec,
        Next::Wait => return Ok(false),
        Next::Skip(why) => return skip(core, pair, why).await.map(|()| true),
    };
    // Until the shadow is live: a drain that has answered sees it, or it sees the drain. Taken last, since callers may wait for whoever
    // waits for this, and the object store may be slow.
    let _admission = core.traffic.admission().await;
    if core.traffic.current().version != version {
        core.shadows.wake();
        return Ok(true);
    }
    let run = NewRun {
        id: pair.shadow(),
        tenant: pair.tenant.clone(),
        key: None,
        digest: spec.digest(),
        spec: Arc::new(*spec),
        backend: pair.shadow_backend.clone(),
        backend_reason: format!("the shadow of {}", pair.primary),
        decision: None,
        time: core.parts.clock.now(),
    };
    crash::point("shadow.before-accept");
    // No limit is asked: a shadow counts against none.
    match core.parts.store.accept(run, LiveLimits { total: u64::MAX, per_tenant: u64::MAX }).await? {
        Accepted::Created(run) => {
            crash::point("shadow.accepted");
            tracing::debug!(run.id = %run.id, primary = %pair.primary, backend = %run.backend, "accepted a shadow");
            core.parts.meter.shadow_accepted(&run.backend);
            core.drive(run, &[], true);
        }
        // One whose acceptance was not heard of: the reconciler gives it a driver. Or its primary is being removed.
        Accepted::Existing(_) | Accepted::Conflict { .. } | Accepted::Full { .. } => {}
    }
    Ok(true)
}

async fn next(core: &Core, record: &PairRecord) -> Result<Next, Fault> {
    let pair = &record.pair;
    let traffic = core.traffic.current();
    let policy =
        traffic.traffic.policy.shadow.as_ref().filter(|shadow| shadow.backend == pair.shadow_backend);
    let Some(policy) = policy else { return Ok(Next::Skip(NoShadow::Withdrawn)) };
    let waited = core.parts.clock.now().since(record.since);
    if waited > Duration::from_secs(policy.patience_seconds) {
        return Ok(Next::Skip(NoShadow::Late));
    }
    let Some(entry) = core.backends.get(&pair.shadow_backend) else {
        return Ok(Next::Skip(NoShadow::Unknown));
    };
    if traffic.traffic.drained.contains_key(&pair.shadow_backend) {
        return Ok(Next::Skip(NoShadow::Drained));
    }
    // A slot that is free is one that no caller's run waits for.
    let room = core.live.shadows() < policy.at_once as usize && entry.slots.available_permits() > 0;
    if !room || !traffic::answers(entry) {
        return Ok(Next::Wait);
    }
    let primary = match core.parts.store.get(pair.primary).await {
        Ok(Some(primary)) => primary,
        // Removed in this moment, and the pair with it; or it never reads.
        Ok(None) | Err(StoreError::Inconsistent(_)) => return Ok(Next::Skip(NoShadow::Unreadable)),
        Err(error) => return Err(error.into()),
    };
    let can = entry.backend.capabilities();
    let mut spec = core.parts.limits.apply_anew(RunSpec::clone(&primary.spec), &can);
    // What a shadow stores lies under its own prefix, wherever its primary's outputs went.
    spec.outputs.iter_mut().for_each(|output| output.destination = None);
    if !can.lacks(&spec).is_empty() || !entry.backend.objections(&spec).is_empty() {
        return Ok(Next::Skip(NoShadow::Incapable));
    }
    if !inputs::are_there(&core.parts, &spec).await? {
        return Ok(Next::Skip(NoShadow::InputsGone));
    }
    Ok(Next::Begin(Box::new(spec)))
}

async fn skip(core: &Core, pair: &Pair, why: NoShadow) -> Result<(), Fault> {
    verdict(core, pair, &Verdict::Skipped(why)).await
}

async fn verdict(core: &Core, pair: &Pair, verdict: &Verdict) -> Result<(), Fault> {
    let parts = &core.parts;
    crash::point("shadow.before-verdict");
    if parts.store.judge_pair(pair.primary, verdict, parts.clock.now()).await? {
        crash::point("shadow.judged");
        match verdict {
            Verdict::Skipped(why) => {
                tracing::debug!(primary = %pair.primary, why = why.as_str(), "a run has no shadow");
                parts.meter.shadow_skipped(*why);
            }
            Verdict::Compared(parity) => {
                tracing::debug!(primary = %pair.primary, agrees = parity.agrees(), "compared a run with its shadow");
                parts.meter.shadow_compared(pair, &parity.kinds());
            }
        }
    }
    Ok(())
}

/// Compares a pair whose shadow is over.
async fn judge(core: &Core, pair: &Pair) -> Result<(), Fault> {
    let id = pair.shadow();
    if core.live.get(id).is_some() {
        return Ok(());
    }
    let runs = (core.parts.store.get(pair.primary).await, core.parts.store.get(id).await);
    let (primary, shadow) = match runs {
        (Ok(Some(primary)), Ok(Some(shadow))) => (primary, shadow),
        // Removed in this moment, and the pair with it or orphaned.
        (Ok(None), _) | (_, Ok(None)) => return Ok(()),
        (Err(StoreError::Inconsistent(_)), _) | (_, Err(StoreError::Inconsistent(_))) => {
            return skip(core, pair, NoShadow::Unreadable).await;
        }
        (Err(error), _) | (_, Err(error)) => return Err(error.into()),
    };
    let (Some(one), Some(other)) = (&primary.outcome, &shadow.outcome) else {
        // Live, though without a driver yet: the reconciler gives it one.
        return Ok(());
    };
    if other.cause == Cause::Input
        && one.cause != Cause::Input
        && !inputs::are_there(&core.parts, &shadow.spec).await?
    {
        return skip(core, pair, NoShadow::InputsGone).await;
    }
    let (one_log, other_log) = (log(core, &primary, one).await?, log(core, &shadow, other).await?);
    let parity = compare(
        Facts { outcome: one, log: one_log.as_ref(), phases: phases(core, pair.primary).await? },
        Facts { outcome: other, log: other_log.as_ref(), phases: phases(core, id).await? },
    );
    verdict(core, pair, &Verdict::Compared(Box::new(parity))).await
}

/// What the log of a run's last attempt comes to. `None`: it is not there whole any more.
async fn log(core: &Core, run: &RunRecord, outcome: &Outcome) -> Result<Option<LogDigest>, Fault> {
    let mut digester = LogDigester::default();
    if outcome.attempt > 0 {
        let attempt = AttemptId { run: run.id, number: outcome.attempt };
        let mut frames = core.parts.logs.read(&run.tenant, attempt, 0, false);
        while let Some(batch) = frames.next().await {
            match batch {
                Ok(batch) => batch.iter().for_each(|frame| digester.push(frame)),
                // It will not decode later either.
                Err(LogError::Corrupt { .. }) => return Ok(None),
                Err(LogError::Store { source, .. }) if source.kind == ArtifactErrorKind::NotFound => {
                    return Ok(None);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
    let whole = digester.end() >= outcome.usage.log_bytes;
    Ok(whole.then(|| digester.finish()))
}

async fn phases(core: &Core, run: RunId) -> Result<Phases, Fault> {
    match core.parts.store.events(run, 0, MAX_EVENTS).await {
        Ok(events) => Ok(Phases::of(&events)),
        Err(StoreError::NotFound(_) | StoreError::Inconsistent(_)) => Ok(Phases::default()),
        Err(error) => Err(error.into()),
    }
}

/// Removes the shadow of a run that is being removed, where it is over. One that is live is left to [`end_orphan`].
pub(super) async fn remove_of(core: &Core, primary: RunId) -> Result<(), sweep::SweepError> {
    if core.parts.store.pair(primary).await?.is_some() {
        remove_ended(core, primary.shadow()).await?;
    }
    Ok(())
}

/// Removes a shadow that is over. False: it is not.
async fn remove_ended(core: &Core, shadow: RunId) -> Result<bool, sweep::SweepError> {
    // What it ran may still be being removed.
    if core.live.get(shadow).is_some() {
        return Ok(false);
    }
    let Some(run) = core.parts.store.get(shadow).await? else { return Ok(true) };
    let Some(ended) = run.ended else { return Ok(false) };
    Box::pin(sweep::remove(core, &EndedRun { id: shadow, tenant: run.tenant, ended })).await?;
    Ok(true)
}

/// Brings a shadow whose primary is gone to its end, and removes it.
async fn end_orphan(core: &Core, shadow: RunId) -> Result<(), Fault> {
    if remove_ended(core, shadow).await? {
        crash::point("shadow.orphan-removed");
        return Ok(());
    }
    let Some(run) = core.parts.store.get(shadow).await? else { return Ok(()) };
    if !run.position.state.is_terminal() && run.cancel.is_none() {
        core.cancel(shadow, run.position.attempt, SERVICE, "its primary was removed".to_owned()).await?;
        crash::point("shadow.orphan-cancelled");
    }
    Ok(())
}
