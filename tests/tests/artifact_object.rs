//! The adapter of the `object_store` crate passes the suite, on the crate's own store in memory.

use std::sync::Arc;

use object_store::memory::InMemory;
use runner_artifacts::object::{ObjectArtifacts, Tuning};
use runner_core::{artifact::ArtifactStore, clock};
use runner_tests::{artifact::ArtifactPlace, artifact_conformance};

struct Adapter(Arc<InMemory>);

impl ArtifactPlace for Adapter {
    const DURABLE: bool = true;

    fn new() -> Self {
        Self(Arc::new(InMemory::new()))
    }

    fn open(&self) -> Arc<dyn ArtifactStore> {
        Arc::new(ObjectArtifacts::new(Arc::clone(&self.0), "", Tuning::default(), &clock::system().0))
    }

    fn leftovers(&self) -> Vec<String> {
        // An upload in parts keeps them in its own value.
        Vec::new()
    }
}

artifact_conformance!(Adapter);
