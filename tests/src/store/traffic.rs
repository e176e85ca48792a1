//! Rule 12: the traffic's state, its audit log, and what decided for a run.
#![allow(missing_docs, reason = "a case's name is the sentence that it shows")]

use std::sync::Arc;

use runner_core::{
    store::{AuditEntry, NewRun, Store, StoredAudit, StoredTraffic, TrafficSet},
    traffic::{DecidedBy, Decision, PassedOver, Policy, Shadowing, Target, Traffic},
};

use super::{
    StoreFactory,
    kit::{at, backend, create, id, must_get, run},
};

/// A state that is told from others by its salt.
fn traffic(salt: &str) -> Traffic {
    let policy =
        Policy { salt: salt.to_owned(), default: Some(Target::Backend(backend("k8s"))), ..Policy::default() };
    Traffic { policy, ..Traffic::default() }
}

fn entry(n: u64) -> AuditEntry {
    AuditEntry {
        time: at(n),
        actor: format!("actor {n}"),
        action: "traffic.set".to_owned(),
        what: format!("change {n}"),
        reason: "'; DROP TABLE audit; -- \u{1f980}".to_owned(),
    }
}

async fn set(store: &dyn Store, expected: u64) -> TrafficSet {
    let next = traffic(&(expected + 1).to_string());
    store.set_traffic(expected, &next, entry(expected + 1)).await.expect("the store answers")
}

fn stored(version: u64) -> Option<StoredTraffic> {
    Some(StoredTraffic { version, traffic: traffic(&version.to_string()) })
}

fn logged(n: u64) -> StoredAudit {
    StoredAudit { seq: n, version: n, entry: entry(n) }
}

pub async fn a_state_is_read_back_as_it_was_stored<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    assert_eq!(store.traffic().await.unwrap(), None);
    assert_eq!(store.audit(None, 10).await.unwrap(), []);
    for version in 1..=3 {
        assert_eq!(set(&*store, version - 1).await, TrafficSet::Stored { version });
        assert_eq!(store.traffic().await.unwrap(), stored(version));
    }
}

pub async fn over_another_version_nothing_is_stored<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    assert_eq!(set(&*store, 1).await, TrafficSet::Conflict { version: 0 });
    set(&*store, 0).await;
    set(&*store, 1).await;
    for expected in [0, 1, 3, u64::MAX - 1] {
        assert_eq!(set(&*store, expected).await, TrafficSet::Conflict { version: 2 });
    }
    assert_eq!(store.traffic().await.unwrap(), stored(2));
    assert_eq!(store.audit(None, 10).await.unwrap(), [logged(2), logged(1)]);
}

pub async fn of_several_at_once_one_is_stored<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    for expected in 0..5 {
        let racing = (0..8).map(|_| {
            let store: Arc<dyn Store> = Arc::clone(&store);
            async move { set(&*store, expected).await }
        });
        let answers = futures::future::join_all(racing).await;
        let won = answers.iter().filter(|answer| **answer == TrafficSet::Stored { version: expected + 1 });
        assert_eq!(won.count(), 1, "{answers:?}");
        let lost = answers.iter().filter(|answer| **answer == TrafficSet::Conflict { version: expected + 1 });
        assert_eq!(lost.count(), 7, "{answers:?}");
    }
    assert_eq!(store.audit(None, 100).await.unwrap().len(), 5);
}

pub async fn the_audit_log_is_read_from_the_newest_in_pages<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    for expected in 0..5 {
        set(&*store, expected).await;
    }
    assert_eq!(store.audit(None, 2).await.unwrap(), [logged(5), logged(4)]);
    assert_eq!(store.audit(Some(4), 2).await.unwrap(), [logged(3), logged(2)]);
    assert_eq!(store.audit(Some(2), 2).await.unwrap(), [logged(1)]);
    assert_eq!(store.audit(Some(1), 2).await.unwrap(), []);
}

pub async fn state_and_audit_log_survive_a_reopen<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    set(&*store, 0).await;
    set(&*store, 1).await;
    drop(store);
    let store = factory.open().await;
    assert_eq!(store.traffic().await.unwrap(), stored(2));
    assert_eq!(store.audit(None, 10).await.unwrap(), [logged(2), logged(1)]);
    assert_eq!(set(&*store, 2).await, TrafficSet::Stored { version: 3 });
}

pub async fn what_decided_for_a_run_is_read_back<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let decision = Decision {
        backend: backend("local"),
        version: 4,
        by: DecidedBy::Rule("r".to_owned()),
        bucket: Some(9999),
        passed_over: vec![(backend("k8s"), PassedOver::Drained)],
        shadow: Some(Shadowing::On(backend("dind"))),
    };
    create(&*store, NewRun { decision: Some(decision.clone()), ..run(1) }).await;
    create(&*store, run(2)).await;
    assert_eq!(must_get(&*store, id(1)).await.decision, Some(decision));
    assert_eq!(must_get(&*store, id(2)).await.decision, None);
}
