//! Staging of the fake: inputs from the artifact store into memory, outputs back, manifest last.

use std::collections::BTreeMap;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::workload::{Node, PublishedOutputs};
use crate::{
    artifact::{
        ArtifactError, ArtifactErrorKind, ArtifactKey, ArtifactUri, EntryKind, MANIFEST_NAME, Manifest,
        ManifestEntry, read_small,
    },
    backend::{AttemptContext, BackendError, BackendErrorKind, Direction, Progress},
    id::InvalidId,
    outcome::{Cause, ExitStatus},
    spec::{Input, InputSource, Output},
};

/// Largest input or tree manifest. It is all kept in memory.
const MAX_BYTES: u64 = 256 * 1024 * 1024;

fn input_failed(path: &str, error: ArtifactError) -> BackendError {
    BackendError::with_source(
        BackendErrorKind::Input,
        error.kind.retryable(),
        format!("stage the input {path:?}"),
        error,
    )
}

fn hex_digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn verify(what: &dyn std::fmt::Display, bytes: &[u8], expected: Option<&str>) -> Result<(), ArtifactError> {
    let found = hex_digest(bytes);
    match expected {
        Some(expected) if expected != found => Err(ArtifactError::new(
            ArtifactErrorKind::Mismatch,
            format!("{what} has SHA-256 {found}, not {expected}"),
        )),
        _ => Ok(()),
    }
}

/// Reads every input, verified.
pub(super) async fn inputs(attempt: &AttemptContext) -> Result<BTreeMap<String, Node>, BackendError> {
    let mut files = BTreeMap::new();
    let inputs = &attempt.spec.inputs;
    let (mut bytes_done, files_total) = (0, inputs.len() as u64);
    for (i, input) in inputs.iter().enumerate() {
        let staged = one_input(attempt, input).await.map_err(|error| input_failed(&input.path, error))?;
        for (path, node) in staged {
            if let Node::File { bytes, .. } = &node {
                bytes_done += bytes.len() as u64;
            }
            files.insert(path, node);
        }
        let files_done = i as u64 + 1;
        let direction = Direction::Input;
        attempt.progress.progress(Progress {
            direction,
            bytes_done,
            bytes_total: 0,
            files_done,
            files_total,
        });
    }
    Ok(files)
}

async fn one_input(attempt: &AttemptContext, input: &Input) -> Result<Vec<(String, Node)>, ArtifactError> {
    let store = attempt.artifacts.as_ref();
    let bytes = match &input.source {
        InputSource::Inline(bytes) => bytes.clone(),
        InputSource::Run(_) | InputSource::Https(_) => {
            let what = "the fake backend stages objects, trees and inline bytes only";
            return Err(ArtifactError::new(ArtifactErrorKind::Other, what));
        }
        InputSource::Artifact(uri) if uri.is_tree() => return tree(attempt, input, uri).await,
        InputSource::Artifact(uri) => read_small(store, uri.key(), MAX_BYTES).await?,
    };
    verify(&input.path, &bytes, input.sha256.as_deref())?;
    Ok(vec![(input.path.clone(), Node::File { bytes, mode: input.mode.unwrap_or(0o644) })])
}

async fn tree(
    attempt: &AttemptContext,
    input: &Input,
    uri: &ArtifactUri,
) -> Result<Vec<(String, Node)>, ArtifactError> {
    let store = attempt.artifacts.as_ref();
    let key = |name: &str| {
        uri.key().join(name).map_err(|error| {
            ArtifactError::with_source(ArtifactErrorKind::Other, format!("name the parts of {uri}"), error)
        })
    };
    let manifest = read_small(store, &key(MANIFEST_NAME)?, MAX_BYTES).await?;
    let manifest: Manifest = serde_json::from_slice(&manifest).map_err(|error| {
        ArtifactError::with_source(ArtifactErrorKind::Other, format!("read the manifest of {uri}"), error)
    })?;
    let mut nodes = vec![(input.path.clone(), Node::Directory)];
    for entry in manifest.entries {
        let path = format!("{}/{}", input.path, entry.path);
        let node = match (entry.kind, &entry.key) {
            (EntryKind::File, Some(key)) => {
                let bytes = read_small(store, key, MAX_BYTES).await?;
                verify(key, &bytes, Some(&entry.sha256))?;
                Node::File { bytes, mode: input.mode.unwrap_or(entry.mode) }
            }
            (EntryKind::File | EntryKind::Directory, _) => Node::Directory,
        };
        nodes.push((path, node));
    }
    Ok(nodes)
}

