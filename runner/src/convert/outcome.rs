//! Outcomes and manifests.

use runner_core::{
    artifact::{ArtifactUri, EntryKind, Manifest, ManifestEntry},
    outcome::{ExitStatus, Outcome, Usage},
};
use runner_proto::v1;

use super::{Wire, cause, duration, timestamp};

impl From<&Outcome> for Wire<v1::Outcome> {
    fn from(outcome: &Outcome) -> Self {
        let Outcome { status, cause: why, retryable, message, evidence, attempt, usage, outputs } = outcome;
        Self(v1::Outcome {
            status: status.map(|status| match status {
                ExitStatus::Code(code) => v1::outcome::Status::ExitCode(code),
                ExitStatus::Signal(signal) => v1::outcome::Status::Signal(signal),
            }),
            cause: cause(*why).into(),
            retryable: *retryable,
            message: message.clone(),
            evidence: evidence
                .iter()
                .map(|seen| v1::Evidence {
                    source: seen.source.clone(),
                    detail: seen.detail.clone(),
                    time: Some(timestamp(seen.time)),
                })
                .collect(),
            attempt: *attempt,
            usage: Some(usage_to_wire(*usage)),
            outputs: outputs.as_ref().map(|manifest| Wire::from(manifest).0),
        })
    }
}

fn usage_to_wire(usage: Usage) -> v1::Usage {
    let Usage { wall, cpu, max_memory_bytes, input_bytes, output_bytes, log_bytes } = usage;
    v1::Usage {
        wall: Some(duration(wall)),
        cpu: Some(duration(cpu)),
        max_memory_bytes,
        input_bytes,
        output_bytes,
        log_bytes,
    }
}

impl From<&Manifest> for Wire<v1::Manifest> {
    fn from(manifest: &Manifest) -> Self {
        let Manifest { partial, entries, total_bytes } = manifest;
        Self(v1::Manifest {
            partial: *partial,
            entries: entries.iter().map(entry_to_wire).collect(),
            total_bytes: *total_bytes,
        })
    }
}

fn entry_to_wire(entry: &ManifestEntry) -> v1::ManifestEntry {
    let ManifestEntry { output, base, path, path_encoded, kind, size, sha256, mode, key } = entry;
    v1::ManifestEntry {
        output: output.clone(),
        path: path.clone(),
        path_encoded: *path_encoded,
        kind: match kind {
            EntryKind::File => v1::manifest_entry::Kind::File,
            EntryKind::Directory => v1::manifest_entry::Kind::Directory,
        }
        .into(),
        size: *size,
        sha256: sha256.clone(),
        mode: *mode,
        uri: key.clone().map(|key| ArtifactUri::object(key).to_string()).unwrap_or_default(),
        base: base.clone(),
    }
}
