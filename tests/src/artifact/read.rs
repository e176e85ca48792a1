//! `get` and `head`.
#![allow(missing_docs, reason = "a case's name is the sentence that it shows")]

use bytes::Bytes;
use futures::TryStreamExt as _;
use runner_core::artifact::{ArtifactErrorKind, read_small};

use super::{ArtifactPlace, chunked, key, pattern, read};

const MIB: usize = 1024 * 1024;

pub async fn ranges_are_cut_at_the_end<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    let at = key("r");
    let bytes = pattern(3 * MIB);
    store.put(&at, chunked(bytes.clone(), MIB)).await.unwrap();
    let size = bytes.len() as u64;
    for range in [
        0..0,
        0..1,
        0..size,
        0..size + 1,
        0..u64::MAX,
        1..2,
        524_287..524_290,
        1_000_000..3_000_000,
        size - 1..size,
        size - 1..u64::MAX,
        size..size,
        size..size + 10,
        size + 10..size + 20,
        u64::MAX - 1..u64::MAX,
    ] {
        let cut = |at: u64| at.min(size) as usize;
        let (meta, found) = read(&*store, &at, range.clone()).await.unwrap();
        assert_eq!(meta.size, size, "the whole size, also of {range:?}");
        assert!(found == bytes[cut(range.start)..cut(range.end)], "{range:?}: {} bytes", found.len());
    }
    store.put_bytes(&at, Bytes::new()).await.unwrap();
    assert_eq!(read(&*store, &at, 0..10).await.unwrap().1, b"");
    assert_eq!(read(&*store, &at, 5..10).await.unwrap().1, b"");
}

pub async fn a_missing_object_is_not_found<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    store.put_bytes(&key("a/b"), Bytes::from_static(b"x")).await.unwrap();
    for missing in ["x", "a/c", "x/y/z", "a", "a/b/c"] {
        let at = key(missing);
        assert_eq!(store.head(&at).await.unwrap_err().kind, ArtifactErrorKind::NotFound, "{missing}");
        for range in [0..u64::MAX, 0..1, 5..6] {
            let error = store.get(&at, range).await.map(drop).unwrap_err();
            assert_eq!(error.kind, ArtifactErrorKind::NotFound, "{missing}");
            assert!(error.context.contains(missing), "{error}");
        }
    }
}

pub async fn a_reader_sees_one_object_while_it_is_replaced<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    let at = key("a");
    let old = pattern(9 * MIB);
    store.put(&at, chunked(old.clone(), MIB)).await.unwrap();
    let (meta, mut stream) = store.get(&at, 0..u64::MAX).await.unwrap();
    let mut found = stream.try_next().await.unwrap().unwrap().to_vec();
    store.put_bytes(&at, Bytes::from(vec![0; 10 * MIB])).await.unwrap();
    while let Some(chunk) = stream.try_next().await.unwrap() {
        found.extend_from_slice(&chunk);
    }
    assert_eq!(meta.size, old.len() as u64);
    assert!(found == old, "the reader sees the old object to its end");
    assert_eq!(store.head(&at).await.unwrap().size, 10 * MIB as u64);
}

pub async fn a_reader_sees_one_object_while_it_is_deleted<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    let at = key("a/b");
    store.put(&at, chunked(pattern(9 * MIB), MIB)).await.unwrap();
    let (_, mut stream) = store.get(&at, 0..u64::MAX).await.unwrap();
    let mut found = stream.try_next().await.unwrap().unwrap().to_vec();
    store.delete(&at).await.unwrap();
    while let Some(chunk) = stream.try_next().await.unwrap() {
        found.extend_from_slice(&chunk);
    }
    assert!(found == pattern(9 * MIB));
}

pub async fn a_large_object_that_is_replaced_is_never_mixed<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    let at = key("a");
    let size = 40 * MIB;
    store.put(&at, chunked(Bytes::from(vec![1; size]), MIB)).await.unwrap();
    let (_, mut stream) = store.get(&at, 0..u64::MAX).await.unwrap();
    let mut found = stream.try_next().await.unwrap().unwrap().len();
    store.put(&at, chunked(Bytes::from(vec![2; size]), MIB)).await.unwrap();
    loop {
        match stream.try_next().await {
            Ok(Some(chunk)) => {
                assert!(chunk.iter().all(|byte| *byte == 1), "a byte of the new object at {found}");
                found += chunk.len();
            }
            Ok(None) => break assert_eq!(found, size, "the old object to its end"),
            Err(error) => break assert_eq!(error.kind, ArtifactErrorKind::Mismatch, "{error}"),
        }
    }
}

pub async fn chunks_stay_small<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    store.put_bytes(&key("a"), pattern(9 * MIB)).await.unwrap();
    let (_, mut stream) = store.get(&key("a"), 0..u64::MAX).await.unwrap();
    while let Some(chunk) = stream.try_next().await.unwrap() {
        assert!(!chunk.is_empty() && chunk.len() <= MIB, "a chunk of {} bytes", chunk.len());
    }
}

pub async fn read_small_refuses_what_is_larger<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    store.put_bytes(&key("a"), pattern(100)).await.unwrap();
    assert_eq!(read_small(&*store, &key("a"), 100).await.unwrap(), pattern(100));
    let error = read_small(&*store, &key("a"), 99).await.unwrap_err();
    assert_eq!(error.kind, ArtifactErrorKind::LimitExceeded);
}
