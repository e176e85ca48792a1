//! What backends share that execute attempts by way of the shim: what its records mean, and what a backend holds of an
//! attempt.
//!
//! [`judge`] turns what was seen into the outcome of an attempt. A backend finds out what was seen, on its own substrate; what
//! follows from it is decided here, so that it is the same on every backend.

mod config;
mod judge;
mod known;

pub use self::{
    config::{DefaultUser, InvalidConfig},
    judge::{Counted, Ending, PublishFailure, PublishRecord, Seen, judge},
    known::{Known, Staging, StagingSwitch},
};
