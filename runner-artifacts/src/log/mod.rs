//! Logs over the object store.
//!
//! A log that is open has its newest frames in memory, shared by all readers, and everything before them in segments in
//! the object store. A log that nobody has open has nothing in memory. [`layout`] says what is stored; the seal is the
//! commit point of a log's end.
//!
//! Memory: a log's frames that are not stored take at most two segments and a batch; `append` waits past that. Over all
//! logs they take at most half of [`Options::memory_bytes`], and recent frames for live readers the other half; a reader
//! that is too slow for these reads from the object store. Each of at most [`Options::concurrent_stores`] stores at a
//! time takes one segment more.
//!
//! Object-store operations of a log: one write where it is created and sealed within [`Options::flush_after`]; none where
//! it is empty too, if [`Options::store_empty`] is off. While it is open: a write per segment or flush, and while the last
//! segment is small, a read and a removal with it.

mod cursor;
mod entry;
mod layout;
mod reading;
mod sealing;
mod storing;

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use async_trait::async_trait;
use futures::{TryStreamExt as _, stream::BoxStream};
use runner_core::{
    artifact::{ArtifactError, ArtifactErrorKind, ArtifactKey, ArtifactStore},
    clock::Clock,
    crash,
    id::{AttemptId, RunId, TenantId},
    log::{Frame, FrameBatch, LogError, LogStore, LogSummary},
};
use tokio::sync::{Semaphore, SemaphorePermit};

use self::{
    cursor::{ReadFault, cost},
    entry::{Budget, Entry, Phase, Pushed},
    layout::{Body, Sealed, Segment},
    storing::{Queue, closed},
};

/// Frames are added in pieces that cost at most this, so that no batch is larger than what may wait.
const PIECE: usize = 1024 * 1024;

/// How often whoever waits for memory asks for it.
const PRESS_AGAIN: Duration = Duration::from_millis(20);

/// How much memory logs may take, and when they are stored.
#[derive(Debug, Clone)]
pub struct Options {
    /// A segment is stored once this many bytes wait. `append` waits while twice as many wait. Default 4 MiB.
    pub segment_bytes: usize,
    /// Frames are stored when they are about this old. Default 1 s.
    pub flush_after: Duration,
    /// Stored frames that one log keeps for live readers, in bytes. Default 4 MiB.
    pub window_bytes: usize,
    /// Frames of all logs, in bytes. Default 256 MiB.
    pub memory_bytes: usize,
    /// What a reader gets at once, in bytes; one frame may be larger. Default 128 KiB.
    pub batch_bytes: usize,
    /// How many segments are stored at a time, over all logs. Default 16.
    pub concurrent_stores: usize,
    /// Distance of the entries of a joined log's index, in bytes. Grows for a log with more than 1,024 of them. Default
    /// 1 MiB.
    pub index_stride: u64,
    /// Whether an empty log leaves a seal object. Where it does not, only this process knows for a while that the log is
    /// sealed: afterwards a reader that follows would wait, so the caller MUST read the log of a run that has ended with
    /// `follow = false`. Default true.
    pub store_empty: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            segment_bytes: 4 * 1024 * 1024,
            flush_after: Duration::from_secs(1),
            window_bytes: 4 * 1024 * 1024,
            memory_bytes: 256 * 1024 * 1024,
            batch_bytes: 128 * 1024,
            concurrent_stores: 16,
            index_stride: 1024 * 1024,
            store_empty: true,
        }
    }
}

/// What all logs take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogUsage {
    /// Logs in memory: open, or waited for.
    pub logs: usize,
    /// Bytes of frames that are not stored yet.
    pub pending_bytes: usize,
    /// Bytes of stored frames that are kept for live readers.
    pub recent_bytes: usize,
}

