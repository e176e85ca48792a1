//! Conformance suites as libraries, and what the end-to-end, crash and load tests have in common.

pub mod backend;
pub mod log;
pub mod store;
