//! What an agent is told to do: everything that it needs to know of its attempt, in one document.

use runner_core::{
    artifact::ArtifactKey,
    id::{AttemptId, TenantId},
    spec::RunSpec,
};
use serde::{Deserialize, Serialize};

use crate::{exec::protocol::ExecSpec, staging::StagingLimits};

/// The caps of [`StagingLimits`] that hold in a pod. Inputs by `https` are not fetched there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the fields of `StagingLimits`")]
pub struct OrderLimits {
    pub input_bytes: u64,
    pub input_entries: u64,
    pub output_entries: u64,
    pub output_bytes: u64,
    pub depth: usize,
    pub manifest_bytes: u64,
    pub parallel: usize,
    pub archive_ratio: u64,
}

/// The order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Order {
    /// Whose.
    pub attempt: AttemptId,
    /// Whose that is.
    pub tenant: TenantId,
    /// Inputs and outputs.
    pub spec: RunSpec,
    /// What the shim is to execute.
    pub exec: ExecSpec,
    /// Caps on staging.
    pub limits: OrderLimits,
}

impl Order {
    /// Below which the attempt's outputs go.
    pub fn attempt_prefix(&self) -> ArtifactKey {
        ArtifactKey::attempt_prefix(&self.tenant, self.attempt)
    }

    /// The caps, as the staging library takes them.
    pub fn staging_limits(&self) -> StagingLimits {
        let limits = &self.limits;
        StagingLimits {
            input_bytes: limits.input_bytes,
            input_entries: limits.input_entries,
            output_entries: limits.output_entries,
            output_bytes: limits.output_bytes,
            depth: limits.depth,
            manifest_bytes: limits.manifest_bytes,
            parallel: limits.parallel,
            archive_ratio: limits.archive_ratio,
            ..StagingLimits::default()
        }
    }
}

impl From<&StagingLimits> for OrderLimits {
    fn from(limits: &StagingLimits) -> Self {
        Self {
            input_bytes: limits.input_bytes,
            input_entries: limits.input_entries,
            output_entries: limits.output_entries,
            output_bytes: limits.output_bytes,
            depth: limits.depth,
            manifest_bytes: limits.manifest_bytes,
            parallel: limits.parallel,
            archive_ratio: limits.archive_ratio,
        }
    }
}
