//! Rules 3 and 4: a transition is conditional, all or nothing; what is terminal stays.

use std::sync::Arc;

use runner_core::{
    outcome::{Cause, Outcome},
    state::{
        Position,
        RunState::{Failed, Preparing, Publishing, Queued, Running, Succeeded},
    },
    store::{RunEvent, StoreError, TimerKind, Transition, Transitioned},
    task::{TaskKind, spawn},
};

use super::{
    StoreFactory,
    kit::{
        all_events, apply, assert_consecutive, at, create, ended, id, in_queue, intent, lead, must_get,
        place, run, step, succeed, timer,
    },
};

#[allow(missing_docs, reason = "the name says it")]
pub async fn it_sets_what_it_names_and_nothing_else<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let mut expected = create(&*store, run(1)).await;
    let preparing = place(Preparing, 1);
    let begin = Transition { not_before: Some(at(7)), ..step(id(1), Position::START, preparing) };
    assert_eq!(apply(&*store, begin).await, 2);
    expected.position = preparing;
    expected.not_before = Some(at(7));
    expected.last_event = 2;
    assert_eq!(must_get(&*store, id(1)).await, expected);

    let running = place(Running, 1);
    let start = Transition { started: Some(at(8)), ..step(id(1), preparing, running) };
    assert_eq!(apply(&*store, start).await, 3);
    expected.position = running;
    expected.started = Some(at(8));
    expected.not_before = None;
    expected.last_event = 3;
    assert_eq!(must_get(&*store, id(1)).await, expected);

    let outcome = Outcome::new(1, Cause::OomKilled, "too much").with_evidence("cgroup", "oom_kill 1", at(9));
    let end = Transition {
        time: at(10),
        outcome: Some(outcome.clone()),
        ended_attempt: Some(ended(1)),
        ..step(id(1), running, place(Failed, 1))
    };
    assert_eq!(apply(&*store, end).await, 4);
    expected.position = place(Failed, 1);
    expected.ended = Some(at(10));
    expected.outcome = Some(outcome);
    expected.last_event = 4;
    assert_eq!(must_get(&*store, id(1)).await, expected);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn elsewhere_it_changes_nothing<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    lead(&*store, id(1), &[(Preparing, 1)]).await;
    let before = must_get(&*store, id(1)).await;
    // Another state; the state of another attempt.
    for wrong in [place(Queued, 1), place(Preparing, 2), Position::START] {
        let mut late = step(id(1), wrong, place(Running, 2));
        late.timers = vec![timer(TimerKind::Deadline, 9)];
        late.started = Some(at(3));
        let answer = store.transition(late).await.unwrap();
        assert_eq!(answer, Transitioned::Conflict(Box::new(before.clone())));
    }
    assert_eq!(must_get(&*store, id(1)).await, before);
    assert_eq!(all_events(&*store, id(1)).await.len(), 2);
    assert_eq!(store.live().await.unwrap().timers, []);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn of_an_unknown_run_is_not_found<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let error = store.transition(step(id(1), Position::START, place(Preparing, 1))).await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound(which) if which == id(1)), "{error:?}");
    let error = store.attempts(id(1)).await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound(which) if which == id(1)), "{error:?}");
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn a_malformed_one_is_refused<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    lead(&*store, id(1), &[(Preparing, 1)]).await;
    let before = must_get(&*store, id(1)).await;
    let here = place(Preparing, 1);
    let good = step(id(1), here, place(Running, 1));
    let end = step(id(1), here, place(Failed, 1));
    let pending = timer(TimerKind::Pending, 1);
    for bad in [
        Transition { outcome: Some(in_queue()), ..good.clone() },
        Transition { outcome: None, ..end.clone() },
        Transition { timers: vec![pending], ..end },
        Transition { timers: vec![pending, timer(TimerKind::Pending, 2)], ..good.clone() },
        Transition { ended_attempt: Some(ended(2)), ..good.clone() },
        Transition { next: place(Queued, 0), ..good.clone() },
    ] {
        let error = store.transition(bad.clone()).await.unwrap_err();
        assert!(matches!(error, StoreError::Other(_)), "{bad:?}: {error:?}");
    }
    assert_eq!(must_get(&*store, id(1)).await, before);
    apply(&*store, good).await;
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn a_terminal_run_never_changes<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    succeed(&*store, id(1)).await;
    let before = must_get(&*store, id(1)).await;
    let events = all_events(&*store, id(1)).await;
    let end = place(Succeeded, 1);
    // Even a transition that expects the terminal position.
    for next in [place(Failed, 1), place(Queued, 1), place(Preparing, 2), end] {
        let answer = store.transition(step(id(1), end, next)).await.unwrap();
        assert_eq!(answer, Transitioned::Conflict(Box::new(before.clone())), "{next:?}");
    }
    let cancel = store.request_cancel(id(1), intent("late", 5000), in_queue()).await.unwrap();
    assert_eq!((cancel.newly, &cancel.run), (false, &before));
    assert_eq!(store.append_event(id(1), RunEvent::Notice("late".to_owned()), at(5000)).await.unwrap(), None);
    assert_eq!(must_get(&*store, id(1)).await, before);
    assert_eq!(all_events(&*store, id(1)).await, events);
    assert_eq!(store.live_count().await.unwrap(), 0);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn racing_ones_have_one_winner<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    let tasks: Vec<_> = (0..32)
        .map(|n| {
            let store = Arc::clone(&store);
            let mut begin = step(id(1), Position::START, place(Preparing, 1));
            begin.events = vec![RunEvent::Notice(format!("winner {n}"))];
            spawn(TaskKind::Helper, "race", async move { store.transition(begin).await })
        })
        .collect();
    let mut winners = Vec::new();
    for (n, task) in tasks.into_iter().enumerate() {
        match task.await.expect("joined").expect("no panic").expect("the store answers") {
            Transitioned::Applied { last_event } => {
                assert_eq!(last_event, 2);
                winners.push(n);
            }
            Transitioned::Conflict(record) => assert_eq!(record.position, place(Preparing, 1)),
        }
    }
    assert_eq!(winners.len(), 1);
    let events = all_events(&*store, id(1)).await;
    assert_eq!(events.len(), 2);
    assert_eq!(events[1].event, RunEvent::Notice(format!("winner {}", winners[0])));
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn the_first_start_is_kept_until_another_is_named<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    lead(&*store, id(1), &[(Preparing, 1)]).await;
    let start = step(id(1), place(Preparing, 1), place(Running, 1));
    apply(&*store, Transition { started: Some(at(1)), ..start }).await;
    apply(&*store, step(id(1), place(Running, 1), place(Queued, 1))).await;
    assert_eq!(must_get(&*store, id(1)).await.started, Some(at(1)));
    apply(&*store, step(id(1), place(Queued, 1), place(Preparing, 2))).await;
    let start = step(id(1), place(Preparing, 2), place(Running, 2));
    apply(&*store, Transition { started: Some(at(2)), ..start }).await;
    assert_eq!(must_get(&*store, id(1)).await.started, Some(at(2)));
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn events_are_numbered_in_their_order<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    let notices = |names: &[&str]| names.iter().map(|name| RunEvent::Notice((*name).to_owned())).collect();
    let begin = step(id(1), Position::START, place(Preparing, 1));
    let last = apply(&*store, Transition { events: notices(&["a", "b", "c"]), ..begin }).await;
    assert_eq!(last, 4);
    let silent = step(id(1), place(Preparing, 1), place(Running, 1));
    assert_eq!(apply(&*store, Transition { events: Vec::new(), ..silent }).await, 4);
    let more = step(id(1), place(Running, 1), place(Publishing, 1));
    assert_eq!(apply(&*store, Transition { events: notices(&["d"]), time: at(77), ..more }).await, 5);
    let events = all_events(&*store, id(1)).await;
    let rest: Vec<RunEvent> = events.iter().skip(1).map(|event| event.event.clone()).collect();
    assert_eq!(rest, notices(&["a", "b", "c", "d"]) as Vec<RunEvent>);
    assert_eq!(events[4].time, at(77));
    assert_consecutive(&*store, id(1)).await;
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn timers_are_replaced_as_a_set<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    create(&*store, run(2)).await;
    let (pending, deadline) = (timer(TimerKind::Pending, 5), timer(TimerKind::Deadline, 6));
    let begin = |n| step(id(n), Position::START, place(Preparing, 1));
    apply(&*store, Transition { timers: vec![pending, deadline], ..begin(1) }).await;
    apply(&*store, Transition { timers: vec![pending], ..begin(2) }).await;
    let later = timer(TimerKind::Deadline, 60);
    let start = step(id(1), place(Preparing, 1), place(Running, 1));
    apply(&*store, Transition { timers: vec![later], ..start }).await;
    let mut timers = store.live().await.unwrap().timers;
    timers.sort_by_key(|(run, timer)| (*run, timer.kind));
    assert_eq!(timers, [(id(1), later), (id(2), pending)]);
    apply(&*store, step(id(2), place(Preparing, 1), place(Running, 1))).await;
    assert_eq!(store.live().await.unwrap().timers, [(id(1), later)]);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn a_terminal_position_leaves_no_timers<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    create(&*store, run(2)).await;
    let begin = step(id(1), Position::START, place(Preparing, 1));
    let set = vec![timer(TimerKind::Pending, 5), timer(TimerKind::Deadline, 6), timer(TimerKind::Retry, 7)];
    apply(&*store, Transition { timers: set, ..begin }).await;
    assert_eq!(store.live().await.unwrap().timers.len(), 3);
    apply(&*store, step(id(1), place(Preparing, 1), place(Failed, 1))).await;
    let live = store.live().await.unwrap();
    assert_eq!(live.timers, []);
    assert_eq!(live.quarantined, []);
    assert_eq!(live.runs.len(), 1);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn ended_attempts_are_kept_in_order<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    for attempt in 1..=12 {
        apply(&*store, step(id(1), place(Queued, attempt - 1), place(Preparing, attempt))).await;
        let retry = step(id(1), place(Preparing, attempt), place(Queued, attempt));
        apply(&*store, Transition { ended_attempt: Some(ended(attempt)), ..retry }).await;
    }
    let expected: Vec<_> = (1..=12).map(ended).collect();
    assert_eq!(store.attempts(id(1)).await.unwrap(), expected);
    // An attempt ends once.
    let before = must_get(&*store, id(1)).await;
    let again = step(id(1), place(Queued, 12), place(Preparing, 13));
    let error = store.transition(Transition { ended_attempt: Some(ended(12)), ..again }).await.unwrap_err();
    assert!(matches!(error, StoreError::Other(_)), "{error:?}");
    assert_eq!(must_get(&*store, id(1)).await, before);
    assert_eq!(store.attempts(id(1)).await.unwrap(), expected);
    assert_consecutive(&*store, id(1)).await;
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn one_failure_fails_only_itself<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    for n in 0..64 {
        create(&*store, run(n)).await;
        lead(&*store, id(n), &[(Preparing, 1)]).await;
        let retry = step(id(n), place(Preparing, 1), place(Queued, 1));
        apply(&*store, Transition { ended_attempt: Some(ended(1)), ..retry }).await;
    }
    // At once, so that a store that groups has both in one group: every eighth ends an attempt twice, and one of them would
    // end its run besides.
    let tasks: Vec<_> = (0..64u128)
        .map(|n| {
            let store = Arc::clone(&store);
            let next = if n == 8 { place(Failed, 1) } else { place(Preparing, 2) };
            let mut begin = step(id(n), place(Queued, 1), next);
            begin.ended_attempt = (n % 8 == 0).then(|| ended(1));
            spawn(TaskKind::Helper, "mixed", async move { store.transition(begin).await })
        })
        .collect();
    for (n, task) in tasks.into_iter().enumerate() {
        let answer = task.await.expect("joined").expect("no panic");
        match n % 8 {
            0 => assert!(matches!(answer, Err(StoreError::Other(_))), "{n}: {answer:?}"),
            _ => assert_eq!(answer.unwrap(), Transitioned::Applied { last_event: 4 }, "{n}"),
        }
    }
    for n in 0..64 {
        let expected = if n % 8 == 0 { place(Queued, 1) } else { place(Preparing, 2) };
        assert_eq!(must_get(&*store, id(n)).await.position, expected, "{n}");
        assert_consecutive(&*store, id(n)).await;
    }
    assert_eq!(store.live_count().await.unwrap(), 64);
}
