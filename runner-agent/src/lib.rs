//! What runs beside or around a workload, and what every backend shares: staging, and the judgement of how an attempt ended.

#[cfg(feature = "staging")]
pub mod backend;
pub mod exec;
#[cfg(feature = "pod")]
pub mod pod;
#[cfg(feature = "staging")]
pub mod staging;
