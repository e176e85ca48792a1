//! What one observation yielded, checked as it comes.

use runner_core::{
    artifact::Manifest,
    backend::{EndedAttempt, Observation},
    log::{FrameBody, LogStream, codec::MAX_PAYLOAD},
};

/// A stretch of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stretch {
    /// Bytes of a stream.
    Data(LogStream, Vec<u8>),
    /// Dropped bytes.
    Dropped(u64),
}

/// What one observation yielded.
#[derive(Debug, Clone, PartialEq)]
pub struct Observed {
    /// Where it was to begin.
    pub cursor: u64,
    /// Where the log ends, as seen.
    pub end: u64,
    /// How often `Started` came.
    pub started: u32,
    /// How often `Exited` came.
    pub exited: u32,
    /// What `Published` held.
    pub published: Option<Manifest>,
    /// What `Ended` held.
    pub ended: Option<EndedAttempt>,
    /// The log, neighbours of one stream joined, so that it does not depend on how the source framed it.
    pub log: Vec<Stretch>,
}

impl Observed {
    pub(super) fn new(cursor: u64) -> Self {
        Self { cursor, end: cursor, started: 0, exited: 0, published: None, ended: None, log: Vec::new() }
    }

    /// Takes an observation, and checks that it may come here (rules 4 to 6).
    pub(super) fn take(&mut self, observation: Observation) {
        assert!(self.ended.is_none(), "{observation:?} came after Ended");
        match observation {
            Observation::Started { .. } => {
                assert_eq!(
                    (self.started, self.log.len(), self.exited),
                    (0, 0, 0),
                    "Started comes once, first"
                );
                self.started += 1;
            }
            Observation::Frames(frames) => {
                assert!(!frames.is_empty(), "a batch has at least one frame");
                assert_eq!((self.started, self.exited), (1, 0), "frames come between Started and Exited");
                for frame in frames {
                    assert_eq!(frame.offset, self.end, "frames are contiguous");
                    assert!(frame.span() > 0, "no frame is empty");
                    self.end = frame.end();
                    self.push(frame.body);
                }
            }
            Observation::Exited { .. } => {
                assert_eq!(self.exited, 0, "Exited comes once");
                self.exited += 1;
            }
            Observation::Published { manifest } => {
                assert!(self.published.is_none(), "Published comes once");
                assert_eq!(self.exited, 1, "Published comes after Exited");
                self.published = Some(manifest);
            }
            Observation::Ended(ended) => self.ended = Some(ended),
        }
    }

    fn push(&mut self, body: FrameBody) {
        match (body, self.log.last_mut()) {
            (FrameBody::Data { stream, bytes }, last) => {
                assert!(bytes.len() <= MAX_PAYLOAD, "a frame of {} bytes", bytes.len());
                match last {
                    Some(Stretch::Data(before, so_far)) if *before == stream => {
                        so_far.extend_from_slice(&bytes);
                    }
                    _ => self.log.push(Stretch::Data(stream, bytes.to_vec())),
                }
            }
            (FrameBody::Truncated { dropped, .. }, Some(Stretch::Dropped(before))) => *before += dropped,
            (FrameBody::Truncated { dropped, reason }, _) => {
                assert!(!reason.is_empty(), "a truncation says why");
                self.log.push(Stretch::Dropped(dropped));
            }
        }
    }

    /// Everything of one stream.
    pub fn stream(&self, wanted: LogStream) -> Vec<u8> {
        let mut all = Vec::new();
        for stretch in &self.log {
            if let Stretch::Data(stream, bytes) = stretch
                && *stream == wanted
            {
                all.extend_from_slice(bytes);
            }
        }
        all
    }

    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stream(LogStream::Stdout)).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stream(LogStream::Stderr)).into_owned()
    }

    /// What a terminal showed, as text.
    pub fn terminal(&self) -> String {
        String::from_utf8_lossy(&self.stream(LogStream::Terminal)).into_owned()
    }

    /// Number of dropped bytes.
    pub fn dropped(&self) -> u64 {
        self.log.iter().map(|stretch| if let Stretch::Dropped(count) = stretch { *count } else { 0 }).sum()
    }

    /// How it ended.
    ///
    /// # Panics
    /// Where it has not.
    pub fn end(&self) -> &EndedAttempt {
        self.ended.as_ref().expect("the observation ended")
    }

    /// The log from an offset on, as an observation from there sees it.
    pub fn log_from(&self, offset: u64) -> Vec<Stretch> {
        let mut at = self.cursor;
        let mut rest = Vec::new();
        for stretch in &self.log {
            let span = match stretch {
                Stretch::Data(_, bytes) => bytes.len() as u64,
                Stretch::Dropped(count) => *count,
            };
            let skip = offset.saturating_sub(at).min(span);
            at += span;
            if skip < span {
                rest.push(match stretch {
                    Stretch::Data(stream, bytes) => {
                        Stretch::Data(*stream, bytes[usize::try_from(skip).unwrap_or(0)..].to_vec())
                    }
                    Stretch::Dropped(count) => Stretch::Dropped(count - skip),
                });
            }
        }
        rest
    }
}
