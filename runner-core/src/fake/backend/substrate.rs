//! What the fake's workloads live on, and the faults that a test injects.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::workload::Workload;
use crate::{
    backend::{BackendErrorKind, WorkloadRef},
    id::AttemptId,
};

/// What goes wrong, and when. Each entry of a queue is one call: its kind, and whether it is retryable.
#[derive(Debug, Default)]
pub struct Faults {
    /// The next `ensure` calls fail before they do anything.
    pub ensure: VecDeque<(BackendErrorKind, bool)>,
    /// The next `ensure` calls that start a workload fail afterwards: it runs, and nobody was told.
    pub ensure_after_start: VecDeque<(BackendErrorKind, bool)>,
    /// Time that every `ensure` takes before it stages.
    pub ensure_delay: Option<Duration>,
    /// The next observations break, each once it has yielded this many log bytes.
    pub observe: VecDeque<u64>,
    /// The next `stop` calls fail before they do anything.
    pub stop: VecDeque<(BackendErrorKind, bool)>,
    /// Time that every `stop` takes before it asks.
    pub stop_delay: Option<Duration>,
    /// The next `remove` calls fail.
    pub remove: VecDeque<(BackendErrorKind, bool)>,
    /// The next `list` calls fail.
    pub list: VecDeque<(BackendErrorKind, bool)>,
    /// What `health` complains of.
    pub unhealthy: Option<String>,
}

#[derive(Debug, Default)]
struct Inner {
    workloads: BTreeMap<String, Entry>,
    /// How often a program was started, by workload, also of those that are gone.
    starts: BTreeMap<String, u32>,
    /// What is not ours.
    foreign: Vec<String>,
    faults: Faults,
}

#[derive(Debug)]
struct Entry {
    workload: Arc<Workload>,
    terminal: bool,
    stdin: bool,
}

/// What the fake's workloads live on. Outlives the backends over it; a clone is the same substrate.
#[derive(Debug, Clone, Default)]
pub struct FakeSubstrate(Arc<Mutex<Inner>>);

impl FakeSubstrate {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes, or reads, the faults.
    pub fn with_faults<R>(&self, change: impl FnOnce(&mut Faults) -> R) -> R {
        change(&mut self.lock().faults)
    }

    /// How often the attempt's program was started. More than once is a broken promise.
    pub fn starts(&self, attempt: AttemptId) -> u32 {
        self.lock()
            .starts
            .iter()
            .filter(|(native, _)| native.ends_with(&attempt.to_string()))
            .map(|(_, n)| n)
            .sum()
    }

    /// How many of the attempt's processes live.
    pub fn processes(&self, attempt: AttemptId) -> u32 {
        let of = |entry: &Entry| entry.workload.attempt == attempt;
        self.lock()
            .workloads
            .values()
            .filter(|entry| of(entry))
            .map(|entry| entry.workload.state().processes)
            .sum()
    }

    /// Takes a workload away, as a lost node does: program, log and record are gone at once.
    pub fn vanish(&self, attempt: AttemptId) {
        let gone: Vec<Entry> = {
            let mut inner = self.lock();
            let natives: Vec<String> = inner
                .workloads
                .iter()
                .filter(|(_, entry)| entry.workload.attempt == attempt)
                .map(|(native, _)| native.clone())
                .collect();
            natives.iter().filter_map(|native| inner.workloads.remove(native)).collect()
        };
        for entry in gone {
            entry.workload.update(|state| state.vanished = true);
            entry.workload.ask_to_stop(Duration::ZERO);
        }
    }

    /// Puts something there that is not the backend's.
    pub fn plant_foreign(&self, name: &str) {
        self.lock().foreign.push(name.to_owned());
    }

    /// What is there that is not the backend's.
    pub fn foreign(&self) -> Vec<String> {
        self.lock().foreign.clone()
    }

    /// The native names of everything that is the backend's.
    pub fn natives(&self) -> Vec<String> {
        self.lock().workloads.keys().cloned().collect()
    }

    pub(super) fn find(&self, reference: &WorkloadRef) -> Option<Arc<Workload>> {
        self.lock().workloads.get(&reference.native).map(|entry| Arc::clone(&entry.workload))
    }

    /// Whether it has a terminal, and standard input.
    pub(super) fn takes_input(&self, reference: &WorkloadRef) -> (bool, bool) {
        self.lock()
            .workloads
            .get(&reference.native)
            .map_or((false, false), |entry| (entry.terminal, entry.stdin))
    }

    pub(super) fn find_or_create(
        &self,
        reference: &WorkloadRef,
        terminal: bool,
        stdin: bool,
    ) -> Arc<Workload> {
        let mut inner = self.lock();
        let entry = inner.workloads.entry(reference.native.clone()).or_insert_with(|| Entry {
            workload: Arc::new(Workload::new(reference.attempt)),
            terminal,
            stdin,
        });
        Arc::clone(&entry.workload)
    }

    pub(super) fn count_start(&self, reference: &WorkloadRef) {
        *self.lock().starts.entry(reference.native.clone()).or_default() += 1;
    }

    pub(super) fn forget(&self, reference: &WorkloadRef) {
        self.lock().workloads.remove(&reference.native);
    }

    pub(super) fn owned(&self) -> Vec<WorkloadRef> {
        let owned = |(native, entry): (&String, &Entry)| WorkloadRef {
            attempt: entry.workload.attempt,
            native: native.clone(),
        };
        self.lock().workloads.iter().map(owned).collect()
    }
}
