//! What a watcher sees of a run: stored events and log frames as one sequence, from a cursor to the terminal event.
//!
//! A watcher is a pair of positions, in the events and in the log of the current attempt. It pulls: nothing is queued for
//! it, so that a slow one costs what it holds at the moment and nothing more.

use std::{collections::VecDeque, fmt, str::FromStr, sync::Arc, time::Duration};

use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use tokio::sync::watch;

use super::{Core, ServiceError, live::LiveRun};
use crate::{
    backend::Progress,
    clock::Timestamp,
    id::{AttemptId, RunId, TenantId},
    log::{Frame, FrameBatch, LogError},
    state::RunState,
    store::{RunEvent, RunRecord, StoredEvent},
};

/// Most events that are read from the store at once.
const EVENT_PAGE: usize = 256;
/// How often a live run that another process drives is looked at.
const FOREIGN_POLL: Duration = Duration::from_millis(500);

/// Where a watcher is: resuming from the cursor of an item yields what comes after it, without a gap or a repeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamCursor {
    /// Number of the last event that was seen.
    pub event: u64,
    /// The attempt whose log is being read; 0 where none is.
    pub attempt: u32,
    /// Offset of the next byte of that log.
    pub log_offset: u64,
}

impl fmt::Display for StreamCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.event, self.attempt, self.log_offset)
    }
}

/// A cursor that this service did not make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a cursor of this service")]
pub struct InvalidCursor;

impl FromStr for StreamCursor {
    type Err = InvalidCursor;

    fn from_str(s: &str) -> Result<Self, InvalidCursor> {
        let mut parts = s.split('.');
        let mut number = || parts.next().ok_or(InvalidCursor);
        let cursor = Self {
            event: number()?.parse().map_err(|_| InvalidCursor)?,
            attempt: number()?.parse().map_err(|_| InvalidCursor)?,
            log_offset: number()?.parse().map_err(|_| InvalidCursor)?,
        };
        if parts.next().is_some() || cursor.to_string() != s { Err(InvalidCursor) } else { Ok(cursor) }
    }
}

/// How to watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamOptions {
    /// Go on until the terminal event; else end after what is known now.
    pub follow: bool,
    /// Include log frames.
    pub logs: bool,
}

/// Something that a watcher sees.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamItem {
    /// Where the watcher is after it.
    pub cursor: StreamCursor,
    /// When it happened.
    pub time: Timestamp,
    /// What.
    pub body: StreamBody,
}

/// See [`StreamItem`].
#[derive(Debug, Clone, PartialEq)]
pub enum StreamBody {
    /// A stored event.
    Event(RunEvent),
    /// A stretch of an attempt's log.
    Log {
        /// Whose.
        attempt: u32,
        /// What.
        frame: Frame,
    },
    /// How far staging is. Live only, never replayed.
    Progress(Progress),
    /// Nothing happened for a while.
    KeepAlive,
}

/// Opens a stream on a run that the caller may see.
pub(super) fn open(
    core: Arc<Core>,
    live: Option<Arc<LiveRun>>,
    record: &RunRecord,
    from: StreamCursor,
    options: StreamOptions,
) -> Result<BoxStream<'static, Result<StreamItem, ServiceError>>, ServiceError> {
    if from.event > record.last_event || from.attempt > record.position.attempt {
        return Err(ServiceError::field("cursor", "INVALID", "the cursor is not one of this run"));
    }
    core.parts.meter.watchers(1);
    let mut watcher = Watcher {
        woken: None,
        live: None,
        heard: core.parts.clock.monotonic(),
        run: record.id,
        tenant: record.tenant.clone(),
        cursor: from,
        options,
        events: VecDeque::new(),
        frames: VecDeque::new(),
        log: None,
        log_dry: false,
        // A watcher that has seen the terminal event has seen everything.
        done: record.position.state.is_terminal() && from.event == record.last_event,
        core,
    };
    watcher.join(live);
    Ok(stream::unfold(watcher, |mut watcher| async move {
        let item = watcher.next().await?;
        if item.is_err() {
            watcher.done = true;
        }
        Some((item, watcher))
    })
    .boxed())
}

struct Woken {
    events: watch::Receiver<u64>,
    progress: watch::Receiver<Option<Progress>>,
}

