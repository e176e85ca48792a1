//! Which calls are made again, and which never are.

mod support;

use std::time::Duration;

use futures::TryStreamExt as _;
use support::{Answer, Cut, Fake, run_events};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
use worker_client::{Client, ErrorKind, ListFilter, RunOptions, RunSpec};

fn spec() -> RunSpec {
    RunSpec::command(["true"])
}

#[tokio::test]
async fn a_run_whose_answer_was_lost_is_found_again_and_not_made_twice() {
    let fake = Fake::start().await;
    fake.state().answers.extend([Answer::Lose, Answer::Refuse(Status::unavailable("restarting"))]);
    let run = fake.client().await.run(spec()).await.expect("run");
    assert!(run.created(), "it was this call that made it");
    let state = fake.state();
    assert_eq!(state.calls, ["run", "run", "run"]);
    assert_eq!(state.runs.len(), 1);
    assert!(state.runs.contains_key(run.id()));
    // Version 7: the thirteenth digit says so.
    assert_eq!(run.id().as_bytes()[14], b'7');
}

#[tokio::test]
async fn a_key_takes_the_place_of_an_id_of_the_clients_own() {
    let fake = Fake::start().await;
    fake.state().answers.push_back(Answer::Lose);
    let options = RunOptions { idempotency_key: Some("nightly".to_owned()), ..RunOptions::default() };
    let run = fake.client().await.run_with(spec(), options).await.expect("run");
    assert_eq!(run.id(), "key-nightly");
    assert_eq!(fake.state().runs.len(), 1);
}

#[tokio::test]
async fn a_bad_spec_is_refused_once_with_its_fields() {
    let fake = Fake::start().await;
    let mut details = ErrorDetails::new();
    details.add_bad_request_violation("spec.command[0]", "must not be empty");
    let status = Status::with_error_details(Code::InvalidArgument, "bad", details);
    fake.state().answers.push_back(Answer::Refuse(status));
    let error = fake.client().await.run(spec()).await.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(error.violations()[0].field, "spec.command[0]");
    assert_eq!(fake.state().calls, ["run"]);
}

#[tokio::test]
async fn an_internal_error_is_not_tried_again() {
    let fake = Fake::start().await;
    fake.state().answers.push_back(Answer::Refuse(Status::internal("bug")));
    let error = fake.client().await.get("x").await.expect_err("internal");
    assert_eq!(error.kind(), ErrorKind::Internal);
    assert_eq!(fake.state().calls, ["get"]);
}

#[tokio::test]
async fn an_exhausted_limit_is_tried_again_only_when_the_service_says_when() {
    let fake = Fake::start().await;
    let client = fake.client().await;
    let details = ErrorDetails::with_retry_info(Some(Duration::from_millis(120)));
    let busy = Status::with_error_details(Code::ResourceExhausted, "busy", details);
    fake.state().answers.push_back(Answer::Refuse(busy));
    let early = tokio::time::timeout(Duration::from_millis(110), client.run(spec())).await;
    assert!(early.is_err(), "not before the service wished");
    fake.state().calls.clear();
    let details = ErrorDetails::with_retry_info(Some(Duration::from_millis(5)));
    let busy = Status::with_error_details(Code::ResourceExhausted, "busy", details);
    fake.state().answers.push_back(Answer::Refuse(busy));
    client.run(spec()).await.expect("the second try");
    assert_eq!(fake.state().calls.len(), 2);

    fake.state().answers.push_back(Answer::Refuse(Status::resource_exhausted("for good")));
    let error = client.run(spec()).await.expect_err("no time was named");
    assert_eq!(error.kind(), ErrorKind::Exhausted);
    assert_eq!(fake.state().calls.len(), 3);
}

#[tokio::test]
async fn a_service_that_stays_away_is_given_up_on() {
    let fake = Fake::start().await;
    let client = fake.client().await;
    fake.state().answers.extend(vec![Answer::Refuse(Status::unavailable("away")); 50]);
    let error = client.cancel("x", "why").await.expect_err("away");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(fake.state().calls.len(), 5, "as often as the policy says");
}

