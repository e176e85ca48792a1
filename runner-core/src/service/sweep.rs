//! Retention: removes what is older than it is kept. Everything here is idempotent: after a crash the next pass does again what
//! was not recorded, and finds it done. Touches nothing but what finished runs and uploads left under their own keys.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, TryStreamExt as _};
use uuid::Uuid;

use super::{Core, shadow};
use crate::{
    artifact::{ArtifactError, ArtifactKey, MANIFEST_NAME},
    clock::Timestamp,
    crash,
    id::RunId,
    log::LogError,
    spec::InputSource,
    store::{EndedCursor, EndedRun, Removed, RunRecord, StoreError, Swept},
};

/// How long what is kept. `None`: for ever.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retention {
    /// Uploads that no stored run names, as an input or as a destination, from the time at which they were begun.
    pub abandoned: Option<Duration>,
    /// All uploads, from the time at which they were begun. What a live run names stays.
    pub uploads: Option<Duration>,
    /// What runs wrote, from their end.
    pub outputs: Option<Duration>,
    /// Their logs, from their end.
    pub logs: Option<Duration>,
    /// Their rows, and with them everything else of theirs, from their end.
    pub runs: Option<Duration>,
    /// Time between two passes.
    pub interval: Duration,
    /// Most runs of each kind of sweep, and most uploads, in one pass.
    pub batch: usize,
}

impl Default for Retention {
    /// Nothing that somebody may want is removed unless somebody said so.
    fn default() -> Self {
        Self {
            abandoned: Some(Duration::from_secs(14 * 24 * 3600)),
            uploads: None,
            outputs: None,
            logs: None,
            runs: None,
            interval: Duration::from_secs(3600),
            batch: 1000,
        }
    }
}

/// Objects that are removed at once.
const PARALLEL: usize = 16;
/// Runs that are asked for at once.
const PAGE: usize = 100;

/// Why a pass ended early. The next one goes on.
#[derive(Debug, thiserror::Error)]
pub(super) enum SweepError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Artifacts(#[from] ArtifactError),
    #[error(transparent)]
    Logs(#[from] LogError),
}

impl From<SweepError> for super::ServiceError {
    fn from(error: SweepError) -> Self {
        match error {
            SweepError::Store(error) => error.into(),
            SweepError::Logs(error) => error.into(),
            SweepError::Artifacts(error) => Self::Unavailable(error.to_string()),
        }
    }
}

/// What a pass removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SweepReport {
    /// Runs whose rows, and everything else, are gone.
    pub runs: u64,
    /// Runs whose logs are gone.
    pub logs: u64,
    /// Runs whose outputs are gone.
    pub outputs: u64,
    /// Uploads that are gone.
    pub uploads: u64,
}

/// How far the sweeps of a part of runs have come, in this process.
pub(super) type Sweeps = tokio::sync::Mutex<BTreeMap<Swept, Progress>>;

/// How far one of them has come.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// What the store knows was read.
    begun: bool,
    /// All runs up to here are done, or postponed.
    reached: Option<EndedCursor>,
    /// Runs that something live still needs. As many as live runs name, so they are few.
    postponed: BTreeMap<EndedCursor, EndedRun>,
}

/// Sweeps until the service stops.
pub(super) async fn run(core: Arc<Core>) {
    // What a crash interrupted does not wait for the first interval.
    told("removals", removals(&core, &mut 0).await);
    loop {
        let interval = core.parts.options.retention.interval;
        let jitter = Duration::from_millis(core.parts.ids.random() % 1000).min(interval / 4);
        if !core.pause(interval + jitter).await {
            return;
        }
        pass(&core).await;
    }
}

/// One pass. A failure of one kind of sweep is told, and keeps no other from its work.
pub(super) async fn pass(core: &Core) -> SweepReport {
    let retention = &core.parts.options.retention;
    let now = core.parts.clock.now();
    let mut report = SweepReport::default();
    told("removals", removals(core, &mut report.runs).await);
    // Rows first: what they take with them needs no sweep of its own.
    if let Some(kept) = retention.runs {
        told("runs", rows(core, now - kept, &mut report.runs).await);
    }
    if let Some(kept) = retention.logs {
        told("logs", part(core, Swept::Logs, now - kept, &mut report.logs).await);
    }
    if let Some(kept) = retention.outputs {
        told("outputs", part(core, Swept::Outputs, now - kept, &mut report.outputs).await);
    }
    if retention.abandoned.is_some() || retention.uploads.is_some() {
        told("uploads", uploads(core, now, &mut report.uploads).await);
    }
    if report != SweepReport::default() {
        tracing::info!(
            runs = report.runs,
            logs = report.logs,
            outputs = report.outputs,
            uploads = report.uploads,
            "removed what was kept long enough"
        );
    }
    report
}

