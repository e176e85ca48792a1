//! Bytes under a key in the object store, and the manifest that makes a set of them one result.

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};

use crate::{
    id::{AttemptId, InvalidId, RunId, TenantId},
    spec::path,
};

/// A key in the object store: relative, normal, `/` between names, at most 1,024 bytes (the least that the supported
/// stores allow). Whole keys only; what a caller may name is an [`ArtifactUri`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ArtifactKey(String);

impl ArtifactKey {
    /// The key as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The key below this one.
    ///
    /// # Errors
    /// Where the whole is not a valid key.
    pub fn join(&self, rest: &str) -> Result<Self, InvalidId> {
        format!("{}/{rest}", self.0).parse()
    }

    /// Everything of a run: `runs/TENANT/RUN`, or `shadows/TENANT/RUN` where it is a shadow, which no caller can name.
    /// Deleting this prefix deletes the run's artifacts.
    pub fn run_prefix(tenant: &TenantId, run: RunId) -> Self {
        let space = if run.is_shadow() { "shadows" } else { "runs" };
        Self(format!("{space}/{tenant}/{run}"))
    }

    /// Everything of an attempt. Two attempts share no key, so a retry never mixes their files.
    pub fn attempt_prefix(tenant: &TenantId, attempt: AttemptId) -> Self {
        Self(format!("{}/{}", Self::run_prefix(tenant, attempt.run), attempt.number))
    }

    /// What a run stores below a destination of its outputs: `DESTINATION/RUN`.
    ///
    /// # Errors
    /// Where the whole is too long for a key.
    pub fn of_run(&self, run: RunId) -> Result<Self, InvalidId> {
        self.join(&run.to_string())
    }

    /// What an attempt stores below a destination of its outputs: `DESTINATION/RUN/ATTEMPT`. As two attempts share no key below
    /// it, a retry never mixes their files there either.
    ///
    /// # Errors
    /// Where the whole is too long for a key.
    pub fn of_attempt(&self, attempt: AttemptId) -> Result<Self, InvalidId> {
        self.join(&format!("{}/{}", attempt.run, attempt.number))
    }

    /// Everything that a caller uploaded under one upload id.
    pub fn upload_prefix(tenant: &TenantId, upload: &uuid::Uuid) -> Self {
        Self(format!("uploads/{tenant}/{upload}"))
    }

    /// The prefix of the upload that this key belongs to: `uploads/TENANT/NAME`. `None`: it belongs to none.
    pub fn upload(&self) -> Option<Self> {
        let mut ends = self.0.match_indices('/').map(|(at, _)| at).skip(1);
        match (self.0.split('/').next(), ends.next()) {
            (Some("uploads"), Some(_)) => {
                let end = ends.next().unwrap_or(self.0.len());
                Some(Self(self.0[..end].to_owned()))
            }
            _ => None,
        }
    }
}

impl fmt::Display for ArtifactKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ArtifactKey {
    type Err = InvalidId;

    fn from_str(s: &str) -> Result<Self, InvalidId> {
        let fault = if s.len() > 1024 { Some("is longer than 1024 bytes") } else { path::relative_fault(s) };
        match fault {
            None if !s.chars().any(char::is_control) => Ok(Self(s.to_owned())),
            _ => Err(InvalidId {
                what: "artifact key",
                value: s.chars().take(80).collect(),
                rule: "relative, at most 1024 bytes, no empty, `.` or `..` name, no control character",
            }),
        }
    }
}

impl TryFrom<String> for ArtifactKey {
    type Error = InvalidId;

    fn try_from(s: String) -> Result<Self, InvalidId> {
        s.parse()
    }
}

impl From<ArtifactKey> for String {
    fn from(key: ArtifactKey) -> String {
        key.0
    }
}

/// What a caller names: `artifact:KEY` for an object, `artifact:KEY/` for a tree that a manifest seals.
///
/// The key is whole, with the tenant in its second name (`uploads/TENANT/…`, `runs/TENANT/…`); [`ArtifactUri::owner`]
/// is compared with the caller's tenant before anything is read.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ArtifactUri {
    key: ArtifactKey,
    tree: bool,
}

