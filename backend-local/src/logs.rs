//! The log of an attempt: frames from the shim's spool, and what of it may be forgotten.

use std::path::Path;

use runner_agent::exec::{
    client::{SpoolError, SpoolReader},
    protocol::SPOOL_FILE_BYTES,
};
use runner_core::{
    backend::{BackendError, BackendErrorKind},
    id::AttemptId,
    log::codec::HEADER,
};

/// No spool file is full before this many log bytes: a frame has at least one byte beside its header.
const LEAST_FULL: u64 = SPOOL_FILE_BYTES / (HEADER as u64 + 1);

/// Deletes the spool's files whose every frame is before `offset`. Nothing there: fine. Blocking.
pub(crate) fn release(dir: &Path, attempt: AttemptId, offset: u64) -> Result<(), BackendError> {
    SpoolReader::open(dir, offset)
        .release(offset)
        .map(drop)
        .map_err(|source| spool_failed(attempt, "release the log", source))
}

/// Whether a release of `offset` can free anything. Most runs write less than a file.
pub(crate) fn worth_releasing(offset: u64) -> bool {
    offset >= LEAST_FULL
}

/// Why the spool cannot be read, as a backend's error.
pub(crate) fn spool_failed(attempt: AttemptId, what: &str, source: SpoolError) -> BackendError {
    let retryable = match &source {
        SpoolError::Io { .. } => true,
        SpoolError::Corrupt { .. } | SpoolError::Gap { .. } => false,
    };
    BackendError::with_source(BackendErrorKind::Substrate, retryable, format!("{what} of {attempt}"), source)
}