fn told(kind: &'static str, result: Result<(), SweepError>) {
    if let Err(error) = result {
        tracing::warn!(kind, %error, "a sweep ended early; the next pass goes on");
    }
}

/// Finishes the removals that were begun.
async fn removals(core: &Core, done: &mut u64) -> Result<(), SweepError> {
    for run in core.parts.store.removals(core.parts.options.retention.batch).await? {
        if core.stopping.is_cancelled() {
            break;
        }
        *done += u64::from(remove(core, &run).await? == Removed::Gone);
    }
    Ok(())
}

/// Removes the runs that ended before `until`, oldest first, as many as one pass may take.
async fn rows(core: &Core, until: Timestamp, done: &mut u64) -> Result<(), SweepError> {
    let needed = Needed::by_live_runs(core).await?;
    let mut left = core.parts.options.retention.batch;
    let mut after = None;
    while left > 0 && !core.stopping.is_cancelled() {
        let page = core.parts.store.ended(after, until, left.min(PAGE)).await?;
        if page.is_empty() {
            break;
        }
        for run in page {
            after = Some(run.cursor());
            // A shadow goes with its primary.
            if run.id.is_shadow() || needed.run(core, run.id) {
                continue;
            }
            left -= 1;
            *done += u64::from(remove(core, &run).await? == Removed::Gone);
        }
    }
    Ok(())
}

/// Sweeps a part of the runs that ended before `until`, oldest first, as many as one pass may take. What is needed is
/// looked at again in each pass, and keeps nothing behind it from being swept.
async fn part(core: &Core, what: Swept, until: Timestamp, done: &mut u64) -> Result<(), SweepError> {
    let store = &core.parts.store;
    let mut sweeps = core.sweeps.lock().await;
    let progress = sweeps.entry(what).or_default();
    if !progress.begun {
        progress.reached = store.swept(what).await?;
        progress.begun = true;
    }
    let needed = match what {
        // A log is never an input.
        Swept::Logs => Needed::default(),
        Swept::Outputs => Needed::by_live_runs(core).await?,
    };
    let free: Vec<EndedRun> =
        progress.postponed.values().filter(|run| !needed.run(core, run.id)).cloned().collect();
    for run in free {
        sweep_part(core, what, &run).await?;
        progress.postponed.remove(&run.cursor());
        *done += 1;
    }
    let mut left = core.parts.options.retention.batch;
    while left > 0 && !core.stopping.is_cancelled() {
        let page = store.ended(progress.reached, until, left.min(PAGE)).await?;
        if page.is_empty() {
            break;
        }
        left -= page.len();
        for run in page {
            if needed.run(core, run.id) {
                progress.postponed.insert(run.cursor(), run.clone());
            } else {
                sweep_part(core, what, &run).await?;
                *done += 1;
            }
            progress.reached = Some(run.cursor());
        }
    }
    // Recorded after the deed, and not past what was postponed: a restart repeats what is not recorded.
    if let (Some(reached), true) = (progress.reached, progress.postponed.is_empty())
        && store.swept(what).await? != Some(reached)
    {
        store.set_swept(what, reached).await?;
    }
    Ok(())
}

async fn sweep_part(core: &Core, what: Swept, run: &EndedRun) -> Result<(), SweepError> {
    match what {
        Swept::Logs => core.parts.logs.delete(&run.tenant, run.id).await?,
        Swept::Outputs => remove_outputs(core, run).await?,
    }
    Ok(())
}

/// Whether a live run of a caller has what this one stored as an input. A shadow is in nobody's way.
pub(super) async fn is_input(core: &Core, id: RunId) -> Result<bool, StoreError> {
    let live = core.parts.store.live().await?;
    let callers = live.runs.iter().filter(|run| !run.id.is_shadow());
    Ok(Needed::by(callers).runs.contains(&id))
}

