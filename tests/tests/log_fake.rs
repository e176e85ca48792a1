//! The log store in memory keeps the contract of logs.

use std::sync::Arc;

use futures::future::BoxFuture;
use runner_core::{fake::log::MemoryLogs, log::LogStore};
use runner_tests::log::Harness;

#[derive(Default)]
struct Memory(MemoryLogs);

impl Harness for Memory {
    fn logs(&self) -> Arc<dyn LogStore> {
        Arc::new(self.0.clone())
    }

    fn reopen(&mut self) -> BoxFuture<'_, ()> {
        self.0 = self.0.clone();
        Box::pin(std::future::ready(()))
    }
}

runner_tests::log_suite!(Memory::default());
