//! Objects in whatever store a URL names.

use std::{
    error::Error as _,
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::{
    StreamExt as _, TryStreamExt as _,
    stream::{self, BoxStream},
};
use object_store::{
    GetOptions, GetRange, MultipartUpload, ObjectStore, ObjectStoreExt as _, PutPayload,
    path::Path as ObjectPath,
};
use runner_core::{
    artifact::{
        ArtifactError, ArtifactErrorKind, ArtifactKey, ArtifactMeta, ArtifactStore, ByteStream, read_small,
    },
    task::{TaskKind, spawn},
};

use crate::directory::{DirectoryArtifacts, kind_of};

/// Opens the store that `url` names: a path, or `file:///path`. Blocks for a directory.
///
/// # Errors
/// `Other` where the URL is none or names a store that this build does not know; else the store's error.
pub fn open_url(url: &str) -> Result<Arc<dyn ArtifactStore>, ArtifactError> {
    let refused = |why: &str| {
        ArtifactError::new(ArtifactErrorKind::Other, format!("open the object store {url:?}: {why}"))
    };
    let path = match url.split_once("://") {
        None if url.is_empty() => return Err(refused("it is empty")),
        None => PathBuf::from(url),
        Some(("file", rest)) => {
            let path = rest.strip_prefix("localhost").unwrap_or(rest);
            if !path.starts_with('/') {
                return Err(refused("a file URL has three slashes: file:///path"));
            }
            let path = percent_encoding::percent_decode_str(path)
                .decode_utf8()
                .map_err(|_| refused("its path is not UTF-8"))?;
            PathBuf::from(path.as_ref())
        }
        Some((scheme, _)) => {
            return Err(refused(&format!("this build knows file:///path and plain paths, not {scheme}")));
        }
    };
    Ok(Arc::new(DirectoryArtifacts::open(Path::new(&path))?))
}

/// An object store behind the `object_store` crate.
///
/// Small objects go in one request, larger ones in parts, one part in memory at a time. An upload that fails, or whose
/// future is dropped, is aborted.
#[derive(Debug, Clone)]
pub struct ObjectArtifacts {
    store: Arc<dyn ObjectStore>,
}

const MIB: usize = 1024 * 1024;

/// Size of part `number`, from 0. Stores take 10,000 parts of at least 5 MiB: these sizes reach 1.3 TiB.
const fn part_bytes(number: usize) -> usize {
    match number {
        0..1000 => 8 * MIB,
        1000..5000 => 32 * MIB,
        _ => 256 * MIB,
    }
}

impl ObjectArtifacts {
    /// Wraps a store. Its own client retries single requests.
    pub fn new(store: Arc<dyn ObjectStore>) -> Self {
        Self { store }
    }
}

#[async_trait]
impl ArtifactStore for ObjectArtifacts {
    async fn put(&self, key: &ArtifactKey, bytes: ByteStream) -> Result<u64, ArtifactError> {
        let failed = |error| mapped(error, format!("store {key}"));
        let path = object_path(key)?;
        let mut parts = Parts { bytes, left: Bytes::new(), ended: false };
        let first = parts.next(part_bytes(0)).await?;
        let mut size = first.len() as u64;
        if parts.ended {
            self.store.put(&path, first.into()).await.map_err(failed)?;
            return Ok(size);
        }
        let mut upload = Upload { inner: Some(self.store.put_multipart(&path).await.map_err(failed)?) };
        match upload.run(first, &mut parts, &mut size).await {
            Ok(()) => Ok(size),
            Err(error) => {
                upload.abort().await;
                Err(match error {
                    UploadError::Source(error) => error,
                    UploadError::Store(error) => failed(error),
                })
            }
        }
    }

    async fn put_bytes(&self, key: &ArtifactKey, bytes: Bytes) -> Result<(), ArtifactError> {
        let failed = |error| mapped(error, format!("store {key}"));
        self.store.put(&object_path(key)?, bytes.into()).await.map(drop).map_err(failed)
    }

    async fn get(
        &self,
        key: &ArtifactKey,
        range: Range<u64>,
    ) -> Result<(ArtifactMeta, ByteStream), ArtifactError> {
        let context = format!("read {key}");
        let path = object_path(key)?;
        let failed = |error| mapped(error, context.clone());
        let all = range.start == 0 && range.end == u64::MAX;
        if !all {
            // Stores answer a range that begins at or behind the end with an error that cannot be told from others, and
            // one that is empty not at all.
            let size = self.store.head(&path).await.map_err(failed)?.size;
            if range.start >= size || range.start >= range.end {
                return Ok((ArtifactMeta { key: key.clone(), size }, stream::empty().boxed()));
            }
        }
        let range = (!all).then_some(GetRange::Bounded(range));
        let options = GetOptions { range, ..GetOptions::default() };
        let result = self.store.get_opts(&path, options).await.map_err(failed)?;
        let meta = ArtifactMeta { key: key.clone(), size: result.meta.size };
        let bytes = result.into_stream().map_err(move |error| mapped(error, context.clone()));
        // A store may yield an object in one piece; whoever takes the stream counts on small ones.
        let bytes = bytes.map_ok(|chunk| {
            let cuts = (0..chunk.len()).step_by(MIB);
            stream::iter(cuts.map(move |at| Ok(chunk.slice(at..chunk.len().min(at + MIB)))))
        });
        Ok((meta, bytes.try_flatten().boxed()))
    }

    async fn head(&self, key: &ArtifactKey) -> Result<ArtifactMeta, ArtifactError> {
        let failed = |error| mapped(error, format!("look up {key}"));
        let size = self.store.head(&object_path(key)?).await.map_err(failed)?.size;
        Ok(ArtifactMeta { key: key.clone(), size })
    }

    fn list(&self, prefix: &ArtifactKey) -> BoxStream<'static, Result<ArtifactMeta, ArtifactError>> {
        let path = match object_path(prefix) {
            Ok(path) => path,
            Err(error) => return stream::iter([Err(error)]).boxed(),
        };
        let context = format!("list {prefix}");
        self.store
            .list(Some(&path))
            .filter_map(move |found| {
                let found = match found {
                    // What is no key was not put there by us.
                    Ok(meta) => meta
                        .location
                        .as_ref()
                        .parse()
                        .ok()
                        .map(|key| Ok(ArtifactMeta { key, size: meta.size })),
                    Err(error) => Some(Err(mapped(error, context.clone()))),
                };
                std::future::ready(found)
            })
            .boxed()
    }

    async fn delete(&self, key: &ArtifactKey) -> Result<(), ArtifactError> {
        match self.store.delete(&object_path(key)?).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(mapped(error, format!("delete {key}"))),
        }
    }

    async fn probe(&self) -> Result<(), ArtifactError> {
        probe(self).await
    }
}

