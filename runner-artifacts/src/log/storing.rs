//! Brings pending frames into the object store: one task per log that has something to store, and one timer for all.

use std::{
    collections::VecDeque,
    future::Future,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use bytes::Bytes;
use runner_core::{
    artifact::{ArtifactError, ArtifactErrorKind, read_small},
    crash,
    log::{Frame, LogError, codec},
    task::{TaskKind, spawn},
};
use tokio::sync::Notify;

use super::{
    Inner,
    entry::{Entry, Phase, encode},
    layout::Segment,
};

/// A last segment below this size is stored again together with what follows it, so that a program which prints a line
/// each second does not leave an object for each.
const MERGE_BYTES: u64 = 64 * 1024;
/// Stored frames of a log that is silent for this long are forgotten.
const IDLE: Duration = Duration::from_secs(5);

/// Waits longer from time to time, up to two seconds.
#[derive(Debug)]
pub(super) struct Backoff(Duration);

impl Backoff {
    pub(super) fn new() -> Self {
        Self(Duration::from_millis(20))
    }

    pub(super) async fn wait(&mut self) {
        let now = self.0;
        self.0 = (now * 2).min(Duration::from_secs(2));
        tokio::time::sleep(now).await;
    }
}

/// What is answered once the log store is gone.
pub(super) fn closed() -> ArtifactError {
    ArtifactError::new(ArtifactErrorKind::Unavailable, "the log store was closed")
}

/// Logs that a timer looks at, in the order of their turn.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<QueueState>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct QueueState {
    logs: VecDeque<(Duration, Weak<Entry>)>,
    /// Whoever appends waits for memory: everything is stored now.
    pressed: bool,
    closed: bool,
    running: bool,
}

impl Queue {
    fn lock(&self) -> std::sync::MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has all pending frames stored without delay.
    pub(super) fn press(&self) {
        self.lock().pressed = true;
        self.changed.notify_one();
    }

    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }
}

impl Inner {
    /// Has the timer look at a log after the flush delay.
    pub(super) fn enqueue(self: &Arc<Self>, entry: &Arc<Entry>) {
        let due = self.clock.monotonic() + self.options.flush_after;
        let mut queue = self.queue.lock();
        let first = queue.logs.is_empty();
        queue.logs.push_back((due, Arc::downgrade(entry)));
        if !queue.running && !queue.closed {
            queue.running = true;
            let (inner, queue) = (Arc::downgrade(self), self.queue.clone());
            spawn(TaskKind::Loop, "log-flush", async move { flush_loop(&inner, &queue).await });
        }
        drop(queue);
        if first {
            self.queue.changed.notify_one();
        }
    }

    /// Starts a task that stores what must be stored, unless one is at it.
    pub(super) fn kick(self: &Arc<Self>, entry: &Arc<Entry>) {
        let mut state = entry.lock();
        if state.storing || !self.wants_storing(&state) || self.queue.is_closed() {
            return;
        }
        state.storing = true;
        drop(state);
        let mut job = StoreJob { inner: self.clone(), entry: entry.clone(), done: false };
        spawn(TaskKind::Helper, "log-store", async move { job.run().await });
    }

    fn wants_storing(&self, state: &super::entry::State) -> bool {
        match state.phase {
            Phase::Open => {
                state.pending_cost >= self.options.segment_bytes
                    || (state.pending_cost > 0 && state.flush_to > state.durable)
            }
            // What is left goes with the seal, unless the seal asks for it.
            Phase::Sealing => state.pending_cost > 0 && state.flush_to > state.durable,
            Phase::Unopened | Phase::Sealed(_) | Phase::Deleted => false,
        }
    }

    /// Repeats `operation` while it fails in a way that may pass.
    pub(super) async fn persist<T, F>(
        &self,
        entry: &Entry,
        mut operation: impl FnMut() -> F,
    ) -> Result<T, LogError>
    where
        F: Future<Output = Result<T, ArtifactError>>,
    {
        let mut backoff = Backoff::new();
        let mut warned = false;
        loop {
            match operation().await {
                Ok(value) => return Ok(value),
                Err(error) if !error.kind.retryable() => return Err(entry.store_error(error)),
                Err(error) => {
                    if !warned {
                        warned = true;
                        tracing::warn!(attempt = %entry.attempt, error = %error, "the object store fails; the log waits");
                    }
                }
            }
            if self.queue.is_closed() {
                return Err(entry.store_error(closed()));
            }
            backoff.wait().await;
        }
    }

