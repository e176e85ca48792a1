//! Following an attempt: its start, its log, its end, its outputs, the judgement.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt as _, stream, stream::BoxStream};
use runner_agent::{
    backend::{Counted, Ending, PublishRecord, judge},
    exec::client::{self, SpoolReader},
    staging::{MountPlan, OutputPublishing, Root, StagedInputs, publish_outputs},
};
use runner_core::{
    artifact::ArtifactKey,
    backend::{AttemptContext, BackendError, Observation},
    clock::Timestamp,
};
use tokio::sync::watch;

use crate::{
    attempt_dir::read,
    backend::{Shared, blocking},
    convert, error,
    logs::spool_failed,
    stop::{claim, is_nobody, prove_dead},
    watch::Watched,
    workload::{ShimState, Workload},
};

/// The slow poll behind the watched directory, for what no event tells.
const POLL: Duration = Duration::from_millis(500);
/// How long a shim that an earlier process started may take to write who it is.
const SHIM_DEADLINE: Duration = Duration::from_secs(5);

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

/// One observation. Holds an offset, an open file and a place in the watcher; any number of them cost the program nothing.
struct Observer {
    shared: Arc<Shared>,
    workload: Arc<Workload>,
    attempt: AttemptContext,
    log: SpoolReader,
    changes: watch::Receiver<()>,
    watched: Option<Arc<Watched>>,
    ending: Option<Ending>,
    /// Since when a specification without a shim is seen.
    unclaimed: Option<Duration>,
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
        log: SpoolReader::open(workload.dir.path(), cursor),
        changes: workload.signal.subscribe(),
        watched: None,
        ending: None,
        unclaimed: None,
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
        if !self.workload.dir.exists() {
            self.shared.workloads.forget(&self.workload);
        }
    }
}

impl Observer {
    async fn next(&mut self) -> Option<Result<Observation, BackendError>> {
        if matches!(self.step, Step::Over) {
            return None;
        }
        let seen = self.advance().await;
        if seen.is_err() {
            self.step = Step::Over;
        }
        Some(seen)
    }

