//! The state store in memory passes the suite of the real one.

use std::sync::Arc;

use async_trait::async_trait;
use runner_core::{fake::store::MemoryStore, id::RunId, store::Store};
use runner_tests::{store::StoreFactory, store_conformance};

struct Memory(MemoryStore);

#[async_trait]
impl StoreFactory for Memory {
    fn new() -> Self {
        Self(MemoryStore::new())
    }

    async fn open(&self) -> Arc<dyn Store> {
        Arc::new(self.0.clone())
    }

    async fn corrupt(&self, id: RunId) {
        self.0.corrupt(id);
    }
}

store_conformance!(Memory);

#[test]
fn a_fault_that_is_set_is_every_verb_s_answer() {
    runner_tests::store::block_on(async {
        use runner_core::store::StoreError;
        use runner_tests::store::kit;

        let store = MemoryStore::new();
        store.set_fault(Some(StoreError::Full("a test".to_owned())));
        let error = store.accept(kit::run(1), kit::NO_LIMITS).await.unwrap_err();
        assert!(matches!(error, StoreError::Full(_)), "{error:?}");
        assert!(matches!(store.probe().await, Err(StoreError::Full(_))));
        store.set_fault(None);
        assert_eq!(store.get(kit::id(1)).await.unwrap(), None);
    });
}