struct Watcher {
    core: Arc<Core>,
    live: Option<Arc<LiveRun>>,
    woken: Option<Woken>,
    run: RunId,
    tenant: TenantId,
    cursor: StreamCursor,
    options: StreamOptions,
    events: VecDeque<StoredEvent>,
    frames: VecDeque<Frame>,
    log: Option<BoxStream<'static, Result<FrameBatch, LogError>>>,
    /// The log of the cursor's attempt has nothing more to give now (not following), or ever (following).
    log_dry: bool,
    done: bool,
    /// Monotonic time of the last item.
    heard: Duration,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.core.parts.meter.watchers(-1);
    }
}

/// What woke a watcher.
enum Wake {
    Frames(Option<Result<FrameBatch, LogError>>),
    Events,
    Progress,
    Silence,
    Stopping,
}

impl Watcher {
    async fn next(&mut self) -> Option<Result<StreamItem, ServiceError>> {
        loop {
            if self.done {
                return None;
            }
            if let Some(frame) = self.frames.pop_front() {
                return Some(Ok(self.frame(frame)));
            }
            if self.events.is_empty()
                && let Err(error) = self.read_events().await
            {
                return Some(Err(error));
            }
            if let Some(event) = self.events.front() {
                // An event that follows the end of an attempt's log waits until the log was read.
                if closes_log(&event.event) && self.reading_log() {
                    // It is sealed by now: there is nothing to follow.
                    match self.open_log(false).next().await {
                        Some(Ok(frames)) => self.frames.extend(frames),
                        Some(Err(error)) => return Some(Err(error.into())),
                        None => self.log_dry = true,
                    }
                    continue;
                }
                let event = self.events.pop_front()?;
                return Some(Ok(self.event(event)));
            }
            if !self.options.follow {
                if !self.reading_log() {
                    return None;
                }
                match self.open_log(false).next().await {
                    Some(Ok(frames)) => self.frames.extend(frames),
                    Some(Err(error)) => return Some(Err(error.into())),
                    None => self.log_dry = true,
                }
                continue;
            }
            match self.wake().await {
                Wake::Frames(Some(Ok(frames))) => self.frames.extend(frames),
                Wake::Frames(Some(Err(error))) => return Some(Err(error.into())),
                Wake::Frames(None) => self.log_dry = true,
                Wake::Events => {}
                Wake::Progress => {
                    let progress = self.woken.as_mut().and_then(|woken| *woken.progress.borrow_and_update());
                    if let Some(progress) = progress {
                        return Some(Ok(
                            self.item(StreamBody::Progress(progress), self.core.parts.clock.now())
                        ));
                    }
                }
                Wake::Silence => {
                    // The run may have got a driver here since, or another one.
                    let live = self.core.live.get(self.run);
                    if live.as_ref().map(Arc::as_ptr) != self.live.as_ref().map(Arc::as_ptr) {
                        self.join(live);
                    }
                    let silence = self.core.parts.clock.monotonic().saturating_sub(self.heard);
                    if silence >= self.core.parts.options.keep_alive {
                        let now = self.core.parts.clock.now();
                        return Some(Ok(self.item(StreamBody::KeepAlive, now)));
                    }
                }
                Wake::Stopping => {
                    return Some(Err(ServiceError::Unavailable(
                        "the service is shutting down; resume".to_owned(),
                    )));
                }
            }
        }
    }

    /// Waits until there may be something new.
    async fn wake(&mut self) -> Wake {
        if self.reading_log() {
            self.open_log(true);
        }
        let log = self.log.as_mut().filter(|_| !self.log_dry);
        let frames = async {
            match log {
                Some(log) => log.next().await,
                None => std::future::pending().await,
            }
        };
        let keep_alive = self.core.parts.options.keep_alive;
        let poll = if self.woken.is_some() { keep_alive } else { FOREIGN_POLL.min(keep_alive) };
        let woken = self.woken.as_mut();
        let changed = async {
            match woken {
                // The senders live as long as `self.live`, so that there is no error to handle.
                Some(woken) => tokio::select! {
                    _ = woken.events.changed() => Wake::Events,
                    _ = woken.progress.changed() => Wake::Progress,
                },
                None => std::future::pending().await,
            }
        };
        let stopping = self.core.stopping.clone();
        tokio::select! {
            biased;
            frames = frames => Wake::Frames(frames),
            wake = changed => wake,
            () = stopping.cancelled() => Wake::Stopping,
            () = tokio::time::sleep(poll) => Wake::Silence,
        }
    }

