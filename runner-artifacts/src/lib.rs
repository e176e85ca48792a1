//! runner-artifacts

pub mod log;
