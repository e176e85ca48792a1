//! Uploads, trees, downloads, and the blob endpoint with those who do not mean well.

use std::time::Duration;

use runner_core::artifact::{ArtifactKey, ArtifactUri, MANIFEST_NAME, Manifest};
use runner_proto::v1;
use sha2::{Digest as _, Sha256};
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::{
    harness::{Harness, soon},
    http::{Answer, send},
};

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

async fn create(
    harness: &Harness,
    upload: &str,
    path: &str,
    bytes: &[u8],
    digest: bool,
) -> v1::CreateUploadResponse {
    let request = v1::CreateUploadRequest {
        upload_id: upload.to_owned(),
        path: path.to_owned(),
        size: bytes.len() as u64,
        sha256: if digest { sha256(bytes) } else { String::new() },
    };
    harness.artifacts_client().await.create_upload(request).await.unwrap().into_inner()
}

fn target(upload: &v1::CreateUploadResponse) -> String {
    upload.url.as_ref().unwrap().url.clone()
}

async fn put(harness: &Harness, target: &str, bytes: &[u8]) -> Answer {
    soon(send(harness.listen, "PUT", target, &[], bytes, None)).await
}

fn key(upload: &v1::CreateUploadResponse) -> ArtifactKey {
    upload.uri.parse::<ArtifactUri>().unwrap().key().clone()
}

async fn download(harness: &Harness, uri: &str) -> String {
    let request = v1::CreateDownloadRequest { uri: uri.to_owned() };
    let answer = harness.artifacts_client().await.create_download(request).await.unwrap().into_inner();
    answer.url.unwrap().url
}

async fn get(harness: &Harness, target: &str, headers: &[(&str, &str)]) -> Answer {
    soon(send(harness.listen, "GET", target, headers, &[], None)).await
}

