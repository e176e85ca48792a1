//! The contract, through `worker-client`, against a real service process.

use std::{collections::BTreeSet, time::Duration};

use futures::StreamExt as _;
use runner_core::fake::backend::Flood;
use runner_tests::{
    proc,
    service::{Service, eventually, watch, watch_for, within},
};
use worker_client::{
    Client, ClientError, ErrorKind, ListFilter, RunOptions, RunSpec, StreamOptions, TransferOptions,
    proto::{self, RunState},
};

fn shell(script: &str) -> RunSpec {
    RunSpec::command(["sh", "-c", script])
}

fn key(key: &str) -> RunOptions {
    RunOptions { run_id: None, idempotency_key: Some(key.to_owned()) }
}

fn id(id: &str) -> RunOptions {
    RunOptions { run_id: Some(id.to_owned()), idempotency_key: None }
}

const SOME_ID: &str = "0199aaaa-bbbb-7ccc-8ddd-eeeeeeeeeeee";

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

async fn run_count(client: &Client) -> usize {
    client.list(ListFilter::default()).map(|run| run.expect("list")).count().await
}

// Run

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
        assert_eq!(first.wait().await.expect("the end").exit_code(), Some(3));
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
    let nonsense = ok().input("/inputs/x", "https://example.invalid/x");
    assert_violation(&client, nonsense, "spec.inputs[0].uri", "INVALID").await;
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

