//! The life of a run, over the fakes: what the service promises whatever the store, the logs or the backend do.

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;
use runner_core::{
    backend::{Backend, BackendErrorKind, WorkloadInput},
    clock::{SystemClock, SystemIds},
    fake::{
        artifact::MemoryArtifacts,
        backend::{FakeBackend, FakeSubstrate},
        log::MemoryLogs,
        store::MemoryStore,
    },
    id::{AttemptId, BackendName, RunId},
    limits::Limits,
    log::FrameBody,
    outcome::{Cause, ExitStatus},
    role::Role,
    service::{
        Caller, NoMeter, Options, Parts, RunRequest, RunService, ServiceError, StreamBody, StreamCursor,
        StreamItem, StreamOptions,
    },
    spec::{Network, RunSpec},
    state::RunState,
    store::{RunEvent, RunFilter, RunRecord, Store as _, StoreError},
};

/// Longer than anything here takes; a test that waits for it has failed.
const PATIENCE: Duration = Duration::from_secs(30);
const FOLLOW: StreamOptions = StreamOptions { follow: true, logs: true };

/// The parts that outlive a restart of the service.
struct World {
    store: Arc<MemoryStore>,
    logs: Arc<MemoryLogs>,
    artifacts: Arc<MemoryArtifacts>,
    substrate: FakeSubstrate,
    slots: usize,
    limits: Limits,
    options: Options,
}

impl World {
    fn new() -> Self {
        Self {
            store: Arc::new(MemoryStore::new()),
            logs: Arc::new(MemoryLogs::new()),
            artifacts: Arc::new(MemoryArtifacts::new()),
            substrate: FakeSubstrate::new(),
            slots: 8,
            limits: Limits::default(),
            options: Options {
                min_pause: Duration::from_millis(1),
                max_pause: Duration::from_millis(20),
                reconcile_interval: Duration::from_millis(50),
                keep_alive: Duration::from_millis(200),
                ..Options::default()
            },
        }
    }

    fn parts(&self) -> Parts {
        let backend = FakeBackend::over(name("fake"), self.substrate.clone()).with_slots(self.slots);
        Parts {
            store: self.store.clone(),
            logs: self.logs.clone(),
            artifacts: self.artifacts.clone(),
            backends: vec![Arc::new(backend)],
            default_backend: name("fake"),
            traffic: None,
            clock: Arc::new(SystemClock::new()),
            ids: Arc::new(SystemIds),
            limits: self.limits.clone(),
            options: self.options.clone(),
            meter: Arc::new(NoMeter),
        }
    }

    async fn start(&self) -> Arc<RunService> {
        RunService::start(self.parts()).await.expect("the service starts")
    }
}

fn name(text: &str) -> BackendName {
    text.parse().unwrap()
}

fn caller() -> Caller {
    Caller { tenant: "default".parse().unwrap(), subject: "test".to_owned(), roles: Role::ALL.into() }
}

fn spec(program: &[&str]) -> RunSpec {
    RunSpec { command: program.iter().map(|word| (*word).to_owned()).collect(), ..RunSpec::default() }
}

async fn accept(service: &RunService, spec: RunSpec) -> RunId {
    let (record, created) = service
        .run(&caller(), RunRequest { spec, run_id: None, key: None })
        .await
        .expect("the run is accepted");
    assert!(created);
    record.id
}

