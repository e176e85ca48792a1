//! What the agent beside a program answers.

use std::{
    fs, io,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use runner_core::{
    backend::{NoProgress, chain},
    clock::{Clock as _, SystemClock},
    log::codec,
};
use runner_proto::agent::{self as wire, answer, ask};

use super::{Pod, client::Service, direct::Direct, fetch::STAGED, store::RemoteStore};
use crate::{
    exec::{
        client::{self, ControlError, SpoolReader},
        protocol::{ControlReply, ControlRequest, ShimRecord, name},
        record,
    },
    staging::{MountPlan, OutputPublishing, Root, StagedInputs, publish_outputs},
};

/// How often a growing file is looked at: at first, and when nothing came for long.
const FIRST_LOOK: Duration = Duration::from_millis(5);
const SLOWEST_LOOK: Duration = Duration::from_millis(50);
/// Beyond the grace: how long a shim may take to end its tree and write down how it ended.
const BOUND: Duration = Duration::from_secs(10);
/// How long a shim that was just started may take to serve its socket.
const BEGINNING: Duration = Duration::from_secs(5);
/// How long a shim may take to take a stop over.
const STOP_DEADLINE: Duration = Duration::from_secs(5);
/// Readers of the log that are kept where they are.
const READERS: usize = 8;
/// Name of the mark that the program was never started and never will be, in the shim's directory.
const STOPPED: &str = "stopped";

/// Answers for one program. Everything that it knows lies in files.
#[derive(Debug)]
pub(super) struct Answerer {
    service: Service,
    /// The shim's directory.
    dir: PathBuf,
    pod: Pod,
    clock: SystemClock,
    readers: Mutex<Vec<SpoolReader>>,
    publishing: tokio::sync::Mutex<()>,
    /// The way past the service, once it is known whether there is one.
    direct: OnceLock<Option<Arc<Direct>>>,
}

fn failed(message: impl Into<String>, retryable: bool) -> answer::Body {
    answer::Body::Failed(wire::Failed { message: message.into(), retryable })
}

impl Answerer {
    pub(super) fn new(service: Service, pod: &Pod) -> Arc<Self> {
        Arc::new(Self {
            service,
            dir: pod.shim.clone(),
            pod: pod.clone(),
            clock: SystemClock::new(),
            readers: Mutex::default(),
            publishing: tokio::sync::Mutex::default(),
            direct: OnceLock::new(),
        })
    }

    pub(super) async fn answer(&self, body: ask::Body) -> answer::Body {
        let millis = |patience: u32| Duration::from_millis(patience.into());
        match body {
            ask::Body::State(wire::StateAsk { patience_ms }) => self.state_within(millis(patience_ms)).await,
            ask::Body::Log(wire::LogAsk { offset, patience_ms }) => {
                self.log(offset, millis(patience_ms)).await
            }
            ask::Body::Control(wire::ControlAsk { request, patience_ms }) => {
                match serde_json::from_slice(&request) {
                    Ok(request) => self.control(request, millis(patience_ms)).await,
                    Err(error) => failed(format!("a request that is none: {error}"), false),
                }
            }
            ask::Body::Stop(wire::StopAsk { grace_ms }) => self.stop(Duration::from_millis(grace_ms)).await,
            ask::Body::Publish(wire::PublishAsk { partial }) => self.publish(partial).await,
            ask::Body::Finish(wire::FinishAsk {}) => answer::Body::Finished(wire::Finished {}),
        }
    }

    fn state(&self) -> Result<wire::State, record::RecordError> {
        let started = client::started(&self.dir)?;
        let exit = client::exit(&self.dir)?;
        let exit_record =
            exit.and_then(|exit| serde_json::to_vec(&exit).ok()).map(Bytes::from).unwrap_or_default();
        let stopped = fs::read_to_string(self.dir.join(STOPPED)).ok();
        let staged: Option<StagedInputs> =
            fs::read(self.pod.bin.join(STAGED)).ok().and_then(|staged| serde_json::from_slice(&staged).ok());
        Ok(wire::State {
            started_micros: started.map(|started| started.time.as_micros()),
            exit_record,
            shim_errors: client::shim_errors(&self.dir),
            input_bytes: staged.map_or(0, |staged| staged.bytes),
            stopped_micros: stopped.and_then(|time| time.trim().parse().ok()),
        })
    }

    fn has_ended(state: &wire::State) -> bool {
        !state.exit_record.is_empty() || state.stopped_micros.is_some()
    }

    async fn state_within(&self, patience: Duration) -> answer::Body {
        let begun = self.clock.monotonic();
        let mut pause = FIRST_LOOK;
        loop {
            match self.state() {
                Ok(state) if Self::has_ended(&state) || self.clock.monotonic() - begun >= patience => {
                    return answer::Body::State(state);
                }
                Ok(_) => {}
                Err(error) => return failed(error.to_string(), false),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(SLOWEST_LOOK);
        }
    }

    /// A reader that is there already, so that a log is not looked through from a file's beginning each time.
    fn reader(&self, offset: u64) -> SpoolReader {
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        let at = readers.iter().position(|reader| reader.position() == offset);
        at.map_or_else(|| SpoolReader::open(&self.dir, offset), |at| readers.swap_remove(at))
    }

    fn keep(&self, reader: SpoolReader) {
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        if readers.len() >= READERS {
            readers.remove(0);
        }
        readers.push(reader);
    }

    async fn log(&self, offset: u64, patience: Duration) -> answer::Body {
        let begun = self.clock.monotonic();
        let mut pause = FIRST_LOOK;
        let mut reader = self.reader(offset);
        loop {
            // In this order: where the end is known before the spool is read, an empty read is its end.
            let state = match self.state() {
                Ok(state) => state,
                Err(error) => return failed(error.to_string(), false),
            };
            let frames = match reader.read() {
                Ok(frames) => frames,
                Err(error) => return failed(error.to_string(), false),
            };
            let patient = self.clock.monotonic() - begun < patience;
            if frames.is_empty() && !Self::has_ended(&state) && patient {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(SLOWEST_LOOK);
                continue;
            }
            let mut stored = Vec::new();
            for frame in &frames {
                codec::encode(frame, &mut stored);
            }
            self.keep(reader);
            return answer::Body::Log(wire::Log { state: Some(state), frames: stored.into() });
        }
    }

    /// Asks the shim. `None`: none serves.
    async fn ask_shim(
        &self,
        request: ControlRequest,
        patience: Duration,
    ) -> Result<Option<ControlReply>, ControlError> {
        let dir = self.dir.clone();
        let asked = tokio::task::spawn_blocking(move || client::control(&dir, &request, patience)).await;
        match asked.map_err(|error| ControlError::Io(io::Error::other(error)))? {
            Ok(reply) => Ok(Some(reply)),
            Err(ControlError::Gone) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn control(&self, request: ControlRequest, patience: Duration) -> answer::Body {
        let reply = match self.ask_shim(request, patience).await {
            Ok(reply) => reply.and_then(|reply| serde_json::to_vec(&reply).ok()),
            Err(error) => return failed(error.to_string(), false),
        };
        answer::Body::Control(wire::Control { reply: reply.unwrap_or_default().into() })
    }

    async fn stop(&self, grace: Duration) -> answer::Body {
        let stopped = |dead| answer::Body::Stopped(wire::Stopped { dead });
        let begun = self.clock.monotonic();
        loop {
            match self.state() {
                Ok(state) if Self::has_ended(&state) => return stopped(true),
                Ok(_) => {}
                Err(error) => return failed(error.to_string(), false),
            }
            let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
            match self.ask_shim(ControlRequest::Stop { grace_ms }, STOP_DEADLINE).await {
                Ok(Some(ControlReply::Ok)) => {
                    // The record is written when every process is dead.
                    let answer = self.state_within(grace.saturating_add(BOUND)).await;
                    return stopped(matches!(&answer, answer::Body::State(state) if Self::has_ended(state)));
                }
                Ok(Some(ControlReply::Refused(why))) => {
                    tracing::warn!(why, "the shim refuses to stop its program");
                    return stopped(false);
                }
                Err(error) => {
                    tracing::warn!(%error, "the shim does not take a stop");
                    return stopped(false);
                }
                // Not begun, beginning, or ending.
                Ok(None) => match self.forbid() {
                    Ok(true) => return stopped(true),
                    Ok(false) if self.clock.monotonic() - begun < BEGINNING => {
                        tokio::time::sleep(FIRST_LOOK).await;
                    }
                    Ok(false) => return stopped(false),
                    Err(error) => return failed(error.to_string(), false),
                },
            }
        }
    }

    /// Takes the place of a shim that has not begun, so that it never will. `false`: one has begun.
    fn forbid(&self) -> Result<bool, record::RecordError> {
        let nobody = ShimRecord { pid: 0, start_ticks: 0, boot_id: String::new() };
        if !record::write_first(&self.dir, name::SHIM, &nobody)? {
            return Ok(false);
        }
        record::write(&self.dir, STOPPED, &self.clock.now().as_micros())?;
        Ok(true)
    }

    async fn publish(&self, partial: bool) -> answer::Body {
        let published = |failure: Option<(String, bool)>, notes, stored| {
            let (failure, retryable) = failure.unwrap_or_default();
            answer::Body::Published(wire::Published { failure, retryable, notes, stored })
        };
        let _one = self.publishing.lock().await;
        let described = match self.service.describe().await {
            Ok(described) => described,
            Err(error) => return failed(error.to_string(), true),
        };
        let direct = self.direct.get_or_init(|| described.way_past(&self.service)).clone();
        let order = described.order;
        let plan = match MountPlan::new(&order.spec) {
            Ok(plan) => plan,
            Err(error) => return failed(error.to_string(), false),
        };
        let root = match Root::open(&self.pod.stage) {
            Ok(root) => root,
            Err(error) => return failed(format!("open the stage: {error}"), false),
        };
        let store = RemoteStore { service: self.service.clone(), direct };
        let job = OutputPublishing {
            spec: &order.spec,
            plan: &plan,
            root: &root,
            attempt_prefix: &order.attempt_prefix(),
            artifacts: &store,
            partial,
            limits: &order.limits,
            progress: &NoProgress,
        };
        match publish_outputs(job).await {
            Ok(done) => {
                let failure = done.failure.map(|error| (chain(&error), error.kind.retryable()));
                published(failure, done.notes, true)
            }
            Err(error) if error.kind.retryable() => failed(chain(&error), true),
            Err(error) => published(Some((chain(&error), false)), Vec::new(), false),
        }
    }
}
