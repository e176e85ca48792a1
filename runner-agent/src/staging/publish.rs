//! Outputs: from where the workload wrote them to the object store.

use bytes::Bytes;
use runner_core::{
    artifact::{ArtifactErrorKind, ArtifactKey, ArtifactStore, MANIFEST_NAME, Manifest, read_small},
    backend::{Direction, ProgressSink},
    crash,
    spec::RunSpec,
};
use serde::{Deserialize, Serialize};

use super::{
    MountPlan, Root, StagingError, StagingErrorKind, StagingLimits,
    error::About,
    output::{Counter, OneOutput},
};

/// What [`publish_outputs`] is to do.
#[derive(Clone, Copy)]
pub struct OutputPublishing<'a> {
    /// Whose outputs.
    pub spec: &'a RunSpec,
    /// The plan of the same spec.
    pub plan: &'a MountPlan,
    /// The attempt's staging root, as [`stage_inputs`](super::stage_inputs) left it.
    pub root: &'a Root,
    /// [`ArtifactKey::attempt_prefix`] of the attempt.
    pub attempt_prefix: &'a ArtifactKey,
    /// Where objects go.
    pub artifacts: &'a dyn ArtifactStore,
    /// The program failed or was stopped: what it wrote is published, what it did not write is not asked for.
    pub partial: bool,
    /// Caps.
    pub limits: &'a StagingLimits,
    /// Told of every chunk and file. Totals are not known and stay zero.
    pub progress: &'a dyn ProgressSink,
}

/// What was published.
#[derive(Debug)]
pub struct Published {
    /// What is stored. `partial` where the program failed, or an output could not be published as promised.
    pub manifest: Manifest,
    /// What was left out and why, for the outcome's evidence. A line each, at most one per kind and output.
    pub notes: Vec<String>,
    /// The first output that breaks its promise: a required one absent, one above its limit, one that is no file. Never
    /// retryable. The attempt ends as `OUTPUT`. `None` where the program failed anyway.
    pub failure: Option<StagingError>,
}

/// Stores the outputs and then the manifest.
///
/// - A file goes to `{attempt_prefix}/outputs/{index}/{name}`, a directory's files to
///   `{attempt_prefix}/outputs/{index}/{path}`; with a destination, `{destination}/{run}/{attempt}/` comes in place of the
///   part up to the index, so that two attempts never share a key. Control characters, `%` and bytes that are not UTF-8 are `%XX` in a key, and a path too long for a key is
///   `~sha256-HEX`.
/// - A directory has an entry of its own, so an empty one is seen; the output's own has an empty path.
/// - Links, FIFOs, sockets and devices are neither followed nor stored. A hard link is stored as a file.
/// - The size and digest of a file are those of the bytes that were stored, also where it changed meanwhile.
/// - An output that breaks its promise is left out whole; all others are published.
/// - The manifest at `{attempt_prefix}/manifest.json` is written last. Where it is there already, an earlier call was
///   complete, and the answer is the same as its answer was.
///
/// # Errors
/// Where the store or this machine failed. Nothing is visible then, and calling again does it all again.
pub async fn publish_outputs(job: OutputPublishing<'_>) -> Result<Published, StagingError> {
    let about = About::all(Direction::Output);
    if let Some(manifest) = read_manifest(job.artifacts, job.attempt_prefix, job.limits).await? {
        let Report { notes, failure } = read_report(&job, &about).await?;
        return Ok(Published { manifest, notes, failure: failure.map(StagingError::from) });
    }
    let counter = Counter::new(job.progress);
    let mut manifest = Manifest { partial: job.partial, ..Manifest::default() };
    let mut notes = Vec::new();
    let mut failure: Option<StagingError> = None;
    let mut entries_left = job.limits.output_entries;
    for (index, output) in job.spec.outputs.iter().enumerate() {
        let mut one = OneOutput::new(&job, index, output, &counter, entries_left)?;
        let result = one.publish().await;
        notes.append(&mut one.take_notes());
        match result {
            Ok(()) => {
                entries_left = entries_left.saturating_sub(one.entries.len() as u64);
                manifest.entries.append(&mut one.entries);
            }
            Err(error) if breaks_a_promise(error.kind) => {
                one.discard().await;
                notes.push(error.to_string());
                if !job.partial && failure.is_none() {
                    failure = Some(error);
                }
            }
            Err(error) => return Err(error),
        }
    }
    manifest.partial |= failure.is_some();
    manifest.entries.sort_by(|a, b| (&a.output, &a.path).cmp(&(&b.output, &b.path)));
    manifest.total_bytes = manifest.entries.iter().map(|entry| entry.size).sum();
    seal(&job, &about, &manifest, &notes, failure.as_ref()).await?;
    Ok(Published { manifest, notes, failure })
}

