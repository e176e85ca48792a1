//! Listing and deleting what a tenant has stored.

use std::collections::BinaryHeap;

use futures::{StreamExt as _, TryStreamExt as _};
use runner_core::{
    artifact::{ArtifactError, ArtifactErrorKind, ArtifactKey, ArtifactMeta, ArtifactUri, MANIFEST_NAME},
    service::ServiceError,
};
use runner_proto::v1;
use tonic::Status;

use super::Api;
use crate::{blob::record, status};

const PAGE: u32 = 100;
const MAX_PAGE: u32 = 1000;
/// Objects that are deleted at once.
const PARALLEL: usize = 16;
/// Where callers write: `uploads/TENANT/ID`. What is below `runs/` belongs to its run.
const UPLOADS: &str = "uploads";

fn invalid(field: &str, reason: &'static str, what: impl Into<String>) -> Status {
    status::service(&ServiceError::field(field, reason, what))
}

impl Api {
    /// A page of what lies below a prefix, by key. The store promises no order, so each page looks at every key below the
    /// prefix, and keeps as many as the page has.
    pub(super) async fn list_below(
        &self,
        request: v1::ListArtifactsRequest,
    ) -> Result<v1::ListArtifactsResponse, Status> {
        let tenant = &self.auth.caller().tenant;
        let prefix = if request.prefix.is_empty() {
            format!("{UPLOADS}/{tenant}").parse().map_err(|e| invalid("prefix", "INVALID", format!("{e}")))?
        } else {
            let uri = self.own("prefix", &request.prefix)?;
            if !uri.is_tree() {
                return Err(invalid("prefix", "INVALID", "must be a prefix: end it with `/`"));
            }
            uri.key().clone()
        };
        let after = match request.page_token.as_str() {
            "" => None,
            token => {
                let key = token.parse::<ArtifactKey>().ok().filter(|key| is_below(key, &prefix));
                let bad = || invalid("page_token", "INVALID", "is not a token of this list");
                Some(key.ok_or_else(bad)?)
            }
        };
        let size = if request.page_size == 0 { PAGE } else { request.page_size.min(MAX_PAGE) } as usize;
        let mut page: BinaryHeap<(ArtifactKey, u64)> = BinaryHeap::with_capacity(size + 2);
        let mut all = self.artifacts.list(&prefix);
        while let Some(ArtifactMeta { key, size: bytes, .. }) =
            all.try_next().await.map_err(|e| status::artifact(&e))?
        {
            if is_record(&key) || after.as_ref().is_some_and(|after| key <= *after) {
                continue;
            }
            page.push((key, bytes));
            // One more than the page, to know whether another follows.
            if page.len() > size + 1 {
                page.pop();
            }
        }
        let mut page = page.into_sorted_vec();
        let more = page.len() > size;
        page.truncate(size);
        let next_page_token = match page.last() {
            Some((last, _)) if more => last.to_string(),
            _ => String::new(),
        };
        let artifacts = page
            .into_iter()
            .map(|(key, size)| v1::Artifact { uri: ArtifactUri::object(key).to_string(), size })
            .collect();
        Ok(v1::ListArtifactsResponse { artifacts, next_page_token })
    }

    /// Deletes an object or everything below a prefix. The manifest goes first: a tree is whole, or it is none.
    pub(super) async fn delete_below(
        &self,
        request: v1::DeleteArtifactsRequest,
    ) -> Result<v1::DeleteArtifactsResponse, Status> {
        let uri = self.own("uri", &request.uri)?;
        let names: Vec<&str> = uri.key().as_str().split('/').collect();
        if names[0] != UPLOADS {
            return Err(invalid("uri", "FORBIDDEN", "what a run stored is deleted with its run"));
        }
        if names.len() < 3 {
            return Err(invalid(
                "uri",
                "FORBIDDEN",
                "names everything; name an upload: `artifact:uploads/TENANT/ID/`",
            ));
        }
        if names.len() > 3 {
            let upload = names[..3].join("/");
            let manifest: ArtifactKey = format!("{upload}/{MANIFEST_NAME}")
                .parse()
                .map_err(|error| status::service(&ServiceError::Internal(format!("{error}"))))?;
            match self.artifacts.head(&manifest).await {
                Ok(_) => {
                    return Err(status::service(&ServiceError::FailedPrecondition {
                        reason: "UPLOAD_SEALED",
                        message: format!("it is part of a tree; delete the whole tree: artifact:{upload}/"),
                    }));
                }
                Err(error) if error.kind == ArtifactErrorKind::NotFound => {}
                Err(error) => return Err(status::artifact(&error)),
            }
        }
        let deleted =
            if uri.is_tree() { self.delete_tree(uri.key()).await } else { self.delete_one(uri.key()).await };
        Ok(v1::DeleteArtifactsResponse { deleted: deleted.map_err(|e| status::artifact(&e))? })
    }

    async fn delete_one(&self, key: &ArtifactKey) -> Result<u64, ArtifactError> {
        self.artifacts.head(key).await?;
        self.artifacts.delete(key).await?;
        if let Some(record) = record::beside(key) {
            self.artifacts.delete(&record).await?;
        }
        Ok(1)
    }

    async fn delete_tree(&self, prefix: &ArtifactKey) -> Result<u64, ArtifactError> {
        let manifest = prefix.join(MANIFEST_NAME).ok();
        let mut deleted = 0;
        if let Some(manifest) = &manifest
            && self.artifacts.head(manifest).await.is_ok()
        {
            self.artifacts.delete(manifest).await?;
            deleted += 1;
        }
        let store = &self.artifacts;
        let mut results = self
            .artifacts
            .list(prefix)
            .map(|found| {
                let store = std::sync::Arc::clone(store);
                async move {
                    let key = found?.key;
                    store.delete(&key).await?;
                    Ok::<_, ArtifactError>(u64::from(!is_record(&key)))
                }
            })
            .buffer_unordered(PARALLEL);
        while let Some(one) = results.try_next().await? {
            deleted += one;
        }
        if deleted == 0 {
            let what = format!("there is nothing below artifact:{prefix}/");
            return Err(ArtifactError::new(ArtifactErrorKind::NotFound, what));
        }
        Ok(deleted)
    }

    /// The URI of something of the caller's. Another tenant's is not told from one that does not exist.
    fn own(&self, field: &str, text: &str) -> Result<ArtifactUri, Status> {
        let uri: ArtifactUri = text.parse().map_err(|error| invalid(field, "INVALID", format!("{error}")))?;
        if uri.owner().as_ref() == Some(&self.auth.caller().tenant) {
            return Ok(uri);
        }
        let what = format!("there is no artifact {uri}");
        Err(status::artifact(&ArtifactError::new(ArtifactErrorKind::NotFound, what)))
    }
}

fn is_below(key: &ArtifactKey, prefix: &ArtifactKey) -> bool {
    key.as_str().strip_prefix(prefix.as_str()).is_some_and(|rest| rest.starts_with('/'))
}

/// What the service keeps beside an upload's files, for itself.
fn is_record(key: &ArtifactKey) -> bool {
    let mut names = key.as_str().split('/');
    names.next() == Some(UPLOADS) && names.nth(2) == Some(record::DIGESTS)
}