/// Stores what the program wrote, the manifest last. Doing it again writes the same bytes under the same keys.
pub(super) async fn outputs(
    attempt: &AttemptContext,
    files: &BTreeMap<String, Node>,
    cause: Cause,
    status: ExitStatus,
) -> Result<PublishedOutputs, ArtifactError> {
    let succeeded = cause == Cause::Exited && status == ExitStatus::Code(0);
    let base = ArtifactKey::attempt_prefix(&attempt.tenant, attempt.attempt);
    let mut fault = None;
    let mut entries = Vec::new();
    for (i, output) in attempt.spec.outputs.iter().enumerate() {
        let prefix = match &output.destination {
            Some(uri) => named(uri.key(), uri.key().of_attempt(attempt.attempt))?,
            None => join(&base, &format!("outputs/{i}"))?,
        };
        let found = entries_of(output, files);
        let total: u64 = found.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        let over = output.max_bytes.filter(|max| total > *max);
        if let Some(max) = over {
            fault =
                Some(format!("the output {:?} has {total} bytes, more than its limit of {max}", output.path));
            continue;
        }
        if found.is_empty() && output.required {
            fault = Some(format!("the required output {:?} is absent", output.path));
        }
        for (mut entry, bytes) in found {
            if entry.kind == EntryKind::File {
                let name = if entry.path.is_empty() { "file" } else { entry.path.as_str() };
                let key = join(&prefix, name)?;
                attempt.artifacts.put_bytes(&key, bytes).await?;
                entry.key = Some(key);
            }
            entries.push(entry);
        }
    }
    entries.sort_by(|a, b| (&a.output, &a.path).cmp(&(&b.output, &b.path)));
    let total_bytes = entries.iter().map(|entry| entry.size).sum();
    let manifest = Manifest { partial: !succeeded || fault.is_some(), entries, total_bytes };
    let text = serde_json::to_vec(&manifest).map_err(|error| {
        ArtifactError::with_source(ArtifactErrorKind::Other, "write the manifest as JSON", error)
    })?;
    attempt.artifacts.put_bytes(&join(&base, MANIFEST_NAME)?, text.into()).await?;
    let files_done = manifest.entries.len() as u64;
    attempt.progress.progress(Progress {
        direction: Direction::Output,
        bytes_done: total_bytes,
        bytes_total: total_bytes,
        files_done,
        files_total: files_done,
    });
    Ok(PublishedOutputs { manifest, fault: fault.filter(|_| succeeded), retryable: false })
}

fn join(prefix: &ArtifactKey, rest: &str) -> Result<ArtifactKey, ArtifactError> {
    named(prefix, prefix.join(rest))
}

fn named(prefix: &ArtifactKey, key: Result<ArtifactKey, InvalidId>) -> Result<ArtifactKey, ArtifactError> {
    key.map_err(|error| {
        ArtifactError::with_source(ArtifactErrorKind::Other, format!("name an object below {prefix}"), error)
    })
}

/// What exists of an output, with its bytes; without keys yet.
fn entries_of(output: &Output, files: &BTreeMap<String, Node>) -> Vec<(ManifestEntry, Bytes)> {
    let below = format!("{}/", output.path);
    let mut found: BTreeMap<String, (EntryKind, u32, Bytes)> = BTreeMap::new();
    for (path, node) in files {
        let relative = match path.strip_prefix(&below) {
            Some(relative) => relative,
            None if *path == output.path => "",
            None => continue,
        };
        // The directories that lead to it exist too.
        for (at, _) in relative.match_indices('/') {
            found.entry(relative[..at].to_owned()).or_insert((EntryKind::Directory, 0o755, Bytes::new()));
        }
        let entry = match node {
            Node::File { bytes, mode } => (EntryKind::File, *mode, bytes.clone()),
            Node::Directory => (EntryKind::Directory, 0o755, Bytes::new()),
        };
        found.insert(relative.to_owned(), entry);
    }
    let entry = |(path, (kind, mode, bytes)): (String, (EntryKind, u32, Bytes))| {
        let entry = ManifestEntry {
            output: output.path.clone(),
            base: String::new(),
            path,
            path_encoded: false,
            kind,
            size: bytes.len() as u64,
            sha256: if kind == EntryKind::File { hex_digest(&bytes) } else { String::new() },
            mode,
            key: None,
        };
        (entry, bytes)
    };
    found.into_iter().map(entry).collect()
}
