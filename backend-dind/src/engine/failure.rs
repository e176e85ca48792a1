//! How a request to the engine fails.

use bollard::errors::Error;

/// What kind of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EngineErrorKind {
    /// What was named is not there (404).
    NotFound,
    /// It is there already, or is being changed by somebody else (409).
    Conflict,
    /// The engine understood and does not want to (any other 4xx).
    Refused,
    /// The engine has trouble of its own (5xx).
    Failed,
    /// It does not answer: not there, too slow, gone in the middle.
    Unreachable,
    /// It answers what no engine should.
    Malformed,
}

/// A failed request.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct EngineError {
    /// What kind.
    pub kind: EngineErrorKind,
    /// What was seen.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

impl EngineError {
    /// A failure to reach the engine.
    pub fn unreachable(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { kind: EngineErrorKind::Unreachable, source: source.into() }
    }

    /// An answer that makes no sense.
    pub fn malformed(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { kind: EngineErrorKind::Malformed, source: source.into() }
    }

    /// Whether the engine cannot be used now, whatever is asked of it.
    pub fn is_outage(&self) -> bool {
        match self.kind {
            EngineErrorKind::Unreachable => true,
            EngineErrorKind::Failed
            | EngineErrorKind::NotFound
            | EngineErrorKind::Conflict
            | EngineErrorKind::Refused
            | EngineErrorKind::Malformed => false,
        }
    }
}

impl From<Error> for EngineError {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::DockerResponseServerError { status_code, .. } => match status_code {
                404 => EngineErrorKind::NotFound,
                409 => EngineErrorKind::Conflict,
                // Shutting down, or a proxy in front of it that has lost it.
                502..=504 => EngineErrorKind::Unreachable,
                500.. => EngineErrorKind::Failed,
                _ => EngineErrorKind::Refused,
            },
            Error::JsonDataError { .. }
            | Error::JsonSerdeError { .. }
            | Error::StrParseError { .. }
            | Error::APIVersionParseError {} => EngineErrorKind::Malformed,
            // Sockets, time-outs, connections that end: bollard has many words for it.
            _ => EngineErrorKind::Unreachable,
        };
        Self { kind, source: error.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_decides_what_a_failure_is() {
        for (status_code, kind) in [
            (400, EngineErrorKind::Refused),
            (404, EngineErrorKind::NotFound),
            (409, EngineErrorKind::Conflict),
            (500, EngineErrorKind::Failed),
            (503, EngineErrorKind::Unreachable),
        ] {
            let error = Error::DockerResponseServerError { status_code, message: String::new() };
            assert_eq!(EngineError::from(error).kind, kind, "{status_code}");
        }
        assert!(EngineError::from(Error::RequestTimeoutError).is_outage());
    }
}