/// Writes, reads and removes an object. Two probes at once do not meet.
pub(crate) async fn probe(store: &dyn ArtifactStore) -> Result<(), ArtifactError> {
    static PROBES: AtomicU64 = AtomicU64::new(0);
    let name = format!("probes/{}-{}", std::process::id(), PROBES.fetch_add(1, Ordering::Relaxed));
    let key: ArtifactKey = name
        .parse()
        .map_err(|error| ArtifactError::with_source(ArtifactErrorKind::Other, "name a probe", error))?;
    let bytes = Bytes::from_static(b"probe");
    store.put_bytes(&key, bytes.clone()).await?;
    let read = read_small(store, &key, bytes.len() as u64).await;
    store.delete(&key).await?;
    if read? == bytes {
        Ok(())
    } else {
        Err(ArtifactError::new(ArtifactErrorKind::Mismatch, "read a probe: it is not what was written"))
    }
}

/// A stream of bytes, cut into parts of chosen sizes.
struct Parts {
    bytes: ByteStream,
    left: Bytes,
    ended: bool,
}

impl Parts {
    /// The next `size` bytes; fewer, and `ended`, at the end.
    async fn next(&mut self, size: usize) -> Result<Bytes, ArtifactError> {
        let mut part = BytesMut::new();
        loop {
            let take = self.left.len().min(size - part.len());
            part.extend_from_slice(&self.left.split_to(take));
            if part.len() == size {
                return Ok(part.freeze());
            }
            match self.bytes.try_next().await? {
                Some(chunk) => self.left = chunk,
                None => {
                    self.ended = true;
                    return Ok(part.freeze());
                }
            }
        }
    }
}

