//! What the process knows of its live runs: enough to wake whoever waits. Nothing here is needed after a restart.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use crate::{
    backend::{Progress, ProgressSink},
    id::{BackendName, RunId},
    store::StoredEvent,
};

/// Most events of one run that are kept for watchers; older ones are read from the store.
const CACHED_EVENTS: usize = 64;

/// What is kept for one live run, and for as long as somebody watches it.
#[derive(Debug)]
pub(super) struct LiveRun {
    backend: BackendName,
    /// The newest events, consecutive. Saves each watcher a read of the store.
    cache: Mutex<VecDeque<StoredEvent>>,
    /// Number of the newest event.
    last_event: watch::Sender<u64>,
    /// The newest progress. Not durable, so it is no event.
    progress: watch::Sender<Option<Progress>>,
    /// Whether an intent to cancel is stored. It never becomes false again.
    cancelled: watch::Sender<bool>,
}

/// A poisoned lock here guards data that every writer leaves consistent between statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LiveRun {
    pub(super) fn new(backend: BackendName, last_event: u64) -> Self {
        Self {
            backend,
            cache: Mutex::default(),
            last_event: watch::Sender::new(last_event),
            progress: watch::Sender::new(None),
            cancelled: watch::Sender::new(false),
        }
    }

    /// Tells watchers of events that are stored now.
    pub(super) fn publish(&self, events: impl IntoIterator<Item = StoredEvent>) {
        let mut newest = None;
        {
            let mut cache = lock(&self.cache);
            for event in events {
                match cache.back().map(|last| last.seq) {
                    Some(last) if event.seq <= last => continue,
                    // What lies between is in the store; the cache has no holes.
                    Some(last) if event.seq != last + 1 => cache.clear(),
                    _ => {}
                }
                newest = Some(event.seq);
                cache.push_back(event);
                if cache.len() > CACHED_EVENTS {
                    cache.pop_front();
                }
            }
        }
        if let Some(newest) = newest {
            self.last_event.send_if_modified(|last| {
                let changed = newest > *last;
                *last = newest.max(*last);
                changed
            });
        }
    }

    /// The events after number `after`; `None` where the store has to be asked.
    pub(super) fn cached_after(&self, after: u64) -> Option<Vec<StoredEvent>> {
        let cache = lock(&self.cache);
        let newest = *self.last_event.borrow();
        if newest <= after {
            return Some(Vec::new());
        }
        let complete = cache.front().is_some_and(|first| first.seq <= after + 1)
            && cache.back().is_some_and(|last| last.seq == newest);
        complete.then(|| cache.iter().filter(|event| event.seq > after).cloned().collect())
    }

    pub(super) fn watch_events(&self) -> watch::Receiver<u64> {
        self.last_event.subscribe()
    }

    pub(super) fn watch_progress(&self) -> watch::Receiver<Option<Progress>> {
        self.progress.subscribe()
    }

    pub(super) fn watch_cancel(&self) -> watch::Receiver<bool> {
        self.cancelled.subscribe()
    }

    /// Tells the driver that an intent to cancel is stored.
    pub(super) fn cancel_stored(&self) {
        self.cancelled.send_replace(true);
    }
}

impl ProgressSink for LiveRun {
    fn progress(&self, progress: Progress) {
        self.progress.send_replace(Some(progress));
    }
}

/// The live runs of this process.
#[derive(Debug, Default)]
pub(super) struct LiveRuns {
    runs: Mutex<HashMap<RunId, Arc<LiveRun>>>,
}

impl LiveRuns {
    pub(super) fn get(&self, id: RunId) -> Option<Arc<LiveRun>> {
        lock(&self.runs).get(&id).cloned()
    }

    /// Adds a run. `None` where it is there already, that is, where it has a driver.
    pub(super) fn add(&self, id: RunId, backend: &BackendName, last_event: u64) -> Option<Arc<LiveRun>> {
        match lock(&self.runs).entry(id) {
            std::collections::hash_map::Entry::Occupied(_) => None,
            std::collections::hash_map::Entry::Vacant(entry) => {
                Some(Arc::clone(entry.insert(Arc::new(LiveRun::new(backend.clone(), last_event)))))
            }
        }
    }

    pub(super) fn remove(&self, id: RunId) {
        lock(&self.runs).remove(&id);
    }

    /// Number of those of one backend.
    pub(super) fn of(&self, backend: &BackendName) -> usize {
        lock(&self.runs).values().filter(|run| run.backend == *backend).count()
    }

    /// Number of those that are shadows.
    pub(super) fn shadows(&self) -> usize {
        lock(&self.runs).keys().filter(|id| id.is_shadow()).count()
    }

    pub(super) fn len(&self) -> usize {
        lock(&self.runs).len()
    }
}
