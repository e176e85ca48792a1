//! What a real service removes: when it is told to, when the operator says so, and after a crash in the middle of it.

use std::{fs, path::Path, process::Command};

use runner_core::crash::REMOVAL_POINTS;
use runner_tests::{
    binaries,
    service::{Service, eventually, within},
};
use worker_client::{Client, ErrorKind, RunOptions, RunSpec};

/// Runs something that prints, and stores a file and a directory; answers its id.
async fn finished(client: &Client, key: &str) -> String {
    let program = "echo hello; mkdir /outputs/d; echo x | tee /outputs/d/x > /outputs/f";
    let spec = RunSpec::command(["sh", "-c", program]).output("/outputs/d").output("/outputs/f");
    let options = RunOptions { idempotency_key: Some(key.to_owned()), ..RunOptions::default() };
    let run = client.run_with(spec, options).await.expect("the run is accepted");
    assert!(run.created(), "{key} names a run already");
    assert!(within("the end of the run", run.wait()).await.expect("the run ends").succeeded());
    run.id().to_owned()
}

/// Files below a directory whose path names the run.
fn files_of(dir: &Path, run: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok) {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files_of(&path, run));
        } else if path.display().to_string().contains(run) {
            found.push(path.display().to_string());
        }
    }
    found
}

async fn gone(client: &Client, run: &str) {
    eventually("the run to be gone", async || match client.get(run).await {
        Err(error) if error.kind() == ErrorKind::NotFound => Some(()),
        Ok(_) => None,
        Err(error) => panic!("{error}"),
    })
    .await;
}

#[tokio::test]
async fn a_removal_that_is_killed_at_any_point_is_finished_by_the_next_start() {
    let mut service = Service::start().await;
    let objects = service.data_dir().join("objects");
    for point in REMOVAL_POINTS {
        let id = finished(&service.client(), "key").await;
        assert!(!files_of(&objects, &id).is_empty(), "it stored something");
        service.kill();
        service.restart(&[("RUNNER_CRASH_AT", point)]).await;
        let lost = service.client().delete(id.as_str()).await.expect_err("the service dies");
        assert_ne!(lost.kind(), ErrorKind::NotFound, "{point}: {lost}");
        service.ended().await;
        service.restart(&[]).await;
        let client = service.client();
        // Nobody asks again.
        gone(&client, &id).await;
        assert_eq!(files_of(&objects, &id), [""; 0], "{point}");
        service.assert_clean(&[&id]).await;
    }
    // Its key names a new run each time: `finished` asserts it.
    finished(&service.client(), "key").await;
}

#[tokio::test]
async fn a_live_run_is_not_deleted_and_one_that_ended_is_with_all_that_it_left() {
    let service = Service::start().await;
    let client = service.client();
    let delete = |id: &str| {
        let mut command = Command::new(binaries::runnerctl().expect("the command line is built"));
        command.env_remove("RUNNER_ENDPOINT").args(["--endpoint", &service.endpoint(), "delete", id]);
        let output = command.output().expect("runnerctl");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let live = client.run(RunSpec::command(["sleep", "1000"])).await.expect("the run is accepted");
    let refused = client.delete(live.id()).await.expect_err("it lives");
    assert_eq!(refused.kind(), ErrorKind::FailedPrecondition, "{refused}");
    assert_eq!(refused.reason(), Some("RUN_NOT_ENDED"));
    let (code, said) = delete(live.id());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("has not ended"), "{said}");
    live.cancel("enough").await.expect("cancel");
    within("the end of the run", live.wait()).await.expect("the run ends");
    let (code, said) = delete(live.id());
    assert_eq!(code, Some(0), "right after its end: {said}");
    let id = finished(&client, "a").await;
    client.delete(id.as_str()).await.expect("it is deleted");
    let again = client.delete(id.as_str()).await.expect_err("it is gone");
    assert_eq!(again.kind(), ErrorKind::NotFound);
    assert_eq!(files_of(&service.data_dir().join("objects"), &id), [""; 0]);
    service.assert_clean(&[&id, live.id()]).await;
}

#[tokio::test]
async fn a_run_goes_by_itself_where_the_operator_says_so_and_only_there() {
    let mut service = Service::start_with(&[("RUNNER_RETENTION__INTERVAL", "1s")]).await;
    let id = finished(&service.client(), "a").await;
    service.kill();
    service.restart(&[("RUNNER_RETENTION__OUTPUTS", "1s"), ("RUNNER_RETENTION__LOGS", "none")]).await;
    let objects = service.data_dir().join("objects");
    let log = eventually("the outputs to go", async || {
        let left = files_of(&objects, &id);
        left.iter().all(|path| path.contains("/log/")).then_some(left)
    })
    .await;
    assert!(!log.is_empty(), "its log stays");
    service.client().get(id.as_str()).await.expect("its record stays");
    service.kill();
    service.restart(&[("RUNNER_RETENTION__RUNS", "1s")]).await;
    gone(&service.client(), &id).await;
    assert_eq!(files_of(&objects, &id), [""; 0]);
}
