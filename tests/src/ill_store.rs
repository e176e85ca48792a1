//! The object store fails while a run needs it, as seen from the run, on any backend: what passes by delays it, what does not ends
//! it as `INPUT` or `OUTPUT` with evidence. Nothing half is ever visible, and no upload in parts is left behind.

use worker_client::{
    Client, Finished, RunSpec, TransferOptions,
    proto::{Cause, RunState},
};

use crate::{
    objects::{Action, Dialect, Fault, StoreServer},
    scene::{On, Scene},
    service::watch,
};

/// Of an output that goes in parts, in bytes.
pub const LARGE: usize = 20 << 20;

/// A store that can be made ill, and a service on it.
#[derive(Debug)]
pub struct World {
    /// The store.
    pub bucket: StoreServer,
    /// The service and its backend.
    pub scene: Scene,
}

impl World {
    /// Starts one with settings of the service, or skips `test` visibly.
    ///
    /// # Panics
    /// Where the backend is missing and required.
    pub async fn start(on: On, settings: &[(&str, &str)], test: &str) -> Option<Self> {
        let bucket = StoreServer::start(Dialect::S3);
        let store = bucket.settings("faults");
        let mut all: Vec<(&str, &str)> = store.iter().map(|(name, value)| (*name, value.as_str())).collect();
        all.extend(settings);
        let mut scene = Scene::prepare_with(on, "", &all, test).await?;
        scene.service.restart(&[]).await;
        Some(Self { bucket, scene })
    }

    /// A client that repeats nothing.
    pub fn client(&self) -> Client {
        self.scene.service.client()
    }

    /// Uploads a small file; answers what an input names.
    ///
    /// # Panics
    /// Where it cannot.
    pub async fn upload(&self) -> String {
        let dir = tempfile::tempdir().expect("temp dir");
        let local = dir.path().join("a");
        std::fs::write(&local, "hello").expect("a local file");
        self.client().upload_file(&local, TransferOptions::default()).await.expect("the upload").uri
    }

    /// Runs to the end: the run, its states, how it ended.
    ///
    /// # Panics
    /// Where it is not accepted.
    pub async fn run(&self, spec: RunSpec) -> (String, Vec<RunState>, Finished) {
        let run = self.client().run(spec).await.expect("the run is accepted");
        let watched = watch(&self.client(), run.id(), "").await;
        let states = watched.states.iter().map(|(state, _)| *state).collect();
        (run.id().to_owned(), states, watched.end().clone())
    }

    /// Nothing of the run's outputs is visible, and nothing was left on the way.
    ///
    /// # Panics
    /// Where that is not so.
    pub async fn assert_nothing_half(&self, run: &str) {
        let keys = self.bucket.bucket().keys();
        assert!(!keys.iter().any(|key| key.contains(run) && key.ends_with("manifest.json")), "{keys:?}");
        assert_eq!(self.bucket.bucket().uploads(), [""; 0], "abandoned uploads");
        self.scene.assert_clean(&[run]).await;
    }
}

/// A program of a shell.
pub fn sh(program: &str) -> RunSpec {
    RunSpec::command(["sh", "-c", program])
}

/// Evidence and message, as one text.
pub fn said(end: &Finished) -> String {
    format!("{:?}", end.outcome)
}

/// Case: a store that answers 503 for a while delays a run and fails nothing.
///
/// # Panics
/// Where it does.
pub async fn busy(on: On) {
    let Some(world) = World::start(on, &[], "a store that is busy").await else { return };
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
    world.scene.assert_clean(&[&id]).await;
}

/// Case: an input that the store does not give ends the run as `INPUT` before its program.
///
/// # Panics
/// Where it does not.
pub async fn input_refused(on: On) {
    let Some(world) =
        World::start(on, &[("RUNNER_OBJECT_STORE__TRIES", "2")], "an input that is refused").await
    else {
        return;
    };
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

/// Case: an output that the store refuses ends the run as `OUTPUT` and is not visible.
///
/// # Panics
/// Where it does not.
pub async fn output_refused(on: On) {
    let Some(world) =
        World::start(on, &[("RUNNER_OBJECT_STORE__TRIES", "2")], "an output that is refused").await
    else {
        return;
    };
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

/// Case: a store that does not answer at all for a while delays a run and fails nothing.
///
/// # Panics
/// Where it does.
pub async fn silent(on: On) {
    let settings = [("RUNNER_OBJECT_STORE__STALL_TIMEOUT", "1s")];
    let Some(world) = World::start(on, &settings, "a store that is silent").await else { return };
    let uri = world.upload().await;
    world.bucket.fault(Fault::on("GET", "", Action::Hang).at("/files/"));
    world.bucket.fault(Fault::on("PUT", "", Action::Hang).at("/outputs/0"));
    world.bucket.fault(Fault::on("PUT", "", Action::Hang).at("/manifest.json"));
    let (id, _, end) =
        world.run(sh("cp /inputs/a /outputs/a").input("/inputs/a", uri).output("/outputs/a")).await;
    assert!(end.succeeded(), "{end:?}");
    assert!(world.bucket.faults().all_struck(), "{:?}", world.bucket.faults());
    let sizes: Vec<u64> = end.outputs().expect("a manifest").entries.iter().map(|entry| entry.size).collect();
    assert_eq!(sizes, [5]);
    world.scene.assert_clean(&[&id]).await;
}