impl ArtifactUri {
    /// Names one object.
    pub fn object(key: ArtifactKey) -> Self {
        Self { key, tree: false }
    }

    /// Names a tree.
    pub fn tree(prefix: ArtifactKey) -> Self {
        Self { key: prefix, tree: true }
    }

    /// The object's key, or the tree's prefix.
    pub fn key(&self) -> &ArtifactKey {
        &self.key
    }

    /// Whether it names a tree.
    pub fn is_tree(&self) -> bool {
        self.tree
    }

    /// The tenant whose it is: the key's second name. `None` where the key is outside of the callers' spaces.
    pub fn owner(&self) -> Option<TenantId> {
        let mut names = self.key.as_str().split('/');
        match names.next() {
            Some("uploads" | "runs") => names.next()?.parse().ok(),
            _ => None,
        }
    }
}

impl fmt::Display for ArtifactUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "artifact:{}{}", self.key, if self.tree { "/" } else { "" })
    }
}

impl FromStr for ArtifactUri {
    type Err = InvalidId;

    fn from_str(s: &str) -> Result<Self, InvalidId> {
        let invalid = || InvalidId {
            what: "artifact URI",
            value: s.chars().take(80).collect(),
            rule: "`artifact:KEY` for an object or `artifact:KEY/` for a tree",
        };
        let key = s.strip_prefix("artifact:").ok_or_else(invalid)?;
        let (key, tree) = key.strip_suffix('/').map_or((key, false), |key| (key, true));
        Ok(Self { key: key.parse().map_err(|_| invalid())?, tree })
    }
}

impl TryFrom<String> for ArtifactUri {
    type Error = InvalidId;

    fn try_from(s: String) -> Result<Self, InvalidId> {
        s.parse()
    }
}

impl From<ArtifactUri> for String {
    fn from(uri: ArtifactUri) -> String {
        uri.to_string()
    }
}

/// Name, below a tree's or an attempt's prefix, of the manifest: the commit point, written last.
pub const MANIFEST_NAME: &str = "manifest.json";

/// The list of what a tree or an attempt's outputs consist of. Where it exists, everything that it names is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Manifest {
    /// What a failed or cancelled run wrote, not what it promised.
    #[serde(default)]
    pub partial: bool,
    /// Sorted by output, then path.
    pub entries: Vec<ManifestEntry>,
    /// Sum of the entries' sizes.
    pub total_bytes: u64,
}

/// One file or directory of a [`Manifest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestEntry {
    /// The declared output that it belongs to; empty in an uploaded tree.
    #[serde(default)]
    pub output: String,
    /// Where the output is a glob, the directory that `path` is relative to: the pattern's names before its first
    /// wildcard. Empty otherwise.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub base: String,
    /// Relative to the output, the base or the tree; empty where the output is one file. Bytes that are not UTF-8, and `%` then,
    /// are written as `%XX`, and `path_encoded` is true.
    pub path: String,
    /// See `path`.
    #[serde(default)]
    pub path_encoded: bool,
    /// File or directory.
    pub kind: EntryKind,
    /// In bytes. Zero for a directory.
    pub size: u64,
    /// Lower-case hex. Empty for a directory.
    #[serde(default)]
    pub sha256: String,
    /// Permission bits, without set-uid, set-gid and sticky.
    pub mode: u32,
    /// Where its bytes are. `None` for a directory.
    pub key: Option<ArtifactKey>,
}

impl ManifestEntry {
    /// `path` as the bytes that it had in the file system. `None` where it is not properly encoded.
    pub fn path_bytes(&self) -> Option<Vec<u8>> {
        if !self.path_encoded {
            return Some(self.path.clone().into_bytes());
        }
        let mut out = Vec::with_capacity(self.path.len());
        let mut bytes = self.path.bytes();
        while let Some(byte) = bytes.next() {
            if byte == b'%' {
                let digits = [bytes.next()?, bytes.next()?];
                let mut decoded = [0u8];
                hex::decode_to_slice(digits, &mut decoded).ok()?;
                out.push(decoded[0]);
            } else {
                out.push(byte);
            }
        }
        Some(out)
    }

