//! A ramp: a canary's share grows step by step, each held for a while.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

use super::{ChangeError, Policy, Share, Target, state::refused};
use crate::{
    clock::Timestamp,
    id::BackendName,
    spec::{FieldViolation, InvalidSpec},
};

/// Most steps of a ramp.
pub const MAX_STEPS: usize = 100;
/// The longest that a step may be held: 30 days.
pub const MAX_HOLD: Duration = Duration::from_secs(30 * 24 * 3600);

/// A share, and how long it is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RampStep {
    /// The canary's share.
    pub share: Share,
    /// How long, before the next step.
    pub hold: Duration,
}

/// A ramp to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RampOrder {
    /// The rule whose split it changes; the policy's default where it is `None`.
    pub rule: Option<String>,
    /// The canary.
    pub backend: BackendName,
    /// In this order. Shares never fall.
    pub steps: Vec<RampStep>,
}

/// How far a ramp is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RampStatus {
    /// The step is over at `until`, on the wall clock: a ramp goes on while the service restarts.
    Running {
        /// When the next step begins, or the ramp ends.
        until: Timestamp,
    },
    /// Stays at its step.
    Paused {
        /// What the step still had.
        left: Duration,
    },
    /// All steps were held. The canary keeps its share.
    Finished,
    /// Ended by an operator. The canary has the share that it had before the ramp.
    Aborted,
    /// Ended by a rollback. The canary has nothing.
    RolledBack,
}

/// A ramp, under way or over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ramp {
    /// The rule whose split it changes; the policy's default where it is `None`.
    pub rule: Option<String>,
    /// The canary.
    pub backend: BackendName,
    /// Its steps.
    pub steps: Vec<RampStep>,
    /// Which of them it is at, from 0.
    pub step: usize,
    /// How far it is.
    pub status: RampStatus,
    /// The canary's share before the ramp.
    pub before: Share,
}

impl Ramp {
    /// Begins with the first step.
    pub(super) fn start(order: &RampOrder, policy: &Policy, now: Timestamp) -> Result<Self, ChangeError> {
        let RampOrder { rule, backend, steps } = order;
        let split = match policy.target(rule.as_deref()) {
            Some(Target::Split(split)) => split,
            Some(Target::Backend(_)) | None => {
                let which = rule
                    .as_ref()
                    .map_or("the policy's default".to_owned(), |rule| format!("the rule {rule:?}"));
                return Err(refused("NO_SPLIT", format!("{which} is no split")));
            }
        };
        let canary = split.canaries.iter().find(|canary| canary.backend == *backend);
        let Some(before) = canary.map(|canary| canary.percent) else {
            return Err(refused("NO_CANARY", format!("{backend} is no canary of that split")));
        };
        let others = split.canaries.iter().filter(|canary| canary.backend != *backend);
        let others: u16 = others.map(|canary| canary.percent.hundredths()).sum();
        let mut found = Vec::new();
        let mut add =
            |field: String, reason, what: String| found.push(FieldViolation::new(field, reason, what));
        if steps.is_empty() || steps.len() > MAX_STEPS {
            add("steps".to_owned(), "INVALID", format!("a ramp has 1 to {MAX_STEPS} steps"));
        }
        for (i, step) in steps.iter().enumerate().take(MAX_STEPS) {
            if i > 0 && step.share < steps[i - 1].share {
                add(format!("steps[{i}].share"), "INVALID", "is smaller than the one before".to_owned());
            }
            if step.share.hundredths() + others > Share::ALL.hundredths() {
                let what = "is more than the other canary leaves".to_owned();
                add(format!("steps[{i}].share"), "TOO_LARGE", what);
            }
            if step.hold > MAX_HOLD {
                add(format!("steps[{i}].hold"), "TOO_LARGE", "is more than 30 days".to_owned());
            }
        }
        let Some(first) = steps.first().filter(|_| found.is_empty()) else {
            return Err(InvalidSpec(found).into());
        };
        let status = RampStatus::Running { until: now + first.hold };
        Ok(Self {
            rule: rule.clone(),
            backend: backend.clone(),
            steps: steps.clone(),
            step: 0,
            status,
            before,
        })
    }

    /// Whether it may still change the policy.
    pub const fn is_active(&self) -> bool {
        match self.status {
            RampStatus::Running { .. } | RampStatus::Paused { .. } => true,
            RampStatus::Finished | RampStatus::Aborted | RampStatus::RolledBack => false,
        }
    }

    /// The share that the canary has by it.
    pub fn share(&self) -> Share {
        match self.status {
            RampStatus::Running { .. } | RampStatus::Paused { .. } | RampStatus::Finished => {
                self.steps.get(self.step).map_or(self.before, |step| step.share)
            }
            RampStatus::Aborted => self.before,
            RampStatus::RolledBack => Share::NONE,
        }
    }

    /// When its step is over. `None`: it waits for nobody.
    pub const fn due(&self) -> Option<Timestamp> {
        match self.status {
            RampStatus::Running { until } => Some(until),
            RampStatus::Paused { .. }
            | RampStatus::Finished
            | RampStatus::Aborted
            | RampStatus::RolledBack => None,
        }
    }

    pub(super) fn pause(&mut self, now: Timestamp) -> Result<(), ChangeError> {
        let RampStatus::Running { until } = self.status else {
            return Err(refused("RAMP_NOT_RUNNING", format!("{self}: it cannot be paused")));
        };
        // A wall clock that was set back does not make the step longer than it was to be.
        let hold = self.steps.get(self.step).map_or(Duration::ZERO, |step| step.hold);
        self.status = RampStatus::Paused { left: until.since(now).min(hold) };
        Ok(())
    }

    pub(super) fn resume(&mut self, now: Timestamp) -> Result<(), ChangeError> {
        let RampStatus::Paused { left } = self.status else {
            return Err(refused("RAMP_NOT_PAUSED", format!("{self}: it cannot be resumed")));
        };
        self.status = RampStatus::Running { until: now + left };
        Ok(())
    }

    pub(super) fn abort(&mut self) -> Result<(), ChangeError> {
        if !self.is_active() {
            return Err(refused("RAMP_NOT_ACTIVE", format!("{self}: it cannot be aborted")));
        }
        self.status = RampStatus::Aborted;
        Ok(())
    }

    /// A step that is over makes way for the next, one at a time: a service that was down for two steps holds the second one
    /// whole. Refused before its time, so that of two who ask at once one is heard.
    pub(super) fn advance(&mut self, now: Timestamp) -> Result<(), ChangeError> {
        let due = matches!(self.status, RampStatus::Running { until } if until <= now);
        if !due {
            return Err(refused("RAMP_NOT_DUE", format!("{self}: it is not time for the next step")));
        }
        self.status = match self.steps.get(self.step + 1) {
            Some(next) => {
                self.step += 1;
                RampStatus::Running { until: now + next.hold }
            }
            None => RampStatus::Finished,
        };
        Ok(())
    }

    pub(super) fn roll_back(&mut self) {
        self.status = RampStatus::RolledBack;
    }
}

impl fmt::Display for Ramp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = match self.status {
            RampStatus::Running { .. } => "running",
            RampStatus::Paused { .. } => "paused",
            RampStatus::Finished => "finished",
            RampStatus::Aborted => "aborted",
            RampStatus::RolledBack => "rolled back",
        };
        let (backend, share) = (&self.backend, self.share());
        write!(f, "ramp of {backend}: step {} of {}, {share}, {status}", self.step + 1, self.steps.len())
    }
}
