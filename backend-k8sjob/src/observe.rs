//! Following an attempt: its start, its log, its end, its outputs, the judgement.
//!
//! Everything that is observed is asked of the agent beside the program. Where there is none, because it is not there yet, was
//! cut off, or is gone with its pod, the cluster says which of these it is.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt as _, stream, stream::BoxStream};
use runner_agent::{
    backend::{Counted, Ending, PublishFailure, PublishRecord, judge},
    exec::protocol::{ExitReason, ExitRecord},
    staging::read_manifest,
};
use runner_core::{
    agent::{AgentAnswer, AgentAsk, AgentPresence, AgentState, AskError},
    artifact::ArtifactKey,
    backend::{AttemptContext, BackendError, BackendErrorKind, EndedAttempt, Observation},
    clock::Timestamp,
    id::AttemptId,
    log::FrameBatch,
    outcome::{Cause, Evidence},
};
use tokio::sync::watch;

use crate::{
    backend::{Shared, Workload},
    error,
    seen::{PodSeen, Seen},
};

/// How long the agent may wait with an answer for something to tell.
const PATIENCE: Duration = Duration::from_secs(10);
/// The slow poll behind the watch and the agent's presence.
const POLL: Duration = Duration::from_secs(5);
/// After a failed ask of an agent that is said to be connected.
const PAUSE: Duration = Duration::from_millis(100);

/// How long an event may take to come after what it tells of.
const EVENT_PAUSES: [Duration; 3] = [Duration::ZERO, Duration::from_millis(500), Duration::from_secs(1)];

/// Where an observation is.
#[derive(Debug)]
enum Step {
    /// Neither a start nor an end was seen.
    Begin,
    /// The log is followed; the end may be known already.
    Log {
        ran: bool,
    },
    /// The log is complete.
    Publish,
    /// Everything is known.
    End(Option<PublishRecord>),
    Over,
}

/// One observation: an offset, and a place among those who wait.
struct Observer {
    shared: Arc<Shared>,
    workload: Arc<Workload>,
    attempt: AttemptContext,
    changes: watch::Receiver<()>,
    presence: watch::Receiver<AgentPresence>,
    /// Offset up to which the log was delivered.
    position: u64,
    /// Frames that came with the news of the start.
    held: FrameBatch,
    input_bytes: u64,
    /// The pod as it was last seen: the cluster forgets it when it is gone.
    pod: Option<PodSeen>,
    ending: Option<Ending>,
    step: Step,
}

/// Observes from `cursor` on.
pub(crate) fn observe(
    shared: Arc<Shared>,
    attempt: AttemptContext,
    cursor: u64,
) -> BoxStream<'static, Result<Observation, BackendError>> {
    let id = attempt.attempt;
    let observer = Observer {
        workload: shared.workload(id),
        changes: shared.watch.changes(id),
        presence: shared.hub.presence(id),
        position: cursor,
        held: FrameBatch::new(),
        input_bytes: 0,
        pod: None,
        ending: None,
        step: Step::Begin,
        shared,
        attempt,
    };
    stream::unfold(observer, |mut observer| async move {
        let seen = observer.next().await?;
        Some((seen, observer))
    })
    .boxed()
}

impl Observer {
    async fn next(&mut self) -> Option<Result<Observation, BackendError>> {
        if matches!(self.step, Step::Over) {
            return None;
        }
        // After a restart, its agent finds nothing to do until somebody says so.
        if self.shared.hub.order(self.attempt.attempt).is_none()
            && let Err(error) = self.shared.take_up(&self.attempt)
        {
            self.step = Step::Over;
            return Some(Err(error));
        }
        let seen = self.advance().await;
        if seen.is_err() {
            self.step = Step::Over;
        }
        Some(seen)
    }

    async fn advance(&mut self) -> Result<Observation, BackendError> {
        loop {
            match std::mem::replace(&mut self.step, Step::Over) {
                step @ (Step::Begin | Step::Log { .. }) => {
                    if let Some(seen) = self.follow(step).await? {
                        return Ok(seen);
                    }
                }
                Step::Publish => {
                    let record = self.publish().await?;
                    let manifest = record.as_ref().and_then(|record| record.manifest.clone());
                    self.step = Step::End(record);
                    if let Some(manifest) = manifest {
                        return Ok(Observation::Published { manifest });
                    }
                }
                Step::End(published) => {
                    let ending = self.ending.take().unwrap_or_else(|| self.lost("no end was seen"));
                    let counted = Counted { input_bytes: self.input_bytes, log_bytes: self.position };
                    let before = match &ending {
                        Ending::Stopped { time, .. } => self.stopped_seen(*time),
                        Ending::Recorded { .. }
                        | Ending::NeverBegan { .. }
                        | Ending::Died { .. }
                        | Ending::Lost { .. } => None,
                    };
                    let mut ended = judge(ending, counted, published);
                    ended.evidence.splice(0..0, before);
                    let evicted = if ended.cause == Cause::Backend { self.evicted().await } else { None };
                    return Ok(Observation::Ended(blame(ended, evicted)));
                }
                Step::Over => return Err(error::substrate("observe: the observation is over")),
            }
        }
    }