// Stream

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resuming_from_every_cursor_yields_neither_a_gap_nor_a_repeat() {
    let service = Service::start().await;
    let client = service.client();
    let script = "i=0; while [ $i -lt 8 ]; do echo out $i; echo err $i >&2; i=$((i+1)); sleep 0.03; done";
    let handle = client.run(shell(script)).await.expect("run");
    let live = watch(&client, handle.id(), "").await;
    let replay = watch(&client, handle.id(), "").await;
    assert_eq!(
        (&replay.states, &replay.out, &replay.err, &replay.end),
        (&live.states, &live.out, &live.err, &live.end)
    );
    // Frames may be cut otherwise in a replay, so that what is compared is what a watcher has when it goes on: the part
    // up to the cursor, and the part from it.
    let mut events = client.stream(handle.id(), StreamOptions::default());
    let mut before = runner_tests::service::Watched::default();
    let mut cursors = 0;
    while let Some(event) = within("the next event", events.next()).await {
        let event = event.expect("the stream goes on");
        let last = matches!(event.event, worker_client::Event::Terminated(_));
        before.take(handle.id(), event.cursor.clone(), event.event);
        if last {
            break;
        }
        let after = watch(&client, handle.id(), &event.cursor).await;
        assert_eq!([before.out.clone(), after.out].concat(), live.out, "from {}", event.cursor);
        assert_eq!([before.err.clone(), after.err].concat(), live.err, "from {}", event.cursor);
        assert_eq!([before.states.clone(), after.states].concat(), live.states, "from {}", event.cursor);
        assert_eq!(after.end, live.end);
        cursors += 1;
    }
    assert!(cursors >= 4, "there were events to resume from: {cursors}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_malformed_cursor_is_refused() {
    let service = Service::start().await;
    let client = service.client();
    let handle = client.run(shell("exit 0")).await.expect("run");
    for cursor in ["x", "-1", "1.1.1.1.1", "99999999999999999999999.1.1"] {
        let mut events = client.stream(handle.id(), StreamOptions::default().from_cursor(cursor));
        let error = within("the answer", events.next()).await.expect("an answer").expect_err("not a cursor");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{cursor}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_watchers_see_the_same_and_one_that_never_reads_slows_nobody() {
    const BYTES: usize = 48 * 1024 * 1024;
    let service = Service::start().await;
    let handle = service
        .client()
        .run(shell(&format!("sleep 0.3; seq 1 999999999 2>/dev/null | head -c {BYTES}")))
        .await
        .expect("run");
    // On connections of their own, so that flow control of one says nothing of another. They take one event, then none.
    let mut stalled = Vec::new();
    for _ in 0..8 {
        let client = service.client();
        let mut events = client.stream(handle.id(), StreamOptions::default());
        within("the first event", events.next()).await.expect("an event").expect("the stream goes on");
        stalled.push((client, events));
    }
    let before = proc::resident_bytes(service.pid()).expect("the service lives");
    let clients: Vec<Client> = (0..4).map(|_| service.client()).collect();
    let seen = futures::future::join_all(clients.iter().map(|client| watch(client, handle.id(), ""))).await;
    let expected = Flood::new(false).take(BYTES);
    for watched in &seen {
        assert!(watched.out == expected, "{} bytes", watched.out.len());
        assert_eq!(watched.end().exit_code(), Some(0));
    }
    let after = proc::resident_bytes(service.pid()).expect("the service lives");
    assert!(after < before + 100 * 1024 * 1024, "the service grew from {before} to {after} bytes");
    // One of the stalled goes on where it was: it lost nothing.
    let (client, mut events) = stalled.pop().expect("there are eight");
    let mut late = runner_tests::service::Watched::default();
    while let Some(event) = within("the next event", events.next()).await {
        match event {
            Ok(event) => late.take(handle.id(), event.cursor, event.event),
            // It was disconnected for not reading: it resumes.
            Err(_) => break,
        }
    }
    if late.terminated == 0 {
        let cursor = late.cursors.last().cloned().unwrap_or_default();
        late.out.extend(watch(&client, handle.id(), &cursor).await.out);
    }
    assert!(late.out == expected, "{} bytes", late.out.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_of_a_gigabyte_is_bounded_by_the_log_limit_and_counted() {
    const LIMIT: u64 = 8 << 20;
    const LINE: u64 = 1 << 30;
    let service = Service::start_with(&[("RUNNER_LIMITS__LOG_BYTES", "8MiB")]).await;
    let client = service.client();
    // Without a newline, and not UTF-8.
    let handle =
        client.run(shell(&format!("head -c {LINE} /dev/zero | tr '\\0' '\\377'"))).await.expect("run");
    let watched = watch(&client, handle.id(), "").await;
    assert_eq!(watched.end().exit_code(), Some(0), "{:?}", watched.end());
    assert_eq!((watched.out.len() as u64, watched.dropped), (LIMIT, LINE - LIMIT));
    assert!(watched.out.iter().all(|byte| *byte == 0xff));
    let resident = proc::resident_bytes(service.pid()).expect("the service lives");
    assert!(resident < 300 << 20, "{resident} bytes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_disconnects_in_any_call_disturbs_nobody() {
    let service = Service::start().await;
    let client = service.client();
    let running = client.run(shell("echo ready; cat; exit 9").stdin()).await.expect("run");
    watch_for(&client, running.id(), "ready").await;
    for micros in [0, 100, 300, 1_000, 3_000, 10_000] {
        let patience = Duration::from_micros(micros);
        let other = service.client();
        let calls = async {
            let _ = tokio::time::timeout(patience, other.run(shell("exit 0"))).await;
            let _ = tokio::time::timeout(patience, other.get(running.id())).await;
            let _ = tokio::time::timeout(patience, other.list_page(proto::ListRequest::default())).await;
            let _ = tokio::time::timeout(patience, other.backends()).await;
            let mut events = other.stream(running.id(), StreamOptions::default());
            let _ = tokio::time::timeout(patience, async { while events.next().await.is_some() {} }).await;
            let _ = tokio::time::timeout(patience, async {
                let attachment = other.attach(running.id()).await?;
                attachment.input().stdin("x").await
            })
            .await;
            let _ = tokio::time::timeout(patience, other.cancel(SOME_ID, "")).await;
        };
        calls.await;
        drop(other);
    }
    assert_eq!(running.get().await.expect("get").state(), RunState::Running);
    let attachment = running.attach().await.expect("attach");
    attachment.input().eof().await.expect("end of input");
    assert_eq!(running.wait().await.expect("the end").exit_code(), Some(9));
    // Every run that was accepted, answered or not, comes to its end, and does not wait for the reconciler to find it.
    let ended = eventually("the end of all runs", async || {
        let runs: Vec<_> = client.list(ListFilter::default()).map(|run| run.expect("list")).collect().await;
        runs.iter().all(|run| run.end_time.is_some()).then_some(())
    });
    assert!(tokio::time::timeout(Duration::from_secs(30), ended).await.is_ok(), "a run waits for its driver");
    service.assert_clean(&[running.id()]).await;
}

// Cancel

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
        echo half > /outputs/file; echo ready; trap '' TERM; while :; do sleep 1; done";
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

// Inputs that fail, terminals, attach

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_input_that_is_not_there_or_not_what_was_promised_is_told() {
    let service = Service::start().await;
    let client = service.client();
    let missing =
        shell("exit 0").input("/inputs/x", "artifact:uploads/default/0199aaaa-bbbb-7ccc-8ddd-eeeeeeeeeeee/x");
    let other = proto::Input {
        path: "/inputs/x".into(),
        source: Some(proto::input::Source::Inline("x".into())),
        sha256: "0".repeat(64),
        ..proto::Input::default()
    };
    for spec in [missing, shell("exit 0").input_spec(other)] {
        let handle = client.run(spec).await.expect("run");
        let end = within("the end", handle.wait()).await.expect("the end");
        assert_eq!((end.state, end.cause()), (RunState::Failed, proto::Cause::Input), "{end:?}");
        assert_eq!((end.exit_code(), end.outcome.retryable), (None, false));
        service.assert_clean(&[handle.id()]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_input_that_vanishes_between_admission_and_staging_is_told() {
    let backends = r#"[{ kind = "local", name = "local", slots = 1 }]"#;
    let service = Service::start_with(&[("RUNNER_BACKENDS", backends)]).await;
    let client = service.client();
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    let uploaded = client.upload_file(file.path(), TransferOptions::default()).await.expect("upload");
    let first = client.run(shell("echo ready; exec sleep 100000")).await.expect("run");
    watch_for(&client, first.id(), "ready").await;
    let waiting = client.run(shell("exit 0").input("/inputs/x", uploaded.uri)).await.expect("run");
    assert_eq!(waiting.get().await.expect("get").state(), RunState::Queued);
    std::fs::remove_dir_all(service.data_dir().join("objects/objects/uploads"))
        .expect("take the uploads away");
    first.cancel("make room").await.expect("cancel");
    let end = within("the end", waiting.wait()).await.expect("the end");
    assert_eq!(
        (end.state, end.cause(), end.exit_code()),
        (RunState::Failed, proto::Cause::Input, None),
        "{end:?}"
    );
    first.wait().await.expect("the end");
    service.assert_clean(&[first.id(), waiting.id()]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_attempt_of_a_retried_run_keeps_its_own_log_and_outcome() {
    let service = Service::start().await;
    let client = service.client();
    let policy = proto::RetryPolicy {
        max_attempts: 3,
        initial_backoff: Some(worker_client::convert::duration_to_proto(Duration::from_millis(50))),
        causes: vec![proto::Cause::Exited.into()],
        ..proto::RetryPolicy::default()
    };
    let spec = shell("echo attempt $RUNNER_ATTEMPT; exit $((RUNNER_ATTEMPT + 3))").retry_policy(policy);
    let handle = client.run(spec).await.expect("run");
    let watched = watch(&client, handle.id(), "").await;
    assert_eq!(String::from_utf8_lossy(&watched.out), "attempt 1\nattempt 2\nattempt 3\n");
    assert_eq!((watched.end().state, watched.end().exit_code()), (RunState::Failed, Some(6)));
    let run = handle.get().await.expect("get");
    let codes: Vec<_> = run
        .attempts
        .iter()
        .map(|attempt| attempt.outcome.as_ref().and_then(|outcome| outcome.status))
        .collect();
    assert_eq!(codes, [4, 5, 6].map(|code| Some(proto::outcome::Status::ExitCode(code))));
    service.assert_clean(&[handle.id()]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outputs_that_are_links_or_devices_are_not_followed() {
    let service = Service::start().await;
    let client = service.client();
    let script = "mkdir -p /outputs/d && cd /outputs/d && echo own > own && ln -s /etc/passwd link && \
                  ln -s / root && mkfifo pipe && ln -s own own-link";
    let handle = client.run(shell(script).output("/outputs/d")).await.expect("run");
    let end = within("the end", handle.wait()).await.expect("the end");
    let manifest = end.outputs().expect("outputs");
    let files: Vec<(&str, u64)> = manifest
        .entries
        .iter()
        .filter(|entry| entry.kind() == proto::manifest_entry::Kind::File)
        .map(|entry| (entry.path.as_str(), entry.size))
        .collect();
    assert_eq!(files, [("own", 4)], "{end:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminal_takes_input_and_a_new_size() {
    let service = Service::start().await;
    let client = service.client();
    let spec = shell("stty size; read line; stty size; echo got $line").terminal(90, 30);
    let handle = client.run(spec).await.expect("run");
    watch_for(&client, handle.id(), "30 90").await;
    let attachment = handle.attach().await.expect("attach");
    attachment.input().resize(100, 40).await.expect("resize");
    attachment.input().stdin("words\n").await.expect("input");
    let watched = watch(&client, handle.id(), "").await;
    let shown = String::from_utf8_lossy(&watched.out).replace('\r', "");
    assert!(shown.contains("40 100\n") && shown.contains("got words\n"), "{shown}");
    assert!(watched.err.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attach_is_refused_where_nobody_listens() {
    let service = Service::start().await;
    let client = service.client();
    let deaf = client.run(shell("echo ready; exec sleep 100000")).await.expect("run");
    watch_for(&client, deaf.id(), "ready").await;
    let error = client.attach(deaf.id()).await.map(|_| ()).expect_err("no standard input");
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition, "{error}");
    deaf.cancel("").await.expect("cancel");
    deaf.wait().await.expect("the end");
    let error = client.attach(SOME_ID).await.map(|_| ()).expect_err("no such run");
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}

// List, backends

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn list_pages_are_stable_while_runs_are_added_and_filters_hold() {
    let service = Service::start().await;
    let client = service.client();
    let mut made = Vec::new();
    for number in 0..25 {
        let spec = shell(&format!("exit {}", number % 2)).label("parity", (number % 2).to_string());
        made.push(client.run(spec).await.expect("run"));
    }
    for handle in &made {
        handle.wait().await.expect("the end");
    }
    let mut request = proto::ListRequest { page_size: 4, ..proto::ListRequest::default() };
    let mut seen = Vec::new();
    loop {
        let page = client.list_page(request.clone()).await.expect("a page");
        assert!(page.runs.len() <= 4);
        seen.extend(page.runs.into_iter().map(|run| run.run_id));
        client.run(shell("exit 0").label("later", "yes")).await.expect("run meanwhile");
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let newest_first: Vec<&str> = made.iter().rev().map(|handle| handle.id()).collect();
    assert_eq!(seen, newest_first);
    let count = async |filter: ListFilter| client.list(filter).map(|run| run.expect("list")).count().await;
    assert_eq!(count(ListFilter::default().label("parity", "1")).await, 12);
    assert_eq!(count(ListFilter::default().label("parity", "1").state(RunState::Succeeded)).await, 0);
    assert_eq!(count(ListFilter::default().state(RunState::Failed)).await, 12);
    assert_eq!(count(ListFilter::default().backend("another")).await, 0);
    for bad in [
        proto::ListRequest { page_token: "nonsense".into(), ..proto::ListRequest::default() },
        proto::ListRequest { page_size: 100_000, ..proto::ListRequest::default() },
    ] {
        let error = client.list_page(bad.clone()).await.expect_err("a bad request");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{bad:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators_see_backends_health_and_metrics() {
    let service = Service::start().await;
    let backends = service.client().backends().await.expect("backends");
    let local = backends.iter().find(|backend| backend.name == "local").expect("the local backend");
    assert!(local.healthy && local.max_attempts > 0, "{local:?}");
    assert_eq!(local.kind, "local");
    for path in ["/healthz", "/readyz", "/metrics"] {
        let page = service.ops(path).await.expect("an answer");
        assert!(page.starts_with("HTTP/1.1 200"), "{path}: {page}");
    }
}
