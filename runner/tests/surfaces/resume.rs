//! Uploads in pieces: what is kept, what is refused, and what is stored in the end.

use runner::config::value::ByteSize;
use runner_core::{
    artifact::{ArtifactErrorKind, ArtifactUri},
    fake::artifact::ArtifactOp,
};
use runner_proto::v1;
use sha2::{Digest as _, Sha256};

use crate::{
    harness::{Harness, soon},
    http::{Answer, send},
};

const BYTES: &[u8] = b"0123456789";

async fn create(harness: &Harness, bytes: &[u8], digest: bool) -> (String, String) {
    let request = v1::CreateUploadRequest {
        path: "a".to_owned(),
        size: bytes.len() as u64,
        sha256: if digest { hex::encode(Sha256::digest(bytes)) } else { String::new() },
        ..Default::default()
    };
    let answer = harness.artifacts_client().await.create_upload(request).await.unwrap().into_inner();
    (answer.url.unwrap().url, answer.uri)
}

async fn piece(harness: &Harness, target: &str, range: &str, bytes: &[u8]) -> Answer {
    soon(send(harness.listen, "PUT", target, &[("content-range", range)], bytes, None)).await
}

fn at(answer: &Answer) -> (u16, Option<&str>) {
    (answer.status, answer.header("range"))
}

fn stored(harness: &Harness, uri: &str) -> Option<Vec<u8>> {
    let uri: ArtifactUri = uri.parse().unwrap();
    harness.artifacts.bytes(uri.key()).map(|bytes| bytes.to_vec())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_goes_on_where_it_broke_off() {
    let harness = Harness::start().await;
    let (target, uri) = create(&harness, BYTES, true).await;
    assert_eq!(at(&piece(&harness, &target, "bytes */10", b"").await), (308, None), "nothing has come");
    assert_eq!(at(&piece(&harness, &target, "bytes 0-2/10", &BYTES[..3]).await), (308, Some("bytes=0-2")));
    // What does not follow is not taken.
    for range in ["bytes 0-2/10", "bytes 4-6/10"] {
        let answer = piece(&harness, &target, range, b"xxx").await;
        assert_eq!(at(&answer), (308, Some("bytes=0-2")), "{range}");
    }
    // A body that breaks off leaves what came of it.
    let broken = send(harness.listen, "PUT", &target, &[("content-range", "bytes 3-9/10")], b"345", Some(7));
    assert_ne!(soon(broken).await.status, 200);
    let known = piece(&harness, &target, "bytes */10", b"").await;
    assert_eq!(at(&known), (308, Some("bytes=0-5")));
    assert_eq!(stored(&harness, &uri), None, "nothing half is visible");
    assert_eq!(at(&piece(&harness, &target, "bytes 6-9/10", &BYTES[6..]).await), (200, None));
    assert_eq!(stored(&harness, &uri).as_deref(), Some(BYTES));
    // Who lost the answer asks, or sends it whole.
    assert_eq!(piece(&harness, &target, "bytes */10", b"").await.status, 200);
    assert_eq!(soon(send(harness.listen, "PUT", &target, &[], BYTES, None)).await.status, 200);
    assert_eq!(harness.spool.held(), 0, "nothing is kept of it");
}

#[tokio::test(flavor = "multi_thread")]
async fn pieces_that_are_not_what_was_promised_are_refused_and_forgotten() {
    let harness = Harness::start().await;
    let (target, uri) = create(&harness, BYTES, true).await;
    for (range, reason) in [
        ("bytes 0-9/11", "SIZE_MISMATCH"),
        ("bytes 0-3/10", "SIZE_MISMATCH"),
        ("bytes 0-9", "MALFORMED_URL"),
        ("bytes 5-2/10", "MALFORMED_URL"),
    ] {
        let answer = piece(&harness, &target, range, BYTES).await;
        assert_eq!((answer.status, answer.reason().as_str()), (400, reason), "{range}");
    }
    let answer = piece(&harness, &target, "bytes 0-9/10", b"9876543210").await;
    assert_eq!((answer.status, answer.reason().as_str()), (400, "DIGEST_MISMATCH"));
    assert_eq!((stored(&harness, &uri), harness.spool.held()), (None, 0));
    assert_eq!(piece(&harness, &target, "bytes 0-9/10", BYTES).await.status, 200, "and begun anew");
    let other = send(harness.listen, "PUT", &target, &[], b"9876543210", None);
    assert_eq!(soon(other).await.reason(), "DIGEST_MISMATCH");
    assert_eq!(stored(&harness, &uri).as_deref(), Some(BYTES));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_digest_or_room_an_upload_is_sent_whole() {
    let harness = Harness::start_with(|config| config.server.resumable_bytes = ByteSize(15)).await;
    let (target, _) = create(&harness, BYTES, false).await;
    let answer = piece(&harness, &target, "bytes 0-2/10", &BYTES[..3]).await;
    assert_eq!((answer.status, answer.reason().as_str()), (422, "NOT_RESUMABLE"));
    assert_eq!(soon(send(harness.listen, "PUT", &target, &[], BYTES, None)).await.status, 200);

    let (first, _) = create(&harness, BYTES, true).await;
    let (second, uri) = create(&harness, BYTES, true).await;
    assert_eq!(piece(&harness, &first, "bytes 0-2/10", &BYTES[..3]).await.status, 308);
    let answer = piece(&harness, &second, "bytes 0-2/10", &BYTES[..3]).await;
    assert_eq!(answer.reason(), "NOT_RESUMABLE");
    assert_eq!(soon(send(harness.listen, "PUT", &second, &[], BYTES, None)).await.status, 200);
    assert_eq!(stored(&harness, &uri).as_deref(), Some(BYTES));
    assert_eq!(piece(&harness, &first, "bytes 3-9/10", &BYTES[3..]).await.status, 200);
    let (third, _) = create(&harness, BYTES, true).await;
    assert_eq!(piece(&harness, &third, "bytes 0-2/10", &BYTES[..3]).await.status, 308, "there is room again");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_come_stays_while_the_object_store_fails() {
    let harness = Harness::start().await;
    let (target, uri) = create(&harness, BYTES, true).await;
    harness.artifacts.fail_next(ArtifactOp::Put, 1, ArtifactErrorKind::Unavailable);
    let answer = piece(&harness, &target, "bytes 0-9/10", BYTES).await;
    assert_eq!((answer.status, answer.reason().as_str()), (503, "UNAVAILABLE"));
    assert_eq!(stored(&harness, &uri), None);
    assert_eq!(piece(&harness, &target, "bytes */10", b"").await.status, 200, "nothing is sent again");
    assert_eq!(stored(&harness, &uri).as_deref(), Some(BYTES));
}
