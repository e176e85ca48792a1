//! What transfers may cost the service together: requests at once, memory, bandwidth.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use runner_core::clock::Clock;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{RunTuning, Tuning};

/// Memory is counted in pieces of this size, in bytes.
const PIECE: u64 = 1024 * 1024;
/// The memory that an upload under way has of its own, in bytes: one part, of the size that the first thousand have.
const UPLOAD: u64 = 8 * PIECE;

/// Shared by all transfers of a store, or of one run, which draws on both.
#[derive(Debug)]
pub(super) struct Budget {
    /// What this one is a part of.
    whole: Option<Arc<Budget>>,
    reads: Arc<Semaphore>,
    writes: Arc<Semaphore>,
    uploads: Arc<Semaphore>,
    memory: Arc<Semaphore>,
    up: Option<Bucket>,
    down: Option<Bucket>,
}

/// Bytes of the shared memory; given back when dropped.
#[derive(Debug)]
pub(super) struct Memory {
    _pieces: OwnedSemaphorePermit,
    _of_whole: Option<Box<Memory>>,
}

/// The right to do one request, or one upload.
#[derive(Debug)]
pub(super) struct Slot {
    _permits: [Option<OwnedSemaphorePermit>; 2],
}

fn semaphore(permits: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(permits.clamp(1, Semaphore::MAX_PERMITS)))
}

fn pieces(bytes: u64) -> usize {
    usize::try_from(bytes / PIECE).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS)
}

impl Budget {
    pub(super) fn new(tuning: &Tuning, clock: &Arc<dyn Clock>) -> Self {
        Self {
            whole: None,
            // Two pools: an upload may read from the store what it writes, and must never wait for itself.
            reads: semaphore(tuning.connections.div_ceil(2)),
            writes: semaphore(tuning.connections.div_ceil(2)),
            uploads: semaphore(tuning.uploads),
            memory: Arc::new(Semaphore::new(pieces(tuning.memory_bytes))),
            up: Bucket::limiting(tuning.upload_bytes_per_sec, clock),
            down: Bucket::limiting(tuning.download_bytes_per_sec, clock),
        }
    }

    /// What one run may take of a whole.
    pub(super) fn of_run(whole: &Arc<Self>, run: &RunTuning, clock: &Arc<dyn Clock>) -> Self {
        // Every upload under way has the memory of one part besides what is shared: half of the whole for those.
        let uploads = (run.memory_bytes / 2 / UPLOAD).max(1);
        Self {
            whole: Some(Arc::clone(whole)),
            reads: semaphore(run.connections.div_ceil(2)),
            writes: semaphore(run.connections.div_ceil(2)),
            uploads: semaphore(usize::try_from(uploads).unwrap_or(usize::MAX)),
            memory: Arc::new(Semaphore::new(pieces(run.memory_bytes.saturating_sub(uploads * UPLOAD)))),
            up: Bucket::limiting(run.upload_bytes_per_sec, clock),
            down: Bucket::limiting(run.download_bytes_per_sec, clock),
        }
    }

    /// Of its own first: who waits there holds nothing that others wait for.
    async fn slot(&self, of: impl Fn(&Self) -> &Arc<Semaphore>) -> Slot {
        // Never closed; without a permit the request is only not counted.
        let own = Arc::clone(of(self)).acquire_owned().await.ok();
        let of_whole = match &self.whole {
            Some(whole) => Arc::clone(of(whole)).acquire_owned().await.ok(),
            None => None,
        };
        Slot { _permits: [own, of_whole] }
    }

    /// Waits for the right to do one request that reads.
    pub(super) async fn read(&self) -> Slot {
        self.slot(|budget| &budget.reads).await
    }

    /// Waits for the right to do one request that writes.
    pub(super) async fn write(&self) -> Slot {
        self.slot(|budget| &budget.writes).await
    }

    /// Waits for the right to have one upload in parts under way. It covers the memory of one part.
    pub(super) async fn upload(&self) -> Slot {
        self.slot(|budget| &budget.uploads).await
    }

    /// Memory for a further part or range, where there is some. Nobody waits for it: one part at a time always goes on.
    pub(super) fn memory(&self, bytes: u64) -> Option<Memory> {
        let pieces = u32::try_from(bytes.div_ceil(PIECE)).ok()?;
        let permit = Arc::clone(&self.memory).try_acquire_many_owned(pieces).ok()?;
        let of_whole = match &self.whole {
            Some(whole) => Some(Box::new(whole.memory(bytes)?)),
            None => None,
        };
        Some(Memory { _pieces: permit, _of_whole: of_whole })
    }

    /// Waits until so many bytes may be sent.
    pub(super) async fn sent(&self, bytes: u64) {
        for budget in [Some(self), self.whole.as_deref()].into_iter().flatten() {
            if let Some(bucket) = &budget.up {
                bucket.take(bytes).await;
            }
        }
    }

