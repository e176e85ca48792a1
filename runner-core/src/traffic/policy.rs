//! The policy: where new runs go.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{Guard, Shadows, Share, Split, Sticky, unknown_backend};
use crate::{
    id::{BackendName, TenantId},
    role::Role,
    spec::{FieldViolation, InvalidSpec, RunSpec},
};

/// Most rules of a policy.
pub const MAX_RULES: usize = 256;
/// Most tenants, images or labels that one rule names.
const MAX_NAMES: usize = 256;
/// In seconds.
const MONTH: u64 = 30 * 24 * 3600;
/// Most bytes of a text: a salt, a rule's name, an image, a label.
const MAX_TEXT: usize = 1024;

/// Where new runs go. A change never moves a run that was accepted before.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Goes into every bucket. Another salt deals all keys anew.
    #[serde(default)]
    pub salt: String,
    /// The first one that matches decides.
    #[serde(default)]
    pub rules: Vec<Rule>,
    /// What decides where no rule does. `None`: the default backend of the service's configuration.
    #[serde(default)]
    pub default: Option<Target>,
    /// Whose specs may name their backend: those of callers with one of these roles. `None`: everybody's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub explicit_backend: Option<BTreeSet<Role>>,
    /// Rolls a canary back that does worse than its baseline. `None`: nobody does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guard: Option<Guard>,
    /// Executes some runs on another backend too, and compares. `None`: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shadow: Option<Box<Shadows>>,
}

/// Sends some runs elsewhere than the rest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Names it in reasons and in commands. Unique within the policy.
    pub name: String,
    /// Which runs.
    #[serde(default, rename = "match")]
    pub matches: Match,
    /// Where to.
    pub to: Target,
}

/// Which runs a rule is about: those that every part which says something agrees to. One that says nothing matches all.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Match {
    /// Of any of these tenants.
    #[serde(default)]
    pub tenants: BTreeSet<TenantId>,
    /// With any of these images. A `*` at the end stands for any rest.
    #[serde(default)]
    pub images: BTreeSet<String>,
    /// With all of these labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// A backend, or several with a share each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// This one and no other.
    Backend(BackendName),
    /// One of several.
    Split(Split),
}

impl Target {
    /// Its backends.
    pub fn backends(&self) -> Vec<&BackendName> {
        match self {
            Self::Backend(backend) => vec![backend],
            Self::Split(split) => split.backends().collect(),
        }
    }
}

fn image_matches(pattern: &str, image: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => image.starts_with(start),
        None => image == pattern,
    }
}

impl Match {
    /// Whether a run of this tenant, with this spec, is meant.
    pub fn matches(&self, tenant: &TenantId, spec: &RunSpec) -> bool {
        let image = |image: &String| self.images.iter().any(|pattern| image_matches(pattern, image));
        (self.tenants.is_empty() || self.tenants.contains(tenant))
            && (self.images.is_empty() || spec.image.as_ref().is_some_and(image))
            && self.labels.iter().all(|(name, value)| spec.labels.get(name) == Some(value))
    }

    /// Whether everything that `other` matches is matched by this one, as far as one condition can be compared with one.
    fn covers(&self, other: &Self) -> bool {
        // A pattern, read as an image, is the shortest that it matches: so it is told whether another covers it.
        let covered = |image: &String| {
            self.images.iter().any(|pattern| {
                image_matches(pattern, image.trim_end_matches('*'))
                    && (!image.ends_with('*') || pattern.ends_with('*'))
            })
        };
        (self.tenants.is_empty() || (!other.tenants.is_empty() && other.tenants.is_subset(&self.tenants)))
            && (self.images.is_empty() || (!other.images.is_empty() && other.images.iter().all(covered)))
            && self.labels.iter().all(|(name, value)| other.labels.get(name) == Some(value))
    }
}

impl Policy {
    /// The target of a rule; of the policy's default where `rule` is `None`.
    pub fn target(&self, rule: Option<&str>) -> Option<&Target> {
        match rule {
            Some(name) => self.rules.iter().find(|rule| rule.name == name).map(|rule| &rule.to),
            None => self.default.as_ref(),
        }
    }