/// Removes a finished run: that it is being removed is recorded first; then its logs go, its manifests, everything under its
/// keys, and last its rows with its key.
pub(super) async fn remove(core: &Core, run: &EndedRun) -> Result<Removed, SweepError> {
    let parts = &core.parts;
    match parts.store.begin_removal(run.id).await? {
        Removed::Gone => {}
        other @ (Removed::Unknown | Removed::Live) => return Ok(other),
    }
    crash::point("removal.begun");
    if !run.id.is_shadow() {
        // From here on no shadow of it can be accepted any more.
        Box::pin(shadow::remove_of(core, run.id)).await?;
    }
    parts.logs.delete(&run.tenant, run.id).await?;
    crash::point("removal.logs-gone");
    let prefix = ArtifactKey::run_prefix(&run.tenant, run.id);
    remove_manifests(core, &prefix).await?;
    crash::point("removal.manifests-gone");
    remove_from_destinations(core, run).await?;
    remove_below(core, &prefix, |_| true).await?;
    crash::point("removal.artifacts-gone");
    let removed = parts.store.remove(run.id).await?;
    crash::point("removal.done");
    if !run.id.is_shadow() {
        core.shadows.wake();
    }
    Ok(removed)
}

/// Removes everything of a run but its logs.
async fn remove_outputs(core: &Core, run: &EndedRun) -> Result<(), SweepError> {
    let prefix = ArtifactKey::run_prefix(&run.tenant, run.id);
    remove_manifests(core, &prefix).await?;
    remove_from_destinations(core, run).await?;
    remove_below(core, &prefix, |rest| rest.split('/').nth(1) != Some("log")).await?;
    Ok(())
}

