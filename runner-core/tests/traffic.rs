//! Where new runs go, over the fakes: two backends side by side, and an operator who moves traffic between them.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use runner_core::{
    backend::BackendErrorKind,
    clock::{SystemClock, SystemIds},
    fake::{
        artifact::MemoryArtifacts,
        backend::{FakeBackend, FakeSubstrate},
        log::MemoryLogs,
        store::MemoryStore,
    },
    id::{BackendName, RunId},
    limits::Limits,
    role::Role,
    service::{
        Caller, GuardReport, GuardVerdict, NoMeter, Options, Parts, RunRequest, RunService, ServiceError,
        TrafficChange,
    },
    spec::RunSpec,
    store::{RunFilter, RunRecord, StoredTraffic},
    traffic::{
        Canary, Change, DecidedBy, Guard, PassedOver, Policy, RampOrder, RampStatus, RampStep, Share, Split,
        Sticky, Target,
    },
};

/// Longer than anything here takes; a test that waits for it has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// What outlives a restart of the service.
struct World {
    store: MemoryStore,
    old: FakeSubstrate,
    new: FakeSubstrate,
    policy: Option<Policy>,
}

impl World {
    fn new() -> Self {
        let (old, new) = (FakeSubstrate::new(), FakeSubstrate::new());
        Self { store: MemoryStore::new(), old, new, policy: None }
    }

    async fn start(&self) -> Arc<RunService> {
        self.try_start().await.expect("the service starts")
    }

    async fn try_start(&self) -> Result<Arc<RunService>, ServiceError> {
        let backend = |name: &str, substrate: &FakeSubstrate| -> Arc<dyn runner_core::backend::Backend> {
            Arc::new(FakeBackend::over(self::name(name), substrate.clone()))
        };
        let parts = Parts {
            store: Arc::new(self.store.clone()),
            logs: Arc::new(MemoryLogs::new()),
            artifacts: Arc::new(MemoryArtifacts::new()),
            backends: vec![backend("old", &self.old), backend("new", &self.new)],
            default_backend: name("old"),
            traffic: self.policy.clone(),
            clock: Arc::new(SystemClock::new()),
            ids: Arc::new(SystemIds),
            limits: Limits::default(),
            options: Options {
                min_pause: Duration::from_millis(1),
                health_interval: Duration::from_millis(5),
                guard_interval: Duration::from_millis(20),
                ..Options::default()
            },
            meter: Arc::new(NoMeter),
        };
        RunService::start(parts).await
    }
}

fn name(text: &str) -> BackendName {
    text.parse().unwrap()
}

fn caller() -> Caller {
    Caller { tenant: "default".parse().unwrap(), subject: "ops".to_owned(), roles: Role::ALL.into() }
}

fn share(percent: u16) -> Share {
    Share::from_hundredths(percent * 100).unwrap()
}

/// `old`, with this share for `new`.
fn split(percent: u16) -> Policy {
    let canary = Canary { backend: name("new"), percent: share(percent) };
    let split = Split { sticky: Sticky::Run, baseline: name("old"), canaries: vec![canary] };
    Policy { default: Some(Target::Split(split)), ..Policy::default() }
}

fn canary(service: &RunService) -> Share {
    match &service.traffic().traffic.policy.default {
        Some(Target::Split(split)) => split.share(&name("new")).unwrap(),
        other => panic!("no split: {other:?}"),
    }
}

async fn change(service: &RunService, change: Change) -> Result<Arc<StoredTraffic>, ServiceError> {
    let change = TrafficChange { change, expected: None, reason: "a test".to_owned() };
    service.change_traffic(&caller(), change).await
}