    /// The split of a rule, or of the policy's default, to change it.
    pub(super) fn split_mut(&mut self, rule: Option<&str>) -> Option<&mut Split> {
        let target = match rule {
            Some(name) => self.rules.iter_mut().find(|rule| rule.name == name).map(|rule| &mut rule.to),
            None => self.default.as_mut(),
        };
        match target {
            Some(Target::Split(split)) => Some(split),
            Some(Target::Backend(_)) | None => None,
        }
    }

    /// Every split.
    pub(super) fn splits_mut(&mut self) -> impl Iterator<Item = &mut Split> {
        let targets = self.rules.iter_mut().map(|rule| &mut rule.to).chain(self.default.as_mut());
        targets.filter_map(|target| match target {
            Target::Split(split) => Some(split),
            Target::Backend(_) => None,
        })
    }

    /// Every split, with the rule that it belongs to; `None`: the default.
    pub fn splits(&self) -> impl Iterator<Item = (Option<&str>, &Split)> {
        let rules = self.rules.iter().map(|rule| (Some(rule.name.as_str()), &rule.to));
        let targets = rules.chain(self.default.iter().map(|target| (None, target)));
        targets.filter_map(|(rule, target)| match target {
            Target::Split(split) => Some((rule, split)),
            Target::Backend(_) => None,
        })
    }

    /// Checks the policy against the backends that there are.
    ///
    /// # Errors
    /// A violation per bad field, named by its place in the document, as `rules[2].to.split.canaries[0].percent`.
    pub fn validate(&self, known: &BTreeSet<BackendName>) -> Result<(), InvalidSpec> {
        let mut check = Check { known, found: Vec::new() };
        check.text("salt", &self.salt);
        if self.rules.len() > MAX_RULES {
            check.add("rules", "TOO_LARGE", format!("there may be at most {MAX_RULES} rules"));
        }
        for (i, rule) in self.rules.iter().enumerate().take(MAX_RULES) {
            let field = format!("rules[{i}]");
            check.text(&format!("{field}.name"), &rule.name);
            let before = &self.rules[..i];
            if rule.name.is_empty() {
                check.add(format!("{field}.name"), "REQUIRED", "a rule needs a name");
            } else if before.iter().any(|other| other.name == rule.name) {
                check.add(format!("{field}.name"), "DUPLICATE", "another rule has this name");
            }
            check.matches(&format!("{field}.match"), &rule.matches);
            if let Some(wider) = before.iter().find(|other| other.matches.covers(&rule.matches)) {
                let what = format!(
                    "nothing ever reaches this rule: {:?} before it matches everything that it does",
                    wider.name
                );
                check.add(format!("{field}.match"), "INVALID", what);
            }
            check.target(&format!("{field}.to"), &rule.to);
        }
        if let Some(default) = &self.default {
            check.target("default", default);
        }
        if let Some(guard) = &self.guard {
            check.guard(guard);
        }
        if let Some(shadow) = &self.shadow {
            check.shadow(shadow, &self.rules);
        }
        if check.found.is_empty() { Ok(()) } else { Err(InvalidSpec(check.found)) }
    }
}

struct Check<'a> {
    known: &'a BTreeSet<BackendName>,
    found: Vec<FieldViolation>,
}

