//! Rules 13 and 14: runs and their shadows.
#![allow(missing_docs, reason = "a case's name is the sentence that it shows")]

use runner_core::{
    outcome::{Cause, Outcome},
    shadow::{Facts, Pair, PairFilter, PairRecord, Phases, Stage, Verdict, compare},
    state::RunState::{Preparing, Publishing, Running, Succeeded},
    store::{Accepted, LiveLimits, NewRun, Removed, RunFilter, Store, StoreError, Transition},
    traffic::NoShadow,
};

use super::{
    StoreFactory,
    kit::{
        NO_LIMITS, apply, at, backend, create, id, labelled, lead, must_get, place, run, step, succeed,
        tenant,
    },
};

/// No run fits.
const NO_ROOM: LiveLimits = LiveLimits { total: 0, per_tenant: 0 };

fn pair(n: u128) -> Pair {
    Pair {
        primary: id(n),
        tenant: tenant("a"),
        image: Some(format!("image {}", n % 2)),
        primary_backend: backend("dind"),
        shadow_backend: backend(if n.is_multiple_of(3) { "other" } else { "k8s" }),
    }
}

/// The pair of run number `n` as it is once the run has ended, at this stage, as the store's pair number `number`.
fn stored(number: u64, n: u128, stage: Stage) -> PairRecord {
    PairRecord { number, pair: pair(n), stage, since: at(1000), judged: None, verdict: None }
}

/// Run number `n`, brought to its end, with its pair.
async fn end(store: &dyn Store, n: u128) {
    create(store, run(n)).await;
    lead(store, id(n), &[(Preparing, 1), (Running, 1), (Publishing, 1)]).await;
    let end = step(id(n), place(Publishing, 1), place(Succeeded, 1));
    apply(store, Transition { pair: Some(pair(n)), ..end }).await;
}

fn shadow_of(n: u128) -> NewRun {
    NewRun { id: id(n).shadow(), backend: backend("k8s"), ..labelled(n, &[("team", "x")]) }
}

async fn begin(store: &dyn Store, n: u128) -> Accepted {
    store.accept(shadow_of(n), NO_ROOM).await.expect("the store answers")
}

fn compared(agrees: bool) -> Verdict {
    let (one, other) = (
        Outcome::new(1, Cause::Exited, ""),
        Outcome::new(1, if agrees { Cause::Exited } else { Cause::Lost }, ""),
    );
    let facts = |outcome| Facts { outcome, log: None, phases: Phases::default() };
    Verdict::Compared(Box::new(compare(facts(&one), facts(&other))))
}

pub async fn a_pair_is_stored_with_the_end_of_its_primary<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    lead(&*store, id(1), &[(Preparing, 1), (Running, 1)]).await;
    let end = step(id(1), place(Running, 1), place(Succeeded, 1));
    let with = |transition: &Transition| Transition { pair: Some(pair(1)), ..transition.clone() };
    // Elsewhere it changes nothing; and what is no end has no pair.
    let elsewhere = step(id(1), place(Publishing, 1), place(Succeeded, 1));
    store.transition(with(&elsewhere)).await.unwrap();
    let on = step(id(1), place(Running, 1), place(Publishing, 1));
    for bad in [with(&on), Transition { pair: Some(pair(2)), ..end.clone() }] {
        assert!(matches!(store.transition(bad).await, Err(StoreError::Other(_))));
    }
    assert_eq!(store.pair(id(1)).await.unwrap(), None);
    apply(&*store, with(&end)).await;
    let expected = stored(1, 1, Stage::Pending);
    assert_eq!(store.pair(id(1)).await.unwrap(), Some(expected.clone()));
    assert_eq!(store.pair(id(1).shadow()).await.unwrap(), Some(expected.clone()));
    assert_eq!(store.pairs_at(Stage::Pending, 10).await.unwrap(), [expected]);
    assert_eq!(store.pairs(&PairFilter::default(), None, 10).await.unwrap(), [], "it has no verdict");
    for stage in [Stage::Compared, Stage::Skipped] {
        assert!(matches!(store.pairs_at(stage, 10).await, Err(StoreError::Other(_))));
    }
}

