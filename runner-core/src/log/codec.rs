//! The stored form of frames: in the shim's spool, in the object store's segments.
//!
//! Little-endian. A frame is a header of 25 bytes and a payload:
//!
//! | bytes | what |
//! |---|---|
//! | 4 | length of the payload |
//! | 1 | kind: 1 stdout, 2 stderr, 3 terminal, 4 truncated |
//! | 8 | offset |
//! | 8 | time, microseconds since the epoch |
//! | 4 | CRC-32 (IEEE) of the 21 bytes before and the payload |
//!
//! The payload of `truncated` is the number of dropped bytes (8) and the reason (UTF-8).

use bytes::{Buf as _, Bytes};

use super::{Frame, FrameBody, LogStream};
use crate::clock::Timestamp;

/// Size of a frame's header, in bytes.
pub const HEADER: usize = 25;
/// Largest payload, in bytes. A source splits what is longer.
pub const MAX_PAYLOAD: usize = 256 * 1024;

const MAX_REASON: usize = 1024;

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The length is larger than [`MAX_PAYLOAD`].
    #[error("payload of {0} bytes")]
    TooLong(usize),
    /// The kind is none of the four.
    #[error("kind {0}")]
    UnknownKind(u8),
    /// The checksum is another.
    #[error("checksum mismatch")]
    Checksum,
    /// The payload is not what its kind needs.
    #[error("malformed payload")]
    Payload,
}

/// Makes the header that goes before `payload`. For a source that writes both with one vectored write.
///
/// # Panics
/// Where the payload is longer than [`MAX_PAYLOAD`].
pub fn data_header(stream: LogStream, offset: u64, time: Timestamp, payload: &[u8]) -> [u8; HEADER] {
    let kind = match stream {
        LogStream::Stdout => 1,
        LogStream::Stderr => 2,
        LogStream::Terminal => 3,
    };
    header(kind, offset, time, payload)
}

