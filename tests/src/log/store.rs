//! An object store that counts, fails, stalls and dies as a test wants.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream, stream::BoxStream};
use runner_core::artifact::{
    ArtifactError, ArtifactErrorKind, ArtifactKey, ArtifactMeta, ArtifactStore, ByteStream,
};
use tokio::sync::watch;

/// How often what was done, since the last [`FaultyStore::reset_counts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Counts {
    pub puts: u64,
    pub gets: u64,
    pub heads: u64,
    pub lists: u64,
    pub deletes: u64,
    /// Bytes that readers took.
    pub bytes_read: u64,
}

/// Objects in memory, or an [`ArtifactStore`] below, with faults.
#[derive(Debug)]
pub struct FaultyStore {
    objects: Mutex<BTreeMap<ArtifactKey, Bytes>>,
    below: Option<Arc<dyn ArtifactStore>>,
    /// Every operation fails with this.
    down: Mutex<Option<ArtifactErrorKind>>,
    /// Changes that still succeed before the process "dies". Negative: no limit.
    left: AtomicI64,
    dead: AtomicBool,
    held: watch::Sender<bool>,
    puts: AtomicU64,
    gets: AtomicU64,
    heads: AtomicU64,
    lists: AtomicU64,
    deletes: AtomicU64,
    bytes_read: Arc<AtomicU64>,
}

/// Size of the chunks in which objects are read.
const CHUNK: usize = 64 * 1024;

impl FaultyStore {
    /// Empty, and without faults.
    pub fn new() -> Arc<Self> {
        Self::make(None)
    }

    /// Over another store.
    pub fn over(below: Arc<dyn ArtifactStore>) -> Arc<Self> {
        Self::make(Some(below))
    }

    fn make(below: Option<Arc<dyn ArtifactStore>>) -> Arc<Self> {
        Arc::new(Self {
            objects: Mutex::default(),
            below,
            down: Mutex::default(),
            left: AtomicI64::new(-1),
            dead: AtomicBool::new(false),
            held: watch::Sender::new(false),
            puts: AtomicU64::default(),
            gets: AtomicU64::default(),
            heads: AtomicU64::default(),
            lists: AtomicU64::default(),
            deletes: AtomicU64::default(),
            bytes_read: Arc::default(),
        })
    }

    /// From now on every operation fails so; `None`: none fails.
    pub fn set_down(&self, kind: Option<ArtifactErrorKind>) {
        *self.down.lock().unwrap_or_else(PoisonError::into_inner) = kind;
    }

    /// After `changes` more changes, every operation fails for good, as if the process had died there.
    pub fn die_after(&self, changes: u32) {
        self.left.store(i64::from(changes), Ordering::SeqCst);
    }

    /// A new process: nothing fails.
    pub fn revive(&self) {
        self.left.store(-1, Ordering::SeqCst);
        self.dead.store(false, Ordering::SeqCst);
    }

    /// Whether the "process" died.
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    /// While held, changes wait.
    pub fn hold(&self, held: bool) {
        self.held.send_replace(held);
    }

    /// What was done.
    pub fn counts(&self) -> Counts {
        let get = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        Counts {
            puts: get(&self.puts),
            gets: get(&self.gets),
            heads: get(&self.heads),
            lists: get(&self.lists),
            deletes: get(&self.deletes),
            bytes_read: get(&self.bytes_read),
        }
    }

    /// Counts from zero.
    pub fn reset_counts(&self) {
        for counter in [&self.puts, &self.gets, &self.heads, &self.lists, &self.deletes, &*self.bytes_read] {
            counter.store(0, Ordering::SeqCst);
        }
    }

    /// Names of all objects, sorted. Only without a store below.
    pub fn names(&self) -> Vec<String> {
        self.objects().keys().map(|key| key.as_str().to_owned()).collect()
    }

    /// Changes an object's bytes behind everybody's back.
    ///
    /// # Panics
    /// Where no object's key ends so.
    pub fn tamper(&self, suffix: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut objects = self.objects();
        let (_, bytes) = objects
            .iter_mut()
            .find(|(key, _)| key.as_str().ends_with(suffix))
            .expect("an object to tamper with");
        let mut changed = bytes.to_vec();
        change(&mut changed);
        *bytes = changed.into();
    }

    /// Removes an object behind everybody's back, and answers its bytes.
    ///
    /// # Panics
    /// Where no object's key ends so.
    pub fn steal(&self, suffix: &str) -> (ArtifactKey, Bytes) {
        let mut objects = self.objects();
        let key =
            objects.keys().find(|key| key.as_str().ends_with(suffix)).expect("an object to steal").clone();
        let bytes = objects.remove(&key).unwrap_or_default();
        (key, bytes)
    }

    /// Puts an object behind everybody's back.
    pub fn plant(&self, key: ArtifactKey, bytes: Bytes) {
        self.objects().insert(key, bytes);
    }

