//! Objects in whatever store a URL names: a directory, S3 and what speaks like it, Google Cloud Storage, Azure Blob Storage.

mod budget;
mod credentials;
mod failure;
mod http;
mod list;
mod open;
mod read;
mod retry;
mod write;

use std::{
    fmt,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use ::http::{HeaderName, HeaderValue, Method};
use async_trait::async_trait;
use base64::Engine as _;
use bytes::Bytes;
use futures::{StreamExt as _, stream::BoxStream};
use object_store::{
    ObjectStore, ObjectStoreExt as _,
    multipart::MultipartStore,
    path::Path as ObjectPath,
    signer::{SignedUrlOptions, Signer},
};
use runner_core::{
    artifact::{
        ArtifactError, ArtifactErrorKind, ArtifactKey, ArtifactMeta, ArtifactStore, ByteStream, DirectAccess,
        DirectRequest, read_small,
    },
    clock::Clock,
};

pub use self::open::{StoreOptions, check_url, open_url};
use self::{
    budget::Budget,
    failure::{Class, class, mapped},
    retry::{again, within},
};

const MIB: u64 = 1024 * 1024;
/// The largest object that S3 takes in one request, in bytes.
const LARGEST_PUT: u64 = 5 << 30;

/// How transfers are done. The defaults suit one service on one machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tuning {
    /// Requests at once that the service itself drives: half of them may read, half write. A reader that takes an object as it
    /// comes has a request of its own, which its own caller bounds.
    pub connections: usize,
    /// Uploads in parts at once. Each may hold one part in memory, however little is left of `memory_bytes`.
    pub uploads: usize,
    /// Parts or ranges of one object at once.
    pub parallel: usize,
    /// Memory, in bytes, for the parts and ranges beyond the first of each object, all objects together.
    pub memory_bytes: u64,
    /// All uploads together, in bytes. `None`: no limit.
    pub upload_bytes_per_sec: Option<u64>,
    /// All downloads together, in bytes. `None`: no limit.
    pub download_bytes_per_sec: Option<u64>,
    /// What one run may cost, within all of the above.
    pub run: RunTuning,
    /// Tries of one request, the first included.
    pub tries: u32,
    /// Wait before the second try; it doubles.
    pub backoff: Duration,
    /// Longest wait between two tries.
    pub max_backoff: Duration,
    /// Time to connect.
    pub connect_timeout: Duration,
    /// A transfer that moves nothing for so long is given up and tried again.
    pub stall_timeout: Duration,
    /// A transfer that is slower than this, in bytes a second, is given up and tried again; a tenth of `stall_timeout` of each
    /// request is free.
    pub min_bytes_per_sec: u64,
}

/// What the transfers of one run may cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunTuning {
    /// Requests at once: half of them may read, half write.
    pub connections: usize,
    /// Memory, in bytes, for parts and ranges. At least one part: a run always goes on.
    pub memory_bytes: u64,
    /// All its uploads together, in bytes. `None`: no limit.
    pub upload_bytes_per_sec: Option<u64>,
    /// All its downloads together, in bytes. `None`: no limit.
    pub download_bytes_per_sec: Option<u64>,
}

impl Default for RunTuning {
    fn default() -> Self {
        Self {
            connections: 16,
            memory_bytes: 48 * MIB,
            upload_bytes_per_sec: None,
            download_bytes_per_sec: None,
        }
    }
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            connections: 64,
            uploads: 32,
            parallel: 4,
            memory_bytes: 128 * MIB,
            upload_bytes_per_sec: None,
            download_bytes_per_sec: None,
            run: RunTuning::default(),
            tries: 6,
            backoff: Duration::from_millis(200),
            max_backoff: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(30),
            min_bytes_per_sec: 64 * 1024,
        }
    }
}

impl Tuning {
    /// The longest that a request of so many bytes may take.
    fn limit(&self, bytes: u64) -> Duration {
        let moving = Duration::from_secs(bytes / self.min_bytes_per_sec.max(1));
        self.connect_timeout + self.stall_timeout + moving
    }
}

