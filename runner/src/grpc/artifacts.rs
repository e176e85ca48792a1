//! `runner.v1.Artifacts`.

use std::collections::{HashMap, HashSet};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use runner_artifacts::blob::BlobMethod;
use runner_core::{
    artifact::{
        ArtifactErrorKind, ArtifactKey, ArtifactUri, DirectAccess, EntryKind, MANIFEST_NAME, Manifest,
        ManifestEntry, read_small,
    },
    id::TenantId,
    service::ServiceError,
    spec::path,
};
use runner_proto::v1::{self, artifacts_server::Artifacts};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::Api;
use crate::{
    blob::record,
    convert::{Violations, timestamp},
    status,
};

/// Most entries of one tree. A request of the default size has room for about as many.
const MAX_ENTRIES: usize = 100_000;
/// Most bytes of a manifest that is read back.
const MAX_MANIFEST_BYTES: u64 = 256 << 20;
/// Objects that are looked at at once.
const PARALLEL: usize = 16;

fn sealed() -> Status {
    status::service(&ServiceError::FailedPrecondition {
        reason: "UPLOAD_SEALED",
        message: "the upload is sealed; its files do not change any more".to_owned(),
    })
}

fn upload_id(text: &str, violations: &mut Violations) -> Option<Uuid> {
    // Only the hyphenated form: two spellings would be two folders.
    match Uuid::try_parse(text) {
        Ok(id) if text.len() == 36 && id.to_string() == text => Some(id),
        _ => {
            violations.add("upload_id", "INVALID", "must be the `upload_id` of an answer of CreateUpload");
            None
        }
    }
}

impl Api {
    /// A URL of the store's own, where it may be given and the store can sign it; else one of the blob endpoint.
    async fn sign(&self, key: &ArtifactKey, access: DirectAccess) -> Result<v1::SignedUrl, Status> {
        let lifetime = self.config.grant_lifetime.0;
        let direct = if self.direct_urls {
            self.artifacts.direct(key, &access, lifetime).await.map_err(|e| status::artifact(&e))?
        } else {
            None
        };
        let method = match &access {
            DirectAccess::Read => BlobMethod::Get,
            DirectAccess::Store { .. } => BlobMethod::Put,
        };
        let (url, headers) = match (direct, &access) {
            (Some(direct), _) => (direct.url, direct.headers.into_iter().collect()),
            (None, DirectAccess::Read) => {
                (self.signer.mint(method, key, lifetime, None, None), HashMap::new())
            }
            (None, DirectAccess::Store { size, sha256, .. }) => {
                (self.signer.mint(method, key, lifetime, Some(*size), sha256.as_deref()), HashMap::new())
            }
        };
        Ok(v1::SignedUrl {
            method: method.as_str().to_owned(),
            url,
            headers,
            expire_time: Some(prost_types::Timestamp { nanos: 0, ..timestamp(self.clock.now() + lifetime) }),
        })
    }

    async fn read_manifest(&self, key: &ArtifactKey) -> Result<Option<Manifest>, Status> {
        match read_small(self.artifacts.as_ref(), key, MAX_MANIFEST_BYTES).await {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| {
                status::service(&ServiceError::Internal(format!(
                    "the manifest {key} does not decode: {error}"
                )))
            }),
            Err(error) if error.kind == ArtifactErrorKind::NotFound => Ok(None),
            Err(error) => Err(status::artifact(&error)),
        }
    }

    /// The manifest of what was uploaded.
    async fn gather(
        &self,
        tenant: &TenantId,
        upload: &Uuid,
        entries: Vec<Wanted>,
    ) -> Result<Manifest, Status> {
        // Boxed futures: the borrow of `self` in a buffered stream is not general enough for the caller's `Send` bound.
        let found: Vec<Result<ManifestEntry, usize>> = stream::iter(entries.into_iter().map(|entry| {
            let store = std::sync::Arc::clone(&self.artifacts);
            let (tenant, upload) = (tenant.clone(), *upload);
            async move {
                let Wanted { index, path, mode, directory } = entry;
                if directory {
                    return Ok(Ok(ManifestEntry {
                        output: String::new(),
                        base: String::new(),
                        path,
                        path_encoded: false,
                        kind: EntryKind::Directory,
                        size: 0,
                        sha256: String::new(),
                        mode,
                        key: None,
                    }));
                }
                let key = record::file_key(&tenant, &upload, &path).map_err(|error| {
                    status::service(&ServiceError::field("entries", "INVALID", error.to_string()))
                })?;
                match record::of(store.as_ref(), &key).await {
                    Ok(digest) => Ok(Ok(ManifestEntry {
                        output: String::new(),
                        base: String::new(),
                        path,
                        path_encoded: false,
                        kind: EntryKind::File,
                        size: digest.size,
                        sha256: digest.sha256,
                        mode,
                        key: Some(key),
                    })),
                    Err(error) if error.kind == ArtifactErrorKind::NotFound => Ok(Err(index)),
                    Err(error) => Err(status::artifact(&error)),
                }
            }
        }))
        .buffered(PARALLEL)
        .try_collect()
        .await?;
        let mut violations = Violations::default();
        let mut manifest = Manifest::default();
        for entry in found {
            match entry {
                Ok(entry) => {
                    manifest.total_bytes = manifest.total_bytes.saturating_add(entry.size);
                    manifest.entries.push(entry);
                }
                Err(index) => {
                    violations.add(format!("entries[{index}].path"), "INVALID", "was not uploaded");
                }
            }
        }
        manifest.entries.sort_by(|a, b| a.path.cmp(&b.path));
        violations.finish(manifest).map_err(|e| status::invalid(&e))
    }
}