/// [`LogStore`] over an [`ArtifactStore`].
///
/// A store that is unavailable or full is tried again, with back-off, for as long as it takes: `append` then waits once
/// its memory is used up, `flush` and `seal` wait, and readers see what is in memory. Other failures of the store are
/// answered to `flush`, `seal` and an `append` that waits, and nothing is lost. `open` answers every failure. `read` tries
/// for some seconds.
///
/// Dropping it stops what it does in the background: frames that are not durable are forgotten, as in a crash, and readers
/// end with an error. Needs a tokio runtime with time.
pub struct SegmentedLogs {
    inner: Arc<Inner>,
}

impl fmt::Debug for SegmentedLogs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SegmentedLogs").field("usage", &self.usage()).finish_non_exhaustive()
    }
}

struct Inner {
    artifacts: Arc<dyn ArtifactStore>,
    clock: Arc<dyn Clock>,
    options: Options,
    budget: Arc<Budget>,
    /// Limits how many segments are encoded and stored at a time.
    stores: Semaphore,
    entries: Mutex<BTreeMap<AttemptId, Arc<Entry>>>,
    queue: Arc<Queue>,
    empties: Mutex<Empties>,
}

/// Logs that were sealed empty and left no object, the last of them.
#[derive(Debug, Default)]
struct Empties {
    order: VecDeque<AttemptId>,
    known: HashSet<AttemptId>,
}

impl Empties {
    const MAX: usize = 16_384;

    fn add(&mut self, attempt: AttemptId) {
        if !self.known.insert(attempt) {
            return;
        }
        self.order.push_back(attempt);
        if self.order.len() > Self::MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
    }

    fn contains(&self, attempt: AttemptId) -> bool {
        self.known.contains(&attempt)
    }
}

/// Somebody who needs a log's entry. The entry of a log that is not open goes with the last of them.
struct User {
    inner: Arc<Inner>,
    entry: Arc<Entry>,
}

impl User {
    fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut entries = self.inner.entries();
        if self.entry.users.fetch_sub(1, Ordering::Relaxed) == 1
            && matches!(self.entry.lock().phase, Phase::Unopened)
            && entries.get(&self.entry.attempt).is_some_and(|entry| Arc::ptr_eq(entry, &self.entry))
        {
            entries.remove(&self.entry.attempt);
        }
    }
}