/// What the operations on a store share.
#[derive(Clone)]
pub(crate) struct Inner {
    store: Arc<dyn ObjectStore>,
    parts: Arc<dyn MultipartStore>,
    signer: Option<(Dialect, Arc<dyn Signer>)>,
    prefix: String,
    tuning: Tuning,
    budget: Arc<Budget>,
    clock: Arc<dyn Clock>,
}

/// Whose signed URLs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// Can bind headers: create only, and a SHA-256.
    S3,
    /// Reads only: nothing of what it can bind promises a SHA-256.
    Other,
}

/// An object store behind the `object_store` crate.
///
/// - Small objects go in one request, larger ones in parts, several at once. A part that fails is sent again. An upload that
///   fails, or whose future is dropped, is aborted.
/// - Small objects are read in one request, larger ones in ranges, several at once. Every range must be of the object that the
///   first was of; else the read ends with `Mismatch`.
/// - Each request is tried again with a fresh signature, so that credentials may rotate at any time.
#[derive(Clone)]
pub struct ObjectArtifacts {
    inner: Arc<Inner>,
}

impl fmt::Debug for ObjectArtifacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The store's own `Debug` is not known to keep secrets to itself.
        f.debug_struct("ObjectArtifacts").field("prefix", &self.inner.prefix).finish_non_exhaustive()
    }
}

impl ObjectArtifacts {
    /// Wraps a store; its keys lie below `prefix`, unless that is empty.
    pub fn new<S: ObjectStore + MultipartStore>(
        store: Arc<S>,
        prefix: &str,
        tuning: Tuning,
        clock: &Arc<dyn Clock>,
    ) -> Self {
        let budget = Arc::new(Budget::new(&tuning, clock));
        let inner = Inner {
            parts: Arc::clone(&store) as _,
            store,
            signer: None,
            prefix: if prefix.is_empty() { String::new() } else { format!("{prefix}/") },
            tuning,
            budget,
            clock: Arc::clone(clock),
        };
        Self { inner: Arc::new(inner) }
    }

    /// With what signs URLs of the same store.
    pub(crate) fn with_signer(self, dialect: Dialect, signer: Arc<dyn Signer>) -> Self {
        match Arc::try_unwrap(self.inner) {
            Ok(inner) => Self { inner: Arc::new(Inner { signer: Some((dialect, signer)), ..inner }) },
            Err(inner) => Self { inner },
        }
    }
}

impl Inner {
    /// Where an object lies in the store.
    fn path(&self, key: &ArtifactKey) -> Result<ObjectPath, ArtifactError> {
        // `parse`, not `from`: the key is kept as it is, without an encoding of the crate's own.
        ObjectPath::parse(format!("{}{key}", self.prefix)).map_err(|error| {
            ArtifactError::with_source(ArtifactErrorKind::Other, format!("name {key}"), error)
        })
    }

    async fn head(&self, path: &ObjectPath, doing: &str) -> Result<object_store::ObjectMeta, ArtifactError> {
        again(&self.tuning, doing, self.tuning.limit(0), || async {
            let _slot = self.budget.read().await;
            self.store.head(path).await
        })
        .await
    }
}

#[async_trait]
impl ArtifactStore for ObjectArtifacts {
    async fn put(&self, key: &ArtifactKey, bytes: ByteStream) -> Result<u64, ArtifactError> {
        write::put(&self.inner, key, bytes).await
    }

    async fn put_bytes(&self, key: &ArtifactKey, bytes: Bytes) -> Result<(), ArtifactError> {
        let path = self.inner.path(key)?;
        write::put_whole(&self.inner, &path, &format!("store {key}"), bytes).await
    }

    async fn get(
        &self,
        key: &ArtifactKey,
        range: Range<u64>,
    ) -> Result<(ArtifactMeta, ByteStream), ArtifactError> {
        read::get(&self.inner, key, range).await
    }

    async fn head(&self, key: &ArtifactKey) -> Result<ArtifactMeta, ArtifactError> {
        let meta = self.inner.head(&self.inner.path(key)?, &format!("look up {key}")).await?;
        Ok(ArtifactMeta { key: key.clone(), size: meta.size })
    }