pub async fn a_shadow_is_accepted_once_and_only_where_its_pair_waits_for_it<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let refused = Accepted::Conflict { field: "run_id" };
    assert_eq!(begin(&*store, 1).await, refused, "there is no such pair");
    end(&*store, 1).await;
    let Accepted::Created(record) = begin(&*store, 1).await else { panic!("not created") };
    assert_eq!((record.id, &record.backend), (id(1).shadow(), &backend("k8s")));
    assert_eq!(store.pair(id(1)).await.unwrap(), Some(stored(1, 1, Stage::Running)));
    assert_eq!(begin(&*store, 1).await, Accepted::Existing(record));
    assert_eq!(store.pairs_at(Stage::Pending, 10).await.unwrap(), []);
    // Not once it was judged, nor while its primary is being removed.
    end(&*store, 2).await;
    assert!(store.judge_pair(id(2), &Verdict::Skipped(NoShadow::Late), at(5)).await.unwrap());
    assert_eq!(begin(&*store, 2).await, refused);
    end(&*store, 3).await;
    assert_eq!(store.begin_removal(id(3)).await.unwrap(), Removed::Gone);
    assert_eq!(begin(&*store, 3).await, refused);
    assert_eq!(store.get(id(3).shadow()).await.unwrap(), None);
}

pub async fn concurrent_beginnings_make_one_shadow<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    end(&*store, 1).await;
    let answers = futures::future::join_all((0..8).map(|_| begin(&*store, 1))).await;
    let created = answers.iter().filter(|answer| matches!(answer, Accepted::Created(_))).count();
    let found = answers.iter().filter(|answer| matches!(answer, Accepted::Existing(_))).count();
    assert_eq!((created, found), (1, 7), "{answers:?}");
}

pub async fn a_shadow_counts_against_no_limit_and_no_listing_shows_it<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    end(&*store, 1).await;
    begin(&*store, 1).await;
    assert_eq!(store.live_count().await.unwrap(), 0);
    let one = LiveLimits { total: 1, per_tenant: 1 };
    assert!(matches!(store.accept(run(2), one).await.unwrap(), Accepted::Created(_)));
    let labels = [("team".to_owned(), "x".to_owned())];
    for (filter, expected) in [
        (RunFilter::default(), vec![id(2), id(1)]),
        (RunFilter { tenant: Some(tenant("a")), ..RunFilter::default() }, vec![id(2), id(1)]),
        (RunFilter { labels: labels.into(), ..RunFilter::default() }, vec![]),
        (
            RunFilter { states: vec![runner_core::state::RunState::Queued], ..RunFilter::default() },
            vec![id(2)],
        ),
        (RunFilter { backend: Some(backend("k8s")), ..RunFilter::default() }, vec![]),
    ] {
        let page = store.list(&filter, None, 10).await.unwrap();
        assert_eq!(page.runs.iter().map(|run| run.id).collect::<Vec<_>>(), expected, "{filter:?}");
    }
    // It is driven like any run, also by the process after this one.
    drop(store);
    let store = factory.open().await;
    assert_eq!(store.live_count().await.unwrap(), 1);
    let live = store.live().await.unwrap();
    assert!(live.runs.iter().any(|run| run.id == id(1).shadow()), "{live:?}");
    succeed(&*store, id(1).shadow()).await;
    assert_eq!(store.live_count().await.unwrap(), 1);
    assert!(matches!(store.accept(run(3), one).await.unwrap(), Accepted::Full { .. }));
}

pub async fn a_verdict_is_stored_once_and_read_back<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    end(&*store, 1).await;
    begin(&*store, 1).await;
    assert!(!store.judge_pair(id(9), &compared(true), at(5)).await.unwrap());
    assert!(store.judge_pair(id(1), &compared(false), at(5)).await.unwrap());
    assert!(!store.judge_pair(id(1), &compared(true), at(6)).await.unwrap());
    let expected =
        PairRecord { judged: Some(at(5)), verdict: Some(compared(false)), ..stored(1, 1, Stage::Compared) };
    drop(store);
    let store = factory.open().await;
    assert_eq!(store.pair(id(1)).await.unwrap(), Some(expected));
    assert_eq!(store.pairs_at(Stage::Running, 10).await.unwrap(), []);
}

