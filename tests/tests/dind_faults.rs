//! What happens to engines and containers, done to real ones: an attempt becomes late by it, or ends for what it is, never
//! for something else; its log stays exact.

use std::{sync::Arc, time::Duration};

use backend_dind::DindBackend;
use bollard::{
    models::{ContainerCreateBody, HostConfig},
    query_parameters::{
        CreateContainerOptionsBuilder, KillContainerOptionsBuilder, RemoveContainerOptionsBuilder,
    },
};
use futures::StreamExt as _;
use runner_core::{
    artifact::{ArtifactStore, Manifest},
    backend::{AttemptContext, Backend, BackendErrorKind, EndedAttempt, NoProgress, Observation},
    clock::{IdGen as _, SystemIds},
    fake::backend::Flood,
    id::AttemptId,
    limits::Limits,
    log::{FrameBody, LogStream},
    outcome::{Cause, ExitStatus},
    spec::{Output, RunSpec},
};
use runner_tests::{
    backend::{
        bench::{MARK, within},
        dind::{self, IMAGE},
        local::command,
        program::{Program, READY},
        store::GatedStore,
    },
    docker::{self, Engine, EngineOptions, TestImage},
    proc,
};
use tempfile::TempDir;
use tokio::sync::mpsc;

/// A backend on an engine of the test's own.
struct World {
    engine: Engine,
    backend: Arc<DindBackend>,
    store: Arc<GatedStore>,
    _dir: TempDir,
}

impl World {
    async fn make(test: &'static str, options: EngineOptions) -> Option<Self> {
        let starting = move || docker::start_or_skip(test, options);
        let engine = tokio::task::spawn_blocking(starting).await.expect("start an engine")?;
        TestImage::busybox().load(&engine.connect(), IMAGE).await;
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut config = dind::config(&engine);
        if engine_has_tls(&engine, test) {
            let (address, files) = engine.tls();
            config.host = format!("tcp://{address}");
            let (ca, cert, key) = (files.ca.clone(), files.cert.clone(), files.key.clone());
            config.tls = Some(backend_dind::TlsFiles { ca, cert, key });
        }
        // A suspended engine is to be noticed.
        config.request_timeout_seconds = 5;
        let backend = Arc::new(dind::open(config, dir.path(), "faults").await);
        Some(Self { engine, backend, store: Arc::default(), _dir: dir })
    }

    fn attempt(&self, program: &Program, change: impl FnOnce(&mut RunSpec)) -> AttemptContext {
        let attempt = AttemptId { run: SystemIds.run_id(), number: 1 };
        let mut spec = RunSpec { image: Some(IMAGE.into()), command: command(program), ..RunSpec::default() };
        spec.env.insert(MARK.to_owned(), attempt.to_string());
        change(&mut spec);
        AttemptContext {
            attempt,
            tenant: "faults".parse().expect("a valid tenant"),
            spec: Arc::new(Limits::default().apply(spec, &self.backend.capabilities())),
            log_limit_bytes: 1 << 30,
            artifacts: Arc::clone(&self.store) as Arc<dyn ArtifactStore>,
            progress: Arc::new(NoProgress),
        }
    }

    async fn ensure(&self, attempt: &AttemptContext) {
        within("ensure", self.backend.ensure(attempt)).await.expect("ensure");
    }

    fn name(&self, attempt: &AttemptContext) -> String {
        self.backend.workload_ref(attempt.attempt).native
    }

    /// Observes from the beginning, in a task of its own.
    fn follow(&self, attempt: &AttemptContext) -> Followed {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut stream = self.backend.observe(attempt, 0);
        runner_core::task::spawn(runner_core::task::TaskKind::Helper, "test.follow", async move {
            while let Some(seen) = stream.next().await {
                if sender.send(seen.map_err(|error| error.chain())).is_err() {
                    return;
                }
            }
        });
        Followed { receiver, out: Vec::new(), end: 0, manifest: None }
    }

    async fn remove(&self, attempt: &AttemptContext) {
        let reference = self.backend.workload_ref(attempt.attempt);
        within("remove", self.backend.remove(&reference)).await.expect("remove");
        assert_eq!(proc::with_environment(MARK, &attempt.attempt.to_string()), Vec::<String>::new());
        assert_eq!(within("list", self.backend.list()).await.expect("list"), []);
    }
}

fn engine_has_tls(_: &Engine, test: &str) -> bool {
    test.contains("tls")
}

/// What an observation yielded so far.
struct Followed {
    receiver: mpsc::UnboundedReceiver<Result<Observation, String>>,
    out: Vec<u8>,
    end: u64,
    manifest: Option<Manifest>,
}

