//! Which objects an attempt's agent may touch. Being of a tenant is not enough: an agent gets what its own attempt needs.

use std::collections::BTreeSet;

use runner_core::{
    artifact::{
        ArtifactError, ArtifactErrorKind, ArtifactKey, ArtifactUri, MANIFEST_NAME, Manifest, read_small,
    },
    backend::AttemptContext,
    spec::InputSource,
};

/// Largest manifest of an input that is looked into.
const MAX_MANIFEST_BYTES: u64 = 512 << 20;

/// What an attempt may read, without looking anything up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readable {
    /// It may.
    Yes,
    /// It may where a manifest of its inputs names it.
    IfNamed,
    /// It may not.
    No,
}

fn is_below(key: &ArtifactKey, prefix: &ArtifactKey) -> bool {
    key.as_str().strip_prefix(prefix.as_str()).is_some_and(|rest| rest.starts_with('/'))
}

/// Whether the attempt may store or delete the object: below its own prefix (but for logs, which the service writes), or
/// below the destination of one of its outputs.
pub fn may_write(attempt: &AttemptContext, key: &ArtifactKey) -> bool {
    let own = ArtifactKey::attempt_prefix(&attempt.tenant, attempt.attempt);
    let Some(rest) = key.as_str().strip_prefix(own.as_str()).and_then(|rest| rest.strip_prefix('/')) else {
        let destinations = attempt.spec.outputs.iter().filter_map(|output| output.destination.as_ref());
        return destinations.into_iter().any(|destination| is_below(key, destination.key()));
    };
    rest == MANIFEST_NAME || rest == "outputs.json" || rest.starts_with("outputs/")
}

/// Whether the attempt may read the object.
pub fn may_read(attempt: &AttemptContext, key: &ArtifactKey) -> Readable {
    if may_write(attempt, key) {
        return Readable::Yes;
    }
    let mut answer = Readable::No;
    for input in &attempt.spec.inputs {
        let prefix = match &input.source {
            InputSource::Artifact(uri) if uri.is_tree() => uri.key(),
            InputSource::Artifact(uri) => {
                if uri.key() == key {
                    return Readable::Yes;
                }
                continue;
            }
            InputSource::Run(output) => match &output.found {
                Some(found) => &found.prefix,
                None => continue,
            },
            InputSource::Inline(_) | InputSource::Https(_) => continue,
        };
        if prefix.join(MANIFEST_NAME).is_ok_and(|manifest| manifest == *key) {
            return Readable::Yes;
        }
        answer = Readable::IfNamed;
    }
    answer
}

/// Every object that the manifests of the attempt's inputs name, as far as it is of the same owner as the manifest.
///
/// # Errors
/// Where a manifest cannot be read.
pub async fn named(attempt: &AttemptContext) -> Result<BTreeSet<ArtifactKey>, ArtifactError> {
    let mut keys = BTreeSet::new();
    for input in &attempt.spec.inputs {
        let prefix = match &input.source {
            InputSource::Artifact(uri) if uri.is_tree() => uri.key().clone(),
            InputSource::Run(output) => match &output.found {
                Some(found) => found.prefix.clone(),
                None => continue,
            },
            InputSource::Artifact(_) | InputSource::Inline(_) | InputSource::Https(_) => continue,
        };
        let key = prefix
            .join(MANIFEST_NAME)
            .map_err(|error| ArtifactError::new(ArtifactErrorKind::Other, error.to_string()))?;
        let bytes = read_small(attempt.artifacts.as_ref(), &key, MAX_MANIFEST_BYTES).await?;
        let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|error| {
            ArtifactError::with_source(
                ArtifactErrorKind::Other,
                format!("read {key}: it is no manifest"),
                error,
            )
        })?;
        let owner = ArtifactUri::tree(prefix).owner();
        let of_owner = |key: &ArtifactKey| ArtifactUri::object(key.clone()).owner() == owner;
        keys.extend(manifest.entries.into_iter().filter_map(|entry| entry.key).filter(of_owner));
    }
    Ok(keys)
}

#[cfg(test)]
#[path = "scope_tests.rs"]
mod tests;
