//! Run: accepting, idempotency, limits, bad fields.

use std::{collections::BTreeSet, time::Duration};

use runner_tests::service::{Service, watch, within};
use worker_client::{
    Client, ClientError, ErrorKind, RunOptions, RunSpec, StreamOptions,
    proto::{self, RunState},
};

use crate::{SOME_ID, run_count, shell};

fn key(key: &str) -> RunOptions {
    RunOptions { run_id: None, idempotency_key: Some(key.to_owned()) }
}

fn id(id: &str) -> RunOptions {
    RunOptions { run_id: Some(id.to_owned()), idempotency_key: None }
}

async fn refused(client: &Client, spec: impl Into<proto::RunSpec>) -> ClientError {
    client.run(spec).await.map(|handle| handle.id().to_owned()).expect_err("the spec was to be refused")
}

/// Asserts that a spec is refused for this field and reason, and that nothing was stored.
async fn assert_violation(client: &Client, spec: impl Into<proto::RunSpec>, field: &str, reason: &str) {
    let error = refused(client, spec).await;
    assert_eq!(error.kind(), ErrorKind::Invalid, "{field}: {error}");
    let found = error.violations().iter().any(|found| found.field == field && found.reason == reason);
    assert!(found, "no {reason} of {field} in {:?}", error.violations());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_streams_and_the_exit_code_are_told() {
    let service = Service::start().await;
    let client = service.client();
    let handle = client.run(shell("echo out; echo err >&2; exit 7")).await.expect("run");
    assert!(handle.created());
    let watched = watch(&client, handle.id(), "").await;
    assert_eq!((watched.out.as_slice(), watched.err.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    let end = watched.end();
    assert_eq!((end.state, end.cause(), end.exit_code()), (RunState::Failed, proto::Cause::Exited, Some(7)));
    let run = handle.get().await.expect("get");
    assert_eq!((run.state(), run.attempts.len()), (RunState::Failed, 1));
    assert_eq!(run.outcome.as_ref(), Some(&end.outcome));
    service.assert_clean(&[handle.id()]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_key_with_the_same_spec_is_the_same_run() {
    let service = Service::start().await;
    let client = service.client();
    let spec = shell("exit 3").label("a", "b");
    for options in [key("a key ü"), id(SOME_ID)] {
        let first = client.run_with(spec.clone(), options.clone()).await.expect("run");
        first.wait().await.expect("the end");
        let again = client.run_with(spec.clone(), options).await.expect("run again");
        assert_eq!((again.id(), first.created(), again.created()), (first.id(), true, false));
        assert_eq!(again.run().state(), RunState::Failed, "it is answered as it is now");
    }
    assert_eq!(run_count(&client).await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_duplicates_make_one_run() {
    let service = Service::start().await;
    let clients: Vec<Client> = (0..8).map(|_| service.client()).collect();
    let calls = (0..64).map(|i| clients[i % 8].run_with(shell("echo once"), key("the one")));
    let handles: Vec<_> =
        futures::future::join_all(calls).await.into_iter().map(|answer| answer.expect("run")).collect();
    let ids: BTreeSet<&str> = handles.iter().map(|handle| handle.id()).collect();
    assert_eq!(ids.len(), 1);
    assert_eq!(handles.iter().filter(|handle| handle.created()).count(), 1, "one of them made it");
    let watched = watch(&clients[0], handles[0].id(), "").await;
    assert_eq!(watched.out, b"once\n");
    assert_eq!(run_count(&clients[0]).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_key_with_another_spec_is_refused_and_changes_nothing() {
    let service = Service::start().await;
    let client = service.client();
    for options in [key("a key"), id(SOME_ID)] {
        let first = client.run_with(shell("exit 3"), options.clone()).await.expect("run");
        let error = client.run_with(shell("exit 4"), options).await.map(|_| ()).expect_err("another spec");
        assert_eq!((error.kind(), error.reason()), (ErrorKind::AlreadyExists, Some("ALREADY_EXISTS")));
        let end = first.wait().await.expect("the end");
        assert_eq!(end.exit_code(), Some(3), "{end:?}");
    }
    assert_eq!(run_count(&client).await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn above_the_limit_the_answer_says_when_to_come_again_and_nothing_is_stored() {
    let service = Service::start_with(&[
        ("RUNNER_LIMITS__LIVE_RUNS", "2"),
        ("RUNNER_LIMITS__LIVE_RUNS_PER_TENANT", "2"),
    ])
    .await;
    let client = service.client();
    let first = client.run_with(shell("exec sleep 100000"), key("first")).await.expect("run");
    let second = client.run(shell("exec sleep 100000")).await.expect("run");
    let error = refused(&client, shell("exit 0")).await;
    assert_eq!((error.kind(), error.reason()), (ErrorKind::Exhausted, Some("LIMIT_REACHED")));
    assert!(error.retry_after().is_some_and(|after| after > Duration::ZERO), "{error:?}");
    assert!(!error.quota().is_empty());
    assert_eq!(run_count(&client).await, 2);
    let again =
        client.run_with(shell("exec sleep 100000"), key("first")).await.expect("a duplicate is answered");
    assert!(!again.created());
    for run in [&first, &second] {
        run.cancel("make room").await.expect("cancel");
        run.wait().await.expect("the end");
    }
    let third = client.run(shell("exit 0")).await.expect("there is room again");
    assert!(third.wait().await.expect("the end").succeeded());
    service.assert_clean(&[first.id(), second.id(), third.id()]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_specs_are_refused_with_the_field_named_and_nothing_is_stored() {
    let service = Service::start().await;
    let client = service.client();
    let ok = || shell("exit 0");
    assert_violation(&client, ok().backend("no-such-backend"), "spec.routing.backend", "INVALID").await;
    assert_violation(&client, RunSpec::from_image(""), "spec.command", "REQUIRED").await;
    assert_violation(&client, ok().image("no-such-image"), "spec.image", "UNSUPPORTED").await;
    assert_violation(&client, ok().image("white space"), "spec.image", "INVALID").await;
    assert_violation(&client, ok().memory_bytes(u64::MAX), "spec.resources.memory_bytes", "TOO_LARGE").await;
    assert_violation(&client, ok().cpu_millis(u32::MAX), "spec.resources.cpu_millis", "TOO_LARGE").await;
    assert_violation(&client, ok().pids(u32::MAX), "spec.resources.pids", "TOO_LARGE").await;
    for (seconds, reason) in [(30 * 86_400, "TOO_LARGE"), (u64::MAX >> 12, "INVALID")] {
        assert_violation(&client, ok().timeout(Duration::from_secs(seconds)), "spec.timeout", reason).await;
    }
    assert_violation(&client, ok().stop_grace(Duration::from_secs(86_400)), "spec.stop_grace", "TOO_LARGE")
        .await;
    for path in ["/inputs/../etc/passwd", "relative", "/", "/inputs//x", "/inputs/x\0y"] {
        assert_violation(&client, ok().input_bytes(path, "x"), "spec.inputs[0].path", "INVALID").await;
        assert_violation(&client, ok().output(path), "spec.outputs[0].path", "INVALID").await;
    }
    let twice = ok().output("/outputs/a").output("/outputs/a");
    assert_violation(&client, twice, "spec.outputs[1].path", "DUPLICATE").await;
    let inside = ok().output("/outputs").output("/outputs/a");
    assert_violation(&client, inside, "spec.outputs[1].path", "DUPLICATE").await;
    assert_violation(&client, ok().env("A=B", "x"), "spec.env", "INVALID").await;
    assert_violation(&client, ok().secret_env("A", "vault:x"), "spec.secrets", "UNSUPPORTED").await;
    let foreign = ok().input("/inputs/x", "artifact:uploads/another-tenant/x/y");
    assert_violation(&client, foreign, "spec.inputs[0].uri", "FORBIDDEN").await;
    let nonsense = ok().input("/inputs/x", "gopher://example.invalid/x");
    assert_violation(&client, nonsense, "spec.inputs[0].uri", "INVALID").await;
    let elsewhere = ok().input("/inputs/x", "https://example.invalid/x");
    assert_violation(&client, elsewhere.clone(), "spec.inputs[0].uri", "FORBIDDEN").await;
    assert_violation(&client, elsewhere, "spec.inputs[0].sha256", "REQUIRED").await;
    let digest = proto::Input {
        path: "/inputs/x".into(),
        source: Some(proto::input::Source::Inline("x".into())),
        sha256: "not a digest".into(),
        ..proto::Input::default()
    };
    assert_violation(&client, ok().input_spec(digest), "spec.inputs[0].sha256", "INVALID").await;
    assert_violation(&client, ok().user("0"), "spec.user", "UNSUPPORTED").await;
    assert_violation(&client, ok().label("", "x"), "spec.labels", "INVALID").await;
    let error = refused(&client, RunSpec::command([""]).output("bad").timeout(Duration::ZERO)).await;
    assert!(error.violations().len() >= 2, "all at once: {:?}", error.violations());
    assert_eq!(run_count(&client).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_environment_is_refused_in_either_of_two_ways() {
    let service = Service::start().await;
    let client = service.client();
    assert_violation(&client, shell("exit 0").env("A", "x".repeat(1 << 20)), "spec.env", "TOO_LARGE").await;
    // Larger than any message: refused before it is read.
    let error = refused(&client, shell("exit 0").env("A", "x".repeat(10 << 20))).await;
    assert!(matches!(error.kind(), ErrorKind::Invalid | ErrorKind::Exhausted), "{error}");
    assert_eq!(run_count(&client).await, 0);
    let handle = client.run(shell("exit 0")).await.expect("the service serves on");
    assert!(handle.wait().await.expect("the end").succeeded());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_ids_and_unknown_runs_are_told_apart() {
    let service = Service::start().await;
    let client = service.client();
    for bad in ["x", "00000000-0000-0000-0000-000000000000", "0199AAAABBBB7CCC8DDDEEEEEEEEEEEE"] {
        let error = client.get(bad).await.expect_err("not an id");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{bad}: {error}");
        let error = client.run_with(shell("exit 0"), id(bad)).await.map(|_| ()).expect_err("not an id");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{bad}: {error}");
    }
    let error = client.get(SOME_ID).await.expect_err("no such run");
    assert_eq!((error.kind(), error.reason()), (ErrorKind::NotFound, Some("RUN_NOT_FOUND")));
    assert_eq!(client.cancel(SOME_ID, "").await.expect_err("no such run").kind(), ErrorKind::NotFound);
    let mut events = client.stream(SOME_ID, StreamOptions::default());
    let error = within("the answer", events.next()).await.expect("an answer").expect_err("no such run");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let error =
        client.run_with(shell("exit 0"), key(&"x".repeat(256))).await.map(|_| ()).expect_err("too long");
    assert_eq!(error.kind(), ErrorKind::Invalid);
}
