//! What things are called on the engine, and how what is ours is told from what is not.
//!
//! Names carry the service as well as the attempt: two services may share an engine, and callers choose run ids. The
//! ownership mark is a label, never a name: what has our name and not our labels is somebody else's.

use std::collections::HashMap;

use runner_core::id::{AttemptId, BackendName};
use sha2::{Digest as _, Sha256};

/// The ownership mark: which service.
const INSTANCE: &str = "runner.instance";
/// Which backend of the service.
const BACKEND: &str = "runner.backend";
/// Which attempt.
const ATTEMPT: &str = "runner.attempt";

/// Where the shim and its directory are in a container.
pub(crate) const OWN_DIR: &str = "/.runner";
/// The shim.
pub(crate) const AGENT_PATH: &str = "/.runner/agent";
/// The shim's directory.
pub(crate) const RUN_DIR: &str = "/.runner/run";
/// In the shim's directory: the attempt was stopped by us and no shim will say so.
pub(crate) const STOPPED: &str = "stopped";

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

    /// The container that executes the attempt.
    pub(crate) fn workload(&self, attempt: AttemptId) -> String {
        format!("{}{attempt}", self.prefix)
    }

    /// The container that is never started: the way into volumes that the workload may not write to.
    pub(crate) fn door(&self, attempt: AttemptId) -> String {
        format!("{}{attempt}.door", self.prefix)
    }

    /// A volume, by what it is for: `run`, `in-0`, `out-1`.
    pub(crate) fn volume(&self, attempt: AttemptId, what: &str) -> String {
        format!("{}{attempt}.{what}", self.prefix)
    }

    /// The labels of everything that the attempt has.
    pub(crate) fn labels(&self, attempt: AttemptId) -> HashMap<String, String> {
        [
            (INSTANCE, self.instance.clone()),
            (BACKEND, self.backend.to_string()),
            (ATTEMPT, attempt.to_string()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    /// What to filter by for everything of ours.
    pub(crate) fn filter(&self) -> Vec<String> {
        vec![format!("{INSTANCE}={}", self.instance), format!("{BACKEND}={}", self.backend)]
    }

    /// What to filter by for everything of an attempt.
    pub(crate) fn filter_of(&self, attempt: AttemptId) -> Vec<String> {
        let mut filter = self.filter();
        filter.push(format!("{ATTEMPT}={attempt}"));
        filter
    }

    /// The attempt that something with these labels belongs to. `None`: it is not ours.
    pub(crate) fn owner(&self, labels: &HashMap<String, String>) -> Option<AttemptId> {
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
        Names::new(instance, &"dind".parse().unwrap())
    }

    #[test]
    fn another_service_or_backend_has_other_names_and_owns_nothing_of_ours() {
        let attempt = AttemptId { run: RunId::new(uuid::Uuid::from_u128(7)), number: 2 };
        let (ours, theirs) = (names("a"), names("b"));
        let other = Names::new("a", &"dind-2".parse().unwrap());
        assert!(
            ours.workload(attempt) != theirs.workload(attempt)
                && ours.workload(attempt) != other.workload(attempt)
        );
        assert_eq!(ours.owner(&ours.labels(attempt)), Some(attempt));
        assert_eq!(theirs.owner(&ours.labels(attempt)), None);
        assert_eq!(other.owner(&ours.labels(attempt)), None);
        assert_eq!(ours.owner(&HashMap::new()), None);
    }

    #[test]
    fn names_are_what_an_engine_takes() {
        let attempt = AttemptId { run: RunId::new(uuid::Uuid::from_u128(7)), number: 2 };
        let names = names("a");
        for name in [names.workload(attempt), names.door(attempt), names.volume(attempt, "in-0")] {
            assert!(name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b)), "{name}");
            assert!(name.len() < 100);
        }
    }
}
