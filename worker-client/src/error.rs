//! The one error type: what kind, whether a retry may help, and what the service said in detail.

use std::{error::Error as StdError, fmt, path::PathBuf, time::Duration};

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// What a failure is. Match on this, never on a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// No connection to the service could be made, or the one that there was broke.
    Unreachable,
    /// The service answered that it cannot serve now.
    Unavailable,
    /// The call took longer than its time-out. Whether it had an effect is not known.
    DeadlineExceeded,
    /// A limit is reached. Nothing was stored; see [`ClientError::retry_after`].
    Exhausted,
    /// The request has bad fields; see [`ClientError::violations`].
    Invalid,
    /// There is no such run or artifact for this caller.
    NotFound,
    /// The id or key is taken by a run with another spec.
    AlreadyExists,
    /// The run is not in a state for this.
    FailedPrecondition,
    /// The caller is not known.
    Unauthenticated,
    /// The caller may not do this.
    PermissionDenied,
    /// The service does not have this method.
    Unimplemented,
    /// The call was given up on.
    Cancelled,
    /// The service failed.
    Internal,
    /// The service, or something between, broke the contract: for example a gap in a log.
    Protocol,
    /// Bytes arrived that are not those that were announced: size or SHA-256 differ.
    Integrity,
    /// A path would lead outside of the directory that was given, or through a symbolic link.
    UnsafePath,
    /// A local file could not be read or written.
    Io,
    /// What was asked for cannot be done by this client, for example a URL of an unknown scheme.
    Unsupported,
}

/// A bad field of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldViolation {
    /// Its path in the request, for example `spec.inputs[2].path`.
    pub field: String,
    /// A stable code, for example `TOO_LARGE`. Empty where the service named none.
    pub reason: String,
    /// A sentence for a person.
    pub description: String,
}

/// A limit that was reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuotaViolation {
    /// Whose limit, for example a tenant.
    pub subject: String,
    /// What the limit is.
    pub description: String,
}

/// A failed call, transfer or check.
///
/// Everything that a program needs is in fields; the text is for people. It names what was being done.
#[derive(Debug)]
pub struct ClientError {
    inner: Box<Inner>,
}

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    doing: String,
    message: String,
    violations: Vec<FieldViolation>,
    quota: Vec<QuotaViolation>,
    reason: Option<String>,
    retry_after: Option<Duration>,
    code: Option<Code>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl ClientError {
    pub(crate) fn new(kind: ErrorKind, doing: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            inner: Box::new(Inner {
                kind,
                doing: doing.into(),
                message: message.into(),
                violations: Vec::new(),
                quota: Vec::new(),
                reason: None,
                retry_after: None,
                code: None,
                source: None,
            }),
        }
    }

    pub(crate) fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.inner.source = Some(source.into());
        self
    }

    pub(crate) fn with_reason(mut self, reason: String) -> Self {
        self.inner.reason = Some(reason).filter(|reason| !reason.is_empty());
        self
    }

    pub(crate) fn with_retry_after(mut self, wait: Option<Duration>) -> Self {
        self.inner.retry_after = wait;
        self
    }

    pub(crate) fn io(doing: impl Into<String>, source: std::io::Error) -> Self {
        Self::new(ErrorKind::Io, doing, source.to_string()).with_source(source)
    }

    pub(crate) fn connect(doing: impl Into<String>, source: tonic::transport::Error) -> Self {
        Self::new(ErrorKind::Unreachable, doing, innermost(&source)).with_source(source)
    }

    pub(crate) fn unsafe_path(path: impl Into<PathBuf>, why: &str) -> Self {
        let path = path.into();
        Self::new(ErrorKind::UnsafePath, format!("resolve {}", path.display()), why)
    }

    /// Reads a status with its details.
    pub(crate) fn status(doing: impl Into<String>, status: Status) -> Self {
        // A status that came from the service has no source; one that tonic made of a broken connection has.
        let local = status.source().is_some();
        let kind = match status.code() {
            Code::Cancelled if has_source::<tonic::TimeoutExpired>(&status) => ErrorKind::DeadlineExceeded,
            Code::Unknown | Code::Internal | Code::Cancelled | Code::Unavailable if local => {
                ErrorKind::Unreachable
            }
            Code::InvalidArgument | Code::OutOfRange => ErrorKind::Invalid,
            Code::NotFound => ErrorKind::NotFound,
            Code::AlreadyExists => ErrorKind::AlreadyExists,
            Code::ResourceExhausted => ErrorKind::Exhausted,
            Code::FailedPrecondition | Code::Aborted => ErrorKind::FailedPrecondition,
            Code::Unauthenticated => ErrorKind::Unauthenticated,
            Code::PermissionDenied => ErrorKind::PermissionDenied,
            Code::Unimplemented => ErrorKind::Unimplemented,
            Code::Unavailable => ErrorKind::Unavailable,
            Code::DeadlineExceeded => ErrorKind::DeadlineExceeded,
            Code::Cancelled => ErrorKind::Cancelled,
            Code::Unknown | Code::Internal | Code::DataLoss => ErrorKind::Internal,
            Code::Ok => ErrorKind::Protocol,
        };
        let details = status.get_error_details();
        let message = match status.source() {
            Some(source) if kind == ErrorKind::Unreachable => innermost(source),
            _ => status.message().to_owned(),
        };
        let mut error = Self::new(kind, doing, message);
        let inner = &mut *error.inner;
        inner.code = Some(status.code());
        if let Some(bad) = details.bad_request() {
            let violations = bad.field_violations.iter().map(|violation| FieldViolation {
                field: violation.field.clone(),
                reason: violation.reason.clone(),
                description: violation.description.clone(),
            });
            inner.violations = violations.collect();
        }
        if let Some(quota) = details.quota_failure() {
            let violations = quota.violations.iter().map(|violation| QuotaViolation {
                subject: violation.subject.clone(),
                description: violation.description.clone(),
            });
            inner.quota = violations.collect();
        }
        inner.reason = details.error_info().map(|info| info.reason.clone());
        inner.retry_after = details.retry_info().and_then(|info| info.retry_delay);
        inner.source = Some(Box::new(status));
        error
    }

    /// What it is.
    pub fn kind(&self) -> ErrorKind {
        self.inner.kind
    }

    /// What was being done, for example `start the run`.
    pub fn doing(&self) -> &str {
        &self.inner.doing
    }

    /// What went wrong, for a person.
    pub fn message(&self) -> &str {
        &self.inner.message
    }

    /// The bad fields. Not empty only for [`ErrorKind::Invalid`].
    pub fn violations(&self) -> &[FieldViolation] {
        &self.inner.violations
    }

    /// The limits that were reached.
    pub fn quota(&self) -> &[QuotaViolation] {
        &self.inner.quota
    }

    /// The service's stable reason code, where it named one.
    pub fn reason(&self) -> Option<&str> {
        self.inner.reason.as_deref()
    }

    /// How long the service asked to wait before the next try.
    pub fn retry_after(&self) -> Option<Duration> {
        self.inner.retry_after
    }

    /// The gRPC code, where the failure was a status.
    pub fn code(&self) -> Option<Code> {
        self.inner.code
    }

    /// Whether the same call, made again later, may succeed. Says nothing of whether repeating it is harmless: all
    /// calls of this client but `attach` are.
    pub fn is_retryable(&self) -> bool {
        match self.inner.kind {
            ErrorKind::Unreachable
            | ErrorKind::Unavailable
            | ErrorKind::DeadlineExceeded
            | ErrorKind::Exhausted => true,
            ErrorKind::Invalid
            | ErrorKind::NotFound
            | ErrorKind::AlreadyExists
            | ErrorKind::FailedPrecondition
            | ErrorKind::Unauthenticated
            | ErrorKind::PermissionDenied
            | ErrorKind::Unimplemented
            | ErrorKind::Cancelled
            | ErrorKind::Internal
            | ErrorKind::Protocol
            | ErrorKind::Integrity
            | ErrorKind::UnsafePath
            | ErrorKind::Io
            | ErrorKind::Unsupported => false,
        }
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.inner.doing, self.inner.message)
    }
}

