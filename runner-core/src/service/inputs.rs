//! Finds, at admission, the outputs of other runs that a spec has as inputs.

use super::{Caller, Parts, error::ServiceError};
use crate::{
    artifact::{ArtifactError, ArtifactErrorKind, ArtifactKey, EntryKind, MANIFEST_NAME, Manifest},
    id::AttemptId,
    outcome::Outcome,
    spec::{FieldViolation, FoundOutput, InputSource, InvalidSpec, RunOutput, RunSpec},
    state::RunState,
    store::RunRecord,
};

/// Fills in where the outputs of other runs lie. They do not change any more: a run that has succeeded never does, and its
/// manifest was written before it did.
///
/// # Errors
/// A violation for each input whose run is not there, has not succeeded, or has no such output. Another tenant's run is
/// not told from one that does not exist.
pub(super) async fn find(parts: &Parts, caller: &Caller, spec: &mut RunSpec) -> Result<(), ServiceError> {
    let mut violations = Vec::new();
    for (i, input) in spec.inputs.iter_mut().enumerate() {
        let InputSource::Run(output) = &mut input.source else { continue };
        let record = parts.store.get(output.run).await?;
        let record = record.filter(|run| run.tenant == caller.tenant && !run.id.is_shadow());
        match look(output, record.as_ref()) {
            Ok(found) => output.found = Some(found),
            Err(what) => {
                violations.push(FieldViolation::new(format!("spec.inputs[{i}].uri"), "INVALID", what))
            }
        }
    }
    if violations.is_empty() { Ok(()) } else { Err(InvalidSpec(violations).into()) }
}

/// Whether everything that an accepted spec has as an input is still stored. What is elsewhere is not asked for.
///
/// # Errors
/// Where the object store does not say.
pub(super) async fn are_there(parts: &Parts, spec: &RunSpec) -> Result<bool, ArtifactError> {
    for input in &spec.inputs {
        let manifest = |prefix: &ArtifactKey| prefix.join(MANIFEST_NAME).ok();
        let key = match &input.source {
            InputSource::Artifact(uri) if uri.is_tree() => manifest(uri.key()),
            InputSource::Artifact(uri) => Some(uri.key().clone()),
            InputSource::Run(RunOutput { found: Some(found), .. }) => manifest(&found.prefix),
            InputSource::Run(RunOutput { found: None, .. }) => return Ok(false),
            InputSource::Inline(_) | InputSource::Https(_) => continue,
        };
        // Too long for a key: then nothing was ever stored there.
        let Some(key) = key else { return Ok(false) };
        match parts.artifacts.head(&key).await {
            Ok(_) => {}
            Err(error) if error.kind == ArtifactErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

fn look(output: &RunOutput, record: Option<&RunRecord>) -> Result<FoundOutput, String> {
    let run = output.run;
    let Some(record) = record else { return Err(format!("there is no run {run}")) };
    match record.position.state {
        RunState::Succeeded => {}
        RunState::Failed | RunState::Cancelled => {
            return Err(format!(
                "the run {run} did not succeed; what it wrote is named by the URIs of its manifest"
            ));
        }
        RunState::Queued | RunState::Preparing | RunState::Running | RunState::Publishing => {
            return Err(format!("the run {run} has not ended yet"));
        }
    }
    let Some(Outcome { outputs: Some(manifest), attempt, .. }) = &record.outcome else {
        return Err(format!("the run {run} has no outputs"));
    };
    let attempt = AttemptId { run, number: *attempt };
    let prefix = ArtifactKey::attempt_prefix(&record.tenant, attempt);
    match &output.path {
        None => Ok(FoundOutput { prefix, directory: true }),
        Some(path) => kind_at(manifest, path)
            .map(|kind| FoundOutput { prefix, directory: kind == EntryKind::Directory })
            .ok_or_else(|| format!("the run {run} stored nothing at {path:?}")),
    }
}

/// What lay at an absolute path of the run.
fn kind_at(manifest: &Manifest, path: &str) -> Option<EntryKind> {
    let path = path.trim_start_matches('/').as_bytes();
    manifest.entries.iter().find_map(|entry| {
        let place = entry.place()?;
        let below = place.strip_prefix(path)?;
        match below.first() {
            None => Some(entry.kind),
            Some(b'/') => Some(EntryKind::Directory),
            Some(_) => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::ManifestEntry;

    fn entry(output: &str, base: &str, path: &str, kind: EntryKind) -> ManifestEntry {
        ManifestEntry {
            output: output.to_owned(),
            base: base.to_owned(),
            path: path.to_owned(),
            path_encoded: false,
            kind,
            size: 0,
            sha256: String::new(),
            mode: 0o644,
            key: None,
        }
    }

    #[test]
    fn a_path_is_found_where_it_lay_in_the_run() {
        let manifest = Manifest {
            entries: vec![
                entry("/outputs/d", "", "", EntryKind::Directory),
                entry("/outputs/d", "", "x/y", EntryKind::File),
                entry("/outputs/r.txt", "", "", EntryKind::File),
                entry("/logs/**/*.log", "/logs", "a/b.log", EntryKind::File),
            ],
            ..Manifest::default()
        };
        for (path, kind) in [
            ("/outputs/r.txt", Some(EntryKind::File)),
            ("/outputs/d", Some(EntryKind::Directory)),
            ("/outputs/d/x", Some(EntryKind::Directory)),
            ("/outputs/d/x/y", Some(EntryKind::File)),
            ("/outputs", Some(EntryKind::Directory)),
            ("/logs/a", Some(EntryKind::Directory)),
            ("/logs/a/b.log", Some(EntryKind::File)),
            ("/outputs/r", None),
            ("/outputs/r.txt/x", None),
            ("/logs/**", None),
        ] {
            assert_eq!(kind_at(&manifest, path), kind, "{path}");
        }
    }
}