    fn objects(&self) -> MutexGuard<'_, BTreeMap<ArtifactKey, Bytes>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self) -> Result<(), ArtifactError> {
        if self.is_dead() {
            return Err(ArtifactError::new(ArtifactErrorKind::Other, "the process died"));
        }
        match *self.down.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(kind) => Err(ArtifactError::new(kind, "the store is down")),
            None => Ok(()),
        }
    }

    /// Waits while held, and counts down to the death.
    async fn change(&self) -> Result<(), ArtifactError> {
        // The sender lives as long as `self`.
        let _ = self.held.subscribe().wait_for(|held| !held).await;
        self.check()?;
        if self.left.load(Ordering::SeqCst) >= 0 && self.left.fetch_sub(1, Ordering::SeqCst) <= 0 {
            self.left.store(0, Ordering::SeqCst);
            self.dead.store(true, Ordering::SeqCst);
            return self.check();
        }
        Ok(())
    }
}

fn not_found(key: &ArtifactKey) -> ArtifactError {
    ArtifactError::new(ArtifactErrorKind::NotFound, format!("no object {key}"))
}

#[async_trait]
impl ArtifactStore for FaultyStore {
    async fn put(&self, key: &ArtifactKey, mut bytes: ByteStream) -> Result<u64, ArtifactError> {
        self.puts.fetch_add(1, Ordering::SeqCst);
        self.check()?;
        if let Some(below) = &self.below {
            self.change().await?;
            return below.put(key, bytes).await;
        }
        let mut whole = Vec::new();
        while let Some(chunk) = bytes.try_next().await? {
            whole.extend_from_slice(&chunk);
        }
        self.change().await?;
        let size = whole.len() as u64;
        self.objects().insert(key.clone(), whole.into());
        Ok(size)
    }

    async fn put_bytes(&self, key: &ArtifactKey, bytes: Bytes) -> Result<(), ArtifactError> {
        self.puts.fetch_add(1, Ordering::SeqCst);
        self.change().await?;
        if let Some(below) = &self.below {
            return below.put_bytes(key, bytes).await;
        }
        self.objects().insert(key.clone(), bytes);
        Ok(())
    }

    async fn get(
        &self,
        key: &ArtifactKey,
        range: std::ops::Range<u64>,
    ) -> Result<(ArtifactMeta, ByteStream), ArtifactError> {
        self.gets.fetch_add(1, Ordering::SeqCst);
        self.check()?;
        let (meta, bytes) = if let Some(below) = &self.below {
            below.get(key, range).await?
        } else {
            let whole = self.objects().get(key).cloned().ok_or_else(|| not_found(key))?;
            let size = whole.len() as u64;
            let end = range.end.min(size);
            let part = whole
                .slice(usize::try_from(range.start.min(end)).unwrap_or(0)..usize::try_from(end).unwrap_or(0));
            let chunks = (0..part.len().div_ceil(CHUNK))
                .map(move |number| Ok(part.slice(number * CHUNK..((number + 1) * CHUNK).min(part.len()))));
            (ArtifactMeta { key: key.clone(), size }, stream::iter(chunks).boxed())
        };
        let read = self.bytes_read.clone();
        let bytes = bytes.inspect_ok(move |chunk| {
            read.fetch_add(chunk.len() as u64, Ordering::SeqCst);
        });
        Ok((meta, bytes.boxed()))
    }

    async fn head(&self, key: &ArtifactKey) -> Result<ArtifactMeta, ArtifactError> {
        self.heads.fetch_add(1, Ordering::SeqCst);
        self.check()?;
        if let Some(below) = &self.below {
            return below.head(key).await;
        }
        let size = self.objects().get(key).map(|bytes| bytes.len() as u64).ok_or_else(|| not_found(key))?;
        Ok(ArtifactMeta { key: key.clone(), size })
    }

    fn list(&self, prefix: &ArtifactKey) -> BoxStream<'static, Result<ArtifactMeta, ArtifactError>> {
        self.lists.fetch_add(1, Ordering::SeqCst);
        if let Err(error) = self.check() {
            return stream::iter([Err(error)]).boxed();
        }
        if let Some(below) = &self.below {
            return below.list(prefix);
        }
        let prefix = format!("{prefix}/");
        let found: Vec<_> = self
            .objects()
            .iter()
            .filter(|(key, _)| key.as_str().starts_with(&prefix))
            .map(|(key, bytes)| Ok(ArtifactMeta { key: key.clone(), size: bytes.len() as u64 }))
            .collect();
        stream::iter(found).boxed()
    }

    async fn delete(&self, key: &ArtifactKey) -> Result<(), ArtifactError> {
        self.deletes.fetch_add(1, Ordering::SeqCst);
        self.change().await?;
        if let Some(below) = &self.below {
            return below.delete(key).await;
        }
        self.objects().remove(key);
        Ok(())
    }

    async fn probe(&self) -> Result<(), ArtifactError> {
        self.check()
    }
}
