//! A split: which of several backends takes a key.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::Share;
use crate::{
    id::{BackendName, RunId, TenantId},
    spec::RunSpec,
};

/// Number of buckets: a share is a number of them.
pub const BUCKETS: u16 = 10_000;

/// What stays on one side of a split. A spec's own sticky key goes before it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sticky {
    /// Each run for itself.
    #[default]
    Run,
    /// All runs of a tenant.
    Tenant,
    /// All runs of a tenant with the same value of this label. A run without it: for itself.
    Label(String),
}

/// A backend that takes a part of the traffic from the baseline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Canary {
    /// Which.
    pub backend: BackendName,
    /// How much.
    pub percent: Share,
}

/// Divides traffic between backends, by key.
///
/// A key's bucket is a number below [`BUCKETS`] and depends on the policy's salt and the key alone. The first canary has the
/// buckets from the lowest one up, the second those from the highest one down, the baseline what lies between. So a canary
/// that gets more takes from the baseline only, one that gets less gives to it only, and no key ever moves between
/// the canaries: each key changes sides at most once while a weight goes from 0 to 100 %.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// What stays together.
    #[serde(default)]
    pub sticky: Sticky,
    /// Takes what the canaries leave.
    pub baseline: BackendName,
    /// One or two.
    pub canaries: Vec<Canary>,
}

impl Split {
    /// The most canaries that a split can have, for the layout that its documentation describes.
    pub const MAX_CANARIES: usize = 2;

    /// The backend of a bucket.
    pub fn at(&self, bucket: u16) -> &BackendName {
        let below = |at: usize| self.canaries.get(at).map_or(0, |canary| canary.percent.hundredths());
        if bucket < below(0) {
            return &self.canaries[0].backend;
        }
        if BUCKETS.saturating_sub(bucket) <= below(1) {
            return &self.canaries[1].backend;
        }
        &self.baseline
    }

    /// The share of a backend. `None`: it is not part of the split.
    pub fn share(&self, backend: &BackendName) -> Option<Share> {
        if *backend == self.baseline {
            let taken = self.canaries.iter().map(|canary| canary.percent.hundredths()).sum();
            return Share::from_hundredths(taken).map(Share::rest);
        }
        self.canaries.iter().find(|canary| canary.backend == *backend).map(|canary| canary.percent)
    }

    /// Its backends: the baseline, then the canaries.
    pub fn backends(&self) -> impl Iterator<Item = &BackendName> {
        std::iter::once(&self.baseline).chain(self.canaries.iter().map(|canary| &canary.backend))
    }

    /// The key that keeps a run on its side. Keys of different kinds, and of different tenants, are different.
    pub fn key(&self, tenant: &TenantId, run: RunId, spec: &RunSpec) -> String {
        if let Some(key) = &spec.routing.sticky_key {
            return format!("key/{tenant}/{key}");
        }
        match &self.sticky {
            Sticky::Tenant => format!("tenant/{tenant}"),
            Sticky::Label(name) => match spec.labels.get(name) {
                Some(value) => format!("label/{tenant}/{}/{name}/{value}", name.len()),
                None => format!("run/{run}"),
            },
            Sticky::Run => format!("run/{run}"),
        }
    }
}

/// The bucket of a key: the first eight bytes of SHA-256 over the salt, a zero byte and the key, modulo [`BUCKETS`]. The
/// remainder makes no bucket more likely than another by more than one in 10¹⁵.
pub fn bucket(salt: &str, key: &str) -> u16 {
    let digest = Sha256::new().chain_update(salt).chain_update([0]).chain_update(key).finalize();
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    u16::try_from(u64::from_be_bytes(first) % u64::from(BUCKETS)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(name: &str) -> BackendName {
        name.parse().unwrap()
    }

    fn split(first: u16, second: u16) -> Split {
        let canary = |backend: &str, hundredths| Canary {
            backend: name(backend),
            percent: Share::from_hundredths(hundredths).unwrap(),
        };
        Split {
            sticky: Sticky::Run,
            baseline: name("base"),
            canaries: vec![canary("one", first), canary("two", second)],
        }
    }

    #[test]
    fn each_backend_has_exactly_as_many_buckets_as_its_share() {
        for (first, second) in [(0, 0), (1, 0), (0, 1), (2500, 2500), (10_000, 0), (0, 10_000), (5000, 5000)]
        {
            let split = split(first, second);
            for backend in split.backends() {
                let buckets = (0..BUCKETS).filter(|bucket| split.at(*bucket) == backend).count();
                assert_eq!(buckets, usize::from(split.share(backend).unwrap().hundredths()), "{backend}");
            }
        }
    }

    #[test]
    fn the_bucket_of_a_key_never_changes() {
        // What is stored with runs, and what operators compare: not to be changed by a release.
        assert_eq!((bucket("", "run/x"), bucket("a", "run/x"), bucket("", "")), (2982, 5350, 3192));
        assert_ne!(bucket("a", "b"), bucket("", "ab"));
    }

    /// At each share, 20,000 keys: within five standard deviations of the binomial distribution, which happens by chance
    /// once in two million. The keys are always the same, so it never does.
    #[test]
    fn shares_are_within_the_binomial_bound() {
        const KEYS: u32 = 20_000;
        for percent in [0u16, 1, 5, 25, 50, 100] {
            let split = split(percent * 100, 0);
            let canary = (0..KEYS)
                .filter(|i| split.at(bucket("salt", &format!("run/{i}"))) == &split.canaries[0].backend)
                .count();
            let (p, keys) = (f64::from(percent) / 100.0, f64::from(KEYS));
            let bound = 5.0 * (keys * p * (1.0 - p)).sqrt();
            let canary = f64::from(u32::try_from(canary).unwrap());
            assert!((canary - keys * p).abs() <= bound, "{percent} %: {canary} of {keys}");
        }
    }

    proptest! {
        #[test]
        fn raising_a_weight_only_moves_keys_towards_its_canary(
            bucket in 0..BUCKETS, before in 0..=10_000u16, more in 0..=10_000u16, other in 0..=10_000u16,
            first in any::<bool>(),
        ) {
            let other = other.min(10_000 - before);
            let after = before.saturating_add(more).min(10_000 - other);
            let at = |weight: u16| if first { split(weight, other) } else { split(other, weight) };
            let raised = if first { "one" } else { "two" };
            let (old, new) = (at(before), at(after));
            let (old, new) = (old.at(bucket), new.at(bucket));
            prop_assert!(old == new || (old.as_str() == "base" && new.as_str() == raised), "{old} to {new}");
        }
    }
}