/// Reads the manifest below `prefix`. `None` where there is none: then nothing below the prefix is complete.
///
/// # Errors
/// `Malformed` where it does not parse, `LimitExceeded` where it is too large; else the store's failure.
pub async fn read_manifest(
    artifacts: &dyn ArtifactStore,
    prefix: &ArtifactKey,
    limits: &StagingLimits,
) -> Result<Option<Manifest>, StagingError> {
    read_manifest_at(artifacts, prefix, limits, &About::all(Direction::Output)).await
}

pub(super) async fn read_manifest_at(
    artifacts: &dyn ArtifactStore,
    prefix: &ArtifactKey,
    limits: &StagingLimits,
    about: &About,
) -> Result<Option<Manifest>, StagingError> {
    read_json(artifacts, prefix, MANIFEST_NAME, limits, about).await
}

/// Name, below an attempt's prefix, of what is to be said about a published manifest. Written before it.
const REPORT_NAME: &str = "outputs.json";

#[derive(Debug, Default, Serialize, Deserialize)]
struct Report {
    notes: Vec<String>,
    failure: Option<Failure>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Failure {
    kind: StagingErrorKind,
    field: String,
    context: String,
}

impl From<Failure> for StagingError {
    fn from(Failure { kind, field, context }: Failure) -> Self {
        Self { kind, direction: Direction::Output, field, context, source: None }
    }
}

async fn read_report(job: &OutputPublishing<'_>, about: &About) -> Result<Report, StagingError> {
    Ok(read_json(job.artifacts, job.attempt_prefix, REPORT_NAME, job.limits, about)
        .await?
        .unwrap_or_default())
}

async fn read_json<T: serde::de::DeserializeOwned>(
    artifacts: &dyn ArtifactStore,
    prefix: &ArtifactKey,
    name: &str,
    limits: &StagingLimits,
    about: &About,
) -> Result<Option<T>, StagingError> {
    let key = join(prefix, name, about)?;
    match read_small(artifacts, &key, limits.manifest_bytes).await {
        Ok(bytes) => match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Some(value)),
            Err(error) => Err(StagingError {
                source: Some(error.into()),
                ..about.error(StagingErrorKind::Malformed, format!("read {key}: it is not what it should be"))
            }),
        },
        Err(error) if error.kind == ArtifactErrorKind::NotFound => Ok(None),
        Err(error) => Err(about.store(format!("read {key}"), error)),
    }
}

pub(super) fn join(prefix: &ArtifactKey, name: &str, about: &About) -> Result<ArtifactKey, StagingError> {
    prefix.join(name).map_err(|error| about.error(StagingErrorKind::LimitExceeded, error.to_string()))
}

/// Writes the report, then the manifest: the commit point.
async fn seal(
    job: &OutputPublishing<'_>,
    about: &About,
    manifest: &Manifest,
    notes: &[String],
    failure: Option<&StagingError>,
) -> Result<(), StagingError> {
    let json = |value: Result<Vec<u8>, serde_json::Error>| {
        value.map(Bytes::from).map_err(|error| about.local("write the manifest", error.into()))
    };
    let key = join(job.attempt_prefix, REPORT_NAME, about)?;
    if notes.is_empty() && failure.is_none() {
        // An interrupted call may have left one.
        job.artifacts.delete(&key).await.map_err(|error| about.store(format!("delete {key}"), error))?;
    } else {
        let failure = failure.map(|error| Failure {
            kind: error.kind,
            field: error.field.clone(),
            context: error.context.clone(),
        });
        let bytes = json(serde_json::to_vec(&Report { notes: notes.to_vec(), failure }))?;
        job.artifacts
            .put_bytes(&key, bytes)
            .await
            .map_err(|error| about.store(format!("store {key}"), error))?;
    }
    let bytes = json(serde_json::to_vec(manifest))?;
    if bytes.len() as u64 > job.limits.manifest_bytes {
        let what = format!("the manifest has {} bytes, more than {}", bytes.len(), job.limits.manifest_bytes);
        return Err(about.error(StagingErrorKind::LimitExceeded, what));
    }
    let key = join(job.attempt_prefix, MANIFEST_NAME, about)?;
    job.artifacts.put_bytes(&key, bytes).await.map_err(|error| about.store(format!("store {key}"), error))?;
    crash::point("outputs.manifest-stored");
    Ok(())
}

/// Whether the failure is the output's own, so that the others can be published without it.
const fn breaks_a_promise(kind: StagingErrorKind) -> bool {
    match kind {
        StagingErrorKind::Absent
        | StagingErrorKind::NotAFile
        | StagingErrorKind::Unreadable
        | StagingErrorKind::LimitExceeded => true,
        StagingErrorKind::NotFound
        | StagingErrorKind::Mismatch
        | StagingErrorKind::Malformed
        | StagingErrorKind::Conflict
        | StagingErrorKind::Unsupported
        | StagingErrorKind::Denied
        | StagingErrorKind::Unavailable
        | StagingErrorKind::Store
        | StagingErrorKind::Local => false,
    }
}
