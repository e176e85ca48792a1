//! What a log looks like in the object store.
//!
//! | key below `runs/TENANT/RUN/ATTEMPT/log/` | what |
//! |---|---|
//! | `FIRST-END.seg` | frames from offset FIRST to offset END (20 digits each), while the log is open |
//! | `full.log` | all frames, once they were joined |
//! | `seal` | the commit point of the end: a [`Sealed`], and the frames themselves where they are few |
//!
//! A segment's name says all that recovery needs, so that opening a log costs one listing. The same FIRST and END mean the
//! same bytes, because a source's offsets do; so a segment that is stored twice, or beside a longer one, does no harm.
//!
//! The seal object is `RLS1`, the header's length and its CRC-32 (4 bytes each, little-endian), the header as JSON, and
//! the frames of an inline layout.

use bytes::{Buf as _, Bytes};
use runner_core::{
    artifact::ArtifactKey,
    id::{AttemptId, InvalidId, TenantId},
    log::LogSummary,
};
use serde::{Deserialize, Serialize};

pub(super) const SEAL: &str = "seal";
pub(super) const FULL: &str = "full.log";

const MAGIC: &[u8; 4] = b"RLS1";
const PRELUDE: usize = 12;
/// Largest header. An index of [`Index::MAX`] entries needs a fifth of it.
pub(super) const MAX_HEADER: usize = 256 * 1024;

/// Where an attempt's log is.
pub(super) fn prefix(tenant: &TenantId, attempt: AttemptId) -> Result<ArtifactKey, InvalidId> {
    ArtifactKey::attempt_prefix(tenant, attempt).join("log")
}

/// A stored stretch of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    /// Offset of its first byte.
    pub(super) first: u64,
    /// Offset of what follows it. Above `first`.
    pub(super) end: u64,
    /// Size of the object, in bytes.
    pub(super) size: u64,
}

impl Segment {
    /// Its name below the log's prefix.
    pub(super) fn name(&self) -> String {
        format!("{:020}-{:020}.seg", self.first, self.end)
    }

    /// Reads a name. `None`: it is not a segment's.
    pub(super) fn parse(name: &str, size: u64) -> Option<Self> {
        let (first, end) = name.strip_suffix(".seg")?.split_once('-')?;
        let number =
            |s: &str| (s.len() == 20 && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse::<u64>().ok());
        let (first, end) = (number(first)??, number(end)??);
        (first < end).then_some(Self { first, end, size })
    }
}

/// Chooses the fewest segments that cover the log from 0 without a gap, each ending after the one before. The others are
/// covered by these: what a crash left of a merge.
///
/// # Errors
/// The offset where nothing covers the log although something later is stored.
pub(super) fn cover(mut segments: Vec<Segment>) -> Result<(Vec<Segment>, Vec<Segment>), u64> {
    segments.sort_by_key(|segment| (segment.first, segment.end));
    let (mut chosen, mut covered) = (Vec::new(), Vec::new());
    let mut end = 0;
    let mut best: Option<Segment> = None;
    for segment in segments {
        if segment.first > end {
            let Some(next) = best.take() else { return Err(end) };
            end = next.end;
            chosen.push(next);
            if segment.first > end {
                return Err(end);
            }
        }
        if segment.end <= best.map_or(end, |best| best.end) {
            covered.push(segment);
        } else if let Some(shorter) = best.replace(segment) {
            covered.push(shorter);
        }
    }
    chosen.extend(best);
    Ok((chosen, covered))
}

/// From where to read for an offset, about every MiB; thinned out where a log is long, so that it stays small.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub(super) struct Index {
    /// Log offset and byte position of frames' beginnings, both growing.
    entries: Vec<(u64, u64)>,
}

impl Index {
    /// Most entries.
    pub(super) const MAX: usize = 1024;

    /// The last known frame at or before `offset`: its own offset, and its position.
    pub(super) fn find(&self, offset: u64) -> (u64, u64) {
        match self.entries.partition_point(|(at, _)| *at <= offset) {
            0 => (0, 0),
            after => self.entries[after - 1],
        }
    }
}

/// Makes an [`Index`].
#[derive(Debug)]
pub(super) struct Indexer {
    index: Index,
    stride: u64,
    next: u64,
}

