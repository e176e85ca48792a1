//! Rule 7: listings are complete, ordered, and stable while runs are added.

use std::collections::BTreeMap;

use runner_core::{
    state::RunState::{Cancelled, Preparing, Queued, Running, Succeeded},
    store::{NewRun, PageCursor, RunFilter, RunRecord, Store},
};

use super::{
    StoreFactory,
    kit::{at, backend, create, id, in_queue, intent, labelled, lead, numbers, run, succeed, tenant},
};

/// Every run that the filter selects, read in pages of `max`.
async fn pages(store: &dyn Store, filter: &RunFilter, max: usize) -> Vec<RunRecord> {
    let mut found = Vec::new();
    let mut after = None;
    loop {
        let page = store.list(filter, after, max).await.expect("the store answers");
        assert!(page.runs.len() <= max);
        let last = page.runs.last().map(|run| PageCursor { created: run.created, id: run.id });
        assert!(page.next.is_none() || page.next == last, "the cursor is not the last run's");
        found.extend(page.runs);
        match page.next {
            Some(next) => after = Some(next),
            None => return found,
        }
    }
}

async fn listed(store: &dyn Store, filter: &RunFilter) -> Vec<u128> {
    let by_one = numbers(&pages(store, filter, 1).await);
    assert_eq!(
        by_one,
        numbers(&pages(store, filter, 1000).await),
        "the size of a page changes what is listed"
    );
    by_one
}

