//! What the backend holds in memory of an attempt. Nothing here is needed after a restart: all of it is found again on the
//! engine.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU64},
};

use runner_agent::backend::{Known, PublishRecord, StagingSwitch};
use runner_core::id::AttemptId;
use tokio::sync::watch;

use crate::{live::Live, names::Names};

/// One attempt.
#[derive(Debug)]
pub(crate) struct Workload {
    pub(crate) attempt: AttemptId,
    /// Names of its containers.
    pub(crate) name: String,
    pub(crate) door: String,
    /// Held while an attempt is made or unmade. Never held while a program is waited for.
    pub(crate) verbs: Arc<tokio::sync::Mutex<()>>,
    /// Held by the one observer that publishes; what came of it.
    pub(crate) publishing: tokio::sync::Mutex<Option<PublishRecord>>,
    /// Held by the one caller whose input is being taken, so that inputs keep their order.
    pub(crate) input: tokio::sync::Mutex<()>,
    /// Given when somebody made, stopped or removed it.
    pub(crate) signal: watch::Sender<()>,
    /// Stopped by us before it was started: it never will be.
    pub(crate) stopped: AtomicBool,
    /// Log bytes that the shim was told to forget.
    pub(crate) released: AtomicU64,
    /// What the inputs came to.
    pub(crate) input_bytes: AtomicU64,
    /// Listens since before the start, for the first observer.
    early: Mutex<Option<Live>>,
    pub(crate) staging: StagingSwitch,
}

impl Workload {
    fn new(names: &Names, attempt: AttemptId) -> Self {
        Self {
            attempt,
            name: names.workload(attempt),
            door: names.door(attempt),
            verbs: Arc::default(),
            publishing: tokio::sync::Mutex::default(),
            input: tokio::sync::Mutex::default(),
            signal: watch::Sender::default(),
            stopped: AtomicBool::default(),
            released: AtomicU64::default(),
            input_bytes: AtomicU64::default(),
            early: Mutex::default(),
            staging: StagingSwitch::default(),
        }
    }

    /// Keeps what listens since before the start.
    pub(crate) fn set_early(&self, live: Option<Live>) {
        *lock(&self.early) = live;
    }

    /// Takes what listens since before the start. The first one gets it.
    pub(crate) fn take_early(&self) -> Option<Live> {
        lock(&self.early).take()
    }
}

/// The attempts that somebody holds something of.
#[derive(Debug)]
pub(crate) struct Workloads {
    names: Names,
    known: Known<Workload>,
}

impl Workloads {
    pub(crate) fn new(names: Names) -> Self {
        Self { names, known: Known::default() }
    }

    /// The attempt's workload; made known if it is not.
    pub(crate) fn get(&self, attempt: AttemptId) -> Arc<Workload> {
        self.known.get(attempt, || Workload::new(&self.names, attempt))
    }

    /// Forgets an attempt that nobody but the caller holds. What is on the engine stays.
    pub(crate) fn forget(&self, workload: &Arc<Workload>) {
        self.known.forget(workload.attempt, workload);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
