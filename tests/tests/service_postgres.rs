//! The service with its state in PostgreSQL: what it says of a schema that it cannot use, who may have it, and that a crash loses nothing.

use runner_tests::{
    postgres::{CAREFUL_USER, Postgres, USER, skip, url},
    service::{Service, eventually, watch, watch_for},
};
use worker_client::{RunSpec, proto};

const WRONG_PASSWORD: &str = "hunter2-hunter2";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_migrated_first_and_has_the_schema_alone_and_survives_a_kill() {
    let server = match Postgres::shared() {
        Ok(server) => server,
        Err(why) => return skip("it_is_migrated_first", why),
    };
    let url = url(USER, server.address(), &server.schema().await);
    let settings = [("RUNNER_STORE__URL", url.as_str())];
    let mut service = Service::prepare(&settings);
    service.spawn(&[]);
    assert_eq!(service.ended().await.code(), Some(1));
    let said = service.log();
    assert!(said.contains("schema version 0") && said.contains("runner migrate"), "{said}");
    service.kill();

    let (status, said) = service.command_with(&["migrate"], &[]);
    assert!(status.success() && said.contains("from schema version 0 to 1"), "{said}");
    let (status, said) = service.command_with(&["migrate"], &[]);
    assert!(status.success() && said.contains("has schema version 1"), "{said}");

    service.restart(&[]).await;
    let spec = RunSpec::command(["sh", "-c", "echo ready; exec sleep 100000"]);
    let first = service.client().run(spec).await.expect("run");
    watch_for(&service.client(), first.id(), "ready").await;

    // With a data directory of its own, so that only the database is in the way.
    let mut second = Service::prepare(&settings);
    second.spawn(&[]);
    assert_eq!(second.ended().await.code(), Some(1));
    let said = second.log();
    assert!(said.contains("another service has the state store"), "{said}");
    drop(second);

    service.kill();
    service.restart(&[]).await;
    let client = service.client();
    first.cancel("it was adopted").await.expect("cancel");
    let watched = watch(&client, first.id(), "").await;
    assert_eq!(watched.end().state, proto::RunState::Cancelled, "{:?}", watched.end());
    assert_eq!(String::from_utf8_lossy(&watched.out), "ready\n");
    service.assert_clean(&[first.id()]).await;
    assert!(!service.data_dir().join("state.db").exists(), "the state is elsewhere");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_server_it_is_not_ready_and_its_runs_go_on() {
    let Some(server) = Postgres::start() else {
        return skip("without_its_server_it_is_not_ready", "PostgreSQL is not installed");
    };
    let server = std::sync::Arc::new(server);
    let settings = server.settings();
    let settings: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let service = Service::start_with(&settings).await;
    let client = service.client();
    let spec = RunSpec::command(["sh", "-c", "echo ready; sleep 1; echo done"]);
    let run = client.run(spec).await.expect("run");
    watch_for(&client, run.id(), "ready").await;
    let stopping = std::sync::Arc::clone(&server);
    tokio::task::spawn_blocking(move || stopping.stop(false)).await.expect("stopped");
    let ready = async || service.ops("/readyz").await.map(|answer| answer.starts_with("HTTP/1.1 200"));
    eventually("it is not ready", async || (ready().await == Some(false)).then_some(())).await;
    let starting = std::sync::Arc::clone(&server);
    tokio::task::spawn_blocking(move || starting.go()).await.expect("started");
    eventually("it is ready", async || (ready().await == Some(true)).then_some(())).await;
    let watched = watch(&client, run.id(), "").await;
    assert_eq!(watched.end().state, proto::RunState::Succeeded, "{:?}", watched.end());
    assert_eq!(String::from_utf8_lossy(&watched.out), "ready\ndone\n");
    service.assert_clean(&[run.id()]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_is_neither_logged_nor_shown_nor_accepted_in_the_url() {
    let server = match Postgres::shared() {
        Ok(server) => server,
        Err(why) => return skip("a_password_is_neither_logged_nor_shown", why),
    };
    // Its role is made by nobody: what it has to say, it says before.
    let url = url(CAREFUL_USER, server.address(), "public");
    let mut service = Service::prepare(&[("RUNNER_STORE__URL", &url)]);
    service.spawn(&[("PGPASSWORD", WRONG_PASSWORD), ("RUNNER_LOG__FILTER", "trace")]);
    assert_eq!(service.ended().await.code(), Some(1));
    let said = service.log();
    assert!(said.contains("password authentication failed"), "{said}");
    assert!(!said.contains(WRONG_PASSWORD), "{said}");
    let in_url = url.replace(CAREFUL_USER, &format!("{CAREFUL_USER}:{WRONG_PASSWORD}"));
    for arguments in [["config", "dump"].as_slice(), &["migrate"], &["serve"]] {
        let (status, said) = service.command_with(arguments, &[("RUNNER_STORE__URL", &in_url)]);
        assert_eq!(status.code(), Some(2), "{said}");
        assert!(said.contains("store.url") && !said.contains(WRONG_PASSWORD), "{said}");
    }
}
