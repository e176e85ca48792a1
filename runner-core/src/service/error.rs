//! What the service answers instead of what was asked for.

use std::time::Duration;

use crate::{
    id::RunId,
    log::LogError,
    spec::{FieldViolation, InvalidSpec},
    store::StoreError,
};

/// A refused or failed call. Each variant is one gRPC status with typed details; a caller never has to parse a message.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Bad fields, all of them.
    #[error("the request is not valid: {0}")]
    Invalid(#[from] InvalidSpec),
    /// No such run, or not the caller's.
    #[error("there is no run {0}")]
    NotFound(RunId),
    /// The id or the key names another run, with another spec.
    #[error("{field} names another run, with another spec")]
    AlreadyExists {
        /// `run_id` or `idempotency_key`.
        field: &'static str,
    },
    /// A limit is reached. Nothing was stored.
    #[error("the limit {limit} of {max} is reached")]
    Exhausted {
        /// Which limit.
        limit: &'static str,
        /// Its value.
        max: u64,
        /// When to try again.
        retry_after: Duration,
    },
    /// The caller may not do this. Nothing was stored.
    #[error("{message}")]
    Denied {
        /// What of the request it is about.
        field: &'static str,
        /// For people.
        message: String,
    },
    /// The run, or the service, is not in a state for this.
    #[error("{message}")]
    FailedPrecondition {
        /// A stable code.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// Not now; the same call may succeed later, here or elsewhere.
    #[error("the service is unavailable: {0}")]
    Unavailable(String),
    /// A defect, or stored data that does not decode.
    #[error("internal error: {0}")]
    Internal(String),
}

impl ServiceError {
    /// One bad field.
    pub fn field(field: &str, reason: &'static str, description: impl Into<String>) -> Self {
        Self::Invalid(InvalidSpec(vec![FieldViolation::new(field, reason, description)]))
    }
}

impl From<StoreError> for ServiceError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NotFound(id) => Self::NotFound(id),
            StoreError::Full(_) | StoreError::Unavailable(_) => Self::Unavailable(error.to_string()),
            StoreError::Inconsistent(_) | StoreError::Other(_) => Self::Internal(error.to_string()),
        }
    }
}

impl From<LogError> for ServiceError {
    fn from(error: LogError) -> Self {
        match &error {
            LogError::Store { source, .. } if source.kind.retryable() => Self::Unavailable(error.to_string()),
            LogError::Store { .. }
            | LogError::Gap { .. }
            | LogError::Sealed { .. }
            | LogError::Corrupt { .. } => Self::Internal(error.to_string()),
        }
    }
}
