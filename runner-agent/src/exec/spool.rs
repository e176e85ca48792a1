//! Writes the log: frames straight into files, without a copy and without a byte lost silently.

use std::{
    fs::File,
    io::{self, IoSlice, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use runner_core::{
    clock::{Clock as _, SystemClock},
    log::{Frame, FrameBody, LogStream, codec},
};

use super::{
    link_out::SharedOut,
    protocol::{SPOOL_FILE_BYTES, name},
    reader::segment_path,
};

/// Dropped bytes are written down after this time at first; then after twice as long, and so on up to [`MAX_WAIT`], so
/// that a program that writes for ever does not fill the disk with notes of what was dropped.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const MAX_WAIT: Duration = Duration::from_secs(600);

/// The growing log of an attempt.
#[derive(Debug)]
pub(crate) struct Spool {
    log: PathBuf,
    limit: u64,
    file: Option<File>,
    file_bytes: u64,
    /// Offset of the end: every byte that the program wrote.
    end: u64,
    /// Data bytes that were written down.
    kept: u64,
    pending: Option<Dropped>,
    wait: Duration,
    dropped: u64,
    /// The first failure of the disk.
    failure: Option<String>,
    /// Gets a copy of every frame that was written.
    link: Option<SharedOut>,
}

/// Bytes that were dropped and are not written down as such: the ones before the end.
#[derive(Debug)]
struct Dropped {
    count: u64,
    why: Why,
    since: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    Limit,
    Disk,
}

impl Spool {
    /// Makes the directory of the spool, or takes the one that the backend has made to watch it.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn create(dir: &Path, limit: u64) -> io::Result<Self> {
        let log = dir.join(name::LOG);
        match std::fs::create_dir(&log) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            Ok(()) | Err(_) => {}
        }
        Ok(Self {
            log,
            limit,
            file: None,
            file_bytes: 0,
            end: 0,
            kept: 0,
            pending: None,
            wait: FIRST_WAIT,
            dropped: 0,
            failure: None,
            link: None,
        })
    }

    /// Copies every frame from now on.
    pub(crate) fn copy_to(&mut self, link: Option<SharedOut>) {
        self.link = link;
    }

    /// Takes bytes that the program wrote. They are kept, or counted as dropped; the program is never held back for
    /// either.
    pub(crate) fn append(&mut self, clock: &SystemClock, stream: LogStream, bytes: &[u8]) {
        let room = usize::try_from(self.limit.saturating_sub(self.kept)).unwrap_or(usize::MAX);
        let (keep, excess) = bytes.split_at(bytes.len().min(room));
        // Frames are contiguous: what was dropped before must be written down before.
        if !keep.is_empty() {
            if self.flush_dropped(clock).is_ok() && self.write_data(clock, stream, keep).is_ok() {
                self.end += keep.len() as u64;
                self.kept += keep.len() as u64;
            } else {
                self.drop_bytes(clock, keep.len() as u64, Why::Disk);
            }
        }
        if !excess.is_empty() {
            self.drop_bytes(clock, excess.len() as u64, Why::Limit);
        }
    }

    fn drop_bytes(&mut self, clock: &SystemClock, count: u64, why: Why) {
        if self.pending.as_ref().is_some_and(|pending| pending.why != why) {
            // Where this fails, the old reason covers the new bytes too.
            let _ = self.flush_dropped(clock);
        }
        let pending = self.pending.get_or_insert(Dropped { count: 0, why, since: clock.monotonic() });
        pending.count += count;
        self.end += count;
        self.dropped += count;
    }

    /// When [`tick`](Self::tick) has something to do, on the monotonic clock.
    pub(crate) fn next_tick(&self) -> Option<Duration> {
        self.pending.as_ref().map(|pending| pending.since + self.wait)
    }

    /// Writes down what was dropped, where it is time.
    pub(crate) fn tick(&mut self, clock: &SystemClock) {
        if self.next_tick().is_some_and(|at| at <= clock.monotonic()) {
            self.wait = (self.wait * 2).min(MAX_WAIT);
            if self.flush_dropped(clock).is_err()
                && let Some(pending) = &mut self.pending
            {
                pending.since = clock.monotonic();
            }
        }
    }

    /// Writes down what is not. Returns what a person should know of the log; the last bytes may be missing from it where
    /// the disk is still full, which is said too.
    pub(crate) fn finish(&mut self, clock: &SystemClock) -> Vec<String> {
        let mut notes = Vec::new();
        let missing = match self.flush_dropped(clock) {
            Ok(()) => 0,
            Err(_) => self.pending.as_ref().map_or(0, |pending| pending.count),
        };
        if self.dropped > 0 {
            notes.push(format!("{} of {} log bytes were dropped", self.dropped, self.end));
        }
        if missing > 0 {
            notes.push(format!("the last {missing} bytes were dropped and the spool does not say so"));
        }
        if let Some(failure) = &self.failure {
            notes.push(format!("writing the log failed: {failure}"));
        }
        notes
    }

    /// Whether the disk has ever refused to take something.
    pub(crate) fn has_failed(&self) -> bool {
        self.failure.is_some()
    }

    /// Every byte that the program wrote, kept or dropped.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    fn write_data(&mut self, clock: &SystemClock, stream: LogStream, bytes: &[u8]) -> io::Result<()> {
        let header = codec::data_header(stream, self.end, clock.now(), bytes);
        self.write_frame(self.end, &header, bytes)
    }

    fn flush_dropped(&mut self, clock: &SystemClock) -> io::Result<()> {
        let Some(pending) = &self.pending else { return Ok(()) };
        let reason = match pending.why {
            Why::Limit => format!("log limit of {} bytes", self.limit),
            Why::Disk => "the disk of the log took no more".to_owned(),
        };
        let offset = self.end - pending.count;
        let body = FrameBody::Truncated { dropped: pending.count, reason };
        let mut bytes = Vec::new();
        codec::encode(&Frame { offset, time: clock.now(), body }, &mut bytes);
        self.write_frame(offset, &bytes, &[])?;
        self.pending = None;
        Ok(())
    }

    /// Writes a frame whole, or leaves the file as it was.
    fn write_frame(&mut self, offset: u64, header: &[u8], payload: &[u8]) -> io::Result<()> {
        let result = self.try_write(offset, header, payload);
        if let (Ok(()), Some(link)) = (&result, &self.link) {
            link.borrow_mut().frame(header, payload);
        }
        if let Err(error) = &result {
            self.failure.get_or_insert_with(|| error.to_string());
            if let Some(file) = &mut self.file {
                // The half of a frame is taken back. The file's place for writing moves with it: it is open for appending.
                let _ = file.set_len(self.file_bytes);
            }
        }
        result
    }

    fn try_write(&mut self, offset: u64, header: &[u8], payload: &[u8]) -> io::Result<()> {
        if self.file_bytes >= SPOOL_FILE_BYTES {
            self.file = None;
        }
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                self.file_bytes = 0;
                let path = segment_path(&self.log, offset);
                none.insert(File::options().append(true).create_new(true).open(path)?)
            }
        };
        let total = header.len() + payload.len();
        let mut done = 0;
        while done < total {
            let written = if done < header.len() {
                file.write_vectored(&[IoSlice::new(&header[done..]), IoSlice::new(payload)])
            } else {
                file.write(&payload[done - header.len()..])
            };
            match written {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.file_bytes += total as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{super::reader::SpoolReader, *};

    fn all(reader: &mut SpoolReader) -> Vec<Frame> {
        let mut frames = Vec::new();
        loop {
            let more = reader.read().unwrap();
            if more.is_empty() {
                return frames;
            }
            frames.extend(more);
        }
    }

    fn bytes(frames: &[Frame]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for frame in frames {
            match &frame.body {
                FrameBody::Data { bytes: data, .. } => bytes.extend_from_slice(data),
                FrameBody::Truncated { .. } => panic!("{frame:?}"),
            }
        }
        bytes
    }

    #[test]
    fn what_is_written_reads_back_from_every_offset_over_many_files_while_it_grows() {
        let dir = tempfile::tempdir().unwrap();
        let clock = SystemClock::new();
        let mut early = SpoolReader::open(dir.path(), 0);
        assert!(early.read().unwrap().is_empty());
        let mut spool = Spool::create(dir.path(), u64::MAX).unwrap();
        let mut expected = Vec::new();
        let mut seen = Vec::new();
        for round in 0..400_u32 {
            let chunk: Vec<u8> =
                (0..64 * 1024_u32).map(|byte| (byte.wrapping_mul(31) + round) as u8).collect();
            spool.append(&clock, LogStream::Stdout, &chunk);
            expected.extend_from_slice(&chunk);
            if round % 7 == 0 {
                seen.extend(all(&mut early));
            }
        }
        seen.extend(all(&mut early));
        assert!(bytes(&seen) == expected);
        assert!(std::fs::read_dir(dir.path().join(name::LOG)).unwrap().count() >= 3);
        for offset in [0, 1, 65_535, 65_536, 9_000_001, expected.len() - 1, expected.len()] {
            let frames = all(&mut SpoolReader::open(dir.path(), offset as u64));
            assert!(bytes(&frames) == expected[offset..], "{offset}");
        }
        // Releasing keeps what is after the offset, and the last file.
        assert!(early.release(9_000_000).unwrap() > 0);
        assert!(bytes(&all(&mut SpoolReader::open(dir.path(), 9_000_000))) == expected[9_000_000..]);
        assert!(matches!(
            SpoolReader::open(dir.path(), 0).read(),
            Err(super::super::reader::SpoolError::Gap { .. })
        ));
    }

    #[test]
    fn the_half_of_a_last_frame_is_waited_for_and_a_wrong_byte_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let clock = SystemClock::new();
        let mut spool = Spool::create(dir.path(), u64::MAX).unwrap();
        spool.append(&clock, LogStream::Stderr, b"one");
        spool.append(&clock, LogStream::Stderr, b"two");
        let path = segment_path(&dir.path().join(name::LOG), 0);
        let whole = std::fs::read(&path).unwrap();
        let mut reader = SpoolReader::open(dir.path(), 0);
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert_eq!(bytes(&all(&mut reader)), b"one");
        std::fs::write(&path, &whole).unwrap();
        assert_eq!(bytes(&all(&mut reader)), b"two");
        let mut wrong = whole.clone();
        *wrong.last_mut().unwrap() ^= 1;
        std::fs::write(&path, &wrong).unwrap();
        let mut reader = SpoolReader::open(dir.path(), 0);
        assert_eq!(bytes(&reader.read().unwrap()), b"one");
        assert!(matches!(reader.read(), Err(super::super::reader::SpoolError::Corrupt { .. })));
    }

    #[test]
    fn bytes_beyond_the_limit_become_one_frame_that_covers_them() {
        let dir = tempfile::tempdir().unwrap();
        let clock = SystemClock::new();
        let mut spool = Spool::create(dir.path(), 5).unwrap();
        spool.append(&clock, LogStream::Stdout, b"abc");
        spool.append(&clock, LogStream::Stdout, b"defg");
        spool.append(&clock, LogStream::Stderr, b"hij");
        assert_eq!(spool.finish(&clock), ["5 of 10 log bytes were dropped"]);
        let frames = all(&mut SpoolReader::open(dir.path(), 0));
        assert_eq!(bytes(&frames[..2]), b"abcde");
        assert!(
            matches!(&frames[2].body, FrameBody::Truncated { dropped: 5, reason } if reason.contains("limit"))
        );
        assert_eq!((frames.len(), frames[2].offset), (3, 5));
    }

    #[test]
    fn a_disk_that_takes_no_more_is_said_and_the_log_goes_on_when_it_does() {
        let dir = tempfile::tempdir().unwrap();
        let clock = SystemClock::new();
        let mut spool = Spool::create(dir.path(), u64::MAX).unwrap();
        spool.append(&clock, LogStream::Stdout, b"before");
        // A device that is always full stands for the disk.
        let good = spool.file.replace(File::options().append(true).open("/dev/full").unwrap());
        spool.append(&clock, LogStream::Stdout, b"lost");
        spool.append(&clock, LogStream::Stderr, b"lost too");
        spool.file = good;
        spool.append(&clock, LogStream::Stdout, b"after");
        assert!(spool.finish(&clock).iter().any(|note| note.contains("failed")));
        let frames = all(&mut SpoolReader::open(dir.path(), 0));
        assert_eq!(frames.len(), 3);
        assert!(matches!(&frames[1].body, FrameBody::Truncated { dropped: 12, .. }));
        assert_eq!((frames[1].offset, frames[2].offset), (6, 18));
        assert_eq!(bytes(&frames[2..]), b"after");
    }
}
