//! What a case works with: a backend, a store, attempts, and the check that nothing was left behind.

use std::{collections::BTreeSet, future::Future, pin::Pin, sync::Arc, time::Duration};

use futures::StreamExt as _;
use runner_core::{
    artifact::ArtifactStore,
    backend::{AttemptContext, Backend, BackendError, NoProgress},
    capability::Capabilities,
    clock::{Clock as _, IdGen as _, SystemClock, SystemIds},
    id::{AttemptId, TenantId},
    limits::Limits,
    spec::RunSpec,
};

use super::{Harness, Missing, observed::Observed, program::Program, store::GatedStore};

/// What a case waits at most for anything. Long, because machines are slow; a case that passes never waits for it.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// Name of the environment variable that marks every process of an attempt, so that a harness can find them.
pub const MARK: &str = "RUNNER_TEST_MARK";

/// What a case works with.
#[derive(Debug)]
pub struct Bench {
    harness: Box<dyn Harness>,
    /// Where inputs come from and outputs go to.
    pub store: Arc<GatedStore>,
    /// Whose every attempt is.
    pub tenant: TenantId,
    clock: SystemClock,
    attempts: std::sync::Mutex<BTreeSet<AttemptId>>,
}

impl Bench {
    /// The backend. A case drops what it got before it calls [`Bench::reopen`].
    pub fn backend(&self) -> Arc<dyn Backend> {
        self.harness.backend()
    }

    /// The harness.
    pub fn harness(&self) -> &dyn Harness {
        self.harness.as_ref()
    }

    /// Time on the monotonic clock.
    pub fn now(&self) -> Duration {
        self.clock.monotonic()
    }

    /// Drops the backend and makes it anew, as a restart of the service does.
    pub async fn reopen(&mut self) {
        self.harness.reopen().await;
    }

    /// A new attempt of a new run that executes `program`.
    pub fn attempt(&self, program: &Program) -> AttemptContext {
        self.attempt_with(program, |_| {})
    }

    /// The same, with a changed spec.
    pub fn attempt_with(&self, program: &Program, change: impl FnOnce(&mut RunSpec)) -> AttemptContext {
        let attempt = AttemptId { run: SystemIds.run_id(), number: 1 };
        let mut spec = self.harness.spec(program);
        spec.env.insert(MARK.to_owned(), attempt.to_string());
        change(&mut spec);
        let capabilities = self.backend().capabilities();
        let limits = Limits::default();
        spec.validate(&self.tenant, &limits).expect("a case makes valid specs");
        let lacks = capabilities.lacks(&spec);
        assert!(lacks.is_empty(), "the case needs what its capabilities do not say: {lacks:?}");
        let mut spec = limits.apply(spec, &capabilities);
        spec.timeout = spec.timeout.map(|timeout| timeout.min(DEADLINE));
        self.context(attempt, spec)
    }

    /// The next attempt of the same run.
    pub fn next_attempt(&self, before: &AttemptContext) -> AttemptContext {
        let attempt = AttemptId { run: before.attempt.run, number: before.attempt.number + 1 };
        let mut spec = before.spec.as_ref().clone();
        spec.env.insert(MARK.to_owned(), attempt.to_string());
        self.context(attempt, spec)
    }

    fn context(&self, attempt: AttemptId, spec: RunSpec) -> AttemptContext {
        self.attempts.lock().expect("no case panicked").insert(attempt);
        AttemptContext {
            attempt,
            tenant: self.tenant.clone(),
            spec: Arc::new(spec),
            log_limit_bytes: 1024 * 1024 * 1024,
            artifacts: Arc::clone(&self.store) as Arc<dyn ArtifactStore>,
            progress: Arc::new(NoProgress),
        }
    }

    /// Makes the workload.
    pub async fn ensure(&self, attempt: &AttemptContext) {
        let backend = self.backend();
        let reference = within("ensure", backend.ensure(attempt)).await.expect("ensure");
        assert_eq!(reference, backend.workload_ref(attempt.attempt), "the name is derived from the attempt");
    }

    /// Makes the workload and expects that this fails.
    pub async fn ensure_fails(&self, attempt: &AttemptContext) -> BackendError {
        within("ensure", self.backend().ensure(attempt)).await.expect_err("ensure was to fail")
    }

    /// Observes to the end.
    pub async fn observe(&self, attempt: &AttemptContext, cursor: u64) -> Observed {
        let observed = self.observe_until(attempt, cursor, |_| false).await;
        assert!(observed.ended.is_some(), "the observation ended without Ended: {observed:?}");
        observed
    }

