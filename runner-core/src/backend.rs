//! The contract of a backend: a place that executes attempts.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};

use crate::{
    artifact::{ArtifactStore, Manifest},
    capability::Capabilities,
    clock::Timestamp,
    id::{AttemptId, BackendName, RunId, TenantId},
    log::FrameBatch,
    outcome::{Cause, Evidence, ExitStatus, Outcome, Usage},
    spec::{FieldViolation, RunSpec, TerminalSize},
};

/// Names what an attempt becomes on its backend. Opaque to everyone but the backend; stored *before* the side effect that
/// it names, so [`Backend::workload_ref`] derives it from (run, attempt) alone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WorkloadRef {
    /// The attempt that it executes.
    pub attempt: AttemptId,
    /// The backend's native name of it.
    pub native: String,
}

/// Everything that a backend needs to execute one attempt.
#[derive(Clone)]
pub struct AttemptContext {
    /// Which.
    pub attempt: AttemptId,
    /// Whose.
    pub tenant: TenantId,
    /// What. Every default is filled in.
    pub spec: Arc<RunSpec>,
    /// Largest number of log bytes; what is beyond is dropped and marked.
    pub log_limit_bytes: u64,
    /// Where inputs come from and outputs go to.
    pub artifacts: Arc<dyn ArtifactStore>,
    /// Told of staging as it goes on. Never blocks.
    pub progress: Arc<dyn ProgressSink>,
}

impl fmt::Debug for AttemptContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttemptContext")
            .field("attempt", &self.attempt)
            .field("tenant", &self.tenant)
            .finish_non_exhaustive()
    }
}

/// Which way bytes move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the names say it")]
pub enum Direction {
    Input,
    Output,
    /// The image, from a registry to where it is run. Its files are layers.
    Image,
}

/// How far staging is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Progress {
    pub direction: Direction,
    pub bytes_done: u64,
    /// Zero where it is not known.
    pub bytes_total: u64,
    pub files_done: u64,
    pub files_total: u64,
}

/// Takes progress. Implementations MUST NOT block and MAY drop all but the newest.
pub trait ProgressSink: Send + Sync {
    /// Takes it.
    fn progress(&self, progress: Progress);
}

/// Drops progress.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl ProgressSink for NoProgress {
    fn progress(&self, _: Progress) {}
}

/// What a backend saw of a workload.
#[derive(Debug, Clone, PartialEq)]
pub enum Observation {
    /// The program runs. Yielded once per observation, before any frame.
    Started {
        /// When it started.
        time: Timestamp,
    },
    /// A stretch of the log. Contiguous from the cursor that `observe` was given.
    Frames(FrameBatch),
    /// The program has ended, and its log up to here is complete. Outputs are not published yet.
    Exited {
        /// When it ended.
        time: Timestamp,
    },
    /// Outputs are stored; the manifest was written last.
    Published {
        /// What was stored.
        manifest: Manifest,
    },
    /// Nothing more will come. Always last, and yielded only after every frame.
    Ended(EndedAttempt),
}

/// How a workload ended, as its backend judged from evidence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedAttempt {
    /// Why.
    pub cause: Cause,
    /// How the program ended, where it is known.
    pub status: Option<ExitStatus>,
    /// Whether trying again may end otherwise.
    pub retryable: bool,
    /// One sentence for a person.
    pub message: String,
    /// What was seen.
    pub evidence: Vec<Evidence>,
    /// What it used.
    pub usage: Usage,
    /// What it stored.
    pub outputs: Option<Manifest>,
}

impl EndedAttempt {
    /// The outcome of attempt `number`.
    pub fn into_outcome(self, number: u32) -> Outcome {
        Outcome {
            status: self.status,
            cause: self.cause,
            retryable: self.retryable,
            message: self.message,
            evidence: self.evidence,
            attempt: number,
            usage: self.usage,
            outputs: self.outputs,
        }
    }
}

/// Input for a running workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorkloadInput {
    /// Bytes for standard input. At most 64 KiB at once.
    Stdin(Bytes),
    /// End of standard input.
    Eof,
    /// The terminal has another size.
    Resize(TerminalSize),
}

/// Whether a backend takes work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// Whether it does.
    pub healthy: bool,
    /// Why not; or what was found, for example versions.
    pub detail: String,
}

/// What kind of failure a backend met. A program that fails is an observation, not an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BackendErrorKind {
    /// The image cannot be had.
    Image,
    /// Staging the inputs failed.
    Input,
    /// Storing the outputs failed.
    Output,
    /// There is no room now.
    Unschedulable,
    /// The spec asks for what the backend cannot do. Admission should have refused it.
    Unsupported,
    /// The workload is unknown to the substrate.
    NotFound,
    /// The workload does not take input (any more).
    NotAttachable,
    /// The substrate failed.
    Substrate,
}

impl BackendErrorKind {
    /// The cause of an attempt that ends because of it.
    pub const fn cause(self) -> Cause {
        match self {
            Self::Image => Cause::Image,
            Self::Input => Cause::Input,
            Self::Output => Cause::Output,
            Self::Unschedulable => Cause::Unschedulable,
            Self::NotFound => Cause::Lost,
            Self::Unsupported | Self::NotAttachable | Self::Substrate => Cause::Backend,
        }
    }
}

