//! Two implementations under the same random verbs give the same answers.

use std::{fmt::Debug, time::Duration};

use proptest::prelude::*;
use runner_core::{
    id::RunId,
    state::{Position, RunState},
    store::{
        CancelIntent, LiveLimits, NewRun, PageCursor, RunEvent, RunFilter, Store, StoreError, Timer,
        TimerKind, Transition,
    },
};

use super::kit::{at, backend, ended, id, in_queue, key, labelled, place, step, tenant};

/// Verbs are about so few runs that they meet.
const RUNS: u128 = 4;

/// A verb with everything that it needs.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "the names are the verbs'")]
pub enum Verb {
    Accept(Box<NewRun>, LiveLimits),
    Get(RunId),
    Attempts(RunId),
    List(Box<RunFilter>, Option<PageCursor>, usize),
    Live,
    Transition(Box<Transition>),
    AppendEvent(RunId, RunEvent, u64),
    RequestCancel(RunId, String, u64),
    Events(RunId, u64, usize),
    LiveCount,
    /// Closes the store and opens it again.
    Reopen,
}

fn any_id() -> impl Strategy<Value = RunId> {
    (0..RUNS).prop_map(id)
}

fn any_state() -> impl Strategy<Value = RunState> {
    prop::sample::select(RunState::ALL.to_vec())
}

fn any_new_run() -> impl Strategy<Value = NewRun> {
    let label = prop::sample::select(vec!["x", "y"]);
    (0..RUNS, prop::bool::ANY, prop::option::of(0..2u8), label, 0..4u64).prop_map(
        |(n, b, k, label, second)| NewRun {
            tenant: tenant(if b { "b" } else { "a" }),
            key: k.map(|k| key(&format!("key {k}"))),
            backend: backend(if second % 2 == 0 { "local" } else { "other" }),
            time: at(second),
            ..labelled(n, &[("l", label)])
        },
    )
}

fn any_limits() -> impl Strategy<Value = LiveLimits> {
    (1..5u64, 1..4u64).prop_map(|(total, per_tenant)| LiveLimits { total, per_tenant })
}

fn any_timers() -> impl Strategy<Value = Vec<Timer>> {
    let kind = prop::sample::select(vec![TimerKind::Pending, TimerKind::Deadline, TimerKind::Retry]);
    let timer = (kind, 0..100u64).prop_map(|(kind, n)| Timer {
        kind,
        due: at(n),
        duration: Duration::from_nanos(n * 1_000_001),
    });
    prop::collection::vec(timer, 0..3)
}

/// Half of them are steps that the life of a run has; the others expect or want anything.
fn any_transition() -> impl Strategy<Value = Transition> {
    use RunState::{Cancelled, Failed, Preparing, Publishing, Queued, Running, Succeeded};
    let usual = prop::sample::select(vec![
        (Position::START, place(Preparing, 1)),
        (place(Preparing, 1), place(Running, 1)),
        (place(Preparing, 1), place(Queued, 1)),
        (place(Running, 1), place(Publishing, 1)),
        (place(Running, 1), place(Cancelled, 1)),
        (place(Publishing, 1), place(Succeeded, 1)),
        (place(Queued, 1), place(Preparing, 2)),
        (place(Preparing, 2), place(Failed, 2)),
    ]);
    let any =
        (any_state(), 0..3u32, any_state(), 0..3u32).prop_map(|(a, m, b, n)| (place(a, m), place(b, n)));
    let positions = prop_oneof![3 => usual, 1 => any];
    let more =
        (prop::bool::ANY, prop::option::of(0..9u64), prop::option::of(0..9u64), any_timers(), 0..3usize);
    (any_id(), positions, more, prop::option::of(0..3u32)).prop_map(
        |(run, (expected, next), (unless_cancelled, started, not_before, timers, notices), attempt)| {
            let mut transition = step(run, expected, next);
            transition.unless_cancelled = unless_cancelled;
            transition.started = started.map(at);
            transition.not_before = not_before.map(at);
            transition.timers = if next.state.is_terminal() { Vec::new() } else { timers };
            transition.ended_attempt = attempt.map(ended);
            transition.events.extend((0..notices).map(|n| RunEvent::Notice(format!("notice {n}"))));
            transition
        },
    )
}

