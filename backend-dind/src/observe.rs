//! Following an attempt: its start, its log, its end, its outputs, the judgement.
//!
//! The log comes as live copies while they are complete, and from the shim's files where one is missing: after a restart of
//! this service, of the engine, or where the copies came faster than they were taken.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bollard::models::{ContainerState, ContainerStateStatusEnum};
use futures::{StreamExt as _, stream, stream::BoxStream};
use runner_agent::{
    backend::{Counted, Ending, PublishRecord, judge},
    exec::protocol::{ExitRecord, StartedRecord, name},
    staging::StagedInputs,
};
use runner_core::{
    backend::{AttemptContext, BackendError, Observation},
    clock::Timestamp,
    log::{Frame, FrameBody},
};
use tokio::sync::watch;

use crate::{
    backend::Shared,
    engine::EngineErrorKind,
    ensure::was_started,
    error::{self, FAILURE_PATIENCE},
    judge,
    live::Live,
    logs::{LogFiles, Read},
    names::STOPPED,
    stage::STAGED,
    workload::Workload,
};

/// What is delivered at once, in bytes.
const BATCH: usize = 512 * 1024;
/// Between two looks at a container that says nothing.
const POLL: Duration = Duration::from_secs(10);
/// Between two looks at one that is about to start or to end.
const SHORT_POLL: Duration = Duration::from_millis(50);
/// Between two tries to reach an engine: at first, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long files may lack what a live copy says is there.
const GAP_TRIES: u32 = 20;
/// How long the end of a container is waited for once its shim said its last word.
const DEATH: Duration = Duration::from_secs(3600);

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

/// One observation.
struct Observer {
    shared: Arc<Shared>,
    workload: Arc<Workload>,
    attempt: AttemptContext,
    changes: watch::Receiver<()>,
    live: Option<Live>,
    files: LogFiles,
    /// Offset up to which the log was delivered.
    position: u64,
    /// The files may have what no live copy brought.
    behind: bool,
    gap_tries: u32,
    ending: Option<Ending>,
    step: Step,
}

/// Observes from `cursor` on.
pub(crate) fn observe(
    shared: Arc<Shared>,
    attempt: AttemptContext,
    cursor: u64,
) -> BoxStream<'static, Result<Observation, BackendError>> {
    let workload = shared.workloads.get(attempt.attempt);
    let observer = Observer {
        changes: workload.signal.subscribe(),
        live: None,
        files: LogFiles::new(&workload.name),
        position: cursor,
        behind: true,
        gap_tries: 0,
        ending: None,
        step: Step::Begin,
        shared,
        workload,
        attempt,
    };
    stream::unfold(observer, |mut observer| async move {
        let seen = observer.next().await?;
        Some((seen, observer))
    })
    .boxed()
}

impl Drop for Observer {
    fn drop(&mut self) {
        // Else asking for attempts that never were would grow the memory.
        if matches!(self.step, Step::Over) {
            self.shared.workloads.forget(&self.workload);
        }
    }
}

