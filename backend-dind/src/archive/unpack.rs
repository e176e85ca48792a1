//! Reads tars that the engine made.

use std::io::{self, Read};

use bytes::{Buf as _, Bytes};
use futures::{StreamExt as _, stream::BoxStream};

use crate::engine::{EngineError, EngineErrorKind};

/// What a tar has beside the bytes of its one file: headers, padding, the end.
const OVERHEAD: u64 = 64 * 1024;

/// A stream as a reader, for a thread that may block. Must be made within a runtime.
pub(crate) struct StreamReader {
    runtime: tokio::runtime::Handle,
    stream: BoxStream<'static, Result<Bytes, EngineError>>,
    chunk: Bytes,
    /// Why it ended early. A reader's own error has no room for it.
    failure: Option<EngineError>,
}

impl StreamReader {
    pub(crate) fn new(stream: BoxStream<'static, Result<Bytes, EngineError>>) -> Self {
        Self { runtime: tokio::runtime::Handle::current(), stream, chunk: Bytes::new(), failure: None }
    }

    /// What the engine said, where reading failed because of it.
    pub(crate) fn take_failure(&mut self) -> Option<EngineError> {
        self.failure.take()
    }
}

impl Read for StreamReader {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() {
            match self.runtime.block_on(self.stream.next()) {
                Some(Ok(chunk)) => self.chunk = chunk,
                None => return Ok(0),
                Some(Err(error)) => {
                    let told = io::Error::other(error.to_string());
                    self.failure = Some(error);
                    return Err(told);
                }
            }
        }
        let count = to.len().min(self.chunk.len());
        self.chunk.copy_to_slice(&mut to[..count]);
        Ok(count)
    }
}

/// Reads the one file of a tar. `None`: it is not there, or it is no regular file.
///
/// # Errors
/// The engine's; `Malformed` where the file has more than `max_bytes`, or the tar ends early.
pub(crate) async fn read_file(
    mut stream: BoxStream<'static, Result<Bytes, EngineError>>,
    max_bytes: u64,
) -> Result<Option<Bytes>, EngineError> {
    let mut whole = Vec::new();
    while let Some(part) = stream.next().await {
        match part {
            Ok(part) => whole.extend_from_slice(&part),
            Err(error) if error.kind == EngineErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        }
        if whole.len() as u64 > max_bytes.saturating_add(OVERHEAD) {
            return Err(EngineError::malformed(format!("a file has more than {max_bytes} bytes")));
        }
    }
    let whole = Bytes::from(whole);
    let mut archive = tar::Archive::new(whole.as_ref());
    let entry = match archive.entries().map(|mut entries| entries.next()) {
        Ok(Some(Ok(entry))) if entry.header().entry_type().is_file() => entry,
        Ok(Some(Ok(_)) | None) => return Ok(None),
        Ok(Some(Err(error))) | Err(error) => return Err(EngineError::malformed(error)),
    };
    let start = usize::try_from(entry.raw_file_position()).unwrap_or(usize::MAX);
    let end = start.saturating_add(usize::try_from(entry.size()).unwrap_or(usize::MAX));
    if end > whole.len() {
        // The connection ended in the middle, and the end of the body was taken for the end of the tar.
        return Err(EngineError::unreachable("a tar ended in the middle of a file"));
    }
    Ok(Some(whole.slice(start..end)))
}

#[cfg(test)]
mod tests {
    use futures::stream;

    use super::{
        super::{Owner, Part, pack_small},
        *,
    };

    fn tar(bytes: &'static [u8]) -> Bytes {
        let part = Part::Bytes {
            path: "f".into(),
            owner: Owner::ROOT,
            mode: 0o600,
            bytes: Bytes::from_static(bytes),
        };
        pack_small(vec![part]).unwrap()
    }

    fn parts(bytes: &Bytes, size: usize) -> BoxStream<'static, Result<Bytes, EngineError>> {
        let parts: Vec<_> = bytes.chunks(size).map(|part| Ok(Bytes::copy_from_slice(part))).collect();
        stream::iter(parts).boxed()
    }

    #[tokio::test]
    async fn a_file_reads_back_however_it_comes() {
        let tar = tar(b"text");
        for size in [1, 511, 512, 10_000] {
            assert_eq!(read_file(parts(&tar, size), 4).await.unwrap().unwrap(), "text");
        }
    }

    #[tokio::test]
    async fn what_is_missing_cut_or_too_large_is_told() {
        let missing = EngineError { kind: EngineErrorKind::NotFound, source: "no".into() };
        assert!(read_file(stream::iter([Err(missing)]).boxed(), 4).await.unwrap().is_none());
        let cut = tar(b"text").slice(..514);
        assert!(read_file(parts(&cut, 100), 4).await.unwrap_err().is_outage());
        let large = Bytes::from(vec![0; 200_000]);
        assert_eq!(read_file(parts(&large, 1000), 4).await.unwrap_err().kind, EngineErrorKind::Malformed);
    }

    #[tokio::test]
    async fn a_reader_tells_why_it_ended() {
        let stream =
            stream::iter([Ok(Bytes::from_static(b"ab")), Err(EngineError::unreachable("gone"))]).boxed();
        let mut reader = StreamReader::new(stream);
        let read = move || {
            let mut all = Vec::new();
            assert!(reader.read_to_end(&mut all).is_err());
            (all, reader.take_failure().is_some_and(|error| error.is_outage()))
        };
        assert_eq!(tokio::task::spawn_blocking(read).await.unwrap(), (b"ab".to_vec(), true));
    }
}