struct Wanted {
    index: usize,
    path: String,
    mode: u32,
    directory: bool,
}

/// Checks the form of a tree's entries.
fn check_entries(entries: Vec<v1::TreeEntry>, violations: &mut Violations) -> Vec<Wanted> {
    if entries.len() > MAX_ENTRIES {
        violations.add("entries", "TOO_LARGE", format!("at most {MAX_ENTRIES} entries"));
        return Vec::new();
    }
    let mut all = HashSet::new();
    let files: HashSet<String> =
        entries.iter().filter(|entry| !entry.directory).map(|entry| entry.path.clone()).collect();
    let mut wanted = Vec::with_capacity(entries.len());
    for (index, entry) in entries.into_iter().enumerate() {
        let field = format!("entries[{index}].path");
        if let Some(fault) = path::relative_fault(&entry.path) {
            violations.add(field, "INVALID", format!("the path {fault}"));
            continue;
        }
        let below_a_file = entry.path.match_indices('/').any(|(at, _)| files.contains(&entry.path[..at]));
        if below_a_file {
            violations.add(field, "INVALID", "lies below a path that is a file");
        } else if !all.insert(entry.path.clone()) {
            violations.add(field, "DUPLICATE", "another entry has this path");
        }
        if entry.mode > 0o777 {
            violations.add(format!("entries[{index}].mode"), "INVALID", "must be permission bits, 0 to 0777");
        }
        let mode = match (entry.mode, entry.directory) {
            (0, true) => 0o755,
            (0, false) => 0o644,
            (mode, _) => mode,
        };
        wanted.push(Wanted { index, path: entry.path, mode, directory: entry.directory });
    }
    wanted
}

#[tonic::async_trait]
impl Artifacts for Api {
    async fn create_upload(
        &self,
        request: Request<v1::CreateUploadRequest>,
    ) -> Result<Response<v1::CreateUploadResponse>, Status> {
        let request = request.into_inner();
        let tenant = &self.auth.caller().tenant;
        let mut violations = Violations::default();
        let fresh = request.upload_id.is_empty();
        let upload = if fresh {
            Some(*self.ids.run_id().as_uuid())
        } else {
            upload_id(&request.upload_id, &mut violations)
        };
        let key = upload.and_then(|upload| {
            record::file_key(tenant, &upload, &request.path)
                .map_err(|_| {
                    let what = "must be relative and normal: no empty, `.` or `..` name, no control character, \
                                at most 900 bytes";
                    violations.add("path", "INVALID", what);
                })
                .ok()
        });
        if request.size > self.config.max_upload_bytes.0 {
            let what = format!("must be at most {} bytes", self.config.max_upload_bytes.0);
            violations.add("size", "TOO_LARGE", what);
        }
        let sha256 = (!request.sha256.is_empty()).then_some(request.sha256.as_str());
        if sha256.is_some_and(|hex| {
            hex.len() != 64 || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        }) {
            violations.add("sha256", "INVALID", "must be 64 lower-case hexadecimal digits");
        }
        let (upload, key) =
            violations.finish(upload.zip(key)).map_err(|e| status::invalid(&e))?.ok_or_else(sealed)?;
        if !fresh {
            let manifest = manifest_key(tenant, &upload)?;
            match self.artifacts.head(&manifest).await {
                Ok(_) => return Err(sealed()),
                Err(error) if error.kind == ArtifactErrorKind::NotFound => {}
                Err(error) => return Err(status::artifact(&error)),
            }
        }
        let url = self
            .sign(
                &key,
                DirectAccess::Store { size: request.size, sha256: sha256.map(str::to_owned), only_new: true },
            )
            .await?;
        Ok(Response::new(v1::CreateUploadResponse {
            upload_id: upload.to_string(),
            uri: ArtifactUri::object(key).to_string(),
            url: Some(url),
        }))
    }

