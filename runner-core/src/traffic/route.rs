//! Chooses the backend of a run, at admission.

use std::{collections::BTreeSet, fmt};

use serde::{Deserialize, Serialize};

use super::{Policy, Shadowing, Target, bucket, shadow::shadowing, unknown_backend};
use crate::{
    id::{BackendName, RunId, TenantId},
    role::{self, Role},
    spec::{FieldViolation, InvalidSpec, RunSpec},
};

/// What is known of the backends when a run is admitted.
pub trait Backends {
    /// The backend of runs about which no policy says anything.
    fn default_backend(&self) -> &BackendName;
    /// What is known of one, as far as this spec goes. `None`: it is not configured.
    fn candidate(&self, backend: &BackendName, spec: &RunSpec) -> Option<Candidate>;
    /// All that are configured.
    fn names(&self) -> impl Iterator<Item = &BackendName>;
}

/// What is known of a backend when a run is admitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Whether it answered when it was last asked.
    pub healthy: bool,
    /// Whether an operator has drained it.
    pub drained: bool,
    /// What the spec needs and it lacks.
    pub lacks: Vec<FieldViolation>,
}

/// What decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecidedBy {
    /// The spec names the backend.
    Spec,
    /// No policy says anything: the default backend of the configuration.
    Configuration,
    /// The policy's default.
    Default,
    /// This rule of the policy.
    Rule(String),
}

/// Why a backend that came first was passed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PassedOver {
    /// It is drained.
    Drained,
    /// It cannot honour the spec.
    Incapable,
    /// It does not answer, and another does.
    Unhealthy,
    /// It is not configured any more.
    Unknown,
}

/// Where a run goes, and why. Stored with the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// Where.
    pub backend: BackendName,
    /// Version of the traffic's state that decided; 0: nothing was ever changed.
    pub version: u64,
    /// What decided.
    pub by: DecidedBy,
    /// The run's bucket, where a split decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bucket: Option<u16>,
    /// Backends that came first, and why they were passed over.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub passed_over: Vec<(BackendName, PassedOver)>,
    /// About a second execution of the run, for comparison. `None`: the run was not sampled for one. No caller is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shadow: Option<Shadowing>,
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.by {
            DecidedBy::Spec => f.write_str("named by the spec")?,
            DecidedBy::Configuration => f.write_str("the default backend")?,
            DecidedBy::Default => write!(f, "policy {}, its default", self.version)?,
            DecidedBy::Rule(rule) => write!(f, "policy {}, rule {rule:?}", self.version)?,
        }
        if let Some(bucket) = self.bucket {
            write!(f, ", bucket {bucket}")?;
        }
        for (backend, why) in &self.passed_over {
            let why = match why {
                PassedOver::Drained => "is drained",
                PassedOver::Incapable => "cannot honour the spec",
                PassedOver::Unhealthy => "does not answer",
                PassedOver::Unknown => "is not configured",
            };
            write!(f, ", {backend} {why}")?;
        }
        Ok(())
    }
}

/// Why no backend takes a run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoBackend {
    /// Those that come into question cannot honour the spec: a violation per field.
    #[error("{0}")]
    Incapable(InvalidSpec),
    /// What the policy or the spec asks for takes no runs now.
    #[error("{0}")]
    Closed(String),
    /// The spec names its backend, and the policy lets nobody with the caller's roles do so.
    #[error("{0}")]
    Denied(String),
}

/// A run that is to be placed.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Whose.
    pub tenant: &'a TenantId,
    /// What its caller is.
    pub roles: &'a BTreeSet<Role>,
    /// Its id.
    pub run: RunId,
    /// What it is.
    pub spec: &'a RunSpec,
}