fn refusal<T: std::fmt::Debug>(answer: Result<T, ServiceError>) -> &'static str {
    match answer {
        Err(ServiceError::FailedPrecondition { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

async fn run(service: &RunService, command: &[&str]) -> Result<RunRecord, ServiceError> {
    let command = command.iter().map(|word| (*word).to_owned()).collect();
    let request = RunRequest { spec: RunSpec { command, ..RunSpec::default() }, run_id: None, key: None };
    service.run(&caller(), request).await.map(|(record, _)| record)
}

async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let wait = async {
        loop {
            if let Some(seen) = look().await {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("waited in vain until {what}"))
}

async fn until_ended(service: &RunService, id: RunId) -> RunRecord {
    until("the run has ended", async || {
        let (record, _) = service.get(&caller(), id).await.unwrap();
        record.position.state.is_terminal().then_some(record)
    })
    .await
}

fn ramp(steps: &[(u16, u64)]) -> Change {
    let step = |(percent, millis): &(u16, u64)| RampStep {
        share: share(*percent),
        hold: Duration::from_millis(*millis),
    };
    Change::StartRamp(RampOrder { rule: None, backend: name("new"), steps: steps.iter().map(step).collect() })
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_go_where_the_policy_says_and_what_decided_is_stored_with_them() {
    let service = World::new().start().await;
    let first = run(&service, &["exit", "0"]).await.unwrap();
    assert_eq!((&first.backend, first.backend_reason.as_str()), (&name("old"), "the default backend"));
    let stored = change(&service, Change::SetPolicy(split(40))).await.unwrap();
    assert_eq!(stored.version, 1);
    let mut seen = BTreeSet::new();
    for _ in 0..64 {
        let run = run(&service, &["exit", "0"]).await.unwrap();
        let decision = run.decision.clone().expect("what decided is stored");
        assert_eq!((decision.version, &decision.by), (1, &DecidedBy::Default));
        let expected = if decision.bucket.unwrap() < 4000 { "new" } else { "old" };
        assert_eq!(run.backend, name(expected), "{decision:?}");
        let stored = until_ended(&service, run.id).await;
        assert_eq!((stored.backend, stored.decision), (run.backend.clone(), Some(decision)));
        seen.insert(run.backend);
    }
    // By chance, once in 10¹⁴.
    assert_eq!(seen.len(), 2, "both take runs");
    service.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_backend_finishes_what_it_has_and_takes_nothing_new() {
    let service = World::new().start().await;
    let before = run(&service, &["sleep-until-stopped"]).await.unwrap();
    change(&service, Change::SetPolicy(split(0))).await.unwrap();
    change(&service, Change::Drain(name("old"))).await.unwrap();
    for _ in 0..8 {
        let after = run(&service, &["exit", "0"]).await.unwrap();
        let decision = after.decision.unwrap();
        assert_eq!(
            (after.backend, decision.passed_over),
            (name("new"), vec![(name("old"), PassedOver::Drained)])
        );
    }
    let status = |name: &'static str| {
        let service = Arc::clone(&service);
        async move { service.backends().await.into_iter().find(|backend| backend.name.as_str() == name).unwrap() }
    };
    let old = status("old").await;
    assert_eq!((old.live_runs, old.drained.unwrap().by.as_str()), (1, "ops"), "the one that it had");
    service.cancel(&caller(), before.id, String::new()).await.unwrap();
    until("it is empty", async || (status("old").await.live_runs == 0).then_some(())).await;
    assert_eq!(until_ended(&service, before.id).await.backend, name("old"), "no run changes backends");
    // Nobody is left.
    change(&service, Change::Drain(name("new"))).await.unwrap();
    assert_eq!(refusal(run(&service, &["exit", "0"]).await), "NO_BACKEND");
    change(&service, Change::Undrain(name("old"))).await.unwrap();
    assert_eq!(run(&service, &["exit", "0"]).await.unwrap().backend, name("old"));
    service.shutdown().await;
}

/// Also those that had chosen it before.
#[tokio::test(flavor = "multi_thread")]
async fn once_a_drain_has_answered_no_run_comes_to_its_backend() {
    let service = World::new().start().await;
    change(&service, Change::SetPolicy(split(0))).await.unwrap();
    for _ in 0..20 {
        let callers: Vec<_> = (0..16)
            .map(|_| {
                let service = Arc::clone(&service);
                #[allow(clippy::disallowed_methods, reason = "a test's own tasks")]
                tokio::spawn(async move { run(&service, &["exit", "0"]).await.unwrap() })
            })
            .collect();
        change(&service, Change::Drain(name("old"))).await.unwrap();
        let on_old = async || {
            let filter = RunFilter { backend: Some(name("old")), ..RunFilter::default() };
            let page = service.list(&caller(), filter, None, 1000).await.unwrap();
            assert!(page.next.is_none());
            page.runs.len()
        };
        let before = on_old().await;
        futures::future::join_all(callers).await;
        assert_eq!(on_old().await, before);
        change(&service, Change::Undrain(name("old"))).await.unwrap();
    }
    service.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_does_not_answer_is_passed_over_until_it_does() {
    let world = World::new();
    let service = world.start().await;
    change(&service, Change::SetPolicy(split(100))).await.unwrap();
    let goes_to = async |wanted: &str| {
        until("runs go elsewhere", async || {
            let run = run(&service, &["exit", "0"]).await.unwrap();
            (run.backend == name(wanted)).then_some(run)
        })
        .await
    };
    goes_to("new").await;
    world.new.with_faults(|faults| faults.unhealthy = Some("ill".to_owned()));
    let decision = goes_to("old").await.decision.unwrap();
    assert_eq!(decision.passed_over, [(name("new"), PassedOver::Unhealthy)]);
    world.old.with_faults(|faults| faults.unhealthy = Some("ill".to_owned()));
    goes_to("new").await;
    service.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_changes_to_one_version_one_is_made() {
    let service = World::new().start().await;
    let set = |percent| {
        let change = Change::SetPolicy(split(percent));
        let change = TrafficChange { change, expected: Some(0), reason: "a race".to_owned() };
        let service = Arc::clone(&service);
        async move { service.change_traffic(&caller(), change).await }
    };
    let (one, other) = tokio::join!(set(1), set(2));
    let (winner, loser) = if one.is_ok() { (one, other) } else { (other, one) };
    assert_eq!(winner.unwrap().version, 1);
    assert_eq!(refusal(loser), "VERSION_CONFLICT");
    assert_eq!(service.audit(None, 10).await.unwrap().len(), 1, "what was refused is not in the audit log");
    service.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ramp_goes_on_by_itself_also_over_a_restart() {
    let world = World::new();
    let service = world.start().await;
    change(&service, Change::SetPolicy(split(0))).await.unwrap();
    change(&service, ramp(&[(1, 1), (25, 1), (50, 3_600_000), (100, 1)])).await.unwrap();
    until("the third step has come", async || (canary(&service) == share(50)).then_some(())).await;
    change(&service, Change::AbortRamp).await.unwrap();
    assert_eq!(canary(&service), Share::NONE);
    change(&service, ramp(&[(5, 3_600_000), (100, 1)])).await.unwrap();
    change(&service, Change::PauseRamp).await.unwrap();
    service.shutdown().await;

    let service = world.start().await;
    assert_eq!(canary(&service), share(5), "a paused ramp stays where it is");
    change(&service, Change::AbortRamp).await.unwrap();
    change(&service, ramp(&[(5, 100), (100, 1)])).await.unwrap();
    service.shutdown().await;

    let service = world.start().await;
    until("it has ended", async || {
        let traffic = service.traffic();
        (traffic.traffic.ramp.as_ref()?.status == RampStatus::Finished).then_some(())
    })
    .await;
    assert_eq!(canary(&service), Share::ALL);
    let mut audit = service.audit(None, 100).await.unwrap();
    audit.reverse();
    let steps = audit.iter().filter(|logged| logged.entry.action == "ramp.step");
    assert!(steps.clone().all(|logged| logged.entry.actor == "service"), "{audit:#?}");
    assert_eq!(steps.count(), 2 + 2, "{audit:#?}");
    assert!(audit.iter().zip(1..).all(|(logged, n)| (logged.seq, logged.version) == (n, n)), "{audit:#?}");
    service.shutdown().await;
}

/// `old` and `new` with half each, and a guard.
fn guarded() -> Policy {
    // A window that no test reaches the end of, wherever in it the test begins: 30 days.
    Policy { guard: Some(Guard { window_seconds: 30 * 24 * 3600, ..Guard::default() }), ..split(50) }
}

/// Runs it so often, all at once, until each has ended.
async fn run_many(service: &Arc<RunService>, number: usize, command: &'static [&'static str]) {
    let callers = (0..number).map(|_| async {
        let accepted = run(service, command).await.unwrap();
        until_ended(service, accepted.id).await;
    });
    futures::future::join_all(callers).await;
}

async fn until_guarded(service: &RunService, what: &str, is: impl Fn(&GuardReport) -> bool) -> GuardReport {
    until(what, async || service.guard().into_iter().find(&is)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_whose_backend_fails_is_rolled_back_and_one_that_only_runs_failing_programs_is_not() {
    let world = World::new();
    let service = world.start().await;
    change(&service, Change::SetPolicy(guarded())).await.unwrap();
    let told = until_guarded(&service, "the guard looks", |_| true).await;
    assert_eq!((told.verdict, told.canary_failures.runs), (GuardVerdict::TooLittle, 0), "and says so");
    run_many(&service, 100, &["exit", "1"]).await;
    let seen = |report: &GuardReport| report.canary_failures.runs + report.baseline_failures.runs;
    let told = until_guarded(&service, "it has seen them", |report| seen(report) == 100).await;
    assert_eq!((told.verdict, told.canary_failures.failures), (GuardVerdict::Fine, 0), "{told:?}");
    assert_eq!(canary(&service), share(50));

    world.new.with_faults(|faults| {
        faults.ensure.extend(std::iter::repeat_n((BackendErrorKind::Substrate, false), 1000));
    });
    run_many(&service, 100, &["exit", "0"]).await;
    until("it is rolled back", async || (canary(&service) == Share::NONE).then_some(())).await;
    let audit = service.audit(None, 1).await.unwrap();
    let entry = &audit[0].entry;
    assert_eq!((entry.actor.as_str(), entry.action.as_str()), ("guard", "traffic.rollback"));
    assert!(entry.reason.starts_with("new failed for reasons of infrastructure in "), "{}", entry.reason);
    // An operator who lets it have another try begins anew: what was seen before is nothing to it.
    world.new.with_faults(|faults| faults.ensure.clear());
    change(&service, Change::SetPolicy(guarded())).await.unwrap();
    run_many(&service, 100, &["exit", "0"]).await;
    let told = until_guarded(&service, "it has seen them", |report| seen(report) == 100).await;
    assert_eq!((told.verdict, told.canary_failures.failures), (GuardVerdict::Fine, 0), "{told:?}");
    service.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_guard_knows_is_known_again_after_a_restart() {
    let world = World::new();
    let service = world.start().await;
    change(&service, Change::SetPolicy(guarded())).await.unwrap();
    run_many(&service, 40, &["exit", "0"]).await;
    let seen = |report: &GuardReport| report.canary_failures.runs + report.baseline_failures.runs;
    let before = until_guarded(&service, "it has seen them", |report| seen(report) == 40).await;
    service.shutdown().await;
    let service = world.start().await;
    let after = until_guarded(&service, "it has seen them again", |report| seen(report) == 40).await;
    assert_eq!(after, before);
    service.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_counts_for_the_next_run() {
    let service = World::new().start().await;
    change(&service, Change::SetPolicy(split(0))).await.unwrap();
    change(&service, ramp(&[(100, 3_600_000)])).await.unwrap();
    assert_eq!(run(&service, &["exit", "0"]).await.unwrap().backend, name("new"));
    change(&service, Change::Rollback(None)).await.unwrap();
    assert_eq!(run(&service, &["exit", "0"]).await.unwrap().backend, name("old"));
    assert_eq!(refusal(change(&service, Change::ResumeRamp).await), "RAMP_NOT_PAUSED");
    service.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_configurations_policy_counts_at_the_first_start_only() {
    let mut world = World::new();
    world.policy = Some(split(7));
    let service = world.start().await;
    assert_eq!((service.traffic().version, canary(&service)), (1, share(7)));
    assert_eq!(service.audit(None, 10).await.unwrap()[0].entry.actor, "configuration");
    service.shutdown().await;
    world.policy = Some(split(90));
    let service = world.start().await;
    assert_eq!((service.traffic().version, canary(&service)), (1, share(7)));
    service.shutdown().await;
    // One that names what is not there stops the very first start.
    let mut world = World::new();
    let mut policy = split(7);
    policy.default = Some(Target::Backend(name("nowhere")));
    world.policy = Some(policy);
    let starting = world.try_start().await;
    assert!(matches!(starting, Err(ServiceError::Invalid(_))), "{starting:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_says_why_and_who_made_it_is_kept() {
    let service = World::new().start().await;
    for reason in ["", "  ", &"x".repeat(1025)] {
        let change =
            TrafficChange { change: Change::Drain(name("new")), expected: None, reason: reason.to_owned() };
        let refused = service.change_traffic(&caller(), change).await;
        assert!(
            matches!(&refused, Err(ServiceError::Invalid(bad)) if bad.0[0].field == "reason"),
            "{refused:?}"
        );
    }
    assert_eq!(service.traffic().version, 0, "what is refused changes nothing");
    change(&service, Change::Drain(name("new"))).await.unwrap();
    let audit = service.audit(None, 10).await.unwrap();
    let [logged] = audit.as_slice() else { panic!("{audit:#?}") };
    let entry = &logged.entry;
    assert_eq!((entry.actor.as_str(), entry.action.as_str()), ("ops", "backend.drain"));
    assert_eq!((entry.what.as_str(), entry.reason.as_str()), ("new takes no new runs", "a test"));
    service.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_a_run_would_go_is_told_without_running_it() {
    let service = World::new().start().await;
    change(&service, Change::SetPolicy(split(100))).await.unwrap();
    change(&service, Change::Drain(name("new"))).await.unwrap();
    let spec = RunSpec { command: vec!["exit".to_owned(), "0".to_owned()], ..RunSpec::default() };
    let explained = service.explain(&caller(), None, &spec).unwrap();
    assert_eq!(explained.decision.unwrap().backend, name("old"));
    let seen: Vec<_> = explained.candidates.iter().map(|(name, it)| (name.as_str(), it.drained)).collect();
    assert_eq!(seen, [("new", true), ("old", false)]);
    let bad =
        service.explain(&caller(), None, &RunSpec { command: vec![String::new()], ..RunSpec::default() });
    assert!(matches!(bad, Err(ServiceError::Invalid(_))), "{bad:?}");
    service.shutdown().await;
}
