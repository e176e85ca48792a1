//! The conformance suite of the `Backend` trait: every numbered rule, and what the contract promises of a backend.
//!
//! An implementation brings a [`Harness`] and writes `backend_conformance!(kind, make)`; each case then is a test of its
//! own name. A case that needs a capability which the backend lacks is skipped visibly. Nothing else is ever skipped.

pub mod bench;
pub mod cases;
pub mod dind;
pub mod dind_world;
pub mod fake;
pub mod k8sjob;
pub mod local;
pub mod observed;
pub mod program;
pub mod store;

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use runner_core::{backend::Backend, id::AttemptId, spec::RunSpec};

use self::program::Program;

/// Why a backend cannot be tested on this machine.
#[derive(Debug)]
pub struct Missing(pub String);

impl Missing {
    /// Says that `test` is skipped.
    ///
    /// # Panics
    /// Where `RUNNER_REQUIRE_BACKENDS` names the kind.
    #[allow(clippy::print_stdout, reason = "a skip must be visible in the test's output")]
    pub fn skip(&self, kind: &str, test: &str) {
        let Self(why) = self;
        let required = std::env::var("RUNNER_REQUIRE_BACKENDS").unwrap_or_default();
        assert!(!required.split(',').any(|name| name.trim() == kind), "backend {kind} is required: {why}");
        println!("SKIP backend={kind} case={test} missing={why}");
    }
}

/// What the suite needs of an implementation. A value owns a substrate of its own; dropping it cleans that up, whatever
/// state it is in.
#[async_trait]
pub trait Harness: fmt::Debug + Send + Sync {
    /// The backend as it is now.
    fn backend(&self) -> Arc<dyn Backend>;
    /// Drops the backend and makes it anew over the same substrate and configuration.
    async fn reopen(&mut self);
    /// A spec whose program does this. The harness may set image, command and args, and the network where the backend cannot do
    /// without one; nothing else.
    fn spec(&self, program: &Program) -> RunSpec;
    /// The live processes of an attempt, seen from outside of the backend: those with [`bench::MARK`] in their
    /// environment.
    fn processes(&self, attempt: AttemptId) -> Vec<String>;
    /// How often the attempt's program was started, where the substrate can tell.
    fn starts(&self, attempt: AttemptId) -> Option<u32>;
    /// Names of environment variables that the backend adds to the spec's, with the value where it is fixed.
    fn added_environment(&self) -> Vec<(&'static str, Option<&'static str>)>;
    /// Puts something on the substrate that is not the backend's.
    fn plant_foreign(&self);
    /// Whether it is still there as it was.
    fn foreign_is_intact(&self) -> bool;
    /// What is on the substrate though every workload was removed. Planted things do not count.
    fn leaks(&self) -> Vec<String>;
}

/// Expands to one test per case. `$kind` is the backend's kind, `$make` an `async fn() -> Result<Box<dyn Harness>, Missing>`.
#[macro_export]
macro_rules! backend_conformance {
    ($kind:literal, $make:path) => {
        $crate::backend_cases!($kind, $make);
    };
}

/// One case as a test.
#[doc(hidden)]
#[macro_export]
macro_rules! backend_case {
    ($kind:literal, $make:path, $module:ident, $case:ident, [$($need:ident),*]) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $case() {
            let needs: &[$crate::backend::bench::Need] = &[$((stringify!($need), |can| can.$need)),*];
            $crate::backend::bench::conduct($kind, $make(), stringify!($case), needs, |bench| {
                Box::pin($crate::backend::cases::$module::$case(bench))
            })
            .await;
        }
    };
}