    /// Waits until everything that was appended so far is stored. Returns the durable offset.
    pub(super) async fn store_all(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<u64, LogError> {
        let (target, before) = {
            let mut state = entry.lock();
            state.flush_to = state.flush_to.max(state.end);
            (state.end, state.failures())
        };
        loop {
            let notified = entry.stored.notified();
            self.kick(entry);
            {
                let state = entry.lock();
                if state.durable >= target {
                    return Ok(state.durable);
                }
                if matches!(state.phase, Phase::Deleted) {
                    return Err(entry.sealed_error());
                }
                if let Some(error) = state.failed_since(before) {
                    return Err(entry.store_error(error));
                }
                if self.queue.is_closed() {
                    return Err(entry.store_error(closed()));
                }
            }
            notified.await;
        }
    }
}

/// Looks at each log with something in memory about once per flush delay.
async fn flush_loop(inner: &Weak<Inner>, queue: &Queue) {
    loop {
        let changed = queue.changed.notified();
        let (closed, pressed, due) = {
            let mut state = queue.lock();
            (state.closed, std::mem::take(&mut state.pressed), state.logs.front().map(|(due, _)| *due))
        };
        let Some(inner) = inner.upgrade().filter(|_| !closed) else { return };
        let now = inner.clock.monotonic();
        let wait = match due {
            None => {
                drop(inner);
                changed.await;
                continue;
            }
            Some(due) => due.saturating_sub(now),
        };
        if !pressed && !wait.is_zero() {
            drop(inner);
            let wait = wait.max(Duration::from_millis(1));
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = changed => {}
            }
            continue;
        }
        // Only what was there at the beginning: a log that is put back has its turn later.
        let mut turns = queue.lock().logs.len();
        while turns > 0 {
            turns -= 1;
            let entry = {
                let mut state = queue.lock();
                match state.logs.front() {
                    Some((due, _)) if pressed || *due <= now => {}
                    _ => break,
                }
                state.logs.pop_front().and_then(|(_, entry)| entry.upgrade())
            };
            if let Some(entry) = entry {
                inner.look_at(&entry, now, pressed);
            }
            if turns % 256 == 255 {
                tokio::task::yield_now().await;
            }
        }
        if pressed {
            // Those who wait for memory press again and again; once in a while is enough.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Inner {
    fn look_at(self: &Arc<Self>, entry: &Arc<Entry>, now: Duration, pressed: bool) {
        let again = {
            let mut state = entry.lock();
            let old = now.saturating_sub(state.oldest_pending) >= self.options.flush_after / 2;
            if state.pending_cost > 0 && (old || pressed) {
                state.flush_to = state.end;
            }
            let over = matches!(state.phase, Phase::Sealed(_));
            if over || now.saturating_sub(state.last_append) >= IDLE {
                state.trim(0);
            }
            state.queued = state.holds_frames();
            state.queued
        };
        if again {
            self.enqueue(entry);
        }
        self.kick(entry);
    }
}

/// Stores one log's segments, in order, until there is nothing to store.
struct StoreJob {
    inner: Arc<Inner>,
    entry: Arc<Entry>,
    /// It has said that it is done; another may be at it already.
    done: bool,
}

impl Drop for StoreJob {
    /// Also where the task panicked: the next to ask starts another.
    fn drop(&mut self) {
        if !self.done {
            self.entry.lock().storing = false;
        }
        self.entry.stored.notify_waiters();
    }
}

impl StoreJob {
    async fn run(&mut self) {
        let mut backoff = Backoff::new();
        let mut warned = false;
        loop {
            let (frames, last) = {
                let mut state = self.entry.lock();
                if self.inner.queue.is_closed() || !self.inner.wants_storing(&state) {
                    // Within the lock, so that nobody who asks from now on believes that this task will do it.
                    state.storing = false;
                    self.done = true;
                    return;
                }
                (state.pending(self.inner.options.segment_bytes), state.segments.last().copied())
            };
            let permit = self.inner.stores.acquire().await;
            let result = self.store(&frames, last).await;
            drop(permit);
            match result {
                Ok(()) => {
                    backoff = Backoff::new();
                    warned = false;
                }
                Err(error) => {
                    if !warned {
                        warned = true;
                        tracing::warn!(attempt = %self.entry.attempt, error = %error, "storing a log segment failed; it is tried again");
                    }
                    if !error.kind.retryable() {
                        self.entry.lock().fail(&error);
                        self.entry.stored.notify_waiters();
                    }
                    let hurry = self.entry.hurry.notified();
                    tokio::select! {
                        () = backoff.wait() => {}
                        () = hurry => {}
                    }
                }
            }
        }
    }

    /// Stores one segment. `last` is the one before it.
    async fn store(&self, frames: &[Frame], last: Option<Segment>) -> Result<(), ArtifactError> {
        let (Some(head), Some(tail)) = (frames.first(), frames.last()) else { return Ok(()) };
        let mut bytes = encode(frames);
        let mut segment = Segment { first: head.offset, end: tail.end(), size: bytes.len() as u64 };
        let mut replaced = None;
        if let Some(last) = last
            && last.size + segment.size <= MERGE_BYTES
            && let Some(before) = self.read_back(last).await
        {
            bytes = [&before[..], &bytes[..]].concat();
            segment = Segment { first: last.first, end: segment.end, size: bytes.len() as u64 };
            replaced = Some(last);
        }
        let key = self.inner.key(&self.entry, &segment.name())?;
        self.inner.artifacts.put_bytes(&key, bytes.into()).await?;
        crash::point("log.segment-stored");
        {
            let mut state = self.entry.lock();
            if replaced.is_some() {
                state.segments.pop();
            }
            state.segments.push(segment);
            state.stored_to(segment.end, self.inner.options.window_bytes, self.inner.clock.monotonic());
        }
        self.entry.stored.notify_waiters();
        if let Some(replaced) = replaced {
            // Harmless where it stays: the longer one covers it, and the seal or the next opening removes it.
            let key = self.inner.key(&self.entry, &replaced.name())?;
            if let Err(error) = self.inner.artifacts.delete(&key).await {
                tracing::debug!(attempt = %self.entry.attempt, error = %error, "a merged segment stays for now");
                self.entry.lock().leave(replaced);
            }
        }
        Ok(())
    }

    /// A small segment's bytes, if they are what they must be.
    async fn read_back(&self, segment: Segment) -> Option<Bytes> {
        let key = self.inner.key(&self.entry, &segment.name()).ok()?;
        let bytes = read_small(&*self.inner.artifacts, &key, MERGE_BYTES).await.ok()?;
        let mut rest = bytes.clone();
        let mut first = None;
        let mut next = segment.first;
        while let Some(frame) = codec::decode(&mut rest).ok()? {
            first.get_or_insert(frame.offset);
            if frame.offset != next {
                return None;
            }
            next = frame.end();
        }
        (rest.is_empty() && first == Some(segment.first) && next == segment.end).then_some(bytes)
    }
}