impl Inner {
    fn entries(&self) -> MutexGuard<'_, BTreeMap<AttemptId, Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn empties(&self) -> MutexGuard<'_, Empties> {
        self.empties.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn prefix(&self, tenant: &TenantId, attempt: AttemptId) -> Result<ArtifactKey, ArtifactError> {
        layout::prefix(tenant, attempt).map_err(|error| {
            ArtifactError::with_source(ArtifactErrorKind::Other, format!("name the log of {attempt}"), error)
        })
    }

    fn key(&self, entry: &Entry, name: &str) -> Result<ArtifactKey, ArtifactError> {
        reading::below(&self.prefix(&entry.tenant, entry.attempt)?, name)
    }

    /// The log's entry; a new one where there is none. Another tenant's log of this id is not found.
    fn attach(self: &Arc<Self>, tenant: &TenantId, attempt: AttemptId) -> User {
        let mut entries = self.entries();
        let new = || Arc::new(Entry::new(tenant.clone(), attempt, self.budget.clone()));
        let entry = match entries.get(&attempt) {
            Some(entry) if entry.tenant == *tenant => entry.clone(),
            Some(_) => new(),
            None => entries.entry(attempt).or_insert(new()).clone(),
        };
        entry.users.fetch_add(1, Ordering::Relaxed);
        User { inner: self.clone(), entry }
    }

    /// The entry of a log that is open here.
    fn opened(&self, attempt: AttemptId) -> Result<Arc<Entry>, LogError> {
        self.entries().get(&attempt).cloned().ok_or(LogError::Sealed { attempt })
    }

    /// Takes an entry out of memory. Those who hold it go on with it.
    fn forget(&self, entry: &Arc<Entry>) {
        let mut entries = self.entries();
        if entries.get(&entry.attempt).is_some_and(|other| Arc::ptr_eq(entry, other)) {
            entries.remove(&entry.attempt);
        }
    }

    /// Opens an entry over what is stored. Answers the seal where there is one. The caller has the gate.
    async fn open_entry(&self, entry: &Arc<Entry>) -> Result<Option<Arc<Sealed>>, LogError> {
        let store_error = |error| entry.store_error(error);
        let prefix = self.prefix(&entry.tenant, entry.attempt).map_err(store_error)?;
        if self.empties().contains(entry.attempt) {
            let sealed = Sealed {
                summary: LogSummary::default(),
                body: Body::Inline { size: 0 },
                index: layout::Index::default(),
                base: 0,
            };
            return Ok(Some(self.found_sealed(entry, sealed)));
        }
        let listing = self.list(&prefix).await.map_err(store_error)?;
        if listing.sealed {
            let (sealed, _) = match self.load_seal(&prefix).await {
                Ok(Some(found)) => found,
                Ok(None) => return Err(entry.corrupt(format!("{prefix}: the seal is gone"))),
                Err(ReadFault::Corrupt(detail)) => return Err(entry.corrupt(detail)),
                Err(ReadFault::Store(error)) => return Err(entry.store_error(error)),
                Err(ReadFault::Missing(key)) => return Err(entry.corrupt(format!("{key} is gone"))),
            };
            let sealed = self.found_sealed(entry, sealed);
            // A crash between the seal and the removal of what it made superfluous.
            let kept = match &sealed.body {
                Body::Object { name, .. } => name.as_str(),
                Body::Inline { .. } => "",
            };
            let mut names: Vec<_> = listing.segments.iter().map(Segment::name).collect();
            if listing.joined {
                names.push(layout::FULL.to_owned());
            }
            self.remove(entry, names.into_iter().filter(|name| name != kept)).await;
            return Ok(Some(sealed));
        }
        let (segments, covered) = layout::cover(listing.segments)
            .map_err(|at| entry.corrupt(format!("{prefix}: no segment holds offset {at}")))?;
        {
            let mut state = entry.lock();
            state.open_over(segments);
            covered.into_iter().for_each(|segment| state.leave(segment));
        }
        entry.grown.notify_waiters();
        Ok(None)
    }

    fn found_sealed(&self, entry: &Arc<Entry>, sealed: Sealed) -> Arc<Sealed> {
        let sealed = Arc::new(sealed);
        {
            let mut state = entry.lock();
            state.durable = sealed.summary.end;
            state.end = sealed.summary.end;
            state.phase = Phase::Sealed(sealed.clone());
        }
        self.forget(entry);
        entry.wake_all();
        sealed
    }

    async fn open(
        self: &Arc<Self>,
        tenant: &TenantId,
        attempt: AttemptId,
        fresh: bool,
    ) -> Result<u64, LogError> {
        loop {
            let user = self.attach(tenant, attempt);
            let entry = user.entry();
            if !self.entries().get(&attempt).is_some_and(|other| Arc::ptr_eq(entry, other)) {
                let another = self.entries().get(&attempt).is_some_and(|other| other.tenant != *tenant);
                if another {
                    return Err(entry.corrupt("another tenant has a log of this id open"));
                }
                continue;
            }
            let _gate = entry.gate.lock().await;
            {
                let mut state = entry.lock();
                match &state.phase {
                    Phase::Open | Phase::Sealing | Phase::Sealed(_) => return Ok(state.durable),
                    // Removed meanwhile; the next look finds a new entry.
                    Phase::Deleted => continue,
                    Phase::Unopened if fresh => {
                        state.open_over(Vec::new());
                        drop(state);
                        entry.grown.notify_waiters();
                        return Ok(0);
                    }
                    Phase::Unopened => {}
                }
            }
            self.open_entry(entry).await?;
            return Ok(entry.lock().durable);
        }
    }

    /// Adds frames that cost about `PIECE` at most.
    async fn append_piece(self: &Arc<Self>, entry: &Arc<Entry>, frames: Vec<Frame>) -> Result<u64, LogError> {
        self.wait_for_room(entry).await?;
        let wanted = frames.iter().map(cost).sum::<usize>().min(self.budget.pending_cap);
        let permits = u32::try_from(wanted).unwrap_or(u32::MAX);
        let permit = match self.budget.pending.try_acquire_many(permits) {
            Ok(permit) => permit,
            Err(_) => self.wait_for_memory(entry, permits).await?,
        };
        let now = self.clock.monotonic();
        let (result, added, enqueue, durable) = {
            let mut state = entry.lock();
            if !matches!(state.phase, Phase::Open) {
                return Err(entry.sealed_error());
            }
            permit.forget();
            state.fund(wanted);
            let mut added = false;
            let mut result = Ok(());
            for frame in frames {
                match state.push(entry.attempt, frame, now) {
                    Ok(Pushed::Added) => added = true,
                    Ok(Pushed::Known) => {}
                    Err(error) => {
                        result = Err(error);
                        break;
                    }
                }
            }
            state.settle();
            let enqueue = added && !state.queued;
            state.queued |= enqueue;
            (result, added, enqueue, state.durable)
        };
        if added {
            entry.grown.notify_waiters();
            self.kick(entry);
        }
        if enqueue {
            self.enqueue(entry);
        }
        result.map(|()| durable)
    }

    /// Waits until frames of other logs are stored.
    async fn wait_for_memory(&self, entry: &Entry, permits: u32) -> Result<SemaphorePermit<'_>, LogError> {
        let mut acquire = std::pin::pin!(self.budget.pending.acquire_many(permits));
        loop {
            // Again and again: what came after the last time is in nobody's hurry.
            self.queue.press();
            tokio::select! {
                // Never closed.
                permit = &mut acquire => return permit.map_err(|_| entry.store_error(closed())),
                () = tokio::time::sleep(PRESS_AGAIN) => {}
            }
        }
    }