impl StdError for ClientError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.inner.source {
            Some(source) => Some(&**source),
            None => None,
        }
    }
}

/// Whether an error of this type is among the causes.
fn has_source<T: StdError + 'static>(error: &(dyn StdError + 'static)) -> bool {
    let mut next = error.source();
    while let Some(source) = next {
        if source.is::<T>() {
            return true;
        }
        next = source.source();
    }
    false
}

/// The text of the deepest cause: the outer ones of a transport say only "transport error".
fn innermost(error: &(dyn StdError + 'static)) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string()
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn every_typed_detail_is_read_without_parsing_a_message() {
        let mut details = ErrorDetails::new();
        details.add_bad_request_violation("spec.image", "is not known");
        details.set_error_info("IMAGE_UNKNOWN", "runner", std::collections::HashMap::new());
        details.set_retry_info(Some(Duration::from_millis(1500)));
        details.add_quota_failure_violation("tenant:default", "100 live runs");
        let status = Status::with_error_details(Code::InvalidArgument, "no", details);
        let error = ClientError::status("start the run", status);
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert_eq!(error.violations()[0].field, "spec.image");
        assert_eq!(error.reason(), Some("IMAGE_UNKNOWN"));
        assert_eq!(error.retry_after(), Some(Duration::from_millis(1500)));
        assert_eq!(error.quota()[0].subject, "tenant:default");
        assert_eq!(error.to_string(), "start the run: no");
        assert!(!error.is_retryable());
    }

    #[test]
    fn an_internal_error_of_the_service_is_not_taken_for_a_broken_connection() {
        let error = ClientError::status("get the run", Status::internal("bug"));
        assert_eq!(error.kind(), ErrorKind::Internal);
        assert!(!error.is_retryable());
    }

    #[test]
    fn a_broken_connection_is_unreachable_whatever_code_the_transport_chose() {
        let broken = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        let error = ClientError::status("get the run", Status::from_error(Box::new(broken)));
        assert_eq!(error.kind(), ErrorKind::Unreachable);
        assert!(error.is_retryable());
    }
}
