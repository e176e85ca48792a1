//! A local backend over a directory of its own, and a look at it from outside.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, OnceLock},
    time::Duration,
};

use backend_local::{LocalBackend, LocalConfig, LocalParts};
use futures::StreamExt as _;
use runner_agent::{exec::client, staging::StagingLimits};
use runner_core::{
    artifact::Manifest,
    backend::{AttemptContext, Backend, EndedAttempt, NoProgress, Observation},
    clock::{IdGen as _, SystemClock, SystemIds},
    fake::artifact::MemoryArtifacts,
    id::AttemptId,
    log::FrameBody,
    spec::RunSpec,
};
use rustix::process::{Pid, Signal};

pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// A spec that lets `sh` execute a script.
pub(crate) fn shell(script: &str) -> RunSpec {
    RunSpec { command: vec!["sh".into(), "-c".into(), script.into()], ..RunSpec::default() }
}

/// Waits until something holds.
pub(crate) async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, wait)
        .await
        .unwrap_or_else(|_| panic!("{what} did not come in {DEADLINE:?}"));
}

/// What an observation came to.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) started: bool,
    pub(crate) log: String,
    pub(crate) published: Option<Manifest>,
    pub(crate) ended: EndedAttempt,
}

/// The world of one test. Dropping it kills what a failed test left.
#[derive(Debug)]
pub(crate) struct World {
    dir: tempfile::TempDir,
    agent: PathBuf,
    backend: Option<Arc<LocalBackend>>,
    pub(crate) artifacts: Arc<MemoryArtifacts>,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::over(tempfile::tempdir().unwrap(), real_agent()).await
    }

    /// A world whose agent probes as the real one does, and executes this script in place of a program.
    pub(crate) async fn with_agent(script: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let agent = dir.path().join("agent");
        let real = real_agent();
        let text = format!(
            "#!/bin/sh\nif [ \"$1\" = probe ]; then exec '{}' \"$@\"; fi\n{script}\n",
            real.display()
        );
        fs::write(&agent, text).unwrap();
        fs::set_permissions(&agent, fs::Permissions::from_mode(0o755)).unwrap();
        Self::over(dir, agent).await
    }

    async fn over(dir: tempfile::TempDir, agent: PathBuf) -> Self {
        fs::create_dir(dir.path().join("data")).unwrap();
        let mut world = Self { dir, agent, backend: None, artifacts: Arc::new(MemoryArtifacts::new()) };
        world.reopen().await;
        world
    }

    pub(crate) fn use_real_agent(&mut self) {
        self.agent = real_agent();
    }

    /// A restart, as far as one process can have it: nothing of the old value is left.
    pub(crate) async fn reopen(&mut self) {
        if let Some(before) = self.backend.take() {
            assert!(Arc::into_inner(before).is_some(), "nobody else holds the backend");
        }
        let parts = LocalParts {
            config: LocalConfig { agent: Some(self.agent.clone()), ..LocalConfig::default() },
            data_dir: self.dir.path().join("data"),
            instance: "test".to_owned(),
            clock: Arc::new(SystemClock::new()),
            staging: StagingLimits::default(),
        };
        self.backend = Some(Arc::new(LocalBackend::open(parts).await.unwrap()));
    }

    pub(crate) fn backend(&self) -> Arc<LocalBackend> {
        Arc::clone(self.backend.as_ref().unwrap())
    }

    pub(crate) fn base(&self) -> PathBuf {
        self.dir.path().join("data/local")
    }

    pub(crate) fn dir(&self, attempt: &AttemptContext) -> PathBuf {
        self.base().join(attempt.attempt.to_string())
    }

    pub(crate) fn attempt(&self, mut spec: RunSpec, change: impl FnOnce(&mut RunSpec)) -> AttemptContext {
        change(&mut spec);
        AttemptContext {
            attempt: AttemptId { run: SystemIds.run_id(), number: 1 },
            tenant: "default".parse().unwrap(),
            spec: Arc::new(spec),
            log_limit_bytes: 1 << 30,
            artifacts: Arc::<MemoryArtifacts>::clone(&self.artifacts),
            progress: Arc::new(NoProgress),
        }
    }

    /// Observes from the beginning to the end.
    pub(crate) async fn observe(&self, attempt: &AttemptContext) -> Seen {
        let mut stream = self.backend().observe(attempt, 0);
        let (mut started, mut log, mut published) = (false, Vec::new(), None);
        let follow = async {
            while let Some(seen) = stream.next().await {
                match seen.unwrap_or_else(|error| panic!("{}", error.chain())) {
                    Observation::Started { .. } => started = true,
                    Observation::Frames(frames) => {
                        for frame in frames {
                            assert_eq!(frame.offset, log.len() as u64);
                            match frame.body {
                                FrameBody::Data { bytes, .. } => log.extend_from_slice(&bytes),
                                FrameBody::Truncated { .. } => panic!("nothing is dropped here"),
                            }
                        }
                    }
                    Observation::Exited { .. } => {}
                    Observation::Published { manifest } => published = Some(manifest),
                    Observation::Ended(ended) => return ended,
                }
            }
            panic!("the observation stopped without an end");
        };
        let ended = tokio::time::timeout(DEADLINE, follow).await.expect("an end in time");
        Seen { started, log: String::from_utf8(log).unwrap(), published, ended }
    }

    /// How many processes carry the attempt's id in their environment.
    pub(crate) fn processes(&self, attempt: &AttemptContext) -> usize {
        let wanted = format!("RUNNER_RUN_ID={}", attempt.attempt.run);
        let mark = |entry: fs::DirEntry| fs::read(entry.path().join("environ")).unwrap_or_default();
        fs::read_dir("/proc")
            .unwrap()
            .filter_map(Result::ok)
            .filter(|entry| entry.file_name().to_str().is_some_and(|name| name.parse::<u32>().is_ok()))
            .filter(|entry| !is_zombie(&entry.path()))
            .map(mark)
            .filter(|environ| environ.split(|byte| *byte == 0).any(|line| line == wanted.as_bytes()))
            .count()
    }

    fn signal_shim(&self, attempt: &AttemptContext, signal: Signal) {
        let record = client::shim(&self.dir(attempt)).unwrap().expect("a shim began");
        assert!(client::is_alive(&record).unwrap());
        rustix::process::kill_process(Pid::from_raw(record.pid).unwrap(), signal).unwrap();
    }

    pub(crate) fn kill_shim(&self, attempt: &AttemptContext) {
        self.signal_shim(attempt, Signal::KILL);
    }

    pub(crate) fn freeze_shim(&self, attempt: &AttemptContext) {
        self.signal_shim(attempt, Signal::STOP);
    }

    /// Removes the attempt, twice, and looks for what is left of it.
    pub(crate) async fn assert_removed(&self, attempt: &AttemptContext) {
        let reference = self.backend().workload_ref(attempt.attempt);
        for _ in 0..2 {
            tokio::time::timeout(DEADLINE, self.backend().remove(&reference)).await.unwrap().unwrap();
        }
        let left: Vec<_> = fs::read_dir(self.base()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(self.backend().list().await.unwrap(), []);
        assert_eq!(self.processes(attempt), 0);
        let groups = control_groups(Path::new("/sys/fs/cgroup"), &attempt.attempt.to_string());
        assert!(groups.is_empty(), "{groups:?}");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.base()).into_iter().flatten().flatten() {
            if let Ok(Some(record)) = client::shim(&entry.path()) {
                let _ = client::kill(&record);
            }
            let _ = client::prove_dead(&entry.path(), Duration::from_secs(5));
        }
    }
}

