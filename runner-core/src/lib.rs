//! The domain of the workload runner: what a run is, who drives it, and the traits of everything that it needs.
//!
//! Knows nothing of gRPC, SQL, Docker or Kubernetes. Where to start reading: [`state`] for what can happen to a run,
//! [`backend`], [`store`] and [`log`] for the contracts of the parts, `supervisor` for how they become the life of a run.

pub mod agent;
pub mod artifact;
pub mod backend;
pub mod base64_bytes;
pub mod capability;
pub mod clock;
pub mod crash;
#[cfg(feature = "test-util")]
pub mod fake;
pub mod https;
pub mod id;
pub mod limits;
pub mod log;
pub mod outcome;
pub mod role;
pub mod service;
pub mod shadow;
pub mod spec;
pub mod state;
pub mod store;
pub mod task;
pub mod traffic;
