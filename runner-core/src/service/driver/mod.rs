//! Drives one run: reads where it is, does the next idempotent side effect, stores the transition. Holds nothing that a
//! restart cannot rebuild from the store and the backend.

use std::{sync::Arc, time::Duration};

use tokio::sync::{Semaphore, watch};

use super::{
    Core, Slot,
    live::LiveRun,
    retry,
    watchdog::{Armed, Shutdown, StopReason, Watchdog, arm},
};
use crate::{
    artifact::Manifest,
    backend::{
        AttemptContext, Backend, BackendError, BackendErrorKind, EndedAttempt, ProgressSink, WorkloadRef,
    },
    crash,
    id::AttemptId,
    outcome::{Cause, Outcome, Usage},
    state::{End, Event, RunState},
    store::{AttemptRecord, RunEvent, RunRecord, StoreError, Timer, TimerKind},
};

mod follow;
mod judge;
mod stored;

use self::{follow::Followed, judge::judge, stored::Change};

/// Why a driver lets go of its run before the run's end.
#[derive(Debug)]
enum LetGo {
    /// The service shuts down.
    Shutdown,
    /// The run's row cannot be used; it is left as it is.
    Parked(StoreError),
    /// Somebody else moved the run, or it is over. The record is the newest.
    Moved,
}

impl From<Shutdown> for LetGo {
    fn from(Shutdown: Shutdown) -> Self {
        Self::Shutdown
    }
}

/// Waits until an intent to cancel is stored.
async fn told(cancelled: &mut watch::Receiver<bool>) {
    // The driver holds the sender, so it cannot fail. The answer holds a lock, which no wait may.
    drop(cancelled.wait_for(|cancelled| *cancelled).await);
}

/// Drives one run.
pub(super) struct Driver {
    core: Arc<Core>,
    live: Arc<LiveRun>,
    record: RunRecord,
    backend: Arc<dyn Backend>,
    slots: Arc<Semaphore>,
    timers: Vec<Armed>,
    /// Monotonic time of the last change of position, for the phase metric.
    since: Duration,
    cancelled: watch::Receiver<bool>,
    /// No process has driven the current attempt before.
    fresh: bool,
    /// Why the current attempt's workload could not be made at the last try.
    late: Option<String>,
}

impl Driver {
    pub(super) fn new(
        core: &Arc<Core>,
        live: Arc<LiveRun>,
        record: RunRecord,
        timers: &[Timer],
        backend: Arc<dyn Backend>,
        slots: Arc<Semaphore>,
        fresh: bool,
    ) -> Self {
        let timers = timers.iter().map(|timer| arm(core, timer)).collect();
        let since = core.parts.clock.monotonic();
        let cancelled = live.watch_cancel();
        Self {
            core: Arc::clone(core),
            live,
            record,
            backend,
            slots,
            timers,
            since,
            cancelled,
            fresh,
            late: None,
        }
    }

    /// Drives the run to its end, or until the service stops.
    pub(super) async fn drive(mut self) {
        let id = self.record.id;
        // Dropped last, and in a panic too: a run without a driver can be adopted by the reconciler.
        let _registration = Registration { core: Arc::clone(&self.core), run: id };
        let mut slot: Slot = None;
        if !self.fresh && !self.adopted().await {
            return;
        }
        loop {
            let step = match self.record.position.state {
                RunState::Queued => self.queued(&mut slot).await,
                RunState::Preparing | RunState::Running | RunState::Publishing => {
                    // An adopted workload runs whether there is a slot for it or not.
                    let _held = slot.take().or_else(|| Arc::clone(&self.slots).try_acquire_owned().ok());
                    self.attempt().await
                }
                RunState::Succeeded | RunState::Failed | RunState::Cancelled => return,
            };
            match step {
                Ok(()) | Err(LetGo::Moved) => {}
                Err(LetGo::Shutdown) => return,
                Err(LetGo::Parked(error)) => {
                    tracing::error!(run.id = %id, %error, "the run cannot be driven; it is left as it is");
                    return;
                }
            }
        }
    }