/// Removes what a run stored where its spec said. A spec that does not decode says nothing.
async fn remove_from_destinations(core: &Core, run: &EndedRun) -> Result<(), SweepError> {
    let record = match core.parts.store.get(run.id).await {
        Ok(Some(record)) => record,
        Ok(None) | Err(StoreError::Inconsistent(_)) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    for destination in record.spec.outputs.iter().filter_map(|output| output.destination.as_ref()) {
        // Too long for a key: then nothing was stored there.
        if let Ok(own) = destination.key().of_run(run.id) {
            remove_below(core, &own, |_| true).await?;
        }
    }
    Ok(())
}

/// The manifests go first: without one, nothing of an attempt's outputs is visible.
async fn remove_manifests(core: &Core, prefix: &ArtifactKey) -> Result<(), ArtifactError> {
    remove_below(core, prefix, |rest| rest.split_once('/').is_some_and(|(_, name)| name == MANIFEST_NAME))
        .await
}

/// Removes the objects below a prefix that `wanted` says yes to; it is given what follows the prefix.
async fn remove_below(
    core: &Core,
    prefix: &ArtifactKey,
    wanted: fn(&str) -> bool,
) -> Result<(), ArtifactError> {
    let artifacts = Arc::clone(&core.parts.artifacts);
    let skip = prefix.as_str().len() + 1;
    let below = artifacts.list(prefix);
    let deleting = below
        .try_filter(move |meta| std::future::ready(meta.key.as_str().get(skip..).is_some_and(wanted)))
        .try_for_each_concurrent(PARALLEL, move |meta| {
            let artifacts = Arc::clone(&artifacts);
            async move { artifacts.delete(&meta.key).await }
        });
    deleting.await
}

/// When an upload was begun: the id that the service gave it says so. `None`: it has another name, and no age.
fn begun(upload: &ArtifactKey) -> Option<Timestamp> {
    let name = upload.as_str().rsplit('/').next()?;
    let time = Uuid::try_parse(name).ok().filter(|id| id.get_version_num() == 7)?.get_timestamp()?;
    let (seconds, nanos) = time.to_unix();
    let micros = i64::try_from(seconds).ok()?.checked_mul(1_000_000)?.checked_add(i64::from(nanos / 1000))?;
    Some(Timestamp::from_micros(micros))
}

/// Removes uploads that are old enough.
async fn uploads(core: &Core, now: Timestamp, done: &mut u64) -> Result<(), SweepError> {
    let retention = &core.parts.options.retention;
    let older = |upload: &ArtifactKey, kept: Option<Duration>| {
        kept.zip(begun(upload)).is_some_and(|(kept, begun)| begun < now - kept)
    };
    let Ok(everything) = "uploads".parse::<ArtifactKey>() else { return Ok(()) };
    let needed = Needed::by_live_runs(core).await?;
    let mut objects = core.parts.artifacts.list(&everything);
    // Judged once each; both sets are bounded by what one pass may take, and by what is kept though it is old.
    let (mut go, mut stay): (BTreeSet<ArtifactKey>, HashSet<ArtifactKey>) = Default::default();
    while let Some(meta) = objects.next().await {
        // The rest in the next pass: what is gone then is not found again.
        if go.len() >= retention.batch || core.stopping.is_cancelled() {
            break;
        }
        let Some(upload) = meta?.key.upload() else { continue };
        let (abandoned, any) = (older(&upload, retention.abandoned), older(&upload, retention.uploads));
        if !(abandoned || any) || go.contains(&upload) || stay.contains(&upload) {
            continue;
        }
        if !needed.uploads.contains(&upload) && (any || !core.parts.store.names_upload(&upload).await?) {
            go.insert(upload);
        } else if stay.len() < retention.batch {
            stay.insert(upload);
        }
    }
    drop(objects);
    // Runs may have been accepted since.
    let needed = Needed::by_live_runs(core).await?;
    for upload in go.difference(&needed.uploads) {
        // First what makes it a tree.
        remove_below(core, upload, |rest| rest == MANIFEST_NAME).await?;
        remove_below(core, upload, |_| true).await?;
        *done += 1;
    }
    Ok(())
}

/// What live runs may still read or write.
#[derive(Debug, Default)]
struct Needed {
    uploads: BTreeSet<ArtifactKey>,
    runs: HashSet<RunId>,
}

impl Needed {
    async fn by_live_runs(core: &Core) -> Result<Self, StoreError> {
        Ok(Self::by(&core.parts.store.live().await?.runs))
    }

    fn by<'a>(runs: impl IntoIterator<Item = &'a RunRecord>) -> Self {
        let mut needed = Self::default();
        for run in runs {
            needed.uploads.append(&mut run.spec.uploads());
            for input in &run.spec.inputs {
                match &input.source {
                    InputSource::Artifact(uri) => needed.runs.extend(run_of(uri.key())),
                    InputSource::Run(output) => {
                        needed.runs.insert(output.run);
                    }
                    InputSource::Inline(_) | InputSource::Https(_) => {}
                }
            }
        }
        needed
    }

    /// Whether a live run names this one, or its driver still cleans up behind it.
    fn run(&self, core: &Core, id: RunId) -> bool {
        core.live.get(id).is_some() || self.runs.contains(&id)
    }
}

/// The run that a key belongs to.
fn run_of(key: &ArtifactKey) -> Option<RunId> {
    let mut names = key.as_str().split('/');
    match (names.next(), names.next(), names.next()) {
        (Some("runs"), Some(_), Some(run)) => run.parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> ArtifactKey {
        text.parse().unwrap()
    }

    #[test]
    fn an_upload_s_age_is_in_the_id_that_a_service_gave_it() {
        let given = key("uploads/t/01900000-0000-7000-8000-000000000000");
        assert_eq!(begun(&given), Some(Timestamp::from_micros(0x0190_0000_0000 * 1000)));
        for other in ["uploads/t/00000000-0000-0000-0000-000000000007", "uploads/t/results", "uploads/t"] {
            assert_eq!(begun(&key(other)), None, "{other}");
        }
    }

    #[test]
    fn a_key_says_whose_upload_or_run_it_is() {
        for (text, upload) in [
            ("uploads/t/x/files/a", Some("uploads/t/x")),
            ("uploads/t/x", Some("uploads/t/x")),
            ("uploads/t", None),
            ("uploads", None),
            ("runs/t/x/1", None),
        ] {
            assert_eq!(key(text).upload(), upload.map(key), "{text}");
        }
        let id = "01900000-0000-7000-8000-000000000000";
        assert_eq!(run_of(&key(&format!("runs/t/{id}/1/outputs/0"))), id.parse().ok());
        assert_eq!(run_of(&key(&format!("uploads/t/{id}"))), None);
    }
}
