//! Compares store and substrate, in both directions: adopts first, then destroys what no live run claims. Never touches
//! what lacks the ownership mark, since backends list nothing else.

use std::{collections::HashMap, sync::Arc, time::Duration};

use super::{BackendEntry, Core, ServiceError};
use crate::{
    backend::WorkloadRef,
    id::RunId,
    state::RunState,
    store::{StoreError, Timer},
};

/// Starts a driver for every live run that has none. A driver of a run with an attempt under way adopts its workload.
pub(super) async fn adopt(core: &Arc<Core>) -> Result<(), ServiceError> {
    let live = core.parts.store.live().await?;
    core.parts.meter.quarantined(live.quarantined.len());
    for row in &live.quarantined {
        tracing::error!(
            table = row.table,
            column = row.column,
            key = row.key,
            detail = row.detail,
            "a stored row does not decode; it is left as it is"
        );
    }
    let mut timers: HashMap<RunId, Vec<Timer>> = HashMap::new();
    for (run, timer) in live.timers {
        timers.entry(run).or_default().push(timer);
    }
    for record in live.runs {
        let timers = timers.remove(&record.id).unwrap_or_default();
        core.drive(record, &timers, false);
    }
    Ok(())
}

/// Reconciles until the service stops: orphans at once, then everything at each interval.
pub(super) async fn run(core: Arc<Core>) {
    loop {
        for entry in core.backends.values() {
            if core.stopping.is_cancelled() {
                return;
            }
            sweep(&core, entry).await;
        }
        let interval = core.parts.options.reconcile_interval;
        let jitter = Duration::from_millis(core.parts.ids.random() % 1000).min(interval / 4);
        if !core.pause(interval + jitter).await {
            return;
        }
        // A driver that panicked has left its run without one.
        if let Err(error) = adopt(&core).await {
            tracing::warn!(%error, "reading the live runs failed; the next round tries again");
        }
    }
}

/// Removes the workloads of one backend that no live run claims.
async fn sweep(core: &Arc<Core>, entry: &BackendEntry) {
    let backend = &entry.backend;
    // The list comes first: a workload that is made after it is not in it.
    let workloads = match backend.list().await {
        Ok(workloads) => workloads,
        Err(error) => {
            tracing::warn!(backend = %backend.name(), error = error.chain(), "listing workloads failed");
            return;
        }
    };
    for workload in workloads {
        if core.stopping.is_cancelled() {
            return;
        }
        match claimed(core, &workload).await {
            Ok(true) => {}
            Ok(false) => remove_orphan(core, entry, &workload).await,
            Err(error) => tracing::warn!(
                run.id = %workload.run(), %error,
                "whether a workload is claimed cannot be told; it is left as it is"
            ),
        }
    }
}

/// Whether a live run claims the workload. A driver claims the workloads of its run, those of earlier attempts too: it
/// removes them itself.
async fn claimed(core: &Core, workload: &WorkloadRef) -> Result<bool, StoreError> {
    if core.live.get(workload.run()).is_some() {
        return Ok(true);
    }
    let Some(record) = core.parts.store.get(workload.run()).await? else { return Ok(false) };
    Ok(match record.position.state {
        RunState::Succeeded | RunState::Failed | RunState::Cancelled => false,
        // Live, but without a driver here: its backend is not configured, or its driver panicked.
        RunState::Queued | RunState::Preparing | RunState::Running | RunState::Publishing => true,
    })
}

async fn remove_orphan(core: &Core, entry: &BackendEntry, workload: &WorkloadRef) {
    let backend = &entry.backend;
    let removed = match backend.stop(workload, Duration::ZERO).await {
        Ok(()) => backend.remove(workload).await,
        Err(error) => Err(error),
    };
    match removed {
        Ok(()) => {
            tracing::info!(
                run.id = %workload.run(), attempt = workload.attempt.number, backend = %backend.name(),
                "removed a workload that no live run claims"
            );
            core.parts.meter.orphan_removed(backend.name());
        }
        Err(error) => tracing::warn!(
            run.id = %workload.run(), attempt = workload.attempt.number, error = error.chain(),
            "removing an orphan failed; the next round tries again"
        ),
    }
}
