//! What things are called on the cluster, and how what is ours is told from what is not.
//!
//! Names carry the service as well as the attempt: two services may share a namespace, and callers choose run ids. The
//! ownership mark is a set of labels, never a name.

use std::collections::BTreeMap;

use runner_core::id::{AttemptId, BackendName};
use sha2::{Digest as _, Sha256};

/// The ownership mark: which service.
const INSTANCE: &str = "runner.instance";
/// Which backend of the service.
const BACKEND: &str = "runner.backend";
/// Which attempt.
const ATTEMPT: &str = "runner.attempt";
/// What the workload may reach: `none`, `egress`, or a policy's name. Network policies select by it.
pub(crate) const NETWORK: &str = "runner.network";
/// On a Job: it was stopped by us without an agent's help. Microseconds since the epoch.
pub(crate) const STOPPED: &str = "runner.stopped";
/// On a Job that was stopped so: what was there to be stopped, for people.
pub(crate) const STOPPED_SEEN: &str = "runner.stopped-seen";

/// Names everything of one backend.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    instance: String,
    backend: BackendName,
    prefix: String,
}

impl Names {
    pub(crate) fn new(instance: &str, backend: &BackendName) -> Self {
        let digest = Sha256::digest(format!("{instance}\0{backend}"));
        let prefix = format!("runner-{}-", hex::encode(&digest[..4]));
        Self { instance: instance.to_owned(), backend: backend.clone(), prefix }
    }

    /// The Job, and the Secret with its agent's token. A pod's label has this name, too: 63 characters at most.
    pub(crate) fn workload(&self, attempt: AttemptId) -> String {
        format!("{}{}-{}", self.prefix, attempt.run, attempt.number)
    }

    /// The labels of everything that the attempt has.
    pub(crate) fn labels(&self, attempt: AttemptId) -> BTreeMap<String, String> {
        [
            ("app.kubernetes.io/managed-by", "runner".to_owned()),
            (INSTANCE, self.instance.clone()),
            (BACKEND, self.backend.to_string()),
            (ATTEMPT, attempt.to_string()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    /// What to select by for everything of ours.
    pub(crate) fn selector(&self) -> String {
        format!("{INSTANCE}={},{BACKEND}={}", self.instance, self.backend)
    }

    /// The attempt that something with these labels belongs to. `None`: it is not ours.
    pub(crate) fn owner(&self, labels: Option<&BTreeMap<String, String>>) -> Option<AttemptId> {
        let labels = labels?;
        let is = |name: &str, value: &str| labels.get(name).is_some_and(|found| found == value);
        if !is(INSTANCE, &self.instance) || !is(BACKEND, self.backend.as_str()) {
            return None;
        }
        labels.get(ATTEMPT)?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use runner_core::id::RunId;

    use super::*;

    fn names(instance: &str) -> Names {
        Names::new(instance, &"jobs".parse().unwrap())
    }

    #[test]
    fn another_service_or_backend_has_other_names_and_owns_nothing_of_ours() {
        let attempt = AttemptId { run: RunId::new(uuid::Uuid::from_u128(7)), number: 2 };
        let (ours, theirs) = (names("a"), names("b"));
        let other = Names::new("a", &"jobs-2".parse().unwrap());
        assert!(ours.workload(attempt) != theirs.workload(attempt));
        assert!(ours.workload(attempt) != other.workload(attempt));
        assert_eq!(ours.owner(Some(&ours.labels(attempt))), Some(attempt));
        assert_eq!(theirs.owner(Some(&ours.labels(attempt))), None);
        assert_eq!(other.owner(Some(&ours.labels(attempt))), None);
        assert_eq!(ours.owner(None), None);
    }

    #[test]
    fn names_are_what_a_cluster_takes() {
        let attempt = AttemptId { run: RunId::new(uuid::Uuid::from_u128(u128::MAX)), number: u32::MAX };
        let name = names("a").workload(attempt);
        assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'), "{name}");
        assert!(name.len() <= 63, "{name}");
    }
}