    fn list(&self, prefix: &ArtifactKey) -> BoxStream<'static, Result<ArtifactMeta, ArtifactError>> {
        let path = match self.inner.path(prefix) {
            Ok(path) => path,
            Err(error) => return futures::stream::iter([Err(error)]).boxed(),
        };
        list::list(&self.inner, path, format!("list {prefix}"))
    }

    async fn delete(&self, key: &ArtifactKey) -> Result<(), ArtifactError> {
        let (inner, path) = (&self.inner, self.inner.path(key)?);
        again(&inner.tuning, &format!("delete {key}"), inner.tuning.limit(0), || async {
            let _slot = inner.budget.write().await;
            match inner.store.delete(&path).await {
                Err(error) if class(&error) == Class::NotFound => Ok(()),
                done => done,
            }
        })
        .await
    }

    async fn probe(&self) -> Result<(), ArtifactError> {
        probe(self).await
    }

    fn for_run(&self) -> Option<Arc<dyn ArtifactStore>> {
        let budget = Arc::new(Budget::of_run(&self.inner.budget, &self.inner.tuning.run, &self.inner.clock));
        Some(Arc::new(Self { inner: Arc::new(Inner { budget, ..Inner::clone(&self.inner) }) }))
    }

    async fn direct(
        &self,
        key: &ArtifactKey,
        access: &DirectAccess,
        lifetime: Duration,
    ) -> Result<Option<DirectRequest>, ArtifactError> {
        let Some((dialect, signer)) = &self.inner.signer else { return Ok(None) };
        let (method, headers) = match access {
            DirectAccess::Read => (Method::GET, Vec::new()),
            DirectAccess::Store { size, sha256: Some(sha256), only_new }
                if *dialect == Dialect::S3 && *size <= LARGEST_PUT =>
            {
                let Ok(digest) = hex::decode(sha256) else { return Ok(None) };
                // The digest binds the size, too; a length of its own is nothing that `object_store` signs.
                let digest = base64::prelude::BASE64_STANDARD.encode(digest);
                let mut headers = vec![("x-amz-checksum-sha256".to_owned(), digest)];
                if *only_new {
                    headers.push(("if-none-match".to_owned(), "*".to_owned()));
                }
                (Method::PUT, headers)
            }
            // What would be stored could not be held to what was promised.
            DirectAccess::Store { .. } => return Ok(None),
        };
        let mut options = SignedUrlOptions::new();
        for (name, value) in &headers {
            let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::from_str(value)) else {
                return Ok(None);
            };
            options = options.with_signed_header(name, value);
        }
        let path = self.inner.path(key)?;
        let signed = signer.signed_url_opts(method, &path, lifetime, &options);
        match within(self.inner.tuning.limit(0), signed).await {
            Ok(url) => Ok(Some(DirectRequest { url: url.into(), headers })),
            // The credentials at hand cannot sign.
            Err(object_store::Error::NotSupported { .. } | object_store::Error::NotImplemented { .. }) => {
                Ok(None)
            }
            Err(error) => Err(mapped(error, &format!("sign a URL of {key}"), 1)),
        }
    }
}

/// Writes, reads and removes an object. Two probes at once do not meet.
pub(crate) async fn probe(store: &dyn ArtifactStore) -> Result<(), ArtifactError> {
    static PROBES: AtomicU64 = AtomicU64::new(0);
    // The number of the process is not enough: several machines may share a bucket.
    let random = getrandom::u64().unwrap_or(0);
    let number = PROBES.fetch_add(1, Ordering::Relaxed);
    let name = format!("probes/{}-{number}-{random:016x}", std::process::id());
    let key: ArtifactKey = name
        .parse()
        .map_err(|error| ArtifactError::with_source(ArtifactErrorKind::Other, "name a probe", error))?;
    let bytes = Bytes::from_static(b"probe");
    store.put_bytes(&key, bytes.clone()).await?;
    let read = read_small(store, &key, bytes.len() as u64).await;
    store.delete(&key).await?;
    if read? == bytes {
        Ok(())
    } else {
        Err(ArtifactError::new(ArtifactErrorKind::Mismatch, "read a probe: it is not what was written"))
    }
}
