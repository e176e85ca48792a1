//! Inputs by `https`, end to end: a real service, a real TLS server, and what is refused on the way.

use runner_tests::{
    https::HttpsServer,
    service::{Service, Watched, watch},
};
use sha2::{Digest as _, Sha256};
use worker_client::{
    ErrorKind, RunSpec,
    proto::{Cause, RunState},
};

const TEXT: &str = "from far away\n";

/// A service that may ask this server, at addresses such as these.
async fn service(server: &HttpsServer, addresses: &str) -> Service {
    let hosts = format!("[{:?}]", server.host());
    let authority = server.authority().display().to_string();
    Service::start_with(&[
        ("RUNNER_INPUTS__HTTPS__HOSTS", &hosts),
        ("RUNNER_INPUTS__HTTPS__ALLOW_ADDRESSES", addresses),
        ("RUNNER_INPUTS__HTTPS__CA_FILE", &authority),
    ])
    .await
}

fn sha256(text: &str) -> String {
    hex::encode(Sha256::digest(text))
}

async fn run(service: &Service, url: &str, sha256: String) -> Watched {
    let spec = RunSpec::command(["cat", "/inputs/a"]).input_https("/inputs/a", url, sha256);
    let run = service.client().run(spec).await.expect("the run is accepted");
    let watched = watch(&service.client(), run.id(), "").await;
    service.assert_clean(&[run.id()]).await;
    watched
}

/// It ended as `INPUT`, without a start of the program, and its evidence holds these words.
fn assert_input(watched: &Watched, words: &[&str]) {
    let end = watched.end();
    assert_eq!((end.state, end.cause()), (RunState::Failed, Cause::Input), "{end:?}");
    assert!(!watched.states.iter().any(|(state, _)| *state == RunState::Running), "{watched:?}");
    assert_eq!((watched.out.len(), end.exit_code()), (0, None), "{watched:?}");
    let evidence = format!("{:?}", end.outcome.evidence);
    for word in words {
        assert!(evidence.contains(word), "no {word:?} in {evidence}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_of_an_allowed_host_is_an_input_and_anything_else_ends_the_run_as_input() {
    let server = HttpsServer::start(&[("/a", TEXT)]);
    let service = service(&server, r#"["127.0.0.1"]"#).await;
    let url = |path: &str| format!("https://{}{path}", server.host());
    let watched = run(&service, &url("/a"), sha256(TEXT)).await;
    assert!(watched.end().succeeded(), "{watched:?}");
    assert_eq!(String::from_utf8_lossy(&watched.out), TEXT);

    let wrong = sha256("something else");
    let watched = run(&service, &url("/a"), wrong.clone()).await;
    assert_input(&watched, &[&wrong, &sha256(TEXT)]);
    assert!(!watched.end().outcome.retryable);

    assert_input(&run(&service, &url("/b"), sha256(TEXT)).await, &["404"]);
    assert_eq!(server.asked(), ["/a", "/a", "/b"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_is_not_allowed_is_refused_before_anything_is_stored() {
    let server = HttpsServer::start(&[("/a", TEXT)]);
    let service = service(&server, r#"["127.0.0.1"]"#).await;
    let port = server.host().rsplit(':').next().expect("a port").to_owned();
    for url in [format!("https://localhost:{port}/a"), "https://127.0.0.1/a".to_owned()] {
        let spec = RunSpec::command(["true"]).input_https("/inputs/a", url.as_str(), sha256(TEXT));
        let refused = service.client().run(spec).await.expect_err("the host is not allowed");
        assert_eq!(refused.kind(), ErrorKind::Invalid, "{refused}");
        assert!(format!("{refused:?}").contains("spec.inputs[0].uri"), "{refused:?}");
    }
    assert_eq!(server.asked(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_allowed_host_with_a_private_address_is_not_asked() {
    let server = HttpsServer::start(&[("/a", TEXT)]);
    let service = service(&server, "[]").await;
    let watched = run(&service, &format!("https://{}/a", server.host()), sha256(TEXT)).await;
    assert_input(&watched, &["127.0.0.1"]);
    assert!(!watched.end().outcome.retryable, "{watched:?}");
    assert_eq!(server.asked(), [""; 0]);
}
