//! The end of an attempt's workload: asked for, forced, proven; then the removal of what it left.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use runner_agent::exec::protocol::{ControlReply, ControlRequest};
use runner_core::backend::{BackendError, BackendErrorKind, WorkloadRef};
use serde::de::DeserializeOwned;

use crate::{
    archive::{Owner, Part, pack_small, read_file},
    backend::Shared,
    engine::EngineErrorKind,
    ensure::was_started,
    error,
    live::{self, RequestError},
    names::{OWN_DIR, RUN_DIR, STOPPED},
    workload::Workload,
};

/// Beyond the grace: how long a shim may take to end its tree and write down how it ended.
const BOUND: Duration = Duration::from_secs(5);
/// How long a shim may take to answer that it begins.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);
/// A shim that was just started may not listen yet.
const REQUEST_TRIES: u32 = 50;
const RETRY: Duration = Duration::from_millis(100);
/// From SIGKILL until the engine says that nothing is alive.
const KILL_DEADLINE: Duration = Duration::from_secs(30);
/// How often a removal that meets another one looks again.
const REMOVE_TRIES: u32 = 100;
/// Larger is no record.
const MAX_RECORD_BYTES: u64 = 256 * 1024;

impl Shared {
    /// Ends the workload, and returns when it is proven dead.
    pub(crate) async fn stop(
        self: &Arc<Self>,
        workload: &WorkloadRef,
        grace: Duration,
    ) -> Result<(), BackendError> {
        let workload = self.workloads.get(workload.attempt);
        workload.staging.abort();
        let result = self.stop_known(&workload, grace).await;
        workload.signal.send_replace(());
        self.workloads.forget(&workload);
        result
    }

    async fn stop_known(&self, workload: &Arc<Workload>, grace: Duration) -> Result<(), BackendError> {
        {
            let _verbs = Arc::clone(&workload.verbs).lock_owned().await;
            let Some(container) = self.look(workload, &workload.name).await? else {
                // A door says that it was in the making.
                if self.look(workload, &workload.door).await?.is_some() {
                    self.mark_stopped(workload, &workload.door).await?;
                }
                return Ok(());
            };
            let state = container.state.unwrap_or_default();
            if !was_started(&state) {
                return self.mark_stopped(workload, &workload.name).await;
            }
            if state.running != Some(true) {
                return Ok(());
            }
            // Not held while the program takes its time: a second call may shorten the grace.
        }
        self.end(workload, grace).await
    }

    /// Removes everything that the attempt left. One that is alive is stopped first.
    pub(crate) async fn remove(self: &Arc<Self>, workload: &WorkloadRef) -> Result<(), BackendError> {
        let workload = self.workloads.get(workload.attempt);
        workload.staging.abort();
        let result = {
            let _verbs = Arc::clone(&workload.verbs).lock_owned().await;
            workload.set_early(None);
            self.remove_known(&workload).await
        };
        workload.signal.send_replace(());
        self.workloads.forget(&workload);
        result
    }

    async fn remove_known(&self, workload: &Arc<Workload>) -> Result<(), BackendError> {
        if let Some(container) = self.look(workload, &workload.name).await? {
            if container.state.unwrap_or_default().running == Some(true) {
                self.end(workload, Duration::ZERO).await?;
            }
            self.remove_container(&workload.name).await?;
        }
        if self.look(workload, &workload.door).await?.is_some() {
            self.remove_container(&workload.door).await?;
        }
        let volumes = self
            .engine
            .volumes(&self.names.filter_of(workload.attempt))
            .await
            .map_err(|source| error::engine("list the volumes of an attempt", source))?;
        for volume in volumes {
            self.remove_volume(&volume.name).await?;
        }
        Ok(())
    }

    async fn remove_container(&self, name: &str) -> Result<(), BackendError> {
        let fail = |source| error::engine(format!("remove the container {name}"), source);
        for _ in 0..REMOVE_TRIES {
            match self.engine.remove(name, true).await {
                Ok(()) => return Ok(()),
                // Somebody else is at it; it is gone when there is nothing to remove.
                Err(error) if error.kind == EngineErrorKind::Conflict => {}
                Err(source) => return Err(fail(source)),
            }
            tokio::time::sleep(RETRY).await;
        }
        self.engine.remove(name, true).await.map_err(fail)
    }

    async fn remove_volume(&self, name: &str) -> Result<(), BackendError> {
        let fail = |source| error::engine(format!("remove the volume {name}"), source);
        for _ in 0..REMOVE_TRIES {
            match self.engine.remove_volume(name).await {
                Ok(()) => return Ok(()),
                // The container that had it is on its way out.
                Err(error) if error.kind == EngineErrorKind::Conflict => {}
                Err(source) => return Err(fail(source)),
            }
            tokio::time::sleep(RETRY).await;
        }
        self.engine.remove_volume(name).await.map_err(fail)
    }