fn labels(labels: &[(&str, &str)]) -> BTreeMap<String, String> {
    labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn newest_first_and_by_id_where_times_are_equal<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    // Neither the order of acceptance nor that of ids is the order of time.
    for (n, second) in [(5, 1), (1, 9), (3, 3), (2, 3), (4, 3)] {
        create(&*store, NewRun { time: at(second), ..run(n) }).await;
    }
    assert_eq!(listed(&*store, &RunFilter::default()).await, [1, 4, 3, 2, 5]);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn pages_show_every_run_once<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    for n in 0..50 {
        // Ten runs for each moment, so that pages end between equal times.
        create(&*store, NewRun { time: at((n / 10) as u64), ..run(n) }).await;
    }
    let expected: Vec<u128> = (0..50).rev().collect();
    for max in [1, 3, 7, 10, 49, 50, 51] {
        assert_eq!(numbers(&pages(&*store, &RunFilter::default(), max).await), expected, "pages of {max}");
    }
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn pages_are_stable_while_runs_are_added<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    for n in 0..20 {
        create(&*store, run(n)).await;
    }
    let filter = RunFilter { tenant: Some(tenant("a")), ..RunFilter::default() };
    let (mut seen, mut after, mut added) = (Vec::new(), None, 100);
    loop {
        let page = store.list(&filter, after, 3).await.unwrap();
        seen.extend(numbers(&page.runs));
        let Some(next) = page.next else { break };
        after = Some(next);
        // One that is newer than all, and one that a wall clock which stepped back has dated between.
        create(&*store, run(added)).await;
        create(&*store, NewRun { time: at(5), ..run(added + 1) }).await;
        added += 2;
    }
    seen.retain(|n| *n < 20);
    assert_eq!(seen, (0..20).rev().collect::<Vec<u128>>());
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn the_last_page_has_no_successor<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    for n in 0..4 {
        create(&*store, run(n)).await;
    }
    let filter = RunFilter::default();
    let first = store.list(&filter, None, 2).await.unwrap();
    assert_eq!(first.next, Some(PageCursor { created: at(2), id: id(2) }));
    let last = store.list(&filter, first.next, 2).await.unwrap();
    assert_eq!((numbers(&last.runs), last.next), (vec![1, 0], None));
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn each_filter_selects<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, labelled(1, &[("team", "x"), ("stage", "one")])).await;
    create(&*store, NewRun { tenant: tenant("b"), ..labelled(2, &[("team", "x")]) }).await;
    create(&*store, NewRun { backend: backend("other"), ..labelled(3, &[("team", "y")]) }).await;
    create(&*store, run(4)).await;
    create(&*store, run(5)).await;
    succeed(&*store, id(1)).await;
    lead(&*store, id(4), &[(Preparing, 1), (Running, 1)]).await;
    store.request_cancel(id(5), intent("enough", 6), in_queue()).await.unwrap();

    let all = RunFilter::default();
    let cases: [(RunFilter, &[u128]); 16] = [
        (RunFilter { tenant: Some(tenant("a")), ..all.clone() }, &[5, 4, 3, 1]),
        (RunFilter { tenant: Some(tenant("b")), ..all.clone() }, &[2]),
        (RunFilter { tenant: Some(tenant("c")), ..all.clone() }, &[]),
        (RunFilter { states: vec![Succeeded], ..all.clone() }, &[1]),
        (RunFilter { states: vec![Succeeded, Cancelled, Running], ..all.clone() }, &[5, 4, 1]),
        (RunFilter { states: vec![Queued, Preparing, Running], ..all.clone() }, &[4, 3, 2]),
        (RunFilter { backend: Some(backend("other")), ..all.clone() }, &[3]),
        (RunFilter { labels: labels(&[("team", "x")]), ..all.clone() }, &[2, 1]),
        (RunFilter { labels: labels(&[("team", "x"), ("stage", "one")]), ..all.clone() }, &[1]),
        (RunFilter { labels: labels(&[("team", "X")]), ..all.clone() }, &[]),
        (RunFilter { labels: labels(&[("team", "")]), ..all.clone() }, &[]),
        (RunFilter { created_from: Some(at(3)), ..all.clone() }, &[5, 4, 3]),
        (RunFilter { created_until: Some(at(3)), ..all.clone() }, &[2, 1]),
        (RunFilter { created_from: Some(at(2)), created_until: Some(at(4)), ..all.clone() }, &[3, 2]),
        (RunFilter { created_from: Some(at(4)), created_until: Some(at(2)), ..all.clone() }, &[]),
        (all, &[5, 4, 3, 2, 1]),
    ];
    for (filter, expected) in cases {
        assert_eq!(listed(&*store, &filter).await, expected, "{filter:?}");
    }
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn all_filters_together_select<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let filter = RunFilter {
        tenant: Some(tenant("b")),
        states: vec![Queued],
        backend: Some(backend("other")),
        labels: labels(&[("a", "1"), ("b", "2"), ("c", "3")]),
        created_from: Some(at(2)),
        created_until: Some(at(40)),
    };
    let fits = |n| NewRun {
        tenant: tenant("b"),
        backend: backend("other"),
        ..labelled(n, &[("a", "1"), ("b", "2"), ("c", "3"), ("d", "4")])
    };
    for n in [2, 3, 4, 39, 40] {
        create(&*store, fits(n)).await;
    }
    // Each misses by one thing.
    create(&*store, fits(1)).await;
    create(&*store, NewRun { tenant: tenant("a"), ..fits(10) }).await;
    create(&*store, NewRun { backend: backend("local"), ..fits(11) }).await;
    let missing = labelled(12, &[("a", "1"), ("b", "2"), ("c", "4")]);
    create(&*store, NewRun { tenant: tenant("b"), backend: backend("other"), ..missing }).await;
    create(&*store, fits(13)).await;
    lead(&*store, id(13), &[(Preparing, 1)]).await;
    assert_eq!(listed(&*store, &filter).await, [39, 4, 3, 2]);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn of_nothing_is_empty<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    assert_eq!(listed(&*store, &RunFilter::default()).await, [] as [u128; 0]);
    create(&*store, run(1)).await;
    let cursor = PageCursor { created: at(0), id: id(0) };
    let page = store.list(&RunFilter::default(), Some(cursor), 10).await.unwrap();
    assert_eq!((page.runs, page.next), (vec![], None));
}
