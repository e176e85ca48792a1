//! What the backend holds in memory of an attempt. Nothing here is needed after a restart: all of it is found again in the
//! attempt's directory.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use runner_agent::{
    backend::{Known, StagingSwitch},
    exec::{client, protocol::ShimRecord},
};
use runner_core::{backend::BackendError, id::AttemptId};

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
    pub(crate) staging: StagingSwitch,
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
            staging: StagingSwitch::default(),
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

/// The attempts that somebody holds something of, and where their directories lie.
#[derive(Debug)]
pub(crate) struct Workloads {
    base: PathBuf,
    known: Known<Workload>,
}

impl Workloads {
    pub(crate) fn new(base: PathBuf) -> Self {
        Self { base, known: Known::default() }
    }

    /// Where attempts' directories lie.
    pub(crate) fn base(&self) -> &Path {
        &self.base
    }

    /// The attempt's workload; made known if it is not.
    pub(crate) fn get(&self, attempt: AttemptId) -> Arc<Workload> {
        self.known.get(attempt, || Workload::new(&self.base, attempt))
    }

    /// Forgets an attempt that nobody but the caller holds. What is on the disk stays.
    pub(crate) fn forget(&self, workload: &Arc<Workload>) {
        self.known.forget(workload.attempt, workload);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
