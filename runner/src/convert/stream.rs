//! What a watcher is sent.

use bytes::Bytes;
use runner_core::{
    backend::{Direction, Progress},
    log::{Frame, FrameBody, LogStream},
    service::{StreamBody, StreamCursor, StreamItem},
    store::RunEvent,
};
use runner_proto::v1::{self, stream_response::Event};

use super::{Wire, state, timestamp};

/// Most log bytes of one message. What a stalled reader costs is a few of these.
pub const LOG_CHUNK: usize = 32 * 1024;

/// The messages of one item: one, but for a long log frame. Made as they are asked for; log bytes are shared.
#[derive(Debug)]
pub struct Messages {
    item: Option<StreamItem>,
}

impl From<StreamItem> for Messages {
    fn from(item: StreamItem) -> Self {
        Self { item: Some(item) }
    }
}

impl Iterator for Messages {
    type Item = v1::StreamResponse;

    fn next(&mut self) -> Option<v1::StreamResponse> {
        let mut item = self.item.take()?;
        if let StreamBody::Log { attempt, frame } = &mut item.body
            && let FrameBody::Data { stream, bytes } = &mut frame.body
            && bytes.len() > LOG_CHUNK
        {
            let head: Bytes = bytes.split_to(LOG_CHUNK);
            let offset = frame.offset;
            frame.offset += head.len() as u64;
            // Resuming from the middle of a frame is as exact as from its end.
            let cursor = StreamCursor { log_offset: frame.offset, ..item.cursor };
            let message = v1::LogFrame {
                attempt: *attempt,
                offset,
                stream: stream_to_wire(*stream).into(),
                time: Some(timestamp(frame.time)),
                data: head,
            };
            let time = item.time;
            self.item = Some(item);
            return Some(response(cursor, time, Event::Log(message)));
        }
        let StreamItem { cursor, time, body } = item;
        Some(response(cursor, time, event(body)))
    }
}

fn response(cursor: StreamCursor, time: runner_core::clock::Timestamp, event: Event) -> v1::StreamResponse {
    v1::StreamResponse { cursor: cursor.to_string(), time: Some(timestamp(time)), event: Some(event) }
}

fn event(body: StreamBody) -> Event {
    match body {
        StreamBody::Event(RunEvent::StateChanged { position, reason }) => {
            Event::StateChanged(v1::StateChanged {
                state: state(position.state).into(),
                attempt: position.attempt,
                reason,
            })
        }
        StreamBody::Event(RunEvent::Outputs(manifest)) => Event::Outputs(Wire::from(&manifest).0),
        StreamBody::Event(RunEvent::Notice(text)) => Event::Notice(v1::Notice { text }),
        StreamBody::Event(RunEvent::Terminated { position, outcome }) => Event::Terminated(v1::Terminated {
            state: state(position.state).into(),
            outcome: Some(Wire::from(&outcome).0),
        }),
        StreamBody::Log { attempt, frame: Frame { offset, time, body } } => match body {
            FrameBody::Data { stream, bytes } => Event::Log(v1::LogFrame {
                attempt,
                offset,
                stream: stream_to_wire(stream).into(),
                time: Some(timestamp(time)),
                data: bytes,
            }),
            FrameBody::Truncated { dropped, reason } => {
                Event::LogTruncated(v1::LogTruncated { attempt, offset, dropped_bytes: dropped, reason })
            }
        },
        StreamBody::Progress(progress) => Event::Staging(progress_to_wire(progress)),
        StreamBody::KeepAlive => Event::KeepAlive(v1::KeepAlive {}),
    }
}

fn stream_to_wire(stream: LogStream) -> v1::LogStream {
    match stream {
        LogStream::Stdout => v1::LogStream::Stdout,
        LogStream::Stderr => v1::LogStream::Stderr,
        LogStream::Terminal => v1::LogStream::Terminal,
    }
}

fn progress_to_wire(progress: Progress) -> v1::StagingProgress {
    let Progress { direction, bytes_done, bytes_total, files_done, files_total } = progress;
    v1::StagingProgress {
        direction: match direction {
            Direction::Input => v1::staging_progress::Direction::Input,
            Direction::Output => v1::staging_progress::Direction::Output,
            Direction::Image => v1::staging_progress::Direction::Image,
        }
        .into(),
        bytes_done,
        bytes_total,
        files_done,
        files_total,
    }
}
