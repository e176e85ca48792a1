//! Retention and removal, over the fakes and a clock that is moved by hand.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt as _;
use runner_core::{
    artifact::{ArtifactErrorKind, ArtifactStore as _},
    clock::{Clock, SystemIds, Timestamp},
    fake::{
        artifact::{ArtifactOp, MemoryArtifacts},
        backend::{FakeBackend, FakeSubstrate},
        log::MemoryLogs,
        store::MemoryStore,
    },
    id::{BackendName, RunId},
    limits::Limits,
    log::LogStore as _,
    role::Role,
    service::{
        Caller, NoMeter, Options, Parts, Retention, RunRequest, RunService, ServiceError, StreamCursor,
        StreamOptions, SweepReport,
    },
    spec::{Input, InputSource, Output, RunSpec},
};

const DAY: Duration = Duration::from_secs(24 * 3600);
const PATIENCE: Duration = Duration::from_secs(30);
/// When the clock begins, in milliseconds since the epoch.
const START_MILLIS: i64 = 1_800_000_000_000;

/// A wall clock that stands until it is moved.
#[derive(Debug)]
struct Hand(AtomicI64);

impl Clock for Hand {
    fn now(&self) -> Timestamp {
        Timestamp::from_micros(self.0.load(Ordering::Relaxed))
    }

    fn monotonic(&self) -> Duration {
        Duration::from_micros(u64::try_from(self.0.load(Ordering::Relaxed)).unwrap())
    }
}

struct World {
    clock: Arc<Hand>,
    logs: Arc<MemoryLogs>,
    artifacts: Arc<MemoryArtifacts>,
    service: Arc<RunService>,
}

impl World {
    async fn new() -> Self {
        let days = |days: u32| Some(days * DAY);
        Self::with(Retention {
            abandoned: days(5),
            uploads: days(50),
            logs: days(10),
            outputs: days(20),
            runs: days(30),
            // Passes are made by the tests.
            interval: 1000 * DAY,
            batch: 1000,
        })
        .await
    }

    async fn with(retention: Retention) -> Self {
        let clock = Arc::new(Hand(AtomicI64::new(START_MILLIS * 1000)));
        let (logs, artifacts) = (Arc::new(MemoryLogs::new()), Arc::new(MemoryArtifacts::new()));
        let name: BackendName = "fake".parse().unwrap();
        let service = RunService::start(Parts {
            store: Arc::new(MemoryStore::new()),
            logs: logs.clone(),
            artifacts: artifacts.clone(),
            backends: vec![Arc::new(FakeBackend::over(name.clone(), FakeSubstrate::new()))],
            default_backend: name,
            traffic: None,
            clock: clock.clone(),
            ids: Arc::new(SystemIds),
            limits: Limits::default(),
            options: Options { min_pause: Duration::from_millis(1), retention, ..Options::default() },
            meter: Arc::new(NoMeter),
        });
        Self { service: service.await.expect("the service starts"), clock, logs, artifacts }
    }

    fn pass_by(&self, time: Duration) {
        self.clock.0.fetch_add(i64::try_from(time.as_micros()).unwrap(), Ordering::Relaxed);
    }

    async fn accept(&self, spec: RunSpec) -> RunId {
        let request = RunRequest { spec, run_id: None, key: None };
        self.service.run(&caller("default"), request).await.expect("the run is accepted").0.id
    }

    /// A run that printed something, wrote something, and ended.
    async fn finished(&self) -> RunId {
        let command = ["print", "out", "hello"].map(str::to_owned).to_vec();
        let id = self.accept(RunSpec { command, ..RunSpec::default() }).await;
        self.ended(id).await;
        for name in ["1/manifest.json", "1/outputs/0/a", "1/outputs/0/log/b"] {
            self.store(&format!("runs/default/{id}/{name}")).await;
        }
        id
    }

    /// The run has ended, and no driver has anything more to do.
    async fn ended(&self, id: RunId) {
        self.ended_beside(id, 0).await;
    }

