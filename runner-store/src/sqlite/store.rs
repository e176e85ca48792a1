//! The store as its callers see it.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
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
    traffic::Traffic,
};
use rusqlite::Connection;
use tokio::sync::Semaphore;

use super::{
    connection,
    error::{Fault, OpenError},
    migrate::{self, MIGRATIONS},
    pairs, read, write,
    writer::{Submit, Writer, live_counts},
};
use crate::lock::DataDirLock;

/// The database's name in the data directory.
const FILE: &str = "state.db";

/// What can be chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SqliteOptions {
    /// How many verbs read at once, each on a connection and a blocking thread of its own. At least 1.
    pub readers: usize,
    /// Largest size of the database file. Beyond it verbs that need room answer [`StoreError::Full`]. `None`: the disk's.
    pub max_bytes: Option<u64>,
}

impl Default for SqliteOptions {
    fn default() -> Self {
        Self { readers: 4, max_bytes: None }
    }
}

/// The state store in `state.db` of a data directory.
///
/// - What a verb answered is synced (WAL, `synchronous = FULL`).
/// - Verbs that write go to one thread, which commits up to 256 of them together.
/// - Verbs that read go to a few connections of their own, see what was committed before they began, and never block a
///   write. They run on tokio's blocking threads, so they need a tokio runtime.
/// - A future that is dropped does not take its write back; every verb is safe to repeat.
/// - On a full disk verbs answer [`StoreError::Full`] and store nothing; they work again as soon as there is room.
///
/// Dropping it waits for the writer to finish what was submitted, at most a few commits.
#[derive(Debug)]
pub struct SqliteStore {
    // `None` only while it is being dropped.
    submit: Option<Submit>,
    writer: Option<thread::JoinHandle<()>>,
    readers: Arc<Readers>,
    live_total: Arc<AtomicU64>,
    // The last to go.
    _lock: Arc<DataDirLock>,
}

impl SqliteStore {
    /// Opens the store of a data directory; makes and migrates it where need be. Blocks on the disk.
    ///
    /// The lock is what keeps a second process away. Within the process, only one store at a time may be open on one lock.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(lock: Arc<DataDirLock>, options: &SqliteOptions) -> Result<Self, OpenError> {
        let path = lock.dir().join(FILE);
        let sqlite = |source| OpenError::Sqlite { path: path.clone(), source };
        let mut conn = connection::writer(&path, options).map_err(sqlite)?;
        migrate::migrate(&mut conn, &path, MIGRATIONS)?;
        // SQLite syncs the files; that they are there must be durable too.
        File::open(lock.dir())
            .and_then(|dir| dir.sync_all())
            .map_err(|source| OpenError::Io { path: lock.dir().to_owned(), source })?;
        let live = live_counts(&conn).map_err(sqlite)?;
        let live_total = Arc::new(AtomicU64::new(live.total()));
        let (submit, jobs) = Submit::channel();
        let writer = Writer { conn, live, live_total: Arc::clone(&live_total) };
        let writer = thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer.run(jobs))
            .map_err(|source| OpenError::Io { path: path.clone(), source })?;
        Ok(Self {
            submit: Some(submit),
            writer: Some(writer),
            readers: Arc::new(Readers::new(path, options.readers.max(1))),
            live_total,
            _lock: lock,
        })
    }

    /// The database's path in a data directory, for messages and tools.
    pub fn path(dir: &Path) -> PathBuf {
        dir.join(FILE)
    }

    async fn write<V: write::Verb>(&self, verb: V) -> Result<V::Answer, StoreError> {
        match &self.submit {
            Some(submit) => submit.run(verb).await,
            None => Err(StoreError::Unavailable("it is closed".to_owned())),
        }
    }

    async fn read<T, F>(&self, verb: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T, Fault> + Send + 'static,
    {
        let stopped = |what: &str| StoreError::Unavailable(what.to_owned());
        let readers = Arc::clone(&self.readers);
        let permit =
            Arc::clone(&readers.permits).acquire_owned().await.map_err(|_| stopped("it is closed"))?;
        let read = tokio::task::spawn_blocking(move || {
            // Until the read is over, even where nobody waits for it any more.
            let _permit = permit;
            readers.with(verb)
        });
        match read.await {
            Ok(result) => result.map_err(StoreError::from),
            Err(error) if error.is_panic() => Err(StoreError::Other("a read panicked".to_owned())),
            Err(_) => Err(stopped("the runtime shuts down")),
        }
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        drop(self.submit.take());
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("the store's writer had panicked");
        }
    }
}

/// Connections that read, opened when first needed.
#[derive(Debug)]
struct Readers {
    path: PathBuf,
    permits: Arc<Semaphore>,
    idle: Mutex<Vec<Connection>>,
}

impl Readers {
    fn new(path: PathBuf, number: usize) -> Self {
        Self { path, permits: Arc::new(Semaphore::new(number)), idle: Mutex::new(Vec::with_capacity(number)) }
    }

