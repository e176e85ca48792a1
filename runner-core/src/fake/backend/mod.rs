//! A backend in memory: executes scripted programs, obeys every rule of the [`Backend`] trait, fails on demand.
//!
//! What a real backend has on its substrate lives in a [`FakeSubstrate`]; a restart is a new [`FakeBackend`] over it.

mod script;
mod staging;
mod substrate;
#[cfg(test)]
mod tests;
mod workload;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::{StreamExt as _, stream, stream::BoxStream};

use self::workload::{Ending, PublishedOutputs, State, Workload};
pub use self::{
    script::Flood,
    substrate::{FakeSubstrate, Faults},
};
use crate::{
    artifact::ArtifactError,
    backend::{
        AttemptContext, Backend, BackendError, BackendErrorKind, EndedAttempt, Health, Observation,
        WorkloadInput, WorkloadRef,
    },
    capability::Capabilities,
    clock::{Clock, SystemClock, Timestamp},
    id::{AttemptId, BackendName},
    outcome::{Cause, Evidence, ExitStatus, Usage},
    task,
};

/// A backend in memory. Its programs are those of the [`script`] language.
#[derive(Debug)]
pub struct FakeBackend {
    name: BackendName,
    capabilities: Capabilities,
    slots: usize,
    substrate: FakeSubstrate,
    clock: Arc<dyn Clock>,
}

impl FakeBackend {
    /// A backend over a substrate. A second one over the same substrate is the first after a restart.
    pub fn over(name: BackendName, substrate: FakeSubstrate) -> Self {
        let capabilities = Capabilities {
            network_egress: false,
            ephemeral_storage_limit: false,
            gpus: false,
            secrets: false,
            extract: false,
            images: Some(vec!["fake".to_owned()]),
            ..Capabilities::all()
        };
        Self { name, capabilities, slots: 64, substrate, clock: Arc::new(SystemClock::new()) }
    }

    /// With other capabilities, for tests of admission.
    #[must_use]
    pub fn with_capabilities(mut self, capabilities: Capabilities) -> Self {
        self.capabilities = capabilities;
        self
    }

    /// With another number of slots.
    #[must_use]
    pub fn with_slots(mut self, slots: usize) -> Self {
        self.slots = slots;
        self
    }

    /// With another clock.
    #[must_use]
    pub fn with_clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// What it stands on.
    pub fn substrate(&self) -> &FakeSubstrate {
        &self.substrate
    }

    fn not_found(workload: &WorkloadRef) -> BackendError {
        BackendError::new(BackendErrorKind::NotFound, false, format!("find the workload {}", workload.native))
    }
}

#[async_trait]
impl Backend for FakeBackend {
    fn name(&self) -> &BackendName {
        &self.name
    }

