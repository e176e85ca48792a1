//! Named tasks. Raw `tokio::spawn` is forbidden by `clippy.toml`, so that every task has a name in the logs and states
//! what happens when it fails.

use std::future::Future;

use futures::FutureExt as _;
use tracing::Instrument as _;

/// What a task of this kind is, and what its end means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskKind {
    /// Drives one run. On panic: the run stays where it is and the reconciler starts another; nothing else is touched.
    Run,
    /// A loop that lives as long as the service. On panic: it is logged as an error; the service reports not ready.
    Loop,
    /// Serves one call or one connection. On panic: that call fails.
    Call,
    /// Helps another task and is ended by it.
    Helper,
}

/// Starts a task. A panic is caught, logged once with the task's name, and ends only that task: its handle yields `None`.
#[allow(clippy::disallowed_methods, reason = "the one place that spawns")]
pub fn spawn<F>(kind: TaskKind, name: &'static str, future: F) -> tokio::task::JoinHandle<Option<F::Output>>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    let span = tracing::info_span!("task", task.name = name, task.kind = ?kind);
    let future = async move {
        match std::panic::AssertUnwindSafe(future).catch_unwind().await {
            Ok(output) => Some(output),
            Err(panic) => {
                let text = panic
                    .downcast_ref::<&str>()
                    .map(|text| (*text).to_owned())
                    .or_else(|| panic.downcast_ref::<String>().cloned())
                    .unwrap_or_else(|| "no message".to_owned());
                tracing::error!(task.name = name, task.kind = ?kind, panic = text, "a task panicked");
                None
            }
        }
    };
    tokio::spawn(future.instrument(span))
}
