//! List, and what operators see.

use futures::StreamExt as _;
use runner_tests::service::Service;
use worker_client::{
    ErrorKind, ListFilter,
    proto::{self, RunState},
};

use crate::shell;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn list_pages_are_stable_while_runs_are_added_and_filters_hold() {
    let service = Service::start().await;
    let client = service.client();
    let mut made = Vec::new();
    for number in 0..25 {
        let spec = shell(&format!("exit {}", number % 2)).label("parity", (number % 2).to_string());
        made.push(client.run(spec).await.expect("run"));
    }
    for handle in &made {
        handle.wait().await.expect("the end");
    }
    let mut request = proto::ListRequest { page_size: 4, ..proto::ListRequest::default() };
    let mut seen = Vec::new();
    loop {
        let page = client.list_page(request.clone()).await.expect("a page");
        assert!(page.runs.len() <= 4);
        seen.extend(page.runs.into_iter().map(|run| run.run_id));
        client.run(shell("exit 0").label("later", "yes")).await.expect("run meanwhile");
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let newest_first: Vec<&str> = made.iter().rev().map(|handle| handle.id()).collect();
    assert_eq!(seen, newest_first);
    let count = async |filter: ListFilter| client.list(filter).map(|run| run.expect("list")).count().await;
    assert_eq!(count(ListFilter::default().label("parity", "1")).await, 12);
    assert_eq!(count(ListFilter::default().label("parity", "1").state(RunState::Succeeded)).await, 0);
    assert_eq!(count(ListFilter::default().state(RunState::Failed)).await, 12);
    assert_eq!(count(ListFilter::default().backend("another")).await, 0);
    for bad in [
        proto::ListRequest { page_token: "nonsense".into(), ..proto::ListRequest::default() },
        proto::ListRequest { page_size: 100_000, ..proto::ListRequest::default() },
    ] {
        let error = client.list_page(bad.clone()).await.expect_err("a bad request");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{bad:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators_see_backends_health_and_metrics() {
    let service = Service::start().await;
    let backends = service.client().backends().await.expect("backends");
    let local = backends.iter().find(|backend| backend.name == "local").expect("the local backend");
    assert!(local.healthy && local.max_attempts > 0, "{local:?}");
    assert_eq!(local.kind, "local");
    for path in ["/healthz", "/readyz", "/metrics"] {
        let page = service.ops(path).await.expect("an answer");
        assert!(page.starts_with("HTTP/1.1 200"), "{path}: {page}");
    }
}
