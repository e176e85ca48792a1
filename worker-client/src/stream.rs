//! A run's events, across broken connections.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use futures::{
    Stream, StreamExt as _,
    stream::{self, BoxStream},
};
use runner_proto::v1::{self as proto, stream_response::Event as Wire};

use crate::{
    client::Client,
    clock::Stopwatch,
    convert,
    error::{ClientError, ErrorKind},
    retry::Tries,
};

const DOING: &str = "follow the run";
/// A connection that held this long was a good one, even if nothing happened in the run meanwhile.
const GOOD_CONNECTION: Duration = Duration::from_secs(10);

/// From where and how far a run is followed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StreamOptions {
    cursor: String,
    no_follow: bool,
    no_logs: bool,
}

impl StreamOptions {
    /// Goes on behind the event that had this cursor. Empty: from the beginning.
    #[must_use]
    pub fn from_cursor(mut self, cursor: impl Into<String>) -> Self {
        self.cursor = cursor.into();
        self
    }

    /// Ends after what is known now, instead of following.
    #[must_use]
    pub fn without_following(mut self) -> Self {
        self.no_follow = true;
        self
    }

    /// Leaves log frames out.
    #[must_use]
    pub fn without_logs(mut self) -> Self {
        self.no_logs = true;
        self
    }
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamEvent {
    /// Opaque. [`StreamOptions::from_cursor`] goes on behind this event, with neither a gap nor a repeat.
    pub cursor: String,
    /// When it happened.
    pub time: Option<SystemTime>,
    /// What happened.
    pub event: Event,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The run came into another state.
    StateChanged(proto::StateChanged),
    /// Bytes that the program wrote, verbatim.
    Log(proto::LogFrame),
    /// Bytes were dropped here.
    LogTruncated(proto::LogTruncated),
    /// Inputs or outputs are being moved.
    Staging(proto::StagingProgress),
    /// The outputs are stored.
    Outputs(proto::Manifest),
    /// Something that a person may want to know.
    Notice(proto::Notice),
    /// The run ended. Always the last event.
    Terminated(proto::Terminated),
}

/// The events of one run. Ends after [`Event::Terminated`].
///
/// A broken connection, an early end and an unavailable service are not seen: the stream goes on from the last event
/// that it yielded. It fails when that does not succeed for long (see [`Builder::stream_retry`]), or when the service
/// refuses. After an error it ends.
///
/// [`Builder::stream_retry`]: crate::Builder::stream_retry
pub struct EventStream {
    inner: BoxStream<'static, Result<StreamEvent, ClientError>>,
}

impl EventStream {
    pub(crate) fn new(client: Client, run_id: String, options: StreamOptions) -> Self {
        let tries = Tries::new(client.stream_retry_policy());
        let request = proto::StreamRequest {
            run_id,
            cursor: options.cursor,
            no_follow: options.no_follow,
            no_logs: options.no_logs,
        };
        let follower = Follower {
            client,
            from_start: request.cursor.is_empty(),
            request,
            connection: None,
            tries,
            position: None,
            yielded: false,
            ended: false,
        };
        let inner = stream::unfold(follower, |mut follower| async move {
            follower.next().await.map(|event| (event, follower))
        });
        Self { inner: inner.boxed() }
    }

    /// The next event; `None` after the last. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<StreamEvent, ClientError>> {
        self.inner.next().await
    }
}

impl Stream for EventStream {
    type Item = Result<StreamEvent, ClientError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.inner.poll_next_unpin(cx)
    }
}

impl fmt::Debug for EventStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventStream").finish_non_exhaustive()
    }
}

struct Connection {
    messages: tonic::Streaming<proto::StreamResponse>,
    since: Stopwatch,
    /// A message came, be it a keep-alive.
    spoke: bool,
}

/// Where the log is: the attempt, and the offset of its next byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct LogPosition {
    attempt: u32,
    offset: u64,
}