    /// Takes over a run that another process, or a driver that panicked, has driven before. False: it has moved since it
    /// was listed, so that its timers may be another attempt's; the reconciler comes again.
    async fn adopted(&mut self) -> bool {
        let listed = self.record.position;
        if self.reload().await.is_err() || self.record.position != listed {
            return false;
        }
        if self.record.position.state == RunState::Queued
            && let Some(attempt) = self.record.attempt()
        {
            // The last attempt is over; a crash may have come before its removal.
            self.remove(&self.backend.workload_ref(attempt)).await;
        }
        true
    }

    /// Waits for the back-off and for a slot, then begins the next attempt.
    async fn queued(&mut self, slot: &mut Slot) -> Result<(), LetGo> {
        let core = Arc::clone(&self.core);
        if let Some(cancel) = &self.record.cancel {
            // The intent was stored while an attempt was ending that is to be tried again.
            let now = core.parts.clock.now();
            let outcome = Outcome::new(
                self.record.position.attempt,
                Cause::Cancelled,
                "cancelled between two attempts",
            )
            .with_evidence("cancel", cancel.reason.clone(), now);
            let change = Change { outcome: Some(outcome), ..Change::default() };
            return self.advance(&[Event::FinishedInQueue { end: End::Cancelled }], change).await;
        }
        let mut cancelled = self.cancelled.clone();
        if let Some(retry) = self.timers.iter().find(|timer| timer.kind == TimerKind::Retry) {
            let left = retry.at.saturating_sub(core.parts.clock.monotonic());
            tokio::select! {
                () = tokio::time::sleep(left) => {}
                () = told(&mut cancelled) => return self.reload().await,
                () = core.stopping.cancelled() => return Err(LetGo::Shutdown),
            }
        }
        *slot = Arc::clone(&self.slots).try_acquire_owned().ok();
        if slot.is_none() {
            // A cancel may have come before this process knew the run as live; whoever waits long looks once more.
            self.reload().await?;
            if self.record.position.state != RunState::Queued {
                return Ok(());
            }
            *slot = tokio::select! {
                permit = self.slot() => permit,
                () = told(&mut cancelled) => return self.reload().await,
                () = core.stopping.cancelled() => return Err(LetGo::Shutdown),
            };
        }
        let attempt = self.record.position.attempt.saturating_add(1);
        crash::point("attempt.before-preparing");
        let change = Change {
            unless_cancelled: true,
            timers: vec![(TimerKind::Pending, core.parts.limits.pending_timeout)],
            ..Change::default()
        };
        self.advance(&[Event::Begin { attempt }], change).await?;
        crash::point("attempt.preparing");
        self.fresh = true;
        Ok(())
    }

    /// Waits for a slot. A shadow does not stand in the queue: it takes what nobody waits for.
    async fn slot(&self) -> Slot {
        if !self.record.id.is_shadow() {
            return Arc::clone(&self.slots).acquire_owned().await.ok();
        }
        loop {
            tokio::time::sleep(self.core.parts.options.shadow_interval).await;
            if let Ok(permit) = Arc::clone(&self.slots).try_acquire_owned() {
                return Some(permit);
            }
        }
    }

    /// Executes, or goes on executing, the current attempt to its end.
    async fn attempt(&mut self) -> Result<(), LetGo> {
        let Some(attempt) = self.record.attempt() else { return Err(LetGo::Moved) };
        let workload = self.backend.workload_ref(attempt);
        let parts = &self.core.parts;
        let context = AttemptContext {
            attempt,
            tenant: self.record.tenant.clone(),
            spec: Arc::clone(&self.record.spec),
            log_limit_bytes: parts.limits.log_bytes,
            artifacts: parts.artifacts.for_run().unwrap_or_else(|| Arc::clone(&parts.artifacts)),
            progress: Arc::clone(&self.live) as Arc<dyn ProgressSink>,
        };
        let (cancelled, timers) = (self.cancelled.clone(), self.timers.clone());
        let mut dog =
            Watchdog::new(&self.core, &self.backend, workload.clone(), &self.record, cancelled, timers);
        let ended = match self.execute(&context, &workload, &mut dog).await? {
            Ok(ended) => ended,
            Err(error) => self.failed_to_start(&workload, &mut dog, &error).await?,
        };
        dog.proven_dead().await?;
        self.finish(attempt, &workload, &mut dog, ended).await
    }