/// Chooses. The spec's own backend wins, where the policy lets the caller name one; else the first rule that matches; else the policy's default; else the
/// configuration's.
///
/// Of a split's backends the one that has the run's bucket comes first, then the baseline, then the canaries. One that is drained,
/// or cannot honour the spec, is passed over. One that does not answer is passed over where another does; where none
/// answers, the run waits for the one that comes first: an engine that restarts makes runs late, it does not refuse them.
///
/// # Errors
/// [`NoBackend`]: nothing is stored then.
pub fn choose(
    policy: &Policy,
    version: u64,
    backends: &impl Backends,
    asked: Asked<'_>,
) -> Result<Decision, NoBackend> {
    let (by, target) = decider(policy, backends, asked)?;
    let (order, bucket): (Vec<&BackendName>, _) = match &target {
        Target::Backend(backend) => (vec![backend], None),
        Target::Split(split) => {
            let bucket = bucket(&policy.salt, &split.key(asked.tenant, asked.run, asked.spec));
            let first = split.at(bucket);
            let rest = split.backends().filter(|backend| *backend != first);
            (std::iter::once(first).chain(rest).collect(), Some(bucket))
        }
    };
    let standing: Vec<Standing<'_>> =
        order.into_iter().map(|name| Standing::of(name, backends, asked.spec)).collect();
    let open = |standing: &Standing<'_>| standing.out.is_none();
    let answers = |standing: &Standing<'_>| {
        open(standing) && standing.candidate.as_ref().is_some_and(|candidate| candidate.healthy)
    };
    let Some(at) = standing.iter().position(answers).or_else(|| standing.iter().position(open)) else {
        return Err(none(&by, backends, &standing));
    };
    let why = |before: &Standing<'_>| (before.name.clone(), before.out.unwrap_or(PassedOver::Unhealthy));
    let passed_over = standing[..at].iter().map(why).collect();
    let backend = standing[at].name.clone();
    let shadow = shadowing(policy, backends, asked, &by, &backend);
    Ok(Decision { backend, version, by, bucket, passed_over, shadow })
}

/// A backend that comes into question.
struct Standing<'a> {
    name: &'a BackendName,
    candidate: Option<Candidate>,
    /// Why it cannot take the run, whatever the others do.
    out: Option<PassedOver>,
}

impl<'a> Standing<'a> {
    fn of(name: &'a BackendName, backends: &impl Backends, spec: &RunSpec) -> Self {
        let candidate = backends.candidate(name, spec);
        let out = match &candidate {
            None => Some(PassedOver::Unknown),
            Some(candidate) if !candidate.lacks.is_empty() => Some(PassedOver::Incapable),
            Some(candidate) if candidate.drained => Some(PassedOver::Drained),
            Some(_) => None,
        };
        Self { name, candidate, out }
    }

    fn lacks(&self) -> &[FieldViolation] {
        self.candidate.as_ref().map_or(&[], |candidate| candidate.lacks.as_slice())
    }
}

fn decider(
    policy: &Policy,
    backends: &impl Backends,
    asked: Asked<'_>,
) -> Result<(DecidedBy, Target), NoBackend> {
    if let Some(backend) = &asked.spec.routing.backend {
        return match &policy.explicit_backend {
            Some(allowed) if allowed.is_disjoint(asked.roles) => Err(NoBackend::Denied(format!(
                "the policy lets a spec name its backend where the caller is: {}; this one is: {}",
                role::listed(allowed),
                role::listed(asked.roles)
            ))),
            Some(_) | None => Ok((DecidedBy::Spec, Target::Backend(backend.clone()))),
        };
    }
    let rule = policy.rules.iter().find(|rule| rule.matches.matches(asked.tenant, asked.spec));
    Ok(match (rule, &policy.default) {
        (Some(rule), _) => (DecidedBy::Rule(rule.name.clone()), rule.to.clone()),
        (None, Some(target)) => (DecidedBy::Default, target.clone()),
        (None, None) => (DecidedBy::Configuration, Target::Backend(backends.default_backend().clone())),
    })
}

/// None of `standing` takes the run.
fn none(by: &DecidedBy, backends: &impl Backends, standing: &[Standing<'_>]) -> NoBackend {
    if let (DecidedBy::Spec, [Standing { name, candidate: None, .. }]) = (by, standing) {
        let violation = unknown_backend("spec.routing.backend", name, backends.names());
        return NoBackend::Incapable(InvalidSpec(vec![violation]));
    }
    if standing.iter().all(|standing| standing.out == Some(PassedOver::Incapable)) {
        let lacks = standing.iter().flat_map(|standing| {
            standing.lacks().iter().map(|lack| FieldViolation {
                description: format!("backend {}: {}", standing.name, lack.description),
                ..lack.clone()
            })
        });
        return NoBackend::Incapable(InvalidSpec(lacks.collect()));
    }
    let reason = |standing: &Standing<'_>| {
        let name = standing.name;
        match standing.out {
            Some(PassedOver::Drained) => format!("{name} is drained"),
            Some(PassedOver::Incapable) => {
                let lacks = standing.lacks().iter().map(|lack| lack.description.as_str());
                format!("{name} cannot honour the spec ({})", lacks.collect::<Vec<_>>().join("; "))
            }
            Some(PassedOver::Unknown) => format!("{name} is not configured"),
            Some(PassedOver::Unhealthy) | None => format!("{name} does not answer"),
        }
    };
    let reasons: Vec<String> = standing.iter().map(reason).collect();
    NoBackend::Closed(format!("no backend takes the run: {}", reasons.join(", ")))
}

#[cfg(test)]
#[path = "route_tests.rs"]
mod tests;
