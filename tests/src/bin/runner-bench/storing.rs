//! Row 4: durable acknowledgements of `Run` against raw SQLite rows in batches of 32.

use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use runner_core::{
    service::{RunRequest, RunService},
    spec::RunSpec,
};

use super::{
    Outcome,
    growth::{World, caller},
    service::Fault,
    stats::{Row, median, timed},
};

const PAIRS: usize = 30;
const RUNS: u32 = 2048;

async fn acknowledge(service: &Arc<RunService>) -> Result<(), Fault> {
    let runs = (0..RUNS).map(|i| {
        let service = Arc::clone(service);
        async move {
            let spec = RunSpec { command: vec!["exit".to_owned(), i.to_string()], ..RunSpec::default() };
            let request = RunRequest { spec, run_id: None, key: None };
            service.run(&caller()?, request).await.map(|_| ()).map_err(Fault::from)
        }
    });
    stream::iter(runs).buffer_unordered(256).try_collect().await
}

/// Inserts rows of about the size of an accepted run's, with the same durability.
struct Raw {
    connection: rusqlite::Connection,
    next: u64,
    _dir: tempfile::TempDir,
}

impl Raw {
    fn open() -> Result<Self, Fault> {
        let dir = tempfile::tempdir()?;
        let connection = rusqlite::Connection::open(dir.path().join("raw.sqlite"))?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection
            .execute("CREATE TABLE rows (id BLOB PRIMARY KEY, state INTEGER, body TEXT) WITHOUT ROWID", [])?;
        Ok(Self { connection, next: 0, _dir: dir })
    }

    fn insert(&mut self, rows: u32) -> Result<(), Fault> {
        let body = "x".repeat(600);
        for _ in 0..rows / 32 {
            let transaction = self.connection.transaction()?;
            for _ in 0..32 {
                self.next += 1;
                let mut insert = transaction.prepare_cached("INSERT INTO rows VALUES (?1, 0, ?2)")?;
                insert.execute((u128::from(self.next).to_be_bytes(), &body))?;
            }
            transaction.commit()?;
        }
        Ok(())
    }
}

/// Measures it. The one slot is taken, so that accepted runs wait in the queue and nothing else is measured.
pub(crate) async fn measure() -> Outcome {
    let world = World::open()?;
    let service = world.start(1).await?;
    let blocker = RunSpec { command: vec!["sleep-until-stopped".to_owned()], ..RunSpec::default() };
    service.run(&caller()?, RunRequest { spec: blocker, run_id: None, key: None }).await?;
    let mut raw = Raw::open()?;
    acknowledge(&service).await?;
    raw.insert(RUNS)?;
    let (mut ratios, mut ours, mut floors) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        let (our_time, outcome) = timed(acknowledge(&service)).await;
        outcome?;
        let (floor_time, outcome) = timed(async { raw.insert(RUNS) }).await;
        outcome?;
        ours.push(f64::from(RUNS) / our_time);
        floors.push(f64::from(RUNS) / floor_time);
        ratios.push(floor_time / our_time);
    }
    service.shutdown().await;
    let note = format!("{:.0}/s, {:.0}/s", median(&ours), median(&floors));
    let what = "durable `Run` acknowledgements/s ÷ raw SQLite rows/s in batches of 32".to_owned();
    Ok(vec![Row { number: 4, what, ratios, target: "≥ 0.5", note }])
}