pub async fn pairs_are_listed_newest_first_by_every_filter_in_pages<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    for n in 1..=6 {
        end(&*store, n).await;
        let verdict = match n {
            2 => Verdict::Skipped(NoShadow::Drained),
            6 => continue,
            _ => compared(n % 2 == 0),
        };
        assert!(store.judge_pair(id(n), &verdict, at(5)).await.unwrap());
    }
    let all = PairFilter::default();
    let list = async |filter: &PairFilter, before, max| {
        let found = store.pairs(filter, before, max).await.unwrap();
        found.iter().map(|record| record.number).collect::<Vec<_>>()
    };
    assert_eq!(list(&all, None, 2).await, [5, 4]);
    assert_eq!(list(&all, Some(4), 10).await, [3, 2, 1]);
    for (filter, expected) in [
        (PairFilter { image: Some("image 0".to_owned()), ..all.clone() }, vec![4, 2]),
        (PairFilter { shadow_backend: Some(backend("other")), ..all.clone() }, vec![3]),
        (PairFilter { primary_backend: Some(backend("other")), ..all.clone() }, vec![]),
        (PairFilter { since: Some(at(1000)), ..all.clone() }, vec![5, 4, 3, 2, 1]),
        (PairFilter { since: Some(at(1001)), ..all.clone() }, vec![]),
        (PairFilter { differing: true, ..all.clone() }, vec![5, 3, 1]),
        (PairFilter { differing: true, shadow_backend: Some(backend("k8s")), ..all.clone() }, vec![5, 1]),
    ] {
        assert_eq!(list(&filter, None, 10).await, expected, "{filter:?}");
        assert_eq!(list(&filter, None, 1).await, expected[..expected.len().min(1)], "{filter:?}");
    }
}

pub async fn a_pair_goes_with_either_of_its_runs<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let none = async |n: u128| assert_eq!(store.pair(id(n)).await.unwrap(), None, "{n}");
    // The shadow never was.
    for n in [1, 2] {
        end(&*store, n).await;
    }
    store.judge_pair(id(2), &Verdict::Skipped(NoShadow::Late), at(5)).await.unwrap();
    for n in [1, 2] {
        assert_eq!(store.remove(id(n)).await.unwrap(), Removed::Gone);
        none(n).await;
    }
    // The shadow is over, and is removed first.
    end(&*store, 3).await;
    begin(&*store, 3).await;
    succeed(&*store, id(3).shadow()).await;
    assert_eq!(store.remove(id(3).shadow()).await.unwrap(), Removed::Gone);
    none(3).await;
    assert_eq!(must_get(&*store, id(3)).await.position.state, Succeeded);
    // The shadow outlives its primary, whether it was compared or not.
    for n in [4, 5] {
        end(&*store, n).await;
        begin(&*store, n).await;
    }
    assert!(store.judge_pair(id(5), &compared(false), at(5)).await.unwrap());
    for n in [4, 5] {
        assert_eq!(store.remove(id(n)).await.unwrap(), Removed::Gone);
    }
    let orphans = store.pairs_at(Stage::Orphaned, 10).await.unwrap();
    assert_eq!(orphans, [stored(4, 4, Stage::Orphaned), stored(5, 5, Stage::Orphaned)]);
    assert!(!store.judge_pair(id(4), &compared(true), at(5)).await.unwrap());
    assert_eq!(store.pairs(&PairFilter::default(), None, 10).await.unwrap(), []);
    succeed(&*store, id(4).shadow()).await;
    assert_eq!(store.remove(id(4).shadow()).await.unwrap(), Removed::Gone);
    none(4).await;
    // A number is not given twice.
    end(&*store, 6).await;
    assert!(store.pair(id(6)).await.unwrap().is_some_and(|record| record.number == 6));
    assert!(matches!(store.accept(shadow_of(4), NO_LIMITS).await.unwrap(), Accepted::Conflict { .. }));
}
