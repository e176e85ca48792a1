//! The state store on PostgreSQL passes the suite, and answers as the one in memory does.

use std::sync::Arc;

use async_trait::async_trait;
use proptest::prelude::*;
use runner_core::{fake::store::MemoryStore, id::RunId, store::Store};
use runner_store::{PostgresStore, postgres::migrate};
use runner_tests::{
    postgres::{Postgres, skip},
    store::{StoreFactory, model},
    store_conformance,
};
use tokio::sync::OnceCell;

struct InSchema {
    server: &'static Postgres,
    schema: OnceCell<String>,
}

impl InSchema {
    async fn schema(&self) -> &str {
        self.schema
            .get_or_init(|| async {
                let schema = self.server.schema().await;
                migrate(&self.server.options(&schema)).await.unwrap();
                schema
            })
            .await
    }
}

#[async_trait]
impl StoreFactory for InSchema {
    fn missing() -> Option<String> {
        Postgres::shared().err().map(str::to_owned)
    }

    fn new() -> Self {
        Self { server: Postgres::shared().unwrap(), schema: OnceCell::new() }
    }

    async fn open(&self) -> Arc<dyn Store> {
        // Waits until the server has seen the end of a handle from before.
        let options = self.server.options(self.schema().await);
        Arc::new(PostgresStore::open(&options).await.unwrap())
    }

    async fn corrupt(&self, id: RunId) {
        let sql = format!("UPDATE {}.runs SET state = 'NONSENSE' WHERE id = $1", self.schema().await);
        let id = id.as_uuid().as_bytes().as_slice();
        assert_eq!(self.server.admin().await.execute(&sql, &[&id]).await.unwrap(), 1);
    }
}

store_conformance!(InSchema);

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn under_random_verbs_it_answers_as_the_one_in_memory(verbs in model::any_verbs()) {
        if let Some(why) = InSchema::missing() {
            skip("under_random_verbs_it_answers_as_the_one_in_memory", &why);
            return Ok(());
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let place = InSchema::new();
            let memory = MemoryStore::new();
            let mut postgres = place.open().await;
            for verb in verbs {
                if matches!(verb, model::Verb::Reopen) {
                    drop(postgres);
                    postgres = place.open().await;
                }
                let expected = model::answer(&memory, verb.clone()).await;
                prop_assert_eq!(model::answer(&*postgres, verb.clone()).await, expected, "{:?}", verb);
            }
            prop_assert_eq!(model::everything(&*postgres).await, model::everything(&memory).await);
            Ok(())
        })?;
    }
}
