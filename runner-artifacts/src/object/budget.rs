//! What transfers may cost the service together: requests at once, memory, bandwidth.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use runner_core::clock::Clock;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Tuning;

/// Memory is counted in pieces of this size, in bytes.
const PIECE: u64 = 1024 * 1024;

/// Shared by all transfers of a store.
#[derive(Debug)]
pub(super) struct Budget {
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
}

/// The right to do one request, or one upload.
#[derive(Debug)]
pub(super) struct Slot {
    _permit: Option<OwnedSemaphorePermit>,
}

async fn slot(of: &Arc<Semaphore>) -> Slot {
    // Never closed; without a permit the request is only not counted.
    Slot { _permit: Arc::clone(of).acquire_owned().await.ok() }
}

impl Budget {
    pub(super) fn new(tuning: &Tuning, clock: &Arc<dyn Clock>) -> Self {
        let semaphore = |permits: usize| Arc::new(Semaphore::new(permits.clamp(1, Semaphore::MAX_PERMITS)));
        let bucket = |rate: Option<u64>| rate.map(|rate| Bucket::new(rate, Arc::clone(clock)));
        Self {
            // Two pools: an upload may read from the store what it writes, and must never wait for itself.
            reads: semaphore(tuning.connections.div_ceil(2)),
            writes: semaphore(tuning.connections.div_ceil(2)),
            uploads: semaphore(tuning.uploads),
            memory: semaphore(usize::try_from(tuning.memory_bytes / PIECE).unwrap_or(usize::MAX)),
            up: bucket(tuning.upload_bytes_per_sec),
            down: bucket(tuning.download_bytes_per_sec),
        }
    }

    /// Waits for the right to do one request that reads.
    pub(super) async fn read(&self) -> Slot {
        slot(&self.reads).await
    }

    /// Waits for the right to do one request that writes.
    pub(super) async fn write(&self) -> Slot {
        slot(&self.writes).await
    }

    /// Waits for the right to have one upload in parts under way. It covers the memory of one part.
    pub(super) async fn upload(&self) -> Slot {
        slot(&self.uploads).await
    }

    /// Memory for a further part or range, where there is some. Nobody waits for it: one part at a time always goes on.
    pub(super) fn memory(&self, bytes: u64) -> Option<Memory> {
        let pieces = u32::try_from(bytes.div_ceil(PIECE)).ok()?;
        let permit = Arc::clone(&self.memory).try_acquire_many_owned(pieces).ok()?;
        Some(Memory { _pieces: permit })
    }

    /// Waits until so many bytes may be sent.
    pub(super) async fn sent(&self, bytes: u64) {
        if let Some(bucket) = &self.up {
            bucket.take(bytes).await;
        }
    }

    /// Waits until so many bytes may have been read.
    pub(super) async fn got(&self, bytes: u64) {
        if let Some(bucket) = &self.down {
            bucket.take(bytes).await;
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
}
