//! Answers of the blob endpoint: typed failures as JSON, and the headers that keep a browser from executing a blob.

use axum::body::Body;
use http::{HeaderValue, Response, StatusCode, header};
use runner_core::artifact::{ArtifactError, ArtifactErrorKind};
use serde_json::json;

/// Why a request was not served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// The URL is none of ours.
    Malformed(String),
    /// The signature does not match.
    BadSignature,
    /// The URL was good once.
    Expired,
    /// The URL, or the endpoint, does not permit this method.
    MethodNotAllowed,
    /// There is no such object.
    NotFound,
    /// The body does not have the promised size.
    SizeMismatch { promised: u64, got: String },
    /// The body does not have the promised digest.
    DigestMismatch,
    /// The body is larger than any may be.
    TooLarge(u64),
    /// Other bytes are stored under this key.
    Exists,
    /// Somebody else writes this key now.
    Busy,
    /// The client paused for too long.
    TooSlow,
    /// The body ended in an error: the client went away.
    Aborted,
    /// The range lies outside of the object.
    OutOfRange { size: u64 },
    /// The store has no room.
    Full,
    /// The upload may not come in pieces.
    NotResumable,
    /// The store does not answer now.
    Unavailable,
    /// The service ends.
    ShuttingDown,
    /// A defect.
    Internal,
}

impl Failure {
    /// From the store's failure. Logged here, once.
    pub(super) fn store(error: &ArtifactError) -> Self {
        match error.kind {
            ArtifactErrorKind::NotFound => Self::NotFound,
            ArtifactErrorKind::Full => {
                tracing::warn!(%error, source = ?error.source, "the object store is full");
                Self::Full
            }
            ArtifactErrorKind::Unavailable => {
                tracing::warn!(%error, source = ?error.source, "the object store failed for now");
                Self::Unavailable
            }
            ArtifactErrorKind::Mismatch
            | ArtifactErrorKind::LimitExceeded
            | ArtifactErrorKind::Denied
            | ArtifactErrorKind::Other => {
                tracing::error!(%error, source = ?error.source, "the object store failed");
                Self::Internal
            }
        }
    }

    /// (status, stable reason, what it says to people)
    fn describe(&self) -> (StatusCode, &'static str, String) {
        let text = |text: &str| text.to_owned();
        match self {
            Self::Malformed(what) => (StatusCode::BAD_REQUEST, "MALFORMED_URL", what.clone()),
            Self::BadSignature => {
                (StatusCode::FORBIDDEN, "BAD_SIGNATURE", text("the URL's signature does not match"))
            }
            Self::Expired => {
                (StatusCode::FORBIDDEN, "EXPIRED", text("the URL has expired; ask for a new one"))
            }
            Self::MethodNotAllowed => {
                (StatusCode::METHOD_NOT_ALLOWED, "METHOD_NOT_ALLOWED", text("the URL is for another method"))
            }
            Self::NotFound => (StatusCode::NOT_FOUND, "NOT_FOUND", text("there is no such object")),
            Self::SizeMismatch { promised, got } => (
                StatusCode::BAD_REQUEST,
                "SIZE_MISMATCH",
                format!("{promised} bytes were promised, {got} came"),
            ),
            Self::DigestMismatch => (
                StatusCode::BAD_REQUEST,
                "DIGEST_MISMATCH",
                text("the body does not have the promised SHA-256"),
            ),
            Self::TooLarge(most) => {
                (StatusCode::PAYLOAD_TOO_LARGE, "TOO_LARGE", format!("at most {most} bytes are taken"))
            }
            Self::Exists => (
                StatusCode::CONFLICT,
                "ALREADY_EXISTS",
                text("other bytes are stored here; an upload is stored once"),
            ),
            Self::Busy => (
                StatusCode::CONFLICT,
                "IN_PROGRESS",
                text("another request is writing this object; try again"),
            ),
            Self::TooSlow => (StatusCode::REQUEST_TIMEOUT, "TOO_SLOW", text("the body paused for too long")),
            Self::Aborted => (StatusCode::BAD_REQUEST, "ABORTED", text("the body broke off")),
            Self::OutOfRange { size } => {
                let what = format!("the object has {size} bytes");
                (StatusCode::RANGE_NOT_SATISFIABLE, "OUT_OF_RANGE", what)
            }
            Self::Full => {
                (StatusCode::INSUFFICIENT_STORAGE, "STORE_FULL", text("the object store has no room"))
            }
            Self::NotResumable => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "NOT_RESUMABLE",
                text("no room for uploads in pieces now, or no size or SHA-256 was promised; send it whole"),
            ),
            Self::Unavailable => (
                StatusCode::SERVICE_UNAVAILABLE,
                "UNAVAILABLE",
                text("the object store does not answer; try again"),
            ),
            Self::ShuttingDown => (
                StatusCode::SERVICE_UNAVAILABLE,
                "SHUTTING_DOWN",
                text("the service is shutting down; try again"),
            ),
            Self::Internal => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "INTERNAL",
                text("an internal error; the service's log says more"),
            ),
        }
    }

    /// The answer: JSON with a stable reason.
    pub(super) fn into_response(self) -> Response<Body> {
        let (status, reason, message) = self.describe();
        let body = json!({ "error": { "reason": reason, "message": message } });
        let mut response = Response::new(Body::from(format!("{body}\n")));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        match self {
            Self::MethodNotAllowed => {
                headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD, PUT"));
            }
            Self::OutOfRange { size } => {
                if let Ok(value) = HeaderValue::from_str(&format!("bytes */{size}")) {
                    headers.insert(header::CONTENT_RANGE, value);
                }
            }
            Self::Busy | Self::Unavailable | Self::ShuttingDown => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            _ => {}
        }
        response
    }
}

/// What a browser must not do with the answer: guess its type, show it, run it, keep it.
pub(super) fn harden(mut response: Response<Body>) -> Response<Body> {
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_DISPOSITION, "attachment"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; sandbox"),
        (header::CACHE_CONTROL, "private, no-store"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}