    /// Brings the workload into being, where that is still to do, and follows it to its end.
    async fn execute(
        &mut self,
        context: &AttemptContext,
        workload: &WorkloadRef,
        dog: &mut Watchdog,
    ) -> Result<Result<Followed, BackendError>, LetGo> {
        let fresh = std::mem::take(&mut self.fresh);
        self.late = None;
        let cursor = self.open_log(context.attempt, fresh, dog).await?;
        // Once the program was seen running, `ensure` is never called again: if the workload is gone, it is lost.
        if self.record.position.state == RunState::Preparing {
            match self.ensure(context, dog).await? {
                Ok(Ok(())) => crash::point("attempt.ensured"),
                Ok(Err(error)) => return Ok(Err(error)),
                // The future was dropped; stopping makes sure that what it began does not go on.
                Err(reason) => dog.stop(reason),
            }
        }
        Ok(Ok(self.follow(context, workload, cursor, dog).await?))
    }

    /// Calls `ensure` until it succeeds, fails for good, or there is a reason to stop.
    async fn ensure(
        &mut self,
        context: &AttemptContext,
        dog: &mut Watchdog,
    ) -> Result<Result<Result<(), BackendError>, StopReason>, LetGo> {
        let mut failures = 0;
        loop {
            let error = match dog.unless_stopped(self.backend.ensure(context)).await? {
                Ok(Ok(_)) => return Ok(Ok(Ok(()))),
                Ok(Err(error)) => error,
                Err(reason) => return Ok(Err(reason)),
            };
            failures += 1;
            // A backend without room, or that does not answer, makes an attempt late: the pending timer ends it.
            let again = error.retryable
                && match error.kind {
                    BackendErrorKind::Unschedulable | BackendErrorKind::Substrate => true,
                    BackendErrorKind::Image | BackendErrorKind::Input | BackendErrorKind::Output => {
                        failures < self.core.parts.options.ensure_tries
                    }
                    BackendErrorKind::Unsupported
                    | BackendErrorKind::NotFound
                    | BackendErrorKind::NotAttachable => false,
                };
            if !again {
                return Ok(Ok(Err(error)));
            }
            tracing::debug!(run.id = %self.record.id, failures, error = error.chain(), "ensure failed; trying again");
            self.late = Some(error.chain());
            let pause = tokio::time::sleep(self.core.backoff(failures));
            if let Err(reason) = dog.unless_stopped(pause).await? {
                return Ok(Err(reason));
            }
        }
    }

    /// The attempt could not be started. Proves that nothing of it runs.
    async fn failed_to_start(
        &self,
        workload: &WorkloadRef,
        dog: &mut Watchdog,
        error: &BackendError,
    ) -> Result<Followed, LetGo> {
        let mut failures = 0;
        while let Err(stop) = dog.guard(self.backend.stop(workload, Duration::ZERO)).await? {
            failures += 1;
            tracing::warn!(run.id = %self.record.id, failures, error = stop.chain(), "stopping a failed start failed");
            dog.guard(tokio::time::sleep(self.core.backoff(failures))).await?;
        }
        let now = self.core.parts.clock.now();
        let outcome = Outcome::new(workload.attempt.number, error.kind.cause(), error.chain());
        let outcome = outcome.with_evidence("backend", error.chain(), now);
        Ok(Followed {
            ended: EndedAttempt {
                cause: outcome.cause,
                status: None,
                retryable: match error.kind {
                    // The backend said that this attempt cannot go on; another one may.
                    BackendErrorKind::Unschedulable
                    | BackendErrorKind::NotFound
                    | BackendErrorKind::NotAttachable
                    | BackendErrorKind::Substrate => true,
                    BackendErrorKind::Image | BackendErrorKind::Input | BackendErrorKind::Output => {
                        error.retryable
                    }
                    BackendErrorKind::Unsupported => false,
                },
                message: outcome.message,
                evidence: outcome.evidence,
                usage: Usage::default(),
                outputs: None,
            },
            unstored: Vec::new(),
            started: None,
        })
    }