    async fn seal_tree(
        &self,
        request: Request<v1::SealTreeRequest>,
    ) -> Result<Response<v1::SealTreeResponse>, Status> {
        let request = request.into_inner();
        let tenant = self.auth.caller().tenant.clone();
        let mut violations = Violations::default();
        let upload = upload_id(&request.upload_id, &mut violations);
        let entries = check_entries(request.entries, &mut violations);
        let Some(upload) = violations.finish(upload).map_err(|e| status::invalid(&e))? else {
            return Err(sealed());
        };
        let manifest = self.gather(&tenant, &upload, entries).await?;
        let key = manifest_key(&tenant, &upload)?;
        match self.read_manifest(&key).await? {
            // Sealing again with the same entries is answered as the first time.
            Some(stored) if stored == manifest => {}
            Some(_) => return Err(sealed()),
            None => {
                let json = serde_json::to_vec(&manifest)
                    .map_err(|error| status::service(&ServiceError::Internal(error.to_string())))?;
                // The commit point: everything that it names is stored.
                self.artifacts.put_bytes(&key, json.into()).await.map_err(|e| status::artifact(&e))?;
            }
        }
        let files = manifest.entries.iter().filter(|entry| entry.kind == EntryKind::File).count();
        Ok(Response::new(v1::SealTreeResponse {
            uri: ArtifactUri::tree(ArtifactKey::upload_prefix(&tenant, &upload)).to_string(),
            files: files as u64,
            total_bytes: manifest.total_bytes,
        }))
    }

    async fn create_download(
        &self,
        request: Request<v1::CreateDownloadRequest>,
    ) -> Result<Response<v1::CreateDownloadResponse>, Status> {
        let request = request.into_inner();
        let uri: ArtifactUri = request
            .uri
            .parse()
            .map_err(|error| status::service(&ServiceError::field("uri", "INVALID", format!("{error}"))))?;
        if uri.is_tree() {
            let what = format!("names a tree; ask for its files, or for its list: `{uri}{MANIFEST_NAME}`");
            return Err(status::service(&ServiceError::field("uri", "INVALID", what)));
        }
        // Another tenant's artifact is not told from one that does not exist.
        if uri.owner().as_ref() != Some(&self.auth.caller().tenant) {
            let error = runner_core::artifact::ArtifactError::new(
                ArtifactErrorKind::NotFound,
                format!("there is no artifact {uri}"),
            );
            return Err(status::artifact(&error));
        }
        let meta = self.artifacts.head(uri.key()).await.map_err(|e| status::artifact(&e))?;
        let url = self.sign(uri.key(), DirectAccess::Read).await?;
        Ok(Response::new(v1::CreateDownloadResponse { url: Some(url), size: meta.size }))
    }

    async fn list_artifacts(
        &self,
        request: Request<v1::ListArtifactsRequest>,
    ) -> Result<Response<v1::ListArtifactsResponse>, Status> {
        self.list_below(request.into_inner()).await.map(Response::new)
    }

    async fn delete_artifacts(
        &self,
        request: Request<v1::DeleteArtifactsRequest>,
    ) -> Result<Response<v1::DeleteArtifactsResponse>, Status> {
        self.delete_below(request.into_inner()).await.map(Response::new)
    }
}

fn manifest_key(tenant: &TenantId, upload: &Uuid) -> Result<ArtifactKey, Status> {
    ArtifactKey::upload_prefix(tenant, upload)
        .join(MANIFEST_NAME)
        .map_err(|error| status::service(&ServiceError::Internal(error.to_string())))
}
