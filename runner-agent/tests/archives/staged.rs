//! Archives as inputs: from the store to the directory that the program sees.

#[path = "../staging_kit/mod.rs"]
mod staging_kit;

use std::{fs, os::unix::fs::symlink};

use bytes::Bytes;
use runner_agent::staging::{StagingErrorKind, StagingLimits};
use runner_core::{
    artifact::ArtifactStore as _,
    spec::{Archive, Input},
};
use staging_kit::*;

use crate::kit::{Tar, gz};

async fn packed(extract: Archive, bytes: &[u8], more: Vec<Input>) -> Bench {
    let input = Input { extract: Some(extract), ..artifact("/inputs/src", "uploads/t/a") };
    let inputs = [vec![Input { sha256: Some(digest(bytes)), ..input }], more].concat();
    let bench = Bench::new(inputs, vec![]);
    bench.store.put_bytes(&key("uploads/t/a"), Bytes::copy_from_slice(bytes)).await.unwrap();
    bench
}

fn archive() -> Vec<u8> {
    Tar::default().dir("bin").entry("bin/tool", b'0', b"#!/bin/sh").file("deep/er/x", b"xx").end()
}

#[tokio::test]
async fn an_archive_becomes_a_directory_and_nothing_of_it_is_left_aside() {
    let bytes = gz(&archive());
    let bench = packed(Archive::TarGz, &bytes, vec![inline("/inputs/src/deep/mine", b"own")]).await;
    let staged = bench.stage().await.unwrap();
    assert_eq!((staged.files, staged.bytes), (3, 9 + 2 + 3));
    assert_eq!(
        below(&bench.at("in/0/src")),
        ["bin", "bin/tool", "deep", "deep/er", "deep/er/x", "deep/mine"]
    );
    assert_eq!(fs::read(bench.at("in/0/src/deep/er/x")).unwrap(), b"xx");
    assert_eq!(mode(&bench.at("in/0/src/bin/tool")), 0o644);
    bench.assert_no_partial_files();
    // Again: the same answer, and nothing is touched.
    assert_eq!(bench.stage().await.unwrap(), staged);
}

#[tokio::test]
async fn an_archive_whose_digest_is_wrong_is_not_unpacked_at_all() {
    let bytes = archive();
    let bench = packed(Archive::Tar, &bytes, vec![]).await;
    bench.store.put_bytes(&key("uploads/t/a"), Tar::default().file("evil", b"x").end().into()).await.unwrap();
    assert_eq!(bench.stage().await.unwrap_err().kind, StagingErrorKind::Mismatch);
    assert_eq!(below(&bench.at("in/0/src")), [""; 0]);
    bench.assert_no_partial_files();
}

#[tokio::test]
async fn a_hostile_archive_fails_as_its_input_and_a_good_one_in_its_place_is_staged() {
    let evil = Tar::default().file("good", b"x").file("../../../evil", b"x").end();
    let bench = packed(Archive::Tar, &evil, vec![]).await;
    let error = bench.stage().await.unwrap_err();
    assert_eq!((error.kind, error.field.as_str()), (StagingErrorKind::Malformed, "spec.inputs[0]"));
    assert!(!error.kind.retryable() && error.to_string().contains("evil"), "{error}");
    let top: Vec<String> = below(bench.dir.path());
    assert!(top.iter().all(|path| !path.contains("evil")), "{top:?}");
}

#[tokio::test]
async fn limits_count_what_is_unpacked() {
    let bytes = gz(&Tar::default().file("a", &[1; 5000]).end());
    let bench = packed(Archive::TarGz, &bytes, vec![]).await;
    let limits = StagingLimits { input_bytes: 5000, ..StagingLimits::default() };
    let bench = Bench { limits, ..bench };
    assert_eq!(bench.stage().await.unwrap_err().kind, StagingErrorKind::LimitExceeded);
    let limits = StagingLimits { input_bytes: 5000 + bytes.len() as u64, ..StagingLimits::default() };
    let bench = Bench { limits, ..bench };
    bench.stage().await.unwrap();
    let limits = StagingLimits { input_entries: 2, ..StagingLimits::default() };
    let bench = Bench { limits, ..packed(Archive::TarGz, &bytes, vec![]).await };
    assert_eq!(bench.stage().await.unwrap_err().kind, StagingErrorKind::LimitExceeded);
}

#[tokio::test]
async fn a_directory_that_becomes_a_link_while_it_is_unpacked_into_leads_nowhere() {
    let outside = tempfile::tempdir().unwrap();
    let bytes = Tar::default().file("d/x", b"x").end();
    let bench = packed(Archive::Tar, &bytes, vec![]).await;
    // As if something else had put it there: the staging root is never trusted.
    fs::create_dir_all(bench.at("in/0")).unwrap();
    symlink(outside.path(), bench.at("in/0/src")).unwrap();
    // Whether it clears the link or fails, nothing goes through it.
    let _ = bench.stage().await;
    assert_eq!(below(outside.path()), [""; 0]);
}

#[tokio::test]
async fn read_only_directories_of_an_archive_are_filled_before_they_are_closed() {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_path("ro/").unwrap();
    header.set_mode(0o555);
    header.set_size(0);
    header.set_cksum();
    let bytes = Tar::default().raw(header.as_bytes()).file("ro/x", b"x").end();
    let bench = packed(Archive::Tar, &bytes, vec![]).await;
    bench.stage().await.unwrap();
    assert_eq!(mode(&bench.at("in/0/src/ro")), 0o555);
    assert_eq!(fs::read(bench.at("in/0/src/ro/x")).unwrap(), b"x");
}