fn any_filter() -> impl Strategy<Value = RunFilter> {
    let states = prop::collection::vec(any_state(), 0..3);
    let label = prop::option::of(prop::sample::select(vec!["x", "y"]));
    let times = (prop::option::of(0..4u64), prop::option::of(0..5u64));
    (prop::option::of(prop::bool::ANY), states, prop::option::of(prop::bool::ANY), label, times).prop_map(
        |(b, states, other, label, (from, until))| RunFilter {
            tenant: b.map(|b| tenant(if b { "b" } else { "a" })),
            states,
            backend: other.map(|other| backend(if other { "other" } else { "local" })),
            labels: label.map(|value| ("l".to_owned(), value.to_owned())).into_iter().collect(),
            created_from: from.map(at),
            created_until: until.map(at),
        },
    )
}

fn any_verb() -> impl Strategy<Value = Verb> {
    let cursor = (0..4u64, any_id()).prop_map(|(second, id)| PageCursor { created: at(second), id });
    let event = prop_oneof![
        4 => "[a-z]{0,3}".prop_map(RunEvent::Notice),
        1 => Just(RunEvent::StateChanged { position: Position::START, reason: String::new() }),
    ];
    prop_oneof![
        6 => (any_new_run(), any_limits()).prop_map(|(run, limits)| Verb::Accept(Box::new(run), limits)),
        1 => any_id().prop_map(Verb::Get),
        1 => any_id().prop_map(Verb::Attempts),
        3 => (any_filter(), prop::option::of(cursor), 1..4usize)
            .prop_map(|(filter, after, max)| Verb::List(Box::new(filter), after, max)),
        1 => Just(Verb::Live),
        12 => any_transition().prop_map(|transition| Verb::Transition(Box::new(transition))),
        2 => (any_id(), event, 0..9u64).prop_map(|(id, event, second)| Verb::AppendEvent(id, event, second)),
        2 => (any_id(), "[a-z]{0,3}", 0..9u64).prop_map(|(id, why, second)| Verb::RequestCancel(id, why, second)),
        1 => (any_id(), 0..5u64, 0..5usize).prop_map(|(id, after, max)| Verb::Events(id, after, max)),
        1 => Just(Verb::LiveCount),
        1 => Just(Verb::Reopen),
    ]
}

/// Sequences of verbs.
pub fn any_verbs() -> impl Strategy<Value = Vec<Verb>> {
    prop::collection::vec(any_verb(), 1..60)
}

/// The verb's answer as text. Of an error only what a caller can act on; its words are the implementation's.
pub async fn answer(store: &dyn Store, verb: Verb) -> String {
    match verb {
        Verb::Accept(run, limits) => text(store.accept(*run, limits).await),
        Verb::Get(id) => text(store.get(id).await),
        Verb::Attempts(id) => text(store.attempts(id).await),
        Verb::List(filter, after, max) => text(store.list(&filter, after, max).await),
        Verb::Live => live(store).await,
        Verb::Transition(transition) => text(store.transition(*transition).await),
        Verb::AppendEvent(id, event, second) => text(store.append_event(id, event, at(second)).await),
        Verb::RequestCancel(id, reason, second) => {
            text(store.request_cancel(id, CancelIntent { time: at(second), reason }, in_queue()).await)
        }
        Verb::Events(id, after, max) => text(store.events(id, after, max).await),
        Verb::LiveCount => text(store.live_count().await),
        Verb::Reopen => String::new(),
    }
}

/// Timers have no order.
async fn live(store: &dyn Store) -> String {
    text(store.live().await.map(|mut live| {
        live.timers.sort_by_key(|(run, timer)| (*run, timer.kind));
        live
    }))
}

fn text<T: Debug>(answer: Result<T, StoreError>) -> String {
    match answer {
        Ok(answer) => format!("{answer:?}"),
        Err(StoreError::NotFound(id)) => format!("not found: {id}"),
        Err(StoreError::Inconsistent(_)) => "inconsistent".to_owned(),
        Err(StoreError::Full(_)) => "full".to_owned(),
        Err(StoreError::Unavailable(_)) => "unavailable".to_owned(),
        Err(StoreError::Other(_)) => "other".to_owned(),
    }
}

/// Everything that a store knows of the runs that verbs are about.
pub async fn everything(store: &dyn Store) -> Vec<String> {
    let mut all = vec![
        live(store).await,
        text(store.live_count().await),
        text(store.list(&RunFilter::default(), None, 100).await),
    ];
    for n in 0..RUNS {
        all.push(text(store.get(id(n)).await));
        all.push(text(store.events(id(n), 0, 1000).await));
        all.push(text(store.attempts(id(n)).await));
    }
    all
}
