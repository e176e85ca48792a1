//! runner-store
