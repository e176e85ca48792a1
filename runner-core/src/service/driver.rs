//! Drives one run: reads where it is, does the next idempotent side effect, stores the transition. Holds nothing that a
//! restart cannot rebuild from the store and the backend.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::{Semaphore, watch};

use super::{
    Core, Slot,
    live::LiveRun,
    retry, store_may_recover,
    watchdog::{Armed, Shutdown, StopReason, Watchdog, arm},
};
use crate::{
    artifact::Manifest,
    backend::{
        AttemptContext, Backend, BackendError, BackendErrorKind, EndedAttempt, Observation, ProgressSink,
        WorkloadRef,
    },
    clock::Timestamp,
    crash,
    id::AttemptId,
    log::LogError,
    outcome::{Cause, Outcome, Usage},
    state::{self, End, Event, RunState},
    store::{
        AttemptRecord, RunEvent, RunRecord, StoreError, StoredEvent, Timer, TimerKind, Transition,
        Transitioned,
    },
};

/// Log bytes between two releases to the backend.
const RELEASE_BYTES: u64 = 1024 * 1024;

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

/// What goes with a change of position. What is not set is not changed, but for timers, of which this is the whole set.
#[derive(Debug, Default)]
struct Change {
    unless_cancelled: bool,
    started: Option<Timestamp>,
    not_before: Option<Timestamp>,
    outcome: Option<Outcome>,
    ended_attempt: Option<AttemptRecord>,
    events: Vec<RunEvent>,
    timers: Vec<(TimerKind, Duration)>,
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
        Self { core: Arc::clone(core), live, record, backend, slots, timers, since, cancelled, fresh }
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
                permit = Arc::clone(&self.slots).acquire_owned() => permit.ok(),
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
            artifacts: Arc::clone(&parts.artifacts),
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
        self.finish(attempt, &workload, dog.reason(), ended).await
    }

    /// Brings the workload into being, where that is still to do, and follows it to its end.
    async fn execute(
        &mut self,
        context: &AttemptContext,
        workload: &WorkloadRef,
        dog: &mut Watchdog,
    ) -> Result<Result<Followed, BackendError>, LetGo> {
        let fresh = std::mem::take(&mut self.fresh);
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
        &self,
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

    /// Follows the workload: frames to the log, changes to the store. Returns when it has ended.
    async fn follow(
        &mut self,
        context: &AttemptContext,
        workload: &WorkloadRef,
        mut durable: u64,
        dog: &mut Watchdog,
    ) -> Result<Followed, LetGo> {
        let core = Arc::clone(&self.core);
        let attempt = context.attempt;
        let mut followed = Followed {
            ended: lost("the backend ended its observation without a word"),
            unstored: Vec::new(),
            started: None,
        };
        let mut released = durable;
        let mut failures = 0;
        let mut failing_since = None;
        'observe: loop {
            let mut stream = self.backend.observe(context, durable);
            let failure = loop {
                // What is there already is taken at once: a short program's start and end become one transition.
                let item = match stream.next().now_or_never() {
                    Some(item) => item,
                    None => {
                        self.store_pending(&mut followed, dog).await?;
                        dog.guard(stream.next()).await?
                    }
                };
                match item {
                    Some(Ok(observation)) => {
                        (failures, failing_since) = (0, None);
                        match observation {
                            Observation::Started { time } => {
                                if self.record.position.state == RunState::Preparing
                                    && followed.unstored.is_empty()
                                {
                                    followed.started = Some(time);
                                    followed.unstored.push(Event::Started { attempt: attempt.number });
                                }
                            }
                            Observation::Frames(frames) => {
                                self.store_pending(&mut followed, dog).await?;
                                let bytes = frames.iter().map(crate::log::Frame::span).sum();
                                match dog.guard(core.parts.logs.append(attempt, frames)).await? {
                                    Ok(offset) => durable = durable.max(offset),
                                    Err(error) => break FollowError::Log(error),
                                }
                                core.parts.meter.log_bytes(bytes);
                                crash::point("log.appended");
                                if durable >= released.saturating_add(RELEASE_BYTES) {
                                    released = durable;
                                    self.release(workload, released).await;
                                }
                            }
                            Observation::Exited { time: _ } => {
                                dog.ended();
                                crash::point("attempt.exited");
                                self.seal_log(attempt, dog).await?;
                                let exited = Event::Exited { attempt: attempt.number };
                                if self.record.position.state != RunState::Publishing
                                    && !followed.unstored.contains(&exited)
                                {
                                    followed.unstored.push(exited);
                                }
                            }
                            Observation::Published { manifest: _ } => crash::point("attempt.published"),
                            Observation::Ended(ended) => {
                                followed.ended = ended;
                                break 'observe;
                            }
                        }
                    }
                    Some(Err(error)) => break FollowError::Backend(error),
                    None => break FollowError::Silence,
                }
            };
            failures += 1;
            let now = core.parts.clock.monotonic();
            let since = *failing_since.get_or_insert(now);
            tracing::warn!(
                run.id = %attempt.run, attempt = attempt.number, failures, error = %failure,
                "following the workload failed; trying again"
            );
            if now.saturating_sub(since) >= core.parts.options.observe_patience {
                // Nothing is known of it any more; before anything is said of it, it is stopped.
                dog.stop(StopReason::Unobservable);
                followed.ended =
                    lost(&format!("it could not be followed for {:?}: {failure}", now.saturating_sub(since)));
                break 'observe;
            }
            dog.guard(tokio::time::sleep(core.backoff(failures))).await?;
            durable = self.open_log(attempt, false, dog).await?;
        }
        dog.ended();
        Ok(followed)
    }

    /// Stores the changes of position that were seen and are not stored yet.
    async fn store_pending(&mut self, followed: &mut Followed, dog: &mut Watchdog) -> Result<(), LetGo> {
        if followed.unstored.is_empty() {
            return Ok(());
        }
        let events = std::mem::take(&mut followed.unstored);
        let running = events.iter().any(|event| matches!(event, Event::Started { .. }));
        let exited = events.iter().any(|event| matches!(event, Event::Exited { .. }));
        let mut timers = Vec::new();
        if !exited {
            let spec = &self.record.spec;
            let limit = spec.timeout.unwrap_or_default() + spec.stop_grace.unwrap_or_default();
            timers.push((TimerKind::Deadline, limit + self.core.parts.options.deadline_slack));
        }
        if running {
            crash::point("attempt.before-running");
        }
        let change = Change { started: followed.started, timers, ..Change::default() };
        self.advance(&events, change).await?;
        dog.set_timers(self.timers.clone());
        if running {
            crash::point("attempt.running");
        }
        if exited {
            crash::point("attempt.publishing");
        }
        Ok(())
    }

    /// Judges the attempt, stores its end, and removes what it left on the substrate.
    async fn finish(
        &mut self,
        attempt: AttemptId,
        workload: &WorkloadRef,
        stopped: Option<StopReason>,
        followed: Followed,
    ) -> Result<(), LetGo> {
        let core = Arc::clone(&self.core);
        let parts = &core.parts;
        let Followed { ended, unstored, started } = followed;
        let never_started = self.record.position.state == RunState::Preparing && unstored.is_empty();
        let mut outcome = judge(ended.into_outcome(attempt.number), stopped, never_started);
        let summary = loop {
            match parts.logs.seal(&self.record.tenant, attempt).await {
                Ok(summary) => break summary,
                Err(error) => self.pause_after(&error).await?,
            }
        };
        outcome.usage.log_bytes = summary.end;
        let now = parts.clock.now();
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
            parts.meter.retried(&self.record.backend, outcome.cause);
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
            parts.meter.ended(&self.record.backend, end.state(), cause, now.since(self.record.created));
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

    async fn release(&self, workload: &WorkloadRef, offset: u64) {
        if let Err(error) = self.backend.release(workload, offset).await {
            // Only space is at stake; the next release says the same again.
            tracing::debug!(run.id = %workload.run(), error = error.chain(), "releasing log frames failed");
        }
    }

    async fn open_log(&self, attempt: AttemptId, fresh: bool, dog: &mut Watchdog) -> Result<u64, LetGo> {
        let mut failures = 0;
        loop {
            match dog.guard(self.core.parts.logs.open(&self.record.tenant, attempt, fresh)).await? {
                Ok(offset) => return Ok(offset),
                Err(error) => {
                    failures += 1;
                    tracing::warn!(run.id = %attempt.run, failures, %error, "opening the log failed; trying again");
                    dog.guard(tokio::time::sleep(self.core.backoff(failures))).await?;
                }
            }
        }
    }

    async fn seal_log(&self, attempt: AttemptId, dog: &mut Watchdog) -> Result<(), LetGo> {
        let mut failures = 0;
        while let Err(error) = dog.guard(self.core.parts.logs.seal(&self.record.tenant, attempt)).await? {
            failures += 1;
            tracing::warn!(run.id = %attempt.run, failures, %error, "sealing the log failed; trying again");
            dog.guard(tokio::time::sleep(self.core.backoff(failures))).await?;
        }
        Ok(())
    }

    async fn pause_after(&self, error: &LogError) -> Result<(), LetGo> {
        tracing::warn!(run.id = %self.record.id, %error, "sealing the log failed; trying again");
        if self.core.pause(self.core.backoff(6)).await { Ok(()) } else { Err(LetGo::Shutdown) }
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

    /// Reads the record anew: somebody stored an intent.
    async fn reload(&mut self) -> Result<(), LetGo> {
        self.record = self.read().await?;
        Ok(())
    }

    async fn read(&self) -> Result<RunRecord, LetGo> {
        let mut failures = 0;
        loop {
            match self.core.parts.store.get(self.record.id).await {
                Ok(Some(record)) => return Ok(record),
                Ok(None) => return Err(LetGo::Parked(StoreError::NotFound(self.record.id))),
                Err(error) => self.store_failed(error, &mut failures).await?,
            }
        }
    }

    async fn store_failed(&self, error: StoreError, failures: &mut u32) -> Result<(), LetGo> {
        if !store_may_recover(&error) {
            return Err(LetGo::Parked(error));
        }
        *failures += 1;
        tracing::warn!(run.id = %self.record.id, failures, %error, "the state store failed; trying again");
        if self.core.pause(self.core.backoff(*failures)).await { Ok(()) } else { Err(LetGo::Shutdown) }
    }

    /// Applies `events` one after the other and stores the result as one transition, with an event for watchers for each
    /// position on the way.
    async fn advance(&mut self, events: &[Event], change: Change) -> Result<(), LetGo> {
        let mut position = self.record.position;
        let mut told = Vec::new();
        let mut path = Vec::new();
        for event in events {
            // An event that changes nothing here is late or a duplicate: that is what a restart looks like.
            if let Ok(next) = state::apply(position, *event) {
                position = next;
                path.push(next);
            }
        }
        if path.is_empty() {
            return self.reload().await.and(Err(LetGo::Moved));
        }
        let last = path.len() - 1;
        for (i, position) in path.iter().enumerate() {
            if i == last {
                told.extend(change.events.iter().cloned());
            }
            told.push(match (&change.outcome, position.state.is_terminal()) {
                (Some(outcome), true) => {
                    RunEvent::Terminated { position: *position, outcome: outcome.clone() }
                }
                _ => RunEvent::StateChanged { position: *position, reason: String::new() },
            });
        }
        let time = self.core.parts.clock.now();
        let timers: Vec<Timer> = change
            .timers
            .iter()
            .map(|(kind, duration)| Timer { kind: *kind, due: time + *duration, duration: *duration })
            .collect();
        let transition = Transition {
            run: self.record.id,
            expected: self.record.position,
            next: position,
            unless_cancelled: change.unless_cancelled,
            time,
            started: change.started,
            not_before: change.not_before,
            outcome: change.outcome,
            ended_attempt: change.ended_attempt,
            events: told,
            timers,
        };
        self.store(transition).await
    }

    async fn store(&mut self, transition: Transition) -> Result<(), LetGo> {
        let core = Arc::clone(&self.core);
        let mut failures = 0;
        let last_event = loop {
            match core.parts.store.transition(transition.clone()).await {
                Ok(Transitioned::Applied { last_event }) => break last_event,
                Ok(Transitioned::Conflict(record)) => {
                    // A commit whose answer was lost shows as a conflict with what we wanted: then it is ours.
                    let ours = failures > 0 && record.position == transition.next;
                    self.record = *record;
                    if ours {
                        break self.record.last_event;
                    }
                    return Err(LetGo::Moved);
                }
                Err(error) => self.store_failed(error, &mut failures).await?,
            }
        };
        self.applied(transition, last_event);
        Ok(())
    }

    fn applied(&mut self, transition: Transition, last_event: u64) {
        let parts = &self.core.parts;
        let now = parts.clock.monotonic();
        parts.meter.phase(&self.record.backend, self.record.position.state, now.saturating_sub(self.since));
        self.since = now;
        self.record.position = transition.next;
        self.record.not_before = transition.not_before;
        self.record.last_event = last_event;
        if transition.started.is_some() {
            self.record.started = transition.started;
        }
        if transition.next.state.is_terminal() {
            self.record.outcome = transition.outcome;
            self.record.ended = Some(transition.time);
        }
        self.timers = transition.timers.iter().map(|timer| arm(&self.core, timer)).collect();
        let first = last_event.saturating_sub(transition.events.len() as u64) + 1;
        let stored = (first..).zip(transition.events).map(|(seq, event)| StoredEvent {
            seq,
            time: transition.time,
            event,
        });
        self.live.publish(stored);
    }
}

/// What was learned by following a workload.
#[derive(Debug)]
struct Followed {
    ended: EndedAttempt,
    /// Changes of position that are not stored yet.
    unstored: Vec<Event>,
    started: Option<Timestamp>,
}

#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error("{}", .0.chain())]
    Backend(BackendError),
    #[error("{0}")]
    Log(LogError),
    #[error("the observation ended without an end")]
    Silence,
}

