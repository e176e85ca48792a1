//! runner-tests