    /// Where it lay in its run, or lies in its tree, without the slash in front: `outputs/report.txt`. `None` where it is
    /// not properly encoded.
    pub fn place(&self) -> Option<Vec<u8>> {
        let top = if self.base.is_empty() { &self.output } else { &self.base };
        let mut place = top.trim_start_matches('/').as_bytes().to_vec();
        let below = self.path_bytes()?;
        if !place.is_empty() && !below.is_empty() {
            place.push(b'/');
        }
        place.extend_from_slice(&below);
        Some(place)
    }
}

/// What an entry is. Nothing else is ever staged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the names say it")]
pub enum EntryKind {
    File,
    Directory,
}

/// What kind of failure an artifact operation met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArtifactErrorKind {
    /// No object has this key.
    NotFound,
    /// A digest or a size is not what was promised.
    Mismatch,
    /// A limit on size, count or depth was passed.
    LimitExceeded,
    /// The store refused for lack of permission.
    Denied,
    /// The store has no room.
    Full,
    /// The store failed in a way that may pass: 5xx, time-out, reset.
    Unavailable,
    /// Anything else; trying again will not help.
    Other,
}

impl ArtifactErrorKind {
    /// Whether the same operation may succeed later.
    pub const fn retryable(self) -> bool {
        match self {
            Self::Unavailable | Self::Full => true,
            Self::NotFound | Self::Mismatch | Self::LimitExceeded | Self::Denied | Self::Other => false,
        }
    }
}

/// A failed artifact operation.
#[derive(Debug, thiserror::Error)]
#[error("{context}")]
pub struct ArtifactError {
    /// What kind of failure.
    pub kind: ArtifactErrorKind,
    /// What was being done, with the key, and what was seen.
    pub context: String,
    /// What lies below.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl ArtifactError {
    /// An error with nothing below it.
    pub fn new(kind: ArtifactErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// An error with its source.
    pub fn with_source(
        kind: ArtifactErrorKind,
        context: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { kind, context: context.into(), source: Some(source.into()) }
    }
}

/// What is known of a stored object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArtifactMeta {
    /// Its key.
    pub key: ArtifactKey,
    /// In bytes.
    pub size: u64,
}

/// What a request that a store permits directly does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DirectAccess {
    /// Reads the object, whole or in ranges.
    Read,
    /// Stores the object whole, and only these bytes.
    Store {
        /// In bytes.
        size: u64,
        /// Lower-case hex.
        sha256: Option<String>,
        /// Only where there is none yet; else one that is there is replaced.
        only_new: bool,
    },
}

/// A request that a store permits to whoever holds it: one object, one method, minutes.
#[derive(Clone, PartialEq, Eq)]
pub struct DirectRequest {
    /// Absolute. Signs itself, so it is as secret as what it permits.
    pub url: String,
    /// Must be sent with it, exactly.
    pub headers: Vec<(String, String)>,
}

impl fmt::Debug for DirectRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirectRequest").finish_non_exhaustive()
    }
}

/// Bytes on their way, in chunks of at most 1 MiB or so.
pub type ByteStream = BoxStream<'static, Result<Bytes, ArtifactError>>;

/// An object that is known before it is stored, and that can be read more than once.
#[derive(Clone)]
pub struct KnownObject {
    /// In bytes.
    pub size: u64,
    /// Of its bytes, in lower-case hex.
    pub sha256: String,
    /// Its bytes, from the beginning, each time. Other bytes than were promised are no fault: they are not stored.
    pub open: Arc<dyn Fn() -> ByteStream + Send + Sync>,
}

impl fmt::Debug for KnownObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KnownObject")
            .field("size", &self.size)
            .field("sha256", &self.sha256)
            .finish_non_exhaustive()
    }
}

