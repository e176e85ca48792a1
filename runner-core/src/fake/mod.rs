//! In-memory fakes of the traits, for tests. Each passes the conformance suite of its trait.

pub mod artifact;
pub mod backend;
pub mod log;
mod pairs;
pub mod store;
