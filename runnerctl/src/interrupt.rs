//! Ctrl-C, and the polite request to end.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::Failure;

/// Waits for SIGINT and SIGTERM. From its creation on they do not end the process by themselves.
#[derive(Debug)]
pub(crate) struct Interrupts {
    int: Signal,
    term: Signal,
}

impl Interrupts {
    pub(crate) fn catch() -> Result<Self, Failure> {
        let catch = |kind| signal(kind).map_err(|e| Failure::local("catch signals", &e));
        Ok(Self { int: catch(SignalKind::interrupt())?, term: catch(SignalKind::terminate())? })
    }

    /// Returns when one comes. Cancel-safe.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.int.recv() => {}
            _ = self.term.recv() => {}
        }
    }
}
