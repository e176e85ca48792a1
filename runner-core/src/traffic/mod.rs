//! Traffic: where new runs go, while two or more backends take them side by side.
//!
//! [`choose`] decides for one run, by a [`Policy`]. [`Traffic`] is the stored whole: the policy, which backends are drained, and
//! the ramp. [`Change`] is how it becomes another. Nothing here reads a clock or a store.

mod guard;
mod policy;
mod ramp;
mod route;
mod shadow;
mod share;
mod split;
mod state;

pub use self::{
    guard::{Evidence, Guard, Tally, is_infrastructure},
    policy::{MAX_RULES, Match, Policy, Rule, Target},
    ramp::{MAX_HOLD, MAX_STEPS, Ramp, RampOrder, RampStatus, RampStep},
    route::{Asked, Backends, Candidate, DecidedBy, Decision, NoBackend, PassedOver, choose},
    shadow::{NoShadow, Shadowing, Shadows},
    share::{InvalidShare, Share},
    split::{BUCKETS, Canary, Split, Sticky, bucket},
    state::{By, Change, ChangeError, Drained, Traffic},
};

use crate::{id::BackendName, spec::FieldViolation};

/// A field that names a backend which is not among those that there are.
fn unknown_backend<'a>(
    field: impl Into<String>,
    backend: &BackendName,
    known: impl IntoIterator<Item = &'a BackendName>,
) -> FieldViolation {
    let known: Vec<&str> = known.into_iter().map(BackendName::as_str).collect();
    let what = format!("there is no backend {:?}; there are {known:?}", backend.as_str());
    FieldViolation::new(field, "INVALID", what)
}
