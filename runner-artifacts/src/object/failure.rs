//! What a failed request means: whether it may be tried again, and what it is to those above.

use std::{error::Error as StdError, io, time::Duration};

use object_store::Error;
use runner_core::artifact::{ArtifactError, ArtifactErrorKind};

use crate::directory::kind_of;

/// An answer that the store gave and that trying the same request again will not change, or will only under conditions that
/// `object_store` does not tell apart. Made by [`Typing`](super::http::Typing).
#[derive(Debug, thiserror::Error)]
#[error("the store answered {status} {code}: {message}")]
pub(super) struct Answer {
    /// The HTTP status.
    pub(super) status: u16,
    /// The code of the answer's XML document; empty where there is none.
    pub(super) code: String,
    /// What the answer says to people, cut.
    pub(super) message: String,
}

/// A request took longer than it may.
#[derive(Debug, thiserror::Error)]
#[error("nothing or too little moved within {0:?}")]
pub(super) struct TooSlow(pub(super) Duration);

impl TooSlow {
    pub(super) fn into_error(self) -> Error {
        Error::Generic { store: "request", source: Box::new(self) }
    }
}

/// An object is not the one that was read from before.
#[derive(Debug, thiserror::Error)]
#[error("the object was replaced while it was read")]
pub(super) struct Replaced;

impl Replaced {
    pub(super) fn into_error(self, path: &object_store::path::Path) -> Error {
        Error::Precondition { path: path.to_string(), source: Box::new(self) }
    }
}

/// What kind of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// There is no such object or upload.
    NotFound,
    /// Another object than before has the name.
    Replaced,
    /// The credentials do not suffice, or not any more: fresh ones may.
    Denied,
    /// The store has no room.
    Full,
    /// The range lies behind the object's end.
    OutOfRange,
    /// It may pass: 5xx, 408, 429, 409, a time-out, a reset, a broken answer.
    Passing,
    /// It will not pass.
    Final,
}

impl Class {
    /// How many tries a failure of this kind is worth, of `most`.
    pub(super) const fn tries(self, most: u32) -> u32 {
        match self {
            Self::Passing => most,
            // Enough for a rotation: the old key is refused, the new one is read.
            Self::Denied => {
                if most < 4 {
                    most
                } else {
                    4
                }
            }
            // Somebody may be making room.
            Self::Full => {
                if most < 3 {
                    most
                } else {
                    3
                }
            }
            Self::NotFound | Self::Replaced | Self::OutOfRange | Self::Final => 1,
        }
    }

    const fn kind(self) -> ArtifactErrorKind {
        match self {
            Self::NotFound => ArtifactErrorKind::NotFound,
            Self::Replaced => ArtifactErrorKind::Mismatch,
            Self::Denied => ArtifactErrorKind::Denied,
            Self::Full => ArtifactErrorKind::Full,
            Self::Passing => ArtifactErrorKind::Unavailable,
            Self::OutOfRange | Self::Final => ArtifactErrorKind::Other,
        }
    }
}

/// What kind of failure this is.
pub(super) fn class(error: &Error) -> Class {
    match error {
        Error::NotFound { .. } => Class::NotFound,
        Error::Precondition { .. } => Class::Replaced,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => Class::Denied,
        Error::InvalidPath { .. }
        | Error::NotSupported { .. }
        | Error::NotImplemented { .. }
        | Error::NotModified { .. }
        | Error::UnknownConfigurationKey { .. } => Class::Final,
        // 409: S3 answers so where writes of one key meet.
        Error::AlreadyExists { .. } | Error::JoinError { .. } => Class::Passing,
        // Generic: whatever its client gave up on. The crate marks its enum as open.
        _ => {
            if let Some(answer) = below::<Answer>(error) {
                return answered(answer);
            }
            match below::<io::Error>(error).map(kind_of) {
                Some(ArtifactErrorKind::Full) => Class::Full,
                Some(ArtifactErrorKind::Denied) => Class::Denied,
                Some(
                    ArtifactErrorKind::NotFound
                    | ArtifactErrorKind::Mismatch
                    | ArtifactErrorKind::LimitExceeded
                    | ArtifactErrorKind::Unavailable
                    | ArtifactErrorKind::Other,
                )
                | None => Class::Passing,
            }
        }
    }
}

fn answered(answer: &Answer) -> Class {
    match (answer.status, answer.code.as_str()) {
        (507, _) | (_, "XMinioStorageFull" | "QuotaExceeded" | "InsufficientStorage") => Class::Full,
        (416, _) => Class::OutOfRange,
        (401 | 403, _) => Class::Denied,
        // S3 tells of a session that ended, and of a clock that is off, by 400.
        (_, "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired" | "RequestExpired") => Class::Denied,
        (_, "RequestTimeout" | "IncompleteBody" | "BadDigest" | "InternalError" | "SlowDown") => {
            Class::Passing
        }
        _ => Class::Final,
    }
}

/// The error of this type in the chain, if there is one.
fn below<T: StdError + 'static>(error: &Error) -> Option<&T> {
    let mut below = error.source();
    while let Some(error) = below {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        below = error.source();
    }
    None
}

/// The error for those above. `tries` is how often it was tried.
pub(super) fn mapped(error: Error, doing: &str, tries: u32) -> ArtifactError {
    let class = class(&error);
    let context = match class {
        Class::Replaced => format!("{doing}: the object was replaced meanwhile"),
        _ => match seen(&error) {
            seen if tries > 1 => format!("{doing}: {seen} ({tries} tries)"),
            seen => format!("{doing}: {seen}"),
        },
    };
    ArtifactError::with_source(class.kind(), context, error)
}

/// What lies at the bottom, short: evidence for people.
fn seen(error: &Error) -> String {
    let mut deepest: &dyn StdError = error;
    while let Some(below) = deepest.source() {
        deepest = below;
    }
    let text = deepest.to_string();
    match text.char_indices().nth(300) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(source: impl StdError + Send + Sync + 'static) -> Error {
        Error::Generic { store: "S3", source: Box::new(source) }
    }

    fn answer(status: u16, code: &str) -> Error {
        generic(Answer { status, code: code.to_owned(), message: String::new() })
    }

    #[test]
    fn what_may_pass_is_told_from_what_will_not() {
        for (error, wanted) in [
            (answer(507, ""), Class::Full),
            (answer(400, "ExpiredToken"), Class::Denied),
            (answer(400, "RequestTimeout"), Class::Passing),
            (answer(403, "SignatureDoesNotMatch"), Class::Denied),
            (answer(400, "InvalidArgument"), Class::Final),
            (answer(416, "InvalidRange"), Class::OutOfRange),
            (generic(TooSlow(Duration::from_secs(1))), Class::Passing),
            (generic(io::Error::from(io::ErrorKind::StorageFull)), Class::Full),
            (generic(io::Error::from(io::ErrorKind::ConnectionReset)), Class::Passing),
        ] {
            assert_eq!(class(&error), wanted, "{error}");
        }
    }

    #[test]
    fn evidence_says_what_was_seen_and_how_often() {
        let error = mapped(answer(400, "InvalidArgument"), "store a/b", 1);
        assert_eq!(error.context, "store a/b: the store answered 400 InvalidArgument: ");
        assert_eq!(error.kind, ArtifactErrorKind::Other);
        let error = mapped(generic(TooSlow(Duration::from_secs(3))), "read a", 5);
        assert_eq!(error.context, "read a: nothing or too little moved within 3s (5 tries)");
        assert!(error.kind.retryable());
    }
}