    /// Waits until so many bytes may have been read.
    pub(super) async fn got(&self, bytes: u64) {
        for budget in [Some(self), self.whole.as_deref()].into_iter().flatten() {
            if let Some(bucket) = &budget.down {
                bucket.take(bytes).await;
            }
        }
    }
}

/// A bandwidth, shared first come, first served. Each taker is given its place in time; nobody is passed over.
#[derive(Debug)]
struct Bucket {
    bytes_per_sec: u64,
    clock: Arc<dyn Clock>,
    /// When the last one who took will be done, on the monotonic clock.
    until: Mutex<Duration>,
}

/// Unused time that is not lost.
const BURST: Duration = Duration::from_millis(250);

impl Bucket {
    fn limiting(rate: Option<u64>, clock: &Arc<dyn Clock>) -> Option<Self> {
        rate.map(|rate| Self::new(rate, Arc::clone(clock)))
    }

    fn new(bytes_per_sec: u64, clock: Arc<dyn Clock>) -> Self {
        Self { bytes_per_sec: bytes_per_sec.max(1), until: Mutex::new(Duration::ZERO), clock }
    }

    async fn take(&self, bytes: u64) {
        let wait = self.reserve(bytes, self.clock.monotonic());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    /// How long to wait until `bytes` may have moved.
    fn reserve(&self, bytes: u64, now: Duration) -> Duration {
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_sec as f64);
        let mut until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        *until = (*until).max(now.saturating_sub(BURST)) + cost;
        until.saturating_sub(now)
    }
}

#[cfg(test)]
mod tests {
    use runner_core::clock::SystemClock;

    use super::*;

    #[test]
    fn bandwidth_is_shared_in_order_and_unused_time_is_kept_only_for_a_moment() {
        let bucket = Bucket::new(1000, Arc::new(SystemClock::new()));
        let at = Duration::from_secs;
        let first = bucket.reserve(1000, at(100));
        assert_eq!(first, Duration::from_millis(750));
        assert_eq!(bucket.reserve(1000, at(100)), first + at(1), "the second waits for the first");
        assert_eq!(bucket.reserve(500, at(1000)), Duration::from_millis(250), "an idle hour is no credit");
    }

    #[test]
    fn memory_is_refused_rather_than_waited_for_and_comes_back() {
        let tuning = Tuning { memory_bytes: 10 * PIECE, ..Tuning::default() };
        let budget = Budget::new(&tuning, &(Arc::new(SystemClock::new()) as Arc<dyn Clock>));
        let first = budget.memory(8 * PIECE).expect("there is room");
        assert!(budget.memory(8 * PIECE).is_none());
        drop(first);
        assert!(budget.memory(8 * PIECE).is_some());
    }

    #[test]
    fn a_run_is_held_to_its_own_share_and_to_what_is_left_of_the_whole() {
        let clock = Arc::new(SystemClock::new()) as Arc<dyn Clock>;
        let tuning = Tuning { memory_bytes: 40 * PIECE, connections: 8, ..Tuning::default() };
        let whole = Arc::new(Budget::new(&tuning, &clock));
        let caps = RunTuning { connections: 4, memory_bytes: 48 * PIECE, ..RunTuning::default() };
        let run = || Budget::of_run(&whole, &caps, &clock);
        let (first, second) = (run(), run());
        // Three uploads of 8 MiB each, and 24 MiB for what goes beside them.
        assert_eq!(first.uploads.available_permits(), 3);
        let all = first.memory(24 * PIECE).expect("its share");
        assert!(first.memory(PIECE).is_none(), "its share is taken");
        assert!(second.memory(17 * PIECE).is_none(), "the whole has 16 MiB left");
        assert!(second.memory(16 * PIECE).is_some());
        assert!(second.memory(24 * PIECE).is_none(), "and what was refused took nothing");
        assert!(second.memory(16 * PIECE).is_some());
        drop(all);
        assert!(second.memory(24 * PIECE).is_some());
    }

    #[tokio::test]
    async fn a_run_has_so_many_requests_at_once_and_no_more() {
        let clock = Arc::new(SystemClock::new()) as Arc<dyn Clock>;
        let whole = Arc::new(Budget::new(&Tuning { connections: 6, ..Tuning::default() }, &clock));
        let caps = RunTuning { connections: 4, ..RunTuning::default() };
        let (first, second) = (Budget::of_run(&whole, &caps, &clock), Budget::of_run(&whole, &caps, &clock));
        let held = [first.read().await, first.read().await];
        assert!(futures::FutureExt::now_or_never(first.read()).is_none(), "two of its own");
        let third = second.read().await;
        assert!(futures::FutureExt::now_or_never(second.read()).is_none(), "three of all");
        assert!(futures::FutureExt::now_or_never(second.write()).is_some(), "writes are apart");
        drop((held, third));
        assert!(futures::FutureExt::now_or_never(first.read()).is_some());
    }
}
