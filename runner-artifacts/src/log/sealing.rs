//! Ends a log: few frames go into the seal object itself, many are joined into one object first.
//!
//! The seal object is written when everything that it names is stored, and what it makes superfluous is removed after
//! that. So a crash leaves an open log, or a sealed one with some segments beside it, and nothing else.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use runner_core::{
    artifact::{ArtifactError, ArtifactErrorKind, ByteStream},
    crash,
    id::{AttemptId, TenantId},
    log::{Frame, FrameBatch, FrameBody, LogError, LogSummary, codec},
};

use super::{
    Inner,
    cursor::{Cursor, ReadFault},
    entry::{Entry, Phase, encode, segment_at},
    layout::{Body, FULL, Index, Indexer, SEAL, Sealed, Segment},
    storing::{Backoff, closed},
};

/// Stored segments that sum up to no more are stored again within the seal object.
const INLINE_BYTES: u64 = 256 * 1024;
/// Size of the pieces in which segments are joined.
const JOIN_CHUNK: usize = 512 * 1024;

impl Inner {
    pub(super) async fn seal(
        self: &Arc<Self>,
        tenant: &TenantId,
        attempt: AttemptId,
    ) -> Result<LogSummary, LogError> {
        loop {
            let user = self.attach(tenant, attempt);
            let entry = user.entry();
            let _gate = entry.gate.lock().await;
            let phase = entry.lock().phase.clone();
            match phase {
                Phase::Sealed(sealed) => return Ok(sealed.summary),
                // Removed meanwhile; the next look finds a new entry.
                Phase::Deleted => continue,
                Phase::Unopened => {
                    if let Some(sealed) = self.open_entry(entry).await? {
                        return Ok(sealed.summary);
                    }
                }
                Phase::Open | Phase::Sealing => {}
            }
            return self.seal_open(entry).await;
        }
    }

