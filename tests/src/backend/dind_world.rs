//! A Docker backend on an engine of a test's own, for what is done to engines and containers.

use std::sync::Arc;

use backend_dind::{DindBackend, DindConfig};
use futures::StreamExt as _;
use runner_core::{
    artifact::{ArtifactStore, Manifest},
    backend::{AttemptContext, Backend as _, EndedAttempt, NoProgress, Observation},
    clock::{IdGen as _, SystemIds},
    id::AttemptId,
    limits::Limits,
    log::{FrameBody, LogStream},
    spec::RunSpec,
    task::{TaskKind, spawn},
};
use tempfile::TempDir;
use tokio::sync::mpsc;

use super::{
    bench::{MARK, within},
    dind::{self, IMAGE},
    local::command,
    program::Program,
    store::GatedStore,
};
use crate::{
    docker::{self, Engine, EngineOptions, TestImage},
    proc,
};

/// A backend on an engine of its own.
#[derive(Debug)]
pub struct World {
    /// The engine.
    pub engine: Engine,
    /// The backend.
    pub backend: Arc<DindBackend>,
    /// What its attempts read and write.
    pub store: Arc<GatedStore>,
    _dir: TempDir,
}

impl World {
    /// Makes one, with changes of the backend's settings; or skips `test` visibly.
    ///
    /// # Panics
    /// Where an engine is required and missing, or does not come up.
    pub async fn make(
        test: &'static str,
        options: EngineOptions,
        change: impl FnOnce(&Engine, &mut DindConfig),
    ) -> Option<Self> {
        let starting = move || docker::start_or_skip(test, options);
        let engine = tokio::task::spawn_blocking(starting).await.expect("start an engine")?;
        TestImage::busybox().load(&engine.connect(), IMAGE).await;
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut config = dind::config(&engine);
        change(&engine, &mut config);
        let backend = Arc::new(dind::open(config, dir.path(), "world").await);
        Some(Self { engine, backend, store: Arc::default(), _dir: dir })
    }

    /// An attempt that executes `program`, with changes of its spec.
    ///
    /// # Panics
    /// Never.
    pub fn attempt(&self, program: &Program, change: impl FnOnce(&mut RunSpec)) -> AttemptContext {
        let attempt = AttemptId { run: SystemIds.run_id(), number: 1 };
        let mut spec = RunSpec { image: Some(IMAGE.into()), command: command(program), ..RunSpec::default() };
        spec.env.insert(MARK.to_owned(), attempt.to_string());
        change(&mut spec);
        AttemptContext {
            attempt,
            tenant: "world".parse().expect("a valid tenant"),
            spec: Arc::new(Limits::default().apply(spec, &self.backend.capabilities())),
            log_limit_bytes: 1 << 30,
            artifacts: Arc::clone(&self.store) as Arc<dyn ArtifactStore>,
            progress: Arc::new(NoProgress),
        }
    }

    /// Makes the attempt's workload.
    ///
    /// # Panics
    /// Where that fails.
    pub async fn ensure(&self, attempt: &AttemptContext) {
        within("ensure", self.backend.ensure(attempt)).await.expect("ensure");
    }

    /// Name of the attempt's container.
    pub fn name(&self, attempt: &AttemptContext) -> String {
        self.backend.workload_ref(attempt.attempt).native
    }

    /// Observes from the beginning, in a task of its own.
    pub fn follow(&self, attempt: &AttemptContext) -> Followed {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut stream = self.backend.observe(attempt, 0);
        let following = async move {
            while let Some(seen) = stream.next().await {
                if sender.send(seen.map_err(|error| error.chain())).is_err() {
                    return;
                }
            }
        };
        drop(spawn(TaskKind::Helper, "test.follow", following));
        Followed { receiver, out: Vec::new(), end: 0, manifest: None }
    }

    /// Stops the workload at once and removes it.
    ///
    /// # Panics
    /// Where that fails, or something stays.
    pub async fn stop_and_remove(&self, attempt: &AttemptContext) {
        let reference = self.backend.workload_ref(attempt.attempt);
        within("stop", self.backend.stop(&reference, std::time::Duration::ZERO)).await.expect("stop");
        self.remove(attempt).await;
    }

    /// Removes the workload.
    ///
    /// # Panics
    /// Where that fails, or something stays.
    pub async fn remove(&self, attempt: &AttemptContext) {
        let reference = self.backend.workload_ref(attempt.attempt);
        within("remove", self.backend.remove(&reference)).await.expect("remove");
        assert_eq!(proc::with_environment(MARK, &attempt.attempt.to_string()), Vec::<String>::new());
        let listed = within("list", self.backend.list()).await.expect("list");
        assert!(!listed.contains(&reference), "it is gone: {listed:?}");
    }

    /// Does to the engine what blocks.
    pub async fn on_engine(&self, work: impl FnOnce(&Engine)) {
        tokio::task::block_in_place(|| work(&self.engine));
        // Whoever waits for the engine gets a turn.
        tokio::task::yield_now().await;
    }
}

/// What an observation yielded so far.
#[derive(Debug)]
pub struct Followed {
    receiver: mpsc::UnboundedReceiver<Result<Observation, String>>,
    /// Standard output.
    pub out: Vec<u8>,
    end: u64,
    /// The outputs, once they are published.
    pub manifest: Option<Manifest>,
}

impl Followed {
    /// Takes the next observation. The log goes on exactly where it was.
    async fn next(&mut self) -> Option<EndedAttempt> {
        let seen = within("observe", self.receiver.recv()).await.expect("it has no end");
        match seen.expect("the observation goes on") {
            Observation::Frames(frames) => {
                for frame in frames {
                    assert_eq!(frame.offset, self.end, "contiguous");
                    self.end = frame.end();
                    match frame.body {
                        FrameBody::Data { stream: LogStream::Stdout, bytes } => {
                            self.out.extend_from_slice(&bytes);
                        }
                        FrameBody::Data { .. } => {}
                        FrameBody::Truncated { dropped, reason } => {
                            panic!("{dropped} bytes dropped: {reason}")
                        }
                    }
                }
            }
            Observation::Published { manifest } => self.manifest = Some(manifest),
            Observation::Ended(ended) => return Some(ended),
            Observation::Started { .. } | Observation::Exited { .. } => {}
        }
        None
    }

    /// Waits until standard output contains `text`.
    ///
    /// # Panics
    /// Where it ends without.
    pub async fn until(&mut self, text: &str) {
        while !self.text().contains(text) {
            let ended = self.next().await;
            assert!(ended.is_none(), "it ended without {text:?}: {ended:?}");
        }
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// Where the observation fails.
    pub async fn until_end(&mut self) -> EndedAttempt {
        loop {
            if let Some(ended) = self.next().await {
                return ended;
            }
        }
    }

    /// Standard output so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }
}
