//! What happens to containers, and how they are made: seen on a real engine, through its own eyes.

use std::time::Duration;

use bollard::{
    models::{ContainerCreateBody, HostConfig},
    query_parameters::{
        CreateContainerOptionsBuilder, KillContainerOptionsBuilder, RemoveContainerOptionsBuilder,
    },
};
use futures::StreamExt as _;
use runner_core::{
    backend::{Backend as _, BackendErrorKind, Observation},
    fake::backend::Flood,
    log::{FrameBody, LogStream},
    outcome::{Cause, ExitStatus},
};
use runner_tests::{
    backend::{
        bench::{MARK, within},
        dind::IMAGE,
        dind_world::World,
        program::{Program, READY},
    },
    docker::EngineOptions,
};

async fn world(test: &'static str) -> Option<World> {
    World::make(test, EngineOptions::default(), |_, _| {}).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_others_do_to_a_container_is_told_from_what_the_program_did() {
    let Some(world) = world("others").await else { return };
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
    assert_eq!((end.cause, followed.text().matches("ready").count()), (Cause::Backend, 1), "{end:?}");
    world.remove(&attempt).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_somebody_else_has_is_not_touched() {
    let Some(world) = world("name").await else { return };
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
    const BYTES: u64 = 32 * 1024 * 1024;
    let Some(world) = world("flood").await else { return };
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

/// Field by field, as the engine has it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_is_as_hardened_as_it_should_be() {
    let Some(world) = world("hardening").await else { return };
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
    world.stop_and_remove(&attempt).await;
}
