//! Transfers are whole or absent, and stay where they belong.

mod support;

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    sync::{Arc, Mutex},
};

use futures::TryStreamExt as _;
use sha2::{Digest as _, Sha256};
use support::{Answer, Fake, blobs::Fault};
use tonic::Status;
use worker_client::{ErrorKind, Irregular, TransferOptions, proto};

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 % 253) as u8).collect()
}

fn digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn options() -> TransferOptions {
    TransferOptions::default()
}

/// Names in a directory, hidden ones too: what a failed transfer must not leave.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("read dir");
    let mut names: Vec<_> =
        entries.map(|e| e.expect("entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn file_entry(output: &str, path: &str, uri: &str, contents: &[u8]) -> proto::ManifestEntry {
    proto::ManifestEntry {
        output: output.to_owned(),
        path: path.to_owned(),
        kind: proto::manifest_entry::Kind::File.into(),
        size: contents.len() as u64,
        sha256: digest(contents),
        mode: 0o640,
        uri: uri.to_owned(),
        ..proto::ManifestEntry::default()
    }
}

fn manifest(entries: Vec<proto::ManifestEntry>) -> proto::Manifest {
    proto::Manifest { partial: false, total_bytes: entries.iter().map(|e| e.size).sum(), entries }
}

#[tokio::test]
async fn a_file_is_announced_with_its_digest_and_stored_whole() {
    let fake = Fake::start().await;
    let dir = tempfile::tempdir().expect("temp dir");
    let contents = bytes(1_000_000);
    fs::write(dir.path().join("data"), &contents).expect("write");
    let seen = Arc::new(Mutex::new(Vec::new()));
    let record = Arc::clone(&seen);
    let progress = options().progress(move |p| record.lock().expect("lock").push(p));
    let stored = fake.client().await.upload_file(dir.path().join("data"), progress).await.expect("upload");
    assert_eq!(stored.size, 1_000_000);
    assert_eq!(stored.sha256, digest(&contents));
    assert!(fake.blobs.inner().objects[&stored.uri] == contents);
    assert_eq!(fake.state().uploads[0].sha256, stored.sha256);
    let last = *seen.lock().expect("lock").last().expect("progress");
    assert_eq!((last.bytes_done, last.bytes_total, last.files_done), (1_000_000, 1_000_000, 1));
}

#[tokio::test]
async fn an_upload_is_tried_again_under_a_new_url() {
    let fake = Fake::start().await;
    let dir = tempfile::tempdir().expect("temp dir");
    fs::write(dir.path().join("data"), bytes(70_000)).expect("write");
    fake.blobs.inner().faults.extend([Fault::Status(503), Fault::LoseAnswer, Fault::Busy]);
    let stored = fake.client().await.upload_file(dir.path().join("data"), options()).await.expect("upload");
    assert!(fake.blobs.inner().objects[&stored.uri] == bytes(70_000));
    assert_eq!(fake.state().uploads.len(), 4);
}

#[tokio::test]
async fn a_refused_upload_is_not_tried_again_and_says_why() {
    let fake = Fake::start().await;
    let dir = tempfile::tempdir().expect("temp dir");
    fs::write(dir.path().join("data"), "x").expect("write");
    fake.blobs.inner().faults.push_back(Fault::Status(400));
    let error =
        fake.client().await.upload_file(dir.path().join("data"), options()).await.expect_err("refused");
    assert_eq!((error.kind(), error.reason()), (ErrorKind::Integrity, Some("DIGEST_MISMATCH")));
    assert_eq!(fake.state().uploads.len(), 1);
    // Other bytes at the same place: a conflict that does not pass.
    fake.blobs.inner().faults.push_back(Fault::Status(409));
    let error =
        fake.client().await.upload_file(dir.path().join("data"), options()).await.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
}

#[tokio::test]
async fn only_regular_files_are_uploaded() {
    let fake = Fake::start().await;
    let error = fake.client().await.upload_file("/dev/null", options()).await.expect_err("a device");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let error = fake.client().await.upload_file("/nowhere/at/all", options()).await.expect_err("missing");
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(fake.state().uploads.is_empty());
}

#[tokio::test]
async fn a_tree_is_one_upload_and_is_sealed_last() {
    let fake = Fake::start().await;
    let dir = tempfile::tempdir().expect("temp dir");
    fs::create_dir_all(dir.path().join("sub/empty")).expect("dirs");
    for i in 0..40 {
        fs::write(dir.path().join(format!("sub/{i:02}")), bytes(i)).expect("write");
    }
    symlink("/etc/passwd", dir.path().join("link")).expect("link");
    fake.blobs.inner().faults.extend([Fault::LoseAnswer, Fault::Status(500)]);

    let client = fake.client().await;
    let error = client.upload_tree(dir.path(), options()).await.expect_err("a link");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(fake.state().calls.is_empty(), "nothing was sent");

    let skipping = options().irregular(Irregular::Skip);
    let tree = client.upload_tree(dir.path(), skipping).await.expect("upload");
    assert_eq!((tree.files, tree.uri.ends_with('/')), (40, true));
    assert_eq!(tree.skipped, [dir.path().join("link")]);
    assert_eq!(fake.state().calls.last(), Some(&"seal_tree"));
    assert_eq!(fake.state().sealed.len(), 1);
    let sealed = fake.state().sealed[0].clone();
    let empty = sealed.entries.iter().find(|entry| entry.path == "sub/empty").expect("the empty directory");
    assert!(empty.directory);
    for i in 0..40 {
        let uri = format!("{}sub/{i:02}", tree.uri);
        assert!(fake.blobs.inner().objects[&uri] == bytes(i), "{uri}");
    }
}

#[tokio::test]
async fn an_empty_tree_is_a_tree() {
    let fake = Fake::start().await;
    let dir = tempfile::tempdir().expect("temp dir");
    let tree = fake.client().await.upload_tree(dir.path(), options()).await.expect("upload");
    assert_eq!(tree.files, 0);
    assert!(fake.blobs.inner().objects.is_empty());
}

#[tokio::test]
async fn a_broken_download_goes_on_where_it_stopped() {
    let fake = Fake::start().await;
    let dir = tempfile::tempdir().expect("temp dir");
    let contents = bytes(500_000);
    fake.blobs.put("artifact:a", contents.clone());
    fake.blobs.inner().faults.extend([
        Fault::CutBody(123_456),
        Fault::CutBody(0),
        Fault::Status(503),
        Fault::CutBody(200_000),
    ]);
    let dest = dir.path().join("made/out");
    let (client, digest) = (fake.client().await, digest(&contents));
    let got = client.download("artifact:a", &dest, Some(&digest), options()).await.expect("download");
    assert_eq!(got.size, 500_000);
    assert!(fs::read(&dest).expect("read") == contents);
    assert_eq!(names(&dir.path().join("made")), ["out"]);
    let requests = fake.blobs.inner().requests.clone();
    assert!(requests[1].ends_with("bytes=123456-"), "{requests:?}");
    assert!(requests[4].ends_with("bytes=323456-"), "{requests:?}");
}

#[tokio::test]
async fn a_server_without_ranges_costs_a_fresh_start_and_nothing_else() {
    let fake = Fake::start().await;
    let dir = tempfile::tempdir().expect("temp dir");
    let contents = bytes(50_000);
    fake.blobs.put("artifact:a", contents.clone());
    fake.blobs.inner().faults.extend([Fault::CutBody(40_000), Fault::IgnoreRange]);
    let dest = dir.path().join("out");
    fake.client().await.download("artifact:a", &dest, None, options()).await.expect("download");
    assert!(fs::read(&dest).expect("read") == contents);
}

#[tokio::test]
async fn a_wrong_digest_leaves_the_old_file_and_no_part() {
    let fake = Fake::start().await;
    let dir = tempfile::tempdir().expect("temp dir");
    fake.blobs.put("artifact:a", "new");
    let dest = dir.path().join("out");
    fs::write(&dest, "old").expect("write");
    let client = fake.client().await;
    let error = client.download("artifact:a", &dest, Some(&digest(b"other")), options()).await;
    assert_eq!(error.expect_err("differs").kind(), ErrorKind::Integrity);
    assert_eq!(fs::read(&dest).expect("read"), b"old");
    assert_eq!(names(dir.path()), ["out"]);

    let error = client.download("artifact:none", &dest, None, options()).await.expect_err("missing");
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn outputs_lie_below_the_directory_with_their_modes() {
    let fake = Fake::start().await;
    let dir = tempfile::tempdir().expect("temp dir");
    fake.blobs.put("artifact:r", "report");
    fake.blobs.put("artifact:d", "deep");
    let directory = proto::ManifestEntry {
        output: "/outputs/tree".to_owned(),
        path: "empty".to_owned(),
        kind: proto::manifest_entry::Kind::Directory.into(),
        mode: 0o500,
        ..proto::ManifestEntry::default()
    };
    let mut odd = file_entry("/outputs/tree", "a%FF/b", "artifact:d", b"deep");
    odd.path_encoded = true;
    let whole = manifest(vec![directory, odd, file_entry("/outputs/report", "", "artifact:r", b"report")]);
    let client = fake.client().await;
    let got = client.download_outputs(&whole, dir.path(), options()).await.expect("download");
    assert_eq!(got.len(), 2);
    let report = dir.path().join("outputs/report");
    assert_eq!(fs::read(&report).expect("read"), b"report");
    assert_eq!(fs::metadata(&report).expect("metadata").permissions().mode() & 0o777, 0o640);
    assert!(dir.path().join("outputs/tree/empty").is_dir());
    let odd: std::path::PathBuf = dir
        .path()
        .join("outputs/tree")
        .join(worker_client::manifest_path(&whole.entries[1]).expect("safe")[2].clone());
    assert_eq!(fs::read(odd.join("b")).expect("read"), b"deep");
    // Again, over itself.
    client.download_outputs(&whole, dir.path(), options()).await.expect("download again");
}

#[tokio::test]
async fn one_output_goes_where_the_caller_says() {
    let fake = Fake::start().await;
    let dir = tempfile::tempdir().expect("temp dir");
    fake.blobs.put("artifact:r", "report");
    let whole = manifest(vec![
        file_entry("/outputs/report", "", "artifact:r", b"report"),
        file_entry("/outputs/tree", "x/y", "artifact:r", b"report"),
    ]);
    let client = fake.client().await;
    let at = |name: &str| dir.path().join(name);
    client.download_output(&whole, "/outputs/report", at("renamed"), options()).await.expect("a file");
    client.download_output(&whole, "/outputs/report", dir.path(), options()).await.expect("into a directory");
    client.download_output(&whole, "/outputs/tree", at("t"), options()).await.expect("a tree");
    assert_eq!(names(dir.path()), ["renamed", "report", "t"]);
    assert_eq!(fs::read(at("t/x/y")).expect("read"), b"report");
    let error =
        client.download_output(&whole, "/outputs/none", at("n"), options()).await.expect_err("absent");
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn a_hostile_manifest_writes_nothing_anywhere() {
    let fake = Fake::start().await;
    let outer = tempfile::tempdir().expect("temp dir");
    let dir = outer.path().join("dir");
    fake.blobs.put("artifact:r", "evil");
    let client = fake.client().await;
    let evil = |output: &str, path: &str| file_entry(output, path, "artifact:r", b"evil");
    let mut encoded = evil("/o", "%2E%2E/x");
    encoded.path_encoded = true;
    for entries in [
        vec![evil("/o", "fine"), evil("/o", "../../x")],
        vec![evil("/o", "fine"), evil("/../x", "")],
        vec![evil("/o", "fine"), evil("/o", "/x")],
        vec![evil("/o", "fine"), encoded],
        vec![evil("/o", "fine"), evil("/o", "fine")],
    ] {
        let error = client.download_outputs(&manifest(entries), &dir, options()).await.expect_err("hostile");
        assert_eq!(error.kind(), ErrorKind::UnsafePath);
        assert!(names(outer.path()).is_empty());
    }
}

#[tokio::test]
async fn a_link_in_the_way_is_not_followed() {
    let fake = Fake::start().await;
    let outer = tempfile::tempdir().expect("temp dir");
    let (dir, outside) = (outer.path().join("dir"), outer.path().join("outside"));
    fs::create_dir_all(&dir).expect("dir");
    fs::create_dir_all(&outside).expect("dir");
    symlink(&outside, dir.join("o")).expect("link");
    fake.blobs.put("artifact:r", "evil");
    let client = fake.client().await;
    let one = manifest(vec![file_entry("/o", "x", "artifact:r", b"evil")]);
    let error = client.download_outputs(&one, &dir, options()).await.expect_err("a link");
    assert_eq!(error.kind(), ErrorKind::UnsafePath);
    assert!(names(&outside).is_empty());

    // A link in the place of the file itself is replaced; what it points to stays.
    let victim = outside.join("victim");
    fs::write(&victim, "mine").expect("write");
    symlink(&victim, dir.join("f")).expect("link");
    let one = manifest(vec![file_entry("/f", "", "artifact:r", b"evil")]);
    client.download_outputs(&one, &dir, options()).await.expect("download");
    assert_eq!(fs::read(&victim).expect("read"), b"mine");
    assert_eq!(fs::read(dir.join("f")).expect("read"), b"evil");
}

#[tokio::test]
async fn a_file_that_differs_from_the_manifest_is_not_kept() {
    let fake = Fake::start().await;
    let dir = tempfile::tempdir().expect("temp dir");
    fake.blobs.put("artifact:r", "good");
    let client = fake.client().await;
    for contents in [&b"evil"[..], b"longer", b"s"] {
        let one = manifest(vec![file_entry("/f", "", "artifact:r", contents)]);
        let error = client.download_outputs(&one, dir.path(), options()).await.expect_err("differs");
        assert_eq!(error.kind(), ErrorKind::Integrity);
        assert!(names(dir.path()).is_empty());
    }
}

#[tokio::test]
async fn a_listing_asks_for_each_page_once_and_again_where_the_answer_is_lost() {
    let fake = Fake::start().await;
    for name in ["a/1", "a/2", "a/3", "a/4", "a/5", "b/1"] {
        fake.blobs.put(&format!("artifact:{name}"), "x");
    }
    fake.state().answers.push_back(Answer::Refuse(Status::unavailable("restarting")));
    let listed: Vec<_> = fake.client().await.list_artifacts("artifact:a/").try_collect().await.expect("list");
    let uris: Vec<_> = listed.iter().map(|artifact| artifact.uri.as_str()).collect();
    assert_eq!(uris, ["artifact:a/1", "artifact:a/2", "artifact:a/3", "artifact:a/4", "artifact:a/5"]);
    assert_eq!(fake.state().calls, ["list_artifacts"; 4]);
}

#[tokio::test]
async fn a_deletion_whose_answer_was_lost_is_not_made_again() {
    let fake = Fake::start().await;
    fake.blobs.put("artifact:a", "x");
    fake.state().answers.push_back(Answer::Lose);
    let error = fake.client().await.delete_artifacts("artifact:a").await.expect_err("lost");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(fake.state().calls, ["delete_artifacts"]);
}
