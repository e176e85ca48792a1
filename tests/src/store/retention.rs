//! Rule 9: the order of ends, marks, and removal.
#![allow(missing_docs, reason = "a case's name is the sentence that it shows")]

use runner_core::{
    artifact::ArtifactKey,
    spec::{Input, InputSource, Output, RunSpec},
    state::RunState::Preparing,
    store::{Accepted, EndedCursor, EndedRun, NewRun, Removed, RunFilter, StoreError, Swept, Transition},
};

use super::{
    StoreFactory,
    kit::{
        NO_LIMITS, apply, at, create, id, in_queue, intent, key, labelled, lead, must_get, place, run, spec,
        step, succeed, tenant, with_spec,
    },
};

/// Ends a queued run at this time.
async fn end(store: &dyn runner_core::store::Store, n: u128, time: u64) {
    store.request_cancel(id(n), intent("enough", time), in_queue()).await.unwrap();
}

pub async fn ended_runs_come_in_the_order_of_their_ends<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    for n in 1..=6 {
        create(&*store, run(n)).await;
    }
    for (n, time) in [(3, 10), (1, 20), (5, 20), (2, 30), (6, 40)] {
        end(&*store, n, time).await;
    }
    let ended = |n, time| EndedRun { id: id(n), tenant: tenant("a"), ended: at(time) };
    let mut expected = vec![ended(3, 10), ended(1, 20), ended(5, 20), ended(2, 30)];
    for run in &mut expected {
        run.tenant = must_get(&*store, run.id).await.tenant;
    }
    // Before the limit of time, not at it; live runs never.
    assert_eq!(store.ended(None, at(40), 100).await.unwrap(), expected);
    let mut paged = Vec::new();
    let mut after: Option<EndedCursor> = None;
    loop {
        let page = store.ended(after, at(40), 1).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.cursor());
        paged.extend(page);
    }
    assert_eq!(paged, expected);
    assert_eq!(store.ended(None, at(10), 100).await.unwrap(), []);
}

pub async fn a_removed_run_leaves_nothing_and_frees_its_names<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let named = || NewRun { key: Some(key("k")), ..labelled(1, &[("team", "x")]) };
    create(&*store, named()).await;
    create(&*store, labelled(2, &[("team", "x")])).await;
    succeed(&*store, id(1)).await;
    assert_eq!(store.remove(id(1)).await.unwrap(), Removed::Gone);
    assert_eq!(store.remove(id(1)).await.unwrap(), Removed::Unknown);
    assert_eq!(store.get(id(1)).await.unwrap(), None);
    assert!(matches!(store.events(id(1), 0, 10).await, Err(StoreError::NotFound(_))));
    assert!(matches!(store.attempts(id(1)).await, Err(StoreError::NotFound(_))));
    let filter = RunFilter { labels: [("team".into(), "x".into())].into(), ..RunFilter::default() };
    let left = store.list(&filter, None, 10).await.unwrap().runs;
    assert_eq!(left.iter().map(|run| run.id).collect::<Vec<_>>(), [id(2)]);
    assert_eq!(store.live_count().await.unwrap(), 1);
    // Its id and its key can name a run again, also one with another spec.
    let again = NewRun { digest: [9; 32], ..named() };
    assert!(matches!(store.accept(again, NO_LIMITS).await.unwrap(), Accepted::Created(_)));
    assert_eq!(store.events(id(1), 0, 10).await.unwrap().len(), 1, "nothing of the one before");
}

pub async fn a_live_run_is_not_removed<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    assert_eq!(store.remove(id(1)).await.unwrap(), Removed::Live);
    lead(&*store, id(1), &[(Preparing, 1)]).await;
    let before = must_get(&*store, id(1)).await;
    assert_eq!(store.remove(id(1)).await.unwrap(), Removed::Live);
    assert_eq!(must_get(&*store, id(1)).await, before);
    let on = Transition { started: Some(at(4)), ..step(id(1), place(Preparing, 1), place(Preparing, 1)) };
    apply(&*store, on).await;
}