#[tokio::test]
async fn input_is_never_sent_twice() {
    let fake = Fake::start().await;
    let client = fake.client().await;
    fake.state().answers.push_back(Answer::Refuse(Status::unavailable("restarting")));
    let error = client.attach("x").await.expect_err("not repeated");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(fake.state().calls, ["attach"]);
}

#[tokio::test]
async fn input_arrives_whole_and_is_acknowledged() {
    let fake = Fake::start().await;
    let mut attachment = fake.client().await.attach("x").await.expect("attach");
    let mut input = attachment.input();
    let bytes: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    let expected = bytes.clone();
    let send = async {
        input.stdin(bytes).await.expect("send");
        input.resize(100, 50).await.expect("resize");
        input.eof().await.expect("eof");
    };
    let acknowledge = async { while attachment.acknowledged().await.expect("answer").is_some() {} };
    tokio::join!(send, acknowledge);
    assert_eq!(attachment.taken(), 300_000);
    assert!(fake.state().stdin == expected);
}

#[tokio::test]
async fn pages_are_asked_for_as_they_are_needed() {
    let fake = Fake::start().await;
    let page = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
    fake.state().pages = vec![page(&["a", "b"]), page(&[]), page(&["c"])];
    let client = fake.client().await;
    let mut runs = client.list(ListFilter::default());
    assert_eq!(runs.try_next().await.expect("first").expect("a run").run_id, "a");
    assert_eq!(fake.state().calls.len(), 1, "the second page is not needed yet");
    fake.state().answers.push_back(Answer::Refuse(Status::unavailable("for a moment")));
    let rest: Vec<_> = runs.map_ok(|run| run.run_id).try_collect().await.expect("rest");
    assert_eq!(rest, ["b", "c"]);
}

#[tokio::test]
async fn a_run_is_followed_to_its_end_in_one_call() {
    let fake = Fake::start().await;
    fake.state().events = run_events(3);
    fake.state().cuts.push_back(Cut::End(2));
    let mut log = Vec::new();
    let client = fake.client().await;
    let end = client.run_to_end(spec(), |event| {
        if let worker_client::Event::Log(frame) = event {
            log.extend_from_slice(&frame.data);
        }
    });
    let end = end.await.expect("end");
    assert!(end.succeeded());
    assert_eq!(end.exit_code(), Some(0));
    assert_eq!(log, b"frame 0 \0\nframe 1 \0\nframe 2 \0\n");
}

#[tokio::test]
async fn nobody_at_the_endpoint_is_unreachable() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("address");
    drop(listener);
    let error = Client::connect(format!("http://{address}")).await.expect_err("nobody");
    assert_eq!(error.kind(), ErrorKind::Unreachable);
    for (endpoint, kind) in [
        ("https://127.0.0.1", ErrorKind::Unsupported),
        ("127.0.0.1:7600", ErrorKind::Invalid),
        ("ftp://x", ErrorKind::Invalid),
        ("", ErrorKind::Invalid),
    ] {
        assert_eq!(Client::connect(endpoint).await.expect_err(endpoint).kind(), kind, "{endpoint}");
    }
}

#[tokio::test]
async fn a_call_that_takes_too_long_says_so() {
    // Accepts and never answers.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    support::spawn(async move {
        let mut open = Vec::new();
        while let Ok((socket, _)) = listener.accept().await {
            open.push(socket);
        }
    });
    let builder = Client::builder(format!("http://{address}")).call_timeout(Duration::from_millis(50));
    let builder = builder.retry(worker_client::RetryPolicy::never());
    let client = builder.connect_lazy().expect("client");
    let error = client.get("x").await.expect_err("too long");
    assert_eq!(error.kind(), ErrorKind::DeadlineExceeded);
}