impl Followed {
    /// Takes the next observation, checking that the log goes on where it was.
    async fn next(&mut self) -> Option<EndedAttempt> {
        let seen = within("observe", self.receiver.recv()).await.expect("it has no end");
        match seen.expect("the observation goes on") {
            Observation::Frames(frames) => {
                for frame in frames {
                    assert_eq!(frame.offset, self.end, "contiguous");
                    self.end = frame.end();
                    match frame.body {
                        FrameBody::Data { stream: LogStream::Stdout, bytes } => {
                            self.out.extend_from_slice(&bytes)
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

    async fn until(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.out).contains(text) {
            let ended = self.next().await;
            assert!(ended.is_none(), "it ended without {text:?}: {ended:?}");
        }
    }

    async fn until_end(&mut self) -> EndedAttempt {
        loop {
            if let Some(ended) = self.next().await {
                return ended;
            }
        }
    }
}

fn numbers(count: u32) -> String {
    (0..count).map(|number| format!("{number}\n")).collect()
}

async fn blocking(engine: &Engine, work: impl FnOnce(&Engine)) {
    tokio::task::block_in_place(|| work(engine));
    // Whoever waits for the engine gets a turn.
    tokio::task::yield_now().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_the_engine_ends_attempts_for_what_it_is_and_keeps_their_logs() {
    let Some(world) = World::make("restart", EngineOptions::default()).await else { return };
    for kill in [false, true] {
        let attempt = world.attempt(&Program::SleepForever, |_| {});
        world.ensure(&attempt).await;
        let mut followed = world.follow(&attempt);
        followed.until(READY).await;
        blocking(&world.engine, |engine| {
            if kill {
                engine.kill()
            } else {
                engine.stop()
            }
            engine.resurrect(false);
        })
        .await;
        let end = followed.until_end().await;
        assert_eq!((end.cause, end.retryable), (Cause::Backend, true), "{end:?}");
        assert_eq!(String::from_utf8_lossy(&followed.out), READY);
        assert!(!end.evidence.is_empty());
        world.remove(&attempt).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_live_restore_programs_live_on_and_their_logs_are_exact() {
    let options = EngineOptions { live_restore: true, ..EngineOptions::default() };
    let Some(world) = World::make("live restore", options).await else { return };
    for kill in [false, true] {
        let attempt = world.attempt(&Program::Count { count: 300, pause: 20 }, |_| {});
        world.ensure(&attempt).await;
        let mut followed = world.follow(&attempt);
        followed.until("30\n").await;
        blocking(&world.engine, |engine| {
            if kill {
                engine.kill()
            } else {
                engine.stop()
            }
            engine.resurrect(true);
        })
        .await;
        let end = followed.until_end().await;
        assert_eq!((end.cause, end.status), (Cause::Exited, Some(ExitStatus::Code(0))), "{end:?}");
        assert_eq!(String::from_utf8_lossy(&followed.out), numbers(300));
        world.remove(&attempt).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_hangs_makes_attempts_late_and_not_wrong() {
    let Some(world) = World::make("hang", EngineOptions::default()).await else { return };
    let running = world.attempt(&Program::Count { count: 100, pause: 20 }, |_| {});
    world.ensure(&running).await;
    let mut followed = world.follow(&running);
    followed.until("5\n").await;
    world.engine.suspend();
    let health = within("health", world.backend.health()).await.expect("health");
    assert!(!health.healthy, "{health:?}");
    let late = world.attempt(&Program::Print { out: "late".into(), err: String::new(), exit: 3 }, |_| {});
    let making = world.backend.ensure(&late);
    let resuming = async {
        // Longer than a request may take.
        tokio::time::sleep(Duration::from_secs(7)).await;
        world.engine.resume();
    };
    let (made, ()) = within("ensure", futures::future::join(making, resuming)).await;
    made.expect("it was late and not wrong");
    let end = followed.until_end().await;
    assert_eq!((end.cause, end.status), (Cause::Exited, Some(ExitStatus::Code(0))), "{end:?}");
    assert_eq!(String::from_utf8_lossy(&followed.out), numbers(100));
    let mut followed = world.follow(&late);
    let end = followed.until_end().await;
    assert_eq!((end.cause, end.status), (Cause::Exited, Some(ExitStatus::Code(3))), "{end:?}");
    assert_eq!(followed.out, b"late");
    for attempt in [running, late] {
        let reference = world.backend.workload_ref(attempt.attempt);
        within("remove", world.backend.remove(&reference)).await.expect("remove");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_others_do_to_a_container_is_told_from_what_the_program_did() {
    let Some(world) = World::make("others", EngineOptions::default()).await else { return };
    let docker = world.engine.connect();
    let start = async |program: &Program| {
        let attempt = world.attempt(program, |_| {});
        world.ensure(&attempt).await;
        let mut followed = world.follow(&attempt);
        followed.until(READY).await;
        (attempt, followed)
    };
    // Removed: nobody can know any more.
    let (attempt, mut followed) = start(&Program::SleepForever).await;
    let options = RemoveContainerOptionsBuilder::default().force(true).build();
    docker.remove_container(&world.name(&attempt), Some(options)).await.expect("remove it");
    let end = followed.until_end().await;
    assert_eq!((end.cause, end.status), (Cause::Lost, None), "{end:?}");
    assert!(end.evidence.iter().any(|seen| seen.detail.contains("removed it")), "{end:?}");
    world.remove(&attempt).await;
    // Killed, all of it: the shim had no last word.
    let (attempt, mut followed) = start(&Program::SleepForever).await;
    let options = KillContainerOptionsBuilder::default().signal("SIGKILL").build();
    docker.kill_container(&world.name(&attempt), Some(options)).await.expect("kill it");
    let end = followed.until_end().await;
    assert_eq!((end.cause, end.status, end.retryable), (Cause::Backend, None, true), "{end:?}");
    world.remove(&attempt).await;
    // Told to end: the program's own code is kept, the cause is not the program's.
    let (attempt, mut followed) = start(&Program::HandleTerm(5)).await;
    docker.stop_container(&world.name(&attempt), None).await.expect("stop it");
    let end = followed.until_end().await;
    assert_eq!((end.cause, end.status), (Cause::Backend, Some(ExitStatus::Code(5))), "{end:?}");
    world.remove(&attempt).await;
    // Restarted: the program is not executed twice.
    let (attempt, mut followed) = start(&Program::HandleTerm(5)).await;
    docker.restart_container(&world.name(&attempt), None).await.expect("restart it");
    let end = followed.until_end().await;
    assert_eq!(
        (end.cause, String::from_utf8_lossy(&followed.out).matches("ready").count()),
        (Cause::Backend, 1),
        "{end:?}"
    );
    world.remove(&attempt).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_somebody_else_has_is_not_touched() {
    let Some(world) = World::make("name", EngineOptions::default()).await else { return };
    let docker = world.engine.connect();
    let attempt = world.attempt(&Program::exit(0), |_| {});
    let name = world.name(&attempt);
    let options = CreateContainerOptionsBuilder::default().name(&name).build();
    let body = ContainerCreateBody { image: Some(IMAGE.to_owned()), ..ContainerCreateBody::default() };
    docker.create_container(Some(options), body).await.expect("take the name");
    let error = within("ensure", world.backend.ensure(&attempt)).await.expect_err("the name is taken");
    assert_eq!((error.kind, error.retryable), (BackendErrorKind::Substrate, false), "{}", error.chain());
    let reference = world.backend.workload_ref(attempt.attempt);
    assert!(within("remove", world.backend.remove(&reference)).await.is_err(), "it is not ours to remove");
    docker.inspect_container(&name, None).await.expect("it is still there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_observer_that_is_slow_in_a_flood_misses_nothing_and_holds_up_nobody() {
    const BYTES: u64 = 128 * 1024 * 1024;
    let Some(world) = World::make("flood", EngineOptions::default()).await else { return };
    let program = Program::Flood { stream: LogStream::Stdout, bytes: BYTES, binary: false };
    let attempt = world.attempt(&program, |_| {});
    let mut slow = world.backend.observe(&attempt, 0);
    world.ensure(&attempt).await;
    // Takes the first frames, then nothing until the program has ended.
    let mut out = Vec::new();
    let mut take = |seen: Observation| match seen {
        Observation::Frames(frames) => {
            for frame in frames {
                assert_eq!(frame.offset, out.len() as u64, "contiguous");
                let FrameBody::Data { bytes, .. } = frame.body else { panic!("dropped: {:?}", frame.body) };
                out.extend_from_slice(&bytes);
            }
            None
        }
        Observation::Ended(ended) => Some(ended),
        _ => None,
    };
    for _ in 0..2 {
        let seen = within("observe", slow.next()).await.expect("it goes on").expect("it goes on");
        assert!(take(seen).is_none());
    }
    let docker = world.engine.connect();
    let ended = async {
        loop {
            let seen = docker.inspect_container(&world.name(&attempt), None).await.expect("inspect");
            if seen.state.and_then(|state| state.running) != Some(true) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    within("the program, which nobody holds up", ended).await;
    let end = loop {
        let seen = within("observe", slow.next()).await.expect("it goes on").expect("it goes on");
        if let Some(ended) = take(seen) {
            break ended;
        }
    };
    assert_eq!((end.cause, end.usage.log_bytes), (Cause::Exited, BYTES));
    let expected = Flood::new(false).take(usize::try_from(BYTES).expect("it fits into memory"));
    assert!(out == expected, "{} bytes, not {}", out.len(), expected.len());
    drop(slow);
    world.remove(&attempt).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_remote_engine_by_tls_gets_inputs_and_gives_outputs() {
    const BYTES: u64 = 64 * 1024 * 1024;
    let options = EngineOptions { tls: true, ..EngineOptions::default() };
    let Some(world) = World::make("tls", options).await else { return };
    let program = Program::WriteZeros { path: "/outputs/big".into(), bytes: BYTES };
    let attempt = world.attempt(&program, |spec| {
        spec.outputs.push(Output {
            path: "/outputs/big".into(),
            destination: None,
            required: true,
            max_bytes: None,
            glob: false,
        });
    });
    world.ensure(&attempt).await;
    let mut followed = world.follow(&attempt);
    let end = followed.until_end().await;
    assert_eq!((end.cause, end.status), (Cause::Exited, Some(ExitStatus::Code(0))), "{end:?}");
    assert_eq!(followed.manifest.expect("outputs").total_bytes, BYTES);
    world.remove(&attempt).await;
}

/// Field by field, as the engine has it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_is_as_hardened_as_it_should_be() {
    let Some(world) = World::make("hardening", EngineOptions::default()).await else { return };
    let attempt = world.attempt(&Program::SleepForever, |spec| {
        spec.resources.memory_bytes = Some(64 << 20);
        spec.resources.cpu_millis = Some(500);
        spec.resources.pids = Some(20);
        spec.read_only_root = true;
    });
    world.ensure(&attempt).await;
    let seen = world.engine.connect().inspect_container(&world.name(&attempt), None).await.expect("inspect");
    let host: HostConfig = seen.host_config.expect("a host configuration");
    assert_eq!(host.privileged, Some(false));
    assert_eq!(host.cap_drop, Some(vec!["ALL".to_owned()]));
    assert!(host.cap_add.unwrap_or_default().is_empty());
    assert_eq!(
        host.security_opt,
        Some(vec!["no-new-privileges".to_owned()]),
        "and the engine's own seccomp profile"
    );
    assert_eq!(host.readonly_rootfs, Some(true));
    assert_eq!((host.memory, host.memory_swap), (Some(64 << 20), Some(64 << 20)));
    assert_eq!((host.cpu_period, host.cpu_quota), (Some(100_000), Some(50_000)));
    assert_eq!(host.pids_limit, Some(22));
    assert_eq!(host.network_mode.as_deref(), Some("none"));
    assert_eq!(host.ipc_mode.as_deref(), Some("private"));
    assert_eq!(host.pid_mode.unwrap_or_default(), "");
    assert_eq!(host.uts_mode.unwrap_or_default(), "");
    assert_eq!(host.userns_mode.unwrap_or_default(), "");
    assert!(host.binds.unwrap_or_default().is_empty() && host.devices.unwrap_or_default().is_empty());
    assert!(host.volumes_from.unwrap_or_default().is_empty() && host.links.unwrap_or_default().is_empty());
    assert!(host.port_bindings.unwrap_or_default().is_empty());
    assert_eq!(host.auto_remove, Some(false));
    assert_eq!(
        host.restart_policy.and_then(|policy| policy.name).map(|name| name.to_string()).as_deref(),
        Some("no")
    );
    assert_eq!(host.log_config.and_then(|log| log.typ).as_deref(), Some("none"));
    assert!(!host.masked_paths.unwrap_or_default().is_empty(), "the kernel's own files are masked");
    let config = seen.config.expect("a configuration");
    assert_eq!(config.user.as_deref(), Some("65532:65532"));
    assert!(
        !config.env.unwrap_or_default().iter().any(|line| line.contains(MARK)),
        "the spec's is not to be seen"
    );
    for mount in seen.mounts.unwrap_or_default() {
        assert_eq!(
            mount.typ.as_ref().map(|kind| kind.to_string()).as_deref(),
            Some("volume"),
            "nothing of the host: {mount:?}"
        );
    }
    let pid = seen.state.and_then(|state| state.pid).expect("it runs");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    for (field, value) in [
        ("CapEff:", "0000000000000000"),
        ("CapBnd:", "0000000000000000"),
        ("NoNewPrivs:", "1"),
        ("Seccomp:", "2"),
    ] {
        let line = status.lines().find_map(|line| line.strip_prefix(field)).map(str::trim);
        assert_eq!(line, Some(value), "{field}");
    }
    world.remove_running(&attempt).await;
}

impl World {
    async fn remove_running(&self, attempt: &AttemptContext) {
        let reference = self.backend.workload_ref(attempt.attempt);
        within("stop", self.backend.stop(&reference, Duration::ZERO)).await.expect("stop");
        self.remove(attempt).await;
    }
}
