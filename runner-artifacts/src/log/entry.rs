//! One log in memory: the frames that are not stored yet, and the recent ones for live readers.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use runner_core::{
    artifact::{ArtifactError, ArtifactErrorKind},
    id::{AttemptId, TenantId},
    log::{
        Frame, FrameBatch, FrameBody, LogError,
        codec::{self, HEADER},
    },
};
use tokio::sync::{Notify, Semaphore};

use super::{
    cursor::cost,
    layout::{Sealed, Segment},
};

/// Longest reason of a truncation that is kept; the codec's limit.
const MAX_REASON: usize = 1024;

/// Memory that all logs of a store share.
#[derive(Debug)]
pub(super) struct Budget {
    /// Bytes that frames which are not stored may still take. Whoever appends waits here.
    pub(super) pending: Semaphore,
    /// Size of `pending`.
    pub(super) pending_cap: usize,
    /// Bytes that stored frames take, kept for live readers.
    recent: AtomicUsize,
    recent_cap: usize,
}

impl Budget {
    pub(super) fn new(pending_cap: usize, recent_cap: usize) -> Self {
        let pending_cap = pending_cap.min(Semaphore::MAX_PERMITS).min(u32::MAX as usize);
        Self { pending: Semaphore::new(pending_cap), pending_cap, recent: AtomicUsize::new(0), recent_cap }
    }

    /// Bytes that frames take now: those not stored, and the recent ones.
    pub(super) fn used(&self) -> (usize, usize) {
        (
            self.pending_cap - self.pending.available_permits().min(self.pending_cap),
            self.recent.load(Ordering::Relaxed),
        )
    }
}

/// What may be done with a log.
#[derive(Debug, Clone)]
pub(super) enum Phase {
    /// Nobody has opened it here; readers wait.
    Unopened,
    /// It takes frames.
    Open,
    /// It takes no more frames; its seal is being stored.
    Sealing,
    /// Its seal is stored.
    Sealed(Arc<Sealed>),
    /// It was removed.
    Deleted,
}

/// One log, shared by its source, its readers and the tasks that store it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) attempt: AttemptId,
    pub(super) tenant: TenantId,
    state: Mutex<State>,
    /// There is something new for readers.
    pub(super) grown: Notify,
    /// There is something new for those who wait for the object store.
    pub(super) stored: Notify,
    /// Ends a back-off, because what is wanted has changed.
    pub(super) hurry: Notify,
    /// Serialises `open`, `seal` and `delete`.
    pub(super) gate: tokio::sync::Mutex<()>,
    /// Who needs the entry although the log is not open. Changed under the lock of the map of entries.
    pub(super) users: AtomicUsize,
}

