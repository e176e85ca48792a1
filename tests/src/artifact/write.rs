//! `put`, `put_bytes`, `delete`, `probe`: rules 1 to 6.
#![allow(missing_docs, reason = "a case's name is the sentence that it shows")]

use std::sync::Arc;

use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, future::join_all, stream};
use runner_core::artifact::ArtifactErrorKind;

use super::{ArtifactPlace, chunked, failing, key, listed, pattern, read};

const MIB: usize = 1024 * 1024;

pub async fn every_size_comes_back_exact<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    for size in
        [0, 1, 2, 65_535, 65_536, MIB, 5 * MIB - 1, 5 * MIB, 5 * MIB + 1, 8 * MIB, 8 * MIB + 1, 17 * MIB]
    {
        let (at, bytes) = (key(&format!("sizes/{size}")), pattern(size));
        assert_eq!(store.put(&at, chunked(bytes.clone(), MIB)).await.unwrap(), size as u64);
        let (meta, found) = read(&*store, &at, 0..u64::MAX).await.unwrap();
        assert_eq!(meta.size, size as u64);
        assert!(found == bytes, "{size} bytes come back exact");
        assert_eq!(store.head(&at).await.unwrap().size, size as u64);
    }
}

pub async fn every_chunking_comes_back_exact<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    let bytes = pattern(300_000);
    for chunk in [1, 7, 4096, 299_999, 300_000, 400_000] {
        let bytes = if chunk == 1 { bytes.slice(..2000) } else { bytes.clone() };
        let at = key(&format!("chunks/{chunk}"));
        // Empty chunks mean nothing.
        let stream =
            chunked(bytes.clone(), chunk).flat_map(|chunk| stream::iter([Ok(Bytes::new()), chunk])).boxed();
        store.put(&at, stream).await.unwrap();
        assert!(read(&*store, &at, 0..u64::MAX).await.unwrap().1 == bytes, "chunks of {chunk}");
    }
}

pub async fn an_empty_object_exists<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    store.put(&key("e/stream"), stream::empty().boxed()).await.unwrap();
    store.put_bytes(&key("e/bytes"), Bytes::new()).await.unwrap();
    assert_eq!(listed(&*store, "e").await, ["e/bytes", "e/stream"]);
    for at in ["e/stream", "e/bytes"] {
        assert_eq!(store.head(&key(at)).await.unwrap().size, 0);
        assert_eq!(read(&*store, &key(at), 0..u64::MAX).await.unwrap().1, b"");
    }
}

pub async fn a_put_replaces_the_object_whole<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    let at = key("a/b");
    store.put(&at, chunked(pattern(9 * MIB), MIB)).await.unwrap();
    store.put_bytes(&at, Bytes::from_static(b"short")).await.unwrap();
    assert_eq!(read(&*store, &at, 0..u64::MAX).await.unwrap().1, b"short");
    store.put(&at, chunked(pattern(9 * MIB), MIB)).await.unwrap();
    assert!(read(&*store, &at, 0..u64::MAX).await.unwrap().1 == pattern(9 * MIB));
}

pub async fn a_stream_that_fails_leaves_nothing<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    for size in [0, 1, 3 * MIB, 9 * MIB, 20 * MIB] {
        let stream = failing(pattern(size), MIB, ArtifactErrorKind::Mismatch);
        let error = store.put(&key("f/x"), stream).await.unwrap_err();
        assert_eq!(error.kind, ArtifactErrorKind::Mismatch, "the stream's own error comes back");
        assert_eq!(store.head(&key("f/x")).await.unwrap_err().kind, ArtifactErrorKind::NotFound);
        assert_eq!(listed(&*store, "f").await, [""; 0]);
        assert_eq!(place.leftovers(), [""; 0], "after {size} bytes");
    }
}

pub async fn a_stream_that_fails_leaves_the_object_that_was_there<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    let at = key("f/x");
    store.put_bytes(&at, Bytes::from_static(b"before")).await.unwrap();
    store.put(&at, failing(pattern(9 * MIB), MIB, ArtifactErrorKind::Other)).await.unwrap_err();
    assert_eq!(read(&*store, &at, 0..u64::MAX).await.unwrap().1, b"before");
    assert_eq!(place.leftovers(), [""; 0]);
}

pub async fn a_put_that_is_dropped_leaves_nothing<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    let endless = chunked(pattern(9 * MIB), MIB).chain(stream::pending()).boxed();
    let at = key("d/x");
    let put = store.put(&at, endless);
    tokio::time::timeout(std::time::Duration::from_millis(200), put).await.unwrap_err();
    assert_eq!(store.head(&at).await.unwrap_err().kind, ArtifactErrorKind::NotFound);
    // What was under way on another thread may end a moment later.
    for _ in 0..500 {
        if place.leftovers().is_empty() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("left behind: {:?}", place.leftovers());
}