    /// What was there when the workload was stopped.
    fn stopped_seen(&self, time: Timestamp) -> Option<Evidence> {
        let job = self.shared.watch.seen(self.attempt.attempt).job;
        job?.stopped_seen.map(|detail| Evidence { source: "pod".to_owned(), detail, time })
    }

    /// Why the pod was taken off its node, where that is how it ended.
    async fn evicted(&mut self) -> Option<String> {
        self.look();
        let pod = self.pod.clone()?;
        if let Some(why) = pod.evicted() {
            return Some(why);
        }
        let there = self.shared.watch.seen(self.attempt.attempt).pods.iter().any(|one| one.uid == pod.uid);
        if there && !pod.deleting {
            return None;
        }
        // Somebody deleted it. Who makes room for another pod says so in an event only, and a little later.
        for pause in EVENT_PAUSES {
            tokio::time::sleep(pause).await;
            let why = self.shared.eviction(&pod.name, &pod.uid).await;
            if why.is_some() {
                return why;
            }
        }
        None
    }

    /// What is known of the cluster's side, remembering the pod.
    fn look(&mut self) -> Seen {
        let seen = self.shared.watch.seen(self.attempt.attempt);
        if let Some(pod) = seen.pod() {
            // A pod that came after the one that is followed is nobody's business.
            if self.pod.as_ref().is_none_or(|known| known.uid == pod.uid) {
                self.pod = Some(pod.clone());
            }
        }
        seen
    }

    /// Whether the followed pod's program is certainly dead.
    fn is_dead(&mut self) -> bool {
        let seen = self.look();
        let listed = self.shared.watch.is_complete();
        self.pod.as_ref().is_some_and(|known| {
            known.program_is_dead() || (listed && !seen.pods.iter().any(|pod| pod.uid == known.uid))
        })
    }

    async fn follow(&mut self, step: Step) -> Result<Option<Observation>, BackendError> {
        let mut ran = matches!(step, Step::Log { ran: true });
        if !self.held.is_empty() {
            self.step = Step::Log { ran };
            return Ok(Some(self.deliver()));
        }
        // Whatever changes after this line is seen below, or wakes the wait.
        self.changes.borrow_and_update();
        self.presence.borrow_and_update();
        let dead = self.is_dead();
        let patience = if dead { Duration::ZERO } else { PATIENCE };
        let ask = AgentAsk::Log { offset: self.position, patience };
        let answer = {
            let hub = Arc::clone(&self.shared.hub);
            let asking = hub.ask(self.attempt.attempt, ask);
            tokio::pin!(asking);
            loop {
                tokio::select! {
                    answer = &mut asking => break Some(answer),
                    _ = self.changes.changed(), if !dead => {
                        self.changes.borrow_and_update();
                        if self.is_dead() {
                            break None;
                        }
                    }
                }
            }
        };
        let Some(answer) = answer else {
            // Its last words are asked for without waiting for more.
            self.step = step;
            return Ok(None);
        };
        match answer {
            Ok(AgentAnswer::Log { state, frames }) => {
                self.input_bytes = state.input_bytes;
                let began = !ran && matches!(step, Step::Begin) && state.started.is_some();
                ran |= state.started.is_some();
                self.held = frames;
                if began {
                    self.step = Step::Log { ran };
                    let time = state.started.unwrap_or_default();
                    return Ok(Some(Observation::Started { time }));
                }
                if !self.held.is_empty() {
                    self.step = Step::Log { ran };
                    return Ok(Some(self.deliver()));
                }
                if let Some(ending) = self.end_of(&state)? {
                    return Ok(self.ended(ending, ran));
                }
                if dead {
                    let ending = self.died();
                    return Ok(self.ended(ending, ran));
                }
                self.step = if ran { Step::Log { ran } } else { Step::Begin };
                Ok(None)
            }
            Ok(AgentAnswer::Failed { message, retryable }) => {
                let context = format!("read the log of {}: {message}", self.attempt.attempt);
                Err(BackendError::new(BackendErrorKind::Substrate, retryable, context))
            }
            Ok(_) => Err(error::substrate("read the log: the agent answers something else")),
            Err(AskError::Away | AskError::Silent) => {
                self.step = step;
                match self.without_agent(ran).await? {
                    Some(ending) => Ok(self.ended(ending, ran)),
                    None => Ok(None),
                }
            }
        }
    }