    fn kind(&self) -> &'static str {
        "fake"
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities.clone()
    }

    fn slots(&self) -> usize {
        self.slots
    }

    async fn health(&self) -> Result<Health, BackendError> {
        Ok(match self.substrate.with_faults(|faults| faults.unhealthy.clone()) {
            Some(detail) => Health { healthy: false, detail },
            None => Health { healthy: true, detail: "in memory".to_owned() },
        })
    }

    fn workload_ref(&self, attempt: AttemptId) -> WorkloadRef {
        WorkloadRef { attempt, native: format!("fake-{attempt}") }
    }

    async fn ensure(&self, attempt: &AttemptContext) -> Result<WorkloadRef, BackendError> {
        let reference = self.workload_ref(attempt.attempt);
        let (fault, delay) =
            self.substrate.with_faults(|faults| (faults.ensure.pop_front(), faults.ensure_delay));
        if let Some((kind, retryable)) = fault {
            return Err(BackendError::new(kind, retryable, "make the workload: injected fault"));
        }
        let workload =
            self.substrate.find_or_create(&reference, attempt.spec.terminal.is_some(), attempt.spec.stdin);
        let _making = workload.making.lock().await;
        if workload.state().started.is_some() {
            return Ok(reference);
        }
        if let Some(delay) = delay {
            tokio::time::sleep(delay).await;
        }
        if !workload.state().staged {
            let files = staging::inputs(attempt).await?;
            workload.update(|state| {
                state.files = files;
                state.staged = true;
            });
        }
        let time = self.clock.now();
        workload.update(|state| {
            state.started = Some(time);
            state.processes = 1;
            state.size = attempt.spec.terminal.unwrap_or_default();
            state.stdin_ended = !attempt.spec.stdin && attempt.spec.terminal.is_none();
        });
        self.substrate.count_start(&reference);
        let execution = Arc::clone(&workload).execute(attempt.clone(), Arc::clone(&self.clock));
        // Not ended by anyone but itself: it is the substrate's, and outlives this backend.
        drop(task::spawn(task::TaskKind::Helper, "fake-workload", execution));
        if let Some((kind, retryable)) =
            self.substrate.with_faults(|faults| faults.ensure_after_start.pop_front())
        {
            return Err(BackendError::new(
                kind,
                retryable,
                "answer that the workload is made: injected fault",
            ));
        }
        Ok(reference)
    }

    fn observe(
        &self,
        attempt: &AttemptContext,
        cursor: u64,
    ) -> BoxStream<'static, Result<Observation, BackendError>> {
        let break_at = self.substrate.with_faults(|faults| faults.observe.pop_front());
        let observer = Observer {
            substrate: self.substrate.clone(),
            reference: self.workload_ref(attempt.attempt),
            attempt: attempt.clone(),
            clock: Arc::clone(&self.clock),
            cursor,
            break_at: break_at.map(|bytes| cursor.saturating_add(bytes)),
            step: Step::Started,
        };
        stream::unfold(observer, |mut observer| async move {
            let observation = observer.next().await?;
            Some((observation, observer))
        })
        .boxed()
    }

    async fn input(&self, workload: &WorkloadRef, input: WorkloadInput) -> Result<(), BackendError> {
        let found = self.substrate.find(workload).ok_or_else(|| Self::not_found(workload))?;
        let (terminal, stdin) = self.substrate.takes_input(workload);
        let wanted = match &input {
            WorkloadInput::Resize(_) => terminal,
            WorkloadInput::Stdin(_) | WorkloadInput::Eof => stdin || terminal,
        };
        let closed = found.update(|state| {
            if !wanted || state.started.is_none() || state.ended.is_some() {
                return true;
            }
            match input {
                WorkloadInput::Stdin(_) if state.stdin_ended => return true,
                WorkloadInput::Stdin(bytes) => state.stdin.push_back(bytes),
                WorkloadInput::Eof => state.stdin_ended = true,
                WorkloadInput::Resize(size) => state.size = size,
            }
            false
        });
        if closed {
            let context = format!("send input to {}: it takes none", workload.native);
            return Err(BackendError::new(BackendErrorKind::NotAttachable, false, context));
        }
        // Taken over once the program has read it, so that a sender is never ahead by more than one piece.
        found.wait(|state| (state.stdin.is_empty() || state.ended.is_some()).then_some(())).await;
        Ok(())
    }

    async fn release(&self, workload: &WorkloadRef, offset: u64) -> Result<(), BackendError> {
        if let Some(found) = self.substrate.find(workload) {
            found.update(|state| state.log.release(offset));
        }
        Ok(())
    }

    async fn stop(&self, workload: &WorkloadRef, grace: Duration) -> Result<(), BackendError> {
        let (fault, delay) =
            self.substrate.with_faults(|faults| (faults.stop.pop_front(), faults.stop_delay));
        if let Some((kind, retryable)) = fault {
            return Err(BackendError::new(kind, retryable, "stop the workload: injected fault"));
        }
        if let Some(delay) = delay {
            tokio::time::sleep(delay).await;
        }
        let Some(found) = self.substrate.find(workload) else { return Ok(()) };
        if found.state().started.is_none() {
            return Ok(());
        }
        found.ask_to_stop(grace);
        found.wait(|state| (state.ended.is_some() && state.processes == 0).then_some(())).await;
        Ok(())
    }

    async fn remove(&self, workload: &WorkloadRef) -> Result<(), BackendError> {
        if let Some((kind, retryable)) = self.substrate.with_faults(|faults| faults.remove.pop_front()) {
            return Err(BackendError::new(kind, retryable, "remove the workload: injected fault"));
        }
        if let Some(found) = self.substrate.find(workload) {
            let alive = found.state().started.is_some();
            if alive {
                found.ask_to_stop(Duration::ZERO);
                found.wait(|state| (state.ended.is_some() && state.processes == 0).then_some(())).await;
            }
        }
        self.substrate.forget(workload);
        Ok(())
    }

    async fn list(&self) -> Result<Vec<WorkloadRef>, BackendError> {
        if let Some((kind, retryable)) = self.substrate.with_faults(|faults| faults.list.pop_front()) {
            return Err(BackendError::new(kind, retryable, "list the workloads: injected fault"));
        }
        Ok(self.substrate.owned())
    }
}

/// Where an observation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Started,
    Frames,
    Publish,
    End,
    Over,
}

/// One observation. Holds nothing but a cursor: any number of them cost nothing to the workload.
struct Observer {
    substrate: FakeSubstrate,
    reference: WorkloadRef,
    attempt: AttemptContext,
    clock: Arc<dyn Clock>,
    cursor: u64,
    break_at: Option<u64>,
    step: Step,
}

impl Observer {
    async fn next(&mut self) -> Option<Result<Observation, BackendError>> {
        if self.step == Step::Over {
            return None;
        }
        let workload = match self.substrate.find(&self.reference) {
            Some(workload) if workload.state().started.is_some() => workload,
            found => {
                self.step = Step::Over;
                let seen = if found.is_some() { "was made, but never started" } else { "does not exist" };
                return Some(Ok(Observation::Ended(lost(&self.reference, seen, self.clock.now()))));
            }
        };
        let observed = self.step(&workload).await;
        if observed.is_err() {
            self.step = Step::Over;
        }
        Some(observed)
    }

