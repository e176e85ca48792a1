//! Rule 5: the first intent to cancel is kept, and a queued run ends with it.

use std::sync::Arc;

use runner_core::{
    state::{
        Position,
        RunState::{Cancelled, Preparing, Publishing, Queued, Running, Succeeded},
    },
    store::{RunEvent, StoreError, TimerKind, Transition, Transitioned},
    task::{TaskKind, spawn},
};

use super::{
    StoreFactory,
    kit::{
        all_events, apply, assert_consecutive, at, create, id, in_queue, intent, lead, must_get, place, run,
        step, succeed, timer,
    },
};

#[allow(missing_docs, reason = "the name says it")]
pub async fn a_queued_run_is_cancelled_at_once<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let mut expected = create(&*store, run(1)).await;
    let answer = store.request_cancel(id(1), intent("enough", 5), in_queue()).await.unwrap();
    expected.position = place(Cancelled, 0);
    expected.cancel = Some(intent("enough", 5));
    expected.ended = Some(at(5));
    expected.outcome = Some(in_queue());
    expected.last_event = 2;
    assert_eq!((answer.newly, &answer.run), (true, &expected));
    assert_eq!(must_get(&*store, id(1)).await, expected);
    let events = all_events(&*store, id(1)).await;
    let end = RunEvent::Terminated { position: place(Cancelled, 0), outcome: in_queue() };
    assert_eq!((events.len(), events[1].time, &events[1].event), (2, at(5), &end));
    assert_eq!(store.live_count().await.unwrap(), 0);
    assert_eq!(store.live().await.unwrap().runs, []);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn a_run_between_two_attempts_is_cancelled_at_once<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    lead(&*store, id(1), &[(Preparing, 1)]).await;
    let retry = step(id(1), place(Preparing, 1), place(Queued, 1));
    let timers = vec![timer(TimerKind::Retry, 50)];
    apply(&*store, Transition { not_before: Some(at(50)), timers, ..retry }).await;
    let answer = store.request_cancel(id(1), intent("enough", 5), in_queue()).await.unwrap();
    assert_eq!((answer.newly, answer.run.position), (true, place(Cancelled, 1)));
    assert_eq!((answer.run.not_before, answer.run.ended), (None, Some(at(5))));
    assert_eq!(must_get(&*store, id(1)).await, answer.run);
    let live = store.live().await.unwrap();
    assert_eq!((live.runs.len(), live.timers.len()), (0, 0));
    assert_consecutive(&*store, id(1)).await;
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn a_running_run_gets_an_intent<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    for (n, way) in
        [&[(Preparing, 1)][..], &[(Preparing, 1), (Running, 1)], &[(Preparing, 1), (Publishing, 1)]]
            .into_iter()
            .enumerate()
    {
        let run = run(n as u128);
        create(&*store, run.clone()).await;
        lead(&*store, run.id, way).await;
        let mut expected = must_get(&*store, run.id).await;
        let answer = store.request_cancel(run.id, intent("enough", 5), in_queue()).await.unwrap();
        expected.cancel = Some(intent("enough", 5));
        assert_eq!((answer.newly, &answer.run), (true, &expected));
        assert_eq!(must_get(&*store, run.id).await, expected);
    }
    assert_eq!(store.live_count().await.unwrap(), 3);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn only_the_first_intent_is_kept<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    lead(&*store, id(1), &[(Preparing, 1)]).await;
    store.request_cancel(id(1), intent("first", 5), in_queue()).await.unwrap();
    let answer = store.request_cancel(id(1), intent("second", 6), in_queue()).await.unwrap();
    assert_eq!((answer.newly, answer.run.cancel), (false, Some(intent("first", 5))));
    assert_eq!(must_get(&*store, id(1)).await.cancel, Some(intent("first", 5)));
    // Back in the queue, with the intent still there: the next call ends it.
    apply(&*store, step(id(1), place(Preparing, 1), place(Queued, 1))).await;
    let answer = store.request_cancel(id(1), intent("third", 7), in_queue()).await.unwrap();
    assert_eq!((answer.newly, answer.run.position), (false, place(Cancelled, 1)));
    assert_eq!((answer.run.cancel, answer.run.ended), (Some(intent("first", 5)), Some(at(7))));
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn of_a_terminal_run_nothing_changes<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    succeed(&*store, id(1)).await;
    create(&*store, run(2)).await;
    store.request_cancel(id(2), intent("first", 5), in_queue()).await.unwrap();
    for n in 1..=2 {
        let before = must_get(&*store, id(n)).await;
        let answer = store.request_cancel(id(n), intent("late", 6), in_queue()).await.unwrap();
        assert_eq!((answer.newly, &answer.run), (false, &before));
        assert_eq!(must_get(&*store, id(n)).await, before);
        assert_consecutive(&*store, id(n)).await;
    }
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn of_an_unknown_run_is_not_found<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let error = store.request_cancel(id(1), intent("what", 5), in_queue()).await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound(which) if which == id(1)), "{error:?}");
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn no_attempt_begins_after_it<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    lead(&*store, id(1), &[(Preparing, 1)]).await;
    store.request_cancel(id(1), intent("enough", 5), in_queue()).await.unwrap();
    let here = must_get(&*store, id(1)).await;
    let go = step(id(1), place(Preparing, 1), place(Running, 1));
    let answer = store.transition(Transition { unless_cancelled: true, ..go.clone() }).await.unwrap();
    assert_eq!(answer, Transitioned::Conflict(Box::new(here)));
    // A step that does not care goes on.
    apply(&*store, go).await;
}

