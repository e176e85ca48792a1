//! `PUT`: exact, verified while it streams, visible only when it is whole.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use axum::body::Body;
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use http::{Response, StatusCode};
use http_body::Body as _;
use runner_artifacts::blob::BlobGrant;
use runner_core::artifact::{ArtifactError, ArtifactErrorKind, ArtifactKey, ArtifactStore, ByteStream};
use sha2::{Digest as _, Sha256};

use super::{Blobs, answer::Failure, record};

/// The right to write a key, in this process.
pub(super) struct Writing {
    keys: Arc<Mutex<HashSet<ArtifactKey>>>,
    key: ArtifactKey,
}

impl Writing {
    pub(super) fn begin(keys: &Arc<Mutex<HashSet<ArtifactKey>>>, key: &ArtifactKey) -> Option<Self> {
        let fresh = keys.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone());
        fresh.then(|| Self { keys: Arc::clone(keys), key: key.clone() })
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

/// What came, or why it is not taken. Set once.
type Verdict = Arc<OnceLock<Result<record::Digest, Failure>>>;

struct Incoming {
    body: axum::body::BodyDataStream,
    hash: Sha256,
    size: u64,
    promised: BlobGrant,
    most: u64,
    pause: Duration,
    verdict: Verdict,
}

impl Incoming {
    /// The next chunk; `None` at the end, when everything that was promised has come.
    async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        match tokio::time::timeout(self.pause, self.body.next()).await {
            Err(_) => Err(Failure::TooSlow),
            Ok(Some(Err(_))) => Err(Failure::Aborted),
            Ok(Some(Ok(chunk))) => {
                self.size += chunk.len() as u64;
                match self.promised.size {
                    Some(promised) if self.size > promised => {
                        return Err(Failure::SizeMismatch { promised, got: "more".to_owned() });
                    }
                    None if self.size > self.most => return Err(Failure::TooLarge(self.most)),
                    _ => {}
                }
                self.hash.update(&chunk);
                Ok(Some(chunk))
            }
            Ok(None) => {
                let digest = record::Digest {
                    size: self.size,
                    sha256: hex::encode(std::mem::take(&mut self.hash).finalize()),
                };
                match (self.promised.size, &self.promised.sha256) {
                    (Some(promised), _) if promised != self.size => {
                        Err(Failure::SizeMismatch { promised, got: self.size.to_string() })
                    }
                    (_, Some(sha256)) if *sha256 != digest.sha256 => Err(Failure::DigestMismatch),
                    _ => {
                        let _ = self.verdict.set(Ok(digest));
                        Ok(None)
                    }
                }
            }
        }
    }

    /// As the store takes it. A failure makes the store forget what it has; the verdict says why.
    fn into_stream(self) -> ByteStream {
        stream::try_unfold(self, |mut incoming| async move {
            match incoming.next().await {
                Ok(chunk) => Ok(chunk.map(|chunk| (chunk, incoming))),
                Err(failure) => {
                    let _ = incoming.verdict.set(Err(failure));
                    Err(ArtifactError::new(
                        ArtifactErrorKind::Mismatch,
                        "the upload is not what was promised",
                    ))
                }
            }
        })
        .boxed()
    }
}

pub(super) async fn put(blobs: &Blobs, grant: BlobGrant, body: Body) -> Result<Response<Body>, Failure> {
    // Said before the first byte, where the client said how much there is.
    if let (Some(promised), Some(announced)) = (grant.size, body.size_hint().exact())
        && promised != announced
    {
        return Err(Failure::SizeMismatch { promised, got: announced.to_string() });
    }
    let _writing = Writing::begin(&blobs.writing, &grant.key).ok_or(Failure::Busy)?;
    let metrics = Arc::clone(&blobs.metrics);
    let counted = body.into_data_stream();
    let counted = counted.inspect_ok(move |chunk| metrics.blob_bytes("in", chunk.len() as u64));
    store(blobs, grant, Body::from_stream(counted)).await?;
    Ok(stored())
}

/// The answer to an upload that is whole and stored.
pub(super) fn stored() -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::OK;
    response
}

/// Stores a body, which must be what was promised. Who calls holds the right to write the key.
pub(super) async fn store(blobs: &Blobs, grant: BlobGrant, body: Body) -> Result<(), Failure> {
    let key = grant.key.clone();
    let verdict = Verdict::default();
    let incoming = Incoming {
        body: body.into_data_stream(),
        hash: Sha256::new(),
        size: 0,
        promised: grant,
        most: blobs.max_upload_bytes,
        pause: blobs.read_timeout,
        verdict: Arc::clone(&verdict),
    };
    let bytes = incoming.into_stream();
    let store = blobs.store.as_ref();
    match record::beside(&key) {
        Some(sidecar) => match store.head(&key).await {
            Ok(_) => same_again(store, &key, bytes, &verdict).await?,
            Err(error) if error.kind == ArtifactErrorKind::NotFound => {
                let digest = write(store, &key, bytes, &verdict).await?;
                record::write(store, &sidecar, &digest).await.map_err(|error| Failure::store(&error))?;
            }
            Err(error) => return Err(Failure::store(&error)),
        },
        None => {
            write(store, &key, bytes, &verdict).await?;
        }
    }
    Ok(())
}

async fn write(
    store: &dyn ArtifactStore,
    key: &ArtifactKey,
    bytes: ByteStream,
    verdict: &Verdict,
) -> Result<record::Digest, Failure> {
    match (store.put(key, bytes).await, verdict.get()) {
        (Ok(_), Some(Ok(digest))) => Ok(digest.clone()),
        (Err(_), Some(Err(failure))) => Err(failure.clone()),
        (Err(error), _) => Err(Failure::store(&error)),
        (Ok(_), _) => {
            tracing::error!(%key, "the object store took an upload without reading it to its end");
            Err(Failure::Internal)
        }
    }
}

/// Reads a body that is there already, and says whether it is the same.
async fn same_again(
    store: &dyn ArtifactStore,
    key: &ArtifactKey,
    mut bytes: ByteStream,
    verdict: &Verdict,
) -> Result<(), Failure> {
    while let Some(chunk) = bytes.next().await {
        if let Err(error) = chunk {
            return Err(match verdict.get() {
                Some(Err(failure)) => failure.clone(),
                _ => Failure::store(&error),
            });
        }
    }
    let stored = record::of(store, key).await.map_err(|error| Failure::store(&error))?;
    match verdict.get() {
        Some(Ok(digest)) if *digest == stored => Ok(()),
        _ => Err(Failure::Exists),
    }
}
