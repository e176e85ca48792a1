//! Bytes over plain HTTP/1.1, to and from the URLs that the service signs.

use std::{io, time::Duration};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body::Body as _;
use http_body_util::{BodyExt as _, Empty, combinators::UnsyncBoxBody};
use hyper_util::{
    client::legacy::{Client as HyperClient, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use runner_proto::v1 as proto;

use crate::error::{ClientError, ErrorKind};

pub(crate) type RequestBody = UnsyncBoxBody<Bytes, io::Error>;

/// Longest part of an answer that is quoted in an error.
const MAX_QUOTE_BYTES: usize = 512;
/// Longest wait for more of it.
const MAX_QUOTE_WAIT: Duration = Duration::from_secs(2);
const IDLE_CONNECTIONS: usize = 16;

/// What has become of an upload in pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Piece {
    /// It is whole and stored.
    Stored,
    /// The service has the bytes before this one.
    Wanted {
        /// Offset, in bytes.
        from: u64,
    },
}

/// A client for signed URLs. It sends no credentials of its own: a URL is its own permission.
#[derive(Debug, Clone)]
pub(crate) struct HttpClient {
    hyper: HyperClient<HttpConnector, RequestBody>,
    endpoint: Uri,
    stall_timeout: Duration,
}

impl HttpClient {
    pub(crate) fn new(
        endpoint: &Uri,
        connect_timeout: Duration,
        stall_timeout: Duration,
    ) -> Result<Self, ClientError> {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(connect_timeout));
        let hyper = HyperClient::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(20))
            .pool_max_idle_per_host(IDLE_CONNECTIONS)
            // Repeats are decided where it is known what they mean.
            .retry_canceled_requests(false)
            .build(connector);
        Ok(Self { hyper, endpoint: endpoint.clone(), stall_timeout })
    }

    pub(crate) fn stall_timeout(&self) -> Duration {
        self.stall_timeout
    }

    /// The URL in full: a path belongs to the endpoint that answered it.
    fn resolve(&self, url: &str) -> Result<Uri, ClientError> {
        let invalid = |why: &str| ClientError::new(ErrorKind::Protocol, "read a signed URL", why);
        let uri: Uri = url.parse().map_err(|_| invalid("it is not a URL"))?;
        match uri.scheme_str() {
            Some("http") => Ok(uri),
            Some(other) => {
                let why = format!("the scheme {other:?} is not supported");
                Err(ClientError::new(ErrorKind::Unsupported, "read a signed URL", why))
            }
            None => {
                let mut parts = self.endpoint.clone().into_parts();
                parts.path_and_query = uri.path_and_query().cloned();
                Uri::from_parts(parts).map_err(|_| invalid("it has neither a host nor a path"))
            }
        }
    }

    /// A request as the signed URL wants it.
    fn request(
        &self,
        doing: &str,
        signed: &proto::SignedUrl,
        default_method: Method,
        body: RequestBody,
    ) -> Result<Request<RequestBody>, ClientError> {
        let invalid = |why: &str| ClientError::new(ErrorKind::Protocol, doing, why);
        let method = match signed.method.as_str() {
            "" => default_method,
            method => method.parse().map_err(|_| invalid("the signed URL has no valid method"))?,
        };
        let mut request = Request::new(body);
        *request.method_mut() = method;
        *request.uri_mut() = self.resolve(&signed.url)?;
        for (name, value) in &signed.headers {
            let name: HeaderName = name.parse().map_err(|_| invalid("the signed URL has a bad header"))?;
            let value =
                HeaderValue::from_str(value).map_err(|_| invalid("the signed URL has a bad header"))?;
            request.headers_mut().insert(name, value);
        }
        Ok(request)
    }

    /// Sends a body of a known size. `stalled` is asked each time the stall time-out passes; true gives up.
    pub(crate) async fn put(
        &self,
        doing: &str,
        signed: &proto::SignedUrl,
        size: u64,
        body: RequestBody,
        stalled: impl FnMut() -> bool,
    ) -> Result<(), ClientError> {
        let mut request = self.request(doing, signed, Method::PUT, body)?;
        request.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(size));
        let response = self.send(doing, request, stalled).await?;
        if response.status().is_success() {
            // Read to the end, so that the connection can be used again.
            let _ = quote(response.into_body()).await;
            return Ok(());
        }
        Err(refused(doing, response).await)
    }

    /// Whether a URL is one of the service's own, which take an upload in pieces.
    pub(crate) fn takes_pieces(signed: &proto::SignedUrl) -> bool {
        signed.url.starts_with("/blob/v1/")
    }

    /// Sends the bytes of an object of `size` bytes from `at` on. Without a body: asks how many have come.
    pub(crate) async fn put_piece(
        &self,
        doing: &str,
        signed: &proto::SignedUrl,
        at: u64,
        size: u64,
        body: Option<RequestBody>,
        stalled: impl FnMut() -> bool,
    ) -> Result<Piece, ClientError> {
        let (range, length) = match (&body, size.checked_sub(1)) {
            (Some(_), Some(last)) => (format!("bytes {at}-{last}/{size}"), size - at),
            _ => (format!("bytes */{size}"), 0),
        };
        let body = body.unwrap_or_else(|| Empty::new().map_err(|never| match never {}).boxed_unsync());
        let mut request = self.request(doing, signed, Method::PUT, body)?;
        let range = HeaderValue::try_from(range)
            .map_err(|e| ClientError::new(ErrorKind::Protocol, doing, e.to_string()))?;
        request.headers_mut().insert(header::CONTENT_RANGE, range);
        request.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        let response = self.send(doing, request, stalled).await?;
        match response.status() {
            StatusCode::PERMANENT_REDIRECT => {
                let wrong = || ClientError::new(ErrorKind::Protocol, doing, "the answer's range is not one");
                let come = match response.headers().get(header::RANGE) {
                    None => 0,
                    Some(range) => {
                        let last = range.to_str().ok().and_then(|range| range.strip_prefix("bytes=0-"));
                        let last: u64 = last.and_then(|last| last.parse().ok()).ok_or_else(wrong)?;
                        last.checked_add(1).filter(|come| *come < size).ok_or_else(wrong)?
                    }
                };
                let _ = quote(response.into_body()).await;
                Ok(Piece::Wanted { from: come })
            }
            status if status.is_success() => {
                let _ = quote(response.into_body()).await;
                Ok(Piece::Stored)
            }
            _ => Err(refused(doing, response).await),
        }
    }

    async fn send(
        &self,
        doing: &str,
        request: Request<RequestBody>,
        mut stalled: impl FnMut() -> bool,
    ) -> Result<Response<hyper::body::Incoming>, ClientError> {
        let mut sending = self.hyper.request(request);
        loop {
            match tokio::time::timeout(self.stall_timeout, &mut sending).await {
                Ok(response) => return response.map_err(|e| broken(doing, e)),
                Err(_) if stalled() => return Err(stall(doing, self.stall_timeout)),
                Err(_) => {}
            }
        }
    }

    /// Reads from `offset` on. Answers the response, and whether it begins at `offset` (else it begins at zero).
    pub(crate) async fn get(
        &self,
        doing: &str,
        signed: &proto::SignedUrl,
        offset: u64,
    ) -> Result<(Response<hyper::body::Incoming>, bool), ClientError> {
        let empty = Empty::new().map_err(|never| match never {}).boxed_unsync();
        let mut request = self.request(doing, signed, Method::GET, empty)?;
        if offset > 0 {
            let range = HeaderValue::try_from(format!("bytes={offset}-"))
                .map_err(|e| ClientError::new(ErrorKind::Protocol, doing, e.to_string()))?;
            request.headers_mut().insert(header::RANGE, range);
        }
        let response = tokio::time::timeout(self.stall_timeout, self.hyper.request(request))
            .await
            .map_err(|_| stall(doing, self.stall_timeout))?
            .map_err(|e| broken(doing, e))?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT if begins_at(&response, offset) => Ok((response, true)),
            StatusCode::PARTIAL_CONTENT => Err(ClientError::new(
                ErrorKind::Protocol,
                doing,
                "the answer is another range than was asked for",
            )),
            status if status.is_success() => Ok((response, offset == 0)),
            _ => Err(refused(doing, response).await),
        }
    }
}