/// One side asks to cancel, the other for `step`; answers whether the step applied.
async fn race<F: StoreFactory>(
    factory: &F,
    way: &[(runner_core::state::RunState, u32)],
    next: Transition,
) -> Vec<bool> {
    let store = factory.open().await;
    let mut applied = Vec::new();
    for n in 0..40 {
        let which = id(n);
        create(&*store, run(n)).await;
        lead(&*store, which, way).await;
        let (a, b) = (Arc::clone(&store), Arc::clone(&store));
        let next = Transition { run: which, ..next.clone() };
        let cancel = async move { a.request_cancel(which, intent("enough", 5), in_queue()).await };
        let go = async move { b.transition(next).await };
        // Both orders of submission.
        let (cancel, go) = if n % 2 == 0 {
            let cancel = spawn(TaskKind::Helper, "cancel", cancel);
            (cancel, spawn(TaskKind::Helper, "step", go))
        } else {
            let go = spawn(TaskKind::Helper, "step", go);
            (spawn(TaskKind::Helper, "cancel", cancel), go)
        };
        let cancelled = cancel.await.expect("joined").expect("no panic").expect("the store answers");
        let went = go.await.expect("joined").expect("no panic").expect("the store answers");
        let went = matches!(went, Transitioned::Applied { .. });
        let after = must_get(&*store, which).await;
        assert_consecutive(&*store, which).await;
        if went {
            assert_eq!(after.position.attempt, 1, "{after:?}");
            assert_ne!(after.position.state, Cancelled, "{after:?}");
        }
        if after.position.state == Cancelled {
            assert!(cancelled.newly && !went, "{after:?}");
        }
        applied.push(went);
    }
    applied
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn against_begin_it_has_one_winner<F: StoreFactory>(factory: &F) {
    let begin = step(id(0), Position::START, place(Preparing, 1));
    let begin = Transition { unless_cancelled: true, ..begin };
    let began = race(factory, &[], begin).await;
    let store = factory.open().await;
    for (n, began) in (0..).zip(began) {
        let after = must_get(&*store, id(n)).await;
        // Either it began, and the intent is there for the attempt to see; or it never began.
        let expected = if began { place(Preparing, 1) } else { place(Cancelled, 0) };
        assert_eq!(after.position, expected);
        assert!(after.cancel.is_some());
    }
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn against_an_exit_it_has_one_winner<F: StoreFactory>(factory: &F) {
    let way = [(Preparing, 1), (Running, 1), (Publishing, 1)];
    let end = step(id(0), place(Publishing, 1), place(Succeeded, 1));
    let ended = race(factory, &way, end).await;
    assert!(ended.iter().all(|ended| *ended), "a run that exited keeps its outcome");
    let store = factory.open().await;
    for n in 0..40 {
        assert_eq!(must_get(&*store, id(n)).await.position, place(Succeeded, 1));
    }
}
