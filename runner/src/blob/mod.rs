//! The blob endpoint: one object, one method, minutes, by a signed URL. `GET` and `HEAD` with ranges, `PUT` with the exact
//! size and digest that were promised.
//!
//! Uploads (`uploads/TENANT/UPLOAD/files/PATH`) are stored once: a second `PUT` of the same bytes is answered as the first
//! was, other bytes are refused. With `Content-Range`, a `PUT` goes on where an earlier one broke off (see `resume`). So a sealed tree cannot change, and a client may repeat a `PUT` whose answer it lost.
//! The digest of an upload is recorded beside it (`…/digests/PATH`) when its `PUT` completes; sealing reads it from there,
//! and from the bytes where a crash came in between.

mod answer;
mod get;
mod put;
mod range;
pub mod record;
mod resume;
mod spool;

use std::{collections::HashSet, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    routing::any,
};
use http::{Method, Response};
use runner_artifacts::blob::{BLOB_PREFIX, BlobError, BlobMethod, BlobSigner};
use runner_core::artifact::{ArtifactKey, ArtifactStore};
use tokio_util::sync::CancellationToken;

use self::answer::Failure;
pub use self::spool::Spool;
use crate::metrics::Metrics;

/// What requests share.
#[derive(Debug, Clone)]
pub struct Blobs {
    /// Where the bytes are.
    pub store: Arc<dyn ArtifactStore>,
    /// Says what a URL permits.
    pub signer: Arc<BlobSigner>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Longest pause between two pieces of an upload.
    pub read_timeout: Duration,
    /// The largest body where the URL states no size.
    pub max_upload_bytes: u64,
    /// Cancelled: nothing new is begun.
    pub draining: CancellationToken,
    /// What has come of uploads that may be resumed.
    pub spool: Arc<Spool>,
    /// Keys that are being written now: one writer each.
    pub writing: Arc<std::sync::Mutex<HashSet<ArtifactKey>>>,
}

/// The route of the endpoint.
pub fn router(blobs: Blobs) -> Router {
    Router::new().route(&format!("{BLOB_PREFIX}{{*key}}"), any(handle)).with_state(blobs)
}

async fn handle(State(blobs): State<Blobs>, request: Request) -> Response<Body> {
    let (name, method) = match *request.method() {
        Method::GET => ("GET", Some(BlobMethod::Get)),
        Method::HEAD => ("HEAD", Some(BlobMethod::Get)),
        Method::PUT => ("PUT", Some(BlobMethod::Put)),
        _ => ("other", None),
    };
    let answer = match method {
        None => Err(Failure::MethodNotAllowed),
        Some(_) if blobs.draining.is_cancelled() => Err(Failure::ShuttingDown),
        Some(method) => serve(&blobs, method, request).await,
    };
    let response = answer.unwrap_or_else(Failure::into_response);
    blobs.metrics.blob_request(name, response.status().as_u16());
    answer::harden(response)
}

async fn serve(blobs: &Blobs, method: BlobMethod, request: Request) -> Result<Response<Body>, Failure> {
    let claim = request.uri().path_and_query().map(http::uri::PathAndQuery::as_str).unwrap_or_default();
    let grant = blobs.signer.verify(method, claim).map_err(|error| match error {
        BlobError::Malformed(_) => Failure::Malformed(error.to_string()),
        BlobError::BadSignature => Failure::BadSignature,
        BlobError::Expired => Failure::Expired,
        BlobError::WrongMethod => Failure::MethodNotAllowed,
    })?;
    match method {
        BlobMethod::Get => get::get(blobs, &grant, request).await,
        BlobMethod::Put => {
            let (head, body) = request.into_parts();
            match head.headers.get(http::header::CONTENT_RANGE) {
                Some(range) => resume::put(blobs, grant, range, body).await,
                None => put::put(blobs, grant, body).await,
            }
        }
    }
}
