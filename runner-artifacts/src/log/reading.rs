//! A reader: an offset, and at most one stored object that it is in the middle of.

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream, stream::BoxStream};
use runner_core::{
    artifact::{ArtifactError, ArtifactErrorKind, ArtifactKey},
    id::{AttemptId, TenantId},
    log::{Frame, FrameBatch, LogError},
};

use super::{
    Inner, User,
    cursor::{Cursor, ReadFault},
    entry::{Phase, segment_at},
    layout::{self, Body, SEAL, Sealed, Segment},
    storing::{Backoff, closed},
};

/// The first read of a seal object: whole where the log is small.
const SEAL_READ: u64 = 64 * 1024;
/// How often in a row a reader tries the object store.
const TRIES: u32 = 6;

/// What is stored of a log that is not open here.
pub(super) struct Listing {
    pub(super) sealed: bool,
    pub(super) segments: Vec<Segment>,
    /// `full.log` is there.
    pub(super) joined: bool,
}

impl Inner {
    /// Reads the seal, and the beginning of the object that it is in. `None`: there is none.
    pub(super) async fn load_seal(&self, prefix: &ArtifactKey) -> Result<Option<(Sealed, Bytes)>, ReadFault> {
        let key = below(prefix, SEAL)?;
        let mut wanted = SEAL_READ;
        loop {
            let (meta, bytes) = match self.artifacts.get(&key, 0..wanted).await {
                Ok(found) => found,
                Err(error) if error.kind == ArtifactErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(ReadFault::Store(error)),
            };
            let mut head = Vec::new();
            let mut bytes = bytes;
            while let Some(chunk) = bytes.try_next().await? {
                head.extend_from_slice(&chunk);
            }
            let corrupt = |detail: String| ReadFault::Corrupt(format!("{key}: {detail}"));
            match Sealed::header_end(&head).map_err(corrupt)? {
                Some(end) if head.len() < end && wanted < end as u64 => wanted = end as u64,
                _ => {
                    let sealed = Sealed::decode(&head, meta.size).map_err(corrupt)?;
                    return Ok(Some((sealed, head.into())));
                }
            }
        }
    }

    /// Looks at what is stored.
    pub(super) async fn list(&self, prefix: &ArtifactKey) -> Result<Listing, ArtifactError> {
        let mut listing = Listing { sealed: false, segments: Vec::new(), joined: false };
        let mut objects = self.artifacts.list(prefix);
        while let Some(object) = objects.try_next().await? {
            match object.key.as_str().strip_prefix(prefix.as_str()).and_then(|rest| rest.strip_prefix('/')) {
                Some(SEAL) => listing.sealed = true,
                Some(layout::FULL) => listing.joined = true,
                Some(name) => listing.segments.extend(Segment::parse(name, object.size)),
                None => {}
            }
        }
        Ok(listing)
    }

    pub(super) fn read(
        self: &Arc<Self>,
        tenant: &TenantId,
        attempt: AttemptId,
        offset: u64,
        follow: bool,
    ) -> BoxStream<'static, Result<FrameBatch, LogError>> {
        let reader = Reader {
            inner: self.clone(),
            tenant: tenant.clone(),
            attempt,
            next: offset,
            follow,
            stop: None,
            user: None,
            view: View::New,
            cursor: None,
            tries: 0,
            backoff: Backoff::new(),
        };
        stream::unfold(Some(Box::new(reader)), |reader| async move {
            let mut reader = reader?;
            match reader.next().await {
                Ok(None) => None,
                Ok(Some(batch)) => Some((Ok(batch), Some(reader))),
                Err(error) => Some((Err(error), None)),
            }
        })
        .boxed()
    }
}

/// The key of an object of the log below `prefix`.
pub(super) fn below(prefix: &ArtifactKey, name: &str) -> Result<ArtifactKey, ArtifactError> {
    prefix.join(name).map_err(|error| {
        ArtifactError::with_source(ArtifactErrorKind::Other, format!("name {name} below {prefix}"), error)
    })
}

