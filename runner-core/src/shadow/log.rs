//! What a log comes to, so that two can be compared without keeping either.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::log::{Frame, FrameBody, LogStream};

/// The bytes of one stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamDigest {
    /// How many.
    pub bytes: u64,
    /// Of all of them, lower-case hex.
    pub sha256: String,
}

/// A whole log. It depends on the bytes and their streams alone: not on times, and not on how the bytes were cut into frames.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogDigest {
    /// Bytes of all streams that were kept.
    pub bytes: u64,
    /// Bytes that were dropped.
    pub dropped: u64,
    /// Of the bytes with their streams, in the order in which they were read, lower-case hex. Where a program writes to two streams
    /// at once, this may differ between two executions of which every stream is the same.
    pub sha256: String,
    /// By `stdout`, `stderr` and `terminal`; a stream without bytes is not there.
    pub streams: BTreeMap<String, StreamDigest>,
}

/// Digests a log frame by frame. Memory does not grow with the log.
#[derive(Debug, Default)]
pub struct LogDigester {
    end: u64,
    bytes: u64,
    dropped: u64,
    whole: Sha256,
    /// What came without a break from one stream.
    stretch: Option<(LogStream, u64, Sha256)>,
    streams: BTreeMap<&'static str, (u64, Sha256)>,
}

const fn name(stream: LogStream) -> &'static str {
    match stream {
        LogStream::Stdout => "stdout",
        LogStream::Stderr => "stderr",
        LogStream::Terminal => "terminal",
    }
}

impl LogDigester {
    /// Takes the next frame.
    pub fn push(&mut self, frame: &Frame) {
        self.end = frame.end();
        match &frame.body {
            FrameBody::Truncated { dropped, .. } => self.dropped += dropped,
            FrameBody::Data { stream, bytes } => {
                let more = bytes.len() as u64;
                self.bytes += more;
                let (length, digest) = self.streams.entry(name(*stream)).or_default();
                *length += more;
                digest.update(bytes);
                if self.stretch.as_ref().is_none_or(|(before, ..)| before != stream) {
                    self.end_stretch();
                }
                let (_, length, digest) = self.stretch.get_or_insert_with(|| (*stream, 0, Sha256::new()));
                *length += more;
                digest.update(bytes);
            }
        }
    }

    /// Offset of the end of what it has taken: kept and dropped bytes.
    pub const fn end(&self) -> u64 {
        self.end
    }

    fn end_stretch(&mut self) {
        let Some((stream, length, digest)) = self.stretch.take() else { return };
        self.whole.update(name(stream));
        self.whole.update(length.to_be_bytes());
        self.whole.update(digest.finalize());
    }

    /// What the log comes to.
    pub fn finish(mut self) -> LogDigest {
        self.end_stretch();
        let streams = self.streams.into_iter().map(|(name, (bytes, digest))| {
            (name.to_owned(), StreamDigest { bytes, sha256: hex::encode(digest.finalize()) })
        });
        LogDigest {
            bytes: self.bytes,
            dropped: self.dropped,
            sha256: hex::encode(self.whole.finalize()),
            streams: streams.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;

    /// The digest of these pieces, a frame each.
    fn digest(pieces: &[(LogStream, &str)]) -> LogDigest {
        let mut digester = LogDigester::default();
        let mut offset = 0;
        for (i, (stream, text)) in (1i64..).zip(pieces) {
            let bytes = bytes::Bytes::copy_from_slice(text.as_bytes());
            let frame = Frame {
                offset,
                time: Timestamp::from_micros(i),
                body: FrameBody::Data { stream: *stream, bytes },
            };
            offset = frame.end();
            digester.push(&frame);
        }
        assert_eq!(digester.end(), offset);
        digester.finish()
    }

    #[test]
    fn how_bytes_were_cut_into_frames_does_not_count() {
        use LogStream::{Stderr, Stdout};
        let whole = digest(&[(Stdout, "abc"), (Stderr, "x")]);
        assert_eq!(digest(&[(Stdout, "a"), (Stdout, "bc"), (Stderr, "x")]), whole);
        assert_eq!((whole.bytes, whole.streams["stdout"].bytes), (4, 3));
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(whole.streams["stdout"].sha256, abc);
    }

    #[test]
    fn another_order_of_streams_is_told_apart_from_other_bytes() {
        use LogStream::{Stderr, Stdout};
        let (one, other) =
            (digest(&[(Stdout, "abc"), (Stderr, "x")]), digest(&[(Stderr, "x"), (Stdout, "abc")]));
        assert_eq!(one.streams, other.streams);
        assert_ne!(one.sha256, other.sha256);
        assert_ne!(digest(&[(Stdout, "abd"), (Stderr, "x")]).streams, one.streams);
        assert_ne!(digest(&[(Stderr, "abc")]).sha256, digest(&[(Stdout, "abc")]).sha256);
    }

    #[test]
    fn dropped_bytes_are_counted() {
        let mut digester = LogDigester::default();
        let body = FrameBody::Truncated { dropped: 7, reason: "x".to_owned() };
        digester.push(&Frame { offset: 0, time: Timestamp::from_micros(1), body });
        assert_eq!(digester.end(), 7);
        let digest = digester.finish();
        assert_eq!((digest.bytes, digest.dropped), (0, 7));
    }
}
