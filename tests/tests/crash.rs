//! `kill -9` of the service at every named crash point of a run's life, and at other bad moments, on this machine's backends.
//! On a cluster: `crash_k8sjob.rs`.

use runner_tests::{
    proc,
    scene::On,
    service::{Service, watch, watch_for},
};
use worker_client::{RunSpec, proto};

mod on_local {
    runner_tests::crash_suite!(super::On::Local);
}

mod on_dind {
    runner_tests::crash_suite!(super::On::Dind);
}

/// A shim that is killed takes what it knew with it: the run is lost, never a success, and its processes are gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_shim_is_no_success_and_leaves_nothing() {
    let service = Service::start().await;
    let client = service.client();
    // Both a program that would have succeeded by itself and one that never ends.
    for script in ["echo ready; sleep 2; exit 0", "trap '' TERM; echo ready; while :; do sleep 1; done"] {
        let handle = client.run(RunSpec::command(["sh", "-c", script])).await.expect("run");
        watch_for(&client, handle.id(), "ready").await;
        let local = service.data_dir().join("local");
        let shims: Vec<i32> = proc::pids_naming(&local)
            .into_iter()
            .filter(|pid| u32::try_from(*pid) != Ok(service.pid()))
            .collect();
        assert!(!shims.is_empty(), "the shim is found by its command line");
        shims.into_iter().for_each(proc::kill);
        let watched = watch(&client, handle.id(), "").await;
        assert_eq!(watched.end().state, proto::RunState::Failed, "{:?}", watched.end());
        assert_eq!(watched.end().cause(), proto::Cause::Lost, "{:?}", watched.end());
        assert_eq!(watched.end().exit_code(), None);
        assert!(!watched.end().outcome.evidence.is_empty());
        assert_eq!(String::from_utf8_lossy(&watched.out), "ready\n", "the log so far is kept");
        service.assert_clean(&[handle.id()]).await;
    }
}

/// The shim dies while the service is dead too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shim_that_died_while_the_service_was_away_is_no_success() {
    let mut service = Service::start().await;
    let spec = RunSpec::command(["sh", "-c", "echo ready; exec sleep 100000"]);
    let handle = service.client().run(spec).await.expect("run");
    let id = handle.id();
    watch_for(&service.client(), id, "ready").await;
    service.kill();
    proc::pids_naming(&service.data_dir().join("local")).into_iter().for_each(proc::kill);
    service.restart(&[]).await;
    let watched = watch(&service.client(), id, "").await;
    assert_eq!((watched.end().state, watched.end().cause()), (proto::RunState::Failed, proto::Cause::Lost));
    assert_eq!(String::from_utf8_lossy(&watched.out), "ready\n");
    service.assert_clean(&[id]).await;
}

/// The second of two services on one data directory refuses, says why, and harms nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_service_on_the_same_data_directory_refuses() {
    let service = Service::start().await;
    let client = service.client();
    let spec = RunSpec::command(["sh", "-c", "echo ready; exec sleep 100000"]);
    let handle = client.run(spec).await.expect("run");
    watch_for(&client, handle.id(), "ready").await;
    let (status, said) = service.second().await;
    assert!(!status.success() && status.code().is_some(), "{status}");
    let data_dir = service.data_dir();
    assert!(said.contains(&*data_dir.to_string_lossy()), "it names the directory: {said}");
    handle.cancel("the first still serves").await.expect("cancel");
    assert_eq!(handle.wait().await.expect("the end").state, proto::RunState::Cancelled);
    service.assert_clean(&[handle.id()]).await;
}