    /// The caller holds a permit, so there are never more connections than permits. One that a panic interrupted is
    /// closed, not used again.
    fn with<T>(&self, verb: impl FnOnce(&Connection) -> Result<T, Fault>) -> Result<T, Fault> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let conn = match idle {
            Some(conn) => conn,
            None => connection::reader(&self.path)?,
        };
        let result = verb(&conn);
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(conn);
        result
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn accept(&self, run: NewRun, limits: LiveLimits) -> Result<Accepted, StoreError> {
        self.write(write::Accept::new(run, limits)?).await
    }

    async fn get(&self, id: RunId) -> Result<Option<RunRecord>, StoreError> {
        self.read(move |conn| read::get(conn, id)).await
    }

    async fn attempts(&self, id: RunId) -> Result<Vec<AttemptRecord>, StoreError> {
        self.read(move |conn| read::attempts(conn, id)).await
    }

    async fn list(
        &self,
        filter: &RunFilter,
        after: Option<PageCursor>,
        max: usize,
    ) -> Result<RunPage, StoreError> {
        let filter = filter.clone();
        self.read(move |conn| read::list(conn, &filter, after, max)).await
    }

    async fn live(&self) -> Result<LiveRuns, StoreError> {
        self.read(read::live).await
    }

    async fn transition(&self, transition: Transition) -> Result<Transitioned, StoreError> {
        self.write(write::Move::new(transition)?).await
    }

    async fn append_event(
        &self,
        id: RunId,
        event: RunEvent,
        time: Timestamp,
    ) -> Result<Option<u64>, StoreError> {
        self.write(write::Append::new(id, &event, time)?).await
    }

    async fn request_cancel(
        &self,
        id: RunId,
        intent: CancelIntent,
        in_queue: Outcome,
    ) -> Result<CancelRequested, StoreError> {
        self.write(write::Cancel { id, intent, in_queue }).await
    }

    async fn events(&self, id: RunId, after: u64, max: usize) -> Result<Vec<StoredEvent>, StoreError> {
        self.read(move |conn| read::events(conn, id, after, max)).await
    }

    async fn ended(
        &self,
        after: Option<EndedCursor>,
        until: Timestamp,
        max: usize,
    ) -> Result<Vec<EndedRun>, StoreError> {
        self.read(move |conn| read::ended(conn, after, until, max)).await
    }

    async fn swept(&self, what: Swept) -> Result<Option<EndedCursor>, StoreError> {
        self.read(move |conn| read::swept(conn, what)).await
    }

    async fn set_swept(&self, what: Swept, cursor: EndedCursor) -> Result<(), StoreError> {
        self.write(write::SetSwept(what, cursor)).await
    }

    async fn names_upload(&self, upload: &ArtifactKey) -> Result<bool, StoreError> {
        let upload = upload.clone();
        self.read(move |conn| read::names_upload(conn, &upload)).await
    }

    async fn begin_removal(&self, id: RunId) -> Result<Removed, StoreError> {
        self.write(write::BeginRemoval(id)).await
    }

    async fn removals(&self, max: usize) -> Result<Vec<EndedRun>, StoreError> {
        self.read(move |conn| read::removals(conn, max)).await
    }

    async fn remove(&self, id: RunId) -> Result<Removed, StoreError> {
        self.write(write::Remove(id)).await
    }

    async fn traffic(&self) -> Result<Option<StoredTraffic>, StoreError> {
        self.read(read::traffic).await
    }

    async fn set_traffic(
        &self,
        expected: u64,
        traffic: &Traffic,
        entry: AuditEntry,
    ) -> Result<TrafficSet, StoreError> {
        self.write(write::SetTraffic::new(expected, traffic, entry)?).await
    }

    async fn audit(&self, before: Option<u64>, max: usize) -> Result<Vec<StoredAudit>, StoreError> {
        self.read(move |conn| read::audit(conn, before, max)).await
    }

    async fn pair(&self, run: RunId) -> Result<Option<PairRecord>, StoreError> {
        self.read(move |conn| pairs::get(conn, run)).await
    }

    async fn pairs_at(&self, stage: Stage, max: usize) -> Result<Vec<PairRecord>, StoreError> {
        self.read(move |conn| pairs::at(conn, stage, max)).await
    }

    async fn judge_pair(
        &self,
        primary: RunId,
        verdict: &Verdict,
        time: Timestamp,
    ) -> Result<bool, StoreError> {
        self.write(pairs::Judge::new(primary, verdict, time)?).await
    }

    async fn pairs(
        &self,
        filter: &PairFilter,
        before: Option<u64>,
        max: usize,
    ) -> Result<Vec<PairRecord>, StoreError> {
        let filter = filter.clone();
        self.read(move |conn| pairs::list(conn, &filter, before, max)).await
    }

    async fn live_count(&self) -> Result<u64, StoreError> {
        Ok(self.live_total.load(Ordering::Acquire))
    }

    async fn probe(&self) -> Result<(), StoreError> {
        self.write(write::Probe).await?;
        self.read(|conn| {
            conn.prepare_cached("SELECT count FROM probe")?.query_row((), |row| row.get::<_, i64>(0))?;
            Ok(())
        })
        .await
    }
}