fn header(kind: u8, offset: u64, time: Timestamp, payload: &[u8]) -> [u8; HEADER] {
    assert!(payload.len() <= MAX_PAYLOAD, "a payload of {} bytes", payload.len());
    let mut header = [0; HEADER];
    #[allow(clippy::cast_possible_truncation, reason = "at most MAX_PAYLOAD")]
    header[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    header[4] = kind;
    header[5..13].copy_from_slice(&offset.to_le_bytes());
    header[13..21].copy_from_slice(&time.as_micros().to_le_bytes());
    let crc = checksum(&header[..21], payload);
    header[21..].copy_from_slice(&crc.to_le_bytes());
    header
}

fn checksum(head: &[u8], payload: &[u8]) -> u32 {
    crc32(&[head, payload])
}

/// CRC-32 (IEEE) of the parts, one after the other.
pub fn crc32(parts: &[&[u8]]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize()
}

/// Appends a frame's stored form to `out`.
pub fn encode(frame: &Frame, out: &mut Vec<u8>) {
    match &frame.body {
        FrameBody::Data { stream, bytes } => {
            out.extend_from_slice(&data_header(*stream, frame.offset, frame.time, bytes));
            out.extend_from_slice(bytes);
        }
        FrameBody::Truncated { dropped, reason } => {
            let mut payload = dropped.to_le_bytes().to_vec();
            payload.extend_from_slice(&reason.as_bytes()[..reason.floor_char_boundary(MAX_REASON)]);
            out.extend_from_slice(&header(4, frame.offset, frame.time, &payload));
            out.extend_from_slice(&payload);
        }
    }
}

/// Takes one whole frame from the front of `buffer`, without copying its payload. `None`: more bytes are needed, and
/// `buffer` is as it was. An error leaves `buffer` as it was too.
///
/// # Errors
/// Where the bytes are not a frame. What follows cannot be trusted.
pub fn decode(buffer: &mut Bytes) -> Result<Option<Frame>, DecodeError> {
    if buffer.len() < HEADER {
        return Ok(None);
    }
    let mut head = &buffer[..HEADER];
    let length = head.get_u32_le() as usize;
    let kind = head.get_u8();
    let offset = head.get_u64_le();
    let time = Timestamp::from_micros(head.get_i64_le());
    let crc = head.get_u32_le();
    if length > MAX_PAYLOAD {
        return Err(DecodeError::TooLong(length));
    }
    if buffer.len() < HEADER + length {
        return Ok(None);
    }
    let mut payload = buffer.slice(HEADER..HEADER + length);
    if checksum(&buffer[..21], &payload) != crc {
        return Err(DecodeError::Checksum);
    }
    let stream = match kind {
        1 => Some(LogStream::Stdout),
        2 => Some(LogStream::Stderr),
        3 => Some(LogStream::Terminal),
        4 => None,
        kind => return Err(DecodeError::UnknownKind(kind)),
    };
    let body = if let Some(stream) = stream {
        if payload.is_empty() {
            return Err(DecodeError::Payload);
        }
        FrameBody::Data { stream, bytes: payload }
    } else {
        if payload.len() < 8 {
            return Err(DecodeError::Payload);
        }
        let dropped = payload.get_u64_le();
        if dropped == 0 || payload.len() > MAX_REASON {
            return Err(DecodeError::Payload);
        }
        let reason = String::from_utf8(payload.into()).map_err(|_| DecodeError::Payload)?;
        FrameBody::Truncated { dropped, reason }
    };
    if offset
        .checked_add(match &body {
            FrameBody::Data { bytes, .. } => bytes.len() as u64,
            FrameBody::Truncated { dropped, .. } => *dropped,
        })
        .is_none()
    {
        return Err(DecodeError::Payload);
    }
    buffer.advance(HEADER + length);
    Ok(Some(Frame { offset, time, body }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_frame() -> impl Strategy<Value = Frame> {
        let data = (
            prop::sample::select(vec![LogStream::Stdout, LogStream::Stderr, LogStream::Terminal]),
            prop::collection::vec(any::<u8>(), 1..300),
        )
            .prop_map(|(stream, bytes)| FrameBody::Data { stream, bytes: bytes.into() });
        let truncated = (1..u64::MAX / 4, "[a-zü ]{0,40}")
            .prop_map(|(dropped, reason)| FrameBody::Truncated { dropped, reason });
        (0..u64::MAX / 4, any::<i64>(), prop_oneof![data, truncated]).prop_map(|(offset, time, body)| Frame {
            offset,
            time: Timestamp::from_micros(time),
            body,
        })
    }

    proptest! {
        #[test]
        fn frames_read_back_as_written_at_every_split(frames in prop::collection::vec(any_frame(), 0..6), cut in 0usize..2000) {
            let mut bytes = Vec::new();
            for frame in &frames { encode(frame, &mut bytes); }
            let cut = cut.min(bytes.len());
            let mut first = Bytes::copy_from_slice(&bytes[..cut]);
            let mut got = Vec::new();
            while let Some(frame) = decode(&mut first).unwrap() { got.push(frame); }
            let mut rest = Bytes::from([&first[..], &bytes[cut..]].concat());
            while let Some(frame) = decode(&mut rest).unwrap() { got.push(frame); }
            prop_assert!(rest.is_empty());
            prop_assert_eq!(got, frames);
        }

        #[test]
        fn one_changed_byte_is_noticed(frame in any_frame(), at in any::<prop::sample::Index>(), flip in 1u8..) {
            let mut bytes = Vec::new();
            encode(&frame, &mut bytes);
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            // A longer length asks for more bytes; everything else is an error.
            let outcome = decode(&mut Bytes::from(bytes));
            prop_assert!(!matches!(outcome, Ok(Some(_))), "{outcome:?}");
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&mut Bytes::from(bytes));
        }

        #[test]
        fn a_frame_cut_at_an_offset_covers_the_rest(frame in any_frame(), skip in any::<u64>()) {
            let (offset, end) = (frame.offset, frame.end());
            let from = offset + skip % (end - offset + 2);
            match frame.from_offset(from) {
                Some(rest) => { prop_assert_eq!(rest.offset, from.max(offset)); prop_assert_eq!(rest.end(), end); }
                None => prop_assert!(from >= end),
            }
        }
    }
}