    /// Ends a container that runs.
    async fn end(&self, workload: &Workload, grace: Duration) -> Result<(), BackendError> {
        let asked = self.ask(workload, grace).await?;
        let patience = if asked { grace.saturating_add(BOUND) } else { Duration::ZERO };
        if self.wait_dead(workload, patience).await? {
            return Ok(());
        }
        tracing::warn!(attempt = %workload.attempt, asked, "a shim does not end its program; its container is killed");
        // The mark comes first, so that the end is known for what it is.
        self.mark_stopped(workload, &workload.name).await?;
        self.engine
            .kill(&workload.name, "SIGKILL")
            .await
            .map_err(|source| error::engine(format!("kill the container {}", workload.name), source))?;
        if self.wait_dead(workload, KILL_DEADLINE).await? {
            return Ok(());
        }
        let context = format!("kill the container {}: it is alive {KILL_DEADLINE:?} later", workload.name);
        Err(BackendError::new(BackendErrorKind::Substrate, true, context))
    }

    /// Asks the shim to end its program. `false`: it does not take the request. Dead meanwhile counts as asked.
    async fn ask(&self, workload: &Workload, grace: Duration) -> Result<bool, BackendError> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        for _ in 0..REQUEST_TRIES {
            let request = ControlRequest::Stop { grace_ms };
            match live::request(&self.engine, &workload.name, request, REQUEST_DEADLINE).await {
                Ok(ControlReply::Ok) => return Ok(true),
                Ok(ControlReply::Refused(why)) => {
                    tracing::warn!(attempt = %workload.attempt, why, "a shim refused to stop its program");
                    return Ok(false);
                }
                // Gone, or going: the engine knows.
                Err(RequestError::Gone) => {}
                Err(RequestError::Engine(error))
                    if matches!(
                        error.kind,
                        EngineErrorKind::NotFound | EngineErrorKind::Conflict | EngineErrorKind::Refused
                    ) => {}
                Err(RequestError::Engine(source)) => {
                    return Err(error::engine(format!("ask {} to stop", workload.name), source));
                }
                Err(error @ RequestError::Deadline(_)) => {
                    tracing::warn!(attempt = %workload.attempt, %error, "ask a shim to stop its program");
                    return Ok(false);
                }
            }
            if self.is_dead(workload).await? {
                return Ok(true);
            }
            tokio::time::sleep(RETRY).await;
        }
        Ok(false)
    }

    /// Whether the engine says that nothing of the workload is alive: its first process has ended, and the kernel ends all
    /// others of its namespace before that is seen.
    async fn is_dead(&self, workload: &Workload) -> Result<bool, BackendError> {
        let seen = self.look(workload, &workload.name).await?;
        Ok(seen.is_none_or(|container| container.state.unwrap_or_default().running != Some(true)))
    }

    /// Waits for its death. `false`: it did not come within `patience`.
    pub(crate) async fn wait_dead(
        &self,
        workload: &Workload,
        patience: Duration,
    ) -> Result<bool, BackendError> {
        let end = self.clock.monotonic().saturating_add(patience);
        loop {
            if self.is_dead(workload).await? {
                return Ok(true);
            }
            let left = end.saturating_sub(self.clock.monotonic());
            if left.is_zero() {
                return Ok(false);
            }
            // Whatever it answers, the next look decides. An answer that comes too early is not asked for at once again.
            let waited = tokio::time::timeout(left, self.engine.wait(&workload.name)).await;
            if matches!(waited, Ok(Err(_))) {
                tokio::time::sleep(RETRY.min(left)).await;
            }
        }
    }

    /// Marks the attempt as stopped by us: it never gets a shim, or its shim did not end it.
    pub(crate) async fn mark_stopped(
        &self,
        workload: &Workload,
        container: &str,
    ) -> Result<(), BackendError> {
        let time = self.clock.now().as_micros().to_string();
        let part = |at: &str| Part::Bytes {
            path: format!("{at}/{STOPPED}"),
            owner: Owner::ROOT,
            mode: 0o644,
            bytes: Bytes::from(time.clone()),
        };
        // A door may not have the directory yet.
        let below = RUN_DIR.rsplit('/').next().unwrap_or_default();
        let tar = pack_small(vec![part(below)]).map_err(|source| error::substrate("pack a mark", source))?;
        self.engine
            .put_bytes(container, OWN_DIR, tar)
            .await
            .map_err(|source| error::engine(format!("mark {container} as stopped"), source))?;
        workload.stopped.store(true, Ordering::Release);
        Ok(())
    }

    /// Reads a file of the shim's directory. `None`: it is not there, or the container is not.
    pub(crate) async fn read_record(
        &self,
        container: &str,
        name: &str,
    ) -> Result<Option<Bytes>, BackendError> {
        let path = format!("{RUN_DIR}/{name}");
        read_file(self.engine.get(container, &path), MAX_RECORD_BYTES)
            .await
            .map_err(|source| error::engine(format!("read {path} of {container}"), source))
    }

    /// Reads a record of the shim's directory. One that is malformed will not get better: it is logged, and not there.
    pub(crate) async fn read_json<T: DeserializeOwned>(
        &self,
        container: &str,
        name: &str,
    ) -> Result<Option<T>, BackendError> {
        let Some(bytes) = self.read_record(container, name).await? else { return Ok(None) };
        match serde_json::from_slice(&bytes) {
            Ok(record) => Ok(Some(record)),
            Err(error) => {
                tracing::warn!(container, name, %error, "a record is malformed");
                Ok(None)
            }
        }
    }
}
