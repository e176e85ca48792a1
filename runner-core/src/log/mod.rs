//! Logs: one ordered sequence of frames per attempt, and the store that keeps it.
//!
//! A byte that the program wrote has an **offset**: the number of log bytes of the attempt before it, over all its
//! streams. Dropped bytes keep their offsets, covered by a [`FrameBody::Truncated`], so that frames are contiguous: each
//! starts where the one before ended, and a cursor is one number.

pub mod codec;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;

use crate::{
    artifact::ArtifactError,
    clock::Timestamp,
    id::{AttemptId, RunId, TenantId},
};

/// Which of the program's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum LogStream {
    Stdout,
    Stderr,
    /// Both, interleaved by the pseudo-terminal.
    Terminal,
}

/// A stretch of an attempt's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Log bytes of the attempt before this frame.
    pub offset: u64,
    /// When it was read from the program.
    pub time: Timestamp,
    /// What it holds.
    pub body: FrameBody,
}

/// What a frame holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FrameBody {
    /// Bytes, verbatim. Never empty.
    Data {
        /// Whose.
        stream: LogStream,
        /// At most [`codec::MAX_PAYLOAD`].
        bytes: Bytes,
    },
    /// Stands for bytes that were dropped. Never zero.
    Truncated {
        /// How many.
        dropped: u64,
        /// Why, for people. At most 1 KiB.
        reason: String,
    },
}

impl Frame {
    /// Number of offsets that it covers.
    pub fn span(&self) -> u64 {
        match &self.body {
            FrameBody::Data { bytes, .. } => bytes.len() as u64,
            FrameBody::Truncated { dropped, .. } => *dropped,
        }
    }

    /// Offset of what follows it.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.span())
    }

    /// The part from `offset` on; `None` where it ends there or before. Makes a cursor within a frame, and a source that
    /// frames the same bytes otherwise after a restart, both exact.
    #[must_use]
    pub fn from_offset(self, offset: u64) -> Option<Self> {
        if offset <= self.offset {
            return Some(self);
        }
        if offset >= self.end() {
            return None;
        }
        let skip = offset - self.offset;
        let body = match self.body {
            FrameBody::Data { stream, bytes } => {
                // `skip` is below the length, which is a usize.
                FrameBody::Data { stream, bytes: bytes.slice(usize::try_from(skip).unwrap_or(usize::MAX)..) }
            }
            FrameBody::Truncated { dropped, reason } => {
                FrameBody::Truncated { dropped: dropped - skip, reason }
            }
        };
        Some(Self { offset, time: self.time, body })
    }
}

/// What an attempt's log amounts to, known when it is sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogSummary {
    /// Offset of the end: delivered and dropped bytes.
    pub end: u64,
    /// Of these, dropped.
    pub dropped: u64,
}

/// A failed log operation.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Frames came that do not start where the log ends.
    #[error("log of {attempt}: a frame at {got} came where {expected} was expected")]
    Gap {
        /// Whose log.
        attempt: AttemptId,
        /// Where the log ends.
        expected: u64,
        /// Where the frame starts.
        got: u64,
    },
    /// A frame came for a log that is sealed, or that was not opened here. A sealed log leaves no trace in memory, so the
    /// two are told apart by opening it.
    #[error("log of {attempt} is sealed or not open")]
    Sealed {
        /// Whose log.
        attempt: AttemptId,
    },
    /// What is stored does not decode.
    #[error("log of {attempt}: {detail}")]
    Corrupt {
        /// Whose log.
        attempt: AttemptId,
        /// What was found where.
        detail: String,
    },
    /// The object store failed.
    #[error("log of {attempt}: {source}")]
    Store {
        /// Whose log.
        attempt: AttemptId,
        /// The store's failure.
        source: ArtifactError,
    },
}

/// Frames that a reader gets at once, in order, at least one.
pub type FrameBatch = Vec<Frame>;

/// Keeps the logs of attempts.
///
/// 1. `append` MUST accept frames in order and without a gap, and MUST ignore, byte-exactly, what it has already: a source
///    that starts again from an earlier offset is normal.
/// 2. `append` returns the offset up to which the log is **durable**: the source MAY forget what is before it, and MUST
///    keep what is after it. After a crash of the service, `durable` answers from the object store.
/// 3. `append` MUST hold bounded memory. It waits while the object store is slower than the source.
/// 4. Any number of readers. A reader is an offset: a slow one MUST cost bounded memory and MUST NOT slow `append` or
///    another reader.
/// 5. `read` yields what is stored from an offset, then what comes, and ends when the log is sealed and read to its end.
///    It MUST show a frame no later than its durability, and SHOULD show it at once.
/// 6. `seal` makes everything durable, then permits no more frames. Idempotent.
/// 7. A log that was never appended to reads as empty once it is sealed.
/// 8. `append` and `flush` for a log that is not open answer [`LogError::Sealed`].
/// 9. One process at a time has a log open. `read` needs nobody to have it open: it then shows what is stored, and
///    follows from when it is opened or sealed in this process.
/// 10. Every call MAY be dropped at any moment, and called again. A `seal` that began permits no more frames, whether or
///     not it was waited for.
#[async_trait]
pub trait LogStore: std::fmt::Debug + Send + Sync + 'static {
    /// Opens an attempt's log for appending, or finds it open. Returns the durable offset, where the source goes on.
    /// `fresh` promises that no process can have opened it before, so that the object store need not be asked.
    /// A sealed log answers its end, and stays sealed.
    async fn open(&self, tenant: &TenantId, attempt: AttemptId, fresh: bool) -> Result<u64, LogError>;
    /// Appends. Returns the durable offset.
    async fn append(&self, attempt: AttemptId, frames: FrameBatch) -> Result<u64, LogError>;
    /// Makes what was appended so far durable. Returns the durable offset.
    async fn flush(&self, attempt: AttemptId) -> Result<u64, LogError>;
    /// Ends the log.
    async fn seal(&self, tenant: &TenantId, attempt: AttemptId) -> Result<LogSummary, LogError>;
    /// Reads from `offset`, and follows until the seal. `follow = false` ends at what is known now.
    fn read(
        &self,
        tenant: &TenantId,
        attempt: AttemptId,
        offset: u64,
        follow: bool,
    ) -> BoxStream<'static, Result<FrameBatch, LogError>>;
    /// Removes a run's logs.
    async fn delete(&self, tenant: &TenantId, run: RunId) -> Result<(), LogError>;
}
