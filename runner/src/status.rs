//! Errors on the wire: a `google.rpc.Status` with typed details. A caller never has to parse a message.

use std::{collections::HashMap, time::Duration};

use runner_core::{
    artifact::{ArtifactError, ArtifactErrorKind},
    service::ServiceError,
    spec::InvalidSpec,
};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _};

/// The domain of every `ErrorInfo`.
pub const DOMAIN: &str = "runner";

/// After a failure that may pass, wait so long.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// Why a call failed: the `reason` of `ErrorInfo`. Stable: names are added, never changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Bad fields; `BadRequest` names them.
    InvalidArgument,
    /// No such run, or not the caller's.
    RunNotFound,
    /// No such artifact, or not the caller's.
    ArtifactNotFound,
    /// The id or the key names another run, with another spec.
    AlreadyExists,
    /// A limit is reached; `QuotaFailure` says which.
    LimitReached,
    /// The domain's own code, for example `NOT_RUNNING`.
    Precondition(&'static str),
    /// The caller may not do this.
    Denied,
    /// Uploaded bytes are not what was promised.
    ArtifactMismatch,
    /// Not now.
    Unavailable,
    /// The service is shutting down: connect again, go on from the last cursor.
    ShuttingDown,
    /// A defect.
    Internal,
}

impl Reason {
    /// The name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidArgument => "INVALID_ARGUMENT",
            Self::RunNotFound => "RUN_NOT_FOUND",
            Self::ArtifactNotFound => "ARTIFACT_NOT_FOUND",
            Self::AlreadyExists => "ALREADY_EXISTS",
            Self::LimitReached => "LIMIT_REACHED",
            Self::Precondition(code) => code,
            Self::Denied => "DENIED",
            Self::ArtifactMismatch => "ARTIFACT_MISMATCH",
            Self::Unavailable => "UNAVAILABLE",
            Self::ShuttingDown => "SHUTTING_DOWN",
            Self::Internal => "INTERNAL",
        }
    }

    fn details<const N: usize>(self, metadata: [(&str, String); N]) -> ErrorDetails {
        let metadata: HashMap<String, String> =
            metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        ErrorDetails::with_error_info(self.as_str(), DOMAIN, metadata)
    }
}

/// Most bytes of violations in one answer. A status travels in trailers, and clients (grpcio) refuse more than 8 KiB.
const MAX_VIOLATION_BYTES: usize = 3000;
/// Most bytes of any one text of a violation, and of a status's message.
const MAX_TEXT_BYTES: usize = 300;

fn cut(text: &str) -> String {
    if text.len() <= MAX_TEXT_BYTES {
        return text.to_owned();
    }
    format!("{}…", &text[..text.floor_char_boundary(MAX_TEXT_BYTES)])
}

/// Bad fields. The metadata `violations` is their number, where not all of them fit.
pub fn invalid(invalid: &InvalidSpec) -> Status {
    let mut room = MAX_VIOLATION_BYTES;
    let violations: Vec<FieldViolation> = invalid
        .0
        .iter()
        .map(|violation| FieldViolation {
            field: cut(&violation.field),
            description: cut(&violation.description),
            reason: violation.reason.clone(),
            localized_message: None,
        })
        .take_while(|violation| {
            let size = violation.field.len() + violation.description.len() + violation.reason.len() + 10;
            room.checked_sub(size).map(|left| room = left).is_some()
        })
        .collect();
    let mut details = Reason::InvalidArgument.details([("violations", invalid.0.len().to_string())]);
    details.set_bad_request(violations);
    // For people; the details have everything.
    let message = cut(&format!("the request is not valid: {invalid}"));
    Status::with_error_details(Code::InvalidArgument, message, details)
}

/// What the service answered instead. Defects are logged here, once; the caller learns no more than that there was one.
pub fn service(error: &ServiceError) -> Status {
    let message = cut(&error.to_string());
    match error {
        ServiceError::Invalid(fields) => invalid(fields),
        ServiceError::NotFound(id) => {
            let details = Reason::RunNotFound.details([("run_id", id.to_string())]);
            Status::with_error_details(Code::NotFound, message, details)
        }
        ServiceError::AlreadyExists { field } => {
            let details = Reason::AlreadyExists.details([("field", (*field).to_owned())]);
            Status::with_error_details(Code::AlreadyExists, message, details)
        }
        ServiceError::Exhausted { limit, max, retry_after } => {
            let mut details =
                Reason::LimitReached.details([("limit", (*limit).to_owned()), ("max", max.to_string())]);
            details.set_retry_info(Some(*retry_after));
            details.add_quota_failure_violation(*limit, message.clone());
            Status::with_error_details(Code::ResourceExhausted, message, details)
        }
        ServiceError::Denied { field, .. } => {
            let details = Reason::Denied.details([("field", (*field).to_owned())]);
            Status::with_error_details(Code::PermissionDenied, message, details)
        }
        ServiceError::FailedPrecondition { reason, .. } => Status::with_error_details(
            Code::FailedPrecondition,
            message,
            Reason::Precondition(reason).details([]),
        ),
        ServiceError::Unavailable(cause) => {
            tracing::warn!(%cause, "a call failed for now");
            unavailable(Reason::Unavailable, message)
        }
        ServiceError::Internal(cause) => {
            tracing::error!(%cause, "a call failed");
            internal()
        }
    }
}

