//! Follows a workload: its frames to the log, its changes to the store.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt as _, StreamExt as _};

use super::{Change, Driver, LetGo};
use crate::{
    backend::{AttemptContext, BackendError, BackendErrorKind, EndedAttempt, Observation, WorkloadRef},
    clock::Timestamp,
    crash,
    id::AttemptId,
    log::{LogError, LogSummary},
    outcome::{Cause, Evidence, Usage},
    service::watchdog::{StopReason, Watchdog},
    state::{Event, RunState},
    store::TimerKind,
};

/// Log bytes between two releases to the backend.
const RELEASE_BYTES: u64 = 1024 * 1024;

/// What was learned by following a workload.
#[derive(Debug)]
pub(super) struct Followed {
    pub(super) ended: EndedAttempt,
    /// Changes of position that are not stored yet.
    pub(super) unstored: Vec<Event>,
    pub(super) started: Option<Timestamp>,
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

impl Driver {
    /// Follows the workload: frames to the log, changes to the store. Returns when it has ended.
    pub(super) async fn follow(
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
        // Each observation sees the start and the end again, so it is no progress of the publishing that follows them.
        let mut unpublished_since = None;
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
            if let FollowError::Backend(error) = &failure
                && error.kind == BackendErrorKind::Output
            {
                let unpublished = now.saturating_sub(*unpublished_since.get_or_insert(now));
                if unpublished >= core.parts.options.publish_patience {
                    followed.ended = unpublished_for(unpublished, error, core.parts.clock.now());
                    break 'observe;
                }
            }
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
    pub(super) async fn store_pending(
        &mut self,
        followed: &mut Followed,
        dog: &mut Watchdog,
    ) -> Result<(), LetGo> {
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

    pub(super) async fn release(&self, workload: &WorkloadRef, offset: u64) {
        if let Err(error) = self.backend.release(workload, offset).await {
            // Only space is at stake; the next release says the same again.
            tracing::debug!(run.id = %workload.run(), error = error.chain(), "releasing log frames failed");
        }
    }

    pub(super) async fn open_log(
        &self,
        attempt: AttemptId,
        fresh: bool,
        dog: &mut Watchdog,
    ) -> Result<u64, LetGo> {
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

    pub(super) async fn seal_log(&self, attempt: AttemptId, dog: &mut Watchdog) -> Result<LogSummary, LetGo> {
        let mut failures = 0;
        loop {
            match dog.guard(self.core.parts.logs.seal(&self.record.tenant, attempt)).await? {
                Ok(summary) => return Ok(summary),
                Err(error) => {
                    failures += 1;
                    tracing::warn!(run.id = %attempt.run, failures, %error, "sealing the log failed; trying again");
                    dog.guard(tokio::time::sleep(self.core.backoff(failures))).await?;
                }
            }
        }
    }
}

/// The program has ended, and what it wrote could not be stored.
fn unpublished_for(time: Duration, error: &BackendError, now: Timestamp) -> EndedAttempt {
    EndedAttempt {
        cause: Cause::Output,
        status: None,
        retryable: error.retryable,
        message: format!("the program ended, and its outputs could not be stored for {time:?}"),
        evidence: vec![Evidence { source: "backend".to_owned(), detail: error.chain(), time: now }],
        usage: Usage::default(),
        outputs: None,
    }
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