    /// Waits while two segments wait to be stored.
    async fn wait_for_room(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<(), LogError> {
        let mut before = None;
        loop {
            let stored = entry.stored.notified();
            {
                let state = entry.lock();
                if !matches!(state.phase, Phase::Open) {
                    return Err(entry.sealed_error());
                }
                if state.pending_cost <= 2 * self.options.segment_bytes {
                    return Ok(());
                }
                let before = *before.get_or_insert(state.failures());
                if let Some(error) = state.failed_since(before) {
                    return Err(entry.store_error(error));
                }
            }
            self.kick(entry);
            stored.await;
        }
    }

    async fn delete(self: &Arc<Self>, tenant: &TenantId, run: RunId) -> Result<(), LogError> {
        let of_run = AttemptId { run, number: 0 }..=AttemptId { run, number: u32::MAX };
        let entries: Vec<_> = self
            .entries()
            .range(of_run)
            .map(|(_, entry)| entry.clone())
            .filter(|entry| entry.tenant == *tenant)
            .collect();
        for entry in entries {
            let _gate = entry.gate.lock().await;
            entry.lock().phase = Phase::Deleted;
            self.forget(&entry);
            entry.wake_all();
            self.wait_until_idle(&entry).await;
            entry.lock().clear();
        }
        let store_error = |source| LogError::Store { attempt: AttemptId { run, number: 0 }, source };
        let prefix = ArtifactKey::run_prefix(tenant, run);
        let mut objects = self.artifacts.list(&prefix);
        let mut keys = Vec::new();
        loop {
            let object = objects.try_next().await.map_err(store_error)?;
            let more = object.is_some();
            keys.extend(object.map(|object| object.key).filter(|key| is_log(&prefix, key)));
            // In groups, so that a log of many segments does not take memory for each.
            if keys.len() >= 256 || !more {
                for key in keys.drain(..) {
                    self.artifacts.delete(&key).await.map_err(store_error)?;
                }
            }
            if !more {
                return Ok(());
            }
        }
    }
}

/// Whether a key below a run's prefix is `NUMBER/log/…`.
fn is_log(prefix: &ArtifactKey, key: &ArtifactKey) -> bool {
    let mut names = key.as_str().strip_prefix(prefix.as_str()).unwrap_or_default().split('/').skip(1);
    names.next().is_some_and(|number| number.parse::<u32>().is_ok()) && names.next() == Some("log")
}

impl SegmentedLogs {
    /// Logs over `artifacts`. Values of `options` that make no sense are raised to the least that does.
    pub fn new(artifacts: Arc<dyn ArtifactStore>, clock: Arc<dyn Clock>, mut options: Options) -> Self {
        options.segment_bytes = options.segment_bytes.max(1);
        options.batch_bytes = options.batch_bytes.max(1);
        options.concurrent_stores = options.concurrent_stores.clamp(1, 1024);
        let half = (options.memory_bytes / 2).max(1);
        let inner = Inner {
            artifacts,
            clock,
            budget: Arc::new(Budget::new(half, half)),
            stores: Semaphore::new(options.concurrent_stores),
            entries: Mutex::default(),
            queue: Arc::default(),
            empties: Mutex::default(),
            options,
        };
        Self { inner: Arc::new(inner) }
    }

