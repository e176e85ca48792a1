//! What a caller asks for.

pub mod path;
mod source;
mod validate;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

pub use runner_glob::Pattern;

pub use self::{
    source::{FoundOutput, InputSource, RunOutput},
    validate::{FieldViolation, InvalidSpec},
};
use crate::{
    artifact::{ArtifactKey, ArtifactUri},
    id::BackendName,
    outcome::Cause,
};

/// What the caller asked for. Immutable once accepted. `None` means the service's default, which
/// [`Limits::apply`](crate::limits::Limits::apply) fills in at admission, so that a stored spec has no open ends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct RunSpec {
    /// Image reference. `None`: the backend's default image.
    pub image: Option<String>,
    /// Overrides the image's ENTRYPOINT.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Overrides the image's CMD.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Environment, in clear.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Secrets, by reference.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<SecretRef>,
    /// Absolute. `None`: the image's, else `/`.
    pub working_dir: Option<String>,
    /// Files that exist before the program starts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<Input>,
    /// Files that are stored when it has ended.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub outputs: Vec<Output>,
    /// Limits on what the program may use.
    #[serde(default)]
    pub resources: Resources,
    /// What the program can reach.
    #[serde(default)]
    pub network: Network,
    /// Who it runs as. `None`: the backend's non-root default.
    pub user: Option<User>,
    /// The program cannot write outside of `/outputs`-like mounts, `/tmp` and `HOME`.
    #[serde(default)]
    pub read_only_root: bool,
    /// Wall time that the program may run, from its start.
    pub timeout: Option<Duration>,
    /// Time between SIGTERM and SIGKILL.
    pub stop_grace: Option<Duration>,
    /// When a failed attempt is tried again.
    #[serde(default)]
    pub retry: RetryPolicy,
    /// A pseudo-terminal, and its first size.
    pub terminal: Option<TerminalSize>,
    /// Standard input stays open for `Attach`.
    #[serde(default)]
    pub stdin: bool,
    /// For selection.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Where it should go.
    #[serde(default)]
    pub routing: Routing,
    /// Executing it twice is harmless.
    #[serde(default)]
    pub idempotent: bool,
}

impl RunSpec {
    /// SHA-256 of the spec's canonical form. Two specs have the same digest exactly where they are equal.
    ///
    /// # Panics
    /// Never: every field is a type that JSON can express with text keys.
    pub fn digest(&self) -> [u8; 32] {
        // Maps are ordered and struct fields have a fixed order, so serde_json's output is canonical.
        #[allow(clippy::expect_used, reason = "see Panics")]
        let bytes = serde_json::to_vec(self).expect("a spec is expressible in JSON");
        Sha256::digest(&bytes).into()
    }

    /// The uploads, by their prefix, that it names: what it has as inputs, and where its outputs go.
    pub fn uploads(&self) -> BTreeSet<ArtifactKey> {
        let inputs = self.inputs.iter().filter_map(|input| match &input.source {
            InputSource::Artifact(uri) => Some(uri),
            InputSource::Run(_) | InputSource::Inline(_) | InputSource::Https(_) => None,
        });
        let destinations = self.outputs.iter().filter_map(|output| output.destination.as_ref());
        inputs.chain(destinations).filter_map(|uri| uri.key().upload()).collect()
    }
}

/// A secret, by reference. Its value never enters a spec, the store, a log or an event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretRef {
    /// `provider:name`.
    pub reference: String,
    /// Where its value appears.
    pub target: SecretTarget,
}

/// Where a secret's value appears in the workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretTarget {
    /// An environment variable.
    Env(String),
    /// A file.
    Path(String),
}

/// One file or tree that exists before the program starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Input {
    /// Where it appears. Absolute, normal.
    pub path: String,
    /// Where its bytes come from.
    pub source: InputSource,
    /// Expected SHA-256 of the source's bytes, lower-case hex.
    pub sha256: Option<String>,
    /// Permission bits. `None`: 0644, or what a tree's manifest says.
    pub mode: Option<u32>,
    /// Unpacks the bytes at `path`.
    pub extract: Option<Archive>,
}

/// Archive formats that an input can be unpacked from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the names say it")]
pub enum Archive {
    Tar,
    TarGz,
    TarZst,
    Zip,
}

/// One file or tree that is stored when the program has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// Absolute, normal; or a pattern.
    pub path: String,
    /// Whether `path` is a [`Pattern`]: files and directories that it matches are the output, a directory with all that
    /// is in it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub glob: bool,
    /// A prefix of the tenant. `None`: under the run's own prefix.
    pub destination: Option<ArtifactUri>,
    /// Its absence fails a run whose program exited 0.
    #[serde(default)]
    pub required: bool,
    /// Largest total size. `None`: the service's default.
    pub max_bytes: Option<u64>,
}

/// Limits on what the program may use. `None` means the service's default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[allow(missing_docs, reason = "the names say it, with the unit")]
pub struct Resources {
    /// A named profile of the configuration; the fields below override it.
    pub profile: Option<String>,
    /// Thousandths of a core.
    pub cpu_millis: Option<u32>,
    pub memory_bytes: Option<u64>,
    pub ephemeral_storage_bytes: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u32>,
    pub gpus: Option<u32>,
    /// Largest size of any one file that the program writes.
    pub file_size_bytes: Option<u64>,
}

/// What the program can reach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// Nothing but its own loopback.
    #[default]
    None,
    /// What the backend's egress policy allows.
    Egress,
    /// A policy that the configuration names.
    Named(String),
}

/// Who the program runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id. The uid's number where the spec gave none.
    pub gid: u32,
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct TerminalSize {
    pub columns: u16,
    pub rows: u16,
}

impl Default for TerminalSize {
    /// 80 × 24, as terminals have been since the VT100.
    fn default() -> Self {
        Self { columns: 80, rows: 24 }
    }
}

/// When a failed attempt is tried again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct RetryPolicy {
    /// Largest number of attempts. `None`: 1, no retry.
    pub max_attempts: Option<u32>,
    /// Wait before the second attempt; doubles each time.
    pub initial_backoff: Option<Duration>,
    /// Largest wait.
    pub max_backoff: Option<Duration>,
    /// Which causes are tried again. Empty: those that are retryable by themselves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<Cause>,
}

/// Where a run should go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Routing {
    /// This backend and no other.
    pub backend: Option<BackendName>,
    /// Runs with the same key go to the same side of a split.
    pub sticky_key: Option<String>,
}
