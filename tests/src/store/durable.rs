//! Rule 1: what was answered is there after the store was closed and opened again. And what a restart reads.

use runner_core::{
    state::{
        Position,
        RunState::{Preparing, Queued, Running},
    },
    store::{Accepted, LiveLimits, NewRun, RunEvent, RunFilter, TimerKind, Transition},
};

use super::{
    StoreFactory,
    kit::{
        all_events, apply, at, create, ended, id, in_queue, intent, key, labelled, lead, must_get, numbers,
        place, run, step, succeed, tenant, timer,
    },
};

#[allow(missing_docs, reason = "the name says it")]
pub async fn everything_survives_a_reopen<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, NewRun { key: Some(key("k")), ..labelled(1, &[("team", "x")]) }).await;
    lead(&*store, id(1), &[(Preparing, 1)]).await;
    let retry = Transition {
        not_before: Some(at(50)),
        ended_attempt: Some(ended(1)),
        timers: vec![timer(TimerKind::Retry, 50)],
        ..step(id(1), place(Preparing, 1), place(Queued, 1))
    };
    apply(&*store, retry).await;
    store.append_event(id(1), RunEvent::Notice("waits".to_owned()), at(5)).await.unwrap();
    create(&*store, run(2)).await;
    lead(&*store, id(2), &[(Preparing, 1)]).await;
    let start = step(id(2), place(Preparing, 1), place(Running, 1));
    apply(&*store, Transition { started: Some(at(4)), ..start }).await;
    store.request_cancel(id(2), intent("enough", 5), in_queue()).await.unwrap();
    create(&*store, run(3)).await;
    succeed(&*store, id(3)).await;

    let mut before = Vec::new();
    for n in 1..=3 {
        let run = must_get(&*store, id(n)).await;
        before.push((run, all_events(&*store, id(n)).await, store.attempts(id(n)).await.unwrap()));
    }
    let (live, list) =
        (store.live().await.unwrap(), store.list(&RunFilter::default(), None, 10).await.unwrap());
    drop(store);

    let store = factory.open().await;
    for (n, (run, events, attempts)) in (1..).zip(before) {
        assert_eq!(must_get(&*store, id(n)).await, run);
        assert_eq!(all_events(&*store, id(n)).await, events);
        assert_eq!(store.attempts(id(n)).await.unwrap(), attempts);
    }
    assert_eq!(store.live().await.unwrap(), live);
    assert_eq!(store.list(&RunFilter::default(), None, 10).await.unwrap(), list);
    let again = NewRun { key: Some(key("k")), ..labelled(9, &[("team", "x")]) };
    let answer = store.accept(again, super::kit::NO_LIMITS).await.unwrap();
    assert!(matches!(answer, Accepted::Existing(run) if run.id == id(1)), "the key is forgotten");
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn limits_count_what_was_there_before<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    for n in 1..=3 {
        create(&*store, run(n)).await;
    }
    create(&*store, NewRun { tenant: tenant("b"), ..run(4) }).await;
    succeed(&*store, id(1)).await;
    drop(store);

    let store = factory.open().await;
    assert_eq!(store.live_count().await.unwrap(), 3);
    let limits = LiveLimits { total: 4, per_tenant: 2 };
    let full = Accepted::Full { limit: "live_runs_per_tenant", max: 2 };
    assert_eq!(store.accept(run(5), limits).await.unwrap(), full);
    let other = |n| NewRun { tenant: tenant("b"), ..run(n) };
    assert!(matches!(store.accept(other(6), limits).await.unwrap(), Accepted::Created(_)));
    assert_eq!(store.accept(other(7), limits).await.unwrap(), Accepted::Full { limit: "live_runs", max: 4 });
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn live_runs_are_oldest_first_with_their_timers<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    for (n, second) in [(4, 1), (1, 9), (3, 3), (2, 3), (5, 4)] {
        create(&*store, NewRun { time: at(second), ..run(n) }).await;
    }
    succeed(&*store, id(5)).await;
    let deadline = timer(TimerKind::Deadline, 60);
    let begin = step(id(3), Position::START, place(Preparing, 1));
    apply(&*store, Transition { timers: vec![deadline], ..begin }).await;
    drop(store);
    let live = factory.open().await.live().await.unwrap();
    assert_eq!(numbers(&live.runs), [4, 2, 3, 1]);
    assert_eq!(live.timers, [(id(3), deadline)]);
    assert_eq!(live.quarantined, []);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn the_count_of_live_runs_is_right<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    assert_eq!(store.live_count().await.unwrap(), 0);
    for n in 0..5 {
        create(&*store, run(n)).await;
    }
    assert_eq!(store.live_count().await.unwrap(), 5);
    succeed(&*store, id(0)).await;
    store.request_cancel(id(1), intent("enough", 5), in_queue()).await.unwrap();
    store.request_cancel(id(1), intent("enough", 6), in_queue()).await.unwrap();
    lead(&*store, id(2), &[(Preparing, 1), (Queued, 1)]).await;
    assert_eq!(store.live_count().await.unwrap(), 3);
    drop(store);
    assert_eq!(factory.open().await.live_count().await.unwrap(), 3);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn a_probe_is_answered<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    store.probe().await.unwrap();
    store.probe().await.unwrap();
    assert_eq!(store.live_count().await.unwrap(), 0);
}