fn entry(path: &str) -> v1::TreeEntry {
    v1::TreeEntry { path: path.to_owned(), ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_is_uploaded_sealed_and_downloaded() {
    let harness = Harness::start().await;
    let first = create(&harness, "", "a/b.txt", b"hello", true).await;
    // A file with the manifest's name is a file as any other.
    let second = create(&harness, &first.upload_id, MANIFEST_NAME, b"{}", false).await;
    assert_eq!(put(&harness, &target(&first), b"hello").await.status, 200);
    assert_eq!(put(&harness, &target(&second), b"{}").await.status, 200);
    let request = || v1::SealTreeRequest {
        upload_id: first.upload_id.clone(),
        entries: vec![
            entry(MANIFEST_NAME),
            v1::TreeEntry { mode: 0o755, ..entry("a/b.txt") },
            v1::TreeEntry { directory: true, ..entry("empty") },
        ],
    };
    let sealed = harness.artifacts_client().await.seal_tree(request()).await.unwrap().into_inner();
    assert_eq!((sealed.files, sealed.total_bytes), (2, 7));
    let uri: ArtifactUri = sealed.uri.parse().unwrap();
    assert!(uri.is_tree());
    let stored = harness.artifacts.bytes(&uri.key().join(MANIFEST_NAME).unwrap()).unwrap();
    let manifest: Manifest = serde_json::from_slice(&stored).unwrap();
    let entries: Vec<_> =
        manifest.entries.iter().map(|e| (e.path.as_str(), e.size, e.mode, e.sha256.as_str())).collect();
    let (hello, braces) = (sha256(b"hello"), sha256(b"{}"));
    assert_eq!(
        entries,
        [
            ("a/b.txt", 5, 0o755, hello.as_str()),
            ("empty", 0, 0o755, ""),
            (MANIFEST_NAME, 2, 0o644, braces.as_str())
        ]
    );
    assert_eq!(manifest.entries[0].key.as_ref(), Some(&key(&first)));
    // Again is the same; otherwise is refused; and so is one more file.
    assert_eq!(harness.artifacts_client().await.seal_tree(request()).await.unwrap().into_inner(), sealed);
    let other = v1::SealTreeRequest { upload_id: first.upload_id.clone(), entries: vec![entry("a/b.txt")] };
    assert_eq!(
        harness.artifacts_client().await.seal_tree(other).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    let late = v1::CreateUploadRequest {
        upload_id: first.upload_id.clone(),
        path: "c".to_owned(),
        ..Default::default()
    };
    let status = harness.artifacts_client().await.create_upload(late).await.unwrap_err();
    assert_eq!(status.get_error_details().error_info().unwrap().reason, "UPLOAD_SEALED");

    let url = download(&harness, &first.uri).await;
    assert_eq!(get(&harness, &url, &[]).await.body, b"hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn sealing_names_what_was_not_uploaded_and_what_is_malformed() {
    let harness = Harness::start().await;
    let first = create(&harness, "", "a", b"x", false).await;
    put(&harness, &target(&first), b"x").await;
    let seal = async |entries| {
        let request = v1::SealTreeRequest { upload_id: first.upload_id.clone(), entries };
        let status = harness.artifacts_client().await.seal_tree(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        let details = status.get_error_details();
        let violations = &details.bad_request().unwrap().field_violations;
        violations.iter().map(|violation| violation.field.clone()).collect::<Vec<_>>()
    };
    assert_eq!(seal(vec![entry("a"), entry("missing")]).await, ["entries[1].path"]);
    assert_eq!(
        seal(vec![entry("a"), entry("a/b"), entry("../x"), entry("a")]).await,
        ["entries[1].path", "entries[2].path", "entries[3].path"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_digest_is_found_from_the_bytes_where_its_record_was_lost() {
    let harness = Harness::start().await;
    let upload = create(&harness, "", "a", b"hello", false).await;
    put(&harness, &target(&upload), b"hello").await;
    harness.artifacts.vanish(&runner::blob::record::beside(&key(&upload)).unwrap());
    let request = v1::SealTreeRequest { upload_id: upload.upload_id, entries: vec![entry("a")] };
    let sealed = harness.artifacts_client().await.seal_tree(request).await.unwrap().into_inner();
    assert_eq!(sealed.total_bytes, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_and_heads_are_answered_as_http_says() {
    let harness = Harness::start().await;
    let upload = create(&harness, "", "a", b"0123456789", true).await;
    put(&harness, &target(&upload), b"0123456789").await;
    let url = download(&harness, &upload.uri).await;
    let whole = get(&harness, &url, &[]).await;
    assert_eq!((whole.status, whole.body.as_slice()), (200, b"0123456789".as_slice()));
    for (name, value) in [
        ("content-disposition", "attachment"),
        ("x-content-type-options", "nosniff"),
        ("content-security-policy", "default-src 'none'; sandbox"),
        ("content-type", "application/octet-stream"),
        ("accept-ranges", "bytes"),
    ] {
        assert_eq!(whole.header(name), Some(value));
    }
    let part = get(&harness, &url, &[("range", "bytes=2-4")]).await;
    assert_eq!((part.status, part.body.as_slice()), (206, b"234".as_slice()));
    assert_eq!(part.header("content-range"), Some("bytes 2-4/10"));
    let beyond = get(&harness, &url, &[("range", "bytes=10-")]).await;
    assert_eq!((beyond.status, beyond.reason().as_str()), (416, "OUT_OF_RANGE"));
    assert_eq!(beyond.header("content-range"), Some("bytes */10"));
    let head = soon(send(harness.listen, "HEAD", &url, &[], &[], None)).await;
    assert_eq!((head.status, head.header("content-length"), head.body.len()), (200, Some("10"), 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_visible_of_bytes_that_are_not_what_was_promised() {
    let harness = Harness::start().await;
    let upload = create(&harness, "", "a", b"hello", true).await;
    let url = target(&upload);
    let corrupt = put(&harness, &url, b"hellO").await;
    assert_eq!((corrupt.status, corrupt.reason().as_str()), (400, "DIGEST_MISMATCH"));
    let long = put(&harness, &url, b"hello!").await;
    assert_eq!((long.status, long.reason().as_str()), (400, "SIZE_MISMATCH"));
    let short = put(&harness, &url, b"hell").await;
    assert_eq!((short.status, short.reason().as_str()), (400, "SIZE_MISMATCH"));
    // The client goes away in the middle of what it announced.
    soon(send(harness.listen, "PUT", &url, &[], b"he", Some(5))).await;
    // Chunked, so that nothing is announced.
    let chunked = [("transfer-encoding", "chunked")];
    let mut stream = tokio::net::TcpStream::connect(harness.listen).await.unwrap();
    let head = format!(
        "PUT {url} HTTP/1.1\r\nhost: x\r\n{}: {}\r\nconnection: close\r\n\r\n",
        chunked[0].0, chunked[0].1
    );
    let body = "6\r\nhello!\r\n0\r\n\r\n";
    tokio::io::AsyncWriteExt::write_all(&mut stream, format!("{head}{body}").as_bytes()).await.unwrap();
    let mut answer = String::new();
    soon(tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut answer)).await.unwrap();
    assert!(answer.contains("SIZE_MISMATCH"), "{answer}");
    assert_eq!(harness.artifacts.keys(), Vec::<String>::new());
    // And the same URL still takes the right bytes.
    assert_eq!(put(&harness, &url, b"hello").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_is_stored_once() {
    let harness = Harness::start().await;
    let upload = create(&harness, "", "a", b"hello", false).await;
    let url = target(&upload);
    assert_eq!(put(&harness, &url, b"hello").await.status, 200);
    assert_eq!(put(&harness, &url, b"hello").await.status, 200, "a repeated PUT is answered as the first");
    let other = put(&harness, &url, b"HELLO").await;
    assert_eq!((other.status, other.reason().as_str()), (409, "ALREADY_EXISTS"));
    assert_eq!(harness.artifacts.bytes(&key(&upload)).unwrap(), "hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn urls_that_are_expired_tampered_with_or_for_another_method_permit_nothing() {
    let harness = Harness::start().await;
    let upload = create(&harness, "", "a", b"hello", false).await;
    put(&harness, &target(&upload), b"hello").await;
    let url = download(&harness, &upload.uri).await;
    let tampered = url.replacen("/files/a", "/files/b", 1);
    assert_ne!(tampered, url);
    let answer = get(&harness, &tampered, &[]).await;
    assert_eq!((answer.status, answer.reason().as_str()), (403, "BAD_SIGNATURE"));
    let answer = put(&harness, &url, b"HELLO").await;
    assert_eq!((answer.status, answer.reason().as_str()), (405, "METHOD_NOT_ALLOWED"));
    let answer = soon(send(harness.listen, "DELETE", &url, &[], &[], None)).await;
    assert_eq!(answer.status, 405);
    harness.clock.advance(Duration::from_secs(3601));
    let answer = get(&harness, &url, &[]).await;
    assert_eq!((answer.status, answer.reason().as_str()), (403, "EXPIRED"));
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_that_climb_are_refused_everywhere() {
    let harness = Harness::start().await;
    for path in ["../x", "/etc/passwd", "a/../../x", "a//b", ".", "", "a\0b"] {
        let request = v1::CreateUploadRequest { path: path.to_owned(), size: 1, ..Default::default() };
        let status = harness.artifacts_client().await.create_upload(request).await.unwrap_err();
        assert_eq!(
            status.get_error_details().bad_request().unwrap().field_violations[0].field,
            "path",
            "{path:?}"
        );
    }
    for uri in ["artifact:uploads/default/../other/x", "artifact:/etc/passwd", "file:///etc/passwd"] {
        let request = v1::CreateDownloadRequest { uri: uri.to_owned() };
        let status = harness.artifacts_client().await.create_download(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{uri}");
    }
    // Another tenant's artifact is not told from one that does not exist.
    for uri in ["artifact:uploads/other/x/files/y", "artifact:uploads/default/x/files/y", "artifact:secret/x"]
    {
        let request = v1::CreateDownloadRequest { uri: uri.to_owned() };
        let status = harness.artifacts_client().await.create_download(request).await.unwrap_err();
        assert_eq!(status.get_error_details().error_info().unwrap().reason, "ARTIFACT_NOT_FOUND", "{uri}");
    }
    let signature = "0".repeat(64);
    for path in
        ["../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "uploads%2f..%2f..%2fx", "", "uploads/default/"]
    {
        let target = format!("/blob/v1/{path}?method=GET&expires=99999999999&sig={signature}");
        let answer = get(&harness, &target, &[]).await;
        assert!(matches!(answer.status, 400 | 403 | 404), "{path}: {answer:?}");
    }
}

async fn list(
    harness: &Harness,
    prefix: &str,
    page_size: u32,
    page_token: &str,
) -> Result<v1::ListArtifactsResponse, tonic::Status> {
    let request =
        v1::ListArtifactsRequest { prefix: prefix.to_owned(), page_size, page_token: page_token.to_owned() };
    Ok(harness.artifacts_client().await.list_artifacts(request).await?.into_inner())
}

async fn delete(harness: &Harness, uri: &str) -> Result<u64, tonic::Status> {
    let request = v1::DeleteArtifactsRequest { uri: uri.to_owned() };
    Ok(harness.artifacts_client().await.delete_artifacts(request).await?.into_inner().deleted)
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_are_listed_by_key_page_by_page_without_what_is_recorded_beside_them() {
    let harness = Harness::start().await;
    let first = create(&harness, "", "a", b"a", true).await;
    let mut uris = vec![first.uri.clone()];
    assert_eq!(put(&harness, &target(&first), b"a").await.status, 200);
    for path in ["c", "b", "d/e"] {
        let next = create(&harness, &first.upload_id, path, b"xyz", true).await;
        assert_eq!(put(&harness, &target(&next), b"xyz").await.status, 200);
        uris.push(next.uri);
    }
    uris.sort();
    let (mut found, mut token) = (Vec::new(), String::new());
    loop {
        let page = list(&harness, "", 3, &token).await.unwrap();
        assert!(page.artifacts.len() <= 3);
        found.extend(page.artifacts.into_iter().map(|one| one.uri));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(found, uris);
    let prefix = uris[0].rsplit_once('/').unwrap().0;
    assert_eq!(list(&harness, &format!("{prefix}/d/"), 0, "").await.unwrap().artifacts.len(), 1);
    for (prefix, token, code) in [
        ("artifact:uploads/somebody-else/", "", Code::NotFound),
        ("artifact:blob/", "", Code::NotFound),
        (uris[0].as_str(), "", Code::InvalidArgument),
        ("nonsense", "", Code::InvalidArgument),
        ("", "uploads/somebody-else/x", Code::InvalidArgument),
    ] {
        assert_eq!(list(&harness, prefix, 0, token).await.unwrap_err().code(), code, "{prefix} {token}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_deleted_is_an_upload_and_a_sealed_tree_is_deleted_whole() {
    let harness = Harness::start().await;
    let file = create(&harness, "", "a", b"a", true).await;
    assert_eq!(put(&harness, &target(&file), b"a").await.status, 200);
    let tree = create(&harness, "", "x/y", b"b", true).await;
    assert_eq!(put(&harness, &target(&tree), b"b").await.status, 200);
    let seal = v1::SealTreeRequest { upload_id: tree.upload_id.clone(), entries: vec![entry("x/y")] };
    let sealed = harness.artifacts_client().await.seal_tree(seal).await.unwrap().into_inner();
    let part = delete(&harness, &tree.uri).await.unwrap_err();
    assert_eq!(part.code(), Code::FailedPrecondition);
    assert_eq!(part.get_error_details().error_info().unwrap().reason, "UPLOAD_SEALED");
    let tenant = file.uri.split('/').nth(1).unwrap();
    for (uri, code) in [
        (format!("artifact:runs/{tenant}/018f0000-0000-7000-8000-000000000001/"), Code::InvalidArgument),
        (format!("artifact:uploads/{tenant}/"), Code::InvalidArgument),
        ("artifact:uploads/somebody-else/x/".to_owned(), Code::NotFound),
        (format!("artifact:uploads/{tenant}/nothing/"), Code::NotFound),
        (format!("artifact:uploads/{tenant}/nothing"), Code::NotFound),
    ] {
        assert_eq!(delete(&harness, &uri).await.unwrap_err().code(), code, "{uri}");
    }
    assert_eq!(delete(&harness, &sealed.uri).await.unwrap(), 2);
    assert_eq!(delete(&harness, &file.uri).await.unwrap(), 1);
    assert_eq!(harness.artifacts.keys(), [""; 0]);
    assert_eq!(delete(&harness, &file.uri).await.unwrap_err().code(), Code::NotFound);
}
