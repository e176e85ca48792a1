//! What happens to a real cluster while runs are on it: its API server or its node's kubelet does nothing for a while.
//!
//! One after the other, and in a program of their own: whoever else uses the cluster meanwhile waits.

use std::{pin::pin, time::Duration};

use runner_tests::{
    cluster::Daemon,
    scene::{On, Scene},
    service::{eventually, watch, watch_for},
};
use tokio::sync::Mutex;
use worker_client::{RunSpec, proto};

/// As long as an outage lasts: longer than every time-out of a single request, and than a watch's silence is.
const API_SERVER_AWAY: Duration = Duration::from_secs(120);
/// Longer than the service waits for an agent, and than a pod's end may take.
const KUBELET_AWAY: Duration = Duration::from_secs(45);

static TURN: Mutex<()> = Mutex::const_new(());

/// Lines for longer than any outage here, and no end before somebody says so.
const TICKS: &str = "echo ready; i=0; while [ ! -e /tmp/enough ]; do echo tick $i; i=$((i+1)); sleep 1; done";

fn assert_ticks(out: &[u8]) {
    let text = String::from_utf8_lossy(out);
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("ready"));
    for (number, line) in lines.enumerate() {
        assert_eq!(line, format!("tick {number}"));
    }
}

/// Runs begin before, end in the middle of, and begin in the middle of an outage of the API server. None is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_server_that_is_away_for_two_minutes_costs_no_run() {
    let _turn = TURN.lock().await;
    let Some(scene) = Scene::start(On::K8sJob, "an API server that is away").await else { return };
    let client = scene.service.client();
    let start =
        async |script: &str| client.run(scene.witness.script(script)).await.expect("run").id().to_owned();
    // One that ends in the middle, one that is cancelled in the middle, one that outlives it.
    let ends = start("echo ready; sleep 20; echo done; exit 5").await;
    let cancelled = start("echo ready; exec sleep 100000").await;
    let outlives = start(&format!("{TICKS} & sleep 160; touch /tmp/enough; wait; exit 6")).await;
    for run in [&ends, &cancelled, &outlives] {
        watch_for(&client, run, "ready").await;
    }
    let stopped = Daemon::stop("kube-apiserver");
    let mut over = pin!(tokio::time::sleep(API_SERVER_AWAY));
    let late = start("echo ready; exit 7").await;
    client.cancel(&cancelled, "enough").await.expect("cancel");
    // What goes by way of the agents needs no API server: the end of the program and of the cancelled one are told.
    let watched = watch(&client, &ends, "").await;
    assert_eq!(watched.end().exit_code(), Some(5), "{:?}", watched.end());
    assert_eq!(String::from_utf8_lossy(&watched.out), "ready\ndone\n");
    over.as_mut().await;
    drop(stopped);
    let watched = watch(&client, &cancelled, "").await;
    assert_eq!(watched.end().state, proto::RunState::Cancelled, "{:?}", watched.end());
    let watched = watch(&client, &late, "").await;
    assert_eq!(watched.end().exit_code(), Some(7), "{:?}", watched.end());
    let watched = watch(&client, &outlives, "").await;
    assert_eq!(watched.end().exit_code(), Some(6), "{:?}", watched.end());
    assert_ticks(&watched.out);
    for run in [&ends, &cancelled, &outlives, &late] {
        scene.witness.assert_one_start(run).await;
        scene.assert_clean(&[run]).await;
    }
}

/// A node whose kubelet does nothing goes on with what runs: the end is told while it is away, and what is left is removed when
/// it is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kubelet_that_is_away_costs_no_run() {
    let _turn = TURN.lock().await;
    let Some(scene) = Scene::start(On::K8sJob, "a kubelet that is away").await else { return };
    let client = scene.service.client();
    let ends = client.run(scene.witness.script("echo ready; sleep 5; echo done; exit 5")).await.expect("run");
    let cancelled = client.run(scene.witness.script("echo ready; exec sleep 100000")).await.expect("run");
    for run in [&ends, &cancelled] {
        watch_for(&client, run.id(), "ready").await;
    }
    let stopped = Daemon::stop("kubelet");
    let mut over = pin!(tokio::time::sleep(KUBELET_AWAY));
    let late = client.run(RunSpec::command(["sh", "-c", "exit 7"])).await.expect("run");
    cancelled.cancel("enough").await.expect("cancel");
    let watched = watch(&client, ends.id(), "").await;
    assert_eq!(watched.end().exit_code(), Some(5), "{:?}", watched.end());
    assert_eq!(String::from_utf8_lossy(&watched.out), "ready\ndone\n");
    let watched = watch(&client, cancelled.id(), "").await;
    assert_eq!(watched.end().state, proto::RunState::Cancelled, "{:?}", watched.end());
    over.as_mut().await;
    drop(stopped);
    let watched =
        eventually("the run that came meanwhile", async || Some(watch(&client, late.id(), "").await)).await;
    assert_eq!(watched.end().exit_code(), Some(7), "{:?}", watched.end());
    for run in [ends.id(), cancelled.id(), late.id()] {
        scene.assert_clean(&[run]).await;
    }
}