impl Check<'_> {
    fn add(&mut self, field: impl Into<String>, reason: &'static str, description: impl Into<String>) {
        self.push(FieldViolation::new(field, reason, description));
    }

    fn push(&mut self, violation: FieldViolation) {
        const MAX_VIOLATIONS: usize = 100;
        if self.found.len() < MAX_VIOLATIONS {
            self.found.push(violation);
        }
    }

    fn text(&mut self, field: &str, text: &str) {
        if text.len() > MAX_TEXT {
            self.add(field, "TOO_LARGE", format!("may have at most {MAX_TEXT} bytes"));
        }
        if text.chars().any(char::is_control) {
            self.add(field, "INVALID", "may not have control characters");
        }
    }

    fn matches(&mut self, field: &str, matches: &Match) {
        let Match { tenants, images, labels } = matches;
        for (name, number) in [("tenants", tenants.len()), ("images", images.len()), ("labels", labels.len())]
        {
            if number > MAX_NAMES {
                self.add(
                    format!("{field}.{name}"),
                    "TOO_LARGE",
                    format!("may have at most {MAX_NAMES} entries"),
                );
            }
        }
        for image in images.iter().take(MAX_NAMES) {
            let field = format!("{field}.images");
            self.text(&field, image);
            if image.trim_end_matches('*').contains('*') || image.ends_with("**") {
                self.add(field, "INVALID", format!("{image:?}: a `*` may only be the last character"));
            }
        }
        for (name, value) in labels.iter().take(MAX_NAMES) {
            self.text(&format!("{field}.labels"), name);
            self.text(&format!("{field}.labels"), value);
        }
    }

    fn backend(&mut self, field: String, backend: &BackendName) {
        if !self.known.contains(backend) {
            self.push(unknown_backend(field, backend, self.known));
        }
    }

    fn shadow(&mut self, shadow: &Shadows, rules: &[Rule]) {
        self.backend("shadow.backend".to_owned(), &shadow.backend);
        self.matches("shadow.match", &shadow.matches);
        if !(1..=Shadows::MAX_AT_ONCE).contains(&shadow.at_once) {
            self.add("shadow.at_once", "INVALID", format!("must be from 1 to {}", Shadows::MAX_AT_ONCE));
        }
        if !(1..=MONTH).contains(&shadow.patience_seconds) {
            self.add("shadow.patience_seconds", "INVALID", "must be from a second to 30 days");
        }
        for name in shadow.rules.iter().filter(|name| !rules.iter().any(|rule| rule.name == **name)) {
            let name: String = name.chars().take(80).collect();
            self.add("shadow.rules", "INVALID", format!("the policy has no rule {name:?}"));
        }
    }

    fn guard(&mut self, guard: &Guard) {
        if !(60..=MONTH).contains(&guard.window_seconds) {
            self.add("guard.window_seconds", "INVALID", "must be from a minute to 30 days");
        }
        if guard.error_percent == Share::NONE || guard.error_percent > Share::HALF {
            self.add("guard.error_percent", "INVALID", "must be above 0 and at most 50");
        }
        if guard.slow_start_seconds.is_some_and(|seconds| seconds == 0 || seconds > MONTH) {
            self.add("guard.slow_start_seconds", "INVALID", "must be from a second to 30 days");
        }
    }

    fn target(&mut self, field: &str, target: &Target) {
        let split = match target {
            Target::Backend(backend) => return self.backend(format!("{field}.backend"), backend),
            Target::Split(split) => split,
        };
        let field = format!("{field}.split");
        self.backend(format!("{field}.baseline"), &split.baseline);
        if let Sticky::Label(name) = &split.sticky {
            self.text(&format!("{field}.sticky.label"), name);
            if name.is_empty() {
                self.add(format!("{field}.sticky.label"), "REQUIRED", "which label?");
            }
        }
        let canaries = &split.canaries;
        if canaries.is_empty() || canaries.len() > Split::MAX_CANARIES {
            let what = format!("a split has 1 to {} canaries beside its baseline", Split::MAX_CANARIES);
            self.add(format!("{field}.canaries"), "INVALID", what);
        }
        let mut sum = Some(Share::NONE);
        for (i, canary) in canaries.iter().enumerate().take(Split::MAX_CANARIES) {
            let field = format!("{field}.canaries[{i}]");
            self.backend(format!("{field}.backend"), &canary.backend);
            let before =
                std::iter::once(&split.baseline).chain(canaries[..i].iter().map(|other| &other.backend));
            if before.into_iter().any(|other| *other == canary.backend) {
                self.add(format!("{field}.backend"), "DUPLICATE", "is in this split already");
            }
            sum = sum.and_then(|sum| sum.plus(canary.percent));
            if sum.is_none() {
                self.add(
                    format!("{field}.percent"),
                    "TOO_LARGE",
                    "the canaries together get more than 100 %",
                );
            }
        }
    }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
