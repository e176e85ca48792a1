//! How the service behaves where the contract leaves it open.

use std::time::Duration;

use super::Retention;

/// How the service behaves where the contract leaves it open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Time between two comparisons of store and substrate.
    pub reconcile_interval: Duration,
    /// How much later than the shim's own timeout the service's backstop fires.
    pub deadline_slack: Duration,
    /// First wait after a failed verb of the store, the log store or a backend; doubles up to `max_pause`.
    pub min_pause: Duration,
    /// See `min_pause`.
    pub max_pause: Duration,
    /// How often a failed `ensure` for reasons of image or input is repeated within one attempt.
    pub ensure_tries: u32,
    /// How long observation may fail without a break before the attempt is given up as `LOST`.
    pub observe_patience: Duration,
    /// How long storing the outputs of a program that has ended may fail before the attempt ends as `OUTPUT`.
    pub publish_patience: Duration,
    /// Time between two questions to each backend whether it takes work.
    pub health_interval: Duration,
    /// Time between two looks of the guard at the runs that have ended.
    pub guard_interval: Duration,
    /// Time between two looks for room for shadows.
    pub shadow_interval: Duration,
    /// Time between two keep-alives of a silent stream.
    pub keep_alive: Duration,
    /// How long what is kept.
    pub retention: Retention,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            reconcile_interval: Duration::from_secs(60),
            deadline_slack: Duration::from_secs(15),
            min_pause: Duration::from_millis(50),
            max_pause: Duration::from_secs(5),
            ensure_tries: 6,
            observe_patience: Duration::from_secs(600),
            publish_patience: Duration::from_secs(600),
            health_interval: Duration::from_secs(5),
            guard_interval: Duration::from_secs(5),
            shadow_interval: Duration::from_millis(500),
            keep_alive: Duration::from_secs(15),
            retention: Retention::default(),
        }
    }
}