    fn deliver(&mut self) -> Observation {
        let frames = std::mem::take(&mut self.held);
        self.position = frames.last().map_or(self.position, runner_core::log::Frame::end);
        Observation::Frames(frames)
    }

    /// The log is complete, as far as it will ever be.
    fn ended(&mut self, ending: Ending, ran: bool) -> Option<Observation> {
        let time = match &ending {
            Ending::Recorded { record, .. } if ran => Some(record.time),
            _ => None,
        };
        self.ending = Some(ending);
        self.step = Step::Publish;
        time.map(|time| Observation::Exited { time })
    }

    fn end_of(&self, state: &AgentState) -> Result<Option<Ending>, BackendError> {
        if let Some(record) = &state.exit_record {
            let record: ExitRecord = serde_json::from_slice(record)
                .map_err(|source| error::substrate(format!("read the exit record: {source}")))?;
            // Where the end was not the program's own or ours, what the cluster says belongs to it.
            let seen = match (record.reason, &self.pod) {
                (ExitReason::Terminated, Some(pod)) => vec![("pod", pod.describe())],
                _ => Vec::new(),
            };
            return Ok(Some(Ending::Recorded { record: Box::new(record), out_of_memory: false, seen }));
        }
        Ok(state.stopped.map(|time| Ending::Stopped { time, started: false }))
    }

    fn died(&self) -> Ending {
        let now = self.shared.clock.now();
        match &self.pod {
            Some(pod) => Ending::Died {
                out_of_memory: pod.main.was_out_of_memory(),
                seen: vec![("pod", pod.describe())],
                time: pod.main.finished().unwrap_or(now),
            },
            None => self.lost("there is no pod"),
        }
    }

    fn lost(&self, detail: &str) -> Ending {
        Ending::Lost { seen: vec![("cluster", detail.to_owned())], time: self.shared.clock.now() }
    }

    /// Waits for an agent, or for the news that there will be none. `None`: look again.
    async fn without_agent(&mut self, ran: bool) -> Result<Option<Ending>, BackendError> {
        if self.presence.borrow_and_update().connected {
            // It answers nobody, or was replaced just now.
            tokio::time::sleep(PAUSE).await;
            return Ok(None);
        }
        if self.shared.watch.is_complete() {
            let seen = self.look();
            let alive = |pod: &PodSeen| !pod.is_over();
            if let Some(time) = seen.job.as_ref().and_then(|job| job.stopped)
                && !seen.pods.iter().any(alive)
            {
                let started = ran || self.pod.as_ref().is_some_and(|pod| pod.main.has_begun());
                return Ok(Some(Ending::Stopped { time, started }));
            }
            if let Some(known) = &self.pod {
                let now = seen.pods.iter().find(|pod| pod.uid == known.uid);
                if now.is_none_or(|pod| pod.is_over() || pod.publish.has_ended()) {
                    return Ok(Some(self.died()));
                }
            } else if let Some(why) = seen.job.as_ref().and_then(|job| job.failed.clone()) {
                return Ok(Some(self.lost(&format!("the Job failed, and there is no pod: {why}"))));
            }
        }
        let (shared, workload) = (Arc::clone(&self.shared), Arc::clone(&self.workload));
        let nothing = nothing_there(&shared, &workload, self.attempt.attempt);
        tokio::select! {
            _ = self.changes.changed() => {}
            _ = self.presence.changed() => {}
            () = tokio::time::sleep(POLL) => {}
            () = nothing => {
                return Ok(Some(match &self.pod {
                    Some(_) => self.died(),
                    None => self.lost("there is no such Job"),
                }));
            }
        }
        Ok(None)
    }

