//! Rule 2: accepting is atomic and idempotent, and a limit holds.

use std::{collections::HashSet, sync::Arc};

use runner_core::{
    spec::RunSpec,
    state::{Position, RunState},
    store::{Accepted, LiveLimits, NewRun, RunEvent, Store},
    task::{TaskKind, spawn},
};

use super::{
    StoreFactory,
    kit::{
        self, NO_LIMITS, all_events, create, id, in_queue, intent, key, must_get, run, spec, succeed, tenant,
        with_spec,
    },
};

const TASKS: u128 = 64;

async fn accept(store: &dyn Store, run: NewRun) -> Accepted {
    store.accept(run, NO_LIMITS).await.expect("the store answers")
}

/// Accepts from as many tasks at once.
async fn accept_at_once(
    store: &Arc<dyn Store>,
    runs: impl Iterator<Item = NewRun>,
    limits: LiveLimits,
) -> Vec<Accepted> {
    let tasks: Vec<_> = runs
        .map(|run| {
            let store = Arc::clone(store);
            spawn(TaskKind::Helper, "accept", async move { store.accept(run, limits).await })
        })
        .collect();
    let mut answers = Vec::new();
    for task in tasks {
        answers.push(task.await.expect("joined").expect("no panic").expect("the store answers"));
    }
    answers
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn a_new_run_is_at_the_start_with_one_event<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let new = NewRun { key: Some(key("k")), ..run(1) };
    let record = create(&*store, new.clone()).await;
    assert_eq!(record, new.clone().into_record());
    assert_eq!(record.position, Position::START);
    assert_eq!(must_get(&*store, id(1)).await, record);
    let events = all_events(&*store, id(1)).await;
    assert_eq!(events.len(), 1);
    assert_eq!((events[0].seq, events[0].time), (1, new.time));
    assert!(
        matches!(&events[0].event, RunEvent::StateChanged { position, .. } if *position == Position::START),
        "{events:?}"
    );
    assert_eq!(store.attempts(id(1)).await.unwrap(), []);
    assert_eq!(store.get(id(2)).await.unwrap(), None);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn the_same_id_with_the_same_spec_is_the_same_run<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    succeed(&*store, id(1)).await;
    let before = must_get(&*store, id(1)).await;
    let again = accept(&*store, NewRun { time: kit::at(99), ..run(1) }).await;
    assert_eq!(again, Accepted::Existing(before.clone()));
    assert_eq!(must_get(&*store, id(1)).await, before);
    assert_eq!(store.live_count().await.unwrap(), 0);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn the_same_id_with_another_spec_conflicts<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let record = create(&*store, run(1)).await;
    let answer = accept(&*store, with_spec(1, spec("false"))).await;
    assert_eq!(answer, Accepted::Conflict { field: "run_id" });
    assert_eq!(must_get(&*store, id(1)).await, record);
    assert_eq!(all_events(&*store, id(1)).await.len(), 1);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn an_id_of_another_tenant_conflicts<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    let answer = accept(&*store, NewRun { tenant: tenant("b"), ..run(1) }).await;
    assert_eq!(answer, Accepted::Conflict { field: "run_id" });
    assert_eq!(store.live_count().await.unwrap(), 1);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn the_same_key_with_the_same_spec_is_the_same_run<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let record = create(&*store, NewRun { key: Some(key("k")), ..run(1) }).await;
    let again = accept(&*store, NewRun { key: Some(key("k")), ..run(2) }).await;
    assert_eq!(again, Accepted::Existing(record));
    assert_eq!(store.get(id(2)).await.unwrap(), None);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn the_same_key_with_another_spec_conflicts<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, NewRun { key: Some(key("k")), ..run(1) }).await;
    let answer = accept(&*store, NewRun { key: Some(key("k")), ..with_spec(2, spec("false")) }).await;
    assert_eq!(answer, Accepted::Conflict { field: "idempotency_key" });
    assert_eq!(store.get(id(2)).await.unwrap(), None);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn a_key_belongs_to_its_tenant<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, NewRun { key: Some(key("k")), ..run(1) }).await;
    let other = NewRun { key: Some(key("k")), tenant: tenant("b"), ..with_spec(2, spec("false")) };
    let record = create(&*store, other).await;
    assert_eq!(record.tenant, tenant("b"));
    assert_eq!(store.live_count().await.unwrap(), 2);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn the_id_is_judged_before_the_key<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let first = create(&*store, NewRun { key: Some(key("k1")), ..run(1) }).await;
    create(&*store, NewRun { key: Some(key("k2")), ..with_spec(2, spec("false")) }).await;
    // Both are taken by other specs.
    let answer = accept(&*store, NewRun { key: Some(key("k2")), ..with_spec(1, spec("other")) }).await;
    assert_eq!(answer, Accepted::Conflict { field: "run_id" });
    // The id is right, the key names another spec's run.
    let answer = accept(&*store, NewRun { key: Some(key("k2")), ..run(1) }).await;
    assert_eq!(answer, Accepted::Conflict { field: "idempotency_key" });
    // The id is right, the key is nobody's: it stays nobody's.
    let answer = accept(&*store, NewRun { key: Some(key("k3")), ..run(1) }).await;
    assert_eq!(answer, Accepted::Existing(first));
    create(&*store, NewRun { key: Some(key("k3")), ..with_spec(3, spec("third")) }).await;
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn concurrent_duplicates_by_key_make_one_run<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let runs = (0..TASKS).map(|n| NewRun { key: Some(key("k")), ..run(n) });
    let answers = accept_at_once(&store, runs, NO_LIMITS).await;
    let mut created = 0;
    let mut ids = HashSet::new();
    for answer in answers {
        match answer {
            Accepted::Created(record) => {
                created += 1;
                ids.insert(record.id);
            }
            Accepted::Existing(record) => {
                ids.insert(record.id);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((created, ids.len()), (1, 1));
    assert_eq!(store.live_count().await.unwrap(), 1);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn concurrent_duplicates_by_id_make_one_run<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    // Half of them want another spec: one side wins, all of it.
    let runs = (0..TASKS).map(|n| with_spec(1, spec(if n % 2 == 0 { "true" } else { "false" })));
    let answers = accept_at_once(&store, runs, NO_LIMITS).await;
    let count = |wanted: fn(&Accepted) -> bool| answers.iter().filter(|answer| wanted(answer)).count();
    assert_eq!(count(|a| matches!(a, Accepted::Created(_))), 1);
    assert_eq!(count(|a| matches!(a, Accepted::Existing(_))), 31);
    assert_eq!(count(|a| matches!(a, Accepted::Conflict { field: "run_id" })), 32);
    assert_eq!(all_events(&*store, id(1)).await.len(), 1);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn above_the_total_limit_nothing_is_stored<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let limits = LiveLimits { total: 2, per_tenant: 2 };
    for n in 1..=2 {
        let new = NewRun { tenant: tenant(["a", "b"][n % 2]), ..run(n as u128) };
        assert!(matches!(store.accept(new, limits).await.unwrap(), Accepted::Created(_)));
    }
    let answer = store.accept(run(3), limits).await.unwrap();
    assert_eq!(answer, Accepted::Full { limit: "live_runs", max: 2 });
    assert_eq!(store.get(id(3)).await.unwrap(), None);
    assert_eq!(store.live_count().await.unwrap(), 2);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn above_the_limit_of_a_tenant_nothing_is_stored<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let limits = LiveLimits { total: 10, per_tenant: 1 };
    assert!(matches!(store.accept(run(1), limits).await.unwrap(), Accepted::Created(_)));
    let keyed = NewRun { key: Some(key("k")), ..run(2) };
    let answer = store.accept(keyed.clone(), limits).await.unwrap();
    assert_eq!(answer, Accepted::Full { limit: "live_runs_per_tenant", max: 1 });
    assert_eq!(store.get(id(2)).await.unwrap(), None);
    let other = NewRun { tenant: tenant("b"), ..run(3) };
    assert!(matches!(store.accept(other, limits).await.unwrap(), Accepted::Created(_)));
    // The key was not taken by the run that was refused.
    create(&*store, NewRun { id: id(4), ..keyed }).await;
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn a_limit_holds_under_concurrency<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let limits = LiveLimits { total: 100, per_tenant: 10 };
    let answers = accept_at_once(&store, (0..TASKS).map(run), limits).await;
    let created = answers.iter().filter(|answer| matches!(answer, Accepted::Created(_))).count();
    let full = Accepted::Full { limit: "live_runs_per_tenant", max: 10 };
    assert_eq!(created, 10);
    assert_eq!(answers.iter().filter(|answer| **answer == full).count(), 54);
    assert_eq!(store.live().await.unwrap().runs.len(), 10);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn a_duplicate_is_found_where_a_limit_is_reached<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let limits = LiveLimits { total: 1, per_tenant: 1 };
    let new = NewRun { key: Some(key("k")), ..run(1) };
    let record = create(&*store, new.clone()).await;
    let answer = store.accept(new.clone(), limits).await.unwrap();
    assert_eq!(answer, Accepted::Existing(record.clone()));
    let answer = store.accept(NewRun { id: id(2), ..new }, limits).await.unwrap();
    assert_eq!(answer, Accepted::Existing(record));
    let answer = store.accept(with_spec(1, spec("false")), limits).await.unwrap();
    assert_eq!(answer, Accepted::Conflict { field: "run_id" });
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn a_run_that_ended_makes_room<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let limits = LiveLimits { total: 1, per_tenant: 1 };
    create(&*store, run(1)).await;
    succeed(&*store, id(1)).await;
    assert!(matches!(store.accept(run(2), limits).await.unwrap(), Accepted::Created(_)));
    store.request_cancel(id(2), intent("enough", 5), in_queue()).await.unwrap();
    assert!(matches!(store.accept(run(3), limits).await.unwrap(), Accepted::Created(_)));
    assert!(matches!(store.accept(run(4), limits).await.unwrap(), Accepted::Full { .. }));
    assert_eq!(must_get(&*store, id(3)).await.position.state, RunState::Queued);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn a_spec_of_a_mebibyte_comes_back_whole<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let big = RunSpec { args: vec!["x".repeat(1024 * 1024)], ..spec("true") };
    let record = create(&*store, with_spec(1, big.clone())).await;
    assert_eq!(*record.spec, big);
    drop(store);
    let store = factory.open().await;
    assert_eq!(*must_get(&*store, id(1)).await.spec, big);
    succeed(&*store, id(1)).await;
    assert_eq!(*must_get(&*store, id(1)).await.spec, big);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn unusual_text_comes_back_as_it_was<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let odd = "line\nline\r\n\t'\"\\ %_ -- ; \u{1f680} \u{202e} \u{feff} ü \u{0}end";
    let new = NewRun {
        key: Some(key("'; DROP TABLE runs; -- \u{1f511} \u{202e}")),
        backend_reason: odd.to_owned(),
        ..kit::labelled(1, &[("emoji \u{1f680}", "new\nline"), ("quote'", "%")])
    };
    let record = create(&*store, new.clone()).await;
    assert_eq!(record, new.clone().into_record());
    assert_eq!(must_get(&*store, id(1)).await, record);
    assert_eq!(accept(&*store, NewRun { id: id(2), ..new.clone() }).await, Accepted::Existing(record));
    store.append_event(id(1), RunEvent::Notice(odd.to_owned()), kit::at(2)).await.unwrap();
    let events = all_events(&*store, id(1)).await;
    assert_eq!(events[1].event, RunEvent::Notice(odd.to_owned()));
    let answer = store.request_cancel(id(1), intent(odd, 3), in_queue()).await.unwrap();
    assert_eq!(answer.run.cancel.unwrap().reason, odd);
    assert_eq!(must_get(&*store, id(1)).await.cancel.unwrap().reason, odd);
}
