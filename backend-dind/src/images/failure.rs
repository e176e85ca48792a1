//! Why an image cannot be had.

use bollard::errors::Error;
use runner_core::backend::{BackendError, BackendErrorKind};

use super::{login::LoginError, reference::BadReference};
use crate::{
    engine::{EngineError, EngineErrorKind},
    error,
};

/// Why an image is refused before anybody is asked for it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ImageRefusal {
    /// It cannot be a reference.
    #[error("{0}")]
    Malformed(BadReference),
    /// It is from elsewhere.
    #[error("is from a registry that is not allowed here; allowed: {0}")]
    NotAllowed(String),
    /// It names no digest.
    #[error("must be pinned: NAME@sha256:…")]
    NotPinned,
}

/// What kind of failure. The source of every [`BackendError`] of the kind `Image` is an [`ImageError`] with one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ImageErrorKind {
    /// Nobody has it.
    Missing,
    /// The registry does not give it to who asked. Some registries say this of what is missing, too.
    Unauthorised,
    /// It is there, for other machines.
    WrongPlatform,
    /// The registry does not answer, or has trouble of its own, or the transfer broke off.
    Network,
    /// The configuration of the backend forbids it.
    Policy,
    /// The credentials of the configuration cannot be read.
    Credentials,
}

impl ImageErrorKind {
    /// Whether asking again may end otherwise. Files of credentials may be in the middle of being replaced.
    pub const fn retryable(self) -> bool {
        match self {
            Self::Network | Self::Credentials => true,
            Self::Missing | Self::Unauthorised | Self::WrongPlatform | Self::Policy => false,
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "there is no such image",
            Self::Unauthorised => "the registry does not give it to this tenant's credentials",
            Self::WrongPlatform => "it is not for this engine's platform",
            Self::Network => "the registry could not be asked",
            Self::Policy => "the backend's configuration forbids it",
            Self::Credentials => "the credentials cannot be had",
        }
    }
}

/// Why an image cannot be had. Never says anything of credentials.
#[derive(Debug, thiserror::Error)]
#[error("{}: {detail}", kind.as_str())]
pub struct ImageError {
    /// What kind.
    pub kind: ImageErrorKind,
    /// What was seen.
    pub detail: String,
}

impl ImageError {
    pub(super) fn new(kind: ImageErrorKind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into() }
    }

    /// As a failure of a verb.
    pub(super) fn of(self, image: &str) -> BackendError {
        let retryable = self.kind.retryable();
        BackendError::with_source(
            BackendErrorKind::Image,
            retryable,
            format!("get the image {image:?}"),
            self,
        )
    }
}

impl From<ImageRefusal> for ImageError {
    fn from(refusal: ImageRefusal) -> Self {
        Self::new(ImageErrorKind::Policy, format!("the reference {refusal}"))
    }
}

impl From<LoginError> for ImageError {
    fn from(error: LoginError) -> Self {
        let below = std::error::Error::source(&error).map(|below| format!(": {below}")).unwrap_or_default();
        Self::new(ImageErrorKind::Credentials, format!("{error}{below}"))
    }
}

/// What a failed question to a registry, or a failed pull, means. `Err`: it is the engine that failed.
pub(super) fn judge(error: Error) -> Result<ImageError, EngineError> {
    match error {
        Error::DockerResponseServerError { status_code, message } => match status_code {
            401 | 403 => Ok(ImageError::new(ImageErrorKind::Unauthorised, message)),
            404 => Ok(ImageError::new(ImageErrorKind::Missing, message)),
            // Too many requests.
            429 => Ok(ImageError::new(ImageErrorKind::Network, message)),
            400..=499 => Ok(ImageError::new(ImageErrorKind::Policy, message)),
            500 if lacks_credentials(&message) => Ok(ImageError::new(ImageErrorKind::Unauthorised, message)),
            500 => Ok(ImageError::new(ImageErrorKind::Network, message)),
            _ => Err(EngineError::from(Error::DockerResponseServerError { status_code, message })),
        },
        // In the middle of a pull, the engine has only words; who may have the image was asked before.
        Error::DockerStreamError { error } => Ok(ImageError::new(ImageErrorKind::Network, error)),
        other => Err(EngineError::from(other)),
    }
}

/// Engines answer 500 with these words (`ErrNoBasicAuthCredentials` of docker/distribution) where a registry wants a
/// password and none was given. It is the one answer that has no status of its own, so its words are all there is.
fn lacks_credentials(message: &str) -> bool {
    message.ends_with("no basic auth credentials")
}

/// The engine failed, not the registry.
pub(super) fn engine(image: &str, source: impl Into<EngineError>) -> BackendError {
    error::engine(format!("get the image {image:?}"), source.into())
}

/// Whether an engine's answer says that it does not have what was named.
pub(super) fn is_missing(error: &EngineError) -> bool {
    error.kind == EngineErrorKind::NotFound
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_of_an_answer_decides_and_only_trouble_is_retried() {
        for (status_code, message, kind) in [
            (401, "unauthorized: authentication required", ImageErrorKind::Unauthorised),
            (403, "denied", ImageErrorKind::Unauthorised),
            (404, "manifest unknown", ImageErrorKind::Missing),
            (400, "invalid reference", ImageErrorKind::Policy),
            (429, "too many requests", ImageErrorKind::Network),
            (500, "dial tcp: connection refused", ImageErrorKind::Network),
            (500, "Head \"x\": no basic auth credentials", ImageErrorKind::Unauthorised),
        ] {
            let judged =
                judge(Error::DockerResponseServerError { status_code, message: message.into() }).unwrap();
            assert_eq!(judged.kind, kind, "{status_code} {message}");
            let error = judged.of("x");
            assert_eq!(error.kind, BackendErrorKind::Image);
            assert_eq!(error.retryable, kind == ImageErrorKind::Network, "{status_code} {message}");
        }
    }

    #[test]
    fn an_engine_that_fails_is_no_failure_of_the_image() {
        let down = Error::DockerResponseServerError { status_code: 503, message: "shutting down".into() };
        assert!(judge(down).unwrap_err().is_outage());
        assert!(judge(Error::RequestTimeoutError).unwrap_err().is_outage());
    }
}
