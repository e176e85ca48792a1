//! The workload runner service: configuration, surfaces, and how the parts become one process.

pub mod agents;
pub mod auth;
pub mod blob;
pub mod config;
pub mod convert;
pub mod grpc;
pub mod metrics;
pub mod ops;
pub mod serve;
pub mod server;
pub mod status;
pub mod surfaces;
pub mod telemetry;
