//! What runs beside or around a workload, and the staging library that every backend shares.

pub mod exec;
#[cfg(feature = "staging")]
pub mod staging;
