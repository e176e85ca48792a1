//! The operators' port.

use runner_core::store::StoreError;

use crate::{
    harness::{Harness, soon},
    http::send,
};

#[tokio::test(flavor = "multi_thread")]
async fn health_readiness_and_metrics_answer() {
    let harness = Harness::start().await;
    let get = async |path: &'static str| soon(send(harness.ops_listen, "GET", path, &[], &[], None)).await;
    assert_eq!(get("/healthz").await.json()["status"], "ok");
    let ready = get("/readyz").await;
    assert_eq!(ready.status, 200, "{ready:?}");
    let ready = ready.json();
    for check in ["store", "object_store", "backend/local"] {
        assert_eq!(ready["checks"][check]["ok"], true, "{ready}");
    }
    let metrics = get("/metrics").await;
    assert!(metrics.header("content-type").unwrap().starts_with("application/openmetrics-text"));
    assert!(String::from_utf8(metrics.body).unwrap().contains("runner_connections{listener=\"ops\"}"));
    assert_eq!(get("/nothing").await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_does_not_answer_is_named() {
    let harness = Harness::start().await;
    harness.store.set_fault(Some(StoreError::Unavailable("gone".to_owned())));
    // Past what was answered before.
    harness.clock.advance(std::time::Duration::from_secs(2));
    let answer = soon(send(harness.ops_listen, "GET", "/readyz", &[], &[], None)).await;
    assert_eq!(answer.status, 503);
    let json = answer.json();
    assert_eq!((&json["ready"], &json["checks"]["store"]["ok"]), (&false.into(), &false.into()));
    assert_eq!(json["checks"]["object_store"]["ok"], true);
    assert!(json["checks"]["store"]["error"].as_str().unwrap().contains("gone"));
}