/// An upload in parts. Dropping it before it is complete aborts it.
struct Upload {
    inner: Option<Box<dyn MultipartUpload>>,
}

enum UploadError {
    Source(ArtifactError),
    Store(object_store::Error),
}

impl Upload {
    /// Sends `first` and everything that follows it, and completes.
    async fn run(&mut self, first: Bytes, parts: &mut Parts, size: &mut u64) -> Result<(), UploadError> {
        let Some(upload) = &mut self.inner else { return Ok(()) };
        let mut part = first;
        let mut number = 0;
        while !part.is_empty() {
            upload.put_part(PutPayload::from(part)).await.map_err(UploadError::Store)?;
            if parts.ended {
                break;
            }
            number += 1;
            part = parts.next(part_bytes(number)).await.map_err(UploadError::Source)?;
            *size += part.len() as u64;
        }
        upload.complete().await.map_err(UploadError::Store)?;
        self.inner = None;
        Ok(())
    }

    async fn abort(&mut self) {
        if let Some(mut upload) = self.inner.take() {
            abort(&mut *upload).await;
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Some(mut upload) = self.inner.take() else { return };
        // A destructor cannot wait. Without a runtime, the store's own rule for abandoned uploads remains.
        if tokio::runtime::Handle::try_current().is_ok() {
            spawn(TaskKind::Helper, "abort-upload", async move { abort(&mut *upload).await });
        }
    }
}

async fn abort(upload: &mut dyn MultipartUpload) {
    if let Err(error) = upload.abort().await {
        tracing::warn!(error = %error, "an upload could not be aborted; the store's rule for abandoned ones remains");
    }
}

fn object_path(key: &ArtifactKey) -> Result<ObjectPath, ArtifactError> {
    // `parse`, not `from`: the key is kept as it is, without an encoding of the crate's own.
    ObjectPath::parse(key.as_str())
        .map_err(|error| ArtifactError::with_source(ArtifactErrorKind::Other, format!("name {key}"), error))
}

fn mapped(error: object_store::Error, context: String) -> ArtifactError {
    use object_store::Error;
    let kind = match &error {
        Error::NotFound { .. } => ArtifactErrorKind::NotFound,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => ArtifactErrorKind::Denied,
        Error::JoinError { .. } => ArtifactErrorKind::Unavailable,
        Error::InvalidPath { .. }
        | Error::NotSupported { .. }
        | Error::NotImplemented { .. }
        | Error::AlreadyExists { .. }
        | Error::Precondition { .. }
        | Error::NotModified { .. }
        | Error::UnknownConfigurationKey { .. } => ArtifactErrorKind::Other,
        // Generic: whatever its client gave up on after its retries. The crate marks its enum as open.
        _ => io_below(&error).map_or(ArtifactErrorKind::Unavailable, kind_of),
    };
    ArtifactError::with_source(kind, context, error)
}

/// The I/O error at the bottom, if there is one.
fn io_below(error: &object_store::Error) -> Option<&io::Error> {
    let mut below = error.source();
    while let Some(error) = below {
        if let Some(found) = error.downcast_ref::<io::Error>() {
            return Some(found);
        }
        below = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_file_urls_name_a_directory_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a b");
        let text = path.to_str().unwrap();
        for url in [text.to_owned(), format!("file://{}", text.replace(' ', "%20"))] {
            assert!(open_url(&url).is_ok(), "{url}");
            assert!(path.join("objects").is_dir());
        }
        for bad in ["", "file://host/x", "file://x", "s3://bucket", "ftp://x/y"] {
            let error = open_url(bad).map(drop).unwrap_err();
            assert_eq!(error.kind, ArtifactErrorKind::Other, "{bad}");
        }
    }

    #[test]
    fn parts_reach_past_the_largest_output() {
        let total: u64 = (0..10_000).map(|number| part_bytes(number) as u64).sum();
        assert!(total > 1 << 40);
    }
}
