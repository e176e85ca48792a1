//! The object store on S3 and on Google's XML API, below a prefix: passes the suite.

use std::sync::Arc;

use runner_artifacts::object::open_url;
use runner_core::{artifact::ArtifactStore, clock};
use runner_tests::{
    artifact::ArtifactPlace,
    artifact_conformance,
    objects::{Dialect, StoreServer},
};

/// A server that speaks S3, or else Google's dialect. The credentials of Google's emulator cannot sign, so that there are no
/// direct requests there.
struct Served<const S3: bool>(StoreServer);

impl<const S3: bool> ArtifactPlace for Served<S3> {
    const DURABLE: bool = true;
    const LONGEST_KEY: usize = 1000;
    const DIRECT_SERVED: bool = S3;
    const DIRECT_READ: bool = S3;
    const DIRECT_CREATE: bool = S3;

    fn new() -> Self {
        Self(StoreServer::start(if S3 { Dialect::S3 } else { Dialect::Google }))
    }

    fn open(&self) -> Arc<dyn ArtifactStore> {
        open_url(&self.0.url("a/prefix"), &self.0.options(), &clock::system().0).unwrap()
    }

    fn leftovers(&self) -> Vec<String> {
        self.0.bucket().uploads()
    }
}

mod s3 {
    use super::*;
    artifact_conformance!(Served<true>);
}

mod gcs {
    use super::*;
    artifact_conformance!(Served<false>);
}
