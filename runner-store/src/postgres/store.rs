//! The store as its callers see it.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use async_trait::async_trait;
use runner_core::{
    artifact::ArtifactKey,
    clock::Timestamp,
    id::RunId,
    outcome::Outcome,
    shadow::{PairFilter, PairRecord, Stage, Verdict},
    store::{
        Accepted, AttemptRecord, AuditEntry, CancelIntent, CancelRequested, EndedCursor, EndedRun,
        LiveLimits, LiveRuns, NewRun, PageCursor, Removed, RunEvent, RunFilter, RunPage, RunRecord, Store,
        StoreError, StoredAudit, StoredEvent, StoredTraffic, Swept, TrafficSet, Transition, Transitioned,
    },
    task::{TaskKind, spawn},
    traffic::Traffic,
};

use super::{
    connect::Connector,
    error::PostgresError,
    options::PostgresOptions,
    pairs, read,
    readers::Readers,
    write,
    writer::{Submit, Writer},
};

/// The state store in a schema of a PostgreSQL database: the first of the search path, so `?options=-csearch_path%3DNAME` in the URL
/// chooses one.
///
/// - What a verb answered is committed, and synced by the server.
/// - Verbs that write go to one task, which commits up to 128 of them together.
/// - Verbs that read go to a few connections of their own, and see what was committed before they began.
/// - Where the server goes away, verbs that write wait for it up to ten seconds, and answer [`StoreError::Unavailable`] then, and at
///   once until it is back. Verbs that read try once more. None is done by half, and every one is safe to repeat.
/// - One service has a schema. Another one is refused while it lives; where the first was cut off from the server for so long that
///   another has taken over, the first stores nothing any more.
///
/// Dropping it lets the task finish what was submitted, if the runtime lives on.
#[derive(Debug)]
pub struct PostgresStore {
    submit: Submit,
    readers: Readers,
    live_total: Arc<AtomicU64>,
}

impl PostgresStore {
    /// Opens the store. Needs a tokio runtime with time and I/O, and does not change the schema.
    ///
    /// # Errors
    /// See [`PostgresError`].
    pub async fn open(options: &PostgresOptions) -> Result<Self, PostgresError> {
        let connector = {
            let options = options.clone();
            let made = tokio::task::spawn_blocking(move || Connector::new(&options)).await;
            let stopped =
                |_| PostgresError::Server(StoreError::Unavailable("the runtime shuts down".to_owned()));
            Arc::new(made.map_err(stopped)??)
        };
        let live_total = Arc::new(AtomicU64::new(0));
        let writer =
            Writer::open(Arc::clone(&connector), options.wait_for_other, Arc::clone(&live_total)).await?;
        let (submit, jobs) = Submit::channel();
        spawn(TaskKind::Loop, "store-writer", writer.run(jobs));
        Ok(Self { submit, readers: Readers::new(connector, options.readers.max(1)), live_total })
    }
}

#[async_trait]
impl Store for PostgresStore {
    async fn accept(&self, run: NewRun, limits: LiveLimits) -> Result<Accepted, StoreError> {
        self.submit.run(write::Accept::new(run, limits)?).await
    }

    async fn get(&self, id: RunId) -> Result<Option<RunRecord>, StoreError> {
        self.readers.read(|conn| async move { read::get(&conn, id).await }).await
    }

    async fn attempts(&self, id: RunId) -> Result<Vec<AttemptRecord>, StoreError> {
        self.readers.read(|conn| async move { read::attempts(&conn, id).await }).await
    }

    async fn list(
        &self,
        filter: &RunFilter,
        after: Option<PageCursor>,
        max: usize,
    ) -> Result<RunPage, StoreError> {
        self.readers.read(|conn| async move { read::list(&conn, filter, after, max).await }).await
    }

    async fn live(&self) -> Result<LiveRuns, StoreError> {
        self.readers.read(|conn| async move { read::live(&conn).await }).await
    }