pub async fn nothing_is_visible_before_the_put_returns<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    let at = key("v/x");
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let stream =
        stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) });
    let mut put = store.put(&at, stream.boxed());
    for chunk in 0..20 {
        // A chunk is taken while the put is polled; neither ends the other.
        let sent = async { sender.send(Ok(pattern(MIB))).await.unwrap() };
        tokio::select! {
            () = sent => {}
            done = &mut put => panic!("the put ended early: {done:?}"),
        }
        if chunk % 5 == 0 {
            assert_eq!(store.head(&at).await.unwrap_err().kind, ArtifactErrorKind::NotFound);
            assert_eq!(listed(&*store, "v").await, [""; 0]);
        }
    }
    drop(sender);
    assert_eq!(put.await.unwrap(), 20 * MIB as u64);
    assert_eq!(listed(&*store, "v").await, ["v/x"]);
}

pub async fn an_object_of_many_parts_comes_back_exact<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    let at = key("large");
    // Every mebibyte differs, so that parts or ranges in the wrong order show.
    let size = 77 * MIB + 12_345;
    let byte = |at: usize| (at / MIB).wrapping_mul(37) as u8;
    let chunk = |at: usize| -> Bytes { (at..size.min(at + 700_001)).map(byte).collect() };
    let chunks = (0..size).step_by(700_001).map(|at| Ok(chunk(at)));
    let chunks: Vec<_> = chunks.collect();
    assert_eq!(store.put(&at, stream::iter(chunks).boxed()).await.unwrap(), size as u64);
    assert_eq!(place.leftovers(), [""; 0]);
    for (from, to) in [(0, size), (5 * MIB + 7, size), (1, 70 * MIB), (size - 1, size)] {
        let (_, mut bytes) = store.get(&at, from as u64..to as u64).await.unwrap();
        let mut now = from;
        while let Some(chunk) = bytes.next().await {
            for found in chunk.unwrap() {
                assert_eq!(found, byte(now), "at {now} of {from}..{to}");
                now += 1;
            }
        }
        assert_eq!(now, to);
    }
}

pub async fn a_hundred_puts_at_once_all_arrive<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    // New folders all the way: they are made by whoever comes first.
    let name = |n: usize| key(&format!("new/{}/{}/{n}", n % 3, n % 7));
    join_all((0..100).map(|n| {
        let store = Arc::clone(&store);
        async move {
            let bytes = pattern(1000 + n);
            if n % 2 == 0 {
                store.put_bytes(&name(n), bytes).await.unwrap();
            } else {
                store.put(&name(n), chunked(bytes, 100)).await.unwrap();
            }
        }
    }))
    .await;
    assert_eq!(listed(&*store, "new").await.len(), 100);
    for n in 0..100 {
        assert!(read(&*store, &name(n), 0..u64::MAX).await.unwrap().1 == pattern(1000 + n));
    }
    assert_eq!(place.leftovers(), [""; 0]);
}

pub async fn racing_puts_of_one_key_leave_one_of_them_whole<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    let at = key("race");
    let bytes = |n: usize| Bytes::from(vec![n as u8; 100_000 + n]);
    join_all((0..30).map(|n| store.put(&at, chunked(bytes(n), 10_000)))).await.into_iter().for_each(|put| {
        put.unwrap();
    });
    let (_, found) = read(&*store, &at, 0..u64::MAX).await.unwrap();
    assert!((0..30).any(|n| found == bytes(n)), "{} bytes of {:?}", found.len(), found.first());
}

pub async fn delete_removes_and_does_so_twice<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    store.put_bytes(&key("a/b/c"), Bytes::from_static(b"x")).await.unwrap();
    store.put_bytes(&key("a/b/d"), Bytes::from_static(b"y")).await.unwrap();
    store.delete(&key("a/b/c")).await.unwrap();
    store.delete(&key("a/b/c")).await.unwrap();
    store.delete(&key("never/was")).await.unwrap();
    // A prefix is no object: deleting it deletes nothing.
    store.delete(&key("a/b")).await.unwrap();
    assert_eq!(listed(&*store, "a").await, ["a/b/d"]);
    assert_eq!(store.head(&key("a/b/c")).await.unwrap_err().kind, ArtifactErrorKind::NotFound);
}

pub async fn what_was_put_outlives_the_store_s_value<P: ArtifactPlace>(place: &P) {
    if !P::DURABLE {
        return;
    }
    let store = place.open();
    store.put(&key("k/1"), chunked(pattern(9 * MIB), MIB)).await.unwrap();
    drop(store);
    let store = place.open();
    assert!(read(&*store, &key("k/1"), 0..u64::MAX).await.unwrap().1 == pattern(9 * MIB));
}

pub async fn probe_answers_and_leaves_nothing<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    join_all((0..10).map(|_| store.probe().map(Result::unwrap))).await;
    assert_eq!(listed(&*store, "probes").await, [""; 0]);
    assert_eq!(place.leftovers(), [""; 0]);
}
