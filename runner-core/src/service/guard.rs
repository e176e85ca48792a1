//! The guard, at work: reads how runs ended, and rolls a canary back that does worse than its baseline.
//!
//! What it knows is rebuilt from the store: after a restart it reads the window again, and comes to the same end.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use uuid::Uuid;

use super::{Core, RunService, ServiceError, TrafficChange};
use crate::{
    clock::Timestamp,
    id::{BackendName, RunId},
    store::{EndedCursor, RunRecord, StoreError, StoredTraffic},
    traffic::{Change, DecidedBy, Evidence, Guard, Share, Split, Tally, is_infrastructure},
};

/// Who rolls back.
const GUARD: &str = "guard";
/// Ends are stored in groups, not in the order of their times: what ended less than this ago is read later.
const SETTLED: Duration = Duration::from_secs(2);
/// Runs that are read at once.
const PAGE: usize = 256;

/// What the guard thinks of a canary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuardVerdict {
    /// Too few runs of one side to say anything. Nothing is done.
    TooLittle,
    /// Nothing speaks against it.
    Fine,
    /// It was worse, and has been rolled back.
    RolledBack,
}

/// What the guard has seen of a canary in the present window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuardReport {
    /// The rule whose split it belongs to; the policy's default where it is `None`.
    pub rule: Option<String>,
    /// Which.
    pub canary: BackendName,
    /// What it is compared with.
    pub baseline: BackendName,
    /// Runs of the canary, and those that failed for reasons of infrastructure.
    pub canary_failures: Tally,
    /// The same of the baseline.
    pub baseline_failures: Tally,
    /// Runs of the canary, and those that began late.
    pub canary_slow: Tally,
    /// The same of the baseline.
    pub baseline_slow: Tally,
    /// What follows.
    pub verdict: GuardVerdict,
}

/// What the guard said last.
#[derive(Debug, Default)]
pub(super) struct Reports(Mutex<Vec<GuardReport>>);

impl Reports {
    fn set(&self, reports: Vec<GuardReport>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = reports;
    }
}

