//! What the backend holds in memory of an attempt. Nothing here is needed after a restart: all of it is found again in the
//! attempt's directory.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use runner_agent::exec::{client, protocol::ShimRecord};
use runner_core::{backend::BackendError, id::AttemptId};
use tokio_util::sync::CancellationToken;

use crate::{
    attempt_dir::AttemptDir,
    error,
    shim::Shim,
    watch::{Signal, Watched, Watcher},
};

/// One attempt.
#[derive(Debug)]
pub(crate) struct Workload {
    pub(crate) attempt: AttemptId,
    pub(crate) dir: AttemptDir,
    /// Held while an attempt is made or unmade. Never held while a program is waited for.
    pub(crate) verbs: Arc<tokio::sync::Mutex<()>>,
    /// Held by the one observer that publishes.
    pub(crate) publishing: tokio::sync::Mutex<()>,
    /// Held by the one caller whose input is being taken, so that inputs keep their order.
    pub(crate) input: tokio::sync::Mutex<()>,
    /// Given at every change of the directory and at the shim's death.
    pub(crate) signal: Signal,
    /// Ends the staging that is going on.
    staging: Mutex<Option<CancellationToken>>,
    shim: Mutex<Option<Shim>>,
    watched: Mutex<Weak<Watched>>,
}

/// What is known of an attempt's shim.
#[derive(Debug, Clone)]
pub(crate) enum ShimState {
    /// None was ever seen. It may be about to write its record, if a specification is there.
    None,
    /// It lives.
    Alive(Shim),
    /// It has ended, or is not the recorded process any more.
    Dead,
}

impl Workload {
    fn new(base: &Path, attempt: AttemptId) -> Self {
        Self {
            attempt,
            dir: AttemptDir::new(base, attempt),
            verbs: Arc::default(),
            publishing: tokio::sync::Mutex::default(),
            input: tokio::sync::Mutex::default(),
            signal: Signal::default(),
            staging: Mutex::default(),
            shim: Mutex::default(),
            watched: Mutex::default(),
        }
    }

    /// Takes charge of a shim that was just started.
    pub(crate) fn set_shim(&self, shim: Shim) {
        *lock(&self.shim) = Some(shim);
    }

    /// Finds the shim: the one that is known, else the recorded one, which is adopted. Reads files.
    pub(crate) fn shim(&self) -> Result<ShimState, BackendError> {
        let mut known = lock(&self.shim);
        if let Some(shim) = known.as_ref() {
            return Ok(if shim.death().is_some() { ShimState::Dead } else { ShimState::Alive(shim.clone()) });
        }
        let Some(record) = self.recorded_shim()? else { return Ok(ShimState::None) };
        let adopted = Shim::adopt(&record, Arc::clone(&self.signal))
            .map_err(|source| error::substrate(format!("look for the shim of {}", self.attempt), source))?;
        Ok(match adopted {
            Some(shim) => {
                tracing::debug!(attempt = %self.attempt, pid = record.pid, "adopted a shim");
                *known = Some(shim.clone());
                ShimState::Alive(shim)
            }
            None => ShimState::Dead,
        })
    }

    /// Who claimed to be the shim. `None`: nobody did. Reads a file.
    pub(crate) fn recorded_shim(&self) -> Result<Option<ShimRecord>, BackendError> {
        client::shim(self.dir.path())
            .map_err(|source| error::substrate(format!("read who the shim of {} is", self.attempt), source))
    }

    /// How the known shim died, for people. `None`: it lives, or nobody of this process was told.
    pub(crate) fn how_it_died(&self) -> Option<String> {
        lock(&self.shim).as_ref()?.death()?.describe()
    }

    /// Begins a staging that [`Self::abort_staging`] can end.
    pub(crate) fn begin_staging(&self) -> Staging<'_> {
        let token = CancellationToken::new();
        *lock(&self.staging) = Some(token.clone());
        Staging { workload: self, token }
    }

    /// Ends the staging that is going on, if there is one.
    pub(crate) fn abort_staging(&self) {
        if let Some(token) = lock(&self.staging).as_ref() {
            token.cancel();
        }
    }

    /// Makes changes of the directory give the signal, for as long as the answer lives.
    pub(crate) fn watch(&self, watcher: &Watcher) -> std::io::Result<Arc<Watched>> {
        let mut watched = lock(&self.watched);
        if let Some(watched) = watched.upgrade() {
            return Ok(watched);
        }
        let made = Arc::new(watcher.watch(&[self.dir.path(), &self.dir.log()], &self.signal)?);
        *watched = Arc::downgrade(&made);
        Ok(made)
    }
}

/// A staging that is going on.
#[derive(Debug)]
pub(crate) struct Staging<'a> {
    workload: &'a Workload,
    pub(crate) token: CancellationToken,
}

impl Drop for Staging<'_> {
    fn drop(&mut self) {
        *lock(&self.workload.staging) = None;
    }
}

/// The attempts that somebody holds something of.
#[derive(Debug)]
pub(crate) struct Workloads {
    base: PathBuf,
    known: Mutex<HashMap<AttemptId, Arc<Workload>>>,
}

impl Workloads {
    pub(crate) fn new(base: PathBuf) -> Self {
        Self { base, known: Mutex::default() }
    }

    /// Where attempts' directories lie.
    pub(crate) fn base(&self) -> &Path {
        &self.base
    }

    /// The attempt's workload; made known if it is not.
    pub(crate) fn get(&self, attempt: AttemptId) -> Arc<Workload> {
        Arc::clone(
            lock(&self.known).entry(attempt).or_insert_with(|| Arc::new(Workload::new(&self.base, attempt))),
        )
    }

    /// Forgets an attempt that nobody but the caller holds. What is on the disk stays.
    pub(crate) fn forget(&self, workload: &Arc<Workload>) {
        let mut known = lock(&self.known);
        // The map's and the caller's.
        if Arc::strong_count(workload) == 2 {
            known.remove(&workload.attempt);
        }
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        lock(&self.known).len()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use runner_core::id::RunId;

    use super::*;

    #[test]
    fn an_attempt_that_somebody_holds_is_not_forgotten() {
        let workloads = Workloads::new("/nowhere".into());
        let attempt = AttemptId { run: RunId::new(uuid::Uuid::from_u128(7)), number: 1 };
        let held = workloads.get(attempt);
        workloads.forget(&workloads.get(attempt));
        assert_eq!(workloads.len(), 1);
        workloads.forget(&held);
        assert_eq!(workloads.len(), 0);
    }

    #[test]
    fn only_a_staging_that_goes_on_is_aborted() {
        let workloads = Workloads::new("/nowhere".into());
        let workload = workloads.get(AttemptId { run: RunId::new(uuid::Uuid::from_u128(7)), number: 1 });
        workload.abort_staging();
        let staging = workload.begin_staging();
        assert!(!staging.token.is_cancelled());
        workload.abort_staging();
        assert!(staging.token.is_cancelled());
        drop(staging);
        assert!(!workload.begin_staging().token.is_cancelled());
    }
}
