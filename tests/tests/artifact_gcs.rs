//! The object store on Google's XML API. The emulator's credentials cannot sign, so that there are no direct requests: passes the suite.

use std::sync::Arc;

use runner_artifacts::object::open_url;
use runner_core::{artifact::ArtifactStore, clock};
use runner_tests::{
    artifact::ArtifactPlace,
    artifact_conformance,
    objects::{Dialect, StoreServer},
};

struct Place(StoreServer);

impl ArtifactPlace for Place {
    const DURABLE: bool = true;
    const LONGEST_KEY: usize = 1000;
    const DIRECT_SERVED: bool = false;

    fn new() -> Self {
        Self(StoreServer::start(Dialect::Google))
    }

    fn open(&self) -> Arc<dyn ArtifactStore> {
        open_url(&self.0.url("a/prefix"), &self.0.options(), &clock::system().0).unwrap()
    }

    fn leftovers(&self) -> Vec<String> {
        self.0.bucket().uploads()
    }
}

artifact_conformance!(Place);