    async fn transition(&self, transition: Transition) -> Result<Transitioned, StoreError> {
        self.submit.run(write::Move::new(transition)?).await
    }

    async fn append_event(
        &self,
        id: RunId,
        event: RunEvent,
        time: Timestamp,
    ) -> Result<Option<u64>, StoreError> {
        self.submit.run(write::Append::new(id, &event, time)?).await
    }

    async fn request_cancel(
        &self,
        id: RunId,
        intent: CancelIntent,
        in_queue: Outcome,
    ) -> Result<CancelRequested, StoreError> {
        self.submit.run(write::Cancel { id, intent, in_queue }).await
    }

    async fn events(&self, id: RunId, after: u64, max: usize) -> Result<Vec<StoredEvent>, StoreError> {
        self.readers.read(|conn| async move { read::events(&conn, id, after, max).await }).await
    }

    async fn ended(
        &self,
        after: Option<EndedCursor>,
        until: Timestamp,
        max: usize,
    ) -> Result<Vec<EndedRun>, StoreError> {
        self.readers.read(|conn| async move { read::ended(&conn, after, until, max).await }).await
    }

    async fn swept(&self, what: Swept) -> Result<Option<EndedCursor>, StoreError> {
        self.readers.read(|conn| async move { read::swept(&conn, what).await }).await
    }

    async fn set_swept(&self, what: Swept, cursor: EndedCursor) -> Result<(), StoreError> {
        self.submit.run(write::SetSwept(what, cursor)).await
    }

    async fn names_upload(&self, upload: &ArtifactKey) -> Result<bool, StoreError> {
        self.readers.read(|conn| async move { read::names_upload(&conn, upload).await }).await
    }

    async fn begin_removal(&self, id: RunId) -> Result<Removed, StoreError> {
        self.submit.run(write::BeginRemoval(id)).await
    }

    async fn removals(&self, max: usize) -> Result<Vec<EndedRun>, StoreError> {
        self.readers.read(|conn| async move { read::removals(&conn, max).await }).await
    }

    async fn remove(&self, id: RunId) -> Result<Removed, StoreError> {
        self.submit.run(write::Remove(id)).await
    }

    async fn traffic(&self) -> Result<Option<StoredTraffic>, StoreError> {
        self.readers.read(|conn| async move { read::traffic(&conn).await }).await
    }

    async fn set_traffic(
        &self,
        expected: u64,
        traffic: &Traffic,
        entry: AuditEntry,
    ) -> Result<TrafficSet, StoreError> {
        self.submit.run(write::SetTraffic::new(expected, traffic, &entry)?).await
    }

    async fn audit(&self, before: Option<u64>, max: usize) -> Result<Vec<StoredAudit>, StoreError> {
        self.readers.read(|conn| async move { read::audit(&conn, before, max).await }).await
    }

    async fn pair(&self, run: RunId) -> Result<Option<PairRecord>, StoreError> {
        self.readers.read(|conn| async move { pairs::get(&conn, run).await }).await
    }

    async fn pairs_at(&self, stage: Stage, max: usize) -> Result<Vec<PairRecord>, StoreError> {
        self.readers.read(|conn| async move { pairs::at(&conn, stage, max).await }).await
    }

    async fn judge_pair(
        &self,
        primary: RunId,
        verdict: &Verdict,
        time: Timestamp,
    ) -> Result<bool, StoreError> {
        self.submit.run(pairs::Judge::new(primary, verdict, time)?).await
    }

    async fn pairs(
        &self,
        filter: &PairFilter,
        before: Option<u64>,
        max: usize,
    ) -> Result<Vec<PairRecord>, StoreError> {
        self.readers.read(|conn| async move { pairs::list(&conn, filter, before, max).await }).await
    }

    async fn live_count(&self) -> Result<u64, StoreError> {
        Ok(self.live_total.load(Ordering::Acquire))
    }

    async fn probe(&self) -> Result<(), StoreError> {
        self.submit.run(write::Probe).await?;
        self.readers.read(|conn| async move { read::probe(&conn).await }).await
    }
}
