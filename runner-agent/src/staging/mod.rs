//! Moves a run's files: inputs from the object store to where the workload finds them, outputs back.
//!
//! One library for every backend. What holds everywhere:
//!
//! - Every byte is hashed while it streams; what does not match its digest never appears under its name.
//! - Memory does not grow with the size of any file, tree or output. Only the list of a tree's entries is held whole.
//! - Paths are resolved beneath their [`Root`]; links are never followed. Only regular files and directories are staged.
//! - Counts, bytes and depth are capped by [`StagingLimits`].
//! - A manifest is written last: where it exists, everything that it names is stored.
//!
//! [`MountPlan`] says which directories the workload sees and where they lie on the host, [`stage_inputs`] fills them, and
//! [`publish_outputs`] stores what the workload wrote.

pub mod archive;
mod entry_name;
mod error;
mod fetch;
mod https;
mod output;
mod plan;
mod publish;
mod root;
mod roots;
mod select;
mod source;
mod transfer;
mod tree;
mod unpack;
mod walk;

pub use self::{
    error::{StagingError, StagingErrorKind},
    fetch::{InputStaging, StagedInputs, stage_inputs},
    plan::{INPUTS_DIR, MountKind, MountPlan, OUTPUTS_DIR, Place, PlannedMount},
    publish::{OutputPublishing, Published, publish_outputs, read_manifest},
    root::Root,
};

#[cfg(feature = "pod")]
pub(crate) use self::roots::roots;

use runner_core::https::HttpsPolicy;
use serde::{Deserialize, Serialize};

/// Caps on what one attempt may stage. What passes one is refused with [`StagingErrorKind::LimitExceeded`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagingLimits {
    /// All inputs together, in bytes.
    pub input_bytes: u64,
    /// Files and directories of all inputs together.
    pub input_entries: u64,
    /// Files and directories of all outputs together.
    pub output_entries: u64,
    /// Of one output whose spec names no `max_bytes`.
    pub output_bytes: u64,
    /// Names from a tree's or an output's root down to an entry.
    pub depth: usize,
    /// Of one manifest, as stored.
    pub manifest_bytes: u64,
    /// Files on their way at once. Each takes up to about 3 MiB of memory.
    pub parallel: usize,
    /// How many times its own size, and 64 MiB, an archive may unpack to.
    pub archive_ratio: u64,
    /// Inputs by `https`.
    #[serde(default)]
    pub https: HttpsPolicy,
}

impl Default for StagingLimits {
    fn default() -> Self {
        Self {
            input_bytes: 1 << 40,
            input_entries: 1_000_000,
            output_entries: 1_000_000,
            output_bytes: 16 << 30,
            depth: 128,
            manifest_bytes: 512 << 20,
            parallel: 8,
            archive_ratio: 200,
            https: HttpsPolicy::default(),
        }
    }
}