    async fn step(&mut self, workload: &Workload) -> Result<Observation, BackendError> {
        if self.step == Step::Started {
            self.step = Step::Frames;
            let time = workload.state().started.unwrap_or_default();
            return Ok(Observation::Started { time });
        }
        if self.step == Step::Frames {
            if self.break_at.is_some_and(|at| self.cursor >= at) {
                let context = "observe the workload: injected fault";
                return Err(BackendError::new(BackendErrorKind::Substrate, true, context));
            }
            return self.frames(workload).await;
        }
        if self.step == Step::Publish {
            self.step = Step::End;
            if let Some(published) = self.publish(workload).await? {
                return Ok(Observation::Published { manifest: published.manifest });
            }
        }
        self.step = Step::Over;
        let state = workload.state();
        Ok(Observation::Ended(match &state.ended {
            Some(ending) => judge(&state, ending),
            // Publishing comes after the end, and an end is never taken back.
            None => lost(&self.reference, "has no end", self.clock.now()),
        }))
    }

    async fn frames(&mut self, workload: &Workload) -> Result<Observation, BackendError> {
        let cursor = self.cursor;
        if cursor < workload.state().log.start {
            let context = format!("read the log of {} from {cursor}: it was released", self.reference.native);
            return Err(BackendError::new(BackendErrorKind::Substrate, false, context));
        }
        let seen = workload
            .wait(|state| {
                if state.vanished {
                    return Some(Err(None));
                }
                let frames = state.log.read(cursor);
                if !frames.is_empty() {
                    return Some(Ok(frames));
                }
                state.ended.as_ref().map(|ending| Err(Some(ending.time)))
            })
            .await;
        match seen {
            Ok(frames) => {
                self.cursor = frames.last().map_or(cursor, crate::log::Frame::end);
                Ok(Observation::Frames(frames))
            }
            Err(Some(time)) => {
                self.step = Step::Publish;
                Ok(Observation::Exited { time })
            }
            Err(None) => {
                self.step = Step::Over;
                Ok(Observation::Ended(lost(&self.reference, "vanished", self.clock.now())))
            }
        }
    }

    /// Publishes, or finds it done. `None` where nothing was to be published.
    async fn publish(&self, workload: &Workload) -> Result<Option<PublishedOutputs>, BackendError> {
        if self.attempt.spec.outputs.is_empty() {
            return Ok(None);
        }
        let _publishing = workload.publishing.lock().await;
        let (done, files, ended) = {
            let state = workload.state();
            (state.published.clone(), state.files.clone(), state.ended)
        };
        if done.is_some() {
            return Ok(done);
        }
        let Some(ending) = ended else { return Ok(None) };
        let published = match staging::outputs(&self.attempt, &files, ending.cause, ending.status).await {
            Ok(published) => published,
            Err(error) if error.kind.retryable() => return Err(output_failed(error)),
            Err(error) => PublishedOutputs {
                manifest: Default::default(),
                fault: Some(output_failed(error).chain()),
                retryable: false,
            },
        };
        workload.update(|state| state.published = Some(published.clone()));
        Ok(Some(published))
    }
}

fn output_failed(error: ArtifactError) -> BackendError {
    BackendError::with_source(BackendErrorKind::Output, error.kind.retryable(), "store the outputs", error)
}

fn judge(state: &State, ending: &Ending) -> EndedAttempt {
    let published = state.published.as_ref();
    let (cause, retryable, message) = match published.and_then(|published| published.fault.clone()) {
        Some(fault) => (Cause::Output, published.is_some_and(|published| published.retryable), fault),
        None => (ending.cause, ending.cause.retryable_by_default(), describe(ending)),
    };
    EndedAttempt {
        cause,
        status: Some(ending.status),
        retryable,
        evidence: vec![Evidence { source: "fake".to_owned(), detail: describe(ending), time: ending.time }],
        message,
        usage: Usage {
            wall: ending.wall,
            output_bytes: published.map_or(0, |published| published.manifest.total_bytes),
            log_bytes: state.log.end,
            ..Usage::default()
        },
        outputs: published.map(|published| published.manifest.clone()),
    }
}

fn describe(ending: &Ending) -> String {
    let how = match ending.status {
        ExitStatus::Code(code) => format!("exit code {code}"),
        ExitStatus::Signal(signal) => format!("signal {signal}"),
    };
    format!("the program ended with {how}, cause {}", ending.cause.as_str())
}

fn lost(reference: &WorkloadRef, seen: &str, time: Timestamp) -> EndedAttempt {
    let message = format!("the workload {} {seen}", reference.native);
    EndedAttempt {
        cause: Cause::Lost,
        status: None,
        retryable: Cause::Lost.retryable_by_default(),
        evidence: vec![Evidence { source: "fake".to_owned(), detail: message.clone(), time }],
        message,
        usage: Usage::default(),
        outputs: None,
    }
}
