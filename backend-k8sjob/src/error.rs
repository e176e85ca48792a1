//! How the backend fails.

use kube::Error as KubeError;
use runner_agent::backend::InvalidConfig;
use runner_core::backend::{BackendError, BackendErrorKind};

/// Why the backend could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Settings that cannot be.
    #[error("settings that cannot be: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Config(Vec<InvalidConfig>),
    /// No way to the cluster was found.
    #[error("find the cluster and the credentials for it")]
    Credentials(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The client cannot be made.
    #[error("make a client of the cluster")]
    Client(#[source] Box<KubeError>),
}

/// What an API server said, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// 404.
    NotFound,
    /// 409.
    Conflict,
    /// 403 for a quota.
    Quota,
    /// Refused for good: by rights, by validation, by an admission controller.
    Refused,
    /// The server or the way to it failed; it may work another time.
    Failed,
}

/// Reads an error by its code. Only a quota's refusal has no code of its own: the API server says it in words, which
/// Kubernetes' own controllers look for, too.
pub(crate) fn answer(error: &KubeError) -> Answer {
    let KubeError::Api(status) = error else { return Answer::Failed };
    match status.code {
        404 => Answer::NotFound,
        409 => Answer::Conflict,
        403 if status.message.contains("exceeded quota") => Answer::Quota,
        400..=407 | 410..=428 => Answer::Refused,
        // 408, 429 and all of 5xx may pass.
        _ => Answer::Failed,
    }
}

/// A failed request.
pub(crate) fn api(context: impl Into<String>, error: KubeError) -> BackendError {
    let (kind, retryable) = match answer(&error) {
        Answer::NotFound => (BackendErrorKind::NotFound, false),
        Answer::Quota => (BackendErrorKind::Unschedulable, true),
        Answer::Refused => (BackendErrorKind::Substrate, false),
        Answer::Conflict | Answer::Failed => (BackendErrorKind::Substrate, true),
    };
    BackendError::with_source(kind, retryable, context, error)
}

/// What admission should have refused.
pub(crate) fn unsupported(context: impl Into<String>) -> BackendError {
    BackendError::new(BackendErrorKind::Unsupported, false, context)
}

/// A failure of the cluster that may pass.
pub(crate) fn substrate(context: impl Into<String>) -> BackendError {
    BackendError::new(BackendErrorKind::Substrate, true, context)
}