impl Indexer {
    pub(super) fn new(stride: u64) -> Self {
        Self { index: Index::default(), stride: stride.max(1), next: stride.max(1) }
    }

    /// Notes that the frame at `offset` begins at `position`.
    pub(super) fn note(&mut self, offset: u64, position: u64) {
        if position < self.next {
            return;
        }
        if self.index.entries.len() == Index::MAX {
            let mut keep = false;
            self.index.entries.retain(|_| {
                keep = !keep;
                keep
            });
            self.stride = self.stride.saturating_mul(2);
        }
        self.index.entries.push((offset, position));
        self.next = position.saturating_add(self.stride);
    }

    pub(super) fn finish(self) -> Index {
        self.index
    }
}

/// Where a sealed log's frames are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Body {
    /// Behind the header, in the seal object itself.
    Inline {
        /// How many bytes.
        size: u64,
    },
    /// In one object.
    Object {
        /// Its name below the log's prefix.
        name: String,
        /// Its size in bytes.
        size: u64,
    },
}

/// The end of a log: what it amounts to, and where its frames are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sealed {
    pub(super) summary: LogSummary,
    pub(super) body: Body,
    pub(super) index: Index,
    /// Where an inline body begins in the seal object.
    pub(super) base: u64,
}

#[derive(Serialize, Deserialize)]
struct Header {
    end: u64,
    dropped: u64,
    body: Body,
    #[serde(default)]
    index: Index,
}

impl Sealed {
    /// Name below the log's prefix, and byte range, from where to read `offset`, with the offset of the frame that
    /// begins there.
    pub(super) fn locate(&self, offset: u64) -> (&str, std::ops::Range<u64>, u64) {
        let (frame, position) = self.index.find(offset);
        match &self.body {
            Body::Inline { size } => {
                let end = self.base.saturating_add(*size);
                (SEAL, self.base.saturating_add(position).min(end)..end, frame)
            }
            Body::Object { name, size } => (name, position.min(*size)..*size, frame),
        }
    }

