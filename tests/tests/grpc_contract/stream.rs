//! Stream: resuming, many watchers, logs beyond the limit, clients that go away.

use std::time::Duration;

use futures::StreamExt as _;
use runner_core::fake::backend::Flood;
use runner_tests::{
    proc,
    service::{Service, Watched, eventually, watch, watch_for, within},
};
use worker_client::{
    Client, ErrorKind, ListFilter, StreamOptions,
    proto::{self, RunState},
};

use crate::{SOME_ID, shell};

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
    let mut before = Watched::default();
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
    let mut late = Watched::default();
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
