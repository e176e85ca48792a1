//! The object store fails while a run needs it, as seen from the run: what passes by delays it, what does not ends it as
//! `INPUT` or `OUTPUT` with evidence. Nothing half is ever visible, and no upload in parts is left behind.

use runner_tests::{
    objects::{Action, Dialect, Fault, StoreServer},
    service::{Service, watch},
};
use worker_client::{
    Client, Finished, RunSpec, TransferOptions,
    proto::{Cause, RunState},
};

/// Of an output that goes in parts, in bytes.
const LARGE: usize = 20 << 20;

struct World {
    bucket: StoreServer,
    service: Service,
}

impl World {
    async fn start(settings: &[(&str, &str)]) -> Self {
        let bucket = StoreServer::start(Dialect::S3);
        let store = bucket.settings("faults");
        let mut all: Vec<(&str, &str)> = store.iter().map(|(name, value)| (*name, value.as_str())).collect();
        all.extend(settings);
        let service = Service::start_with(&all).await;
        Self { bucket, service }
    }

    fn client(&self) -> Client {
        self.service.client()
    }

    /// Uploads a small file; answers what an input names.
    async fn upload(&self) -> String {
        let dir = tempfile::tempdir().expect("temp dir");
        let local = dir.path().join("a");
        std::fs::write(&local, "hello").expect("a local file");
        self.client().upload_file(&local, TransferOptions::default()).await.expect("the upload").uri
    }

    async fn run(&self, spec: RunSpec) -> (String, Vec<RunState>, Finished) {
        let run = self.client().run(spec).await.expect("the run is accepted");
        let watched = watch(&self.client(), run.id(), "").await;
        let states = watched.states.iter().map(|(state, _)| *state).collect();
        (run.id().to_owned(), states, watched.end().clone())
    }

    /// Nothing of the run's outputs is visible, and nothing was left on the way.
    async fn assert_nothing_half(&self, run: &str) {
        let keys = self.bucket.bucket().keys();
        assert!(!keys.iter().any(|key| key.contains(run) && key.ends_with("manifest.json")), "{keys:?}");
        assert_eq!(self.bucket.bucket().uploads(), [""; 0], "abandoned uploads");
        self.service.assert_clean(&[run]).await;
    }
}

fn sh(program: &str) -> RunSpec {
    RunSpec::command(["sh", "-c", program])
}