struct Follower {
    client: Client,
    /// Its cursor is that of the last event that was yielded or may be skipped.
    request: proto::StreamRequest,
    /// The caller came without a cursor, so every log begins at zero.
    from_start: bool,
    connection: Option<Connection>,
    tries: Tries,
    position: Option<LogPosition>,
    yielded: bool,
    ended: bool,
}

impl Follower {
    async fn next(&mut self) -> Option<Result<StreamEvent, ClientError>> {
        while !self.ended {
            match self.step().await {
                Ok(Some(event)) => return Some(Ok(event)),
                Ok(None) => {}
                Err(error) => {
                    if let Some(connection) = self.connection.take()
                        && connection.since.elapsed() >= GOOD_CONNECTION
                    {
                        self.tries.progress();
                    }
                    let hopeless = !resumable(&error);
                    let verdict = if hopeless { Err(error) } else { self.tries.failed(error).await };
                    if let Err(error) = verdict {
                        self.ended = true;
                        return Some(Err(error));
                    }
                }
            }
        }
        None
    }

    /// Takes one message. `None`: it was nothing for the caller.
    async fn step(&mut self) -> Result<Option<StreamEvent>, ClientError> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            None => {
                let opened = self.open().await?;
                self.connection.insert(opened)
            }
        };
        let message = connection.messages.message().await.map_err(|e| ClientError::status(DOING, e))?;
        match message {
            Some(message) => {
                connection.spoke = true;
                self.take(message)
            }
            None if self.request.no_follow => {
                self.ended = true;
                Ok(None)
            }
            None => self.ended_early().await,
        }
    }

    async fn open(&self) -> Result<Connection, ClientError> {
        let mut grpc = self.client.runner();
        // Only until the answer begins: the stream itself may last.
        let opening = tokio::time::timeout(self.client.call_timeout(), grpc.stream(self.request.clone()));
        match opening.await {
            Ok(Ok(response)) => {
                Ok(Connection { messages: response.into_inner(), since: Stopwatch::start(), spoke: false })
            }
            Ok(Err(status)) => Err(ClientError::status(DOING, status)),
            Err(_) => {
                Err(ClientError::new(ErrorKind::DeadlineExceeded, DOING, "the stream did not begin in time"))
            }
        }
    }

    /// The service ended the stream properly, but before the terminal event.
    async fn ended_early(&mut self) -> Result<Option<StreamEvent>, ClientError> {
        let silent = self.connection.as_ref().is_some_and(|connection| !connection.spoke);
        if silent && !self.yielded && !self.request.cursor.is_empty() {
            // The caller may have come with the cursor of the terminal event: then there is nothing left.
            let run = self.client.get(self.request.run_id.as_str()).await?;
            if is_terminal(run.state()) {
                self.ended = true;
                return Ok(None);
            }
        }
        Err(ClientError::new(
            ErrorKind::Unavailable,
            DOING,
            "the service ended the stream before the run did",
        ))
    }

    fn take(&mut self, message: proto::StreamResponse) -> Result<Option<StreamEvent>, ClientError> {
        let time = message.time.as_ref().and_then(convert::time_from_proto);
        let event = match message.event {
            // An event of a later version of the contract, and one without content: nothing to hand on.
            None | Some(Wire::KeepAlive(_)) => {
                if !message.cursor.is_empty() {
                    self.request.cursor = message.cursor;
                }
                return Ok(None);
            }
            Some(Wire::Log(frame)) => match self.whole_log(frame)? {
                Some(frame) => Event::Log(frame),
                None => return Ok(None),
            },
            Some(Wire::LogTruncated(mark)) => match self.whole_mark(mark)? {
                Some(mark) => Event::LogTruncated(mark),
                None => return Ok(None),
            },
            // What is durable has a cursor of its own; the same one again is the same event again.
            Some(Wire::StateChanged(_) | Wire::Outputs(_))
                if !message.cursor.is_empty() && message.cursor == self.request.cursor =>
            {
                return Ok(None);
            }
            Some(Wire::StateChanged(change)) => Event::StateChanged(change),
            Some(Wire::Outputs(manifest)) => Event::Outputs(manifest),
            Some(Wire::Staging(progress)) => Event::Staging(progress),
            Some(Wire::Notice(notice)) => Event::Notice(notice),
            Some(Wire::Terminated(terminated)) => {
                self.ended = true;
                Event::Terminated(terminated)
            }
        };
        if !message.cursor.is_empty() && message.cursor != self.request.cursor {
            self.tries.progress();
            self.request.cursor.clone_from(&message.cursor);
        }
        self.yielded = true;
        Ok(Some(StreamEvent { cursor: message.cursor, time, event }))
    }

    /// The part of a frame that was not yielded yet.
    fn whole_log(&mut self, mut frame: proto::LogFrame) -> Result<Option<proto::LogFrame>, ClientError> {
        let end = frame.offset.saturating_add(frame.data.len() as u64);
        let Some(skip) = self.advance(frame.attempt, frame.offset, end)? else { return Ok(None) };
        // Below the length, which is a usize.
        frame.data = frame.data.slice(usize::try_from(skip).unwrap_or(usize::MAX)..);
        frame.offset += skip;
        Ok(Some(frame))
    }

    fn whole_mark(
        &mut self,
        mut mark: proto::LogTruncated,
    ) -> Result<Option<proto::LogTruncated>, ClientError> {
        let end = mark.offset.saturating_add(mark.dropped_bytes);
        let Some(skip) = self.advance(mark.attempt, mark.offset, end)? else { return Ok(None) };
        mark.dropped_bytes -= skip;
        mark.offset += skip;
        Ok(Some(mark))
    }

    /// Moves the position over `start..end`. Answers how much of it was there before; `None` where all was.
    fn advance(&mut self, attempt: u32, start: u64, end: u64) -> Result<Option<u64>, ClientError> {
        let expected = match self.position {
            Some(position) if position.attempt > attempt => return Ok(None),
            Some(position) if position.attempt == attempt => position.offset,
            // A later attempt begins at its beginning.
            Some(_) => 0,
            None if self.from_start => 0,
            // The cursor that the caller came with says where; it is opaque, so the first frame is believed.
            None => start,
        };
        if start > expected {
            let message =
                format!("a gap in the log of attempt {attempt}: bytes {expected} to {start} are missing");
            return Err(ClientError::new(ErrorKind::Protocol, DOING, message));
        }
        if end <= expected {
            return Ok(None);
        }
        self.position = Some(LogPosition { attempt, offset: end });
        Ok(Some(expected - start))
    }
}

/// Whether opening the stream again may help. Reading is harmless, so more is tried again than for other calls.
fn resumable(error: &ClientError) -> bool {
    match error.kind() {
        ErrorKind::Unreachable
        | ErrorKind::Unavailable
        | ErrorKind::DeadlineExceeded
        | ErrorKind::Exhausted
        | ErrorKind::Cancelled
        | ErrorKind::Internal
        | ErrorKind::Protocol => true,
        ErrorKind::Invalid
        | ErrorKind::NotFound
        | ErrorKind::AlreadyExists
        | ErrorKind::FailedPrecondition
        | ErrorKind::Unauthenticated
        | ErrorKind::PermissionDenied
        | ErrorKind::Unimplemented
        | ErrorKind::Integrity
        | ErrorKind::UnsafePath
        | ErrorKind::Io
        | ErrorKind::Unsupported => false,
    }
}

fn is_terminal(state: proto::RunState) -> bool {
    match state {
        proto::RunState::Succeeded | proto::RunState::Failed | proto::RunState::Cancelled => true,
        proto::RunState::Unspecified
        | proto::RunState::Queued
        | proto::RunState::Preparing
        | proto::RunState::Running
        | proto::RunState::Publishing => false,
    }
}
