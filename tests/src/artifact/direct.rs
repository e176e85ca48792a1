//! `direct`: rule 8.
#![allow(missing_docs, reason = "a case's name is the sentence that it shows")]

use std::time::Duration;

use bytes::Bytes;
use runner_core::artifact::{ArtifactErrorKind, DirectAccess, DirectRequest};
use sha2::{Digest as _, Sha256};

use super::{ArtifactPlace, key, pattern, read};

const MINUTE: Duration = Duration::from_secs(60);

/// Sends the request as a client would, with nothing but what it was given. Answers the status and the body.
async fn send(method: &str, request: &DirectRequest, body: Bytes) -> (u16, Vec<u8>) {
    use http_body_util::{BodyExt as _, Full};
    let uri: http::Uri = request.url.parse().unwrap();
    let authority = uri.authority().unwrap().clone();
    let stream = tokio::net::TcpStream::connect(authority.as_str()).await.unwrap();
    let stream = hyper_util::rt::TokioIo::new(stream);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
    let mut message = http::Request::builder()
        .method(method)
        .uri(uri.path_and_query().unwrap().as_str())
        .header("host", authority.as_str());
    for (name, value) in &request.headers {
        message = message.header(name, value);
    }
    let message = message.body(Full::new(body)).unwrap();
    let exchange = async move {
        let response = sender.send_request(message).await.unwrap();
        let status = response.status().as_u16();
        (status, response.into_body().collect().await.unwrap().to_bytes().to_vec())
    };
    let (answer, _) = futures::future::join(exchange, connection).await;
    answer
}

pub async fn a_direct_read_yields_the_object_and_nothing_else<P: ArtifactPlace>(place: &P) {
    if !P::DIRECT_SERVED {
        return;
    }
    let store = place.open();
    store.put_bytes(&key("d/a b"), pattern(100_000)).await.unwrap();
    store.put_bytes(&key("d/other"), pattern(10)).await.unwrap();
    let request = store.direct(&key("d/a b"), &DirectAccess::Read, MINUTE).await.unwrap();
    assert_eq!(request.is_some(), P::DIRECT_READ, "what the place says of itself");
    let Some(request) = request else { return };
    let (status, body) = send("GET", &request, Bytes::new()).await;
    assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
    assert!(body == pattern(100_000));
    let other = DirectRequest { url: request.url.replace("a%20b", "other"), ..request.clone() };
    assert_ne!(other, request);
    assert_eq!(send("GET", &other, Bytes::new()).await.0, 403, "another object");
    assert_eq!(send("DELETE", &request, Bytes::new()).await.0, 403, "another method");
    assert_eq!(store.head(&key("d/a b")).await.unwrap().size, 100_000);
}

pub async fn a_direct_upload_stores_exactly_what_was_promised_and_once<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    let (at, bytes) = (key("u/x"), pattern(50_000));
    let sha256 = Some(hex(&Sha256::digest(&bytes)));
    let access = DirectAccess::Store { size: 50_000, sha256, only_new: true };
    let request = store.direct(&at, &access, MINUTE).await.unwrap();
    assert_eq!(request.is_some(), P::DIRECT_CREATE, "what the place says of itself");
    let Some(request) = request else { return };
    let (status, _) = send("PUT", &request, pattern(49_999)).await;
    assert!(status >= 400, "other bytes: {status}");
    let bare = DirectRequest { headers: Vec::new(), ..request.clone() };
    assert!(send("PUT", &bare, bytes.clone()).await.0 >= 400, "without what was signed");
    assert_eq!(store.head(&at).await.unwrap_err().kind, ArtifactErrorKind::NotFound);
    assert_eq!(send("PUT", &request, bytes.clone()).await.0, 200);
    assert_eq!(read(&*store, &at, 0..u64::MAX).await.unwrap().1, bytes);
    assert_eq!(send("PUT", &request, bytes.clone()).await.0, 412, "a second time");
    let unpromised = DirectAccess::Store { size: 50_000, sha256: None, only_new: true };
    assert_eq!(store.direct(&key("u/y"), &unpromised, MINUTE).await.unwrap(), None);
}

pub async fn a_direct_upload_may_replace_but_only_with_what_was_promised<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    let (at, bytes) = (key("u/x"), pattern(50_000));
    store.put_bytes(&at, pattern(10)).await.unwrap();
    let sha256 = Some(hex(&Sha256::digest(&bytes)));
    let access = DirectAccess::Store { size: 50_000, sha256, only_new: false };
    let request = store.direct(&at, &access, MINUTE).await.unwrap();
    assert_eq!(request.is_some(), P::DIRECT_CREATE, "what the place says of itself");
    let Some(request) = request else { return };
    let mut others = bytes.to_vec();
    others[7] ^= 1;
    for wrong in [pattern(49_999), others.into()] {
        let status = send("PUT", &request, wrong).await.0;
        assert!(status >= 400, "other bytes: {status}");
    }
    let elsewhere = DirectRequest { url: request.url.replace("u/x", "u/y"), ..request.clone() };
    assert_eq!(send("PUT", &elsewhere, bytes.clone()).await.0, 403, "another object");
    assert_eq!(store.head(&at).await.unwrap().size, 10, "what was there is there still");
    for _ in 0..2 {
        assert_eq!(send("PUT", &request, bytes.clone()).await.0, 200);
    }
    assert_eq!(read(&*store, &at, 0..u64::MAX).await.unwrap().1, bytes);
    let huge = DirectAccess::Store { size: 6 << 30, sha256: Some("0".repeat(64)), only_new: false };
    assert_eq!(store.direct(&at, &huge, MINUTE).await.unwrap(), None, "too large for one request");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
