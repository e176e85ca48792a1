//! What is stored: listed, deleted, and downloaded as a tree.

use std::path::Path;

use futures::{Stream, TryStreamExt as _, stream};
use runner_proto::v1 as proto;
use serde_json::Value;

use crate::{
    client::Client,
    download::Downloaded,
    error::{ClientError, ErrorKind},
    retry,
    transfer::TransferOptions,
};

impl Client {
    /// What lies below a prefix, `artifact:KEY/`, in order of keys; empty: the caller's uploads. Asks for the next page when
    /// it is needed.
    pub fn list_artifacts(
        &self,
        prefix: impl Into<String>,
    ) -> impl Stream<Item = Result<proto::Artifact, ClientError>> + Send + Unpin + 'static {
        let client = self.clone();
        let first =
            proto::ListArtifactsRequest { prefix: prefix.into(), page_size: 1000, page_token: String::new() };
        let pages = stream::try_unfold(Some(first), move |request| {
            let client = client.clone();
            async move {
                let Some(mut request) = request else { return Ok::<_, ClientError>(None) };
                let page = client.list_artifacts_page(request.clone()).await?;
                let next = (!page.next_page_token.is_empty()).then(|| {
                    request.page_token = page.next_page_token;
                    request
                });
                Ok(Some((stream::iter(page.artifacts.into_iter().map(Ok)), next)))
            }
        });
        Box::pin(pages.try_flatten())
    }

    async fn list_artifacts_page(
        &self,
        request: proto::ListArtifactsRequest,
    ) -> Result<proto::ListArtifactsResponse, ClientError> {
        let response = retry::idempotent(self.retry_policy(), || {
            let (mut grpc, request) = (self.artifacts(), self.request(request.clone()));
            async move {
                grpc.list_artifacts(request).await.map_err(|e| ClientError::status("list what is stored", e))
            }
        });
        Ok(response.await?.into_inner())
    }

    /// Deletes an upload: `artifact:KEY`, or `artifact:KEY/` with everything below it. Answers how many objects that were.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Invalid`] for what a run stored, which is deleted with its run.
    pub async fn delete_artifacts(&self, uri: impl Into<String>) -> Result<u64, ClientError> {
        let message = proto::DeleteArtifactsRequest { uri: uri.into() };
        let mut grpc = self.artifacts();
        // Not repeated by itself: the second time there would be nothing to delete.
        let response = grpc.delete_artifacts(self.request(message)).await;
        Ok(response.map_err(|e| ClientError::status("delete what is stored", e))?.into_inner().deleted)
    }

    /// Takes a sealed tree, `artifact:KEY/`, with its directories and modes. What lies in `dir` stays, but for the files of
    /// the tree.
    ///
    /// # Errors
    /// As [`Client::download_outputs`]; [`ErrorKind::NotFound`] where there is no such tree.
    pub async fn download_tree(
        &self,
        uri: &str,
        dir: impl AsRef<Path>,
        options: TransferOptions,
    ) -> Result<Vec<Downloaded>, ClientError> {
        let doing = format!("download {uri}");
        let list = format!("{uri}manifest.json");
        // Beside the destination, where there is room for it.
        let dir = dir.as_ref();
        std::fs::create_dir_all(dir).map_err(|e| ClientError::io(doing.as_str(), e))?;
        let aside = dir.join(format!(".manifest-{}", crate::clock::run_id()));
        let fetched = self.download(list, &aside, None, TransferOptions::default()).await;
        let text =
            fetched.and_then(|_| std::fs::read(&aside).map_err(|e| ClientError::io(doing.as_str(), e)));
        let removed = std::fs::remove_file(&aside);
        let text = text?;
        removed.map_err(|e| ClientError::io(doing.as_str(), e))?;
        let manifest = manifest(&text).ok_or_else(|| {
            ClientError::new(ErrorKind::Protocol, doing.as_str(), "its manifest is not what it should be")
        })?;
        self.download_outputs(&manifest, dir, options).await
    }
}

/// A manifest as it is stored.
fn manifest(json: &[u8]) -> Option<proto::Manifest> {
    let value: Value = serde_json::from_slice(json).ok()?;
    let text =
        |entry: &Value, name: &str| entry.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let number = |entry: &Value, name: &str| entry.get(name).and_then(Value::as_u64).unwrap_or_default();
    let entries = value.get("entries")?.as_array()?.iter().map(|entry| {
        let kind = match entry.get("kind")?.as_str()? {
            "file" => proto::manifest_entry::Kind::File,
            "directory" => proto::manifest_entry::Kind::Directory,
            _ => return None,
        };
        let key = text(entry, "key");
        Some(proto::ManifestEntry {
            output: text(entry, "output"),
            base: text(entry, "base"),
            path: text(entry, "path"),
            path_encoded: entry.get("path_encoded").and_then(Value::as_bool).unwrap_or_default(),
            kind: kind.into(),
            size: number(entry, "size"),
            sha256: text(entry, "sha256"),
            mode: u32::try_from(number(entry, "mode")).ok()?,
            uri: if key.is_empty() { key } else { format!("artifact:{key}") },
        })
    });
    Some(proto::Manifest {
        partial: value.get("partial").and_then(Value::as_bool).unwrap_or_default(),
        total_bytes: number(&value, "total_bytes"),
        entries: entries.collect::<Option<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_manifest_is_read_as_it_is_sent() {
        let json = br#"{"entries":[
            {"path":"a","kind":"file","size":3,"sha256":"00","mode":420,"key":"uploads/t/u/files/a"},
            {"path":"d","kind":"directory","size":0,"mode":493,"key":null}],"total_bytes":3}"#;
        let manifest = manifest(json).expect("a manifest");
        assert_eq!(manifest.entries[0].uri, "artifact:uploads/t/u/files/a");
        assert_eq!(manifest.entries[1].kind(), proto::manifest_entry::Kind::Directory);
        assert!(super::manifest(b"{}").is_none() && super::manifest(b"[").is_none());
        assert!(super::manifest(br#"{"entries":[{"kind":"link"}]}"#).is_none());
    }
}