impl RunService {
    /// What the guard has seen of each canary in the present window. Empty where the policy has no guard.
    pub fn guard(&self) -> Vec<GuardReport> {
        self.core.guard.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What is known of one canary.
#[derive(Debug, Default)]
struct Watched {
    failures: Evidence,
    slow: Evidence,
}

/// A window, and what was seen in it.
#[derive(Debug)]
struct Window {
    guard: Guard,
    /// Runs that ended at or after this are in it.
    from: Timestamp,
    /// Runs that were admitted before this are not.
    admitted_from: Timestamp,
    cursor: EndedCursor,
    /// By rule and canary.
    canaries: BTreeMap<(Option<String>, BackendName), Watched>,
}

impl Window {
    fn new(guard: Guard, from: Timestamp, admitted_from: Timestamp) -> Self {
        // Before every run that ended then.
        let cursor = EndedCursor { ended: from, id: RunId::new(Uuid::nil()) };
        Self { guard, from, admitted_from, cursor, canaries: BTreeMap::new() }
    }

    /// The one that `now` is in: windows follow one another from the epoch on, the same for every replica.
    fn at(guard: Guard, now: Timestamp, admitted_from: Timestamp) -> Self {
        let length = i64::try_from(guard.window_seconds.saturating_mul(1_000_000)).unwrap_or(i64::MAX).max(1);
        let from = now.as_micros() - now.as_micros().rem_euclid(length);
        Self::new(guard, Timestamp::from_micros(from), admitted_from)
    }

    /// The split that placed a run, with its rule, where the run counts in this window.
    fn split_of<'a>(
        &self,
        traffic: &'a StoredTraffic,
        run: &RunRecord,
    ) -> Option<(Option<&'a str>, &'a Split, BackendName)> {
        let decision = run.decision.as_ref().filter(|decision| decision.bucket.is_some())?;
        if run.created < self.admitted_from {
            return None;
        }
        let rule = match &decision.by {
            DecidedBy::Rule(rule) => Some(rule.as_str()),
            DecidedBy::Default => None,
            DecidedBy::Spec | DecidedBy::Configuration => return None,
        };
        let (rule, split) = traffic.traffic.policy.splits().find(|(name, _)| *name == rule)?;
        Some((rule, split, decision.backend.clone()))
    }

    fn add(&mut self, traffic: &StoredTraffic, run: &RunRecord, failed: bool) {
        let Some((rule, split, backend)) = self.split_of(traffic, run) else { return };
        let limit = self.guard.slow_start_seconds.map(Duration::from_secs);
        // One that never began has failed, or was cancelled: nothing is known of how soon it would have begun.
        let slow = limit.zip(run.started).map(|(limit, started)| started.since(run.created) > limit);
        for canary in &split.canaries {
            let watched = self.canaries.entry((rule.map(str::to_owned), canary.backend.clone())).or_default();
            if backend == canary.backend {
                watched.failures.add_canary(failed);
                slow.into_iter().for_each(|slow| watched.slow.add_canary(slow));
            } else if backend == split.baseline {
                watched.failures.add_baseline(failed);
                slow.into_iter().for_each(|slow| watched.slow.add_baseline(slow));
            }
        }
    }

    fn report(&self, rule: Option<&str>, split: &Split, canary: &BackendName) -> GuardReport {
        let nothing = Watched::default();
        let watched = self.canaries.get(&(rule.map(str::to_owned), canary.clone())).unwrap_or(&nothing);
        let (failures, slow) = (&watched.failures, &watched.slow);
        let enough = failures.canary().runs >= self.guard.min_runs && failures.baseline().runs > 0;
        let worse = |evidence: &Evidence| evidence.is_worse(self.guard.error_percent);
        let verdict = match (enough, worse(failures) || worse(slow)) {
            (false, _) => GuardVerdict::TooLittle,
            (true, false) => GuardVerdict::Fine,
            (true, true) => GuardVerdict::RolledBack,
        };
        GuardReport {
            rule: rule.map(str::to_owned),
            canary: canary.clone(),
            baseline: split.baseline.clone(),
            canary_failures: failures.canary(),
            baseline_failures: failures.baseline(),
            canary_slow: slow.canary(),
            baseline_slow: slow.baseline(),
            verdict,
        }
    }
}

fn why(report: &GuardReport, error: Share) -> String {
    let part = |tally: Tally| format!("{} of {}", tally.failures, tally.runs);
    let mut text = format!(
        "{} failed for reasons of infrastructure in {} runs, the baseline {} in {}",
        report.canary,
        part(report.canary_failures),
        report.baseline,
        part(report.baseline_failures)
    );
    if report.canary_slow.runs > 0 {
        let (canary, baseline) = (part(report.canary_slow), part(report.baseline_slow));
        text.push_str(&format!("; began late: {canary}, the baseline {baseline}"));
    }
    text.push_str(&format!("; by chance no more often than {error}"));
    text
}

/// Guards canaries until the service stops.
pub(super) async fn run(core: Arc<Core>) {
    let mut window: Option<Window> = None;
    loop {
        if !core.pause(core.parts.options.guard_interval).await {
            return;
        }
        let traffic = core.traffic.current();
        let Some(guard) = traffic.traffic.policy.guard else {
            window = None;
            core.guard.set(Vec::new());
            continue;
        };
        let now = core.parts.clock.now();
        let present = Window::at(guard, now, traffic.traffic.guarded_from);
        let same = |known: &Window| {
            (known.guard, known.from, known.admitted_from)
                == (present.guard, present.from, present.admitted_from)
        };
        let window = match window.take().filter(same) {
            Some(known) => window.insert(known),
            None => window.insert(present),
        };
        if let Err(error) = read(&core, window, &traffic, now - SETTLED).await {
            tracing::warn!(%error, "the guard could not read how runs ended; it tries again");
            continue;
        }
        judge(&core, window, &traffic).await;
    }
}

/// Takes in what has ended since the last look.
async fn read(
    core: &Core,
    window: &mut Window,
    traffic: &StoredTraffic,
    until: Timestamp,
) -> Result<(), StoreError> {
    let store = &core.parts.store;
    loop {
        let ended = store.ended(Some(window.cursor), until, PAGE).await?;
        for run in &ended {
            let seen = look(core, window, traffic, run.id).await?;
            if let Some((record, failed)) = seen {
                window.add(traffic, &record, failed);
            }
            window.cursor = run.cursor();
        }
        if ended.len() < PAGE || core.stopping.is_cancelled() {
            return Ok(());
        }
    }
}

/// A run that counts in this window, and whether an attempt of it failed for reasons of infrastructure. `None`: it does not count, was
/// removed meanwhile, or its row does not decode, so that nothing is known of it.
async fn look(
    core: &Core,
    window: &Window,
    traffic: &StoredTraffic,
    id: RunId,
) -> Result<Option<(RunRecord, bool)>, StoreError> {
    let store = &core.parts.store;
    if id.is_shadow() {
        return Ok(None);
    }
    let record = match store.get(id).await {
        Ok(Some(record)) => record,
        Ok(None) | Err(StoreError::Inconsistent(_)) => return Ok(None),
        Err(error) => return Err(error),
    };
    if window.split_of(traffic, &record).is_none() {
        return Ok(None);
    }
    match store.attempts(id).await {
        Ok(attempts) => {
            // Also where another attempt made up for it.
            let failed = attempts.iter().any(|attempt| is_infrastructure(attempt.outcome.cause))
                || record.outcome.as_ref().is_some_and(|outcome| is_infrastructure(outcome.cause));
            Ok(Some((record, failed)))
        }
        Err(StoreError::NotFound(_) | StoreError::Inconsistent(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Says what is seen, and rolls back what is worse.
async fn judge(core: &Core, window: &Window, traffic: &StoredTraffic) {
    let canaries = traffic
        .traffic
        .policy
        .splits()
        .flat_map(|(rule, split)| split.canaries.iter().map(move |canary| (rule, split, canary)));
    let mut reports = Vec::new();
    let mut worse = None;
    for (rule, split, canary) in canaries {
        let report = window.report(rule, split, &canary.backend);
        // One that has nothing any more was rolled back before.
        if report.verdict == GuardVerdict::RolledBack && canary.percent > Share::NONE {
            worse.get_or_insert_with(|| report.clone());
        }
        reports.push(report);
    }
    core.guard.set(reports);
    let Some(worse) = worse else { return };
    let change = TrafficChange {
        change: Change::Rollback(Some(worse.canary.clone())),
        // What was judged is this version; where it has changed, the next look judges anew.
        expected: Some(traffic.version),
        reason: why(&worse, window.guard.error_percent),
    };
    match core.change_traffic(GUARD, &change).await {
        Ok(_) => {
            tracing::warn!(canary = %worse.canary, reason = change.reason, "the guard rolled a canary back")
        }
        Err(ServiceError::FailedPrecondition { .. }) => {}
        Err(error) => {
            tracing::warn!(%error, canary = %worse.canary, "the guard could not roll a canary back; it tries again")
        }
    }
}
