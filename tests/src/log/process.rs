//! The object store as one process sees it, which may die.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, stream, stream::BoxStream};
use runner_core::artifact::{
    ArtifactError, ArtifactErrorKind, ArtifactKey, ArtifactMeta, ArtifactStore, ByteStream,
};
use tokio::sync::{RwLock, RwLockReadGuard};

/// A store until [`Process::die`]; after it, every operation fails and nothing changes any more.
///
/// A process that is killed takes its threads with it. Its successor in a test is in the same process, where a write that had
/// begun in a thread would land under the successor's eyes: so whoever kills it waits for what was under way.
#[derive(Debug)]
pub struct Process {
    store: Arc<dyn ArtifactStore>,
    /// Read by each operation as long as it lasts; written by the death.
    alive: RwLock<bool>,
}

impl Process {
    /// A process that uses this store.
    pub fn over(store: Arc<dyn ArtifactStore>) -> Arc<Self> {
        Arc::new(Self { store, alive: RwLock::new(true) })
    }

    /// Waits for the operations that are under way, and lets no other begin.
    pub async fn die(&self) {
        *self.alive.write().await = false;
    }

    async fn begin(&self) -> Result<RwLockReadGuard<'_, bool>, ArtifactError> {
        let alive = self.alive.read().await;
        if *alive { Ok(alive) } else { Err(died()) }
    }
}

fn died() -> ArtifactError {
    ArtifactError::new(ArtifactErrorKind::Other, "the process died")
}

#[async_trait]
impl ArtifactStore for Process {
    async fn put(&self, key: &ArtifactKey, bytes: ByteStream) -> Result<u64, ArtifactError> {
        let _alive = self.begin().await?;
        self.store.put(key, bytes).await
    }

    async fn put_bytes(&self, key: &ArtifactKey, bytes: Bytes) -> Result<(), ArtifactError> {
        let _alive = self.begin().await?;
        self.store.put_bytes(key, bytes).await
    }

    async fn get(
        &self,
        key: &ArtifactKey,
        range: std::ops::Range<u64>,
    ) -> Result<(ArtifactMeta, ByteStream), ArtifactError> {
        let _alive = self.begin().await?;
        self.store.get(key, range).await
    }

    async fn head(&self, key: &ArtifactKey) -> Result<ArtifactMeta, ArtifactError> {
        let _alive = self.begin().await?;
        self.store.head(key).await
    }

    fn list(&self, prefix: &ArtifactKey) -> BoxStream<'static, Result<ArtifactMeta, ArtifactError>> {
        // Locked for writing: it is dying.
        if self.alive.try_read().is_ok_and(|alive| *alive) {
            self.store.list(prefix)
        } else {
            stream::iter([Err(died())]).boxed()
        }
    }

    async fn delete(&self, key: &ArtifactKey) -> Result<(), ArtifactError> {
        let _alive = self.begin().await?;
        self.store.delete(key).await
    }

    async fn probe(&self) -> Result<(), ArtifactError> {
        let _alive = self.begin().await?;
        self.store.probe().await
    }
}