/// A failed verb.
#[derive(Debug, thiserror::Error)]
#[error("{context}")]
pub struct BackendError {
    /// What kind.
    pub kind: BackendErrorKind,
    /// Whether the same verb may succeed later.
    pub retryable: bool,
    /// What was being done, and what was seen.
    pub context: String,
    /// What lies below.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl BackendError {
    /// An error with nothing below it.
    pub fn new(kind: BackendErrorKind, retryable: bool, context: impl Into<String>) -> Self {
        Self { kind, retryable, context: context.into(), source: None }
    }

    /// An error with its source.
    pub fn with_source(
        kind: BackendErrorKind,
        retryable: bool,
        context: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { kind, retryable, context: context.into(), source: Some(source.into()) }
    }

    /// The error and everything below it, in one line.
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// An error and everything below it, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut below = error.source();
    while let Some(error) = below {
        text.push_str(": ");
        text.push_str(&error.to_string());
        below = error.source();
    }
    text
}

/// A place that executes attempts.
///
/// The numbered rules are the contract; the conformance suite (`tests/src/backend`) has a case for each.
///
/// 1. `ensure` MUST be idempotent: called twice, or again after a restart, there is one workload. A conflict at creation
///    means adopt.
/// 2. `ensure` MUST be safe to drop at any await: what it left behind is found by `list` and removed by `remove`.
/// 3. What `ensure` makes MUST be named by [`Backend::workload_ref`], which is pure.
/// 4. `observe` MUST first replay what is known, from `cursor`, then follow. Two observers of one workload see the same.
/// 5. Frames MUST be contiguous from `cursor`, exact to the byte, and all of them MUST come before `Ended`.
/// 6. `Ended` MUST come exactly once per observation, last, and only from evidence. Absence is `LOST`, never success.
/// 7. A program that fails, is killed or times out is an observation. An `Err` of `observe` means that the observation
///    failed; the workload may be alive, and observing again is allowed.
/// 8. Outputs are published when the program has ended, whatever its status; the manifest is written last. Publishing MUST
///    be idempotent: after a restart it is done again or found done.
/// 9. `stop` MUST return only when the workload is proven dead: every process, double-forked ones too. Idempotent; of a
///    workload that ended, or never was, it returns at once. The program's own exit, if it came first, stays the outcome.
/// 10. After `stop`, `observe` MUST still yield the whole log and the outputs written so far, then `Ended`.
/// 11. `release` MAY forget log frames before the offset; the backend MUST keep those after it until `remove`.
/// 12. `remove` MUST leave nothing of the attempt on the substrate. Idempotent. It MUST NOT be called on a live workload;
///     a backend that finds one alive stops it first.
/// 13. `list` MUST name every workload that carries this service's ownership mark, whoever knows of it, and nothing else.
/// 14. After the backend value is dropped and made anew (a restart), 1 to 13 hold for workloads made before.
/// 15. No verb waits for another workload's verb; memory per workload is bounded.
#[async_trait]
pub trait Backend: fmt::Debug + Send + Sync + 'static {
    /// Its configured name.
    fn name(&self) -> &BackendName;
    /// Its kind: `local`, `dind`, `k8sjob`, `fake`.
    fn kind(&self) -> &'static str;
    /// What it can honour.
    fn capabilities(&self) -> Capabilities;
    /// What of `spec` it cannot honour, beyond what [`Backend::capabilities`] can express: a violation per field. Pure;
    /// asked at admission, of specs that are valid and within the capabilities.
    fn objections(&self, spec: &RunSpec) -> Vec<FieldViolation> {
        let _ = spec;
        Vec::new()
    }
    /// Largest number of attempts at once.
    fn slots(&self) -> usize;
    /// Whether it takes work now.
    async fn health(&self) -> Result<Health, BackendError>;
    /// The reference of an attempt's workload. Pure; stored before `ensure` is called.
    fn workload_ref(&self, attempt: AttemptId) -> WorkloadRef;
    /// Makes the attempt's workload exist and run: image, inputs, start.
    async fn ensure(&self, attempt: &AttemptContext) -> Result<WorkloadRef, BackendError>;
    /// Replays what is known from `cursor`, then follows to the end. Drives publishing.
    fn observe(
        &self,
        attempt: &AttemptContext,
        cursor: u64,
    ) -> BoxStream<'static, Result<Observation, BackendError>>;
    /// Sends input. Returns when the workload's side has taken it over.
    async fn input(&self, workload: &WorkloadRef, input: WorkloadInput) -> Result<(), BackendError>;
    /// Says that log frames before `offset` are durable elsewhere.
    async fn release(&self, workload: &WorkloadRef, offset: u64) -> Result<(), BackendError>;
    /// Asks for the end, then forces it after `grace`. Returns when the workload is proven dead.
    async fn stop(&self, workload: &WorkloadRef, grace: Duration) -> Result<(), BackendError>;
    /// Removes everything that the attempt left on the substrate.
    async fn remove(&self, workload: &WorkloadRef) -> Result<(), BackendError>;
    /// Every workload with this service's ownership mark.
    async fn list(&self) -> Result<Vec<WorkloadRef>, BackendError>;
}

/// The run that a workload belongs to.
impl WorkloadRef {
    /// Its run.
    pub fn run(&self) -> RunId {
        self.attempt.run
    }
}
