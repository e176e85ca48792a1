//! The link between a shim in a container and its backend: what goes over the container's standard output and input.
//!
//! A container has no control socket that its engine would pass on, but its standard streams are passed on by every
//! engine. The shim writes **packets** to standard output: live copies of the log's frames, and records. It reads
//! **requests** from standard input: one [`LinkRequest`] as JSON a line; empty lines mean nothing, so that a sender begins
//! with a newline to end what another one left unfinished.
//!
//! The link is a short cut and never the truth: everything that a backend must know lies in the attempt's directory. The
//! shim never waits for the link: a frame that does not fit is left out, which the offsets of the frames show.
//!
//! A packet is
//!
//! | bytes | what |
//! |---|---|
//! | 4 | `F1 72 6E 21` |
//! | 1 | kind: 1 frame, 2 started, 3 ended, 4 reply |
//! | 4 | length of the payload, little-endian |
//! | 4 | CRC-32 (IEEE) of the five bytes before and, except of a frame, the payload |
//!
//! The payload of a frame is its stored form (`runner_core::log::codec`), which has a checksum of its own; all others are
//! JSON. Whoever begins to listen in the middle finds the next packet by its first bytes and its checksum.

use bytes::{Buf as _, Bytes, BytesMut};
use runner_core::log::{Frame, codec};
use serde::{Deserialize, Serialize};

use super::protocol::{ControlReply, ControlRequest, ExitRecord, StartedRecord};

const MAGIC: [u8; 4] = [0xF1, b'r', b'n', b'!'];
/// Bytes before the payload.
pub(crate) const HEAD: usize = 13;
/// Longest payload.
const MAX_PAYLOAD: usize = codec::HEADER + codec::MAX_PAYLOAD;

/// The kinds of packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Frame = 1,
    Started = 2,
    Ended = 3,
    Reply = 4,
}

/// A request to the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkRequest {
    /// Comes back with the reply.
    pub id: u64,
    /// What is asked for.
    pub request: ControlRequest,
}

/// The answer to a [`LinkRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkReply {
    /// The request's.
    pub id: u64,
    /// The answer.
    pub reply: ControlReply,
}

/// What a packet says.
#[derive(Debug, Clone, PartialEq)]
pub enum LinkPacket {
    /// A live copy of a frame of the log.
    Frame(Frame),
    /// The program runs.
    Started(StartedRecord),
    /// The exit record is written. Nothing more comes.
    Ended(ExitRecord),
    /// A request was served.
    Reply(LinkReply),
}

/// Makes the bytes that go before `payload`. `None`: it is too long for a packet.
pub(crate) fn head(kind: Kind, length: usize, checked: &[u8]) -> Option<[u8; HEAD]> {
    let short = u32::try_from(length).ok().filter(|_| length <= MAX_PAYLOAD)?;
    let mut head = [0; HEAD];
    head[..4].copy_from_slice(&MAGIC);
    head[4] = kind as u8;
    head[5..9].copy_from_slice(&short.to_le_bytes());
    let crc = checksum(&head[4..9], checked);
    head[9..].copy_from_slice(&crc.to_le_bytes());
    Some(head)
}

fn checksum(head: &[u8], payload: &[u8]) -> u32 {
    codec::crc32(&[head, payload])
}

/// A request as it goes to the shim.
///
/// # Errors
/// Where it has no JSON form, which no request lacks.
pub fn encode_request(request: &LinkRequest) -> Result<Bytes, serde_json::Error> {
    let mut line = b"\n".to_vec();
    serde_json::to_writer(&mut line, request)?;
    line.push(b'\n');
    Ok(line.into())
}

/// Finds packets in what a container wrote to its standard output. Holds at most one packet and what came with it.
#[derive(Debug, Default)]
pub struct LinkDecoder {
    buffer: BytesMut,
}

impl LinkDecoder {
    /// Takes bytes as they come.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole packet. `None`: more bytes are needed. What is no packet is passed over.
    pub fn next_packet(&mut self) -> Option<LinkPacket> {
        loop {
            self.find_magic();
            if self.buffer.len() < HEAD {
                return None;
            }
            let length = u32::from_le_bytes([self.buffer[5], self.buffer[6], self.buffer[7], self.buffer[8]]);
            let crc = u32::from_le_bytes([self.buffer[9], self.buffer[10], self.buffer[11], self.buffer[12]]);
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            let kind = self.buffer[4];
            let head_only = kind == Kind::Frame as u8;
            if length > MAX_PAYLOAD || head_only && checksum(&self.buffer[4..9], &[]) != crc {
                self.buffer.advance(1);
                continue;
            }
            if self.buffer.len() < HEAD + length {
                return None;
            }
            let payload = &self.buffer[HEAD..HEAD + length];
            if !head_only && checksum(&self.buffer[4..9], payload) != crc {
                self.buffer.advance(1);
                continue;
            }
            let packet = match kind {
                1 => {
                    // A frame that does not decode was no packet: nothing is taken from the buffer for it.
                    let mut whole = Bytes::copy_from_slice(payload);
                    codec::decode(&mut whole)
                        .ok()
                        .flatten()
                        .filter(|_| whole.is_empty())
                        .map(LinkPacket::Frame)
                }
                2 => serde_json::from_slice(payload).ok().map(LinkPacket::Started),
                3 => serde_json::from_slice(payload).ok().map(LinkPacket::Ended),
                4 => serde_json::from_slice(payload).ok().map(LinkPacket::Reply),
                _ => None,
            };
            match packet {
                Some(packet) => {
                    self.buffer.advance(HEAD + length);
                    return Some(packet);
                }
                None => self.buffer.advance(1),
            }
        }
    }

