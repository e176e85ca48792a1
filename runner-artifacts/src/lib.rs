//! runner-artifacts
