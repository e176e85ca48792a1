//! The object store on Azure Blob Storage, as Azurite plays it: passes the suite.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use runner_artifacts::object::open_url;
use runner_core::{artifact::ArtifactStore, clock};
use runner_tests::{artifact::ArtifactPlace, artifact_conformance, objects::azurite::Azurite};

/// A prefix of its own in the one container.
struct Place(Arc<Azurite>, u64);

impl ArtifactPlace for Place {
    const DURABLE: bool = true;
    const LONGEST_KEY: usize = 1000;
    const BACKSLASH: bool = false;
    // Azurite has the account in the path, as no real store has; `object_store` signs for that at one fixed address only.
    const DIRECT_SERVED: bool = false;

    fn missing() -> Option<String> {
        Azurite::shared().is_none().then(|| "Azurite is not installed; `cargo xtask test` does so".to_owned())
    }

    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(Azurite::shared().unwrap(), NEXT.fetch_add(1, Ordering::Relaxed))
    }

    fn open(&self) -> Arc<dyn ArtifactStore> {
        open_url(&self.0.url(&format!("p{}", self.1)), &self.0.options(), &clock::system().0).unwrap()
    }

    fn leftovers(&self) -> Vec<String> {
        // Blocks that no list names are not to be seen, and the store drops them after a week.
        Vec::new()
    }
}

artifact_conformance!(Place);
