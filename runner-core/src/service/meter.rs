//! What the service counts and measures. The composition root decides where the numbers go.

use std::time::Duration;

use crate::{
    id::BackendName,
    outcome::Cause,
    shadow::{DifferenceKind, Pair},
    state::RunState,
    store::StoredTraffic,
    traffic::NoShadow,
};

/// Takes measurements. Implementations MUST NOT block.
#[allow(unused_variables, reason = "a meter takes what interests it")]
pub trait Meter: std::fmt::Debug + Send + Sync + 'static {
    /// A run was accepted. `version` is the traffic's that placed it; 0: none did.
    fn accepted(&self, backend: &BackendName, version: u64) {}
    /// The first attempt of a run began, `duration` after the run was accepted.
    fn begun(&self, backend: &BackendName, version: u64, duration: Duration) {}
    /// The program of the first attempt was seen running, `duration` after the run was accepted.
    fn started(&self, backend: &BackendName, version: u64, duration: Duration) {}
    /// A run was refused. `reason` is one of a fixed set.
    fn refused(&self, reason: &'static str) {}
    /// An attempt spent `duration` in `state`.
    fn phase(&self, backend: &BackendName, state: RunState, duration: Duration) {}
    /// A run ended, `duration` after it was accepted.
    fn ended(&self, backend: &BackendName, version: u64, state: RunState, cause: Cause, duration: Duration) {}
    /// An attempt is tried again.
    fn retried(&self, backend: &BackendName, cause: Cause) {}
    /// Log bytes were taken over from a workload.
    fn log_bytes(&self, bytes: u64) {}
    /// A watcher came (+1) or went (-1).
    fn watchers(&self, change: i64) {}
    /// Live runs, all states.
    fn live_runs(&self, count: usize) {}
    /// The reconciler removed a workload that no live run claims.
    fn orphan_removed(&self, backend: &BackendName) {}
    /// A backend sent its substrate's control plane a request. Both words are of fixed sets.
    fn backend_call(&self, backend: &BackendName, verb: &'static str, resource: &'static str) {}
    /// The traffic has this state now.
    fn traffic(&self, traffic: &StoredTraffic) {}
    /// The traffic was changed. `action` is one of a fixed set.
    fn traffic_changed(&self, action: &'static str) {}
    /// A run that was sampled has no shadow, or its shadow was not executed.
    fn shadow_skipped(&self, why: NoShadow) {}
    /// A shadow was accepted.
    fn shadow_accepted(&self, backend: &BackendName) {}
    /// A run and its shadow were compared. `kinds`: what differs, each kind once.
    fn shadow_compared(&self, pair: &Pair, kinds: &[DifferenceKind]) {}
    /// Stored rows that do not decode, at the last look.
    fn quarantined(&self, rows: usize) {}
}

/// Measures nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoMeter;

impl Meter for NoMeter {}
