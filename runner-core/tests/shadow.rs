//! Shadows, over the fakes: runs that are executed on another backend too, and compared.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use runner_core::{
    backend::{Backend, BackendErrorKind},
    capability::Capabilities,
    clock::{SystemClock, SystemIds},
    fake::{
        artifact::MemoryArtifacts,
        backend::{FakeBackend, FakeSubstrate},
        log::MemoryLogs,
        store::MemoryStore,
    },
    id::{AttemptId, BackendName, RunId},
    limits::{Bound, Limits},
    outcome::Cause,
    role::Role,
    service::{Caller, Meter, Options, Parts, RunRequest, RunService, ServiceError, TrafficChange},
    shadow::{DifferenceKind, Pair, PairFilter, PairRecord, Parity, Stage, Verdict},
    spec::{InputSource, Output, RunSpec},
    store::{RunFilter, Store, StoreError},
    traffic::{Change, Match, NoShadow, Policy, Shadows, Share},
};

/// Longer than anything here takes; a test that waits for it has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// What outlives a restart of the service.
struct World {
    store: MemoryStore,
    logs: MemoryLogs,
    artifacts: Arc<MemoryArtifacts>,
    old: FakeSubstrate,
    new: FakeSubstrate,
    new_slots: usize,
    new_can: Capabilities,
    limits: Limits,
    told: Arc<Told>,
}

/// What the meter was told.
#[derive(Debug, Default)]
struct Told {
    skipped: Mutex<BTreeMap<&'static str, u32>>,
    compared: Mutex<Vec<Vec<DifferenceKind>>>,
    accepted: Mutex<BTreeMap<String, u32>>,
    ended: Mutex<BTreeMap<String, u32>>,
}

impl Meter for Told {
    fn accepted(&self, backend: &BackendName, _: u64) {
        *self.accepted.lock().unwrap().entry(backend.to_string()).or_default() += 1;
    }

    fn ended(&self, backend: &BackendName, _: u64, _: runner_core::state::RunState, _: Cause, _: Duration) {
        *self.ended.lock().unwrap().entry(backend.to_string()).or_default() += 1;
    }

    fn shadow_skipped(&self, why: NoShadow) {
        *self.skipped.lock().unwrap().entry(why.as_str()).or_default() += 1;
    }

    fn shadow_compared(&self, _: &Pair, kinds: &[DifferenceKind]) {
        self.compared.lock().unwrap().push(kinds.to_vec());
    }
}

impl World {
    fn new() -> Self {
        Self {
            store: MemoryStore::new(),
            logs: MemoryLogs::new(),
            artifacts: Arc::new(MemoryArtifacts::new()),
            old: FakeSubstrate::new(),
            new: FakeSubstrate::new(),
            new_slots: 4,
            new_can: Capabilities::all(),
            limits: Limits::default(),
            told: Arc::default(),
        }
    }

    async fn start(&self) -> Arc<RunService> {
        let old = FakeBackend::over(name("old"), self.old.clone());
        let new = FakeBackend::over(name("new"), self.new.clone())
            .with_slots(self.new_slots)
            .with_capabilities(self.new_can.clone());
        let backends: Vec<Arc<dyn Backend>> = vec![Arc::new(old), Arc::new(new)];
        RunService::start(Parts {
            store: Arc::new(self.store.clone()),
            logs: Arc::new(self.logs.clone()),
            artifacts: self.artifacts.clone(),
            backends,
            default_backend: name("old"),
            traffic: None,
            clock: Arc::new(SystemClock::new()),
            ids: Arc::new(SystemIds),
            limits: self.limits.clone(),
            options: Options {
                min_pause: Duration::from_millis(1),
                shadow_interval: Duration::from_millis(2),
                health_interval: Duration::from_millis(5),
                ..Options::default()
            },
            meter: self.told.clone(),
        })
        .await
        .expect("the service starts")
    }

    /// A service that gives every run on `old` a shadow on `new`.
    async fn start_with_shadows(&self) -> Arc<RunService> {
        let service = self.start().await;
        shadow(&service, Some(shadows())).await;
        service
    }

    fn skipped(&self, why: NoShadow) -> u32 {
        self.told.skipped.lock().unwrap().get(why.as_str()).copied().unwrap_or(0)
    }