fn is_zombie(process: &Path) -> bool {
    let stat = fs::read_to_string(process.join("stat")).unwrap_or_default();
    stat.rsplit_once(')').is_none_or(|(_, rest)| rest.starts_with(" Z"))
}

fn control_groups(below: &Path, name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(below).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if entry.file_name().to_string_lossy().contains(name) {
                found.push(entry.path());
            }
            found.extend(control_groups(&entry.path(), name));
        }
    }
    found
}

/// The real agent, built now, so that it is never yesterday's. `RUNNER_TEST_BINARIES` names a folder that has it.
fn real_agent() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        if let Some(folder) = std::env::var_os("RUNNER_TEST_BINARIES") {
            return Path::new(&folder).join("runner-agent");
        }
        // target/PROFILE/deps/TEST-HASH
        let own = std::env::current_exe().unwrap();
        let folder = own.parent().and_then(Path::parent).unwrap();
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.args(["build", "--quiet", "--package", "runner-agent", "--bins"]);
        if folder.file_name().is_some_and(|name| name == "release") {
            command.arg("--release");
        }
        assert!(
            command.current_dir(env!("CARGO_MANIFEST_DIR")).status().unwrap().success(),
            "build the agent"
        );
        folder.join("runner-agent")
    };
    BUILT.get_or_init(build).clone()
}
