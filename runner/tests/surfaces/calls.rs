//! Run, Stream, Cancel, Get, List, Attach, ListBackends, health, reflection, and the end of the service.

use std::time::Duration;

use runner_proto::v1::{self, attach_request::Message, stream_response::Event};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt as _;

use crate::harness::{Harness, run_request, soon, spec};

fn reason(status: &Status) -> String {
    status.get_error_details().error_info().map(|info| info.reason.clone()).unwrap_or_default()
}

async fn stream(harness: &Harness, run_id: &str, cursor: &str) -> Streaming<v1::StreamResponse> {
    let request =
        v1::StreamRequest { run_id: run_id.to_owned(), cursor: cursor.to_owned(), ..Default::default() };
    harness.runner().await.stream(request).await.unwrap().into_inner()
}

/// (log bytes, cursors after each message, the terminal event)
async fn drain(mut stream: Streaming<v1::StreamResponse>) -> (Vec<u8>, Vec<(String, usize)>, v1::Terminated) {
    let (mut log, mut cursors, mut terminated) = (Vec::new(), Vec::new(), None);
    while let Some(message) = stream.message().await.unwrap() {
        assert!(terminated.is_none(), "the terminal event is the last");
        match message.event.unwrap() {
            Event::Log(frame) => {
                assert_eq!(frame.offset, log.len() as u64, "frames are contiguous");
                log.extend_from_slice(&frame.data);
            }
            Event::Terminated(end) => terminated = Some(end),
            _ => {}
        }
        cursors.push((message.cursor, log.len()));
    }
    (log, cursors, terminated.expect("a terminal event"))
}

async fn accept(harness: &Harness, program: &[&str]) -> String {
    let response = harness.runner().await.run(run_request(spec(program))).await.unwrap().into_inner();
    assert!(response.created);
    response.run.unwrap().run_id
}

