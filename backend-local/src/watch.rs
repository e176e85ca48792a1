//! Wakes whoever waits for an attempt's files to change. One inotify instance for all attempts; no poll per attempt.

use std::{
    collections::HashMap,
    io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use runner_core::{
    clock::Clock,
    task::{TaskKind, spawn},
};
use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    io::Errno,
};
use tokio::{io::unix::AsyncFd, sync::watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::shim::register;

/// What is told to those who wait: something changed. They look for themselves what.
pub(crate) type Signal = Arc<watch::Sender<()>>;

/// A log flood makes an event for every write. After this many wake-ups in close succession, the next one is put off.
const BUSY_AFTER: u32 = 8;
const BUSY_GAP: Duration = Duration::from_micros(500);
const BUSY_PAUSE: Duration = Duration::from_millis(2);

type Routes = Arc<Mutex<HashMap<i32, Signal>>>;

/// The one inotify instance.
#[derive(Debug)]
pub(crate) struct Watcher {
    inotify: Arc<AsyncFd<OwnedFd>>,
    routes: Routes,
    _stop: DropGuard,
}

/// While it lives, changes in its directories give the signal.
#[derive(Debug)]
pub(crate) struct Watched {
    inotify: Arc<AsyncFd<OwnedFd>>,
    routes: Routes,
    watches: Vec<i32>,
}

impl Watcher {
    /// Starts watching nothing. Needs a tokio runtime.
    pub(crate) fn new(clock: Arc<dyn Clock>) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let inotify = Arc::new(register(inotify)?);
        let routes = Routes::default();
        let stop = CancellationToken::new();
        let pump = pump(Arc::clone(&inotify), Arc::clone(&routes), clock);
        let stopped = stop.clone();
        drop(spawn(TaskKind::Loop, "local-watch", async move {
            tokio::select! {
                () = stopped.cancelled() => {}
                () = pump => {}
            }
        }));
        Ok(Self { inotify, routes, _stop: stop.drop_guard() })
    }

    /// Gives `signal` at every change in these directories. Watching one directory a second time replaces its signal, so
    /// there MUST be one [`Watched`] for a directory at a time.
    pub(crate) fn watch(&self, directories: &[&Path], signal: &Signal) -> io::Result<Watched> {
        let mut watched = Watched {
            inotify: Arc::clone(&self.inotify),
            routes: Arc::clone(&self.routes),
            watches: Vec::with_capacity(directories.len()),
        };
        // A file that appears by rename, a new spool file, and growth.
        let events = WatchFlags::MOVED_TO | WatchFlags::CREATE | WatchFlags::MODIFY | WatchFlags::ONLYDIR;
        for directory in directories {
            // Held over the call, so that an event of a new watch finds its route.
            let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
            let id = inotify::add_watch(self.inotify.get_ref(), *directory, events)?;
            routes.insert(id, Arc::clone(signal));
            watched.watches.push(id);
        }
        Ok(watched)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        for id in &self.watches {
            if routes.remove(id).is_some() {
                // Fails where the directory is gone, and its watch with it.
                let _ = inotify::remove_watch(self.inotify.get_ref(), *id);
            }
        }
    }
}

/// Reads events for ever.
async fn pump(inotify: Arc<AsyncFd<OwnedFd>>, routes: Routes, clock: Arc<dyn Clock>) {
    let mut busy = 0_u32;
    let mut last = clock.monotonic();
    loop {
        let mut ready = match inotify.readable().await {
            Ok(ready) => ready,
            // The runtime is going down.
            Err(_) => return,
        };
        let mut signals: Vec<Signal> = Vec::new();
        match drain(inotify.get_ref(), &routes, &mut signals) {
            Ok(()) | Err(Errno::WOULDBLOCK | Errno::INTR) => {}
            Err(error) => {
                // Observers still have their slow poll.
                tracing::error!(%error, "read the changes of files");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        ready.clear_ready();
        for signal in signals {
            signal.send_replace(());
        }
        let now = clock.monotonic();
        busy = if now.saturating_sub(last) < BUSY_GAP { busy + 1 } else { 0 };
        last = now;
        if busy > BUSY_AFTER {
            tokio::time::sleep(BUSY_PAUSE).await;
        }
    }
}

/// Reads what is there until there is no more (`WOULDBLOCK`).
fn drain(inotify: &OwnedFd, routes: &Routes, signals: &mut Vec<Signal>) -> Result<(), Errno> {
    let mut buffer = [MaybeUninit::<u8>::uninit(); 16 * 1024];
    let mut reader = inotify::Reader::new(inotify, &mut buffer);
    loop {
        let event = reader.next()?;
        let mut routes = routes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut add = |signal: &Signal| {
            if !signals.iter().any(|known| Arc::ptr_eq(known, signal)) {
                signals.push(Arc::clone(signal));
            }
        };
        if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
            // Nobody knows whose events were lost.
            routes.values().for_each(add);
        } else if event.events().contains(ReadFlags::IGNORED) {
            if let Some(signal) = routes.remove(&event.wd()) {
                add(&signal);
            }
        } else if let Some(signal) = routes.get(&event.wd()) {
            add(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use runner_core::clock::SystemClock;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn a_change_wakes_the_one_whose_directory_it_is() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let watcher = Watcher::new(Arc::new(SystemClock::new())).unwrap();
        let (signal_a, signal_b) = (Signal::default(), Signal::default());
        let (mut seen_a, mut seen_b) = (signal_a.subscribe(), signal_b.subscribe());
        let _a = watcher.watch(&[a.path()], &signal_a).unwrap();
        let _b = watcher.watch(&[b.path()], &signal_b).unwrap();
        fs::write(a.path().join("x.new"), "1").unwrap();
        tokio::time::timeout(DEADLINE, seen_a.changed()).await.unwrap().unwrap();
        assert!(!seen_b.has_changed().unwrap());
        fs::write(b.path().join("y"), "1").unwrap();
        tokio::time::timeout(DEADLINE, seen_b.changed()).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_removed_directory_leaves_no_route() {
        let dir = tempfile::tempdir().unwrap();
        let watcher = Watcher::new(Arc::new(SystemClock::new())).unwrap();
        let signal = Signal::default();
        let mut seen = signal.subscribe();
        let watched = watcher.watch(&[dir.path()], &signal).unwrap();
        drop(dir);
        tokio::time::timeout(DEADLINE, seen.changed()).await.unwrap().unwrap();
        assert!(watcher.routes.lock().unwrap().is_empty());
        drop(watched);
        let other = tempfile::tempdir().unwrap();
        drop(watcher.watch(&[other.path()], &signal).unwrap());
        assert!(watcher.routes.lock().unwrap().is_empty());
    }
}
