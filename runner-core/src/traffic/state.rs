//! Everything that decides where new runs go, as one document, and how operators change it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{Policy, Ramp, RampOrder, Share, Target, unknown_backend};
use crate::{clock::Timestamp, id::BackendName, spec::InvalidSpec};

/// Everything that decides where new runs go. One document with one version: whoever changes it says which version it
/// changes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Traffic {
    /// Where new runs go.
    #[serde(default)]
    pub policy: Policy,
    /// Backends that take no new runs.
    #[serde(default)]
    pub drained: BTreeMap<BackendName, Drained>,
    /// The last ramp, whether it still runs or not.
    #[serde(default)]
    pub ramp: Option<Ramp>,
    /// Runs that were admitted before this are nothing to the guard: an operator has looked at them, and decided.
    #[serde(default)]
    pub guarded_from: Timestamp,
}

/// Why a backend takes no new runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drained {
    /// Since when.
    pub since: Timestamp,
    /// Who said so.
    pub by: String,
    /// Why, in their words.
    pub reason: String,
}

/// What an operator, or the service itself, asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Another policy.
    SetPolicy(Policy),
    /// A backend takes no new runs. Those that it has finish there.
    Drain(BackendName),
    /// It takes them again.
    Undrain(BackendName),
    /// A canary's share is to grow step by step.
    StartRamp(RampOrder),
    /// The ramp stays at its step.
    PauseRamp,
    /// It goes on; the step that it was paused at lasts as long as it still had.
    ResumeRamp,
    /// It ends, and the canary gets the share that it had before.
    AbortRamp,
    /// The step's time is over. Asked for by the service itself.
    AdvanceRamp,
    /// Every canary that is this backend gets nothing any more, or every one where it is `None`; a ramp of it ends.
    Rollback(Option<BackendName>),
}

/// Why a change is refused. Nothing changes then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// Bad fields.
    #[error("{0}")]
    Invalid(#[from] InvalidSpec),
    /// Not as things are.
    #[error("{message}")]
    Precondition {
        /// A stable code.
        reason: &'static str,
        /// For people.
        message: String,
    },
}

pub(super) fn refused(reason: &'static str, message: impl Into<String>) -> ChangeError {
    ChangeError::Precondition { reason, message: message.into() }
}

/// Who changes it, and when.
#[derive(Debug, Clone, Copy)]
pub struct By<'a> {
    /// Who.
    pub actor: &'a str,
    /// Why, in their words.
    pub reason: &'a str,
    /// When.
    pub now: Timestamp,
}

impl Change {
    /// Its name in the audit log and in metrics.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::SetPolicy(_) => "traffic.set",
            Self::Drain(_) => "backend.drain",
            Self::Undrain(_) => "backend.undrain",
            Self::StartRamp(_) => "ramp.start",
            Self::PauseRamp => "ramp.pause",
            Self::ResumeRamp => "ramp.resume",
            Self::AbortRamp => "ramp.abort",
            Self::AdvanceRamp => "ramp.step",
            Self::Rollback(_) => "traffic.rollback",
        }
    }
}

impl Traffic {
    /// What it is after a change, and what the change did, for the audit log.
    ///
    /// # Errors
    /// See [`ChangeError`].
    pub fn changed(
        &self,
        change: &Change,
        by: By<'_>,
        known: &BTreeSet<BackendName>,
    ) -> Result<(Self, String), ChangeError> {
        let mut next = self.clone();
        let what = next.change(change, by, known)?;
        Ok((next, what))
    }

