//! Failures, as kind and retriability.

use std::{io, path::Path};

use runner_agent::backend::InvalidConfig;
use runner_core::backend::{BackendError, BackendErrorKind};

/// Why a local backend cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The settings cannot be.
    #[error("local backend: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Config(Vec<InvalidConfig>),
    /// Its directory cannot be made or read.
    #[error("local backend: {what} {path}")]
    Directory {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The agent cannot be executed.
    #[error(
        "local backend: cannot execute the agent {path}; build it with `cargo build -p runner-agent`, put it beside the \
         service's program, or set `agent` in the backend's configuration"
    )]
    Agent {
        /// Where it was looked for.
        path: String,
        /// What was seen.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The machine does not let changes of files be watched.
    #[error("local backend: watch for changes of files")]
    Watch(#[source] io::Error),
}

impl OpenError {
    pub(crate) fn directory(what: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Directory { what, path: path.display().to_string(), source }
    }
}

/// The machine failed; it may do better later.
pub(crate) fn substrate(
    context: impl Into<String>,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> BackendError {
    BackendError::with_source(BackendErrorKind::Substrate, true, context, source)
}

/// A file operation of the backend's own failed.
pub(crate) fn file(what: &str, path: &Path, source: io::Error) -> BackendError {
    substrate(format!("{what} {}", path.display()), source)
}

/// The spec asks for what is not to be had here.
pub(crate) fn unsupported(context: impl Into<String>) -> BackendError {
    BackendError::new(BackendErrorKind::Unsupported, false, context)
}