pub async fn how_far_a_sweep_has_come_survives_a_reopen<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    assert_eq!(store.swept(Swept::Logs).await.unwrap(), None);
    let cursor = |n, time| EndedCursor { ended: at(time), id: id(n) };
    store.set_swept(Swept::Logs, cursor(1, 10)).await.unwrap();
    store.set_swept(Swept::Logs, cursor(2, 20)).await.unwrap();
    store.set_swept(Swept::Outputs, cursor(3, 5)).await.unwrap();
    drop(store);
    let store = factory.open().await;
    assert_eq!(store.swept(Swept::Logs).await.unwrap(), Some(cursor(2, 20)));
    assert_eq!(store.swept(Swept::Outputs).await.unwrap(), Some(cursor(3, 5)));
}

pub async fn a_run_that_does_not_decode_is_removed_with_the_others<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    succeed(&*store, id(1)).await;
    factory.corrupt(id(1)).await;
    assert_eq!(store.remove(id(1)).await.unwrap(), Removed::Gone);
    assert_eq!(store.get(id(1)).await.unwrap(), None);
}

pub async fn a_removal_that_was_begun_is_known_until_it_is_done<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    for n in 1..=3 {
        create(&*store, run(n)).await;
    }
    end(&*store, 1, 10).await;
    end(&*store, 2, 20).await;
    assert_eq!(store.removals(10).await.unwrap(), []);
    assert_eq!(store.begin_removal(id(3)).await.unwrap(), Removed::Live);
    assert_eq!(store.begin_removal(id(9)).await.unwrap(), Removed::Unknown);
    for n in [1, 2, 1] {
        assert_eq!(store.begin_removal(id(n)).await.unwrap(), Removed::Gone);
    }
    let before = must_get(&*store, id(1)).await;
    drop(store);
    let store = factory.open().await;
    let expected =
        [1, 2].map(|n| EndedRun { id: id(n), tenant: before.tenant.clone(), ended: at(n as u64 * 10) });
    assert_eq!(store.removals(10).await.unwrap(), expected);
    assert_eq!(store.removals(1).await.unwrap().len(), 1);
    assert_eq!(must_get(&*store, id(1)).await, before, "the run is as it was");
    assert_eq!(store.remove(id(1)).await.unwrap(), Removed::Gone);
    assert_eq!(store.removals(10).await.unwrap(), expected[1..]);
    assert_eq!(store.begin_removal(id(1)).await.unwrap(), Removed::Unknown);
}

pub async fn an_upload_is_known_to_be_named_until_the_last_run_that_named_it_is_gone<F: StoreFactory>(
    factory: &F,
) {
    let store = factory.open().await;
    let upload: ArtifactKey = "uploads/a/x".parse().unwrap();
    let named = |uri: &str, destination: Option<&str>| RunSpec {
        inputs: vec![Input {
            path: "/inputs/x".to_owned(),
            source: InputSource::from_uri(uri).unwrap(),
            sha256: None,
            mode: None,
            extract: None,
        }],
        outputs: vec![Output {
            path: "/outputs/x".to_owned(),
            glob: false,
            destination: destination.map(|uri| uri.parse().unwrap()),
            required: false,
            max_bytes: None,
        }],
        ..spec("true")
    };
    assert!(!store.names_upload(&upload).await.unwrap());
    create(&*store, with_spec(1, named("artifact:uploads/a/x/files/y", None))).await;
    create(&*store, with_spec(2, named("artifact:uploads/a/z/", Some("artifact:uploads/a/x/")))).await;
    create(&*store, with_spec(3, named("artifact:uploads/a/xx/", None))).await;
    for n in [1, 2] {
        assert!(store.names_upload(&upload).await.unwrap(), "live");
        end(&*store, n, 10).await;
        assert!(store.names_upload(&upload).await.unwrap(), "ended");
        assert_eq!(store.remove(id(n)).await.unwrap(), Removed::Gone);
    }
    assert!(!store.names_upload(&upload).await.unwrap(), "nobody names it any more");
    assert!(store.names_upload(&"uploads/a/xx".parse().unwrap()).await.unwrap());
}
