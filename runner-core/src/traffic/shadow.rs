//! Shadows: which runs are executed on another backend too, so that the two can be compared before any traffic is moved.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{Asked, Backends, DecidedBy, Match, Policy, Share, bucket};
use crate::{
    id::{BackendName, RunId},
    spec::RunSpec,
};

/// Which runs have a shadow: a second execution of the same spec, on another backend, after the run itself has ended. Its result is
/// compared with the run's and given to no caller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shadows {
    /// Where shadows run.
    pub backend: BackendName,
    /// Of the runs that are meant, so many. A run is sampled by its id, whatever the splits say, so the answer for it is always
    /// the same, and raising the share only adds runs.
    pub percent: Share,
    /// Most shadows at once. From 1 to [`Shadows::MAX_AT_ONCE`].
    #[serde(default = "two")]
    pub at_once: u32,
    /// Which runs are meant. Nothing said: all.
    #[serde(default, rename = "match", skip_serializing_if = "is_everything")]
    pub matches: Match,
    /// Only runs that one of these rules of the policy has placed. Empty: whatever has placed them.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub rules: BTreeSet<String>,
    /// A shadow that found no room for so long, in seconds, after its primary's end is given up. From a second to 30 days.
    #[serde(default = "an_hour")]
    pub patience_seconds: u64,
}

const fn two() -> u32 {
    2
}

const fn an_hour() -> u64 {
    3600
}

fn is_everything(matches: &Match) -> bool {
    *matches == Match::default()
}

/// Why a run that was sampled has no shadow, or its shadow was never executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoShadow {
    /// Its spec does not say that executing it twice is harmless.
    NotIdempotent,
    /// It takes input from its caller while it runs, which a shadow would not get.
    Interactive,
    /// It went to the shadow's own backend.
    SameBackend,
    /// The shadow's backend is not configured any more.
    Unknown,
    /// The shadow's backend is drained.
    Drained,
    /// The shadow's backend cannot honour the spec.
    Incapable,
    /// The policy names no shadows, or another backend for them, by now.
    Withdrawn,
    /// Its inputs are gone.
    InputsGone,
    /// There was no room for it in time.
    Late,
    /// What is stored of its primary does not decode.
    Unreadable,
}

impl NoShadow {
    /// Every reason.
    pub const ALL: [Self; 10] = [
        Self::NotIdempotent,
        Self::Interactive,
        Self::SameBackend,
        Self::Unknown,
        Self::Drained,
        Self::Incapable,
        Self::Withdrawn,
        Self::InputsGone,
        Self::Late,
        Self::Unreadable,
    ];

    /// Its name in metrics and documents.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotIdempotent => "not_idempotent",
            Self::Interactive => "interactive",
            Self::SameBackend => "same_backend",
            Self::Unknown => "unknown_backend",
            Self::Drained => "drained",
            Self::Incapable => "incapable",
            Self::Withdrawn => "withdrawn",
            Self::InputsGone => "inputs_gone",
            Self::Late => "late",
            Self::Unreadable => "unreadable",
        }
    }
}

/// What was decided about the shadow of a run that was sampled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shadowing {
    /// It is to have one, there.
    On(BackendName),
    /// It has none.
    No(NoShadow),
}

impl Shadows {
    /// The most that a policy may ask for at once.
    pub const MAX_AT_ONCE: u32 = 256;

    /// Whether a run is sampled. Its bucket has nothing to do with that of a split: the two sample independently.
    pub fn samples(&self, salt: &str, run: RunId) -> bool {
        bucket(salt, &format!("shadow/{run}")) < self.percent.hundredths()
    }

    /// Whether the runs that are meant include this one.
    fn means(&self, by: &DecidedBy, asked: Asked<'_>) -> bool {
        let rule = match by {
            DecidedBy::Rule(rule) => self.rules.contains(rule),
            DecidedBy::Spec | DecidedBy::Configuration | DecidedBy::Default => false,
        };
        (self.rules.is_empty() || rule) && self.matches.matches(asked.tenant, asked.spec)
    }
}

fn forbids(spec: &RunSpec) -> Option<NoShadow> {
    if !spec.idempotent {
        return Some(NoShadow::NotIdempotent);
    }
    (spec.stdin || spec.terminal.is_some()).then_some(NoShadow::Interactive)
}

/// Decides about the shadow of a run that goes to `backend`. `None`: the run is not sampled.
pub(super) fn shadowing(
    policy: &Policy,
    backends: &impl Backends,
    asked: Asked<'_>,
    by: &DecidedBy,
    backend: &BackendName,
) -> Option<Shadowing> {
    let shadows = policy.shadow.as_ref()?;
    if !shadows.samples(&policy.salt, asked.run) || !shadows.means(by, asked) {
        return None;
    }
    if *backend == shadows.backend {
        return Some(Shadowing::No(NoShadow::SameBackend));
    }
    if let Some(why) = forbids(asked.spec) {
        return Some(Shadowing::No(why));
    }
    Some(match backends.candidate(&shadows.backend, asked.spec) {
        None => Shadowing::No(NoShadow::Unknown),
        Some(candidate) if !candidate.lacks.is_empty() => Shadowing::No(NoShadow::Incapable),
        Some(candidate) if candidate.drained => Shadowing::No(NoShadow::Drained),
        // One that does not answer now may do so when the run has ended.
        Some(_) => Shadowing::On(shadows.backend.clone()),
    })
}

#[cfg(test)]
#[path = "shadow_tests.rs"]
mod tests;
