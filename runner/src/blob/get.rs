//! `GET` and `HEAD`.

use axum::{body::Body, extract::Request};
use futures::TryStreamExt as _;
use http::{HeaderValue, Method, Response, StatusCode, header};
use runner_artifacts::blob::BlobGrant;

use super::{
    Blobs,
    answer::Failure,
    range::{self, Wanted},
};

pub(super) async fn get(
    blobs: &Blobs,
    grant: &BlobGrant,
    request: Request,
) -> Result<Response<Body>, Failure> {
    let key = &grant.key;
    let size = blobs.store.head(key).await.map_err(|error| Failure::store(&error))?.size;
    // Without validators an `If-Range` never matches, and then the whole is the answer.
    let header = match request.headers().get(header::IF_RANGE) {
        Some(_) => None,
        None => request.headers().get(header::RANGE).and_then(|value| value.to_str().ok()),
    };
    let (status, first, end) = match range::parse(header, size) {
        Wanted::Whole => (StatusCode::OK, 0, size),
        Wanted::Part(first, end) => (StatusCode::PARTIAL_CONTENT, first, end),
        Wanted::Nothing => return Err(Failure::OutOfRange { size }),
    };
    let body = if request.method() == Method::HEAD || first == end {
        Body::empty()
    } else {
        let (_, bytes) = blobs.store.get(key, first..end).await.map_err(|error| Failure::store(&error))?;
        let (metrics, key) = (blobs.metrics.clone(), key.clone());
        // Pulled as the client reads: what waits is one chunk and the connection's buffer.
        Body::from_stream(
            bytes.inspect_ok(move |chunk| metrics.blob_bytes("out", chunk.len() as u64)).inspect_err(
                move |error| tracing::warn!(%key, %error, "an object broke off while it was read"),
            ),
        )
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(end - first));
    if status == StatusCode::PARTIAL_CONTENT
        && let Ok(value) = HeaderValue::from_str(&format!("bytes {first}-{}/{size}", end - 1))
    {
        headers.insert(header::CONTENT_RANGE, value);
    }
    Ok(response)
}