    /// Publishes, or finds it done. `None`: there is nothing to publish.
    async fn publish(&mut self) -> Result<Option<PublishRecord>, BackendError> {
        let Some(ending) = self.ending.clone() else { return Ok(None) };
        if self.attempt.spec.outputs.is_empty() || !ending.may_have_outputs() {
            return Ok(None);
        }
        let workload = Arc::clone(&self.workload);
        let _publishing = workload.publishing.lock().await;
        loop {
            self.changes.borrow_and_update();
            self.presence.borrow_and_update();
            let ask = AgentAsk::Publish { partial: !ending.is_success() };
            let failed = |message: String| {
                let failure = Some(PublishFailure { message, retryable: false });
                Ok(Some(PublishRecord { manifest: None, failure, notes: Vec::new() }))
            };
            match self.shared.hub.ask(self.attempt.attempt, ask).await {
                Ok(AgentAnswer::Published { stored, failure, notes }) => {
                    let manifest = if stored { self.manifest().await? } else { None };
                    let failure = failure.map(|(message, retryable)| PublishFailure { message, retryable });
                    return Ok(Some(PublishRecord { manifest, failure, notes }));
                }
                // The outputs are still there: observing again publishes again.
                Ok(AgentAnswer::Failed { message, retryable: true }) => {
                    return Err(BackendError::new(BackendErrorKind::Output, true, message));
                }
                Ok(AgentAnswer::Failed { message, retryable: false }) => return failed(message),
                Ok(_) => return failed("the agent answers something else".to_owned()),
                Err(AskError::Away | AskError::Silent) => {}
            }
            if self.is_gone() {
                // It may have been done before the pod went.
                let manifest = self.manifest().await?;
                let failure = manifest.is_none().then(|| PublishFailure {
                    message: "the pod was gone before its outputs were stored".to_owned(),
                    retryable: true,
                });
                return Ok(Some(PublishRecord { manifest, failure, notes: Vec::new() }));
            }
            tokio::select! {
                _ = self.changes.changed() => {}
                _ = self.presence.changed() => {}
                () = tokio::time::sleep(POLL) => {}
            }
        }
    }

    /// Whether the agent beside the program will not come back.
    fn is_gone(&mut self) -> bool {
        if !self.shared.watch.is_complete() || self.presence.borrow().connected {
            return false;
        }
        let seen = self.look();
        let Some(known) = &self.pod else { return seen.job.is_none() };
        let now = seen.pods.iter().find(|pod| pod.uid == known.uid);
        now.is_none_or(|pod| pod.is_over() || pod.publish.has_ended())
    }

    async fn manifest(&self) -> Result<Option<runner_core::artifact::Manifest>, BackendError> {
        let prefix = ArtifactKey::attempt_prefix(&self.attempt.tenant, self.attempt.attempt);
        read_manifest(self.attempt.artifacts.as_ref(), &prefix, &self.shared.staging)
            .await
            .map_err(Into::into)
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        // Else asking for attempts that never were would grow the memory.
        if matches!(self.step, Step::Over) {
            self.shared.forget(self.attempt.attempt, &self.workload);
        }
    }
}

/// Returns where the API server says that there is no Job; else never.
async fn nothing_there(shared: &Shared, workload: &Workload, id: AttemptId) {
    // Somebody may be about to make it.
    let nobody_makes_it = shared.watch.seen(id).job.is_none() && workload.verbs.try_lock().is_ok();
    if !nobody_makes_it || !matches!(shared.job(id).await, Ok(None)) {
        std::future::pending::<()>().await;
    }
}

/// Tells an eviction from every other end that came from outside.
fn blame(mut ended: EndedAttempt, evicted: Option<String>) -> EndedAttempt {
    if ended.cause == Cause::Backend
        && let Some(why) = evicted
    {
        ended.cause = Cause::Evicted;
        ended.retryable = Cause::Evicted.retryable_by_default();
        ended.message = format!("the pod was evicted: {why}");
    }
    ended
}

#[cfg(test)]
mod tests {
    use runner_core::outcome::Usage;

    use super::*;

    #[test]
    fn only_an_end_from_outside_becomes_an_eviction() {
        let ended = |cause: Cause| EndedAttempt {
            cause,
            status: None,
            retryable: false,
            message: String::new(),
            evidence: Vec::new(),
            usage: Usage::default(),
            outputs: None,
        };
        let evicted = PodSeen { reason: "Evicted".into(), message: "disk".into(), ..PodSeen::default() };
        assert_eq!(blame(ended(Cause::Backend), evicted.evicted()).cause, Cause::Evicted);
        assert_eq!(blame(ended(Cause::Exited), evicted.evicted()).cause, Cause::Exited);
        assert_eq!(blame(ended(Cause::Backend), PodSeen::default().evicted()).cause, Cause::Backend);
    }
}