    /// What all logs take now.
    pub fn usage(&self) -> LogUsage {
        let (pending_bytes, recent_bytes) = self.inner.budget.used();
        LogUsage { logs: self.inner.entries().len(), pending_bytes, recent_bytes }
    }
}

impl Drop for SegmentedLogs {
    fn drop(&mut self) {
        self.inner.queue.close();
        let entries: Vec<_> = self.inner.entries().values().cloned().collect();
        for entry in entries {
            entry.wake_all();
        }
    }
}

#[async_trait]
impl LogStore for SegmentedLogs {
    async fn open(&self, tenant: &TenantId, attempt: AttemptId, fresh: bool) -> Result<u64, LogError> {
        self.inner.open(tenant, attempt, fresh).await
    }

    async fn append(&self, attempt: AttemptId, frames: FrameBatch) -> Result<u64, LogError> {
        let entry = self.inner.opened(attempt)?;
        let mut durable = None;
        let mut piece = Vec::new();
        let mut used = 0;
        for frame in frames {
            used += cost(&frame);
            piece.push(frame);
            if used >= PIECE {
                durable = Some(self.inner.append_piece(&entry, std::mem::take(&mut piece)).await?);
                used = 0;
            }
        }
        let durable = match durable {
            Some(durable) if piece.is_empty() => durable,
            _ => self.inner.append_piece(&entry, piece).await?,
        };
        crash::point("log.appended");
        Ok(durable)
    }

    async fn flush(&self, attempt: AttemptId) -> Result<u64, LogError> {
        let entry = self.inner.opened(attempt)?;
        if !matches!(entry.lock().phase, Phase::Open) {
            return Err(entry.sealed_error());
        }
        self.inner.store_all(&entry).await
    }

    async fn seal(&self, tenant: &TenantId, attempt: AttemptId) -> Result<LogSummary, LogError> {
        self.inner.seal(tenant, attempt).await
    }

    fn read(
        &self,
        tenant: &TenantId,
        attempt: AttemptId,
        offset: u64,
        follow: bool,
    ) -> BoxStream<'static, Result<FrameBatch, LogError>> {
        self.inner.read(tenant, attempt, offset, follow)
    }

    async fn delete(&self, tenant: &TenantId, run: RunId) -> Result<(), LogError> {
        self.inner.delete(tenant, run).await
    }
}
