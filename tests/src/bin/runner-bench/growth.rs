//! Row 11: what a run costs with 100,000 finished runs in the store, against 100. Everything but the workload is real: the
//! service, SQLite, the log store and the object store over directories; the backend is the one in memory.

use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use runner_artifacts::{directory::DirectoryArtifacts, log::SegmentedLogs};
use runner_core::{
    artifact::ArtifactStore,
    clock::{self, Clock},
    fake::backend::{FakeBackend, FakeSubstrate},
    id::RunId,
    limits::Limits,
    outcome::{Cause, Outcome as RunOutcome},
    role::Role,
    service::{Caller, NoMeter, Options, Parts, RunRequest, RunService, StreamCursor, StreamOptions},
    spec::RunSpec,
    store::{Accepted, CancelIntent, LiveLimits, NewRun, Store},
};
use runner_store::{DataDirLock, SqliteOptions, SqliteStore};

use super::{
    Outcome,
    service::Fault,
    stats::{Row, median, millis, timed},
};

const PAIRS: usize = 30;
const RUNS: u32 = 128;

/// Who calls.
pub(crate) fn caller() -> Result<Caller, Fault> {
    Ok(Caller { tenant: "default".parse()?, subject: "bench".to_owned(), roles: Role::ALL.into() })
}

/// A store, a log store and an object store in a directory of their own.
pub(crate) struct World {
    dir: tempfile::TempDir,
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
}

impl World {
    /// An empty one.
    pub(crate) fn open() -> Result<Self, Fault> {
        let dir = tempfile::tempdir()?;
        let lock = Arc::new(DataDirLock::acquire(dir.path())?);
        let store = Arc::new(SqliteStore::open(lock, &SqliteOptions::default())?);
        Ok(Self { dir, store, clock: clock::system().0 })
    }

    /// A service over it.
    pub(crate) async fn start(&self, slots: usize) -> Result<Arc<RunService>, Fault> {
        let artifacts: Arc<dyn ArtifactStore> =
            Arc::new(DirectoryArtifacts::open(&self.dir.path().join("objects"))?);
        let (clock, ids) = clock::system();
        let logs = SegmentedLogs::new(
            Arc::clone(&artifacts),
            Arc::clone(&clock),
            runner_artifacts::log::Options::default(),
        );
        let backend = FakeBackend::over("fake".parse()?, FakeSubstrate::new()).with_slots(slots);
        let parts = Parts {
            store: Arc::clone(&self.store),
            logs: Arc::new(logs),
            artifacts,
            backends: vec![Arc::new(backend)],
            default_backend: "fake".parse()?,
            traffic: None,
            clock,
            ids,
            limits: Limits { live_runs: u64::MAX, live_runs_per_tenant: u64::MAX, ..Limits::default() },
            options: Options::default(),
            meter: Arc::new(NoMeter),
        };
        Ok(RunService::start(parts).await?)
    }

    /// Adds runs that ended long ago.
    async fn age(&self, runs: u32) -> Result<(), Fault> {
        let (_, ids) = clock::system();
        let limits = LiveLimits { total: u64::MAX, per_tenant: u64::MAX };
        let spec =
            Arc::new(RunSpec { command: vec!["exit".to_owned(), "0".to_owned()], ..RunSpec::default() });
        let adding = (0..runs).map(|_| {
            let (id, time) = (ids.run_id(), self.clock.now());
            let run = NewRun {
                id,
                tenant: "default".parse().map_err(Fault::from)?,
                key: None,
                spec: Arc::clone(&spec),
                digest: spec.digest(),
                backend: "fake".parse().map_err(Fault::from)?,
                backend_reason: "the default backend".to_owned(),
                decision: None,
                time,
            };
            Ok::<_, Fault>((id, run, time))
        });
        stream::iter(adding)
            .map(|run| async move {
                let (id, run, time) = run?;
                let Accepted::Created(_) = self.store.accept(run, limits).await? else {
                    return Err("an old run was not accepted".into());
                };
                let intent = CancelIntent { time, reason: "old".to_owned() };
                let outcome = RunOutcome::new(0, Cause::Cancelled, "cancelled in the queue");
                self.store.request_cancel(id, intent, outcome).await?;
                Ok::<_, Fault>(())
            })
            .buffer_unordered(512)
            .try_collect()
            .await
    }
}

async fn run_some(service: &Arc<RunService>) -> Result<(), Fault> {
    let runs = (0..RUNS).map(|_| {
        let service = Arc::clone(service);
        async move {
            let spec = RunSpec {
                command: ["print", "out", "hello"].map(str::to_owned).to_vec(),
                ..RunSpec::default()
            };
            let caller = caller()?;
            let id: RunId = service.run(&caller, RunRequest { spec, run_id: None, key: None }).await?.0.id;
            let options = StreamOptions { follow: true, logs: true };
            let stream = service.stream(&caller, id, StreamCursor::default(), options).await?;
            stream.try_for_each(|_| std::future::ready(Ok(()))).await?;
            Ok::<_, Fault>(())
        }
    });
    stream::iter(runs).buffer_unordered(64).try_collect().await
}

/// Measures it.
pub(crate) async fn measure() -> Outcome {
    let (old, young) = (World::open()?, World::open()?);
    old.age(100_000).await?;
    young.age(100).await?;
    let (old_service, young_service) = (old.start(64).await?, young.start(64).await?);
    run_some(&old_service).await?;
    run_some(&young_service).await?;
    let (mut ratios, mut olds, mut youngs) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        let (old_time, outcome) = timed(run_some(&old_service)).await;
        outcome?;
        let (young_time, outcome) = timed(run_some(&young_service)).await;
        outcome?;
        olds.push(old_time / f64::from(RUNS));
        youngs.push(young_time / f64::from(RUNS));
        ratios.push(old_time / young_time);
    }
    old_service.shutdown().await;
    young_service.shutdown().await;
    let note = format!("{}, {}", millis(median(&olds)), millis(median(&youngs)));
    let what = "cost of a run with 100,000 finished runs in the store ÷ with 100".to_owned();
    Ok(vec![Row { number: 11, what, ratios, target: "≤ 1.2", note }])
}
