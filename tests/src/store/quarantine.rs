//! Rule 6: a row that does not decode fails only verbs about that row.

use runner_core::{
    state::{Position, RunState::Preparing},
    store::{Inconsistency, NewRun, RunFilter, StoreError, TimerKind, Transition},
};

use super::{
    StoreFactory,
    kit::{
        NO_LIMITS, apply, create, id, in_queue, intent, key, lead, must_get, numbers, place, run, step,
        succeed, timer,
    },
};

fn assert_names_it(inconsistency: &Inconsistency) {
    assert_eq!((inconsistency.table, inconsistency.column), ("runs", "state"));
    assert_eq!(inconsistency.key, id(2).to_string());
    assert!(!inconsistency.detail.is_empty());
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn a_row_that_does_not_decode_fails_only_its_own_verbs<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    for n in 1..=3 {
        create(&*store, NewRun { key: Some(key(&format!("k{n}"))), ..run(n) }).await;
    }
    factory.corrupt(id(2)).await;

    let begin = |n| step(id(n), Position::START, place(Preparing, 1));
    let duplicate = NewRun { key: Some(key("k2")), ..run(9) };
    for error in [
        store.get(id(2)).await.unwrap_err(),
        store.transition(begin(2)).await.unwrap_err(),
        store.request_cancel(id(2), intent("enough", 5), in_queue()).await.unwrap_err(),
        store.accept(duplicate, NO_LIMITS).await.unwrap_err(),
    ] {
        let StoreError::Inconsistent(inconsistency) = error else { panic!("{error:?}") };
        assert_names_it(&inconsistency);
    }
    apply(&*store, begin(1)).await;
    store.request_cancel(id(3), intent("enough", 5), in_queue()).await.unwrap();
    create(&*store, run(4)).await;
    succeed(&*store, id(4)).await;
    assert_eq!(must_get(&*store, id(1)).await.position, place(Preparing, 1));
    store.probe().await.unwrap();
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn live_reports_what_does_not_decode_and_goes_on<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    for n in 1..=3 {
        create(&*store, run(n)).await;
        let begin = step(id(n), Position::START, place(Preparing, 1));
        apply(&*store, Transition { timers: vec![timer(TimerKind::Pending, 9)], ..begin }).await;
    }
    factory.corrupt(id(2)).await;
    drop(store);
    let live = factory.open().await.live().await.unwrap();
    assert_eq!(numbers(&live.runs), [1, 3]);
    let timers: Vec<_> = live.timers.iter().map(|(run, _)| *run).collect();
    assert_eq!(timers, [id(1), id(3)]);
    assert_eq!(live.quarantined.len(), 1);
    assert_names_it(&live.quarantined[0]);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn listings_leave_out_what_does_not_decode<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    for n in 1..=4 {
        create(&*store, run(n)).await;
    }
    lead(&*store, id(3), &[(Preparing, 1)]).await;
    factory.corrupt(id(2)).await;
    for max in 1..=5 {
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            let page = store.list(&RunFilter::default(), after, max).await.unwrap();
            seen.extend(numbers(&page.runs));
            match page.next {
                Some(next) => after = Some(next),
                None => break,
            }
        }
        assert_eq!(seen, [4, 3, 1], "pages of {max}");
    }
}