    /// The run has ended, and no more drivers than those of so many other runs are left.
    async fn ended_beside(&self, id: RunId, others: usize) {
        let options = StreamOptions { follow: true, logs: true };
        let stream =
            self.service.stream(&caller("default"), id, StreamCursor::default(), options).await.unwrap();
        let ending = async {
            stream.for_each(|_| std::future::ready(())).await;
            while self.service.live_runs() > others {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(PATIENCE, ending).await.expect("the run ends");
    }

    async fn store(&self, key: &str) {
        self.artifacts.put_bytes(&key.parse().unwrap(), Bytes::from_static(b"x")).await.unwrap();
    }

    async fn log_bytes(&self, id: RunId) -> usize {
        let attempt = runner_core::id::AttemptId { run: id, number: 1 };
        let read = self.logs.read(&"default".parse().unwrap(), attempt, 0, false);
        let batches: Vec<_> = tokio::time::timeout(PATIENCE, read.collect()).await.expect("the log ends");
        batches.into_iter().flatten().map(|batch| batch.len()).sum()
    }

    fn keys_of(&self, id: RunId) -> usize {
        self.artifacts.keys().iter().filter(|key| key.contains(&id.to_string())).count()
    }
}

fn caller(tenant: &str) -> Caller {
    Caller { tenant: tenant.parse().unwrap(), subject: "test".to_owned(), roles: Role::ALL.into() }
}

/// The id of an upload that was begun so long after the clock's beginning.
fn upload(after: Duration) -> uuid::Uuid {
    let millis = u128::try_from(START_MILLIS).unwrap() + after.as_millis();
    uuid::Uuid::from_u128((millis << 80) | 0x7000_8000_0000_0000_0001)
}

fn report(runs: u64, logs: u64, outputs: u64, uploads: u64) -> SweepReport {
    SweepReport { runs, logs, outputs, uploads }
}

#[tokio::test]
async fn each_kind_goes_when_it_was_kept_long_enough_and_not_before() {
    let world = World::new().await;
    let id = world.finished().await;
    assert_eq!(world.service.sweep().await, report(0, 0, 0, 0));
    assert!(world.log_bytes(id).await > 0);

    world.pass_by(11 * DAY);
    let younger = world.finished().await;
    assert_eq!(world.service.sweep().await, report(0, 1, 0, 0));
    assert_eq!(world.log_bytes(id).await, 0);
    assert_eq!(world.keys_of(id), 3, "its outputs stay");
    assert!(world.log_bytes(younger).await > 0);
    assert_eq!(world.service.sweep().await, report(0, 0, 0, 0), "nothing is swept twice");

    world.pass_by(10 * DAY);
    assert_eq!(world.service.sweep().await, report(0, 0, 1, 0));
    // What lies in a folder of an output that is named like that of the log is an output too.
    assert_eq!(world.keys_of(id), 0);
    assert_eq!(world.keys_of(younger), 3);
    world.service.get(&caller("default"), id).await.expect("its row stays");

    world.pass_by(10 * DAY);
    assert_eq!(world.service.sweep().await, report(1, 1, 0, 0));
    let gone = world.service.get(&caller("default"), id).await.unwrap_err();
    assert!(matches!(gone, ServiceError::NotFound(_)), "{gone}");
    world.service.get(&caller("default"), younger).await.expect("the younger one stays");
}

fn input(uri: &str) -> Input {
    Input {
        path: "/inputs/a".to_owned(),
        source: InputSource::from_uri(uri).unwrap(),
        sha256: None,
        mode: None,
        extract: None,
    }
}

fn sleeper(inputs: Vec<Input>) -> RunSpec {
    RunSpec { command: vec!["sleep-until-stopped".to_owned()], inputs, ..RunSpec::default() }
}

#[tokio::test]
async fn an_upload_goes_when_no_run_names_it_and_any_when_it_is_too_old_and_no_live_run_does() {
    let world = World::new().await;
    let (old, named, young) = (upload(Duration::ZERO), upload(Duration::from_millis(5)), upload(4 * DAY));
    // A name that is not from a service says no age.
    let foreign = uuid::Uuid::from_u128(7);
    for id in [old, named, young, foreign] {
        world.store(&format!("uploads/default/{id}/files/a")).await;
        world.store(&format!("uploads/default/{id}/digests/a")).await;
    }
    world.store(&format!("uploads/default/{old}/manifest.json")).await;
    let uri = format!("artifact:uploads/default/{named}/files/a");
    let run = world.accept(sleeper(vec![input(&uri)])).await;
    let uploads = || -> Vec<String> {
        let keys = world.artifacts.keys();
        keys.into_iter().filter(|key| key.starts_with("uploads/") && key.ends_with("files/a")).collect()
    };
    let left = |ids: &[uuid::Uuid]| {
        let mut left: Vec<_> = ids.iter().map(|id| format!("uploads/default/{id}/files/a")).collect();
        left.sort();
        left
    };
    world.pass_by(6 * DAY);
    assert_eq!(world.service.sweep().await, report(0, 0, 0, 1));
    assert_eq!(uploads(), left(&[named, young, foreign]));
    assert!(!world.artifacts.keys().iter().any(|key| key.contains(&old.to_string())), "nothing of it stays");

    world.service.cancel(&caller("default"), run, String::new()).await.unwrap();
    world.ended(run).await;
    assert_eq!(world.service.sweep().await.uploads, 0, "a stored run names it");
    world.pass_by(20 * DAY);
    assert_eq!(world.service.sweep().await.uploads, 1, "the young one has become old");
    assert_eq!(uploads(), left(&[named, foreign]));

    // The run that named it is gone.
    world.pass_by(11 * DAY);
    assert_eq!(world.service.sweep().await, report(1, 0, 0, 1));
    assert_eq!(uploads(), left(&[foreign]));
}

#[tokio::test]
async fn an_upload_that_runs_named_goes_when_any_is_too_old_but_not_while_one_lives() {
    let world = World::new().await;
    let (past, live) = (upload(Duration::ZERO), upload(Duration::from_millis(5)));
    let uri = |id: uuid::Uuid| format!("artifact:uploads/default/{id}/files/a");
    for id in [past, live] {
        world.store(&format!("uploads/default/{id}/files/a")).await;
    }
    world.pass_by(49 * DAY);
    let run = world.accept(sleeper(vec![input(&uri(past))])).await;
    world.accept(sleeper(vec![input(&uri(live))])).await;
    world.service.cancel(&caller("default"), run, String::new()).await.unwrap();
    world.ended_beside(run, 1).await;
    assert_eq!(world.service.sweep().await.uploads, 0, "both are named, and not too old");
    world.pass_by(2 * DAY);
    assert_eq!(world.service.sweep().await.uploads, 1);
    let left = world.artifacts.keys();
    assert!(
        left.iter().all(|key| !key.starts_with("uploads/") || key.contains(&live.to_string())),
        "{left:?}"
    );
}

#[tokio::test]
async fn outputs_that_a_live_run_reads_stay_and_hold_nothing_else_back() {
    let world = World::new().await;
    let (read, other) = (world.finished().await, world.finished().await);
    let uri = format!("artifact:runs/default/{read}/1/outputs/0/a");
    let reader = world.accept(sleeper(vec![input(&uri)])).await;
    let in_use = world.service.delete(&caller("default"), read).await.unwrap_err();
    assert!(matches!(in_use, ServiceError::FailedPrecondition { reason: "RUN_IN_USE", .. }), "{in_use}");
    world.pass_by(21 * DAY);
    assert_eq!(world.service.sweep().await, report(0, 2, 1, 0));
    assert_eq!((world.keys_of(read), world.keys_of(other)), (3, 0));
    world.service.cancel(&caller("default"), reader, String::new()).await.unwrap();
    world.ended(reader).await;
    assert_eq!(world.service.sweep().await, report(0, 0, 1, 0));
    assert_eq!(world.keys_of(read), 0);
}

#[tokio::test]
async fn by_default_nothing_goes_that_a_run_has_to_do_with() {
    let world = World::with(Retention { interval: 1000 * DAY, ..Retention::default() }).await;
    let id = world.finished().await;
    let used = upload(Duration::ZERO);
    world.store(&format!("uploads/default/{used}/files/a")).await;
    let uri = format!("artifact:uploads/default/{used}/files/a");
    let run = world.accept(sleeper(vec![input(&uri)])).await;
    world.service.cancel(&caller("default"), run, String::new()).await.unwrap();
    world.ended(run).await;
    world.pass_by(10_000 * DAY);
    assert_eq!(world.service.sweep().await, report(0, 0, 0, 0));
    assert!(world.log_bytes(id).await > 0);
}

#[tokio::test]
async fn a_deleted_run_leaves_nothing() {
    let world = World::new().await;
    let (id, other) = (world.finished().await, world.finished().await);
    let refused = world.service.delete(&caller("another"), id).await.unwrap_err();
    assert!(matches!(refused, ServiceError::NotFound(_)), "another tenant's: {refused}");
    world.service.delete(&caller("default"), id).await.unwrap();
    assert_eq!((world.keys_of(id), world.log_bytes(id).await), (0, 0));
    let gone = world.service.delete(&caller("default"), id).await.unwrap_err();
    assert!(matches!(gone, ServiceError::NotFound(_)), "{gone}");
    assert_eq!(world.keys_of(other), 3, "another run's artifacts stay");
    assert!(world.log_bytes(other).await > 0);
}

#[tokio::test]
async fn what_a_run_stored_elsewhere_goes_with_it_and_nothing_beside_it() {
    let world = World::new().await;
    let output = |to: &str| Output {
        path: "/outputs/a".to_owned(),
        glob: false,
        destination: Some(to.parse().unwrap()),
        required: true,
        max_bytes: None,
    };
    let spec = || RunSpec {
        command: ["write", "/outputs/a", "x"].map(str::to_owned).to_vec(),
        outputs: vec![output("artifact:uploads/default/results/")],
        ..RunSpec::default()
    };
    let (first, second) = (world.accept(spec()).await, world.accept(spec()).await);
    world.ended(first).await;
    world.ended(second).await;
    world.store("uploads/default/results/else").await;
    let stored = || -> Vec<String> {
        world.artifacts.keys().into_iter().filter(|key| key.starts_with("uploads/")).collect()
    };
    assert_eq!(stored().len(), 3, "each has files of its own: {:?}", stored());
    assert!(stored().iter().any(|key| key.starts_with(&format!("uploads/default/results/{first}/1/"))));
    world.service.delete(&caller("default"), first).await.unwrap();
    assert_eq!(world.keys_of(first), 0);
    assert_eq!(stored().len(), 2, "{:?}", stored());
}

#[tokio::test]
async fn a_run_that_has_not_ended_is_not_deleted() {
    let world = World::new().await;
    let id = world.accept(sleeper(Vec::new())).await;
    let refused = world.service.delete(&caller("default"), id).await.unwrap_err();
    assert!(matches!(refused, ServiceError::FailedPrecondition { reason: "RUN_NOT_ENDED", .. }), "{refused}");
    world.pass_by(100 * DAY);
    assert_eq!(world.service.sweep().await.runs, 0, "whatever the clock says");
    world.service.cancel(&caller("default"), id, String::new()).await.unwrap();
    world.ended(id).await;
    world.service.delete(&caller("default"), id).await.unwrap();
}

#[tokio::test]
async fn what_fails_half_way_is_found_again() {
    let world = World::new().await;
    let id = world.finished().await;
    world.artifacts.fail(ArtifactOp::Delete, 1, 1, ArtifactErrorKind::Unavailable);
    let failed = world.service.delete(&caller("default"), id).await.unwrap_err();
    assert!(matches!(failed, ServiceError::Unavailable(_)), "{failed}");
    world.service.get(&caller("default"), id).await.expect("the row is the last to go");
    world.service.delete(&caller("default"), id).await.unwrap();
    assert_eq!(world.keys_of(id), 0);

    let id = world.finished().await;
    world.artifacts.fail(ArtifactOp::Delete, 1, 1, ArtifactErrorKind::Unavailable);
    world.service.delete(&caller("default"), id).await.unwrap_err();
    assert_eq!(world.service.sweep().await, report(1, 0, 0, 0), "nobody needs to ask again");
    assert_eq!(world.keys_of(id), 0);

    let id = world.finished().await;
    world.pass_by(21 * DAY);
    world.artifacts.fail(ArtifactOp::Delete, 1, 1, ArtifactErrorKind::Unavailable);
    assert_eq!(world.service.sweep().await, report(0, 1, 0, 0), "the logs go all the same");
    assert_eq!(world.service.sweep().await, report(0, 0, 1, 0));
    assert_eq!(world.keys_of(id), 0);
}

#[tokio::test]
async fn a_repeated_run_is_answered_though_the_run_whose_outputs_it_took_is_gone() {
    let world = World::new().await;
    let command = ["write", "/outputs/a", "x"].map(str::to_owned).to_vec();
    let path = "/outputs/a".to_owned();
    let outputs = vec![Output { path, glob: false, destination: None, required: true, max_bytes: None }];
    let source = world.accept(RunSpec { command, outputs, ..RunSpec::default() }).await;
    world.ended(source).await;
    let spec = sleeper(vec![input(&format!("run:{source}"))]);
    let request =
        |spec: &RunSpec| RunRequest { spec: spec.clone(), run_id: None, key: Some("k".parse().unwrap()) };
    let (first, created) = world.service.run(&caller("default"), request(&spec)).await.unwrap();
    assert!(created);
    world.service.cancel(&caller("default"), first.id, String::new()).await.unwrap();
    world.ended(first.id).await;
    world.service.delete(&caller("default"), source).await.unwrap();
    let (again, created) = world.service.run(&caller("default"), request(&spec)).await.unwrap();
    assert_eq!((again.id, created), (first.id, false));
    let other = sleeper(vec![input(&format!("run:{source}/x"))]);
    let conflict = world.service.run(&caller("default"), request(&other)).await.unwrap_err();
    assert!(matches!(conflict, ServiceError::AlreadyExists { field: "idempotency_key" }), "{conflict}");
    let new = RunRequest { spec, run_id: None, key: None };
    let invalid = world.service.run(&caller("default"), new).await.unwrap_err();
    assert!(matches!(invalid, ServiceError::Invalid(_)), "{invalid}");
}
