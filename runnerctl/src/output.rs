//! Standard output for data, standard error for everything else.

use std::io::{self, Write as _};

use serde_json::Value;
use tokio::io::AsyncWriteExt as _;

use crate::failure::Failure;

/// Writes text for a person to standard error. Where nobody reads it, there is nobody to tell.
pub(crate) fn note(text: &str) {
    let mut stderr = io::stderr().lock();
    let _ = writeln!(stderr, "runnerctl: {text}");
}

/// Writes data to standard output, whole.
pub(crate) fn data(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|e| Failure::stdout(&e))
}

/// Writes one document, for a program as for a person.
pub(crate) fn document(value: &Value) -> Result<(), Failure> {
    data(&format!("{value:#}\n"))
}

/// Where a run's bytes go. A reader that is slow holds only what is behind it: Ctrl-C and keep-alives go on.
#[derive(Debug)]
pub(crate) struct Streams {
    stdout: tokio::io::Stdout,
    stderr: tokio::io::Stderr,
}

impl Streams {
    pub(crate) fn new() -> Self {
        Self { stdout: tokio::io::stdout(), stderr: tokio::io::stderr() }
    }

    pub(crate) async fn stdout(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let written = async {
            self.stdout.write_all(bytes).await?;
            self.stdout.flush().await
        };
        written.await.map_err(|e| Failure::stdout(&e))
    }

    pub(crate) async fn stderr(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let written = async {
            self.stderr.write_all(bytes).await?;
            self.stderr.flush().await
        };
        // As for standard output: without a reader there is nothing left to do.
        written.await.map_err(|e| Failure::stdout(&e))
    }

    /// Writes one document as a line.
    pub(crate) async fn line(&mut self, value: &Value) -> Result<(), Failure> {
        self.stdout(format!("{value}\n").as_bytes()).await
    }
}
