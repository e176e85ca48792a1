//! The workload runner service: configuration, surfaces, and how the parts become one process.

pub mod auth;
pub mod config;
pub mod convert;
pub mod metrics;
pub mod ops;
pub mod server;
pub mod status;
pub mod telemetry;