struct Reader {
    inner: Arc<Inner>,
    tenant: TenantId,
    attempt: AttemptId,
    /// Offset of the next byte to yield.
    next: u64,
    follow: bool,
    /// Where a reader that does not follow ends.
    stop: Option<u64>,
    /// Holds the log's entry, so that it is the one that is opened or sealed.
    user: Option<User>,
    view: View,
    cursor: Option<Box<Cursor>>,
    tries: u32,
    backoff: Backoff,
}

/// Where a reader looks.
enum View {
    /// It has not looked.
    New,
    /// At the entry: the log is open here, or was when the reader came.
    Memory,
    /// At what was stored when it looked; nobody has the log open here.
    Stored(Vec<Segment>),
    /// At the sealed log, and the beginning of its seal object.
    Sealed(Arc<Sealed>, Bytes),
}

enum Step {
    Frames(FrameBatch),
    /// Read this object next: name, byte range, offset of the frame there, offset of the object's end.
    Object(String, std::ops::Range<u64>, u64, u64),
    Again,
    Wait,
    End,
}

impl Reader {
    async fn next(&mut self) -> Result<Option<FrameBatch>, LogError> {
        loop {
            match self.advance().await {
                Ok(Some(frames)) => {
                    self.tries = 0;
                    self.backoff = Backoff::new();
                    self.next = frames.last().map_or(self.next, Frame::end);
                    return Ok(Some(frames));
                }
                Ok(None) => return Ok(None),
                Err(fault) => self.recover(fault).await?,
            }
        }
    }

    /// Decides whether a fault may pass, and prepares another look.
    async fn recover(&mut self, fault: ReadFault) -> Result<(), LogError> {
        let attempt = self.attempt;
        self.cursor = None;
        self.tries += 1;
        let last = self.tries >= TRIES;
        match (fault, &self.view) {
            (ReadFault::Corrupt(detail), _) => return Err(LogError::Corrupt { attempt, detail }),
            (ReadFault::Missing(key), View::Sealed(..)) => {
                let source =
                    ArtifactError::new(ArtifactErrorKind::NotFound, format!("read {key}: it is gone"));
                return Err(LogError::Store { attempt, source });
            }
            (ReadFault::Missing(key), _) if last => {
                return Err(LogError::Corrupt { attempt, detail: format!("{key} is gone") });
            }
            // Joined or merged meanwhile: another object has it now.
            (ReadFault::Missing(_), View::Memory) => return Ok(()),
            (ReadFault::Missing(_), View::New | View::Stored(_)) => self.view = View::New,
            (ReadFault::Store(source), _) if last || !source.kind.retryable() => {
                return Err(LogError::Store { attempt, source });
            }
            (ReadFault::Store(_), _) => {}
        }
        self.backoff.wait().await;
        Ok(())
    }

    async fn advance(&mut self) -> Result<Option<FrameBatch>, ReadFault> {
        loop {
            if let Some(cursor) = &mut self.cursor {
                match cursor.next(self.next, self.inner.options.batch_bytes).await? {
                    Some(frames) => return Ok(Some(frames)),
                    None => self.cursor = None,
                }
                continue;
            }
            if self.stop.is_some_and(|stop| self.next >= stop) {
                return Ok(None);
            }
            if matches!(self.view, View::New) {
                self.look().await?;
            }
            let user = self.user.as_ref().map(|user| user.entry().clone());
            // Before the look at the state: what changes between the look and the wait is noticed.
            let grown = user.as_ref().map(|entry| entry.grown.notified());
            match self.step() {
                Step::Frames(frames) => return Ok(Some(frames)),
                Step::Object(name, range, frame, until) => {
                    self.cursor = Some(Box::new(self.open(&name, range, frame, until).await?));
                }
                Step::Again => {}
                Step::End => return Ok(None),
                Step::Wait => {
                    if self.inner.queue.is_closed() {
                        return Err(ReadFault::Store(closed()));
                    }
                    match grown {
                        Some(grown) => grown.await,
                        None => return Ok(None),
                    }
                }
            }
        }
    }