    /// Drops what comes before the next place where a packet may begin.
    fn find_magic(&mut self) {
        if self.buffer.starts_with(&MAGIC) {
            return;
        }
        let at = self.buffer.windows(MAGIC.len()).position(|window| window == MAGIC);
        // The last three bytes may be the beginning of one.
        let keep = self.buffer.len().saturating_sub(MAGIC.len() - 1);
        let begins = |at: &usize| MAGIC.starts_with(&self.buffer[*at..]);
        let at = at.or_else(|| (keep..self.buffer.len()).find(begins)).unwrap_or(self.buffer.len());
        self.buffer.advance(at);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use runner_core::{
        clock::Timestamp,
        log::{FrameBody, LogStream},
    };

    use super::*;

    fn packet(kind: Kind, payload: &[u8]) -> Vec<u8> {
        let checked = if kind == Kind::Frame { &[][..] } else { payload };
        [&head(kind, payload.len(), checked).unwrap()[..], payload].concat()
    }

    fn frame(offset: u64, bytes: &[u8]) -> (Frame, Vec<u8>) {
        let body = FrameBody::Data { stream: LogStream::Stdout, bytes: Bytes::copy_from_slice(bytes) };
        let frame = Frame { offset, time: Timestamp::from_micros(5), body };
        let mut stored = Vec::new();
        codec::encode(&frame, &mut stored);
        (frame, packet(Kind::Frame, &stored))
    }

    fn all(decoder: &mut LinkDecoder) -> Vec<LinkPacket> {
        std::iter::from_fn(|| decoder.next_packet()).collect()
    }

    #[test]
    fn every_kind_reads_back_as_it_was_written() {
        let started = StartedRecord { time: Timestamp::from_micros(3), pid: 7 };
        let reply = LinkReply { id: 9, reply: ControlReply::Refused("no".to_owned()) };
        let (frame, bytes) = frame(0, b"text");
        let mut decoder = LinkDecoder::default();
        decoder.push(&bytes);
        decoder.push(&packet(Kind::Started, &serde_json::to_vec(&started).unwrap()));
        decoder.push(&packet(Kind::Reply, &serde_json::to_vec(&reply).unwrap()));
        assert_eq!(
            all(&mut decoder),
            [LinkPacket::Frame(frame), LinkPacket::Started(started), LinkPacket::Reply(reply)]
        );
    }

    proptest! {
        #[test]
        fn packets_are_found_at_every_split(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..200), 1..6),
            piece in 1usize..50,
        ) {
            let (mut frames, mut bytes, mut offset) = (Vec::new(), Vec::new(), 0);
            for payload in &payloads {
                let (frame, packet) = frame(offset, payload);
                offset = frame.end();
                frames.push(LinkPacket::Frame(frame));
                bytes.extend_from_slice(&packet);
            }
            let mut decoder = LinkDecoder::default();
            let mut seen = Vec::new();
            for piece in bytes.chunks(piece) {
                decoder.push(piece);
                seen.extend(all(&mut decoder));
            }
            prop_assert_eq!(seen, frames);
            prop_assert!(decoder.buffer.is_empty());
        }

        #[test]
        fn who_listens_from_the_middle_gets_what_comes_whole(
            cut in 1usize..400, garbage in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let (_, first) = frame(0, &[0xF1; 100]);
            let (second, bytes) = frame(100, &[b'r'; 100]);
            let mut decoder = LinkDecoder::default();
            decoder.push(&garbage);
            decoder.push(&first[cut.min(first.len())..]);
            decoder.push(&bytes);
            prop_assert_eq!(all(&mut decoder), [LinkPacket::Frame(second)]);
        }

        #[test]
        fn arbitrary_bytes_never_panic_and_are_not_kept(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut decoder = LinkDecoder::default();
            decoder.push(&bytes);
            prop_assert!(all(&mut decoder).is_empty());
            prop_assert!(decoder.buffer.len() <= MAX_PAYLOAD + HEAD);
        }
    }
}
