//! The object store on S3, below a prefix: passes the suite.

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
    const DIRECT_READ: bool = true;
    const DIRECT_CREATE: bool = true;

    fn new() -> Self {
        Self(StoreServer::start(Dialect::S3))
    }

    fn open(&self) -> Arc<dyn ArtifactStore> {
        open_url(&self.0.url("a/prefix"), &self.0.options(), &clock::system().0).unwrap()
    }

    fn leftovers(&self) -> Vec<String> {
        self.0.bucket().uploads()
    }
}

artifact_conformance!(Place);
