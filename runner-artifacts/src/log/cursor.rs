//! Frames out of a stored object, in order, with bounded memory.

use bytes::{Bytes, BytesMut};
use futures::TryStreamExt as _;
use runner_core::{
    artifact::{ArtifactError, ArtifactErrorKind, ArtifactKey, ArtifactStore, ByteStream},
    log::{
        Frame, FrameBatch,
        codec::{self, DecodeError, HEADER, MAX_PAYLOAD},
    },
};

/// Memory that a frame costs beside its payload, in bytes.
pub(super) const FRAME_OVERHEAD: usize = 96;

/// Memory that a frame costs, in bytes.
pub(super) fn cost(frame: &Frame) -> usize {
    FRAME_OVERHEAD
        + match &frame.body {
            runner_core::log::FrameBody::Data { bytes, .. } => bytes.len(),
            runner_core::log::FrameBody::Truncated { reason, .. } => reason.len(),
        }
}

/// Why stored frames cannot be read.
#[derive(Debug)]
pub(super) enum ReadFault {
    /// The object is gone: it was joined into another, or the log was deleted.
    Missing(ArtifactKey),
    /// The store failed.
    Store(ArtifactError),
    /// What is stored is not what was written.
    Corrupt(String),
}

impl From<ArtifactError> for ReadFault {
    fn from(error: ArtifactError) -> Self {
        Self::Store(error)
    }
}

/// Turns chunks of any size into frames. Copies only the frames that lie across two chunks.
#[derive(Debug, Default)]
struct Splitter {
    /// The beginning of a frame whose end has not come.
    head: BytesMut,
    chunk: Bytes,
}

impl Splitter {
    fn feed(&mut self, chunk: Bytes) {
        debug_assert!(self.chunk.is_empty(), "the chunk before was not used up");
        self.chunk = chunk;
    }

    /// The next frame; `None`: feed more.
    fn next(&mut self) -> Result<Option<Frame>, DecodeError> {
        if self.head.is_empty() {
            let frame = codec::decode(&mut self.chunk)?;
            if frame.is_none() {
                self.head.extend_from_slice(&std::mem::take(&mut self.chunk));
            }
            return Ok(frame);
        }
        loop {
            let wanted = match self.head.first_chunk::<4>() {
                Some(length) if self.head.len() >= HEADER => {
                    let length = u32::from_le_bytes(*length) as usize;
                    if length > MAX_PAYLOAD {
                        return Err(DecodeError::TooLong(length));
                    }
                    HEADER + length
                }
                _ => HEADER,
            };
            if self.head.len() >= wanted && self.head.len() >= HEADER {
                // A fresh buffer, so that a reader which keeps the frame does not keep more than the frame.
                let mut whole = Bytes::from(std::mem::take(&mut self.head));
                return codec::decode(&mut whole);
            }
            let missing = wanted - self.head.len();
            if self.chunk.is_empty() {
                return Ok(None);
            }
            let part = self.chunk.split_to(missing.min(self.chunk.len()));
            self.head.extend_from_slice(&part);
        }
    }

    fn is_empty(&self) -> bool {
        self.head.is_empty() && self.chunk.is_empty()
    }
}

/// Reads the frames of one object from a frame's beginning on.
pub(super) struct Cursor {
    key: ArtifactKey,
    bytes: ByteStream,
    splitter: Splitter,
    /// Offset of the next frame that must come.
    expected: u64,
    /// Offset where the object's frames end.
    until: u64,
}

impl std::fmt::Debug for Cursor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cursor")
            .field("key", &self.key)
            .field("expected", &self.expected)
            .finish_non_exhaustive()
    }
}

impl Cursor {
    /// Starts at `range.start`, where the frame at offset `expected` begins. The frames must go on without a gap to
    /// `until`.
    pub(super) async fn open(
        store: &dyn ArtifactStore,
        key: ArtifactKey,
        range: std::ops::Range<u64>,
        expected: u64,
        until: u64,
    ) -> Result<Self, ReadFault> {
        let (_, bytes) = store.get(&key, range).await.map_err(|error| fault(&key, error))?;
        Ok(Self::over(key, bytes, expected, until))
    }

    /// The same over bytes that are at hand.
    pub(super) fn over(key: ArtifactKey, bytes: ByteStream, expected: u64, until: u64) -> Self {
        Self { key, bytes, splitter: Splitter::default(), expected, until }
    }

    /// The next frames from offset `from` on, until they cost `limit` bytes, the first one excepted. `None`: the object
    /// is read to its end.
    pub(super) async fn next(&mut self, from: u64, limit: usize) -> Result<Option<FrameBatch>, ReadFault> {
        let mut batch = Vec::new();
        let mut used = 0;
        while self.expected < self.until {
            let frame = self.splitter.next().map_err(|error| {
                ReadFault::Corrupt(format!("{}: after offset {}: {error}", self.key, self.expected))
            })?;
            let Some(frame) = frame else {
                // What is at hand is handed out before more is waited for.
                if !batch.is_empty() {
                    break;
                }
                match self.bytes.try_next().await.map_err(|error| fault(&self.key, error))? {
                    Some(chunk) => self.splitter.feed(chunk),
                    None => {
                        let cut = if self.splitter.is_empty() { "ends" } else { "is cut off" };
                        return Err(ReadFault::Corrupt(format!(
                            "{}: {cut} at offset {}, {} was promised",
                            self.key, self.expected, self.until
                        )));
                    }
                }
                continue;
            };
            if frame.offset != self.expected || frame.end() > self.until {
                return Err(ReadFault::Corrupt(format!(
                    "{}: frame of offsets {} to {} where {} to {} were expected",
                    self.key,
                    frame.offset,
                    frame.end(),
                    self.expected,
                    self.until
                )));
            }
            self.expected = frame.end();
            if let Some(frame) = frame.from_offset(from) {
                used += cost(&frame);
                batch.push(frame);
                if used >= limit {
                    break;
                }
            }
        }
        Ok((!batch.is_empty()).then_some(batch))
    }
}