fn lost(message: &str) -> EndedAttempt {
    EndedAttempt {
        cause: Cause::Lost,
        status: None,
        retryable: true,
        message: message.to_owned(),
        evidence: Vec::new(),
        usage: Usage::default(),
        outputs: None,
    }
}

/// What the service's own stop means for what the backend saw. By now the workload is proven dead.
fn judge(mut outcome: Outcome, stopped: Option<StopReason>, never_started: bool) -> Outcome {
    let Some(reason) = stopped else { return outcome };
    match outcome.cause {
        Cause::Cancelled => {}
        // Our stop left nothing behind that could tell; that it is dead is known.
        Cause::Lost => {}
        // A start that our stop interrupted is no failure of the start.
        Cause::Image | Cause::Input | Cause::Unschedulable | Cause::Backend if never_started => {}
        // It ended first, for a reason of its own.
        Cause::Exited
        | Cause::OomKilled
        | Cause::TimedOut
        | Cause::Image
        | Cause::Input
        | Cause::Output
        | Cause::Unschedulable
        | Cause::Evicted
        | Cause::Backend => return outcome,
    }
    let (cause, message) = match reason {
        StopReason::Cancel => (Cause::Cancelled, "cancelled"),
        StopReason::Pending => {
            (Cause::Unschedulable, "the attempt was not running within the pending timeout")
        }
        StopReason::Deadline => (Cause::TimedOut, "the run's time was up"),
        StopReason::Unobservable => return outcome,
    };
    outcome.retryable = cause.retryable_by_default();
    if outcome.cause != Cause::Cancelled || reason != StopReason::Cancel {
        outcome.message = message.to_owned();
    }
    outcome.cause = cause;
    outcome
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
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::ExitStatus;

    #[test]
    fn a_program_that_ended_first_keeps_its_outcome() {
        let mut outcome = Outcome::new(1, Cause::Exited, "exited with 0");
        outcome.status = Some(ExitStatus::Code(0));
        assert_eq!(judge(outcome.clone(), Some(StopReason::Cancel), false), outcome);
    }

    #[test]
    fn a_stop_for_the_deadline_is_a_time_out() {
        let outcome = judge(Outcome::new(1, Cause::Cancelled, ""), Some(StopReason::Deadline), false);
        assert_eq!((outcome.cause, outcome.retryable), (Cause::TimedOut, false));
    }

    #[test]
    fn a_start_that_came_too_late_is_unschedulable() {
        for cause in [Cause::Lost, Cause::Backend, Cause::Cancelled] {
            let outcome = judge(Outcome::new(1, cause, ""), Some(StopReason::Pending), true);
            assert_eq!((outcome.cause, outcome.retryable), (Cause::Unschedulable, true), "{cause:?}");
        }
    }

    #[test]
    fn absence_without_a_stop_stays_lost() {
        assert_eq!(judge(Outcome::new(1, Cause::Lost, ""), None, true).cause, Cause::Lost);
    }
}
