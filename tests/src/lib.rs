//! Conformance suites as libraries, and what the end-to-end, crash and load tests have in common.

pub mod artifact;
pub mod backend;
pub mod binaries;
pub mod chart;
pub mod cluster;
pub mod crash;
pub mod docker;
pub mod https;
pub mod ill_store;
pub mod log;
pub mod objects;
pub mod place;
pub mod port;
pub mod postgres;
pub mod proc;
pub mod said;
pub mod scene;
pub mod service;
pub mod store;
pub mod witness;