    /// Judges the attempt, stores its end, and removes what it left on the substrate.
    async fn finish(
        &mut self,
        attempt: AttemptId,
        workload: &WorkloadRef,
        dog: &mut Watchdog,
        followed: Followed,
    ) -> Result<(), LetGo> {
        dog.ended();
        let stopped = dog.reason();
        let core = Arc::clone(&self.core);
        let parts = &core.parts;
        let Followed { ended, unstored, started } = followed;
        let never_started = self.record.position.state == RunState::Preparing && unstored.is_empty();
        let mut outcome = judge(ended.into_outcome(attempt.number), stopped, never_started);
        let summary = self.seal_log(attempt, dog).await?;
        outcome.usage.log_bytes = summary.end;
        let now = parts.clock.now();
        // One that was not made in time says nothing; the tries do.
        if let Some(why) = self.late.take()
            && never_started
        {
            outcome = outcome.with_evidence("start", why, now);
        }
        let record = AttemptRecord {
            number: attempt.number,
            backend: self.record.backend.clone(),
            started: self.record.started.or(started),
            ended: now,
            outcome: outcome.clone(),
        };
        let mut events = unstored;
        let mut change = Change { started, ended_attempt: Some(record), ..Change::default() };
        if let Some(manifest) = outcome.outputs.as_ref().filter(|manifest| !manifest.entries.is_empty()) {
            change.events.push(RunEvent::Outputs(Manifest::clone(manifest)));
        }
        let again = if self.is_cancelled().await? {
            None
        } else {
            retry::next_attempt(&self.record.spec, &outcome, parts.ids.random())
        };
        if let Some(wait) = again {
            events.push(Event::Retried { attempt: attempt.number });
            change.not_before = Some(now + wait);
            change.timers.push((TimerKind::Retry, wait));
            change.events.push(RunEvent::Notice(format!(
                "attempt {} ended with {}: {}; the next begins in {wait:?}",
                attempt.number,
                outcome.cause.as_str(),
                outcome.message
            )));
            self.advance(&events, change).await?;
            if !self.record.id.is_shadow() {
                parts.meter.retried(&self.record.backend, outcome.cause);
            }
        } else {
            let end = match outcome.cause {
                Cause::Cancelled => End::Cancelled,
                _ if outcome.is_success() => End::Succeeded,
                _ => End::Failed,
            };
            if end == End::Succeeded && self.record.position.state != RunState::Publishing {
                let exited = Event::Exited { attempt: attempt.number };
                if !events.contains(&exited) {
                    events.push(exited);
                }
            }
            events.push(Event::Finished { attempt: attempt.number, end });
            let cause = outcome.cause;
            change.outcome = Some(outcome);
            crash::point("run.before-terminal");
            self.advance(&events, change).await?;
            crash::point("run.terminal");
            if !self.record.id.is_shadow() {
                let (run, took) = (&self.record, now.since(self.record.created));
                parts.meter.ended(&run.backend, run.placed_by(), end.state(), cause, took);
            }
            tracing::info!(
                run.id = %self.record.id, tenant = %self.record.tenant, attempt = attempt.number,
                state = end.state().as_str(), cause = cause.as_str(), "run ended"
            );
        }
        self.remove(workload).await;
        crash::point("workload.removed");
        Ok(())
    }

    /// Removes the workload. What cannot be removed now is left to the reconciler.
    async fn remove(&self, workload: &WorkloadRef) {
        for failures in 1..=3 {
            let Err(error) = self.backend.remove(workload).await else { return };
            tracing::warn!(
                run.id = %workload.run(), attempt = workload.attempt.number, failures, error = error.chain(),
                "removing the workload failed"
            );
            if !self.core.pause(self.core.backoff(failures)).await {
                return;
            }
        }
    }

    async fn is_cancelled(&mut self) -> Result<bool, LetGo> {
        // Only an attempt that failed asks; one that succeeded is never tried again.
        if self.record.cancel.is_some()
            || self.record.spec.retry.max_attempts.unwrap_or(1) <= self.record.position.attempt
        {
            return Ok(self.record.cancel.is_some());
        }
        let newest = self.read().await?;
        self.record.cancel = newest.cancel;
        Ok(self.record.cancel.is_some())
    }
}

/// Takes the run out of the live ones.
struct Registration {
    core: Arc<Core>,
    run: crate::id::RunId,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.core.live.remove(self.run);
        self.core.parts.meter.live_runs(self.core.live.len());
        if self.run.is_shadow() {
            self.core.shadows.wake();
        }
    }
}