    /// The seal object, with `frames` as inline body. Sets `base`.
    pub(super) fn encode(&mut self, frames: &[u8]) -> Bytes {
        let header = Header {
            end: self.summary.end,
            dropped: self.summary.dropped,
            body: self.body.clone(),
            index: self.index.clone(),
        };
        let json = serde_json::to_vec(&header).unwrap_or_default();
        let mut bytes = Vec::with_capacity(PRELUDE + json.len() + frames.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&u32::try_from(json.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend_from_slice(&crc32fast::hash(&json).to_le_bytes());
        bytes.extend_from_slice(&json);
        self.base = bytes.len() as u64;
        bytes.extend_from_slice(frames);
        bytes.into()
    }

    /// How many bytes the prelude and the header need. `None`: more than `bytes` is needed to know.
    pub(super) fn header_end(bytes: &[u8]) -> Result<Option<usize>, String> {
        let Some(mut prelude) = bytes.get(..PRELUDE) else { return Ok(None) };
        if &prelude[..4] != MAGIC {
            return Err("the seal has another beginning".to_owned());
        }
        prelude.advance(4);
        let length = prelude.get_u32_le() as usize;
        if length > MAX_HEADER {
            return Err(format!("the seal's header claims {length} bytes"));
        }
        Ok(Some(PRELUDE + length))
    }

    /// Reads the header from the front of the seal object, whose whole size is `size`.
    pub(super) fn decode(bytes: &[u8], size: u64) -> Result<Self, String> {
        let end = Self::header_end(bytes)?.ok_or("the seal is cut off")?;
        let json = bytes.get(PRELUDE..end).ok_or("the seal is cut off")?;
        if crc32fast::hash(json).to_le_bytes() != bytes[8..PRELUDE] {
            return Err("the seal's checksum is another".to_owned());
        }
        let header: Header =
            serde_json::from_slice(json).map_err(|error| format!("the seal's header: {error}"))?;
        let base = end as u64;
        if let Body::Inline { size: inline } = &header.body
            && base.checked_add(*inline) != Some(size)
        {
            return Err(format!("the seal has {size} bytes, {} were promised", base.saturating_add(*inline)));
        }
        Ok(Self {
            summary: LogSummary { end: header.end, dropped: header.dropped },
            body: header.body,
            index: header.index,
            base,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn segment(first: u64, end: u64) -> Segment {
        Segment { first, end, size: 1 }
    }

    #[test]
    fn a_segment_name_reads_back() {
        let segment = segment(7, u64::MAX);
        assert_eq!(Segment::parse(&segment.name(), 1), Some(segment));
        for bad in [
            "seal",
            "full.log",
            "7-8.seg",
            "00000000000000000008-00000000000000000007.seg",
            "x-y.seg",
            "é.seg",
        ] {
            assert_eq!(Segment::parse(bad, 1), None, "{bad}");
        }
    }

    #[test]
    fn what_a_longer_segment_covers_is_left_out() {
        let all = vec![segment(10, 30), segment(0, 10), segment(10, 20), segment(20, 30), segment(30, 31)];
        let (chosen, covered) = cover(all).unwrap();
        assert_eq!(chosen, [segment(0, 10), segment(10, 30), segment(30, 31)]);
        assert_eq!(covered, [segment(10, 20), segment(20, 30)]);
    }

    #[test]
    fn a_gap_is_named() {
        assert_eq!(cover(vec![segment(0, 10), segment(11, 12)]), Err(10));
        assert_eq!(cover(vec![segment(1, 2)]), Err(0));
        assert_eq!(cover(Vec::new()), Ok((Vec::new(), Vec::new())));
    }

    proptest! {
        #[test]
        fn a_cover_has_no_gap_and_loses_nothing(raw in prop::collection::vec((0u64..40, 1u64..10), 0..20)) {
            let all: Vec<_> = raw.iter().map(|(first, length)| segment(*first, first + length)).collect();
            let reach = |upto: u64| all.iter().any(|s| s.first <= upto && upto < s.end);
            let contiguous = (0..).find(|at| !reach(*at)).unwrap();
            let last = all.iter().map(|s| s.end).max().unwrap_or(0);
            match cover(all.clone()) {
                Ok((chosen, covered)) => {
                    prop_assert_eq!(contiguous, last);
                    prop_assert_eq!(chosen.len() + covered.len(), all.len());
                    prop_assert_eq!(chosen.last().map_or(0, |s| s.end), last);
                    let mut end = 0;
                    for segment in chosen { prop_assert!(segment.first <= end && segment.end > end); end = segment.end; }
                }
                Err(at) => { prop_assert_eq!(at, contiguous); prop_assert!(at < last); }
            }
        }

        #[test]
        fn an_index_finds_a_frame_at_or_before(lengths in prop::collection::vec(1u64..50, 0..4000), stride in 1u64..100, at in any::<u64>()) {
            let mut indexer = Indexer::new(stride);
            let (mut offset, mut position) = (0, 0);
            let mut frames = vec![(0, 0)];
            for length in lengths {
                indexer.note(offset, position);
                frames.push((offset, position));
                offset += length;
                position += length + 25;
            }
            let index = indexer.finish();
            prop_assert!(index.entries.len() <= Index::MAX);
            let at = at % (offset + 2);
            let found = index.find(at);
            prop_assert!(found.0 <= at);
            prop_assert!(frames.contains(&found));
        }

        #[test]
        fn a_seal_reads_back_and_a_changed_byte_is_noticed(end in any::<u64>(), dropped in any::<u64>(), frames in prop::collection::vec(any::<u8>(), 0..50), at in any::<prop::sample::Index>(), flip in 1u8..) {
            let mut sealed = Sealed {
                summary: LogSummary { end, dropped },
                body: Body::Inline { size: frames.len() as u64 },
                index: Index { entries: vec![(1, 2)] },
                base: 0,
            };
            let bytes = sealed.encode(&frames);
            prop_assert_eq!(Sealed::decode(&bytes, bytes.len() as u64), Ok(sealed.clone()));
            let mut bad = bytes.to_vec();
            let at = at.index(usize::try_from(sealed.base).unwrap());
            bad[at] ^= flip;
            prop_assert!(Sealed::decode(&bad, bytes.len() as u64).is_err());
        }

        #[test]
        fn arbitrary_bytes_are_no_seal_and_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..100), magic in any::<bool>()) {
            if magic && bytes.len() >= 8 { bytes[..4].copy_from_slice(MAGIC); bytes[5..8].fill(0); }
            let _ = Sealed::decode(&bytes, bytes.len() as u64);
        }
    }
}