fn fault(key: &ArtifactKey, error: ArtifactError) -> ReadFault {
    match error.kind {
        ArtifactErrorKind::NotFound => ReadFault::Missing(key.clone()),
        _ => ReadFault::Store(error),
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt as _, StreamExt as _, stream};
    use proptest::prelude::*;
    use runner_core::{
        clock::Timestamp,
        log::{FrameBody, LogStream},
    };

    use super::*;

    fn chunks(bytes: &[u8], size: usize) -> ByteStream {
        let chunks: Vec<_> = bytes.chunks(size.max(1)).map(Bytes::copy_from_slice).map(Ok).collect();
        stream::iter(chunks).boxed()
    }

    fn frames(lengths: &[usize]) -> Vec<Frame> {
        let mut offset = 0;
        lengths
            .iter()
            .enumerate()
            .map(|(number, length)| {
                let body = if number % 5 == 4 {
                    FrameBody::Truncated { dropped: *length as u64, reason: "limit".to_owned() }
                } else {
                    let bytes: Vec<u8> = (0..*length).map(|at| (at + number) as u8).collect();
                    FrameBody::Data { stream: LogStream::Stdout, bytes: bytes.into() }
                };
                let frame = Frame { offset, time: Timestamp::from_micros(7), body };
                offset += *length as u64;
                frame
            })
            .collect()
    }

    fn encode(frames: &[Frame]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for frame in frames {
            codec::encode(frame, &mut bytes);
        }
        bytes
    }

    /// Reads to the end or to the first fault. Nothing in it waits.
    fn drain(mut cursor: Cursor, from: u64, limit: usize) -> (Vec<Frame>, Option<ReadFault>) {
        let mut got = Vec::new();
        loop {
            match cursor.next(from, limit).now_or_never().expect("the bytes are at hand") {
                Ok(Some(batch)) => got.extend(batch),
                Ok(None) => return (got, None),
                Err(fault) => return (got, Some(fault)),
            }
        }
    }

    fn key() -> ArtifactKey {
        "runs/t/log".parse().unwrap()
    }

    proptest! {
        #[test]
        fn frames_come_back_in_every_chunking(lengths in prop::collection::vec(1usize..200, 0..20), size in 1usize..300, limit in 0usize..2000) {
            let source = frames(&lengths);
            let end = source.last().map_or(0, Frame::end);
            let cursor = Cursor::over(key(), chunks(&encode(&source), size), 0, end);
            let (got, fault) = drain(cursor, 0, limit);
            prop_assert!(fault.is_none(), "{fault:?}");
            prop_assert_eq!(got, source);
        }

        #[test]
        fn a_start_in_the_middle_is_exact(lengths in prop::collection::vec(1usize..50, 1..20), from in any::<prop::sample::Index>()) {
            let source = frames(&lengths);
            let end = source.last().map_or(0, Frame::end);
            let from = from.index(end as usize) as u64;
            let (got, fault) = drain(Cursor::over(key(), chunks(&encode(&source), 64), 0, end), from, 100);
            prop_assert!(fault.is_none(), "{fault:?}");
            let expected: Vec<_> = source.into_iter().filter_map(|frame| frame.from_offset(from)).collect();
            prop_assert_eq!(got, expected);
        }

        #[test]
        fn damage_yields_a_true_beginning_and_then_a_fault(
            lengths in prop::collection::vec(1usize..100, 1..12), size in 1usize..200,
            at in any::<prop::sample::Index>(), flip in 1u8.., cut in any::<bool>(),
        ) {
            let source = frames(&lengths);
            let end = source.last().map_or(0, Frame::end);
            let mut bytes = encode(&source);
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at); } else { bytes[at] ^= flip; }
            let (got, fault) = drain(Cursor::over(key(), chunks(&bytes, size), 0, end), 0, 500);
            prop_assert!(matches!(fault, Some(ReadFault::Corrupt(_))), "{fault:?}");
            prop_assert!(got.len() < source.len());
            prop_assert_eq!(&got[..], &source[..got.len()]);
        }

        #[test]
        fn arbitrary_bytes_never_panic_and_never_yield_wrong_offsets(
            bytes in prop::collection::vec(any::<u8>(), 0..400), size in 1usize..100, small in any::<bool>(), until in 1u64..1000,
        ) {
            let mut bytes = bytes;
            // Half of them with plausible lengths, so that more than the first check is reached.
            if small { for header in bytes.chunks_mut(40) { if header.len() > 4 { header[1..4].fill(0); } } }
            let (got, _) = drain(Cursor::over(key(), chunks(&bytes, size), 0, until), 0, 500);
            let mut expected = 0;
            for frame in got { prop_assert_eq!(frame.offset, expected); expected = frame.end(); prop_assert!(expected <= until); }
        }
    }
}
