//! The stable contract of the runner: the generated types and services of `runner.v1`.
//!
//! The proto files under `proto/runner/v1` carry the documentation; what they mean is stated in
//! `docs/contract.md`. Inside `v1`, changes are additive only; a test compares them with the committed baseline.

/// Package `runner.v1`.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    reason = "generated; the proto files carry the documentation"
)]
pub mod v1 {
    tonic::include_proto!("runner.v1");
}

/// Package `runner.agent.v1`: the channel between a workload's agent and the service. Not for callers.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    reason = "generated; the proto files carry the documentation"
)]
pub mod agent {
    tonic::include_proto!("runner.agent.v1");
}

/// The encoded `FileDescriptorSet` of every file of the contract with its imports, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
