//! What an agent is told to do: everything that it needs to know of its attempt, in one document.

use runner_core::{
    artifact::ArtifactKey,
    id::{AttemptId, TenantId},
    spec::RunSpec,
};
use serde::{Deserialize, Serialize};

use crate::{exec::protocol::ExecSpec, staging::StagingLimits};

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
    pub limits: StagingLimits,
}

impl Order {
    /// Below which the attempt's outputs go.
    pub fn attempt_prefix(&self) -> ArtifactKey {
        ArtifactKey::attempt_prefix(&self.tenant, self.attempt)
    }
}