/// The object store.
///
/// 1. `put` MUST be atomic: a reader sees the whole object or none, also after a crash in the middle.
/// 2. `put` of a key that exists replaces it whole.
/// 3. A stream that fails MUST leave nothing visible, and no abandoned upload.
/// 4. When `put` returns, the object MUST survive the death of the process; whether it survives loss of power is the
///    store's own durability (a directory store syncs the file and its folder).
/// 5. Memory used by any call MUST NOT grow with the object's size.
/// 6. `delete` of what is not there succeeds.
/// 7. A read is of one object: where it is replaced or deleted meanwhile, the reader gets the old one to its end, or an error
///    (`Mismatch`, `NotFound`); never bytes of both.
/// 8. A request that `direct` answers permits what was asked for and nothing else.
/// 9. `put_known` that answers `true` has stored exactly what was promised; with `false` it is `put` that stores the object.
#[async_trait]
pub trait ArtifactStore: fmt::Debug + Send + Sync + 'static {
    /// Stores what `bytes` yields. Returns its size.
    async fn put(&self, key: &ArtifactKey, bytes: ByteStream) -> Result<u64, ArtifactError>;
    /// Stores a small object.
    async fn put_bytes(&self, key: &ArtifactKey, bytes: Bytes) -> Result<(), ArtifactError>;
    /// Whether [`put_known`](Self::put_known) may be worth the reading of an object twice.
    fn prefers_known(&self, size: u64) -> bool {
        let _ = size;
        false
    }
    /// Stores an object that is known before it is sent. `false`: not this way, and nothing changed that `put` would not
    /// replace.
    async fn put_known(&self, key: &ArtifactKey, object: &KnownObject) -> Result<bool, ArtifactError> {
        let _ = (key, object);
        Ok(false)
    }
    /// Reads an object from `range.start` to `range.end` (exclusive), cut at its end. Also answers its whole size.
    async fn get(
        &self,
        key: &ArtifactKey,
        range: std::ops::Range<u64>,
    ) -> Result<(ArtifactMeta, ByteStream), ArtifactError>;
    /// What is known of an object. `NotFound` where there is none.
    async fn head(&self, key: &ArtifactKey) -> Result<ArtifactMeta, ArtifactError>;
    /// Every object below `prefix/`, in no promised order.
    fn list(&self, prefix: &ArtifactKey) -> BoxStream<'static, Result<ArtifactMeta, ArtifactError>>;
    /// Removes an object.
    async fn delete(&self, key: &ArtifactKey) -> Result<(), ArtifactError>;
    /// Whether the store answers: writes, reads and removes a probe object.
    async fn probe(&self) -> Result<(), ArtifactError>;
    /// The same store, held to what one run may cost: memory, requests at once, bandwidth. `None`: it has no such limits.
    fn for_run(&self) -> Option<std::sync::Arc<dyn ArtifactStore>> {
        None
    }
    /// A request to the store itself that permits this for so long. `None` where the store cannot, or could not hold an upload
    /// to what was promised; then the bytes go through the service.
    async fn direct(
        &self,
        key: &ArtifactKey,
        access: &DirectAccess,
        lifetime: Duration,
    ) -> Result<Option<DirectRequest>, ArtifactError> {
        let _ = (key, access, lifetime);
        Ok(None)
    }
}

/// Reads a small object whole.
///
/// # Errors
/// `LimitExceeded` where it is larger than `max_bytes`; else the store's error.
pub async fn read_small(
    store: &dyn ArtifactStore,
    key: &ArtifactKey,
    max_bytes: u64,
) -> Result<Bytes, ArtifactError> {
    use futures::TryStreamExt as _;
    let (meta, mut stream) = store.get(key, 0..max_bytes.saturating_add(1)).await?;
    if meta.size > max_bytes {
        let context = format!("read {key}: it has {} bytes, more than the limit of {max_bytes}", meta.size);
        return Err(ArtifactError::new(ArtifactErrorKind::LimitExceeded, context));
    }
    let mut all = Vec::new();
    while let Some(chunk) = stream.try_next().await? {
        all.extend_from_slice(&chunk);
    }
    Ok(all.into())
}