    /// Watches the run's driver in this process, if it has one.
    fn join(&mut self, live: Option<Arc<LiveRun>>) {
        self.woken =
            live.as_ref().map(|live| Woken { events: live.watch_events(), progress: live.watch_progress() });
        self.live = live;
    }

    async fn read_events(&mut self) -> Result<(), ServiceError> {
        if let Some(woken) = &mut self.woken {
            // Before the read: what comes after it wakes.
            woken.events.borrow_and_update();
        }
        if let Some(cached) = self.live.as_ref().and_then(|live| live.cached_after(self.cursor.event)) {
            self.events = cached.into();
            return Ok(());
        }
        self.events = self.core.parts.store.events(self.run, self.cursor.event, EVENT_PAGE).await?.into();
        Ok(())
    }

    /// Whether the log of the cursor's attempt may have more.
    fn reading_log(&self) -> bool {
        self.options.logs && self.cursor.attempt > 0 && !self.log_dry
    }

    /// The stream of the cursor's attempt's log, opened at the cursor if it is not open.
    fn open_log(&mut self, follow: bool) -> &mut BoxStream<'static, Result<FrameBatch, LogError>> {
        let cursor = self.cursor;
        self.log.get_or_insert_with(|| {
            let attempt = AttemptId { run: self.run, number: cursor.attempt };
            self.core.parts.logs.read(&self.tenant, attempt, cursor.log_offset, follow)
        })
    }

    fn item(&mut self, body: StreamBody, time: Timestamp) -> StreamItem {
        self.heard = self.core.parts.clock.monotonic();
        StreamItem { cursor: self.cursor, time, body }
    }

    fn frame(&mut self, frame: Frame) -> StreamItem {
        self.cursor.log_offset = frame.end();
        let (attempt, time) = (self.cursor.attempt, frame.time);
        self.item(StreamBody::Log { attempt, frame }, time)
    }

    fn event(&mut self, stored: StoredEvent) -> StreamItem {
        self.cursor.event = stored.seq;
        if closes_log(&stored.event) {
            (self.cursor.attempt, self.cursor.log_offset) = (0, 0);
            (self.log, self.log_dry) = (None, false);
        }
        match &stored.event {
            RunEvent::StateChanged { position, .. } if position.state == RunState::Preparing => {
                (self.cursor.attempt, self.cursor.log_offset) = (position.attempt, 0);
                (self.log, self.log_dry) = (None, false);
            }
            RunEvent::Terminated { .. } => self.done = true,
            RunEvent::StateChanged { .. } | RunEvent::Outputs(_) | RunEvent::Notice(_) => {}
        }
        self.item(StreamBody::Event(stored.event), stored.time)
    }
}

/// Whether the log of the attempt before this event was sealed before the event was stored, so that all of it comes first.
fn closes_log(event: &RunEvent) -> bool {
    match event {
        RunEvent::StateChanged { position, .. } => match position.state {
            RunState::Publishing | RunState::Queued => position.attempt > 0,
            RunState::Preparing
            | RunState::Running
            | RunState::Succeeded
            | RunState::Failed
            | RunState::Cancelled => false,
        },
        RunEvent::Terminated { .. } => true,
        RunEvent::Outputs(_) | RunEvent::Notice(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_reads_back_what_it_prints() {
        let cursor = StreamCursor { event: 3, attempt: 2, log_offset: u64::MAX };
        assert_eq!(cursor.to_string().parse(), Ok(cursor));
    }

    #[test]
    fn what_is_not_a_cursor_is_refused() {
        for bad in
            ["", "1", "1.2", "1.2.3.4", "01.2.3", "+1.2.3", "1.2.-3", "a.b.c", "1.2.18446744073709551616"]
        {
            assert_eq!(bad.parse::<StreamCursor>(), Err(InvalidCursor), "{bad}");
        }
    }
}
