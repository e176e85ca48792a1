//! An artifact store in memory that remembers the order of what was put, holds readers up, and fails on demand.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream, stream::BoxStream};
use runner_core::artifact::{
    ArtifactError, ArtifactErrorKind, ArtifactKey, ArtifactMeta, ArtifactStore, ByteStream,
};
use tokio::sync::watch;

/// Whether readers pass, and how many wait.
#[derive(Debug, Clone, Copy, Default)]
struct Gate {
    closed: bool,
    waiting: usize,
}

#[derive(Debug, Default)]
struct Inner {
    objects: BTreeMap<String, Bytes>,
    put_order: Vec<String>,
    get_fault: Option<ArtifactErrorKind>,
    put_fault: Option<ArtifactErrorKind>,
}

/// The store.
#[derive(Debug)]
pub struct GatedStore {
    inner: Mutex<Inner>,
    gate: watch::Sender<Gate>,
}

impl Default for GatedStore {
    fn default() -> Self {
        Self { inner: Mutex::default(), gate: watch::Sender::new(Gate::default()) }
    }
}

/// Counts a reader as waiting for as long as it lives, also where it is dropped.
struct Waiting<'a>(&'a watch::Sender<Gate>);

impl<'a> Waiting<'a> {
    fn at(gate: &'a watch::Sender<Gate>) -> Self {
        gate.send_modify(|gate| gate.waiting += 1);
        Self(gate)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|gate| gate.waiting -= 1);
    }
}

impl GatedStore {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keys in the order in which they became visible. A key that was put twice is there twice.
    pub fn put_order(&self) -> Vec<String> {
        self.lock().put_order.clone()
    }

    /// Makes every read wait.
    pub fn close_gate(&self) {
        self.gate.send_modify(|gate| gate.closed = true);
    }

    /// Lets them go on.
    pub fn open_gate(&self) {
        self.gate.send_modify(|gate| gate.closed = false);
    }

    /// Returns once `count` readers wait at the gate.
    pub async fn wait_for_waiting(&self, count: usize) {
        let mut gate = self.gate.subscribe();
        // The sender is ours, so it cannot be gone.
        let _ = gate.wait_for(|gate| gate.waiting >= count).await;
    }

    /// Makes every read fail, or work again.
    pub fn fail_reads(&self, fault: Option<ArtifactErrorKind>) {
        self.lock().get_fault = fault;
    }

    /// Makes every write fail, or work again.
    pub fn fail_writes(&self, fault: Option<ArtifactErrorKind>) {
        self.lock().put_fault = fault;
    }

    /// Stores an object without any gate or fault.
    pub fn seed(&self, key: &ArtifactKey, bytes: impl Into<Bytes>) {
        self.lock().objects.insert(key.to_string(), bytes.into());
    }

    /// Reads an object without any gate or fault.
    pub fn peek(&self, key: &ArtifactKey) -> Option<Bytes> {
        self.lock().objects.get(key.as_str()).cloned()
    }

    fn insert(&self, key: &ArtifactKey, bytes: Bytes) -> Result<(), ArtifactError> {
        let mut inner = self.lock();
        if let Some(kind) = inner.put_fault {
            return Err(ArtifactError::new(kind, format!("put {key}: injected fault")));
        }
        inner.objects.insert(key.to_string(), bytes);
        inner.put_order.push(key.to_string());
        Ok(())
    }

    async fn read(&self, key: &ArtifactKey) -> Result<Bytes, ArtifactError> {
        if self.gate.borrow().closed {
            let _waiting = Waiting::at(&self.gate);
            let _ = self.gate.subscribe().wait_for(|gate| !gate.closed).await;
        }
        let inner = self.lock();
        if let Some(kind) = inner.get_fault {
            return Err(ArtifactError::new(kind, format!("get {key}: injected fault")));
        }
        let missing = || ArtifactError::new(ArtifactErrorKind::NotFound, format!("get {key}: there is none"));
        inner.objects.get(key.as_str()).cloned().ok_or_else(missing)
    }
}

#[async_trait]
impl ArtifactStore for GatedStore {
    async fn put(&self, key: &ArtifactKey, bytes: ByteStream) -> Result<u64, ArtifactError> {
        let all = bytes
            .try_fold(Vec::new(), |mut all, chunk| async move {
                all.extend_from_slice(&chunk);
                Ok(all)
            })
            .await?;
        let size = all.len() as u64;
        self.insert(key, all.into())?;
        Ok(size)
    }

    async fn put_bytes(&self, key: &ArtifactKey, bytes: Bytes) -> Result<(), ArtifactError> {
        self.insert(key, bytes)
    }

    async fn get(
        &self,
        key: &ArtifactKey,
        range: Range<u64>,
    ) -> Result<(ArtifactMeta, ByteStream), ArtifactError> {
        let whole = self.read(key).await?;
        let size = whole.len() as u64;
        let end = range.end.min(size);
        let start = range.start.min(end);
        let mut part = whole.slice(usize::try_from(start).unwrap_or(0)..usize::try_from(end).unwrap_or(0));
        let mut chunks = Vec::new();
        while !part.is_empty() {
            chunks.push(Ok(part.split_to(part.len().min(256 * 1024))));
        }
        Ok((ArtifactMeta { key: key.clone(), size }, stream::iter(chunks).boxed()))
    }

    async fn head(&self, key: &ArtifactKey) -> Result<ArtifactMeta, ArtifactError> {
        let size = self.read(key).await?.len() as u64;
        Ok(ArtifactMeta { key: key.clone(), size })
    }

    fn list(&self, prefix: &ArtifactKey) -> BoxStream<'static, Result<ArtifactMeta, ArtifactError>> {
        let below = format!("{prefix}/");
        let found: Vec<_> = self
            .lock()
            .objects
            .iter()
            .filter(|(key, _)| key.starts_with(&below))
            .filter_map(|(key, bytes)| {
                Some(Ok(ArtifactMeta { key: key.parse().ok()?, size: bytes.len() as u64 }))
            })
            .collect();
        stream::iter(found).boxed()
    }

    async fn delete(&self, key: &ArtifactKey) -> Result<(), ArtifactError> {
        self.lock().objects.remove(key.as_str());
        Ok(())
    }

    async fn probe(&self) -> Result<(), ArtifactError> {
        Ok(())
    }
}
