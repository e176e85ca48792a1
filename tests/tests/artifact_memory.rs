//! The object store in memory passes the suite of the real ones.

use std::sync::Arc;

use runner_core::{artifact::ArtifactStore, fake::artifact::MemoryArtifacts};
use runner_tests::{artifact::ArtifactPlace, artifact_conformance};

struct Memory(Arc<MemoryArtifacts>);

impl ArtifactPlace for Memory {
    const DURABLE: bool = true;

    fn new() -> Self {
        Self(Arc::new(MemoryArtifacts::new()))
    }

    fn open(&self) -> Arc<dyn ArtifactStore> {
        Arc::clone(&self.0) as _
    }

    fn leftovers(&self) -> Vec<String> {
        // It has no place for anything but objects.
        Vec::new()
    }
}

artifact_conformance!(Memory);

mod faults {
    use std::time::Duration;

    use bytes::Bytes;
    use runner_core::{
        artifact::{ArtifactErrorKind, ArtifactStore as _},
        fake::artifact::{ArtifactOp, MemoryArtifacts},
    };
    use runner_tests::artifact::{block_on, key, pattern, read};

    #[test]
    fn a_fault_strikes_where_and_as_often_as_it_was_set() {
        block_on(async {
            let store = MemoryArtifacts::new();
            store.put_bytes(&key("a"), pattern(1024 * 1024)).await.unwrap();
            store.fail(ArtifactOp::Head, 1, 2, ArtifactErrorKind::Unavailable);
            store.head(&key("a")).await.unwrap();
            for _ in 0..2 {
                assert_eq!(store.head(&key("a")).await.unwrap_err().kind, ArtifactErrorKind::Unavailable);
            }
            store.head(&key("a")).await.unwrap();
            store.fail(ArtifactOp::Read, 2, 1, ArtifactErrorKind::Full);
            assert_eq!(read(&store, &key("a"), 0..u64::MAX).await.unwrap_err().kind, ArtifactErrorKind::Full);
            store.fail_next(ArtifactOp::Put, 1, ArtifactErrorKind::Denied);
            let error = store.put_bytes(&key("b"), Bytes::new()).await.unwrap_err();
            assert_eq!(error.kind, ArtifactErrorKind::Denied);
            assert_eq!(store.keys(), ["a"], "a put that fails leaves nothing");
        });
    }

    #[test]
    fn a_vanishing_object_is_seen_and_then_gone() {
        block_on(async {
            let store = MemoryArtifacts::new();
            store.put_bytes(&key("a"), Bytes::from_static(b"x")).await.unwrap();
            store.vanish(&key("a"));
            store.head(&key("a")).await.unwrap();
            let error = store.get(&key("a"), 0..1).await.map(drop).unwrap_err();
            assert_eq!(error.kind, ArtifactErrorKind::NotFound);
            assert!(store.head(&key("a")).await.is_err());
        });
    }

    #[test]
    fn a_slow_store_answers_late() {
        block_on(async {
            let store = MemoryArtifacts::new();
            store.put_bytes(&key("a"), Bytes::from_static(b"x")).await.unwrap();
            store.slow(Duration::from_secs(3600));
            let early = tokio::time::timeout(Duration::from_millis(50), store.head(&key("a"))).await;
            assert!(early.is_err());
        });
    }
}