impl Entry {
    pub(super) fn new(tenant: TenantId, attempt: AttemptId, budget: Arc<Budget>) -> Self {
        Self {
            attempt,
            tenant,
            state: Mutex::new(State::new(budget)),
            grown: Notify::new(),
            stored: Notify::new(),
            hurry: Notify::new(),
            gate: tokio::sync::Mutex::new(()),
            users: AtomicUsize::new(0),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock is held leaves a state that is whole: every change is a few assignments.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wake_all(&self) {
        self.grown.notify_waiters();
        self.stored.notify_waiters();
        self.hurry.notify_waiters();
    }

    pub(super) fn sealed_error(&self) -> LogError {
        LogError::Sealed { attempt: self.attempt }
    }

    pub(super) fn store_error(&self, source: ArtifactError) -> LogError {
        LogError::Store { attempt: self.attempt, source }
    }

    pub(super) fn corrupt(&self, detail: impl Into<String>) -> LogError {
        LogError::Corrupt { attempt: self.attempt, detail: detail.into() }
    }
}

/// The part of an [`Entry`] under its lock.
#[derive(Debug)]
pub(super) struct State {
    budget: Arc<Budget>,
    pub(super) phase: Phase,
    /// Up to here it is in the object store.
    pub(super) durable: u64,
    /// Up to here it was appended.
    pub(super) end: u64,
    /// Dropped bytes up to `end`. `None`: a process before this one stored some of the log, and nobody has counted.
    pub(super) dropped: Option<u64>,
    /// What is in the object store, without gaps.
    pub(super) segments: Vec<Segment>,
    /// What longer segments cover, and could not be removed yet.
    pub(super) leftovers: Vec<Segment>,
    /// Contiguous, up to `end`. Those from `durable` on are pending, those before it recent.
    frames: VecDeque<Frame>,
    pub(super) pending_cost: usize,
    recent_cost: usize,
    /// Permits of the budget that pending frames hold.
    permits: usize,
    /// Up to here it must be stored without waiting for more.
    pub(super) flush_to: u64,
    /// A task is storing segments.
    pub(super) storing: bool,
    /// It is in the queue of logs that a timer looks at.
    pub(super) queued: bool,
    pub(super) last_append: Duration,
    pub(super) oldest_pending: Duration,
    /// How often the object store failed in a way that waiting does not cure, and how the last time.
    failures: u64,
    failure: Option<(ArtifactErrorKind, String)>,
}

/// What [`State::push`] did with a frame.
pub(super) enum Pushed {
    /// It, or its end, is in.
    Added,
    /// All of it was there.
    Known,
}

impl State {
    fn new(budget: Arc<Budget>) -> Self {
        Self {
            budget,
            phase: Phase::Unopened,
            durable: 0,
            end: 0,
            dropped: Some(0),
            segments: Vec::new(),
            leftovers: Vec::new(),
            frames: VecDeque::new(),
            pending_cost: 0,
            recent_cost: 0,
            permits: 0,
            flush_to: 0,
            storing: false,
            queued: false,
            last_append: Duration::ZERO,
            oldest_pending: Duration::ZERO,
            failures: 0,
            failure: None,
        }
    }

    /// Remembers a segment that another covers, to remove it with the seal.
    pub(super) fn leave(&mut self, segment: Segment) {
        // Past this many they are left to the removal of the run.
        if self.leftovers.len() < 64 {
            self.leftovers.push(segment);
        }
    }

    /// Opens it over what is stored.
    pub(super) fn open_over(&mut self, segments: Vec<Segment>) {
        self.durable = segments.last().map_or(0, |segment| segment.end);
        self.end = self.durable;
        self.dropped = segments.is_empty().then_some(0);
        self.segments = segments;
        self.phase = Phase::Open;
    }

    /// Takes over permits for frames that will be pushed.
    pub(super) fn fund(&mut self, permits: usize) {
        self.permits += permits;
    }

    /// Adds what is new in a frame.
    ///
    /// # Errors
    /// `Gap`, and `Corrupt` where the frame reaches past the last offset there is.
    pub(super) fn push(
        &mut self,
        attempt: AttemptId,
        frame: Frame,
        now: Duration,
    ) -> Result<Pushed, LogError> {
        if frame.offset > self.end {
            return Err(LogError::Gap { attempt, expected: self.end, got: frame.offset });
        }
        if frame.offset.checked_add(frame.span()).is_none() {
            let detail =
                format!("a frame at {} of {} bytes reaches past the last offset", frame.offset, frame.span());
            return Err(LogError::Corrupt { attempt, detail });
        }
        let Some(mut frame) = frame.from_offset(self.end) else { return Ok(Pushed::Known) };
        if frame.span() == 0 {
            return Ok(Pushed::Known);
        }
        if self.pending_cost == 0 {
            self.oldest_pending = now;
        }
        self.last_append = now;
        if let FrameBody::Truncated { dropped, reason } = &mut frame.body {
            self.dropped = self.dropped.map(|sum| sum.saturating_add(*dropped));
            reason.truncate(reason.floor_char_boundary(MAX_REASON));
        }
        self.end = frame.end();
        // A source splits at this size; one that does not must not end the log.
        while frame.span() > codec::MAX_PAYLOAD as u64
            && let FrameBody::Data { stream, bytes } = &mut frame.body
        {
            let front = bytes.split_to(codec::MAX_PAYLOAD);
            let body = FrameBody::Data { stream: *stream, bytes: front };
            let front = Frame { offset: frame.offset, time: frame.time, body };
            frame.offset = front.end();
            self.keep(front);
        }
        self.keep(frame);
        Ok(Pushed::Added)
    }

    fn keep(&mut self, frame: Frame) {
        self.pending_cost += cost(&frame);
        self.frames.push_back(frame);
    }

    /// Gives back what pending frames do not need.
    pub(super) fn settle(&mut self) {
        let excess = self.permits.saturating_sub(self.pending_cost);
        if excess > 0 {
            self.permits -= excess;
            self.budget.pending.add_permits(excess);
        }
    }

    /// Pending frames that cost up to `limit`, the last one excepted.
    pub(super) fn pending(&self, limit: usize) -> FrameBatch {
        let start = self.frames.partition_point(|frame| frame.offset < self.durable);
        let mut used = 0;
        let mut taken = Vec::new();
        for frame in self.frames.range(start..) {
            if used >= limit {
                break;
            }
            used += cost(frame);
            taken.push(frame.clone());
        }
        taken
    }

    /// Notes that pending frames up to `end` are stored, and keeps them for readers while there is room.
    pub(super) fn stored_to(&mut self, end: u64, window: usize, now: Duration) {
        let start = self.frames.partition_point(|frame| frame.offset < self.durable);
        let mut moved = 0;
        for frame in self.frames.range(start..).take_while(|frame| frame.offset < end) {
            moved += cost(frame);
        }
        self.durable = end;
        self.pending_cost -= moved;
        self.recent_cost += moved;
        self.budget.recent.fetch_add(moved, Ordering::Relaxed);
        self.oldest_pending = now;
        self.settle();
        self.trim(window);
    }

    /// Forgets stored frames, the oldest first, until they cost at most `window`, and the store's budget is kept.
    pub(super) fn trim(&mut self, window: usize) {
        let mut freed = 0;
        while self.recent_cost > window
            || (self.recent_cost > 0
                && self.budget.recent.load(Ordering::Relaxed).saturating_sub(freed) > self.budget.recent_cap)
        {
            let Some(frame) = self.frames.pop_front() else { break };
            let cost = cost(&frame);
            self.recent_cost -= cost;
            freed += cost;
        }
        self.budget.recent.fetch_sub(freed, Ordering::Relaxed);
        if self.frames.is_empty() {
            // Its capacity would stay for as long as the log is open.
            self.frames = VecDeque::new();
        }
    }

    /// Whether any frame is in memory.
    pub(super) fn holds_frames(&self) -> bool {
        !self.frames.is_empty()
    }

    /// Frames from `offset` on that are in memory, until they cost `limit`, the first one excepted. `None`: `offset` is
    /// before the first that is in memory, or at the end.
    pub(super) fn read(&self, offset: u64, limit: usize) -> Option<FrameBatch> {
        if offset >= self.end || self.frames.front().is_none_or(|first| first.offset > offset) {
            return None;
        }
        let start = self.frames.partition_point(|frame| frame.end() <= offset);
        let mut used = 0;
        let mut batch = Vec::new();
        for frame in self.frames.range(start..) {
            batch.extend(frame.clone().from_offset(offset));
            used += cost(frame);
            if used >= limit {
                break;
            }
        }
        (!batch.is_empty()).then_some(batch)
    }

    /// The segment that holds `offset`.
    pub(super) fn segment_at(&self, offset: u64) -> Option<Segment> {
        segment_at(&self.segments, offset)
    }

    pub(super) fn fail(&mut self, error: &ArtifactError) {
        self.failures += 1;
        self.failure = Some((error.kind, error.to_string()));
    }

    /// A count to compare with later.
    pub(super) fn failures(&self) -> u64 {
        self.failures
    }

    /// How the object store failed since `before`.
    pub(super) fn failed_since(&self, before: u64) -> Option<ArtifactError> {
        let (kind, context) = self.failure.as_ref().filter(|_| self.failures > before)?;
        Some(ArtifactError::new(*kind, context.clone()))
    }

    /// Forgets all frames. What is pending is lost: only for a log that is stored otherwise, or removed.
    pub(super) fn clear(&mut self) {
        self.frames = VecDeque::new();
        self.pending_cost = 0;
        self.settle();
        self.budget.recent.fetch_sub(self.recent_cost, Ordering::Relaxed);
        self.recent_cost = 0;
    }
}

impl Drop for State {
    fn drop(&mut self) {
        self.clear();
    }
}

/// The segment of a cover that holds `offset`.
pub(super) fn segment_at(segments: &[Segment], offset: u64) -> Option<Segment> {
    segments.get(segments.partition_point(|segment| segment.end <= offset)).copied()
}

/// The stored form of frames.
pub(super) fn encode(frames: &[Frame]) -> Vec<u8> {
    let size = frames.iter().map(|frame| HEADER + cost(frame)).sum();
    let mut bytes = Vec::with_capacity(size);
    for frame in frames {
        codec::encode(frame, &mut bytes);
    }
    bytes
}
