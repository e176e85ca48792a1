//! A Docker Engine for tests: started, stopped, killed, suspended and restarted by them, and gone after them.
//!
//! As root where `dockerd` is installed, every test process has an engine of its own, in a [`Place`](crate::place::Place). One
//! is shared by the tests of a process ([`shared`]); a test that disturbs its engine starts another ([`Engine::start`]).

mod engine;
mod front;
mod image;
mod registry;
pub(crate) mod tls;

use std::sync::OnceLock;

pub use self::{
    engine::{Engine, EngineOptions},
    front::{Front, Mood},
    image::TestImage,
    registry::{Account, Registry},
    tls::ClientCertificate,
};
use crate::backend::Missing;

/// The engine that the tests of this process share: without a bridge, so that any number of engines live side by side.
/// Nobody stops, suspends or restarts it. It ends with the process.
///
/// # Errors
/// Where this machine cannot have one.
///
/// # Panics
/// Where it could, and the engine does not come up: that is a failure, not a missing engine.
pub fn shared() -> Result<&'static Engine, Missing> {
    static SHARED: OnceLock<Result<Engine, String>> = OnceLock::new();
    let engine = SHARED.get_or_init(|| match Engine::start(EngineOptions::default()) {
        Ok(engine) => Ok(engine),
        Err(Missing(why)) => Err(why),
    });
    engine.as_ref().map_err(|why| Missing(why.clone()))
}

/// The shared engine, or a visible skip of `test`.
///
/// # Panics
/// As [`shared`]; and where an engine is missing that `RUNNER_REQUIRE_BACKENDS` names.
pub fn shared_or_skip(test: &str) -> Option<&'static Engine> {
    shared().map_err(|missing| missing.skip("dind", test)).ok()
}

/// An engine of the test's own, or a visible skip of `test`.
///
/// # Panics
/// As [`shared_or_skip`].
pub fn start_or_skip(test: &str, options: EngineOptions) -> Option<Engine> {
    Engine::start(options).map_err(|missing| missing.skip("dind", test)).ok()
}
