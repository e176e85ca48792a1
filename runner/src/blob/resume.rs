//! `PUT` with `Content-Range`: an upload that goes on where it broke off.
//!
//! - `Content-Range: bytes */SIZE`, without a body: how much has come?
//! - `Content-Range: bytes FIRST-LAST/SIZE`: bytes that follow those that have come.
//!
//! `308` says that more is wanted; its `Range: bytes=0-LAST` says what has come, and nothing has where it is absent. Bytes that
//! do not follow are not taken, and answered so too. Of a body that breaks off, what came is kept. `200`: the object is stored.

use std::{io, sync::Arc};

use axum::body::Body;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use http::{HeaderValue, Response, StatusCode, header};
use http_body::Body as _;
use runner_artifacts::blob::BlobGrant;
use runner_core::{
    artifact::ArtifactErrorKind,
    task::{self, TaskKind},
};

use super::{
    Blobs,
    answer::Failure,
    put::{self, Writing},
    record,
    spool::{Promised, Spool},
};

/// Read from the disk at once, in bytes.
const CHUNK: usize = 256 << 10;

/// What a `Content-Range` of a request says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Offered {
    /// Nothing; it asks.
    Nothing { size: u64 },
    /// So many bytes from `first` on.
    Bytes { first: u64, bytes: u64, size: u64 },
}

impl Offered {
    fn parse(text: &str) -> Option<Self> {
        let number =
            |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten();
        let (range, size) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
        let size: u64 = number(size)?;
        if range == "*" {
            return Some(Self::Nothing { size });
        }
        let (first, last) = range.split_once('-')?;
        let (first, last): (u64, u64) = (number(first)?, number(last)?);
        (first <= last && last < size).then(|| Self::Bytes { first, bytes: last - first + 1, size })
    }

    const fn size(self) -> u64 {
        match self {
            Self::Nothing { size } | Self::Bytes { size, .. } => size,
        }
    }
}

/// Does something on the spool.
async fn blocking<T: Send + 'static>(
    blobs: &Blobs,
    promised: &Promised,
    work: impl FnOnce(&Spool, &Promised) -> io::Result<T> + Send + 'static,
) -> Result<T, Failure> {
    let (spool, promised) = (Arc::clone(&blobs.spool), promised.clone());
    match tokio::task::spawn_blocking(move || work(&spool, &promised)).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) if error.kind() == io::ErrorKind::StorageFull => Err(Failure::NotResumable),
        Ok(Err(error)) => {
            tracing::error!(%error, "what has come of an upload cannot be kept");
            Err(Failure::Internal)
        }
        Err(_) => Err(Failure::Internal),
    }
}

pub(super) async fn put(
    blobs: &Blobs,
    grant: BlobGrant,
    range: &HeaderValue,
    body: Body,
) -> Result<Response<Body>, Failure> {
    let offered = range.to_str().ok().and_then(Offered::parse).ok_or_else(|| {
        Failure::Malformed("Content-Range must be `bytes FIRST-LAST/SIZE` or `bytes */SIZE`".to_owned())
    })?;
    let promised = Promised::of(&grant).ok_or(Failure::NotResumable)?;
    if offered.size() != promised.size {
        return Err(Failure::SizeMismatch { promised: promised.size, got: offered.size().to_string() });
    }
    let writing = Writing::begin(&blobs.writing, &grant.key).ok_or(Failure::Busy)?;
    if stored(blobs, &grant, &promised).await? {
        return Ok(put::stored());
    }
    let mut have = blocking(blobs, &promised, Spool::offset).await?;
    if let Offered::Bytes { first, bytes, .. } = offered
        && have < promised.size
        && first == have
    {
        if body.size_hint().exact().is_some_and(|announced| announced != bytes) {
            return Err(Failure::SizeMismatch { promised: bytes, got: "another number".to_owned() });
        }
        if !blobs.spool.admit(&promised) {
            return Err(Failure::NotResumable);
        }
        take(blobs, &promised, bytes, body).await?;
        have = blocking(blobs, &promised, Spool::offset).await?;
    }
    if have < promised.size {
        return Ok(more_is_wanted(have));
    }
    // Goes on where the client does not wait for it: it asks again, and is told.
    let finishing = finish(blobs.clone(), grant, promised, writing);
    match task::spawn(TaskKind::Call, "store-upload", finishing).await {
        Ok(Some(answer)) => answer,
        Ok(None) => Err(Failure::Internal),
        Err(_) => Err(Failure::ShuttingDown),
    }
}