    async fn advance(&mut self) -> Result<Observation, BackendError> {
        loop {
            // Whatever changes after this line is seen by the look below, or wakes the wait behind it.
            self.changes.borrow_and_update();
            match std::mem::replace(&mut self.step, Step::Over) {
                Step::Begin => {
                    self.watch();
                    let started = client::started(self.workload.dir.path())
                        .map_err(|source| error::substrate("read when the program was started", source))?;
                    if let Some(started) = started {
                        self.step = Step::Log { ran: true };
                        return Ok(Observation::Started { time: started.time });
                    }
                    self.step = if self.look_for_end().await? {
                        // The start may have been written since, right before the end.
                        if self.workload.dir.started().exists() {
                            Step::Begin
                        } else {
                            Step::Log { ran: false }
                        }
                    } else {
                        self.wait().await;
                        Step::Begin
                    };
                }
                Step::Log { ran } => {
                    // In this order: where the end is known before the spool is read, an empty read is its end.
                    let over = self.look_for_end().await?;
                    let frames = self
                        .log
                        .read()
                        .map_err(|source| spool_failed(self.workload.attempt, "read the log", source))?;
                    if !frames.is_empty() {
                        self.step = Step::Log { ran };
                        return Ok(Observation::Frames(frames));
                    }
                    if !over {
                        self.wait().await;
                        self.step = Step::Log { ran };
                        continue;
                    }
                    self.step = Step::Publish;
                    if let Some(Ending::Recorded { record, .. }) = &self.ending
                        && ran
                    {
                        return Ok(Observation::Exited { time: record.time });
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
                    let staged: Option<StagedInputs> =
                        read(&self.workload.dir.staged()).unwrap_or_else(|error| {
                            tracing::warn!(attempt = %self.workload.attempt, %error, "read what was staged");
                            None
                        });
                    let counted = Counted {
                        input_bytes: staged.map_or(0, |staged| staged.bytes),
                        log_bytes: self.log.position(),
                    };
                    let ending =
                        self.ending.take().unwrap_or_else(|| self.lost("backend", "no end was seen"));
                    return Ok(Observation::Ended(judge(ending, counted, published)));
                }
                Step::Over => return Err(error::substrate("observe", "the observation is over")),
            }
        }
    }

    /// Watches the directory once it is there. Without it the slow poll remains.
    fn watch(&mut self) {
        if self.watched.is_some() || !self.workload.dir.exists() {
            return;
        }
        match self.workload.watch(&self.shared.watcher) {
            Ok(watched) => self.watched = Some(watched),
            Err(error) => {
                tracing::warn!(attempt = %self.workload.attempt, %error, "watch the attempt's directory");
            }
        }
    }

    async fn wait(&mut self) {
        // The sender lives as long as the workload, so a change is all that ends it early.
        let _ = tokio::time::timeout(POLL, self.changes.changed()).await;
    }

    fn lost(&self, source: &'static str, detail: impl Into<String>) -> Ending {
        Ending::Lost { seen: vec![(source, detail.into())], time: self.shared.clock.now() }
    }

    /// Whether the end is known. Only from evidence.
    async fn look_for_end(&mut self) -> Result<bool, BackendError> {
        if self.ending.is_none() {
            self.ending = self.find_end().await?;
        }
        Ok(self.ending.is_some())
    }

    async fn find_end(&mut self) -> Result<Option<Ending>, BackendError> {
        if let Some(ending) = self.recorded_end() {
            return Ok(Some(ending));
        }
        match self.workload.shim()? {
            ShimState::Alive(_) => Ok(None),
            ShimState::Dead => self.end_of_dead_shim().await.map(Some),
            ShimState::None => self.end_without_shim(),
        }
    }

    fn recorded_end(&self) -> Option<Ending> {
        match client::exit(self.workload.dir.path()) {
            Ok(record) => record.map(Ending::recorded),
            // It will not get better, and says nothing of how the program ended.
            Err(error) => Some(self.lost("exit record", error.to_string())),
        }
    }

    async fn end_of_dead_shim(&self) -> Result<Ending, BackendError> {
        let dir = &self.workload.dir;
        // Written right before its death, after the look that found none.
        if let Some(ending) = self.recorded_end() {
            return Ok(ending);
        }
        let began = match self.workload.recorded_shim()? {
            Some(record) => !is_nobody(&record),
            // It touched nothing, and with our claim no other will.
            None if claim(&self.workload)? => false,
            // Ours died without a claim, and another one has it: one that was started before a restart.
            None => return Ok(self.lost("shim", "two shims were started")),
        };
        prove_dead(&self.workload).await?;
        if let Some(time) = self.stopped()? {
            return Ok(Ending::Stopped { time, started: dir.started().exists() });
        }
        let mut seen = vec![(
            "shim",
            if began {
                "it died without an exit record; nothing of its tree is alive".to_owned()
            } else {
                "it died before it began".to_owned()
            },
        )];
        seen.extend(self.workload.how_it_died().map(|how| ("shim", how)));
        let workload = Arc::clone(&self.workload);
        let said =
            blocking("read the shim's errors", move || client::shim_errors(workload.dir.path())).await?;
        if !said.is_empty() {
            seen.push(("shim errors", said));
        }
        let time = self.shared.clock.now();
        Ok(if began { Ending::Lost { seen, time } } else { Ending::NeverBegan { seen, time } })
    }

    /// There never was a shim: an attempt in the making, a stopped one, or one that nobody makes any more.
    fn end_without_shim(&mut self) -> Result<Option<Ending>, BackendError> {
        let workload = Arc::clone(&self.workload);
        let Ok(_making) = workload.verbs.try_lock() else { return Ok(None) };
        // Looked at again, now that nobody makes it: it may have got its shim since.
        if !matches!(workload.shim()?, ShimState::None) {
            return Ok(None);
        }
        let dir = &workload.dir;
        if !dir.exists() {
            return Ok(Some(self.lost("directory", format!("{} does not exist", dir.path().display()))));
        }
        if let Some(time) = self.stopped()? {
            return Ok(Some(Ending::Stopped { time, started: false }));
        }
        if !dir.exec().exists() {
            return Ok(Some(
                self.lost("directory", "the inputs were never completely staged, and nobody stages them"),
            ));
        }
        let now = self.shared.clock.monotonic();
        let since = *self.unclaimed.get_or_insert(now);
        if now.saturating_sub(since) < SHIM_DEADLINE || !claim(&workload)? {
            return Ok(None);
        }
        Ok(Some(self.lost("shim", format!("none began within {SHIM_DEADLINE:?}"))))
    }

    fn stopped(&self) -> Result<Option<Timestamp>, BackendError> {
        let path = self.workload.dir.stopped();
        read(&path).map_err(|source| error::file("read", &path, source))
    }

    /// Publishes, or finds it done. `None`: there is nothing to publish.
    async fn publish(&self) -> Result<Option<PublishRecord>, BackendError> {
        let Some(ending) = &self.ending else { return Ok(None) };
        let dir = &self.workload.dir;
        if self.attempt.spec.outputs.is_empty() || !ending.may_have_outputs() || !dir.exists() {
            return Ok(None);
        }
        let _publishing = self.workload.publishing.lock().await;
        let recorded: Option<PublishRecord> =
            read(&dir.published()).map_err(|source| error::file("read", &dir.published(), source))?;
        if recorded.is_some() {
            return Ok(recorded);
        }
        let plan = convert::mount_plan(&self.attempt.spec)?;
        let record = match self.store_outputs(&plan, !ending.is_success()).await {
            Ok(record) => return Ok(Some(record)),
            // The outputs are still there: observing again publishes again.
            Err(error) if error.retryable => return Err(error),
            Err(error) => PublishRecord::failed(&error),
        };
        // What was stored is found again in the store. That it cannot be stored has to be kept here.
        dir.write(&dir.published(), &record)
            .map_err(|source| error::file("record the publishing in", dir.path(), source))?;
        Ok(Some(record))
    }

    async fn store_outputs(&self, plan: &MountPlan, partial: bool) -> Result<PublishRecord, BackendError> {
        let path = self.workload.dir.path();
        let root = Root::open(path).map_err(|source| error::file("open", path, source))?;
        let job = OutputPublishing {
            spec: &self.attempt.spec,
            plan,
            root: &root,
            attempt_prefix: &ArtifactKey::attempt_prefix(&self.attempt.tenant, self.attempt.attempt),
            artifacts: self.attempt.artifacts.as_ref(),
            partial,
            limits: &self.shared.staging,
            progress: self.attempt.progress.as_ref(),
        };
        publish_outputs(job).await.map(PublishRecord::from).map_err(BackendError::from)
    }
}
