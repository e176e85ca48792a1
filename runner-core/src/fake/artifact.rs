//! An object store in memory, with faults on demand.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{
    StreamExt as _, TryStreamExt as _,
    stream::{self, BoxStream},
};

use crate::artifact::{
    ArtifactError, ArtifactErrorKind, ArtifactKey, ArtifactMeta, ArtifactStore, ByteStream,
};

/// What is done to a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum ArtifactOp {
    Put,
    Get,
    /// A chunk of an object that is being read.
    Read,
    Head,
    List,
    Delete,
    Probe,
}

#[derive(Debug)]
struct Fault {
    op: ArtifactOp,
    /// Passages that go well before.
    skip: u64,
    /// Failures left.
    left: u64,
    kind: ArtifactErrorKind,
}

#[derive(Debug, Default)]
struct Inner {
    objects: BTreeMap<String, Bytes>,
    faults: VecDeque<Fault>,
    delay: Duration,
    vanishing: Vec<ArtifactKey>,
}

/// An object store in memory. Loses everything when it is dropped, so rule 4 of [`ArtifactStore`] holds only for as long as
/// the value lives. What is read is a snapshot: replacing or deleting an object does not disturb its readers.
#[derive(Debug, Default)]
pub struct MemoryArtifacts {
    inner: Mutex<Inner>,
}

/// Size of the chunks that it yields, in bytes.
const CHUNK: usize = 256 * 1024;

impl MemoryArtifacts {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `skip` operations of this kind pass, then fails the `times` next ones. Faults of one kind of operation are
    /// worked off one after another, in the order in which they were set.
    pub fn fail(&self, op: ArtifactOp, skip: u64, times: u64, kind: ArtifactErrorKind) {
        self.lock().faults.push_back(Fault { op, skip, left: times, kind });
    }

    /// Fails the `times` next operations of this kind.
    pub fn fail_next(&self, op: ArtifactOp, times: u64, kind: ArtifactErrorKind) {
        self.fail(op, 0, times, kind);
    }

    /// Takes this long for every operation and every chunk from now on.
    pub fn slow(&self, delay: Duration) {
        self.lock().delay = delay;
    }

    /// Removes the object when it is next opened for reading, so that one who has seen it finds it gone.
    pub fn vanish(&self, key: &ArtifactKey) {
        self.lock().vanishing.push(key.clone());
    }

    /// Every key, sorted.
    pub fn keys(&self) -> Vec<String> {
        self.lock().objects.keys().cloned().collect()
    }

    /// An object's bytes.
    pub fn bytes(&self, key: &ArtifactKey) -> Option<Bytes> {
        self.lock().objects.get(key.as_str()).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn pass(&self, op: ArtifactOp, key: &str) -> Result<(), ArtifactError> {
        let delay = self.lock().delay;
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        self.lock().trip(op, key)
    }
}

impl Inner {
    fn trip(&mut self, op: ArtifactOp, key: &str) -> Result<(), ArtifactError> {
        let Some(at) = self.faults.iter().position(|fault| fault.op == op) else { return Ok(()) };
        let fault = &mut self.faults[at];
        if fault.skip > 0 {
            fault.skip -= 1;
            return Ok(());
        }
        let kind = fault.kind;
        fault.left = fault.left.saturating_sub(1);
        if fault.left == 0 {
            self.faults.remove(at);
        }
        Err(ArtifactError::new(kind, format!("{op:?} of {key}: a fault was set")))
    }
}

fn not_found(key: &ArtifactKey) -> ArtifactError {
    ArtifactError::new(ArtifactErrorKind::NotFound, format!("{key}: there is no such object"))
}

#[async_trait]
impl ArtifactStore for MemoryArtifacts {
    async fn put(&self, key: &ArtifactKey, mut bytes: ByteStream) -> Result<u64, ArtifactError> {
        let mut all = Vec::new();
        while let Some(chunk) = bytes.try_next().await? {
            all.extend_from_slice(&chunk);
        }
        let size = all.len() as u64;
        self.put_bytes(key, all.into()).await?;
        Ok(size)
    }

    async fn put_bytes(&self, key: &ArtifactKey, bytes: Bytes) -> Result<(), ArtifactError> {
        self.pass(ArtifactOp::Put, key.as_str()).await?;
        self.lock().objects.insert(key.as_str().to_owned(), bytes);
        Ok(())
    }

    async fn get(
        &self,
        key: &ArtifactKey,
        range: Range<u64>,
    ) -> Result<(ArtifactMeta, ByteStream), ArtifactError> {
        self.pass(ArtifactOp::Get, key.as_str()).await?;
        let mut inner = self.lock();
        if let Some(at) = inner.vanishing.iter().position(|vanishing| vanishing == key) {
            inner.vanishing.remove(at);
            inner.objects.remove(key.as_str());
        }
        let object = inner.objects.get(key.as_str()).cloned().ok_or_else(|| not_found(key))?;
        let delay = inner.delay;
        let meta = ArtifactMeta { key: key.clone(), size: object.len() as u64 };
        let cut = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(object.len());
        let (start, end) = (cut(range.start), cut(range.end));
        let wanted = if start < end { object.slice(start..end) } else { Bytes::new() };
        // Faults of single chunks are settled now: the stream outlives this borrow.
        let chunks: Vec<Result<Bytes, ArtifactError>> = (0..wanted.len())
            .step_by(CHUNK)
            .map(|at| {
                inner
                    .trip(ArtifactOp::Read, key.as_str())
                    .map(|()| wanted.slice(at..wanted.len().min(at + CHUNK)))
            })
            .collect();
        let stream = stream::iter(chunks).then(move |chunk| async move {
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            chunk
        });
        Ok((meta, stream.boxed()))
    }

    async fn head(&self, key: &ArtifactKey) -> Result<ArtifactMeta, ArtifactError> {
        self.pass(ArtifactOp::Head, key.as_str()).await?;
        let size = self.lock().objects.get(key.as_str()).map(|object| object.len() as u64);
        Ok(ArtifactMeta { key: key.clone(), size: size.ok_or_else(|| not_found(key))? })
    }

    fn list(&self, prefix: &ArtifactKey) -> BoxStream<'static, Result<ArtifactMeta, ArtifactError>> {
        let mut inner = self.lock();
        if let Err(error) = inner.trip(ArtifactOp::List, prefix.as_str()) {
            return stream::iter([Err(error)]).boxed();
        }
        let below = format!("{prefix}/");
        let found: Vec<_> = inner
            .objects
            .range(below.clone()..)
            .take_while(|(key, _)| key.starts_with(&below))
            .filter_map(|(key, object)| {
                Some(Ok(ArtifactMeta { key: key.parse().ok()?, size: object.len() as u64 }))
            })
            .collect();
        stream::iter(found).boxed()
    }

    async fn delete(&self, key: &ArtifactKey) -> Result<(), ArtifactError> {
        self.pass(ArtifactOp::Delete, key.as_str()).await?;
        self.lock().objects.remove(key.as_str());
        Ok(())
    }

    async fn probe(&self) -> Result<(), ArtifactError> {
        self.pass(ArtifactOp::Probe, "the probe object").await
    }
}