impl Observer {
    async fn next(&mut self) -> Option<Result<Observation, BackendError>> {
        if matches!(self.step, Step::Over) {
            return None;
        }
        let mut pause = FIRST_PAUSE;
        let mut failing_since = None;
        loop {
            let step = std::mem::replace(&mut self.step, Step::Over);
            let again = match &step {
                Step::Begin => Step::Begin,
                Step::Log { ran } => Step::Log { ran: *ran },
                Step::Publish => Step::Publish,
                Step::End(record) => Step::End(record.clone()),
                Step::Over => Step::Over,
            };
            let error = match self.advance(step).await {
                Ok(Some(seen)) => return Some(Ok(seen)),
                Ok(None) => {
                    // Progress without anything to tell: the engine answers.
                    (pause, failing_since) = (FIRST_PAUSE, None);
                    continue;
                }
                Err(error) => error,
            };
            // An engine that does not answer makes an attempt late, never wrong. One that answers with errors may get over it.
            let now = self.shared.clock.monotonic();
            let outage = error::is_outage(&error);
            let since = *failing_since.get_or_insert(now);
            let failed = error::is_failure(&error);
            if !outage && (!failed || now - since >= FAILURE_PATIENCE) {
                return Some(Err(error));
            }
            if pause == FIRST_PAUSE {
                tracing::warn!(attempt = %self.workload.attempt, error = error.chain(), "the engine is in trouble; looking again");
            }
            if outage {
                self.shared.engine.forget_version();
                self.live = None;
                self.behind = true;
            }
            self.step = again;
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Does the next thing. `None`: nothing is to be told of it. Where it fails the step is done again.
    async fn advance(&mut self, step: Step) -> Result<Option<Observation>, BackendError> {
        // Whatever changes after this line is seen by the look below, or wakes the wait behind it.
        self.changes.borrow_and_update();
        match step {
            Step::Begin => self.begin().await,
            Step::Log { ran } => self.follow(ran).await,
            Step::Publish => {
                let record = self.publish().await?;
                let manifest = record.as_ref().and_then(|record| record.manifest.clone());
                self.step = Step::End(record);
                Ok(manifest.map(|manifest| Observation::Published { manifest }))
            }
            Step::End(published) => {
                let counted = Counted { input_bytes: self.input_bytes().await?, log_bytes: self.position };
                let ending = self.ending.take().unwrap_or_else(|| self.lost("backend", "no end was seen"));
                Ok(Some(Observation::Ended(judge(ending, counted, published))))
            }
            Step::Over => Err(error::unsupported("observe: the observation is over")),
        }
    }

    async fn begin(&mut self) -> Result<Option<Observation>, BackendError> {
        self.step = Step::Begin;
        let container = self.shared.look(&self.workload, &self.workload.name).await?;
        let state = container.and_then(|container| container.state);
        match state {
            Some(state) if was_started(&state) => {
                let ended = state.running != Some(true);
                if let Some(started) = self.started(ended).await? {
                    self.step = Step::Log { ran: true };
                    return Ok(Some(Observation::Started { time: started.time }));
                }
                if ended {
                    self.ending = Some(self.end_of(state).await?);
                    // The start may have been written since, right before the end.
                    let started = self.started(true).await?;
                    self.step = Step::Log { ran: started.is_some() };
                    return Ok(started.map(|started| Observation::Started { time: started.time }));
                }
                match &self.live {
                    Some(live) => live.changed(SHORT_POLL).await,
                    None => tokio::time::sleep(SHORT_POLL).await,
                }
            }
            seen => {
                if let Some(ending) = self.end_without_start(seen).await? {
                    self.ending = Some(ending);
                    self.step = Step::Log { ran: false };
                } else {
                    self.wait_for_verbs().await;
                }
            }
        }
        Ok(None)
    }

    /// When the program was started: as heard, else as written.
    async fn started(&mut self, ended: bool) -> Result<Option<StartedRecord>, BackendError> {
        if self.live.is_none() && !ended {
            self.listen().await?;
        }
        if let Some(live) = self.live.as_ref() {
            if let Some(started) = live.started() {
                return Ok(Some(started));
            }
            if live.from_the_start && !live.is_closed() {
                // It will be heard.
                return Ok(None);
            }
        }
        self.shared.read_json(&self.workload.name, name::STARTED).await
    }

    /// Listens to the container: with the ear that was there before the start where nobody has it yet.
    async fn listen(&mut self) -> Result<(), BackendError> {
        if let Some(early) = self.workload.take_early() {
            self.behind = false;
            self.live = Some(early);
            return Ok(());
        }
        let name = &self.workload.name;
        match Live::attach(&self.shared.engine, name, false).await {
            Ok(live) => self.live = Some(live),
            // It ended, or is gone: the next look says so.
            Err(error)
                if matches!(
                    error.kind,
                    EngineErrorKind::NotFound | EngineErrorKind::Conflict | EngineErrorKind::Refused
                ) => {}
            Err(source) => return Err(error::engine(format!("attach to the container {name}"), source)),
        }
        self.behind = true;
        Ok(())
    }

    async fn wait_for_verbs(&mut self) {
        // The sender lives as long as the workload, so a change is all that ends it early.
        let _ = tokio::time::timeout(FIRST_PAUSE, self.changes.changed()).await;
    }

    /// The container is not there, or was never started: an attempt in the making, a stopped one, or one that nobody makes
    /// any more.
    async fn end_without_start(&self, seen: Option<ContainerState>) -> Result<Option<Ending>, BackendError> {
        let workload = Arc::clone(&self.workload);
        let Ok(_making) = workload.verbs.try_lock() else { return Ok(None) };
        // Looked at again, now that nobody makes it: it may have been started since.
        let container = self.shared.look(&workload, &workload.name).await?;
        if container.as_ref().and_then(|container| container.state.as_ref()).is_some_and(was_started) {
            return Ok(None);
        }
        let has_container = container.is_some();
        let door = if has_container { None } else { self.shared.look(&workload, &workload.door).await? };
        let place = match (has_container, door) {
            (true, _) => &workload.name,
            (false, Some(_)) => &workload.door,
            (false, None) => {
                let detail = format!("the engine has no container {}", workload.name);
                return Ok(Some(self.lost("engine", detail)));
            }
        };
        if self.shared.was_stopped(&workload, place).await? {
            return Ok(Some(Ending::Stopped { time: self.stopped_at(place).await?, started: false }));
        }
        let mut detail = format!("{place} was never started, and nobody is about to");
        if let Some(error) = seen.and_then(|state| state.error).filter(|error| !error.is_empty()) {
            detail.push_str(": ");
            detail.push_str(&error);
        }
        Ok(Some(self.lost("engine", detail)))
    }

    async fn stopped_at(&self, container: &str) -> Result<Timestamp, BackendError> {
        let mark = self.shared.read_record(container, STOPPED).await?;
        let micros = mark.and_then(|mark| std::str::from_utf8(&mark).ok()?.parse().ok());
        Ok(micros.map_or_else(|| self.shared.clock.now(), Timestamp::from_micros))
    }

    fn lost(&self, source: &'static str, detail: impl Into<String>) -> Ending {
        Ending::Lost { seen: vec![(source, detail.into())], time: self.shared.clock.now() }
    }

    /// How a container that was started and does not run any more ended.
    async fn end_of(&self, state: ContainerState) -> Result<Ending, BackendError> {
        let name = &self.workload.name;
        let heard = self.live.as_ref().and_then(Live::ended);
        let record: Option<ExitRecord> = match heard {
            Some(record) => Some(record),
            None => self.shared.read_json(name, name::EXIT).await?,
        };
        if let Some(record) = record {
            return Ok(judge::recorded(record, &state));
        }
        if self.shared.read_record(name, STOPPED).await?.is_some() {
            return Ok(Ending::Stopped { time: self.stopped_at(name).await?, started: true });
        }
        // A container that is being removed, or was since, has no records either, and is gone in a moment.
        let removing = state.status == Some(ContainerStateStatusEnum::REMOVING);
        if removing || self.shared.look(&self.workload, name).await?.is_none() {
            return Ok(self.gone());
        }
        let said = self.shared.read_record(name, name::ERRORS).await?.unwrap_or_default();
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        Ok(judge::died(&state, said, self.shared.clock.now()))
    }

    fn gone(&self) -> Ending {
        let detail = format!("the container {} was started, and somebody has removed it", self.workload.name);
        self.lost("engine", detail)
    }

    async fn look_for_end(&mut self) -> Result<(), BackendError> {
        if self.ending.is_some() {
            return Ok(());
        }
        let container = self.shared.look(&self.workload, &self.workload.name).await?;
        let Some(state) = container.and_then(|container| container.state) else {
            self.ending = Some(self.gone());
            return Ok(());
        };
        if state.running == Some(true) {
            return Ok(());
        }
        self.ending = Some(self.end_of(state).await?);
        self.behind = true;
        Ok(())
    }

    /// The next stretch of the log, or its end.
    async fn follow(&mut self, ran: bool) -> Result<Option<Observation>, BackendError> {
        self.step = Step::Log { ran };
        if let Some(frames) = self.next_frames().await? {
            return Ok(Some(Observation::Frames(frames)));
        }
        if let Some(ending) = &self.ending {
            self.step = Step::Publish;
            if let Ending::Recorded { record, .. } = ending
                && ran
            {
                return Ok(Some(Observation::Exited { time: record.time }));
            }
            return Ok(None);
        }
        let Some(live) = &self.live else {
            // Not attached: the connection ended, or it never came to be.
            self.look_for_end().await?;
            if self.ending.is_none() {
                self.listen().await?;
                if self.live.is_none() {
                    tokio::time::sleep(SHORT_POLL).await;
                }
            }
            return Ok(None);
        };
        if live.ended().is_some() {
            // Its last word came before its death, which is what counts.
            if !self.shared.wait_dead(&self.workload, DEATH).await? {
                return Ok(None);
            }
            self.look_for_end().await?;
        } else if live.is_closed() {
            self.look_for_end().await?;
            if self.ending.is_none() {
                self.live = None;
                self.behind = true;
            }
        } else {
            let before = self.shared.clock.monotonic();
            live.changed(POLL).await;
            if self.shared.clock.monotonic().saturating_sub(before) >= POLL {
                self.look_for_end().await?;
            }
        }
        Ok(None)
    }

    /// Frames from the position on. `None`: there are no more now; where the end is known, there never will be.
    async fn next_frames(&mut self) -> Result<Option<Vec<Frame>>, BackendError> {
        let engine = &self.shared.engine;
        loop {
            if let Some(live) = &self.live {
                let frames = live.take(self.position, BATCH);
                if !frames.is_empty() {
                    self.gap_tries = 0;
                    return Ok(Some(self.deliver(frames)));
                }
            }
            let end = self.ending.as_ref().and_then(Ending::log_end);
            if end.is_some_and(|end| self.position >= end) {
                return Ok(None);
            }
            let gap = self.live.as_ref().and_then(Live::next_offset).filter(|offset| *offset > self.position);
            if !self.behind && gap.is_none() {
                return Ok(end.map(|end| self.truncate(end, "the log's files end before")));
            }
            if matches!(self.ending, Some(Ending::Lost { .. })) {
                return Ok(None);
            }
            let read = self.files.read(engine, self.position).await.map_err(|source| {
                error::engine(format!("read the log of {}", self.workload.attempt), source)
            })?;
            match (read, gap) {
                (Read::Frames(frames), _) => {
                    self.gap_tries = 0;
                    return Ok(Some(self.deliver(frames)));
                }
                (Read::Nothing, None) => self.behind = false,
                // The copy of a frame may come before the file that has it can be seen.
                (Read::Nothing | Read::Broken(_), Some(_)) if self.gap_tries < GAP_TRIES => {
                    self.gap_tries += 1;
                    tokio::time::sleep(SHORT_POLL).await;
                }
                (Read::Nothing, Some(offset)) => {
                    return Ok(Some(self.truncate(offset, "the log's files do not have it")));
                }
                (Read::Broken(why), Some(offset)) => return Ok(Some(self.truncate(offset, &why))),
                (Read::Broken(why), None) => match end {
                    Some(end) => return Ok(Some(self.truncate(end, &why))),
                    None if self.ending.is_some() => {
                        tracing::warn!(attempt = %self.workload.attempt, why, "the end of a log cannot be read");
                        return Ok(None);
                    }
                    // It may be the half of a frame that the shim takes back.
                    None => {
                        tokio::time::sleep(SHORT_POLL).await;
                        return Ok(None);
                    }
                },
            }
        }
    }

    fn deliver(&mut self, frames: Vec<Frame>) -> Vec<Frame> {
        self.position = frames.last().map_or(self.position, Frame::end);
        frames
    }

    /// Says that what is before `end` is lost.
    fn truncate(&mut self, end: u64, why: &str) -> Vec<Frame> {
        let body =
            FrameBody::Truncated { dropped: end - self.position, reason: why.chars().take(200).collect() };
        let frame = Frame { offset: self.position, time: self.shared.clock.now(), body };
        self.deliver(vec![frame])
    }

    async fn input_bytes(&self) -> Result<u64, BackendError> {
        let known = self.workload.input_bytes.load(Ordering::Acquire);
        if known > 0
            || self.attempt.spec.inputs.is_empty()
            || matches!(self.ending, Some(Ending::Lost { .. }))
        {
            return Ok(known);
        }
        let staged: Option<StagedInputs> = self.shared.read_json(&self.workload.name, STAGED).await?;
        Ok(staged.map_or(0, |staged| staged.bytes))
    }

    /// Publishes, or finds it done. `None`: there is nothing to publish.
    async fn publish(&self) -> Result<Option<PublishRecord>, BackendError> {
        let Some(ending) = &self.ending else { return Ok(None) };
        // A container that is gone cannot be asked for any.
        let can_be_had = ending.may_have_outputs() && !matches!(ending, Ending::Lost { .. });
        if self.attempt.spec.outputs.is_empty() || !can_be_had {
            return Ok(None);
        }
        let mut published = self.workload.publishing.lock().await;
        if let Some(record) = published.as_ref() {
            return Ok(Some(record.clone()));
        }
        let record = self.shared.publish(&self.workload, &self.attempt, !ending.is_success()).await?;
        *published = Some(record.clone());
        Ok(Some(record))
    }
}
