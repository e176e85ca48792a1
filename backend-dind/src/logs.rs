//! The log of an attempt, read from the shim's files through the engine: what no live copy brought.

use bytes::Bytes;
use runner_agent::exec::protocol::{SPOOL_FILE_BYTES, name};
use runner_core::log::{
    Frame,
    codec::{self, HEADER, MAX_PAYLOAD},
};

use crate::{
    archive::{StreamReader, read_file},
    engine::{Engine, EngineError, EngineErrorKind},
    names::RUN_DIR,
};

/// A file is closed by the frame that fills it.
const MAX_FILE_BYTES: u64 = SPOOL_FILE_BYTES + (HEADER + MAX_PAYLOAD) as u64;

/// Reads the files of one attempt's log. Holds one file's frames at most.
#[derive(Debug)]
pub(crate) struct LogFiles {
    container: String,
    /// Offset of the first frame of the file that holds the position, where that is known.
    file: Option<u64>,
}

/// What reading came to.
#[derive(Debug)]
pub(crate) enum Read {
    /// Frames from the position on.
    Frames(Vec<Frame>),
    /// There are no more now.
    Nothing,
    /// The files go on only behind the position, or what is at its place is no frame: nothing will come for it.
    Broken(String),
}

impl LogFiles {
    pub(crate) fn new(container: &str) -> Self {
        Self { container: container.to_owned(), file: None }
    }

    /// Reads on from `position`.
    ///
    /// # Errors
    /// The engine's. Reading again goes on where it was.
    pub(crate) async fn read(&mut self, engine: &Engine, position: u64) -> Result<Read, EngineError> {
        loop {
            let start = match self.file {
                Some(start) if start <= position => start,
                _ => match self.find(engine, position).await? {
                    Found::Nothing => return Ok(Read::Nothing),
                    Found::Later(offset) => {
                        return Ok(Read::Broken(format!(
                            "the log begins at {offset}, {position} was wanted"
                        )));
                    }
                    Found::File(start) => start,
                },
            };
            let path = format!("{RUN_DIR}/{}/{start:020}.seg", name::LOG);
            let Some(bytes) = read_file(engine.get(&self.container, &path), MAX_FILE_BYTES).await? else {
                // Released meanwhile, or the next one is not begun.
                let known = self.file.take().is_some();
                if known && self.find_is_later(engine, position).await? {
                    continue;
                }
                self.file = None;
                return Ok(Read::Nothing);
            };
            self.file = Some(start);
            let closed = bytes.len() as u64 >= SPOOL_FILE_BYTES;
            let Decoded { frames, end, fault } = decode(bytes, start, position);
            if !frames.is_empty() {
                if closed && fault.is_none() {
                    self.file = Some(end);
                }
                return Ok(Read::Frames(frames));
            }
            match fault {
                Some(fault) => return Ok(Read::Broken(fault)),
                None if closed && end > start => self.file = Some(end),
                None => return Ok(Read::Nothing),
            }
        }
    }

    /// Whether there is a file for the position after all.
    async fn find_is_later(&mut self, engine: &Engine, position: u64) -> Result<bool, EngineError> {
        match self.find(engine, position).await? {
            Found::File(start) => {
                self.file = Some(start);
                Ok(true)
            }
            Found::Nothing | Found::Later(_) => Ok(false),
        }
    }

    /// Finds the file that holds the position. The engine lists a directory only with all that is in it, so the files before
    /// are passed over; those before what was released are gone.
    async fn find(&self, engine: &Engine, position: u64) -> Result<Found, EngineError> {
        let stream = engine.get(&self.container, &format!("{RUN_DIR}/{}", name::LOG));
        let look = move || {
            let mut archive = tar::Archive::new(StreamReader::new(stream));
            let found = look(&mut archive, position);
            let failure = archive.into_inner().take_failure();
            match (found, failure) {
                (Ok(found), _) => Ok(found),
                (Err(_), Some(failure)) if failure.kind == EngineErrorKind::NotFound => Ok(Found::Nothing),
                (Err(_), Some(failure)) => Err(failure),
                (Err(error), None) => Err(EngineError::unreachable(error)),
            }
        };
        tokio::task::spawn_blocking(look).await.map_err(EngineError::unreachable)?
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    /// Starts at or before the position.
    File(u64),
    /// The first one starts behind the position.
    Later(u64),
}

fn look(archive: &mut tar::Archive<StreamReader>, position: u64) -> std::io::Result<Found> {
    // Entries come sorted, and names have a fixed length.
    let mut best = None;
    for entry in archive.entries()? {
        let entry = entry?;
        let path = entry.path()?;
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(start) = name.and_then(|name| name.strip_suffix(".seg")?.parse::<u64>().ok()) else {
            continue;
        };
        if start > position {
            return Ok(best.map_or(Found::Later(start), Found::File));
        }
        best = Some(start);
    }
    Ok(best.map_or(Found::Nothing, Found::File))
}

#[derive(Debug)]
struct Decoded {
    frames: Vec<Frame>,
    /// Offset of what follows the last whole frame.
    end: u64,
    fault: Option<String>,
}

fn decode(mut bytes: Bytes, start: u64, position: u64) -> Decoded {
    let (mut frames, mut end) = (Vec::new(), start);
    let fault = loop {
        match codec::decode(&mut bytes) {
            Ok(Some(frame)) if frame.offset == end => {
                end = frame.end();
                frames.extend(frame.from_offset(position));
            }
            Ok(Some(frame)) => {
                break Some(format!("a frame at {} came where {end} was expected", frame.offset));
            }
            // The half of a last frame: it is being written.
            Ok(None) => break None,
            Err(error) => break Some(format!("the file of offset {start}: {error}")),
        }
    };
    // What is good before a fault is delivered; the fault is met again by the next call.
    Decoded { frames, end, fault }
}

#[cfg(test)]
mod tests {
    use runner_core::{
        clock::Timestamp,
        log::{FrameBody, LogStream},
    };

    use super::*;

    fn file(start: u64, payloads: &[&'static [u8]]) -> (Vec<u8>, u64) {
        let (mut bytes, mut offset) = (Vec::new(), start);
        for payload in payloads {
            let body = FrameBody::Data { stream: LogStream::Stdout, bytes: Bytes::from_static(payload) };
            let frame = Frame { offset, time: Timestamp::default(), body };
            codec::encode(&frame, &mut bytes);
            offset = frame.end();
        }
        (bytes, offset)
    }

    #[test]
    fn frames_come_from_the_position_on_and_half_a_frame_is_waited_for() {
        let (bytes, end) = file(10, &[b"0123", b"4567", b"89"]);
        let whole = decode(bytes.clone().into(), 10, 12);
        assert_eq!(
            whole.frames.iter().map(|frame| (frame.offset, frame.span())).collect::<Vec<_>>(),
            [(12, 2), (14, 4), (18, 2)]
        );
        assert_eq!((whole.end, whole.fault), (end, None));
        let half = decode(Bytes::from(bytes[..bytes.len() - 1].to_vec()), 10, 10);
        assert_eq!((half.frames.len(), half.end, half.fault), (2, 18, None));
    }

    #[test]
    fn a_wrong_byte_is_told_after_what_is_good() {
        let (mut bytes, _) = file(0, &[b"0123", b"4567"]);
        *bytes.last_mut().unwrap() ^= 1;
        let decoded = decode(bytes.into(), 0, 0);
        assert_eq!((decoded.frames.len(), decoded.end), (1, 4));
        assert!(decoded.fault.is_some());
    }
}
