//! Failures, as kind and retriability.

use std::time::Duration;

use runner_agent::backend::InvalidConfig;
use runner_core::backend::{BackendError, BackendErrorKind};

use crate::engine::{EngineError, EngineErrorKind};

/// Why a Docker backend cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The settings cannot be.
    #[error("docker backend: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Config(Vec<InvalidConfig>),
    /// Its directory cannot be made or read.
    #[error("docker backend: {what} {path}")]
    Directory {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The agent cannot be used.
    #[error(
        "docker backend: the agent {path}: {why}; build it with `cargo xtask agent`, or set `agent` in the backend's configuration"
    )]
    Agent {
        /// Where it was looked for.
        path: String,
        /// What is wrong with it.
        why: String,
    },
}

/// How long an engine that answers with errors is asked again before they are told.
pub(crate) const FAILURE_PATIENCE: Duration = Duration::from_secs(30);

/// The engine, or this machine, failed; it may do better later.
pub(crate) fn substrate(
    context: impl Into<String>,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> BackendError {
    BackendError::with_source(BackendErrorKind::Substrate, true, context, source)
}

/// The engine's answer to a request of ours. What it refuses once it refuses again.
pub(crate) fn engine(context: impl Into<String>, source: EngineError) -> BackendError {
    let retryable = match source.kind {
        EngineErrorKind::Unreachable
        | EngineErrorKind::Failed
        | EngineErrorKind::Conflict
        | EngineErrorKind::NotFound => true,
        EngineErrorKind::Refused | EngineErrorKind::Malformed => false,
    };
    BackendError::with_source(BackendErrorKind::Substrate, retryable, context, source)
}

/// Whether the engine did not answer, or answered that it has trouble of its own: worth waiting for.
pub(crate) fn is_outage(error: &BackendError) -> bool {
    let source = error.source.as_ref().and_then(|source| source.downcast_ref::<EngineError>());
    source.is_some_and(EngineError::is_outage)
}

/// Whether the engine answered that it failed: it may get over it.
pub(crate) fn is_failure(error: &BackendError) -> bool {
    let source = error.source.as_ref().and_then(|source| source.downcast_ref::<EngineError>());
    source.is_some_and(|source| matches!(source.kind, EngineErrorKind::Failed | EngineErrorKind::Conflict))
}

/// The spec asks for what is not to be had here.
pub(crate) fn unsupported(context: impl Into<String>) -> BackendError {
    BackendError::new(BackendErrorKind::Unsupported, false, context)
}
