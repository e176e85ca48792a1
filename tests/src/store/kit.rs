//! What cases are made of.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use runner_core::{
    clock::Timestamp,
    id::{BackendName, IdempotencyKey, RunId, TenantId},
    outcome::{Cause, Outcome},
    spec::RunSpec,
    state::{Position, RunState},
    store::{
        Accepted, AttemptRecord, CancelIntent, LiveLimits, NewRun, RunEvent, RunRecord, Store, StoredEvent,
        Timer, TimerKind, Transition, Transitioned,
    },
};
use uuid::Uuid;

/// No limit that a case would reach by chance.
pub const NO_LIMITS: LiveLimits = LiveLimits { total: 1_000_000, per_tenant: 1_000_000 };

/// The run id of number `n`, which sorts as `n` does.
pub fn id(n: u128) -> RunId {
    RunId::new(Uuid::from_u128(0x0193_0000_0000_7000_8000_0000_0000_0000 + n))
}

/// `seconds` after some moment.
pub fn at(seconds: u64) -> Timestamp {
    Timestamp::from_micros(1_750_000_000_000_000) + Duration::from_secs(seconds)
}

/// A tenant of this name.
pub fn tenant(name: &str) -> TenantId {
    name.parse().expect("a valid tenant")
}

/// A backend of this name.
pub fn backend(name: &str) -> BackendName {
    name.parse().expect("a valid backend name")
}

/// A key of this text.
pub fn key(text: &str) -> IdempotencyKey {
    text.parse().expect("a valid key")
}

/// A position.
pub fn place(state: RunState, attempt: u32) -> Position {
    Position { state, attempt }
}

/// A spec whose command is `command`.
pub fn spec(command: &str) -> RunSpec {
    RunSpec { command: vec![command.to_owned()], ..RunSpec::default() }
}

/// Run number `n` of tenant `a`, accepted at second `n`, without a key.
pub fn run(n: u128) -> NewRun {
    with_spec(n, spec("true"))
}

/// Run number `n` with this spec.
pub fn with_spec(n: u128, spec: RunSpec) -> NewRun {
    NewRun {
        id: id(n),
        tenant: tenant("a"),
        key: None,
        digest: spec.digest(),
        spec: Arc::new(spec),
        backend: backend("local"),
        backend_reason: "the default".to_owned(),
        decision: None,
        time: at(u64::try_from(n).expect("a small number")),
    }
}

/// Run number `n` with these labels.
pub fn labelled(n: u128, labels: &[(&str, &str)]) -> NewRun {
    let labels: BTreeMap<_, _> =
        labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    with_spec(n, RunSpec { labels, ..spec("true") })
}

/// Accepts a run that must be new.
pub async fn create(store: &dyn Store, run: NewRun) -> RunRecord {
    match store.accept(run, NO_LIMITS).await.expect("the store answers") {
        Accepted::Created(record) => record,
        other => panic!("not created: {other:?}"),
    }
}

/// The run, which must be there.
pub async fn must_get(store: &dyn Store, id: RunId) -> RunRecord {
    store.get(id).await.expect("the store answers").expect("the run is there")
}

/// Every event of a run.
pub async fn all_events(store: &dyn Store, id: RunId) -> Vec<StoredEvent> {
    store.events(id, 0, usize::MAX).await.expect("the store answers")
}

/// A transition with the one event that it implies, and an outcome where it ends the run.
pub fn step(run: RunId, expected: Position, next: Position) -> Transition {
    let outcome = next.state.is_terminal().then(|| Outcome::new(next.attempt, Cause::Exited, "ended"));
    let event = match &outcome {
        Some(outcome) => RunEvent::Terminated { position: next, outcome: outcome.clone() },
        None => RunEvent::StateChanged { position: next, reason: "because".to_owned() },
    };
    Transition {
        run,
        expected,
        next,
        unless_cancelled: false,
        time: at(1000),
        started: None,
        not_before: None,
        outcome,
        ended_attempt: None,
        events: vec![event],
        timers: Vec::new(),
        pair: None,
    }
}

/// Applies a transition that must apply. Answers the number of the last event.
pub async fn apply(store: &dyn Store, transition: Transition) -> u64 {
    match store.transition(transition).await.expect("the store answers") {
        Transitioned::Applied { last_event } => last_event,
        Transitioned::Conflict(record) => panic!("a conflict with {:?}", record.position),
    }
}

/// Brings a run from its start through the given positions.
pub async fn lead(store: &dyn Store, run: RunId, way: &[(RunState, u32)]) {
    let mut from = Position::START;
    for (state, attempt) in way {
        let next = place(*state, *attempt);
        apply(store, step(run, from, next)).await;
        from = next;
    }
}

/// Brings a run from its start to success.
pub async fn succeed(store: &dyn Store, run: RunId) {
    use RunState::{Preparing, Publishing, Running, Succeeded};
    lead(store, run, &[(Preparing, 1), (Running, 1), (Publishing, 1), (Succeeded, 1)]).await;
}

/// An intent to cancel, at second `seconds`.
pub fn intent(reason: &str, seconds: u64) -> CancelIntent {
    CancelIntent { time: at(seconds), reason: reason.to_owned() }
}

/// The outcome of a run that is cancelled in the queue.
pub fn in_queue() -> Outcome {
    Outcome::new(0, Cause::Cancelled, "cancelled before it began")
}

/// A timer.
pub fn timer(kind: TimerKind, due: u64) -> Timer {
    Timer { kind, due: at(due), duration: Duration::from_millis(1500) }
}

/// The record of an attempt that ended.
pub fn ended(number: u32) -> AttemptRecord {
    AttemptRecord {
        number,
        backend: backend("local"),
        started: Some(at(500)),
        ended: at(600),
        outcome: Outcome::new(number, Cause::Backend, "the backend failed").with_evidence(
            "test",
            "seen",
            at(599),
        ),
    }
}

/// Asserts that events are numbered from 1 without gaps, and that the record says the last number.
pub async fn assert_consecutive(store: &dyn Store, id: RunId) {
    let events = all_events(store, id).await;
    let numbers: Vec<u64> = events.iter().map(|event| event.seq).collect();
    let expected: Vec<u64> = (1..=numbers.len() as u64).collect();
    assert_eq!(numbers, expected, "events are not numbered from 1 without gaps");
    assert_eq!(must_get(store, id).await.last_event, numbers.len() as u64);
}

/// The numbers of runs, in the order given; the inverse of [`id`].
pub fn numbers<'a>(runs: impl IntoIterator<Item = &'a RunRecord>) -> Vec<u128> {
    runs.into_iter().map(|run| run.id.as_uuid().as_u128() - id(0).as_uuid().as_u128()).collect()
}
