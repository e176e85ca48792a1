//! What is the local backend's own, beyond the conformance suite: restarts at every point, shims that die, trees that
//! resist removal.

mod world;

use std::{fs, os::unix::fs::PermissionsExt as _, sync::Arc, time::Duration};

use futures::StreamExt as _;
use runner_core::{
    artifact::{ArtifactErrorKind, ArtifactKey, ArtifactStore as _, ArtifactUri},
    backend::{Backend as _, BackendErrorKind, Observation},
    fake::artifact::ArtifactOp,
    outcome::{Cause, ExitStatus},
    spec::{Input, InputSource, Output, RunSpec},
};

use self::world::{DEADLINE, World, eventually, shell};

fn input(uri: ArtifactUri) -> Input {
    Input {
        path: "/inputs/a".into(),
        source: InputSource::Artifact(uri),
        sha256: None,
        mode: None,
        extract: None,
    }
}

async fn with_stored_input(world: &World, script: &str) -> RunSpec {
    let key: ArtifactKey = "uploads/default/a".parse().unwrap();
    world.artifacts.put_bytes(&key, "the input".into()).await.unwrap();
    RunSpec { inputs: vec![input(ArtifactUri::object(key))], ..shell(script) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_program_is_adopted_after_a_restart_and_its_whole_log_is_seen() {
    let mut world = World::new().await;
    let attempt =
        world.attempt(shell("echo before; read line; echo after; exit 7"), |spec| spec.stdin = true);
    world.backend().ensure(&attempt).await.unwrap();
    world.reopen().await;
    world.backend().ensure(&attempt).await.unwrap();
    let reference = world.backend().workload_ref(attempt.attempt);
    let line = runner_core::backend::WorkloadInput::Stdin("x\n".into());
    world.backend().input(&reference, line).await.unwrap();
    let seen = world.observe(&attempt).await;
    assert_eq!(seen.log, "before\nafter\n");
    assert_eq!((seen.ended.cause, seen.ended.status), (Cause::Exited, Some(ExitStatus::Code(7))));
    world.assert_removed(&attempt).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_ended_while_nobody_looked_keeps_its_end() {
    let mut world = World::new().await;
    let attempt = world.attempt(shell("echo x; exit 3"), |_| {});
    world.backend().ensure(&attempt).await.unwrap();
    let exit = world.dir(&attempt).join("exit.json");
    eventually("the exit record", || exit.exists()).await;
    world.reopen().await;
    world.backend().ensure(&attempt).await.unwrap();
    let seen = world.observe(&attempt).await;
    assert_eq!((seen.log.as_str(), seen.ended.status), ("x\n", Some(ExitStatus::Code(3))));
    world.assert_removed(&attempt).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_specification_whose_shim_never_began_is_started_after_a_restart() {
    // An agent that does nothing stands for a service that was killed before it started the real one.
    let mut world = World::with_agent("exit 0").await;
    let attempt = world.attempt(shell("echo once"), |_| {});
    world.backend().ensure(&attempt).await.unwrap();
    assert!(world.dir(&attempt).join("exec.json").exists());
    world.use_real_agent();
    world.reopen().await;
    world.backend().ensure(&attempt).await.unwrap();
    let seen = world.observe(&attempt).await;
    assert_eq!((seen.log.as_str(), seen.ended.status), ("once\n", Some(ExitStatus::Code(0))));
    world.assert_removed(&attempt).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_never_begins_is_the_backends_failure_with_its_last_words_and_nothing_starts_later() {
    let mut world = World::with_agent("echo no such library >&2; exit 9").await;
    let attempt = world.attempt(shell("echo never"), |_| {});
    world.backend().ensure(&attempt).await.unwrap();
    let seen = world.observe(&attempt).await;
    assert_eq!((seen.ended.cause, seen.ended.status, seen.started), (Cause::Backend, None, false));
    let said: Vec<_> = seen.ended.evidence.iter().map(|seen| seen.detail.trim()).collect();
    assert_eq!(said, ["it died before it began", "the shim exited with 9", "no such library"]);
    // Somebody else, who was not its parent, sees the same end.
    world.use_real_agent();
    world.reopen().await;
    world.backend().ensure(&attempt).await.unwrap();
    let seen = world.observe(&attempt).await;
    assert_eq!((seen.ended.cause, seen.log.as_str(), seen.started), (Cause::Backend, "", false));
    world.assert_removed(&attempt).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn inputs_that_were_half_staged_are_staged_again_after_a_restart() {
    let mut world = World::new().await;
    let spec = with_stored_input(&world, "cat /inputs/a").await;
    let attempt = world.attempt(spec, |_| {});
    world.artifacts.slow(Duration::from_secs(1000));
    let first = tokio::time::timeout(Duration::from_millis(200), world.backend().ensure(&attempt)).await;
    assert!(first.is_err(), "it was dropped in the middle");
    let listed = world.backend().list().await.unwrap();
    assert_eq!(listed, [world.backend().workload_ref(attempt.attempt)]);
    world.artifacts.slow(Duration::ZERO);
    world.reopen().await;
    world.backend().ensure(&attempt).await.unwrap();
    let seen = world.observe(&attempt).await;
    assert_eq!((seen.log.as_str(), seen.ended.usage.input_bytes), ("the input", 9));
    world.assert_removed(&attempt).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_during_staging_ends_the_attempt_for_ever() {
    let mut world = World::new().await;
    let spec = with_stored_input(&world, "echo ran").await;
    let attempt = world.attempt(spec, |_| {});
    world.artifacts.slow(Duration::from_secs(1000));
    let reference = world.backend().workload_ref(attempt.attempt);
    let dir = world.dir(&attempt);
    let stop = async {
        eventually("the attempt's directory", || dir.exists()).await;
        world.backend().stop(&reference, Duration::from_secs(60)).await
    };
    let backend = world.backend();
    let (ensured, stopped) =
        tokio::time::timeout(DEADLINE, async { tokio::join!(backend.ensure(&attempt), stop) })
            .await
            .expect("neither waits for the store");
    ensured.unwrap();
    stopped.unwrap();
    drop(backend);
    world.artifacts.slow(Duration::ZERO);
    for _ in 0..2 {
        world.backend().ensure(&attempt).await.unwrap();
        let seen = world.observe(&attempt).await;
        assert_eq!((seen.ended.cause, seen.started, seen.log.as_str()), (Cause::Cancelled, false, ""));
        world.reopen().await;
    }
    world.assert_removed(&attempt).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_that_is_missing_fails_ensure_and_leaves_what_remove_finds() {
    let world = World::new().await;
    let key: ArtifactKey = "uploads/default/none".parse().unwrap();
    let spec = RunSpec { inputs: vec![input(ArtifactUri::object(key))], ..shell("true") };
    let attempt = world.attempt(spec, |_| {});
    let error = world.backend().ensure(&attempt).await.unwrap_err();
    assert_eq!((error.kind, error.retryable), (BackendErrorKind::Input, false), "{}", error.chain());
    assert_eq!(world.backend().list().await.unwrap().len(), 1);
    world.assert_removed(&attempt).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_shim_is_lost_with_evidence_and_takes_its_whole_tree_with_it() {
    let world = World::new().await;
    let spec = RunSpec {
        outputs: vec![Output {
            path: "/outputs/o".into(),
            glob: false,
            destination: None,
            required: true,
            max_bytes: None,
        }],
        ..shell("setsid sleep 100000 & echo data > /outputs/o; echo ready; exec sleep 100000")
    };
    let attempt = world.attempt(spec, |_| {});
    world.backend().ensure(&attempt).await.unwrap();
    let mut observed = world.backend().observe(&attempt, 0);
    while let Some(Ok(seen)) = observed.next().await {
        if matches!(seen, Observation::Frames(_)) {
            break;
        }
    }
    assert!(world.processes(&attempt) >= 2);
    world.kill_shim(&attempt);
    drop(observed);
    let seen = world.observe(&attempt).await;
    assert_eq!((seen.ended.cause, seen.ended.status), (Cause::Lost, None));
    let said = |what: &str| seen.ended.evidence.iter().any(|e| e.source == "shim" && e.detail.contains(what));
    assert!(said("without an exit record") && said("killed by signal 9"), "{:?}", seen.ended.evidence);
    assert_eq!(world.processes(&attempt), 0, "death was proven before it was told");
    assert_eq!(seen.log, "ready\n");
    let manifest = seen.ended.outputs.expect("what it wrote is kept");
    assert!(manifest.partial && manifest.entries.len() == 1);
    world.assert_removed(&attempt).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn outputs_are_published_again_after_the_store_failed() {
    let world = World::new().await;
    let spec = RunSpec {
        outputs: vec![Output {
            path: "/outputs/o".into(),
            glob: false,
            destination: None,
            required: true,
            max_bytes: None,
        }],
        ..shell("echo data > /outputs/o")
    };
    let attempt = world.attempt(spec, |_| {});
    world.backend().ensure(&attempt).await.unwrap();
    world.artifacts.fail_next(ArtifactOp::Put, 1, ArtifactErrorKind::Unavailable);
    let mut observed = world.backend().observe(&attempt, 0);
    let error = loop {
        match observed.next().await.expect("an error comes") {
            Ok(Observation::Ended(ended)) => panic!("ended though nothing is stored: {ended:?}"),
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!((error.kind, error.retryable), (BackendErrorKind::Output, true), "{}", error.chain());
    assert!(observed.next().await.is_none());
    for _ in 0..2 {
        let seen = world.observe(&attempt).await;
        assert_eq!((seen.ended.cause, seen.ended.status), (Cause::Exited, Some(ExitStatus::Code(0))));
        assert_eq!(seen.ended.outputs.as_ref().map(|manifest| manifest.total_bytes), Some(5));
        assert_eq!(seen.published, seen.ended.outputs);
    }
    world.assert_removed(&attempt).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_tree_is_removed_and_nothing_of_the_machine_with_it() {
    let world = World::new().await;
    let outside = tempfile::tempdir().unwrap();
    fs::set_permissions(outside.path(), fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(outside.path().join("keep"), "x").unwrap();
    let script = r#"
        cd /outputs
        ln -s "$OUTSIDE" link; ln -s / root; ln -s . loop; mkfifo fifo
        mkdir closed && touch closed/file && chmod 000 closed
        mkdir sticky && chmod 1777 sticky && touch "sticky/$(printf 'a\nb\033')"
        i=0; while [ $i -lt 200 ]; do mkdir d && cd d; i=$((i+1)); done
        cd /tmp && i=0; while [ $i -lt 500 ]; do : > "$i"; i=$((i+1)); done; chmod 000 /tmp
        cd "$HOME" && mkdir -p a/b && chmod 500 a; true"#;
    let attempt = world.attempt(shell(script), |spec| {
        spec.env.insert("OUTSIDE".into(), outside.path().display().to_string());
    });
    world.backend().ensure(&attempt).await.unwrap();
    let seen = world.observe(&attempt).await;
    assert_eq!(seen.ended.status, Some(ExitStatus::Code(0)), "{seen:?}");
    world.assert_removed(&attempt).await;
    assert!(outside.path().join("keep").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_live_program_is_stopped_before_it_is_removed() {
    let world = World::new().await;
    let attempt =
        world.attempt(shell(r#"trap "" TERM; setsid sleep 100000 & while :; do sleep 1; done"#), |_| {});
    world.backend().ensure(&attempt).await.unwrap();
    eventually("the program", || world.processes(&attempt) >= 2).await;
    world.assert_removed(&attempt).await;
    assert_eq!(world.processes(&attempt), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_does_not_answer_is_killed_and_the_end_is_what_was_asked_for() {
    let world = World::new().await;
    let attempt = world.attempt(shell("exec sleep 100000"), |_| {});
    world.backend().ensure(&attempt).await.unwrap();
    let started = world.dir(&attempt).join("started.json");
    eventually("the start", || started.exists()).await;
    world.freeze_shim(&attempt);
    let reference = world.backend().workload_ref(attempt.attempt);
    world.backend().stop(&reference, Duration::ZERO).await.unwrap();
    assert_eq!(world.processes(&attempt), 0);
    let seen = world.observe(&attempt).await;
    assert_eq!((seen.ended.cause, seen.started), (Cause::Cancelled, true));
    world.assert_removed(&attempt).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_backend_cannot_do_is_refused_and_leaves_nothing() {
    let world = World::new().await;
    let refused = [
        RunSpec::default(),
        RunSpec { image: Some("no-such-image".into()), ..shell("true") },
        RunSpec { user: Some(runner_core::spec::User { uid: 0, gid: 0 }), ..shell("true") },
    ];
    for spec in refused {
        let attempt = world.attempt(spec, |_| {});
        let error = world.backend().ensure(&attempt).await.unwrap_err();
        assert_eq!(
            (error.kind, error.retryable),
            (BackendErrorKind::Unsupported, false),
            "{}",
            error.chain()
        );
        assert!(!world.dir(&attempt).exists());
    }
    assert_eq!(world.backend().list().await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_calls_make_one_workload() {
    let world = World::new().await;
    let attempt = world.attempt(shell("echo $$; sleep 0.3"), |_| {});
    let backend = world.backend();
    let calls = (0..8).map(|_| {
        let (backend, attempt) = (Arc::clone(&backend), attempt.clone());
        async move { backend.ensure(&attempt).await }
    });
    for result in futures::future::join_all(calls).await {
        result.unwrap();
    }
    let seen = world.observe(&attempt).await;
    assert_eq!(seen.log.lines().count(), 1, "{seen:?}");
    drop(backend);
    world.assert_removed(&attempt).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_says_how_programs_are_confined() {
    let world = World::new().await;
    let health = world.backend().health().await.unwrap();
    assert!(health.healthy, "{}", health.detail);
    assert!(health.detail.contains("namespaces"), "{}", health.detail);
    assert_eq!(fs::read_dir(world.base()).unwrap().count(), 0, "the check leaves nothing");
}
