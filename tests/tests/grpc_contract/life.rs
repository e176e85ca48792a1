//! What happens to a run on its way: inputs that fail, retries, hostile outputs, terminals and input.

use std::time::Duration;

use runner_tests::{
    proc,
    service::{Service, watch, watch_for, within},
};
use worker_client::{
    ErrorKind, RunOptions, TransferOptions,
    proto::{self, RunState},
};

use crate::{SOME_ID, shell};

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_services_on_one_machine_may_have_a_run_with_the_same_id() {
    let (one, other) = (Service::start().await, Service::start().await);
    for _ in 0..3 {
        let id = a_run_id();
        let options = RunOptions { run_id: Some(id.clone()), idempotency_key: None };
        let spec = shell("echo ready; exec sleep 100000").stop_grace(Duration::ZERO);
        let first = one.client().run_with(spec.clone(), options.clone()).await.expect("run");
        watch_for(&one.client(), first.id(), "ready").await;
        let second = other.client().run_with(spec, options).await.expect("run");
        watch_for(&other.client(), second.id(), "ready").await;
        second.cancel("only this one").await.expect("cancel");
        assert_eq!(second.wait().await.expect("the end").state, RunState::Cancelled);
        assert_eq!(proc::with_environment("RUNNER_RUN_ID", &id).len(), 1, "the other one lives");
        assert_eq!(first.get().await.expect("get").state(), RunState::Running);
        first.cancel("now this one").await.expect("cancel");
        assert_eq!(first.wait().await.expect("the end").state, RunState::Cancelled);
        one.assert_clean(&[&id]).await;
        other.assert_clean(&[&id]).await;
    }
}

fn a_run_id() -> String {
    use runner_core::clock::{IdGen as _, SystemIds};
    SystemIds.run_id().to_string()
}
