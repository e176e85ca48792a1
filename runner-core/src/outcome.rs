//! How a run, or one of its attempts, ended.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{artifact::Manifest, clock::Timestamp};

/// Why it ended. See the table in `docs/contract.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Cause {
    /// The program ended by itself; its exit code is the truth, verbatim.
    Exited,
    /// The kernel killed it at its memory limit.
    OomKilled,
    /// The run's own timeout.
    TimedOut,
    /// A caller or an operator.
    Cancelled,
    /// The image is missing, unauthorised, of a wrong platform, or refused by policy.
    Image,
    /// Staging the inputs failed.
    Input,
    /// Storing the outputs failed, or a required one is absent.
    Output,
    /// The backend had no room within the pending timeout.
    Unschedulable,
    /// Preemption, node drain, pressure.
    Evicted,
    /// The backend itself failed.
    Backend,
    /// No evidence of how it ended can be found any more.
    Lost,
}

impl Cause {
    /// Every cause, in the order of the contract's table.
    pub const ALL: [Self; 11] = [
        Self::Exited,
        Self::OomKilled,
        Self::TimedOut,
        Self::Cancelled,
        Self::Image,
        Self::Input,
        Self::Output,
        Self::Unschedulable,
        Self::Evicted,
        Self::Backend,
        Self::Lost,
    ];

    /// Whether an attempt that ended so is tried again where the spec does not say otherwise. For `IMAGE`, `INPUT` and
    /// `OUTPUT` the answer depends on the failure (a network error, a store's 5xx): [`Outcome::retryable`] has it.
    /// `LOST` is retryable only where the spec is idempotent.
    pub const fn retryable_by_default(self) -> bool {
        match self {
            Self::Unschedulable | Self::Evicted | Self::Backend | Self::Lost => true,
            Self::Exited
            | Self::OomKilled
            | Self::TimedOut
            | Self::Cancelled
            | Self::Image
            | Self::Input
            | Self::Output => false,
        }
    }

    /// Whether the infrastructure failed, as opposed to the caller's program or its limits.
    pub const fn is_infrastructure(self) -> bool {
        match self {
            Self::Image
            | Self::Input
            | Self::Output
            | Self::Unschedulable
            | Self::Evicted
            | Self::Backend
            | Self::Lost => true,
            Self::Exited | Self::OomKilled | Self::TimedOut | Self::Cancelled => false,
        }
    }

    /// The contract's name, for example `OOM_KILLED`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Exited => "EXITED",
            Self::OomKilled => "OOM_KILLED",
            Self::TimedOut => "TIMED_OUT",
            Self::Cancelled => "CANCELLED",
            Self::Image => "IMAGE",
            Self::Input => "INPUT",
            Self::Output => "OUTPUT",
            Self::Unschedulable => "UNSCHEDULABLE",
            Self::Evicted => "EVICTED",
            Self::Backend => "BACKEND",
            Self::Lost => "LOST",
        }
    }
}

/// How the program ended, where it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It returned this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

/// Something that was seen, so that a person can judge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// Where it was seen: `shim`, `cgroup`, `staging`, `supervisor` ….
    pub source: String,
    /// What was seen. At most 4 KiB; never a secret, never the program's output.
    pub detail: String,
    /// When.
    pub time: Timestamp,
}

/// What an attempt used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[allow(missing_docs, reason = "the names say it, with the unit")]
pub struct Usage {
    pub wall: Duration,
    pub cpu: Duration,
    pub max_memory_bytes: u64,
    pub input_bytes: u64,
    pub output_bytes: u64,
    pub log_bytes: u64,
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// How the program ended, where it ran and it is known.
    pub status: Option<ExitStatus>,
    /// Why it ended.
    pub cause: Cause,
    /// Whether trying again may end otherwise.
    pub retryable: bool,
    /// One sentence for a person.
    pub message: String,
    /// What was seen, oldest first.
    pub evidence: Vec<Evidence>,
    /// The attempt.
    pub attempt: u32,
    /// What it used.
    pub usage: Usage,
    /// What it stored. `None` where nothing was published.
    pub outputs: Option<Manifest>,
}

impl Outcome {
    /// An outcome with the cause's own retriability and nothing else known yet.
    pub fn new(attempt: u32, cause: Cause, message: impl Into<String>) -> Self {
        Self {
            status: None,
            cause,
            retryable: cause.retryable_by_default(),
            message: message.into(),
            evidence: Vec::new(),
            attempt,
            usage: Usage::default(),
            outputs: None,
        }
    }

    /// Adds what was seen.
    #[must_use]
    pub fn with_evidence(mut self, source: &str, detail: impl Into<String>, time: Timestamp) -> Self {
        let mut detail = detail.into();
        if detail.len() > 4096 {
            detail.truncate(detail.floor_char_boundary(4093));
            detail.push('…');
        }
        self.evidence.push(Evidence { source: source.to_owned(), detail, time });
        self
    }

    /// Whether this is success: the program exited 0 by itself and what it promised is stored.
    pub fn is_success(&self) -> bool {
        self.cause == Cause::Exited && self.status == Some(ExitStatus::Code(0))
    }
}
