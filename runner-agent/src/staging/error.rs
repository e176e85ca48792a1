//! How staging fails.

use std::{fmt, io};

use runner_core::{
    artifact::{ArtifactError, ArtifactErrorKind},
    backend::{BackendError, BackendErrorKind, Direction},
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// What kind of failure staging met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StagingErrorKind {
    /// The object, or the tree's manifest, is not there.
    NotFound,
    /// A digest or a size is not what was promised.
    Mismatch,
    /// A cap on bytes, entries or depth was passed.
    LimitExceeded,
    /// A manifest is malformed, or names what its tenant does not own.
    Malformed,
    /// Two entries claim one place, or one lies below a file.
    Conflict,
    /// A required output is absent.
    Absent,
    /// An output is neither a regular file nor a directory.
    NotAFile,
    /// An output's file or directory cannot be read: its permissions forbid it.
    Unreadable,
    /// The spec asks for something that this version cannot do.
    Unsupported,
    /// The store refused for lack of permission.
    Denied,
    /// The store failed in a way that may pass.
    Unavailable,
    /// The store failed in a way that will not pass.
    Store,
    /// This machine failed: its disk is full, or a system call failed.
    Local,
}

impl StagingErrorKind {
    /// Whether staging again may succeed.
    pub const fn retryable(self) -> bool {
        match self {
            Self::Unavailable | Self::Local => true,
            Self::NotFound
            | Self::Mismatch
            | Self::LimitExceeded
            | Self::Malformed
            | Self::Conflict
            | Self::Absent
            | Self::NotAFile
            | Self::Unreadable
            | Self::Unsupported
            | Self::Denied
            | Self::Store => false,
        }
    }
}

/// A failed staging. Names the field of the spec that it is about.
#[derive(Debug)]
pub struct StagingError {
    /// What kind.
    pub kind: StagingErrorKind,
    /// Which way the bytes moved.
    pub direction: Direction,
    /// The field, for example `spec.inputs[2]`. Empty where it is about no one field.
    pub field: String,
    /// What was being done, and what was seen.
    pub context: String,
    /// What lies below.
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl fmt::Display for StagingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.field.is_empty() {
            f.write_str(&self.context)
        } else {
            write!(f, "{}: {}", self.field, self.context)
        }
    }
}

impl std::error::Error for StagingError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<StagingError> for BackendError {
    /// A failure of this machine is the substrate's; every other one is about the input or the output.
    fn from(error: StagingError) -> Self {
        let kind = match (error.kind, error.direction) {
            (StagingErrorKind::Local, _) => BackendErrorKind::Substrate,
            (_, Direction::Input) => BackendErrorKind::Input,
            (_, Direction::Output) => BackendErrorKind::Output,
            (_, Direction::Image) => BackendErrorKind::Image,
        };
        Self { kind, retryable: error.kind.retryable(), context: error.to_string(), source: error.source }
    }
}

/// What an error is about: the direction and the field.
#[derive(Debug, Clone)]
pub(super) struct About {
    pub(super) direction: Direction,
    pub(super) field: String,
}

impl About {
    pub(super) fn input(index: usize) -> Self {
        Self { direction: Direction::Input, field: format!("spec.inputs[{index}]") }
    }

    pub(super) fn output(index: usize) -> Self {
        Self { direction: Direction::Output, field: format!("spec.outputs[{index}]") }
    }

    pub(super) fn all(direction: Direction) -> Self {
        Self { direction, field: String::new() }
    }

    pub(super) fn error(&self, kind: StagingErrorKind, context: impl Into<String>) -> StagingError {
        StagingError {
            kind,
            direction: self.direction,
            field: self.field.clone(),
            context: context.into(),
            source: None,
        }
    }

    /// A failure of this machine's files.
    pub(super) fn local(&self, context: impl Into<String>, source: io::Error) -> StagingError {
        let kind = match source.kind() {
            io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory | io::ErrorKind::AlreadyExists => {
                StagingErrorKind::Conflict
            }
            // A link where there should be a directory.
            _ if source.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => StagingErrorKind::Conflict,
            _ => StagingErrorKind::Local,
        };
        StagingError { source: Some(source.into()), ..self.error(kind, context) }
    }

    /// A failure of the store.
    pub(super) fn store(&self, context: impl Into<String>, source: ArtifactError) -> StagingError {
        let kind = match source.kind {
            ArtifactErrorKind::NotFound => StagingErrorKind::NotFound,
            ArtifactErrorKind::Mismatch => StagingErrorKind::Mismatch,
            ArtifactErrorKind::LimitExceeded => StagingErrorKind::LimitExceeded,
            ArtifactErrorKind::Denied => StagingErrorKind::Denied,
            ArtifactErrorKind::Unavailable | ArtifactErrorKind::Full => StagingErrorKind::Unavailable,
            ArtifactErrorKind::Other => StagingErrorKind::Store,
        };
        StagingError { source: Some(source.into()), ..self.error(kind, context) }
    }
}
