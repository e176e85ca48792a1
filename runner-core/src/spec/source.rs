//! Where an input's bytes come from.

use std::{fmt, str::FromStr};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::path;
use crate::{
    artifact::{ArtifactKey, ArtifactUri},
    https::HttpsUrl,
    id::{InvalidId, RunId},
};

/// Where an input's bytes come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InputSource {
    /// An object, or a tree, of the tenant.
    Artifact(ArtifactUri),
    /// The spec itself.
    Inline(#[serde(with = "crate::base64_bytes")] Bytes),
    /// Outputs of another run of the tenant.
    Run(RunOutput),
    /// An allowed host. The spec names the SHA-256.
    Https(HttpsUrl),
}

impl InputSource {
    /// The source that a URI names: `artifact:KEY`, `run:RUN/PATH` or `https://…`.
    ///
    /// # Errors
    /// Where it is none of these.
    pub fn from_uri(uri: &str) -> Result<Self, InvalidId> {
        match uri.split_once(':') {
            Some(("artifact", _)) => uri.parse().map(Self::Artifact),
            Some(("run", _)) => uri.parse().map(Self::Run),
            Some(("https", _)) => uri.parse().map(Self::Https),
            _ => Err(InvalidId {
                what: "URI",
                value: uri.split('?').next().unwrap_or_default().chars().take(80).collect(),
                rule: "`artifact:KEY`, `run:RUN/PATH` or `https://…`",
            }),
        }
    }

    /// The URI, as [`InputSource::from_uri`] reads it. `None` for inline bytes.
    pub fn uri(&self) -> Option<String> {
        match self {
            Self::Artifact(uri) => Some(uri.to_string()),
            Self::Run(output) => Some(output.to_string()),
            Self::Https(url) => Some(url.to_string()),
            Self::Inline(_) => None,
        }
    }
}

/// Outputs of another run, as `run:RUN` or `run:RUN/PATH`, where `/PATH` is where they lay in that run: an output, what is
/// in one, or a directory that outputs are in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunOutput {
    /// Whose.
    pub run: RunId,
    /// Absolute, normal. `None`: all of them, each at its own path below the input.
    pub path: Option<String>,
    /// What admission found. The run has ended by then, so it does not change any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found: Option<FoundOutput>,
}

/// What admission found of another run's outputs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundOutput {
    /// Where the manifest lies: the last attempt's prefix.
    pub prefix: ArtifactKey,
    /// Whether it is a directory; else it is one file.
    pub directory: bool,
}

impl fmt::Display for RunOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "run:{}{}", self.run, self.path.as_deref().unwrap_or_default())
    }
}

impl FromStr for RunOutput {
    type Err = InvalidId;

    fn from_str(s: &str) -> Result<Self, InvalidId> {
        let invalid = || InvalidId {
            what: "output of a run",
            value: s.chars().take(80).collect(),
            rule: "`run:RUN` or `run:RUN/PATH`, with the path that the output had in that run",
        };
        let rest = s.strip_prefix("run:").ok_or_else(invalid)?;
        let (run, path) = match rest.find('/') {
            Some(at) => (&rest[..at], Some(rest[at..].to_owned())),
            None => (rest, None),
        };
        if path.as_deref().is_some_and(|path| path::fault(path).is_some()) {
            return Err(invalid());
        }
        Ok(Self { run: run.parse().map_err(|_| invalid())?, path, found: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_says_its_source_and_is_written_as_it_was_read() {
        for uri in [
            "artifact:uploads/t/x",
            "artifact:runs/t/r/1/",
            "run:018f0000-0000-7000-8000-000000000001",
            "run:018f0000-0000-7000-8000-000000000001/outputs/a b",
            "https://a.example/x?y",
        ] {
            assert_eq!(InputSource::from_uri(uri).unwrap().uri().as_deref(), Some(uri));
        }
        for bad in [
            "",
            "x",
            "file:///etc/passwd",
            "http://a.example/",
            "run:",
            "run:x",
            "run:018f0000-0000-7000-8000-000000000001/",
            "run:018f0000-0000-7000-8000-000000000001/../x",
            "artifact:/x",
        ] {
            assert!(InputSource::from_uri(bad).is_err(), "{bad}");
        }
    }
}
