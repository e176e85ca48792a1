//! Cancel: in every phase, twice, after a restart, against an exit.

use std::time::Duration;

use runner_tests::{
    proc,
    service::{Service, watch, watch_for, within},
};
use worker_client::proto::{self, RunState};

use crate::shell;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancel_works_in_the_queue_and_is_idempotent() {
    let backends = r#"[{ kind = "local", name = "local", slots = 1 }]"#;
    let service = Service::start_with(&[("RUNNER_BACKENDS", backends)]).await;
    let client = service.client();
    let first = client.run(shell("echo ready; exec sleep 100000")).await.expect("run");
    watch_for(&client, first.id(), "ready").await;
    let queued = client.run(shell("echo never")).await.expect("run");
    assert_eq!(queued.get().await.expect("get").state(), RunState::Queued);
    for _ in 0..2 {
        let run = queued.cancel("not needed").await.expect("cancel");
        assert!(run.cancel_requested);
    }
    let watched = watch(&client, queued.id(), "").await;
    assert_eq!((watched.end().state, watched.end().cause()), (RunState::Cancelled, proto::Cause::Cancelled));
    assert!(watched.out.is_empty() && watched.end().outcome.attempt == 0, "it never began");
    first.cancel("enough").await.expect("cancel");
    assert_eq!(first.wait().await.expect("the end").state, RunState::Cancelled);
    let run = first.cancel("once more, after the end").await.expect("cancel");
    assert_eq!(run.state(), RunState::Cancelled);
    service.assert_clean(&[first.id(), queued.id()]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancel_kills_the_whole_tree_and_keeps_log_and_outputs() {
    let service = Service::start().await;
    let client = service.client();
    let script = "(setsid sh -c 'trap \"\" TERM; while :; do sleep 1; done' &) >/dev/null 2>&1
        trap '' TERM; echo half > /outputs/file; echo ready; while :; do sleep 1; done";
    let spec = shell(script).output("/outputs/file").stop_grace(Duration::from_secs(1));
    let handle = client.run(spec).await.expect("run");
    watch_for(&client, handle.id(), "ready").await;
    assert!(proc::with_environment("RUNNER_RUN_ID", handle.id()).len() >= 2);
    let calls = futures::future::join_all((0..4).map(|_| handle.cancel("enough"))).await;
    assert!(calls.into_iter().all(|call| call.is_ok()));
    let watched = watch(&client, handle.id(), "").await;
    let alive = proc::with_environment("RUNNER_RUN_ID", handle.id());
    assert_eq!(alive, Vec::<String>::new(), "CANCELLED is told when it is proven dead");
    assert_eq!((watched.end().state, watched.end().cause()), (RunState::Cancelled, proto::Cause::Cancelled));
    assert_eq!(watched.end().signal(), Some(9), "the signal that ended it is told beside the cause");
    assert_eq!(watched.out, b"ready\n");
    let manifest = watched.end().outputs().expect("what was written is stored");
    assert!(manifest.partial);
    assert_eq!(manifest.entries.iter().map(|entry| entry.size).collect::<Vec<_>>(), [5]);
    service.assert_clean(&[handle.id()]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancel_works_right_after_run_and_while_everything_moves() {
    let service = Service::start().await;
    let client = service.client();
    let mut ids = Vec::new();
    // After ever longer times the cancel meets another phase: queued, staging, starting, running, publishing, ended.
    for millis in [0, 1, 2, 5, 10, 20, 40, 80, 160] {
        let spec = shell("head -c 4000000 /dev/zero > /outputs/zeros; sleep 0.05")
            .input_bytes("/inputs/x", "x".repeat(100_000))
            .output("/outputs/zeros");
        let handle = client.run(spec).await.expect("run");
        tokio::time::sleep(Duration::from_millis(millis)).await;
        handle.cancel("any time").await.expect("cancel");
        let end = within("the end", handle.wait()).await.expect("the end");
        match end.state {
            RunState::Cancelled => assert_eq!(end.cause(), proto::Cause::Cancelled),
            // The exit came first; then it is the outcome.
            RunState::Succeeded => {
                assert_eq!((end.cause(), end.exit_code()), (proto::Cause::Exited, Some(0)))
            }
            other => panic!("{other:?}: {end:?}"),
        }
        ids.push(handle.id().to_owned());
    }
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    service.assert_clean(&ids).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancel_works_after_a_restart() {
    let mut service = Service::start().await;
    let handle = service.client().run(shell("echo ready; exec sleep 100000")).await.expect("run");
    watch_for(&service.client(), handle.id(), "ready").await;
    service.kill();
    service.restart(&[]).await;
    let client = service.client();
    client.cancel(handle.id(), "after the restart").await.expect("cancel");
    let watched = watch(&client, handle.id(), "").await;
    assert_eq!((watched.end().state, watched.end().signal()), (RunState::Cancelled, Some(15)));
    service.assert_clean(&[handle.id()]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_whose_caller_goes_away_is_none_or_all_of_it() {
    let service = Service::start().await;
    let client = service.client();
    for micros in [0, 200, 400, 600, 800, 1_000, 1_500, 2_000, 4_000, 8_000] {
        let handle = client.run(shell("echo ready; exec sleep 100000")).await.expect("run");
        watch_for(&client, handle.id(), "ready").await;
        let other = service.client();
        other.get(handle.id()).await.expect("the connection is made");
        let _ = tokio::time::timeout(Duration::from_micros(micros), other.cancel(handle.id(), "once")).await;
        drop(other);
        if !handle.get().await.expect("get").cancel_requested {
            handle.cancel("twice").await.expect("cancel");
        }
        let end = tokio::time::timeout(Duration::from_secs(30), handle.wait()).await;
        let end = end.expect("an intent that is stored is acted on").expect("the end");
        assert_eq!(end.state, RunState::Cancelled, "{end:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_exited_first_keeps_its_own_outcome() {
    let service = Service::start().await;
    let client = service.client();
    let handle = client.run(shell("exit 4")).await.expect("run");
    handle.wait().await.expect("the end");
    let run = handle.cancel("too late").await.expect("cancel");
    assert_eq!((run.state(), run.cancel_requested), (RunState::Failed, false));
    let watched = watch(&client, handle.id(), "").await;
    assert_eq!((watched.end().cause(), watched.end().exit_code()), (proto::Cause::Exited, Some(4)));
}
