//! What is recorded of an upload, beside it: its size and its digest.

use futures::TryStreamExt as _;
use runner_core::{
    artifact::{ArtifactError, ArtifactErrorKind, ArtifactKey, ArtifactStore, read_small},
    id::{InvalidId, TenantId},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

const FILES: &str = "files";
/// The folder of what is recorded of an upload's files.
pub const DIGESTS: &str = "digests";
const MAX_BYTES: u64 = 1024;

/// Size and digest of an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Digest {
    /// In bytes.
    pub size: u64,
    /// Lower-case hex.
    pub sha256: String,
}

/// The key of an uploaded file. A folder of their own keeps the names of files apart from the manifest's.
///
/// # Errors
/// Where `path` is not a relative, normal path, or too long for a key.
pub fn file_key(tenant: &TenantId, upload: &Uuid, path: &str) -> Result<ArtifactKey, InvalidId> {
    let prefix = ArtifactKey::upload_prefix(tenant, upload);
    // The record's key is the longer one; an upload without a record could not be sealed.
    prefix.join(DIGESTS)?.join(path)?;
    prefix.join(FILES)?.join(path)
}

/// The key of what is recorded of an object. `None`: it is not an upload's file, and nothing is recorded.
pub fn beside(key: &ArtifactKey) -> Option<ArtifactKey> {
    let mut names = key.as_str().splitn(5, '/');
    match (names.next(), names.next(), names.next(), names.next(), names.next()) {
        (Some("uploads"), Some(tenant), Some(upload), Some(FILES), Some(path)) => {
            format!("uploads/{tenant}/{upload}/{DIGESTS}/{path}").parse().ok()
        }
        _ => None,
    }
}

/// Records.
///
/// # Errors
/// The store's.
pub async fn write(
    store: &dyn ArtifactStore,
    key: &ArtifactKey,
    digest: &Digest,
) -> Result<(), ArtifactError> {
    let json = serde_json::to_vec(digest)
        .map_err(|error| ArtifactError::with_source(ArtifactErrorKind::Other, "write a digest", error))?;
    store.put_bytes(key, json.into()).await
}

/// Size and digest of an object: as recorded, else from its bytes. Uploads never change, so a record is never stale.
///
/// # Errors
/// `NotFound` where there is no such object; else the store's.
pub async fn of(store: &dyn ArtifactStore, key: &ArtifactKey) -> Result<Digest, ArtifactError> {
    let meta = store.head(key).await?;
    if let Some(beside) = beside(key) {
        match read_small(store, &beside, MAX_BYTES).await {
            Ok(bytes) => match serde_json::from_slice::<Digest>(&bytes) {
                Ok(digest) if digest.size == meta.size => return Ok(digest),
                _ => {
                    tracing::warn!(%key, "the record of an upload does not decode or fit; its bytes are read")
                }
            },
            Err(error) if error.kind == ArtifactErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    let (_, mut bytes) = store.get(key, 0..u64::MAX).await?;
    let mut hash = Sha256::new();
    let mut size = 0;
    while let Some(chunk) = bytes.try_next().await? {
        size += chunk.len() as u64;
        hash.update(&chunk);
    }
    Ok(Digest { size, sha256: hex::encode(hash.finalize()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_uploads_files_have_a_record() {
        let key = |text: &str| text.parse::<ArtifactKey>().unwrap();
        assert_eq!(beside(&key("uploads/t/u/files/a/b")), Some(key("uploads/t/u/digests/a/b")));
        for other in
            ["uploads/t/u/manifest.json", "uploads/t/u/digests/a", "runs/t/r/files/a", "uploads/t/u/files"]
        {
            assert_eq!(beside(&key(other)), None, "{other}");
        }
    }

    #[test]
    fn a_path_that_is_not_normal_has_no_key() {
        let (tenant, upload) = ("t".parse().unwrap(), Uuid::from_u128(1));
        for bad in ["", "/a", "a/", "a//b", "../x", "a/../b", ".", "a\0", "a\nb", &"a/".repeat(600)] {
            assert!(file_key(&tenant, &upload, bad).is_err(), "{bad:?}");
        }
        let key = file_key(&tenant, &upload, "manifest.json").unwrap();
        assert_ne!(key, ArtifactKey::upload_prefix(&tenant, &upload).join("manifest.json").unwrap());
    }
}