    /// Observes until `enough`, then drops the observation; or to its end.
    pub async fn observe_until(
        &self,
        attempt: &AttemptContext,
        cursor: u64,
        enough: impl Fn(&Observed) -> bool,
    ) -> Observed {
        let mut observed = Observed::new(cursor);
        let mut stream = self.backend().observe(attempt, cursor);
        while let Some(observation) = within("observe", stream.next()).await {
            observed.take(observation.expect("the observation goes on"));
            if enough(&observed) {
                return observed;
            }
        }
        observed
    }

    /// Observes until the log's standard output, or terminal, contains `text`.
    ///
    /// # Panics
    /// Where the workload ended without it.
    pub async fn observe_text(&self, attempt: &AttemptContext, text: &str) -> Observed {
        let has = |observed: &Observed| observed.out().contains(text) || observed.terminal().contains(text);
        let observed = self.observe_until(attempt, 0, has).await;
        assert!(has(&observed), "the program ended without {text:?}: {observed:?}");
        observed
    }

    /// Makes the workload and observes it to its end.
    pub async fn run(&self, attempt: &AttemptContext) -> Observed {
        self.ensure(attempt).await;
        self.observe(attempt, 0).await
    }

    /// Makes the workload and waits until it says that it is ready.
    pub async fn start(&self, attempt: &AttemptContext) -> Observed {
        self.ensure(attempt).await;
        self.observe_text(attempt, super::program::READY).await
    }

    /// Stops it.
    pub async fn stop(&self, attempt: &AttemptContext, grace: Duration) {
        let backend = self.backend();
        let reference = backend.workload_ref(attempt.attempt);
        within("stop", backend.stop(&reference, grace)).await.expect("stop");
        let alive = self.harness.processes(attempt.attempt);
        assert!(alive.is_empty(), "stop returned while these were alive: {alive:?}");
    }

    /// Removes it.
    pub async fn remove(&self, attempt: &AttemptContext) {
        let backend = self.backend();
        let reference = backend.workload_ref(attempt.attempt);
        within("remove", backend.remove(&reference)).await.expect("remove");
    }

    /// The attempts that `list` names.
    pub async fn listed(&self) -> BTreeSet<AttemptId> {
        let backend = self.backend();
        let listed = within("list", backend.list()).await.expect("list");
        let attempts: BTreeSet<_> = listed.iter().map(|reference| reference.attempt).collect();
        assert_eq!(attempts.len(), listed.len(), "no workload is listed twice");
        for reference in &listed {
            assert_eq!(*reference, backend.workload_ref(reference.attempt), "list and workload_ref agree");
        }
        attempts
    }

    /// Removes every attempt and checks that nothing is left.
    async fn finish(self) {
        let Self { harness, attempts, store, .. } = self;
        store.open_gate();
        store.fail_reads(None);
        store.fail_writes(None);
        let backend = harness.backend();
        for attempt in attempts.into_inner().expect("no case panicked") {
            let reference = backend.workload_ref(attempt);
            within("stop", backend.stop(&reference, Duration::ZERO)).await.expect("stop at the end");
            within("remove", backend.remove(&reference)).await.expect("remove at the end");
            let alive = harness.processes(attempt);
            assert!(alive.is_empty(), "left behind by {attempt}: {alive:?}");
        }
        assert_eq!(within("list", backend.list()).await.expect("list"), [], "list names what was removed");
        drop(backend);
        let leaks = harness.leaks();
        assert!(leaks.is_empty(), "left behind on the substrate: {leaks:?}");
    }
}

/// Waits with the suite's deadline.
///
/// # Panics
/// Where it passes.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what} took longer than {DEADLINE:?}"),
    }
}

/// A capability that a case needs: its name, and whether a backend has it.
pub type Need = (&'static str, fn(&Capabilities) -> bool);

/// A case's future.
pub type CaseFuture<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// Conducts one case: makes the backend, skips visibly what it cannot do, runs the case, checks for leftovers.
///
/// # Panics
/// Where the case fails, or where the backend is missing and `RUNNER_REQUIRE_BACKENDS` names it.
#[allow(clippy::print_stdout, reason = "a skip must be visible in the test's output")]
pub async fn conduct(
    kind: &str,
    make: impl Future<Output = Result<Box<dyn Harness>, Missing>>,
    case: &str,
    needs: &[Need],
    run: impl for<'a> FnOnce(&'a mut Bench) -> CaseFuture<'a>,
) {
    let harness = match make.await {
        Ok(harness) => harness,
        Err(missing) => {
            missing.skip(kind, case);
            return;
        }
    };
    let capabilities = harness.backend().capabilities();
    if let Some((name, _)) = needs.iter().find(|(_, has)| !has(&capabilities)) {
        println!("SKIP backend={kind} case={case} capability={name}");
        return;
    }
    let mut bench = Bench {
        harness,
        store: Arc::default(),
        tenant: "conformance".parse().expect("a valid tenant"),
        clock: SystemClock::new(),
        attempts: std::sync::Mutex::default(),
    };
    run(&mut bench).await;
    bench.finish().await;
}