    fn change(
        &mut self,
        change: &Change,
        by: By<'_>,
        known: &BTreeSet<BackendName>,
    ) -> Result<String, ChangeError> {
        match change {
            Change::SetPolicy(policy) => {
                policy.validate(known)?;
                if self.ramp.as_ref().is_some_and(Ramp::is_active) {
                    let message =
                        "a ramp is under way and changes the policy itself; abort it first, or roll back";
                    return Err(refused("RAMP_ACTIVE", message));
                }
                self.policy.clone_from(policy);
                self.guarded_from = by.now;
                Ok(format!("{} rules, default: {}", policy.rules.len(), summary(policy.default.as_ref())))
            }
            Change::Drain(backend) => {
                must_know(backend, known)?;
                if self.drained.contains_key(backend) {
                    return Err(refused("ALREADY_DRAINED", format!("{backend} is drained already")));
                }
                let drained =
                    Drained { since: by.now, by: by.actor.to_owned(), reason: by.reason.to_owned() };
                self.drained.insert(backend.clone(), drained);
                Ok(format!("{backend} takes no new runs"))
            }
            // One that is not configured any more may be forgotten, too.
            Change::Undrain(backend) => match self.drained.remove(backend) {
                Some(_) => Ok(format!("{backend} takes runs again")),
                None => Err(refused("NOT_DRAINED", format!("{backend} is not drained"))),
            },
            Change::StartRamp(order) => {
                if self.ramp.as_ref().is_some_and(Ramp::is_active) {
                    return Err(refused("RAMP_ACTIVE", "another ramp is under way"));
                }
                let ramp = Ramp::start(order, &self.policy, by.now)?;
                self.set_share(&ramp);
                let what = ramp.to_string();
                self.ramp = Some(ramp);
                self.guarded_from = by.now;
                Ok(what)
            }
            Change::PauseRamp => self.with_ramp(|ramp| ramp.pause(by.now)),
            Change::ResumeRamp => {
                let what = self.with_ramp(|ramp| ramp.resume(by.now))?;
                self.guarded_from = by.now;
                Ok(what)
            }
            Change::AbortRamp => self.with_ramp(Ramp::abort),
            Change::AdvanceRamp => self.with_ramp(|ramp| ramp.advance(by.now)),
            Change::Rollback(backend) => self.roll_back(backend.as_ref()),
        }
    }

    /// Changes the ramp, and then the policy as the ramp says.
    fn with_ramp(
        &mut self,
        change: impl FnOnce(&mut Ramp) -> Result<(), ChangeError>,
    ) -> Result<String, ChangeError> {
        let mut ramp = self.ramp.take().ok_or_else(|| refused("NO_RAMP", "there is no ramp"))?;
        change(&mut ramp)?;
        self.set_share(&ramp);
        let what = ramp.to_string();
        self.ramp = Some(ramp);
        Ok(what)
    }

    fn set_share(&mut self, ramp: &Ramp) {
        let split = self.policy.split_mut(ramp.rule.as_deref());
        let mut canaries = split.into_iter().flat_map(|split| &mut split.canaries);
        if let Some(canary) = canaries.find(|canary| canary.backend == ramp.backend) {
            canary.percent = ramp.share();
        }
    }

    fn roll_back(&mut self, backend: Option<&BackendName>) -> Result<String, ChangeError> {
        let meant = |name: &BackendName| backend.is_none_or(|backend| backend == name);
        let mut found = Vec::new();
        for split in self.policy.splits_mut() {
            for canary in split.canaries.iter_mut().filter(|canary| meant(&canary.backend)) {
                found.push(format!("{} had {}", canary.backend, canary.percent));
                canary.percent = Share::NONE;
            }
        }
        if found.is_empty() {
            let which = backend.map_or_else(|| "backend".to_owned(), ToString::to_string);
            return Err(refused("NO_CANARY", format!("no {which} is the canary of a split")));
        }
        if let Some(ramp) = self.ramp.as_mut().filter(|ramp| ramp.is_active() && meant(&ramp.backend)) {
            ramp.roll_back();
        }
        Ok(format!("no new runs for canaries: {}", found.join(", ")))
    }
}

fn must_know(backend: &BackendName, known: &BTreeSet<BackendName>) -> Result<(), InvalidSpec> {
    if known.contains(backend) {
        return Ok(());
    }
    Err(InvalidSpec(vec![unknown_backend("backend", backend, known)]))
}

/// A target in a line.
fn summary(target: Option<&Target>) -> String {
    match target {
        None => "the configuration's".to_owned(),
        Some(Target::Backend(backend)) => backend.to_string(),
        Some(Target::Split(split)) => {
            let shares = split.backends().map(|backend| match split.share(backend) {
                Some(share) => format!("{backend} {share}"),
                None => backend.to_string(),
            });
            shares.collect::<Vec<_>>().join(", ")
        }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