fn begins_at(response: &Response<hyper::body::Incoming>, offset: u64) -> bool {
    let range = response.headers().get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
    range.is_some_and(|range| range.starts_with(&format!("bytes {offset}-")))
}

pub(crate) fn stall(doing: &str, after: Duration) -> ClientError {
    ClientError::new(ErrorKind::Unreachable, doing, format!("nothing moved for {after:?}"))
}

pub(crate) fn broken(doing: &str, error: impl std::error::Error + Send + Sync + 'static) -> ClientError {
    let mut deepest: &dyn std::error::Error = &error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    let message = deepest.to_string();
    ClientError::new(ErrorKind::Unreachable, doing, message).with_source(error)
}

/// The error that an answer stands for.
async fn refused(doing: &str, response: Response<hyper::body::Incoming>) -> ClientError {
    let status = response.status();
    let retry_after = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let retry_after = retry_after.and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
    let text = quote(response.into_body()).await;
    let (reason, message) = stated(&text).unwrap_or_default();
    let kind = match (status, reason.as_str()) {
        (_, "DIGEST_MISMATCH" | "SIZE_MISMATCH") => ErrorKind::Integrity,
        // The service asks to come again, for example because the try before is still being written.
        _ if retry_after.is_some() => ErrorKind::Unavailable,
        (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => ErrorKind::PermissionDenied,
        (StatusCode::NOT_FOUND | StatusCode::GONE, _) => ErrorKind::NotFound,
        (StatusCode::CONFLICT | StatusCode::PRECONDITION_FAILED, _) => ErrorKind::AlreadyExists,
        (StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT, _) => ErrorKind::Unavailable,
        (StatusCode::INSUFFICIENT_STORAGE, _) => ErrorKind::Exhausted,
        (status, _) if status.is_server_error() => ErrorKind::Unavailable,
        _ => ErrorKind::Invalid,
    };
    let message = if message.is_empty() { text } else { message };
    let message = if message.is_empty() { status.to_string() } else { format!("{status}: {message}") };
    ClientError::new(kind, doing, message).with_reason(reason).with_retry_after(retry_after)
}

/// The reason and message of a blob endpoint's error document.
fn stated(text: &str) -> Option<(String, String)> {
    let document: serde_json::Value = serde_json::from_str(text).ok()?;
    let field = |name: &str| document["error"][name].as_str().unwrap_or_default().to_owned();
    Some((field("reason"), field("message")))
}

/// The beginning of an answer's text, for a person. Never more than a bounded part of it is read.
async fn quote(mut body: hyper::body::Incoming) -> String {
    let mut text = Vec::new();
    while text.len() < MAX_QUOTE_BYTES && !body.is_end_stream() {
        match tokio::time::timeout(MAX_QUOTE_WAIT, body.frame()).await {
            Ok(Some(Ok(frame))) => {
                if let Ok(data) = frame.into_data() {
                    text.extend_from_slice(&data[..data.len().min(MAX_QUOTE_BYTES - text.len())]);
                }
            }
            Ok(Some(Err(_)) | None) | Err(_) => break,
        }
    }
    String::from_utf8_lossy(&text).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client() -> HttpClient {
        let endpoint = Uri::from_static("http://127.0.0.1:7600");
        HttpClient::new(&endpoint, Duration::from_secs(1), Duration::from_secs(1)).expect("client")
    }

    #[tokio::test]
    async fn a_path_belongs_to_the_endpoint_and_only_plain_http_is_spoken() {
        let uri = client().resolve("/blobs/a?sig=b").expect("path");
        assert_eq!(uri.to_string(), "http://127.0.0.1:7600/blobs/a?sig=b");
        let uri = client().resolve("http://127.0.0.1:9/x").expect("absolute");
        assert_eq!(uri.authority().map(|a| a.as_str()), Some("127.0.0.1:9"));
        let error = client().resolve("https://127.0.0.1/x").expect_err("no TLS yet");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert_eq!(client().resolve("ftp://127.0.0.1/x").expect_err("scheme").kind(), ErrorKind::Unsupported);
    }
}