    /// The pair's record once it has a verdict.
    async fn judged(&self, id: RunId) -> PairRecord {
        until("the pair has a verdict", async || {
            let record = self.store.pair(id).await.unwrap()?;
            record.verdict.is_some().then_some(record)
        })
        .await
    }

    async fn parity(&self, id: RunId) -> Parity {
        match self.judged(id).await.verdict {
            Some(Verdict::Compared(parity)) => *parity,
            other => panic!("not compared: {other:?}"),
        }
    }

    async fn why_not(&self, id: RunId) -> NoShadow {
        match self.judged(id).await.verdict {
            Some(Verdict::Skipped(why)) => why,
            other => panic!("not skipped: {other:?}"),
        }
    }

    /// How often the program of the run's shadow was started.
    fn shadow_starts(&self, id: RunId) -> u32 {
        self.new.starts(AttemptId { run: id.shadow(), number: 1 })
    }
}

fn name(text: &str) -> BackendName {
    text.parse().unwrap()
}

fn caller() -> Caller {
    Caller { tenant: "default".parse().unwrap(), subject: "ops".to_owned(), roles: Role::ALL.into() }
}

fn shadows() -> Shadows {
    Shadows {
        backend: name("new"),
        percent: Share::ALL,
        at_once: 4,
        matches: Match::default(),
        rules: Default::default(),
        patience_seconds: 3600,
    }
}

async fn shadow(service: &RunService, shadow: Option<Shadows>) {
    let policy = Policy { shadow: shadow.map(Box::new), ..Policy::default() };
    change(service, Change::SetPolicy(policy)).await;
}

async fn change(service: &RunService, change: Change) {
    let change = TrafficChange { change, expected: None, reason: "a test".to_owned() };
    service.change_traffic(&caller(), change).await.expect("the change is made");
}

/// A spec of which two executions are harmless.
fn spec(command: &[&str]) -> RunSpec {
    let command = command.iter().map(|word| (*word).to_owned()).collect();
    RunSpec { command, idempotent: true, ..RunSpec::default() }
}

fn writes(path: &str, destination: Option<&str>) -> RunSpec {
    let output = Output {
        path: path.to_owned(),
        glob: false,
        destination: destination.map(|uri| uri.parse().unwrap()),
        required: true,
        max_bytes: None,
    };
    RunSpec { outputs: vec![output], ..spec(&["print", "out", "hello", ";", "write", path, "result"]) }
}

