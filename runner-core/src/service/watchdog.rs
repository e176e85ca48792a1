//! Watches over one attempt while its driver waits for something else: a caller's intent or a timer asks the backend to
//! stop the workload, whatever the driver is waiting for.

use std::{future::Future, pin::pin, sync::Arc, time::Duration};

use tokio::{sync::watch, task::JoinHandle};

use super::Core;
use crate::{
    backend::{Backend, WorkloadRef},
    crash,
    state::RunState,
    store::{RunRecord, Timer, TimerKind},
    task::{self, TaskKind},
};

/// Why the service stops a workload. The first reason counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StopReason {
    /// A caller asked for it.
    Cancel,
    /// The attempt was not running in time.
    Pending,
    /// The attempt's time was up, and the backend's own timer has not ended it.
    Deadline,
    /// It could not be followed for too long.
    Unobservable,
}

/// The service is shutting down; the driver leaves everything as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shutdown;

/// A timer on this process's monotonic clock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Armed {
    pub(super) kind: TimerKind,
    /// Of [`crate::clock::Clock::monotonic`].
    pub(super) at: Duration,
}

/// Arms a stored timer. What is left of it is judged by the wall clock once, here, and is never more than it was set for:
/// a wall clock that stepped back while the process was down does not make it wait longer.
pub(super) fn arm(core: &Core, timer: &Timer) -> Armed {
    let left = timer.due.since(core.parts.clock.now()).min(timer.duration);
    Armed { kind: timer.kind, at: core.parts.clock.monotonic() + left }
}

/// Watches over one attempt.
#[derive(Debug)]
pub(super) struct Watchdog {
    core: Arc<Core>,
    backend: Arc<dyn Backend>,
    workload: WorkloadRef,
    grace: Duration,
    /// Whether an intent to cancel is stored, as far as a caller of this process asked.
    cancelled: watch::Receiver<bool>,
    /// The record showed one already.
    asked: bool,
    timers: Vec<Armed>,
    /// Whether an intent still matters: a program that has ended keeps its outcome.
    watching: bool,
    reason: Option<StopReason>,
    stopper: Option<JoinHandle<Option<()>>>,
}

impl Watchdog {
    /// `cancelled` tells of every intent to cancel that is stored after `record` was read.
    pub(super) fn new(
        core: &Arc<Core>,
        backend: &Arc<dyn Backend>,
        workload: WorkloadRef,
        record: &RunRecord,
        cancelled: watch::Receiver<bool>,
        timers: Vec<Armed>,
    ) -> Self {
        Self {
            core: Arc::clone(core),
            backend: Arc::clone(backend),
            workload,
            grace: record.spec.stop_grace.unwrap_or_default(),
            cancelled,
            asked: record.cancel.is_some(),
            timers,
            watching: record.position.state < RunState::Publishing,
            reason: None,
            stopper: None,
        }
    }

    pub(super) fn reason(&self) -> Option<StopReason> {
        self.reason
    }

    pub(super) fn set_timers(&mut self, timers: Vec<Armed>) {
        self.timers = timers;
    }

    /// The program has ended: from here on nothing stops the workload.
    pub(super) fn ended(&mut self) {
        self.watching = false;
    }

    /// Waits for `future`. Meanwhile, a reason to stop starts the stopper.
    pub(super) async fn guard<F: Future>(&mut self, future: F) -> Result<F::Output, Shutdown> {
        let mut future = pin!(future);
        let core = Arc::clone(&self.core);
        loop {
            // Looked at even if the future never has to be waited for, as with a program that prints without a pause.
            if let Some(reason) = self.due() {
                self.stop(reason);
            }
            tokio::select! {
                biased;
                () = core.stopping.cancelled() => return Err(Shutdown),
                output = &mut future => return Ok(output),
                reason = self.triggered() => self.stop(reason),
            }
        }
    }

    /// Waits for `future`. A reason to stop drops it.
    pub(super) async fn unless_stopped<F: Future>(
        &mut self,
        future: F,
    ) -> Result<Result<F::Output, StopReason>, Shutdown> {
        if let Some(reason) = self.reason {
            return Ok(Err(reason));
        }
        let core = Arc::clone(&self.core);
        let mut future = pin!(future);
        tokio::select! {
            biased;
            () = core.stopping.cancelled() => Err(Shutdown),
            // Before the future: an intent that is there already makes nothing start.
            reason = self.triggered() => Ok(Err(reason)),
            output = &mut future => Ok(Ok(output)),
        }
    }

    /// The reason to stop that there is now, if it is the first.
    fn due(&self) -> Option<StopReason> {
        if self.reason.is_some() || !self.watching {
            return None;
        }
        if self.asked || *self.cancelled.borrow() {
            return Some(StopReason::Cancel);
        }
        let timer = self.next_timer()?;
        (timer.at <= self.core.parts.clock.monotonic()).then_some(match timer.kind {
            TimerKind::Deadline => StopReason::Deadline,
            TimerKind::Pending | TimerKind::Retry => StopReason::Pending,
        })
    }

    /// The timer that is due first, of those that end an attempt.
    fn next_timer(&self) -> Option<Armed> {
        let ends = |timer: &&Armed| timer.kind != TimerKind::Retry;
        self.timers.iter().filter(ends).min_by_key(|timer| timer.at).copied()
    }

    /// Waits for a reason to stop. Never returns once there is one, or once the program has ended.
    async fn triggered(&mut self) -> StopReason {
        loop {
            if let Some(reason) = self.due() {
                return reason;
            }
            if self.reason.is_some() || !self.watching {
                return std::future::pending().await;
            }
            let next = self.next_timer().map_or(Duration::MAX, |timer| timer.at);
            let left = next.saturating_sub(self.core.parts.clock.monotonic());
            tokio::select! {
                changed = self.cancelled.changed() => {
                    if changed.is_err() {
                        // The run's live part is gone: nobody of this process can ask any more.
                        tokio::time::sleep(left).await;
                    }
                }
                () = tokio::time::sleep(left) => {}
            }
        }
    }

    /// Starts the stopper, once. It repeats `stop` until the workload is proven dead.
    pub(super) fn stop(&mut self, reason: StopReason) {
        if self.reason.is_some() {
            return;
        }
        self.reason = Some(reason);
        tracing::info!(
            run.id = %self.workload.run(), attempt = self.workload.attempt.number, reason = ?reason,
            "stopping the workload"
        );
        let (core, backend, workload) =
            (Arc::clone(&self.core), Arc::clone(&self.backend), self.workload.clone());
        let grace = self.grace;
        let stopper = async move {
            let mut failures = 0;
            while let Err(error) = backend.stop(&workload, grace).await {
                failures += 1;
                tracing::warn!(
                    run.id = %workload.run(), attempt = workload.attempt.number, failures, error = error.chain(),
                    "stopping the workload failed; trying again"
                );
                if !core.pause(core.backoff(failures)).await {
                    return;
                }
            }
            crash::point("cancel.stopped");
        };
        self.stopper = Some(task::spawn(TaskKind::Helper, "stopper", self.core.tasks.track_future(stopper)));
    }

    /// Waits until the workload is proven dead, where a stop is under way.
    pub(super) async fn proven_dead(&mut self) -> Result<(), Shutdown> {
        if let Some(stopper) = self.stopper.take() {
            // A panic in the stopper is logged by its task; the reconciler stops what is left.
            let _ = self.guard(stopper).await?;
        }
        Ok(())
    }
}
