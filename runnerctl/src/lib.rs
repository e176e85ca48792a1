//! runnerctl