async fn accept(service: &RunService, spec: RunSpec) -> RunId {
    let request = RunRequest { spec, run_id: None, key: None };
    service.run(&caller(), request).await.expect("the run is accepted").0.id
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

async fn until_ended(service: &RunService, id: RunId) {
    until("the run has ended", async || {
        let (record, _) = service.get(&caller(), id).await.unwrap();
        record.position.state.is_terminal().then_some(())
    })
    .await;
}

fn is_unknown<T: std::fmt::Debug>(answer: Result<T, ServiceError>) {
    assert!(matches!(answer, Err(ServiceError::NotFound(_))), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_and_its_shadow_agree_and_no_caller_sees_the_shadow() {
    let world = World::new();
    let service = world.start_with_shadows().await;
    let id = accept(&service, writes("/outputs/f", Some("artifact:uploads/default/results/"))).await;
    let parity = world.parity(id).await;
    assert!(parity.agrees() && parity.log_compared, "{parity:#?}");
    assert_eq!((parity.primary.files, parity.shadow.files), (1, 1));
    assert_eq!(parity.shadow.log.as_ref().unwrap().streams["stdout"].bytes, 5, "{parity:#?}");
    assert!(parity.shadow.phases.running.is_some());
    assert_eq!(world.shadow_starts(id), 1);

    let (primary, attempts) = service.get(&caller(), id).await.unwrap();
    assert_eq!((attempts.len(), &primary.backend), (1, &name("old")));
    let shadow = id.shadow();
    is_unknown(service.get(&caller(), shadow).await);
    is_unknown(service.cancel(&caller(), shadow, String::new()).await);
    is_unknown(service.delete(&caller(), shadow).await);
    let page = service.list(&caller(), RunFilter::default(), None, 10).await.unwrap();
    assert_eq!(page.runs.iter().map(|run| run.id).collect::<Vec<_>>(), [id]);
    let input = InputSource::from_uri(&format!("run:{shadow}")).unwrap();
    let input = runner_core::spec::Input {
        path: "/inputs/x".to_owned(),
        source: input,
        sha256: None,
        mode: None,
        extract: None,
    };
    let request =
        RunRequest { spec: RunSpec { inputs: vec![input], ..spec(&["exit", "0"]) }, run_id: None, key: None };
    let refused = service.run(&caller(), request).await;
    assert!(matches!(refused, Err(ServiceError::Invalid(_))), "{refused:?}");
    let request = RunRequest { spec: spec(&["exit", "0"]), run_id: Some(shadow), key: None };
    let refused = service.run(&caller(), request).await;
    assert!(matches!(&refused, Err(ServiceError::Invalid(bad)) if bad.0[0].field == "run_id"), "{refused:?}");

    // What it stored lies apart, also where its primary stored elsewhere.
    let keys: Vec<_> =
        world.store.get(shadow).await.unwrap().unwrap().outcome.unwrap().outputs.unwrap().entries;
    assert!(keys.iter().all(|entry| entry.key.as_ref().unwrap().as_str().starts_with("shadows/default/")));
    // A backend's numbers are those of what it does for callers.
    assert_eq!(*world.told.accepted.lock().unwrap(), [("old".to_owned(), 1)].into());
    assert_eq!(*world.told.ended.lock().unwrap(), [("old".to_owned(), 1)].into());
    assert_eq!(*world.told.compared.lock().unwrap(), [vec![]]);
    // Nor is there a shadow of the shadow.
    assert_eq!(world.store.pair(shadow).await.unwrap().unwrap().pair.primary, id);
    assert_eq!(world.store.pair(shadow.shadow()).await.unwrap(), None);
    service.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shadow_that_fails_is_a_difference_and_its_primary_knows_nothing_of_it() {
    let world = World::new();
    let service = world.start_with_shadows().await;
    world.new.with_faults(|faults| faults.ensure.extend([(BackendErrorKind::Substrate, false)]));
    let id = accept(&service, writes("/outputs/f", None)).await;
    let parity = world.parity(id).await;
    let kinds = [DifferenceKind::Exit, DifferenceKind::Cause, DifferenceKind::Output, DifferenceKind::Log];
    assert_eq!((parity.kinds(), parity.shadow.cause), (kinds.to_vec(), Cause::Backend));
    let (primary, _) = service.get(&caller(), id).await.unwrap();
    assert!(primary.outcome.unwrap().is_success());
    let listed =
        service.pairs(&PairFilter { differing: true, ..PairFilter::default() }, None, 10).await.unwrap();
    assert_eq!(listed.iter().map(|record| record.pair.primary).collect::<Vec<_>>(), [id]);
    // What is stored of a failed program agrees where both fail alike.
    let id = accept(&service, spec(&["print", "err", "x", ";", "exit", "3"])).await;
    assert!(world.parity(id).await.agrees());
    service.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shadow_begins_after_its_primary_has_ended_and_never_after_a_cancel() {
    let world = World::new();
    let service = world.start_with_shadows().await;
    let id = accept(&service, spec(&["on-term", "exit", "0", "x", ";", "sleep-until-stopped"])).await;
    until("it runs", async || (world.old.starts(AttemptId { run: id, number: 1 }) > 0).then_some(())).await;
    assert_eq!(world.store.pair(id).await.unwrap(), None);
    service.cancel(&caller(), id, "enough".to_owned()).await.unwrap();
    until_ended(&service, id).await;
    assert_eq!(world.store.pair(id).await.unwrap(), None, "a cancelled run has no shadow");
    // One that was cancelled in the queue neither.
    world.old.with_faults(|faults| faults.ensure_delay = Some(PATIENCE));
    let id = accept(&service, spec(&["exit", "0"])).await;
    service.cancel(&caller(), id, "enough".to_owned()).await.unwrap();
    until_ended(&service, id).await;
    assert_eq!(world.store.pair(id).await.unwrap(), None);
    service.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shadows_take_slots_that_nobody_waits_for_and_no_more_than_they_may() {
    let mut world = World::new();
    world.new_slots = 1;
    world.limits.live_runs_per_tenant = 2;
    let service = world.start_with_shadows().await;
    let mut holder = spec(&["sleep-until-stopped"]);
    holder.routing.backend = Some(name("new"));
    let holder = accept(&service, holder).await;
    until("it holds the slot", async || {
        (world.new.starts(AttemptId { run: holder, number: 1 }) > 0).then_some(())
    })
    .await;
    let waiting = accept(&service, spec(&["exit", "0"])).await;
    until_ended(&service, waiting).await;
    assert_eq!(world.store.pair(waiting).await.unwrap().unwrap().stage, Stage::Pending, "there is no room");
    service.cancel(&caller(), holder, String::new()).await.unwrap();
    assert!(world.parity(waiting).await.agrees());

    // One that runs counts against no limit of its tenant.
    let slow = accept(&service, spec(&["sleep", "700"])).await;
    until("its shadow runs", async || (world.shadow_starts(slow) > 0).then_some(())).await;
    let two = [spec(&["sleep-until-stopped"]), spec(&["sleep-until-stopped"])];
    let two = futures::future::join_all(two.map(|spec| accept(&service, spec))).await;
    let third = RunRequest { spec: spec(&["exit", "0"]), run_id: None, key: None };
    let refused = service.run(&caller(), third).await;
    assert!(matches!(refused, Err(ServiceError::Exhausted { .. })), "{refused:?}");
    for id in two {
        service.cancel(&caller(), id, String::new()).await.unwrap();
    }
    assert!(world.parity(slow).await.agrees());
    service.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_shadowed_any_more_says_why() {
    let world = World::new();
    let service = world.start().await;
    // While the backend does not answer, what is to be waits.
    world.new.with_faults(|faults| faults.unhealthy = Some("ill".to_owned()));
    let healthy = async |wanted: bool| {
        until("its health is known", async || {
            let explained = service.explain(&caller(), None, &spec(&["exit", "0"])).unwrap();
            let (_, candidate) =
                explained.candidates.into_iter().find(|(backend, _)| *backend == name("new")).unwrap();
            (candidate.healthy == wanted).then_some(())
        })
        .await;
    };
    healthy(false).await;
    shadow(&service, Some(shadows())).await;
    let waits = async || {
        let id = accept(&service, spec(&["exit", "0"])).await;
        until_ended(&service, id).await;
        assert_eq!(world.store.pair(id).await.unwrap().unwrap().stage, Stage::Pending);
        id
    };
    let late = waits().await;
    shadow(&service, Some(Shadows { patience_seconds: 1, ..shadows() })).await;
    assert_eq!(world.why_not(late).await, NoShadow::Late);
    shadow(&service, Some(shadows())).await;
    let drained = waits().await;
    change(&service, Change::Drain(name("new"))).await;
    assert_eq!(world.why_not(drained).await, NoShadow::Drained);
    change(&service, Change::Undrain(name("new"))).await;
    let withdrawn = waits().await;
    shadow(&service, None).await;
    assert_eq!(world.why_not(withdrawn).await, NoShadow::Withdrawn);
    shadow(&service, Some(shadows())).await;

    // Its input goes between the two.
    let key = "uploads/default/u/files/x".parse().unwrap();
    runner_core::artifact::ArtifactStore::put_bytes(&*world.artifacts, &key, bytes::Bytes::from_static(b"x"))
        .await
        .unwrap();
    let input = runner_core::spec::Input {
        path: "/inputs/x".to_owned(),
        source: InputSource::from_uri(&format!("artifact:{key}")).unwrap(),
        sha256: None,
        mode: None,
        extract: None,
    };
    let reads = RunSpec { inputs: vec![input], ..spec(&["cat", "/inputs/x"]) };
    let gone = accept(&service, reads.clone()).await;
    until_ended(&service, gone).await;
    assert!(service.get(&caller(), gone).await.unwrap().0.outcome.unwrap().is_success());
    runner_core::artifact::ArtifactStore::delete(&*world.artifacts, &key).await.unwrap();
    world.new.with_faults(|faults| faults.unhealthy = None);
    assert_eq!(world.why_not(gone).await, NoShadow::InputsGone);
    assert_eq!(world.store.get(gone.shadow()).await.unwrap(), None);
    let reasons = [NoShadow::Late, NoShadow::Drained, NoShadow::Withdrawn, NoShadow::InputsGone];
    assert_eq!(reasons.map(|why| world.skipped(why)), [1; 4]);
    // Those that were sampled and could never have one are counted at their admission.
    let plain = RunSpec { idempotent: false, ..spec(&["exit", "0"]) };
    let plain = accept(&service, plain).await;
    until_ended(&service, plain).await;
    assert_eq!((world.skipped(NoShadow::NotIdempotent), world.store.pair(plain).await.unwrap()), (1, None));
    service.shutdown().await;
}

/// The defaults that were filled in for one backend are not asked of another.
#[tokio::test(flavor = "multi_thread")]
async fn defaults_are_those_of_the_shadow_s_backend() {
    let mut world = World::new();
    world.limits.pids = Bound { default: Some(7), ceiling: 100 };
    world.new_can.pids_limit = false;
    let service = world.start_with_shadows().await;
    let id = accept(&service, spec(&["exit", "0"])).await;
    assert!(world.parity(id).await.agrees());
    let pids = async |id| world.store.get(id).await.unwrap().unwrap().spec.resources.pids;
    assert_eq!((pids(id).await, pids(id.shadow()).await), (Some(7), None));
    // What a caller asks for is never weakened: there is no shadow.
    let mut asked = spec(&["exit", "0"]);
    asked.resources.pids = Some(9);
    let asked = accept(&service, asked).await;
    until_ended(&service, asked).await;
    assert_eq!((world.skipped(NoShadow::Incapable), world.store.pair(asked).await.unwrap()), (1, None));
    service.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shadow_goes_with_its_primary_whether_it_is_over_or_not() {
    let world = World::new();
    let service = world.start_with_shadows().await;
    let over = accept(&service, writes("/outputs/f", None)).await;
    world.parity(over).await;
    service.delete(&caller(), over).await.unwrap();
    assert_eq!(world.store.get(over.shadow()).await.unwrap(), None);
    assert_eq!(world.store.pair(over).await.unwrap(), None);

    // Its primary does not wait for one that still runs.
    let live = accept(&service, spec(&["sleep", "100"])).await;
    until_ended(&service, live).await;
    world.new.with_faults(|faults| faults.stop_delay = Some(Duration::from_millis(300)));
    let long = spec(&["on-term", "ignore", ";", "sleep", "2000"]);
    let long = accept(&service, long).await;
    until("its shadow runs", async || (world.shadow_starts(long) > 0).then_some(())).await;
    service.delete(&caller(), long).await.unwrap();
    assert_eq!(world.store.get(long).await.unwrap(), None);
    until("the shadow is gone, too", async || {
        world.store.get(long.shadow()).await.unwrap().is_none().then_some(())
    })
    .await;
    assert_eq!(world.store.pair(long).await.unwrap(), None);
    world.parity(live).await;
    service.delete(&caller(), live).await.unwrap();
    until("no workload is left", async || world.new.natives().is_empty().then_some(())).await;
    let prefix = "shadows".parse().unwrap();
    let left: Vec<_> =
        futures::StreamExt::collect(runner_core::artifact::ArtifactStore::list(&*world.artifacts, &prefix))
            .await;
    assert!(left.is_empty(), "{left:?}");
    service.shutdown().await;
}

/// The service stops at every step that it can be told to stop at, as often as there are faults; each step is repeated, none twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_stopped_again_and_again_makes_one_shadow_of_each_run() {
    let world = World::new();
    let mut service = world.start_with_shadows().await;
    let mut ids = Vec::new();
    for round in 0..20 {
        for _ in 0..3 {
            ids.push(accept(&service, spec(&["print", "out", "x", ";", "sleep", "20"])).await);
        }
        tokio::time::sleep(Duration::from_millis(round * 4)).await;
        // The store fails on the way, too.
        world.store.set_fault(Some(StoreError::Unavailable("a test".to_owned())));
        tokio::time::sleep(Duration::from_millis(5)).await;
        world.store.set_fault(None);
        service.shutdown().await;
        service = world.start().await;
    }
    for id in &ids {
        assert!(world.parity(*id).await.agrees());
        assert_eq!(world.shadow_starts(*id), 1);
    }
    assert_eq!(service.pairs(&PairFilter::default(), None, 1000).await.unwrap().len(), ids.len());
    service.shutdown().await;
}
