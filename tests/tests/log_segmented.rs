//! Logs over an object store keep the contract of logs: with sizes as in service, and with sizes so small that a few
//! hundred bytes pass every limit.

use std::{sync::Arc, time::Duration};

use futures::future::BoxFuture;
use runner_artifacts::{
    directory::DirectoryArtifacts,
    log::{Options, SegmentedLogs},
};
use runner_core::{artifact::ArtifactStore, clock::SystemClock, log::LogStore};
use runner_tests::log::{Harness, process::Process, store::FaultyStore};

struct Segmented {
    store: Arc<dyn ArtifactStore>,
    /// Removed after the store.
    _directory: Option<tempfile::TempDir>,
    options: Options,
    /// What the logs of now reach the store through.
    process: Arc<Process>,
    logs: Arc<dyn LogStore>,
}

impl Segmented {
    fn new(store: Arc<dyn ArtifactStore>, options: Options) -> Self {
        let (process, logs) = Self::make(&store, &options);
        Self { store, _directory: None, options, process, logs }
    }

    fn in_a_directory(options: Options) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let store = DirectoryArtifacts::open(directory.path()).expect("a directory store");
        Self { _directory: Some(directory), ..Self::new(Arc::new(store), options) }
    }

    fn make(store: &Arc<dyn ArtifactStore>, options: &Options) -> (Arc<Process>, Arc<dyn LogStore>) {
        let process = Process::over(store.clone());
        let logs = SegmentedLogs::new(process.clone(), Arc::new(SystemClock::new()), options.clone());
        (process, Arc::new(logs))
    }
}

impl Harness for Segmented {
    fn logs(&self) -> Arc<dyn LogStore> {
        self.logs.clone()
    }

    fn reopen(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            // Tasks of the logs live on in this process. They end as those of a killed one do: between two changes.
            self.process.die().await;
            (self.process, self.logs) = Self::make(&self.store, &self.options);
        })
    }
}

/// Everything is stored, merged, trimmed and thinned out all the time.
fn tiny() -> Options {
    Options {
        segment_bytes: 2000,
        flush_after: Duration::from_millis(3),
        window_bytes: 1500,
        memory_bytes: 40_000,
        batch_bytes: 900,
        concurrent_stores: 2,
        index_stride: 500,
        ..Options::default()
    }
}

mod as_in_service {
    use super::*;
    runner_tests::log_suite!(Segmented::new(FaultyStore::new(), Options::default()));
}

mod with_tiny_limits {
    use super::*;
    runner_tests::log_suite!(Segmented::new(FaultyStore::new(), tiny()));
}

mod in_a_directory {
    use super::*;
    runner_tests::log_suite!(Segmented::in_a_directory(Options::default()));
}

mod in_a_directory_with_tiny_limits {
    use super::*;
    runner_tests::log_suite!(Segmented::in_a_directory(tiny()));
}
