//! The guard: whether a canary does worse than its baseline, as a sequential test that may be looked at after every run.

use serde::{Deserialize, Serialize};

use super::Share;
use crate::outcome::Cause;

/// When a canary is rolled back without an operator.
///
/// Within each window a canary is compared with the baseline of its split, over the runs that were admitted since an operator last
/// changed the policy or a ramp. Only what the user cannot cause counts; see [`is_infrastructure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guard {
    /// Length of a window in seconds, by the wall clock. What came before it is forgotten, so that a canary that was good for long is
    /// still caught soon. From a minute to 30 days.
    #[serde(default = "an_hour")]
    pub window_seconds: u64,
    /// How often, at most, a canary that is no worse is rolled back: by chance, for each window and each thing compared. Above 0 %, at most 50 %.
    #[serde(default = "one_percent")]
    pub error_percent: Share,
    /// Runs of the canary before anything is decided.
    #[serde(default = "ten")]
    pub min_runs: u64,
    /// Where set, a run that began later than this after it was admitted counts as slow, and slow runs are compared like failed ones.
    #[serde(default)]
    pub slow_start_seconds: Option<u64>,
}

const fn an_hour() -> u64 {
    3600
}

fn one_percent() -> Share {
    Share::ONE_PERCENT
}

const fn ten() -> u64 {
    10
}

impl Default for Guard {
    fn default() -> Self {
        Self {
            window_seconds: an_hour(),
            error_percent: one_percent(),
            min_runs: ten(),
            slow_start_seconds: None,
        }
    }
}

/// Whether an attempt that ended so says something of its backend, and nothing of the user's program.
pub const fn is_infrastructure(cause: Cause) -> bool {
    match cause {
        Cause::Image
        | Cause::Input
        | Cause::Output
        | Cause::Unschedulable
        | Cause::Evicted
        | Cause::Backend
        | Cause::Lost => true,
        Cause::Exited | Cause::OomKilled | Cause::TimedOut | Cause::Cancelled => false,
    }
}

/// The weight of what is thought of a rate before the first outcome: as many failures as this, and as many successes. The paper's
/// choice (see [`Evidence`]), which loses the least whatever the rate is.
const PRIOR: f64 = 0.18;

/// How often something happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Of so many runs.
    pub runs: u64,
    /// In so many of them.
    pub failures: u64,
}

#[allow(clippy::cast_precision_loss, reason = "numbers of runs of one window")]
impl Tally {
    fn add(&mut self, failed: bool) {
        self.runs += 1;
        self.failures += u64::from(failed);
    }

    fn rate(self) -> f64 {
        (self.failures as f64 + PRIOR) / (self.runs as f64 + 2.0 * PRIOR)
    }

    fn log_likelihood(self, rate: f64) -> f64 {
        let (failures, runs) = (self.failures as f64, self.runs as f64);
        failures * rate.ln() + (runs - failures) * (1.0 - rate).ln()
    }
}

/// Evidence that a canary fails more often than its baseline.
///
/// The method is the test of two Bernoulli streams by e-variables of Turner, Ly and Grünwald, "Generic E-variables for exact sequential
/// k-sample tests that allow for optional stopping" (Journal of Statistical Planning and Inference 230, 2024), one-sided, with a plug-in
/// alternative. Outcomes are taken in blocks: one of the canary, with those of the baseline since the block before. For each block the
/// evidence is multiplied by the likelihood of its outcomes if the two had the rates that the blocks *before* it suggest, over their
/// likelihood if both had the common rate nearest to these. Where the canary's rate is not above the baseline's, each factor has an
/// expectation of at most 1; so, by Ville's inequality, the evidence ever reaches `1/α` with a probability of at most `α`, however
/// often it is looked at.
///
/// How soon it reaches 100 (`α` = 1 %) at equal traffic, in runs of the canary, for 95 % of trials (a test holds it to these): 13 where everything fails and
/// nothing did before, 100 for 30 % after 1 %, 500 for 40 % after 20 %, 1,200 for 20 % after 10 %, 2,500 for 10 % after 5 %.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Evidence {
    baseline: Tally,
    canary: Tally,
    /// Of the baseline, since the last block.
    waiting: Tally,
    /// Its natural logarithm.
    log: f64,
}

impl Evidence {
    /// A run of the baseline ended.
    pub fn add_baseline(&mut self, failed: bool) {
        self.waiting.add(failed);
    }

    /// A run of the canary ended.
    pub fn add_canary(&mut self, failed: bool) {
        let mut canary = Tally::default();
        canary.add(failed);
        let baseline = std::mem::take(&mut self.waiting);
        let (old, new) = (self.baseline.rate(), self.canary.rate());
        if baseline.runs > 0 && new > old {
            #[allow(clippy::cast_precision_loss, reason = "a number of runs of one window")]
            let runs = baseline.runs as f64;
            let common = (runs * old + new) / (runs + 1.0);
            self.log += baseline.log_likelihood(old) + canary.log_likelihood(new);
            self.log -= baseline.log_likelihood(common) + canary.log_likelihood(common);
        }
        self.baseline.runs += baseline.runs;
        self.baseline.failures += baseline.failures;
        self.canary.add(failed);
    }

    /// What was seen of the baseline.
    pub const fn baseline(&self) -> Tally {
        Tally {
            runs: self.baseline.runs + self.waiting.runs,
            failures: self.baseline.failures + self.waiting.failures,
        }
    }

    /// What was seen of the canary.
    pub const fn canary(&self) -> Tally {
        self.canary
    }

    /// Whether it is worse, wrongly said so with a probability of at most `error`.
    pub fn is_worse(&self, error: Share) -> bool {
        let error = f64::from(error.hundredths()) / f64::from(Share::ALL.hundredths());
        error > 0.0 && self.log >= -error.ln()
    }
}

#[cfg(test)]
#[path = "guard_tests.rs"]
mod tests;