async fn watch(service: &Arc<RunService>, id: RunId, from: StreamCursor) -> Vec<StreamItem> {
    let stream = service.stream(&caller(), id, from, FOLLOW).await.expect("the run can be watched");
    let items = stream.filter(|item| {
        let noise =
            matches!(item, Ok(StreamItem { body: StreamBody::KeepAlive | StreamBody::Progress(_), .. }));
        std::future::ready(!noise)
    });
    let items: Vec<_> = tokio::time::timeout(PATIENCE, items.collect()).await.expect("the stream ends");
    items.into_iter().map(|item| item.expect("the stream does not fail")).collect()
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

async fn until_state(service: &RunService, id: RunId, wanted: RunState) -> RunRecord {
    until(wanted.as_str(), async || {
        let (record, _) = service.get(&caller(), id).await.unwrap();
        assert!(!record.position.state.is_terminal() || record.position.state == wanted, "{record:?}");
        (record.position.state == wanted).then_some(record)
    })
    .await
}

async fn end(service: &Arc<RunService>, id: RunId) -> RunRecord {
    watch(service, id, StreamCursor::default()).await;
    service.get(&caller(), id).await.unwrap().0
}

fn states(items: &[StreamItem]) -> Vec<(RunState, u32)> {
    let state = |item: &StreamItem| match &item.body {
        StreamBody::Event(
            RunEvent::StateChanged { position, .. } | RunEvent::Terminated { position, .. },
        ) => Some((position.state, position.attempt)),
        _ => None,
    };
    items.iter().filter_map(state).collect()
}

fn log(items: &[StreamItem]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for item in items {
        if let StreamBody::Log { frame, .. } = &item.body {
            assert_eq!(frame.offset, bytes.len() as u64, "a gap or a repeat");
            if let FrameBody::Data { bytes: data, .. } = &frame.body {
                bytes.extend_from_slice(data);
            }
        }
    }
    bytes
}

async fn nothing_left(world: &World) {
    until("the substrate is empty", async || world.substrate.natives().is_empty().then_some(())).await;
}

fn attempt(run: RunId, number: u32) -> AttemptId {
    AttemptId { run, number }
}

#[tokio::test]
async fn a_run_goes_through_every_state_and_its_log_lies_between_them() {
    let world = World::new();
    let service = world.start().await;
    let id = accept(&service, spec(&["print", "out", "hello", ";", "exit", "7"])).await;
    let items = watch(&service, id, StreamCursor::default()).await;
    use RunState::*;
    assert_eq!(states(&items), [(Queued, 0), (Preparing, 1), (Running, 1), (Publishing, 1), (Failed, 1)]);
    assert!(log(&items).starts_with(b"hello"));
    let position = |wanted: fn(&StreamItem) -> bool| items.iter().position(wanted).unwrap();
    let frame = position(|item| matches!(item.body, StreamBody::Log { .. }));
    let publishing = position(
        |item| matches!(&item.body, StreamBody::Event(RunEvent::StateChanged { position, .. }) if position.state == Publishing),
    );
    assert!(frame < publishing);
    let outcome = service.get(&caller(), id).await.unwrap().0.outcome.unwrap();
    assert_eq!((outcome.cause, outcome.status), (Cause::Exited, Some(ExitStatus::Code(7))));
    nothing_left(&world).await;
}

#[tokio::test]
async fn resuming_from_every_cursor_yields_the_rest_and_nothing_else() {
    let world = World::new();
    let service = world.start().await;
    let id = accept(
        &service,
        spec(&["print", "out", "one", ";", "print", "err", "two", ";", "flood", "out", "300000", "binary"]),
    )
    .await;
    let whole = watch(&service, id, StreamCursor::default()).await;
    for (i, item) in whole.iter().enumerate() {
        let rest = watch(&service, id, item.cursor).await;
        let wanted = &whole[i + 1..];
        // Frames may be cut otherwise; their bytes and everything else may not.
        let expected: Vec<u8> = log_any(wanted);
        assert_eq!(log_any(&rest), expected, "after item {i}");
        assert_eq!(states(&rest), states(wanted), "after item {i}");
    }
}

/// The log bytes without regard to where they start.
fn log_any(items: &[StreamItem]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for item in items {
        if let StreamBody::Log { frame, .. } = &item.body
            && let FrameBody::Data { bytes: data, .. } = &frame.body
        {
            bytes.extend_from_slice(data);
        }
    }
    bytes
}

#[tokio::test]
async fn a_stream_that_does_not_follow_ends_at_what_is_known() {
    let world = World::new();
    let service = world.start().await;
    let id = accept(&service, spec(&["print", "out", "x", ";", "sleep-until-stopped"])).await;
    until_state(&service, id, RunState::Running).await;
    let options = StreamOptions { follow: false, logs: true };
    let items = until("the frame is there", async || {
        let stream = service.stream(&caller(), id, StreamCursor::default(), options).await.unwrap();
        let items: Vec<StreamItem> =
            tokio::time::timeout(PATIENCE, stream.map(|item| item.unwrap()).collect())
                .await
                .expect("it ends");
        (!log(&items).is_empty()).then_some(items)
    })
    .await;
    assert!(states(&items).iter().all(|(state, _)| !state.is_terminal()));
    service.cancel(&caller(), id, String::new()).await.unwrap();
    assert_eq!(end(&service, id).await.position.state, RunState::Cancelled);
}

#[tokio::test]
async fn a_foreign_cursor_is_refused() {
    let world = World::new();
    let service = world.start().await;
    let id = accept(&service, spec(&["exit", "0"])).await;
    end(&service, id).await;
    let from = StreamCursor { event: 99, attempt: 0, log_offset: 0 };
    assert!(matches!(service.stream(&caller(), id, from, FOLLOW).await, Err(ServiceError::Invalid(_))));
}

#[tokio::test]
async fn the_same_key_is_the_same_run_also_when_asked_at_once() {
    let world = World::new();
    let service = world.start().await;
    let request = |code: &str| RunRequest {
        spec: spec(&["exit", code]),
        run_id: None,
        key: Some("job-1".parse().unwrap()),
    };
    let asks = (0..32).map(|_| {
        let (service, request) = (Arc::clone(&service), request("0"));
        async move { service.run(&caller(), request).await.unwrap() }
    });
    let answers = futures::future::join_all(asks).await;
    assert_eq!(answers.iter().filter(|(_, created)| *created).count(), 1);
    assert!(answers.iter().all(|(record, _)| record.id == answers[0].0.id));
    let other = service.run(&caller(), request("1")).await;
    assert!(matches!(other, Err(ServiceError::AlreadyExists { field: "idempotency_key" })), "{other:?}");
    end(&service, answers[0].0.id).await;
    assert_eq!(world.substrate.starts(attempt(answers[0].0.id, 1)), 1);
}

#[tokio::test]
async fn another_tenant_sees_nothing() {
    let world = World::new();
    let service = world.start().await;
    let id = accept(&service, spec(&["exit", "0"])).await;
    let stranger =
        Caller { tenant: "other".parse().unwrap(), subject: "x".to_owned(), roles: Role::ALL.into() };
    assert!(matches!(service.get(&stranger, id).await, Err(ServiceError::NotFound(_))));
    assert!(matches!(service.cancel(&stranger, id, String::new()).await, Err(ServiceError::NotFound(_))));
    assert!(service.stream(&stranger, id, StreamCursor::default(), FOLLOW).await.is_err());
    assert!(service.list(&stranger, RunFilter::default(), None, 10).await.unwrap().runs.is_empty());
    end(&service, id).await;
}

#[tokio::test]
async fn what_a_backend_cannot_honour_is_refused_with_the_fields_named() {
    let world = World::new();
    let service = world.start().await;
    let mut spec = spec(&["exit", "0"]);
    spec.network = Network::Egress;
    spec.resources.gpus = Some(1);
    spec.image = Some("elsewhere".to_owned());
    let Err(ServiceError::Invalid(invalid)) =
        service.run(&caller(), RunRequest { spec, run_id: None, key: None }).await
    else {
        panic!("not refused");
    };
    let fields: Vec<&str> = invalid.0.iter().map(|violation| violation.field.as_str()).collect();
    assert_eq!(fields, ["spec.image", "spec.network", "spec.resources.gpus"]);
    let mut unknown = self::spec(&["exit", "0"]);
    unknown.routing.backend = Some(name("nowhere"));
    let answer = service.run(&caller(), RunRequest { spec: unknown, run_id: None, key: None }).await;
    let Err(ServiceError::Invalid(invalid)) = answer else { panic!("not refused") };
    assert_eq!(invalid.0[0].field, "spec.routing.backend");
    assert_eq!(world.store.live_count().await.unwrap(), 0);
}

#[tokio::test]
async fn above_the_limit_nothing_is_stored_and_room_returns() {
    let mut world = World::new();
    world.limits.live_runs = 2;
    let service = world.start().await;
    let first = accept(&service, spec(&["sleep-until-stopped"])).await;
    let second = accept(&service, spec(&["sleep-until-stopped"])).await;
    let third = RunRequest { spec: spec(&["exit", "0"]), run_id: None, key: None };
    let refused = service.run(&caller(), third.clone()).await;
    assert!(matches!(refused, Err(ServiceError::Exhausted { max: 2, .. })), "{refused:?}");
    assert_eq!(service.list(&caller(), RunFilter::default(), None, 10).await.unwrap().runs.len(), 2);
    service.cancel(&caller(), first, String::new()).await.unwrap();
    end(&service, first).await;
    let (third, _) = service.run(&caller(), third).await.expect("there is room again");
    end(&service, third.id).await;
    service.cancel(&caller(), second, String::new()).await.unwrap();
    end(&service, second).await;
}

#[tokio::test]
async fn a_queued_run_is_cancelled_at_once_and_never_starts() {
    let mut world = World::new();
    world.slots = 1;
    let service = world.start().await;
    let busy = accept(&service, spec(&["sleep-until-stopped"])).await;
    until_state(&service, busy, RunState::Running).await;
    let queued = accept(&service, spec(&["exit", "0"])).await;
    let seen = service.cancel(&caller(), queued, "not needed".to_owned()).await.unwrap();
    assert_eq!(seen.position.state, RunState::Cancelled);
    let items = watch(&service, queued, StreamCursor::default()).await;
    assert_eq!(states(&items), [(RunState::Queued, 0), (RunState::Cancelled, 0)]);
    service.cancel(&caller(), busy, String::new()).await.unwrap();
    end(&service, busy).await;
    assert_eq!(world.substrate.starts(attempt(queued, 1)), 0);
    let again = service.cancel(&caller(), queued, String::new()).await.unwrap();
    assert_eq!(again.outcome, seen.outcome, "a terminal state never changes");
}

#[tokio::test]
async fn cancel_while_running_kills_and_keeps_the_log() {
    let world = World::new();
    let service = world.start().await;
    let id =
        accept(&service, spec(&["print", "out", "so far", ";", "daemonize", ";", "sleep-until-stopped"]))
            .await;
    until_state(&service, id, RunState::Running).await;
    until("the log is there", async || (!world.logs.contents(attempt(id, 1)).is_empty()).then_some(())).await;
    for _ in 0..2 {
        service.cancel(&caller(), id, "enough".to_owned()).await.unwrap();
    }
    let items = watch(&service, id, StreamCursor::default()).await;
    assert!(log(&items).starts_with(b"so far"));
    let record = service.get(&caller(), id).await.unwrap().0;
    assert_eq!(record.position.state, RunState::Cancelled);
    assert_eq!(record.outcome.unwrap().cause, Cause::Cancelled);
    assert_eq!(world.substrate.processes(attempt(id, 1)), 0);
}

#[tokio::test]
async fn a_cancel_reaches_a_program_that_prints_without_a_pause() {
    let mut world = World::new();
    world.limits.log_bytes = 1024 * 1024;
    let service = world.start().await;
    let id = accept(&service, spec(&["flood", "out", "1000000000000", "text"])).await;
    until("the log is there", async || (!world.logs.contents(attempt(id, 1)).is_empty()).then_some(())).await;
    service.cancel(&caller(), id, "enough".to_owned()).await.unwrap();
    let record = until_state(&service, id, RunState::Cancelled).await;
    assert_eq!(record.outcome.unwrap().cause, Cause::Cancelled);
    assert_eq!(world.substrate.processes(attempt(id, 1)), 0);
}

#[tokio::test]
async fn cancel_during_staging_proves_that_nothing_starts() {
    let world = World::new();
    world.substrate.with_faults(|faults| faults.ensure_delay = Some(Duration::from_secs(3600)));
    let service = world.start().await;
    let id = accept(&service, spec(&["exit", "0"])).await;
    until_state(&service, id, RunState::Preparing).await;
    service.cancel(&caller(), id, String::new()).await.unwrap();
    assert_eq!(end(&service, id).await.position.state, RunState::Cancelled);
    assert_eq!(world.substrate.starts(attempt(id, 1)), 0);
    nothing_left(&world).await;
}

#[tokio::test]
async fn a_stop_that_fails_is_repeated_until_the_workload_is_dead() {
    let world = World::new();
    let service = world.start().await;
    let id = accept(&service, spec(&["sleep-until-stopped"])).await;
    until_state(&service, id, RunState::Running).await;
    world.substrate.with_faults(|faults| faults.stop.extend([(BackendErrorKind::Substrate, true); 5]));
    service.cancel(&caller(), id, String::new()).await.unwrap();
    assert_eq!(end(&service, id).await.position.state, RunState::Cancelled);
    assert_eq!(world.substrate.processes(attempt(id, 1)), 0);
}

#[tokio::test]
async fn a_backend_failure_is_retried_as_a_new_attempt_with_a_log_of_its_own() {
    let world = World::new();
    let service = world.start().await;
    world.substrate.with_faults(|faults| faults.ensure.push_back((BackendErrorKind::Substrate, false)));
    let mut spec = spec(&["print", "out", "done"]);
    spec.retry.max_attempts = Some(2);
    spec.retry.initial_backoff = Some(Duration::from_millis(1));
    let id = accept(&service, spec).await;
    let items = watch(&service, id, StreamCursor::default()).await;
    use RunState::*;
    let wanted = [
        (Queued, 0),
        (Preparing, 1),
        (Queued, 1),
        (Preparing, 2),
        (Running, 2),
        (Publishing, 2),
        (Succeeded, 2),
    ];
    assert_eq!(states(&items), wanted);
    let (record, attempts) = service.get(&caller(), id).await.unwrap();
    assert_eq!(record.outcome.unwrap().attempt, 2);
    let causes: Vec<_> = attempts.iter().map(|attempt| (attempt.number, attempt.outcome.cause)).collect();
    assert_eq!(causes, [(1, Cause::Backend), (2, Cause::Exited)]);
    nothing_left(&world).await;
}

#[tokio::test]
async fn a_backend_that_recovers_makes_an_attempt_late_not_wrong() {
    let world = World::new();
    let service = world.start().await;
    world.substrate.with_faults(|faults| {
        faults.ensure.extend([(BackendErrorKind::Substrate, true); 20]);
        faults.ensure_after_start.extend([(BackendErrorKind::Substrate, true); 2]);
        faults.observe.extend([0, 1, 2, 3]);
    });
    let id = accept(&service, spec(&["flood", "out", "200000", "text", ";", "exit", "3"])).await;
    let items = watch(&service, id, StreamCursor::default()).await;
    assert_eq!(log(&items).len(), 200_000);
    let record = service.get(&caller(), id).await.unwrap().0;
    assert_eq!(record.outcome.unwrap().status, Some(ExitStatus::Code(3)));
    assert_eq!(record.position.attempt, 1);
    assert_eq!(world.substrate.starts(attempt(id, 1)), 1);
}

#[tokio::test]
async fn an_attempt_that_never_runs_is_unschedulable() {
    let mut world = World::new();
    world.limits.pending_timeout = Duration::from_millis(50);
    world.substrate.with_faults(|faults| faults.ensure_delay = Some(Duration::from_secs(3600)));
    let service = world.start().await;
    let id = accept(&service, spec(&["exit", "0"])).await;
    let record = end(&service, id).await;
    assert_eq!(
        (record.position.state, record.outcome.unwrap().cause),
        (RunState::Failed, Cause::Unschedulable)
    );
    assert_eq!(world.substrate.starts(attempt(id, 1)), 0);
}

#[tokio::test]
async fn a_timer_goes_on_across_a_restart() {
    let mut world = World::new();
    world.limits.pending_timeout = Duration::from_millis(300);
    world.substrate.with_faults(|faults| faults.ensure_delay = Some(Duration::from_secs(3600)));
    let service = world.start().await;
    let id = accept(&service, spec(&["exit", "0"])).await;
    until_state(&service, id, RunState::Preparing).await;
    service.shutdown().await;
    // While nobody counts, the time goes on; and who counts anew does not begin anew.
    world.limits.pending_timeout = Duration::from_secs(3600);
    let service = world.start().await;
    let record = end(&service, id).await;
    assert_eq!(record.outcome.unwrap().cause, Cause::Unschedulable);
}

#[tokio::test]
async fn a_retry_waits_for_its_back_off_also_across_a_restart() {
    let world = World::new();
    world.substrate.with_faults(|faults| faults.ensure.push_back((BackendErrorKind::Substrate, false)));
    let service = world.start().await;
    let mut spec = spec(&["exit", "0"]);
    spec.retry.max_attempts = Some(2);
    spec.retry.initial_backoff = Some(Duration::from_secs(3600));
    spec.retry.max_backoff = Some(Duration::from_secs(3600));
    let id = accept(&service, spec).await;
    let waiting = async || {
        let (record, attempts) = service.get(&caller(), id).await.unwrap();
        (record.position.state == RunState::Queued && attempts.len() == 1).then_some(())
    };
    until("the first attempt is over", waiting).await;
    service.shutdown().await;
    let service = world.start().await;
    let record = service.get(&caller(), id).await.unwrap().0;
    assert_eq!((record.position.state, record.position.attempt), (RunState::Queued, 1));
    assert!(record.not_before.is_some());
    let cancelled = service.cancel(&caller(), id, String::new()).await.unwrap();
    assert_eq!(cancelled.position.state, RunState::Cancelled, "waiting for a retry is waiting in the queue");
    assert_eq!(world.substrate.starts(attempt(id, 2)), 0);
}

#[tokio::test]
async fn a_workload_that_vanished_is_lost_and_never_success() {
    let world = World::new();
    let service = world.start().await;
    let mut spec = spec(&["sleep-until-stopped"]);
    // Not idempotent: nobody may execute it again.
    spec.retry.max_attempts = Some(3);
    let id = accept(&service, spec).await;
    until_state(&service, id, RunState::Running).await;
    world.substrate.vanish(attempt(id, 1));
    let record = end(&service, id).await;
    assert_eq!((record.position.state, record.outcome.unwrap().cause), (RunState::Failed, Cause::Lost));
    assert_eq!(record.position.attempt, 1);
}

#[tokio::test]
async fn a_store_that_fails_for_a_while_loses_nothing() {
    let world = World::new();
    let service = world.start().await;
    let id = accept(&service, spec(&["print", "out", "x", ";", "sleep", "20", ";", "exit", "4"])).await;
    world.store.set_fault(Some(StoreError::Unavailable("injected".to_owned())));
    let refused =
        service.run(&caller(), RunRequest { spec: spec(&["exit", "0"]), run_id: None, key: None }).await;
    assert!(matches!(refused, Err(ServiceError::Unavailable(_))), "{refused:?}");
    // The driver meets it too, more than once.
    let met = world.store.faults_met();
    until("the run's driver met the fault", async || (world.store.faults_met() >= met + 2).then_some(()))
        .await;
    world.store.set_fault(None);
    assert_eq!(end(&service, id).await.outcome.unwrap().status, Some(ExitStatus::Code(4)));
    assert_eq!(world.substrate.starts(attempt(id, 1)), 1);
}

#[tokio::test]
async fn a_watcher_finds_the_driver_that_took_over_from_one_that_gave_up() {
    let world = World::new();
    let service = world.start().await;
    let id = accept(&service, spec(&["print", "out", "x", ";", "sleep", "100", ";", "exit", "4"])).await;
    until_state(&service, id, RunState::Running).await;
    // A driver that meets this gives up; a watcher that follows it hears no more of it.
    let giving_up = async {
        world.store.set_fault(Some(StoreError::NotFound(id)));
        until("the driver gave up", async || (service.live_runs() == 0).then_some(())).await;
        world.store.set_fault(None);
    };
    let (items, ()) = tokio::join!(watch(&service, id, StreamCursor::default()), giving_up);
    assert_eq!(log(&items), b"x");
    let record = service.get(&caller(), id).await.unwrap().0;
    assert_eq!(record.outcome.unwrap().status, Some(ExitStatus::Code(4)));
    assert_eq!(world.substrate.starts(attempt(id, 1)), 1);
}

#[tokio::test]
async fn a_restart_at_any_moment_loses_nothing_and_runs_nothing_twice() {
    for pause in [0, 1, 3, 7, 15, 40] {
        let world = World::new();
        let service = world.start().await;
        let program = [
            "print", "out", "a", ";", "sleep", "10", ";", "flood", "out", "100000", "text", ";", "exit", "5",
        ];
        let id = accept(&service, spec(&program)).await;
        tokio::time::sleep(Duration::from_millis(pause)).await;
        service.shutdown().await;
        drop(service);
        let service = world.start().await;
        let items = watch(&service, id, StreamCursor::default()).await;
        assert_eq!(log(&items).len(), 100_000 + usize::from(log(&items)[1] == b'\n') + 1, "pause {pause}");
        let record = service.get(&caller(), id).await.unwrap().0;
        assert_eq!(record.outcome.unwrap().status, Some(ExitStatus::Code(5)), "pause {pause}");
        assert_eq!(world.substrate.starts(attempt(id, 1)), 1, "pause {pause}");
        assert_eq!(record.position.attempt, 1, "pause {pause}");
        nothing_left(&world).await;
    }
}

#[tokio::test]
async fn a_cancel_before_a_restart_still_counts_after_it() {
    let world = World::new();
    let service = world.start().await;
    let id = accept(&service, spec(&["sleep-until-stopped"])).await;
    until_state(&service, id, RunState::Running).await;
    world.substrate.with_faults(|faults| faults.stop.extend([(BackendErrorKind::Substrate, true); 3]));
    service.cancel(&caller(), id, String::new()).await.unwrap();
    service.shutdown().await;
    let service = world.start().await;
    assert_eq!(end(&service, id).await.position.state, RunState::Cancelled);
    assert_eq!(world.substrate.starts(attempt(id, 1)), 1);
}

#[tokio::test]
async fn orphans_are_removed_and_foreign_things_are_not_touched() {
    let world = World::new();
    world.substrate.plant_foreign("somebody-elses");
    let orphan = attempt(RunId::new("0198c0de-0000-7000-8000-00000000000a".parse().unwrap()), 1);
    let backend = FakeBackend::over(name("fake"), world.substrate.clone());
    let context = runner_core::backend::AttemptContext {
        attempt: orphan,
        tenant: "default".parse().unwrap(),
        spec: Arc::new(Limits::default().apply(spec(&["sleep-until-stopped"]), &backend.capabilities())),
        log_limit_bytes: 1 << 20,
        artifacts: world.artifacts.clone(),
        progress: Arc::new(runner_core::backend::NoProgress),
    };
    backend.ensure(&context).await.unwrap();
    assert_eq!(world.substrate.processes(orphan), 1);
    let service = world.start().await;
    nothing_left(&world).await;
    assert_eq!(world.substrate.processes(orphan), 0);
    assert_eq!(world.substrate.foreign(), ["somebody-elses"]);
    service.shutdown().await;
}

#[tokio::test]
async fn a_row_that_does_not_decode_stops_nothing_else() {
    let world = World::new();
    let service = world.start().await;
    let bad = accept(&service, spec(&["sleep-until-stopped"])).await;
    let good = accept(&service, spec(&["sleep", "30", ";", "exit", "6"])).await;
    until_state(&service, bad, RunState::Running).await;
    service.shutdown().await;
    world.store.corrupt(bad);
    let service = world.start().await;
    assert_eq!(end(&service, good).await.outcome.unwrap().status, Some(ExitStatus::Code(6)));
    assert!(matches!(service.get(&caller(), bad).await, Err(ServiceError::Internal(_))));
    // Nobody knows what it is: its workload is left as it is.
    assert_eq!(world.substrate.processes(attempt(bad, 1)), 1);
}

#[tokio::test]
async fn standard_input_reaches_the_program_and_is_refused_where_the_spec_has_none() {
    let world = World::new();
    let service = world.start().await;
    let mut with = spec(&["echo-stdin"]);
    with.stdin = true;
    let id = accept(&service, with).await;
    until_state(&service, id, RunState::Running).await;
    service.input(&caller(), id, WorkloadInput::Stdin("ping".into())).await.unwrap();
    service.input(&caller(), id, WorkloadInput::Eof).await.unwrap();
    assert_eq!(log(&watch(&service, id, StreamCursor::default()).await), b"ping");
    let late = service.input(&caller(), id, WorkloadInput::Eof).await;
    assert!(matches!(late, Err(ServiceError::FailedPrecondition { reason: "NOT_RUNNING", .. })), "{late:?}");
    let without = accept(&service, spec(&["sleep-until-stopped"])).await;
    let refused = service.input(&caller(), without, WorkloadInput::Eof).await;
    assert!(
        matches!(refused, Err(ServiceError::FailedPrecondition { reason: "NO_STDIN", .. })),
        "{refused:?}"
    );
    service.cancel(&caller(), without, String::new()).await.unwrap();
    end(&service, without).await;
}

#[tokio::test]
async fn shutting_down_ends_streams_with_a_word_and_refuses_new_runs() {
    let world = World::new();
    let service = world.start().await;
    let id = accept(&service, spec(&["sleep-until-stopped"])).await;
    until_state(&service, id, RunState::Running).await;
    let stream = service.stream(&caller(), id, StreamCursor::default(), FOLLOW).await.unwrap();
    service.shutdown().await;
    let items: Vec<_> = tokio::time::timeout(PATIENCE, stream.collect()).await.expect("the stream ends");
    assert!(matches!(items.last(), Some(Err(ServiceError::Unavailable(_)))));
    let refused =
        service.run(&caller(), RunRequest { spec: spec(&["exit", "0"]), run_id: None, key: None }).await;
    assert!(matches!(refused, Err(ServiceError::Unavailable(_))));
    // The workload lives on.
    assert_eq!(world.substrate.processes(attempt(id, 1)), 1);
}

#[tokio::test]
async fn ten_thousand_watchers_of_a_silent_run_are_woken_by_its_end() {
    let world = World::new();
    let service = world.start().await;
    let id = accept(&service, spec(&["sleep-until-stopped"])).await;
    until_state(&service, id, RunState::Running).await;
    let mut streams = Vec::new();
    for _ in 0..10_000 {
        streams.push(service.stream(&caller(), id, StreamCursor::default(), FOLLOW).await.unwrap());
    }
    service.cancel(&caller(), id, String::new()).await.unwrap();
    let all = futures::stream::iter(streams).map(|stream| async move {
        let last = stream.map(|item| item.unwrap()).fold(None, |_, item| async { Some(item) }).await;
        matches!(last, Some(StreamItem { body: StreamBody::Event(RunEvent::Terminated { .. }), .. }))
    });
    let ended: Vec<bool> =
        tokio::time::timeout(PATIENCE, all.buffer_unordered(10_000).collect()).await.expect("all end");
    assert!(ended.iter().all(|ended| *ended));
}