    async fn seal_open(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<LogSummary, LogError> {
        entry.lock().phase = Phase::Sealing;
        entry.wake_all();
        self.wait_until_idle(entry).await;
        let (pending, stored, count, fits) = {
            let state = entry.lock();
            let stored: u64 = state.segments.iter().map(|segment| segment.size).sum();
            let fits = if state.segments.is_empty() {
                state.pending_cost <= self.options.segment_bytes
            } else {
                stored + state.pending_cost as u64 <= INLINE_BYTES
            };
            (state.pending_cost > 0, stored, state.segments.len(), fits)
        };
        let mut sealed = if !pending && count == 1 {
            self.keep_segment(entry, stored).await?
        } else if fits {
            self.put_inline(entry).await?
        } else {
            if pending {
                self.store_all(entry).await?;
                self.wait_until_idle(entry).await;
            }
            self.join(entry).await?
        };
        if !matches!(sealed.body, Body::Inline { .. }) {
            let bytes = sealed.encode(&[]);
            self.put_seal(entry, bytes).await?;
        }
        crash::point("log.sealed");
        let summary = sealed.summary;
        let kept = match &sealed.body {
            Body::Object { name, .. } => Some(name.clone()),
            Body::Inline { .. } => None,
        };
        let superfluous = {
            let mut state = entry.lock();
            state.stored_to(summary.end, self.options.window_bytes, self.clock.monotonic());
            state.phase = Phase::Sealed(Arc::new(sealed));
            let mut names: Vec<_> = std::mem::take(&mut state.segments).iter().map(Segment::name).collect();
            names.extend(std::mem::take(&mut state.leftovers).iter().map(Segment::name));
            names
        };
        self.forget(entry);
        entry.wake_all();
        self.remove(entry, superfluous.into_iter().filter(|name| kept.as_ref() != Some(name))).await;
        Ok(summary)
    }

    /// Waits until no task stores segments of it.
    pub(super) async fn wait_until_idle(&self, entry: &Entry) {
        loop {
            let notified = entry.stored.notified();
            if !entry.lock().storing {
                return;
            }
            entry.hurry.notify_waiters();
            notified.await;
        }
    }

    async fn put_seal(&self, entry: &Entry, bytes: Bytes) -> Result<(), LogError> {
        let key = self.key(entry, SEAL).map_err(|error| entry.store_error(error))?;
        self.persist(entry, || self.artifacts.put_bytes(&key, bytes.clone())).await
    }

    /// The only segment stays as it is.
    async fn keep_segment(self: &Arc<Self>, entry: &Arc<Entry>, size: u64) -> Result<Sealed, LogError> {
        let (segments, end, dropped) = {
            let state = entry.lock();
            (state.segments.clone(), state.end, state.dropped)
        };
        let dropped = match dropped {
            Some(dropped) => dropped,
            None => {
                let mut sum = 0u64;
                let mut walk = Walk::new(self.clone(), entry.clone(), segments.clone());
                while let Some(frames) = walk.next().await? {
                    sum = sum.saturating_add(dropped_in(&frames));
                }
                sum
            }
        };
        let name = segments.first().map(Segment::name).unwrap_or_default();
        Ok(Sealed {
            summary: LogSummary { end, dropped },
            body: Body::Object { name, size },
            index: Index::default(),
            base: 0,
        })
    }

    /// Everything goes into the seal object; one write where nothing was stored before.
    async fn put_inline(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<Sealed, LogError> {
        let (segments, pending, end) = {
            let state = entry.lock();
            (state.segments.clone(), state.pending(usize::MAX), state.end)
        };
        let mut frames = Vec::new();
        let mut walk = Walk::new(self.clone(), entry.clone(), segments);
        while let Some(batch) = walk.next().await? {
            frames.extend(batch);
        }
        frames.extend(pending);
        let body = encode(&frames);
        let mut sealed = Sealed {
            summary: LogSummary { end, dropped: dropped_in(&frames) },
            body: Body::Inline { size: body.len() as u64 },
            index: Index::default(),
            base: 0,
        };
        if end == 0 && !self.options.store_empty {
            self.empties().add(entry.attempt);
            return Ok(sealed);
        }
        let _permit = self.stores.acquire().await;
        let bytes = sealed.encode(&body);
        drop((frames, body));
        self.put_seal(entry, bytes).await?;
        Ok(sealed)
    }

    /// Joins all segments into one object, with an index.
    async fn join(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<Sealed, LogError> {
        let (segments, end) = {
            let state = entry.lock();
            (state.segments.clone(), state.end)
        };
        let key = self.key(entry, FULL).map_err(|error| entry.store_error(error))?;
        let joined = Arc::new(Mutex::new(Joined::new(self.options.index_stride)));
        let result = self
            .persist(entry, || {
                *lock(&joined) = Joined::new(self.options.index_stride);
                let walk = Walk::new(self.clone(), entry.clone(), segments.clone());
                let (joined, key) = (joined.clone(), &key);
                async move {
                    let result = self.artifacts.put(key, join_stream(walk, joined.clone())).await;
                    match &lock(&joined).fault {
                        // Whatever the store made of it: to try again would not help.
                        Some(fault) => Err(ArtifactError::new(ArtifactErrorKind::Other, fault.to_string())),
                        None => result,
                    }
                }
            })
            .await;
        let joined = std::mem::replace(&mut *lock(&joined), Joined::new(1));
        if let Some(fault) = joined.fault {
            return Err(fault);
        }
        let size = result?;
        if size != joined.position {
            return Err(entry.corrupt(format!("{key}: {size} bytes were stored of {}", joined.position)));
        }
        Ok(Sealed {
            summary: LogSummary { end, dropped: joined.dropped },
            body: Body::Object { name: FULL.to_owned(), size },
            index: joined.indexer.finish(),
            base: 0,
        })
    }

    /// Removes objects that are not needed any more. What cannot be removed goes with the run.
    pub(super) async fn remove(&self, entry: &Entry, names: impl Iterator<Item = String>) {
        stream::iter(names)
            .for_each_concurrent(8, |name| async move {
                let removed = match self.key(entry, &name) {
                    Ok(key) => self.artifacts.delete(&key).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = removed {
                    tracing::warn!(attempt = %entry.attempt, object = name, error = %error, "a superfluous log object stays");
                }
            })
            .await;
    }
}

fn dropped_in(frames: &[Frame]) -> u64 {
    frames.iter().fold(0, |sum, frame| match &frame.body {
        FrameBody::Data { .. } => sum,
        FrameBody::Truncated { dropped, .. } => sum.saturating_add(*dropped),
    })
}

/// What is known of a join while its bytes flow.
#[derive(Debug)]
struct Joined {
    indexer: Indexer,
    position: u64,
    dropped: u64,
    fault: Option<LogError>,
}

impl Joined {
    fn new(stride: u64) -> Self {
        Self { indexer: Indexer::new(stride), position: 0, dropped: 0, fault: None }
    }
}

fn lock(joined: &Mutex<Joined>) -> MutexGuard<'_, Joined> {
    joined.lock().unwrap_or_else(PoisonError::into_inner)
}

fn join_stream(walk: Walk, joined: Arc<Mutex<Joined>>) -> ByteStream {
    stream::unfold(Some((walk, joined)), |state| async move {
        let (mut walk, joined) = state?;
        match walk.next().await {
            Ok(None) => None,
            Ok(Some(frames)) => {
                let mut bytes = Vec::with_capacity(JOIN_CHUNK + codec::MAX_PAYLOAD);
                {
                    let mut joined = lock(&joined);
                    let start = joined.position;
                    for frame in &frames {
                        joined.indexer.note(frame.offset, start + bytes.len() as u64);
                        codec::encode(frame, &mut bytes);
                    }
                    joined.position = start + bytes.len() as u64;
                    joined.dropped = joined.dropped.saturating_add(dropped_in(&frames));
                }
                Some((Ok(Bytes::from(bytes)), Some((walk, joined))))
            }
            Err(fault) => {
                let error = ArtifactError::new(ArtifactErrorKind::Other, fault.to_string());
                lock(&joined).fault = Some(fault);
                Some((Err(error), None))
            }
        }
    })
    .boxed()
}

/// Goes through stored segments from the beginning, and tries again where the store fails in a way that may pass.
struct Walk {
    inner: Arc<Inner>,
    entry: Arc<Entry>,
    segments: Vec<Segment>,
    cursor: Option<Cursor>,
    next: u64,
    backoff: Backoff,
}

impl Walk {
    fn new(inner: Arc<Inner>, entry: Arc<Entry>, segments: Vec<Segment>) -> Self {
        Self { inner, entry, segments, cursor: None, next: 0, backoff: Backoff::new() }
    }

    async fn next(&mut self) -> Result<Option<FrameBatch>, LogError> {
        loop {
            match self.step().await {
                Ok(Step::Frames(frames)) => {
                    self.next = frames.last().map_or(self.next, Frame::end);
                    self.backoff = Backoff::new();
                    return Ok(Some(frames));
                }
                Ok(Step::Again) => {}
                Ok(Step::End) => return Ok(None),
                Err(ReadFault::Missing(key)) => return Err(self.entry.corrupt(format!("{key} is gone"))),
                Err(ReadFault::Corrupt(detail)) => return Err(self.entry.corrupt(detail)),
                Err(ReadFault::Store(error)) if !error.kind.retryable() => {
                    return Err(self.entry.store_error(error));
                }
                Err(ReadFault::Store(_)) if self.inner.queue.is_closed() => {
                    return Err(self.entry.store_error(closed()));
                }
                Err(ReadFault::Store(_)) => {
                    self.cursor = None;
                    self.backoff.wait().await;
                }
            }
        }
    }

    async fn step(&mut self) -> Result<Step, ReadFault> {
        if let Some(cursor) = &mut self.cursor {
            return Ok(match cursor.next(self.next, JOIN_CHUNK).await? {
                Some(frames) => Step::Frames(frames),
                None => {
                    self.cursor = None;
                    Step::Again
                }
            });
        }
        let Some(segment) = segment_at(&self.segments, self.next) else { return Ok(Step::End) };
        let key = self.inner.key(&self.entry, &segment.name())?;
        let cursor =
            Cursor::open(&*self.inner.artifacts, key, 0..segment.size, segment.first, segment.end).await?;
        self.cursor = Some(cursor);
        Ok(Step::Again)
    }
}

enum Step {
    Frames(FrameBatch),
    Again,
    End,
}