/// Evidence and message, as one text.
fn said(end: &Finished) -> String {
    format!("{:?}", end.outcome)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_answers_503_for_a_while_delays_a_run_and_fails_nothing() {
    let world = World::start(&[]).await;
    let uri = world.upload().await;
    let slow = || Action::Status(503, "SlowDown");
    world.bucket.fault(Fault::on("GET", "", slow()).at("/files/").times(3));
    world.bucket.fault(Fault::on("PUT", "", slow()).at("/outputs/0").times(3));
    world.bucket.fault(Fault::on("POST", "uploads", slow()).at("/outputs/1").times(2));
    world.bucket.fault(Fault::on("PUT", "partNumber=2", slow()).at("/outputs/1").times(3));
    world.bucket.fault(Fault::on("POST", "uploadId=", slow()).at("/outputs/1").times(2));
    world.bucket.fault(Fault::on("PUT", "", slow()).at("/manifest.json").times(3));
    let spec = sh(&format!("cp /inputs/a /outputs/a; head -c {LARGE} /dev/zero > /outputs/b"));
    let (id, _, end) =
        world.run(spec.input("/inputs/a", uri).output("/outputs/a").output("/outputs/b")).await;
    assert!(end.succeeded(), "{end:?}");
    assert!(world.bucket.faults().all_struck(), "{:?}", world.bucket.faults());
    let manifest = end.outputs().expect("a manifest");
    let sizes: Vec<u64> = manifest.entries.iter().map(|entry| entry.size).collect();
    assert_eq!(sizes, [5, LARGE as u64]);
    let dir = tempfile::tempdir().expect("temp dir");
    let downloads = world.client().download_outputs(manifest, dir.path(), TransferOptions::default()).await;
    assert_eq!(downloads.expect("what was stored").len(), 2, "and its digests are right");
    assert_eq!(world.bucket.bucket().uploads(), [""; 0]);
    world.service.assert_clean(&[&id]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_input_that_the_store_does_not_give_ends_the_run_as_input_before_its_program() {
    let world = World::start(&[("RUNNER_OBJECT_STORE__TRIES", "2")]).await;
    let uri = world.upload().await;
    for (status, code, retryable) in [(403, "AccessDenied", false), (503, "SlowDown", true)] {
        world.bucket.fault(Fault::on("GET", "", Action::Status(status, code)).at("/files/").times(u32::MAX));
        let spec = sh("echo never").input("/inputs/a", uri.as_str()).output("/outputs/a");
        let (id, states, end) = world.run(spec).await;
        assert_eq!((end.state, end.cause()), (RunState::Failed, Cause::Input), "{end:?}");
        assert_eq!(end.outcome.retryable, retryable, "{end:?}");
        assert!(!end.outcome.evidence.is_empty(), "{end:?}");
        assert!(said(&end).contains(&status.to_string()) && said(&end).contains("files/a"), "{end:?}");
        assert!(!states.contains(&RunState::Running), "{states:?}");
        world.bucket.faults().clear();
        world.assert_nothing_half(&id).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_input_that_is_gone_ends_the_run_as_input() {
    let world = World::start(&[]).await;
    let uri = world.upload().await;
    assert_eq!(world.client().delete_artifacts(uri.as_str()).await.expect("it is deleted"), 1);
    let (id, states, end) = world.run(sh("echo never").input("/inputs/a", uri)).await;
    assert_eq!((end.cause(), end.outcome.retryable), (Cause::Input, false), "{end:?}");
    assert!(said(&end).contains("files/a"), "{end:?}");
    assert!(!states.contains(&RunState::Running), "{states:?}");
    world.assert_nothing_half(&id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_output_that_the_store_refuses_ends_the_run_as_output_and_is_not_visible() {
    let world = World::start(&[("RUNNER_OBJECT_STORE__TRIES", "2")]).await;
    // The first output is stored; the second begins in parts, and one of them is refused.
    let refused = Fault::on("PUT", "partNumber=2", Action::Status(403, "AccessDenied")).at("/outputs/1");
    world.bucket.fault(refused.times(u32::MAX));
    let spec = sh(&format!("echo x > /outputs/a; head -c {LARGE} /dev/zero > /outputs/b"));
    let (id, states, end) = world.run(spec.output("/outputs/a").output("/outputs/b")).await;
    assert_eq!((end.state, end.cause()), (RunState::Failed, Cause::Output), "{end:?}");
    assert_eq!((end.exit_code(), end.outcome.retryable), (Some(0), false), "{end:?}");
    assert!(said(&end).contains("403") && said(&end).contains("outputs/1"), "{end:?}");
    assert!(states.contains(&RunState::Publishing), "{states:?}");
    assert_eq!(end.outputs().map_or(0, |manifest| manifest.entries.len()), 0, "{end:?}");
    world.assert_nothing_half(&id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_stays_full_ends_the_run_as_output_and_one_that_has_room_again_does_not() {
    let patience = [("RUNNER_OBJECT_STORE__TRIES", "2"), ("RUNNER_OBJECT_STORE__PUBLISH_PATIENCE", "2s")];
    let world = World::start(&patience).await;
    let spec = || sh(&format!("head -c {LARGE} /dev/zero > /outputs/b")).output("/outputs/b");
    // For outputs only: a log that cannot be stored is waited for.
    let full = Fault::on("PUT", "partNumber=", Action::Status(507, "XMinioStorageFull")).at("/outputs/");
    world.bucket.fault(full.times(u32::MAX));
    let (id, _, end) = world.run(spec()).await;
    assert_eq!((end.state, end.cause()), (RunState::Failed, Cause::Output), "{end:?}");
    assert!(end.outcome.retryable && said(&end).contains("507"), "{end:?}");
    world.assert_nothing_half(&id).await;
    world.bucket.faults().clear();
    let full = Fault::on("PUT", "partNumber=", Action::Status(507, "XMinioStorageFull")).at("/outputs/");
    world.bucket.fault(full.times(3));
    let (id, _, end) = world.run(spec()).await;
    assert!(end.succeeded() && world.bucket.faults().all_struck(), "{end:?}");
    assert_eq!(world.bucket.bucket().uploads(), [""; 0]);
    world.service.assert_clean(&[&id]).await;
}