    // `&mut` although nothing changes: the cursor within is `Send`, not `Sync`.
    async fn open(
        &mut self,
        name: &str,
        range: std::ops::Range<u64>,
        frame: u64,
        until: u64,
    ) -> Result<Cursor, ReadFault> {
        let key = below(&self.inner.prefix(&self.tenant, self.attempt)?, name)?;
        if let View::Sealed(sealed, head) = &self.view
            && matches!(sealed.body, Body::Inline { .. })
            && range.end <= head.len() as u64
            && let (Ok(start), Ok(end)) = (usize::try_from(range.start), usize::try_from(range.end))
        {
            let bytes = head.slice(start..end);
            return Ok(Cursor::over(key, stream::iter([Ok(bytes)]).boxed(), frame, until));
        }
        Cursor::open(&*self.inner.artifacts, key, range, frame, until).await
    }

    /// Finds out where to look.
    async fn look(&mut self) -> Result<(), ReadFault> {
        let user = match self.user.take() {
            Some(user) => user,
            None => self.inner.attach(&self.tenant, self.attempt),
        };
        let open = !matches!(user.entry().lock().phase, Phase::Unopened);
        let entry_is_private = user.entry().clone();
        self.user = Some(user);
        if open {
            self.view = View::Memory;
            return Ok(());
        }
        if self.inner.empties().contains(self.attempt) {
            self.view = View::Stored(Vec::new());
            self.follow = false;
            return Ok(());
        }
        let prefix = self.inner.prefix(&self.tenant, self.attempt)?;
        if let Some((sealed, head)) = self.inner.load_seal(&prefix).await? {
            self.user = None;
            self.view = View::Sealed(Arc::new(sealed), head);
            return Ok(());
        }
        let listing = self.inner.list(&prefix).await?;
        if listing.sealed || !matches!(entry_is_private.lock().phase, Phase::Unopened) {
            // Sealed or opened between the two looks: another look sees which.
            return Ok(());
        }
        let (segments, _) = layout::cover(listing.segments)
            .map_err(|at| ReadFault::Corrupt(format!("{prefix}: no segment holds offset {at}")))?;
        self.view = View::Stored(segments);
        Ok(())
    }

    fn step(&mut self) -> Step {
        match &self.view {
            View::New => Step::Again,
            View::Sealed(sealed, _) => self.step_sealed(sealed),
            View::Stored(segments) => match segment_at(segments, self.next) {
                Some(segment) => Step::Object(segment.name(), 0..segment.size, segment.first, segment.end),
                None if !self.follow => Step::End,
                None => {
                    let unopened = self
                        .user
                        .as_ref()
                        .is_some_and(|user| matches!(user.entry().lock().phase, Phase::Unopened));
                    if unopened {
                        Step::Wait
                    } else {
                        self.view = View::Memory;
                        Step::Again
                    }
                }
            },
            View::Memory => self.step_memory(),
        }
    }

    fn step_sealed(&self, sealed: &Sealed) -> Step {
        if self.next >= sealed.summary.end {
            return Step::End;
        }
        let (name, range, frame) = sealed.locate(self.next);
        Step::Object(name.to_owned(), range, frame, sealed.summary.end)
    }

    fn step_memory(&mut self) -> Step {
        let Some(user) = &self.user else { return Step::End };
        let state = user.entry().lock();
        if let Some(frames) = state.read(self.next, self.inner.options.batch_bytes) {
            if !self.follow && self.stop.is_none() {
                self.stop = Some(state.end);
            }
            return Step::Frames(frames);
        }
        match &state.phase {
            Phase::Deleted => Step::End,
            Phase::Sealed(sealed) => self.step_sealed(sealed),
            Phase::Unopened | Phase::Open | Phase::Sealing => match state.segment_at(self.next) {
                Some(segment) => {
                    if !self.follow && self.stop.is_none() {
                        self.stop = Some(state.end);
                    }
                    Step::Object(segment.name(), 0..segment.size, segment.first, segment.end)
                }
                None if self.follow => Step::Wait,
                None => Step::End,
            },
        }
    }
}