async fn wait_for_state(harness: &Harness, run_id: &str, state: v1::RunState) {
    let mut stream = stream(harness, run_id, "").await;
    while let Some(message) = stream.message().await.unwrap() {
        if let Some(Event::StateChanged(change)) = message.event
            && change.state == i32::from(state)
        {
            return;
        }
    }
    panic!("the run never was {state:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_accepted_streamed_resumed_and_answered_for() {
    let harness = Harness::start().await;
    soon(async {
        let id = accept(&harness, &["flood", "out", "200000", "binary", ";", "exit", "7"]).await;
        let (log, cursors, end) = drain(stream(&harness, &id, "").await).await;
        assert_eq!(log.len(), 200_000);
        assert_eq!(end.state, i32::from(v1::RunState::Failed));
        assert_eq!(end.outcome.unwrap().status, Some(v1::outcome::Status::ExitCode(7)));
        // Resuming from any cursor yields exactly what came after it.
        for (cursor, seen) in cursors.iter().rev().skip(1).step_by(3) {
            let mut rest = Vec::new();
            let mut stream = stream(&harness, &id, cursor).await;
            while let Some(message) = stream.message().await.unwrap() {
                if let Some(Event::Log(frame)) = message.event {
                    rest.extend_from_slice(&frame.data);
                }
            }
            assert!(rest == log[*seen..], "resumed from {cursor}");
        }
        let run = harness
            .runner()
            .await
            .get(v1::GetRequest { run_id: id })
            .await
            .unwrap()
            .into_inner()
            .run
            .unwrap();
        assert_eq!((run.attempts.len(), run.tenant.as_str()), (1, "default"));
        assert!(run.spec.is_some() && run.outcome.is_some());
    })
    .await;
    harness.surfaces.stop(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_fields_come_back_as_typed_violations() {
    let harness = Harness::start().await;
    let bad = v1::RunSpec { user: "root".to_owned(), working_dir: "x".to_owned(), ..spec(&["exit", "0"]) };
    let status = harness.runner().await.run(run_request(bad)).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::InvalidArgument, "INVALID_ARGUMENT"));
    let details = status.get_error_details();
    let fields: Vec<&str> = details
        .bad_request()
        .unwrap()
        .field_violations
        .iter()
        .map(|violation| violation.field.as_str())
        .collect();
    assert_eq!(fields, ["spec.user", "spec.working_dir"]);
    // What the backend cannot do is refused in the same way.
    let image = v1::RunSpec { image: "other".to_owned(), ..spec(&["exit", "0"]) };
    let status = harness.runner().await.run(run_request(image)).await.unwrap_err();
    assert_eq!(status.get_error_details().bad_request().unwrap().field_violations[0].field, "spec.image");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_key_is_the_same_run_and_another_spec_is_refused() {
    let harness = Harness::start().await;
    let mut runner = harness.runner().await;
    let request =
        |program: &[&str]| v1::RunRequest { idempotency_key: "k".to_owned(), ..run_request(spec(program)) };
    let first = runner.run(request(&["exit", "0"])).await.unwrap().into_inner();
    let again = runner.run(request(&["exit", "0"])).await.unwrap().into_inner();
    assert_eq!((first.created, again.created), (true, false));
    assert_eq!(first.run.unwrap().run_id, again.run.unwrap().run_id);
    let status = runner.run(request(&["exit", "1"])).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::AlreadyExists, "ALREADY_EXISTS"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_service_says_when_to_try_again() {
    let harness = Harness::start_with(|config| config.limits.live_runs = 1).await;
    accept(&harness, &["sleep-until-stopped"]).await;
    let status = harness.runner().await.run(run_request(spec(&["exit", "0"]))).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::ResourceExhausted, "LIMIT_REACHED"));
    let details = status.get_error_details();
    assert!(details.retry_info().unwrap().retry_delay.is_some());
    assert_eq!(details.quota_failure().unwrap().violations[0].subject, "live_runs");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_run_is_not_found_in_every_call() {
    let harness = Harness::start().await;
    let mut runner = harness.runner().await;
    let run_id = "00000000-0000-7000-8000-000000000001".to_owned();
    let get = runner.get(v1::GetRequest { run_id: run_id.clone() }).await.unwrap_err();
    let cancel =
        runner.cancel(v1::CancelRequest { run_id: run_id.clone(), ..Default::default() }).await.unwrap_err();
    let stream = runner.stream(v1::StreamRequest { run_id, ..Default::default() }).await.unwrap_err();
    for status in [get, cancel, stream] {
        assert_eq!((status.code(), reason(&status).as_str()), (Code::NotFound, "RUN_NOT_FOUND"));
    }
    let malformed = runner.get(v1::GetRequest { run_id: "7".to_owned() }).await.unwrap_err();
    assert_eq!(malformed.get_error_details().bad_request().unwrap().field_violations[0].field, "run_id");
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_show_every_run_once() {
    let harness = Harness::start().await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(accept(&harness, &["exit", "0"]).await);
    }
    let mut runner = harness.runner().await;
    let (mut seen, mut token) = (Vec::new(), String::new());
    loop {
        let request = v1::ListRequest { page_size: 2, page_token: token, ..Default::default() };
        let page = runner.list(request).await.unwrap().into_inner();
        assert!(page.runs.len() <= 2 && page.runs.iter().all(|run| run.spec.is_none()));
        seen.extend(page.runs.into_iter().map(|run| run.run_id));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
        // Added meanwhile: not seen, and nothing is seen twice.
        accept(&harness, &["exit", "0"]).await;
    }
    ids.reverse();
    assert_eq!(seen, ids);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_run_ends_cancelled() {
    let harness = Harness::start().await;
    soon(async {
        let id = accept(&harness, &["sleep-until-stopped"]).await;
        wait_for_state(&harness, &id, v1::RunState::Running).await;
        let request = v1::CancelRequest { run_id: id.clone(), reason: "test".to_owned() };
        let run = harness.runner().await.cancel(request).await.unwrap().into_inner().run.unwrap();
        assert!(run.cancel_requested);
        let (_, _, end) = drain(stream(&harness, &id, "").await).await;
        assert_eq!(end.state, i32::from(v1::RunState::Cancelled));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn attached_input_is_split_acknowledged_and_delivered_exactly() {
    let harness = Harness::start().await;
    soon(async {
        let program = v1::RunSpec { stdin: true, ..spec(&["echo-stdin"]) };
        let id =
            harness.runner().await.run(run_request(program)).await.unwrap().into_inner().run.unwrap().run_id;
        let (send, requests) = tokio::sync::mpsc::channel(4);
        let message = |message| v1::AttachRequest { message: Some(message) };
        let open = v1::AttachOpen { run_id: id.clone() };
        send.send(message(Message::Open(open))).await.unwrap();
        let mut answers =
            harness.runner().await.attach(ReceiverStream::new(requests)).await.unwrap().into_inner();
        assert!(answers.message().await.unwrap().unwrap().ready);
        let input: Vec<u8> = (0..200_000u32).map(|i| i.to_le_bytes()[0]).collect();
        send.send(message(Message::Stdin(input.clone().into()))).await.unwrap();
        let mut taken = Vec::new();
        while taken.last() != Some(&200_000) {
            taken.push(answers.message().await.unwrap().unwrap().stdin_bytes_taken);
        }
        assert_eq!(taken, [65_536, 131_072, 196_608, 200_000]);
        send.send(message(Message::Eof(v1::AttachEof {}))).await.unwrap();
        assert_eq!(answers.message().await.unwrap().unwrap().stdin_bytes_taken, 200_000);
        drop(send);
        assert!(answers.message().await.unwrap().is_none());
        let (log, _, _) = drain(stream(&harness, &id, "").await).await;
        assert!(log == input, "{} bytes came back", log.len());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn attach_begins_with_open_and_wants_a_run_that_takes_input() {
    let harness = Harness::start().await;
    soon(async {
        let first = v1::AttachRequest { message: Some(Message::Stdin("x".into())) };
        let mut answers =
            harness.runner().await.attach(tokio_stream::once(first)).await.unwrap().into_inner();
        let status = answers.message().await.unwrap_err();
        assert_eq!(status.get_error_details().bad_request().unwrap().field_violations[0].field, "open");

        let run_id = accept(&harness, &["sleep-until-stopped"]).await;
        let open = v1::AttachRequest { message: Some(Message::Open(v1::AttachOpen { run_id })) };
        let mut answers = harness.runner().await.attach(tokio_stream::once(open)).await.unwrap().into_inner();
        let status = answers.message().await.unwrap_err();
        assert_eq!((status.code(), reason(&status).as_str()), (Code::FailedPrecondition, "NO_STDIN"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn backends_are_listed_with_what_they_can() {
    let harness = Harness::start().await;
    let listed = harness.admin().await.list_backends(v1::ListBackendsRequest {}).await.unwrap().into_inner();
    assert_eq!(listed.backends.len(), 1);
    let backend = &listed.backends[0];
    assert_eq!((backend.name.as_str(), backend.kind.as_str(), backend.healthy), ("local", "fake", true));
    assert_eq!(backend.capabilities.as_ref().unwrap().images, ["fake"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn standard_health_and_reflection_answer() {
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let harness = Harness::start().await;
    soon(async {
        let mut health = tonic_health::pb::health_client::HealthClient::new(harness.channel().await);
        let request = tonic_health::pb::HealthCheckRequest { service: "runner.v1.Runner".to_owned() };
        let mut watch = health.watch(request).await.unwrap().into_inner();
        while watch.message().await.unwrap().unwrap().status != 1 {}

        let mut reflection = ServerReflectionClient::new(harness.channel().await);
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut answers =
            reflection.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
        let Some(MessageResponse::ListServicesResponse(list)) =
            answers.message().await.unwrap().unwrap().message_response
        else {
            panic!("no list");
        };
        let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
        for name in ["runner.v1.Runner", "runner.v1.Artifacts", "runner.v1.Admin", "grpc.health.v1.Health"] {
            assert!(names.iter().any(|known| known == name), "{names:?}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_too_large_is_refused() {
    let harness = Harness::start().await;
    let mut large = spec(&["exit", "0"]);
    large.args = vec!["x".repeat(5 << 20)];
    let status = harness.runner().await.run(run_request(large)).await.unwrap_err();
    assert!(matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_ends_streams_with_unavailable_and_stays_within_its_time() {
    let harness = Harness::start().await;
    let id = accept(&harness, &["sleep-until-stopped"]).await;
    wait_for_state(&harness, &id, v1::RunState::Running).await;
    let mut watching = stream(&harness, &id, "").await;
    let mut runner = harness.runner().await;
    let listen = harness.listen;
    let stopping =
        tokio::time::timeout(Duration::from_secs(10), harness.surfaces.stop(Duration::from_secs(8)));
    let ended = async {
        loop {
            match watching.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the stream ended as if the run had"),
                Err(status) => return status,
            }
        }
    };
    let (stopped, status) = tokio::join!(stopping, ended);
    stopped.expect("stopped in time");
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "SHUTTING_DOWN"));
    assert!(status.get_error_details().retry_info().is_some());
    assert!(tokio::net::TcpStream::connect(listen).await.is_err(), "nobody listens any more");
    assert!(runner.get(v1::GetRequest { run_id: id }).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_that_never_reads_does_not_slow_another() {
    let harness = Harness::start().await;
    soon(async {
        let id = accept(&harness, &["flood", "out", "8000000", "text"]).await;
        let _stalled = stream(&harness, &id, "").await;
        let (log, _, _) = drain(stream(&harness, &id, "").await).await;
        assert_eq!(log.len(), 8_000_000);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_without_following_ends_after_what_is_known() {
    let harness = Harness::start().await;
    soon(async {
        let id = accept(&harness, &["sleep-until-stopped"]).await;
        wait_for_state(&harness, &id, v1::RunState::Running).await;
        let request = v1::StreamRequest { run_id: id, no_follow: true, ..Default::default() };
        let stream = harness.runner().await.stream(request).await.unwrap().into_inner();
        let messages: Vec<_> = stream.collect().await;
        assert!(messages.len() >= 3 && messages.iter().all(Result::is_ok), "{messages:?}");
    })
    .await;
}
