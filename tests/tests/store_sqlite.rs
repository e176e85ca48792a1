//! The state store on SQLite passes the suite, and answers as the one in memory does.

use std::sync::Arc;

use async_trait::async_trait;
use proptest::prelude::*;
use runner_core::{fake::store::MemoryStore, id::RunId, store::Store};
use runner_store::{DataDirLock, SqliteOptions, SqliteStore};
use runner_tests::{
    store::{StoreFactory, model},
    store_conformance,
};

struct Sqlite(tempfile::TempDir);

#[async_trait]
impl StoreFactory for Sqlite {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    async fn open(&self) -> Arc<dyn Store> {
        // Refused where a handle from before is still there.
        let lock = Arc::new(DataDirLock::acquire(self.0.path()).unwrap());
        Arc::new(SqliteStore::open(lock, &SqliteOptions::default()).unwrap())
    }

    async fn corrupt(&self, id: RunId) {
        let conn = rusqlite::Connection::open(SqliteStore::path(self.0.path())).unwrap();
        let changed = conn
            .execute("UPDATE runs SET state = 'NONSENSE' WHERE id = ?1", [id.as_uuid().as_bytes()])
            .unwrap();
        assert_eq!(changed, 1);
    }
}

store_conformance!(Sqlite);

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn under_random_verbs_it_answers_as_the_one_in_memory(verbs in model::any_verbs()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let place = Sqlite::new();
            let memory = MemoryStore::new();
            let mut sqlite = place.open().await;
            for verb in verbs {
                if matches!(verb, model::Verb::Reopen) {
                    drop(sqlite);
                    sqlite = place.open().await;
                }
                let expected = model::answer(&memory, verb.clone()).await;
                prop_assert_eq!(model::answer(&*sqlite, verb.clone()).await, expected, "{:?}", verb);
            }
            prop_assert_eq!(model::everything(&*sqlite).await, model::everything(&memory).await);
            Ok(())
        })?;
    }
}