/// Whether the object is there, as it was promised.
async fn stored(blobs: &Blobs, grant: &BlobGrant, promised: &Promised) -> Result<bool, Failure> {
    match record::of(blobs.store.as_ref(), &grant.key).await {
        Ok(digest) if Some(&digest.sha256) == grant.sha256.as_ref() => {
            // The answer of the request that stored it was lost.
            blocking(blobs, promised, Spool::forget).await?;
            Ok(true)
        }
        // Uploads are stored once; anything else is replaced, as by any other `PUT`.
        Ok(_) if record::beside(&grant.key).is_some() => Err(Failure::Exists),
        Ok(_) => Ok(false),
        Err(error) if error.kind == ArtifactErrorKind::NotFound => Ok(false),
        Err(error) => Err(Failure::store(&error)),
    }
}

/// Keeps at most `bytes` bytes of a body; also where it breaks off.
async fn take(blobs: &Blobs, promised: &Promised, bytes: u64, body: Body) -> Result<(), Failure> {
    let kept = keep(blobs, promised, bytes, body).await;
    if kept == Err(Failure::NotResumable) {
        // The disk is full. What has come of it is worth less than the room.
        blocking(blobs, promised, Spool::forget).await?;
    }
    kept
}

async fn keep(blobs: &Blobs, promised: &Promised, bytes: u64, body: Body) -> Result<(), Failure> {
    let mut file = blocking(blobs, promised, Spool::append).await?;
    let mut body = body.into_data_stream();
    let mut left = bytes;
    while left > 0 {
        let chunk = match tokio::time::timeout(blobs.read_timeout, body.next()).await {
            Err(_) => return Err(Failure::TooSlow),
            Ok(Some(Err(_))) => return Err(Failure::Aborted),
            Ok(None) => {
                return Err(Failure::SizeMismatch { promised: bytes, got: (bytes - left).to_string() });
            }
            Ok(Some(Ok(chunk))) => chunk,
        };
        let length = chunk.len() as u64;
        if length > left {
            return Err(Failure::SizeMismatch { promised: bytes, got: "more".to_owned() });
        }
        left -= length;
        file = blocking(blobs, promised, move |_, _| file.write(&chunk).map(|()| file)).await?;
        blobs.metrics.blob_bytes("in", length);
    }
    Ok(())
}

/// Everything has come: it is read again, checked and stored, as if it came in one piece.
async fn finish(
    blobs: Blobs,
    grant: BlobGrant,
    promised: Promised,
    _writing: Writing,
) -> Result<Response<Body>, Failure> {
    let file = blocking(&blobs, &promised, Spool::read).await?;
    let body = Body::from_stream(chunks(file));
    match put::store(&blobs, grant, body).await {
        Ok(()) => {
            blocking(&blobs, &promised, Spool::forget).await?;
            Ok(put::stored())
        }
        // These bytes will never be what was promised, so the client begins anew.
        Err(failure @ (Failure::DigestMismatch | Failure::SizeMismatch { .. } | Failure::Exists)) => {
            blocking(&blobs, &promised, Spool::forget).await?;
            Err(failure)
        }
        Err(failure) => Err(failure),
    }
}

fn chunks(file: std::fs::File) -> impl stream::Stream<Item = io::Result<bytes::Bytes>> + Send {
    stream::try_unfold(file, |mut file| async move {
        let read = tokio::task::spawn_blocking(move || {
            let mut chunk = vec![0; CHUNK];
            let length = io::Read::read(&mut file, &mut chunk)?;
            chunk.truncate(length);
            Ok::<_, io::Error>((chunk, file))
        });
        let (chunk, file) = read.await.map_err(io::Error::other)??;
        Ok((!chunk.is_empty()).then(|| (bytes::Bytes::from(chunk), file)))
    })
    .into_stream()
}

fn more_is_wanted(have: u64) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::PERMANENT_REDIRECT;
    if let Some(last) = have.checked_sub(1)
        && let Ok(value) = HeaderValue::from_str(&format!("bytes=0-{last}"))
    {
        response.headers_mut().insert(header::RANGE, value);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_content_range_is_read_as_the_rfc_says() {
        for (text, offered) in [
            ("bytes */10", Some(Offered::Nothing { size: 10 })),
            ("bytes 0-9/10", Some(Offered::Bytes { first: 0, bytes: 10, size: 10 })),
            ("bytes 3-3/10", Some(Offered::Bytes { first: 3, bytes: 1, size: 10 })),
            ("bytes 3-10/10", None),
            ("bytes 4-3/10", None),
            ("bytes 0-9/*", None),
            ("bytes +0-9/10", None),
            ("bytes 0-9", None),
            ("bytes -9/10", None),
            ("bytes 0-99999999999999999999/10", None),
            ("items 0-9/10", None),
        ] {
            assert_eq!(Offered::parse(text), offered, "{text}");
        }
    }
}