/// What the object store answered instead.
pub fn artifact(error: &ArtifactError) -> Status {
    let message = cut(&error.context);
    match error.kind {
        ArtifactErrorKind::NotFound => {
            Status::with_error_details(Code::NotFound, message, Reason::ArtifactNotFound.details([]))
        }
        ArtifactErrorKind::Mismatch => Status::with_error_details(
            Code::FailedPrecondition,
            message,
            Reason::ArtifactMismatch.details([]),
        ),
        ArtifactErrorKind::LimitExceeded => {
            let mut details = Reason::LimitReached.details([]);
            details.add_quota_failure_violation("artifact", message.clone());
            Status::with_error_details(Code::ResourceExhausted, message, details)
        }
        ArtifactErrorKind::Unavailable | ArtifactErrorKind::Full => {
            tracing::warn!(error = %error, source = ?error.source, "the object store failed for now");
            unavailable(Reason::Unavailable, message)
        }
        ArtifactErrorKind::Denied | ArtifactErrorKind::Other => {
            tracing::error!(error = %error, source = ?error.source, "the object store failed");
            internal()
        }
    }
}

/// The service is shutting down.
pub fn shutting_down() -> Status {
    unavailable(
        Reason::ShuttingDown,
        "the service is shutting down; connect again and go on from the last cursor".to_owned(),
    )
}

/// The service has as many calls under way as it takes.
pub fn too_many_calls() -> Status {
    let mut details = Reason::LimitReached.details([("limit", "calls".to_owned())]);
    details.set_retry_info(Some(RETRY_DELAY));
    details.add_quota_failure_violation("calls", "calls at once, of all clients");
    Status::with_error_details(Code::ResourceExhausted, "too many calls at once", details)
}

fn unavailable(reason: Reason, message: String) -> Status {
    let mut details = reason.details([]);
    details.set_retry_info(Some(RETRY_DELAY));
    Status::with_error_details(Code::Unavailable, message, details)
}

fn internal() -> Status {
    Status::with_error_details(
        Code::Internal,
        "an internal error; the service's log says more",
        Reason::Internal.details([]),
    )
}

#[cfg(test)]
mod tests {
    use runner_core::id::RunId;
    use uuid::Uuid;

    use super::*;

    fn reason(status: &Status) -> String {
        let details = status.get_error_details();
        let info = details.error_info().expect("every error has ErrorInfo");
        assert_eq!(info.domain, DOMAIN);
        info.reason.clone()
    }

    #[test]
    fn bad_fields_are_a_violation_each() {
        let status = service(&ServiceError::field("spec.image", "INVALID", "no"));
        assert_eq!((status.code(), reason(&status).as_str()), (Code::InvalidArgument, "INVALID_ARGUMENT"));
        let details = status.get_error_details();
        let violations = &details.bad_request().unwrap().field_violations;
        assert_eq!(violations.len(), 1);
        assert_eq!((violations[0].field.as_str(), violations[0].reason.as_str()), ("spec.image", "INVALID"));
    }

    #[test]
    fn a_reached_limit_says_which_and_when_to_try_again() {
        let error =
            ServiceError::Exhausted { limit: "live_runs", max: 3, retry_after: Duration::from_secs(2) };
        let status = service(&error);
        assert_eq!((status.code(), reason(&status).as_str()), (Code::ResourceExhausted, "LIMIT_REACHED"));
        let details = status.get_error_details();
        assert_eq!(details.retry_info().unwrap().retry_delay, Some(Duration::from_secs(2)));
        assert_eq!(details.quota_failure().unwrap().violations[0].subject, "live_runs");
        assert_eq!(details.error_info().unwrap().metadata["max"], "3");
    }

    #[test]
    fn every_service_error_has_its_code_and_reason() {
        let id = RunId::new(Uuid::from_u128(1));
        let precondition =
            ServiceError::FailedPrecondition { reason: "NOT_RUNNING", message: "no".to_owned() };
        let denied = ServiceError::Denied { field: "spec.routing.backend", message: "no".to_owned() };
        for (error, code, expected) in [
            (ServiceError::NotFound(id), Code::NotFound, "RUN_NOT_FOUND"),
            (ServiceError::AlreadyExists { field: "run_id" }, Code::AlreadyExists, "ALREADY_EXISTS"),
            (precondition, Code::FailedPrecondition, "NOT_RUNNING"),
            (denied, Code::PermissionDenied, "DENIED"),
            (ServiceError::Unavailable("x".to_owned()), Code::Unavailable, "UNAVAILABLE"),
            (ServiceError::Internal("secret path".to_owned()), Code::Internal, "INTERNAL"),
        ] {
            let status = service(&error);
            assert_eq!((status.code(), reason(&status).as_str()), (code, expected));
            assert!(!status.message().contains("secret path"));
        }
        assert!(shutting_down().get_error_details().retry_info().is_some());
    }

    #[test]
    fn a_status_fits_into_headers_however_many_fields_are_bad() {
        let long = "x".repeat(3000);
        let fields =
            (0..100).map(|i| runner_core::spec::FieldViolation::new(format!("f{i}"), "INVALID", &long));
        let status = invalid(&InvalidSpec(fields.collect()));
        let headers = status.into_http::<()>().into_parts().0.headers;
        let size: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
        assert!(size < 8 * 1024, "{size} bytes");
    }
}
