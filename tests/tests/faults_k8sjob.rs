//! What happens to pods on a real cluster, and what is told of it. What happens to the cluster itself: `outage_k8sjob.rs`.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, ListParams},
};
use runner_core::fake::backend::Flood;
use runner_tests::{
    cluster::NAMESPACE,
    objects::{Dialect, StoreServer, sha256_of_zeros},
    proc,
    scene::{On, Scene},
    service::{Watched, eventually, eventually_within, watch, watch_for},
};
use worker_client::{Client, RunSpec, proto};

async fn scene(test: &str, of_backend: &str) -> Option<Scene> {
    let mut scene = Scene::prepare_with(On::K8sJob, of_backend, &[], test).await?;
    scene.service.restart(&[]).await;
    Some(scene)
}

fn sh(script: &str) -> RunSpec {
    RunSpec::command(["sh", "-c", script])
}

async fn start(client: &Client, spec: RunSpec) -> String {
    client.run(spec).await.expect("run").id().to_owned()
}

/// The pod of a run's first attempt, as soon as it is there.
async fn pod_of(scene: &Scene, run: &str) -> (Api<Pod>, String) {
    let pods: Api<Pod> = Api::namespaced(scene.cluster().client().await, NAMESPACE);
    let name = eventually("the pod", async || {
        let selector = ListParams::default().labels(&format!("runner.attempt={run}.1"));
        let found = pods.list(&selector).await.expect("list the pods");
        found.items.first().map(kube::ResourceExt::name_any)
    })
    .await;
    (pods, name)
}

fn assert_failed(watched: &Watched, cause: proto::Cause, retryable: bool) {
    let end = watched.end();
    assert_eq!((end.state, end.cause()), (proto::RunState::Failed, cause), "{end:?}");
    assert_eq!(end.outcome.retryable, retryable, "{end:?}");
    assert!(!end.outcome.evidence.is_empty(), "{end:?}");
}

/// Somebody deletes the pod of a program that runs.
async fn deleted_while_it_runs(grace: u32) {
    let Some(scene) = scene("a deleted pod", "").await else { return };
    let client = scene.service.client();
    let run = start(&client, sh("echo ready; while :; do sleep 1; done")).await;
    watch_for(&client, &run, "ready").await;
    let (pods, name) = pod_of(&scene, &run).await;
    let parameters = DeleteParams { grace_period_seconds: Some(grace), ..DeleteParams::default() };
    pods.delete(&name, &parameters).await.expect("delete the pod");
    let watched = watch(&client, &run, "").await;
    assert_failed(&watched, proto::Cause::Backend, true);
    assert_eq!(String::from_utf8_lossy(&watched.out), "ready\n", "what it said is kept");
    scene.assert_clean(&[&run]).await;
    assert!(proc::with_environment("RUNNER_RUN_ID", &run).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_is_deleted_with_a_grace_is_no_end_of_its_program() {
    deleted_while_it_runs(20).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_is_deleted_at_once_is_no_end_of_its_program() {
    deleted_while_it_runs(0).await;
}

/// Deleted before its program began, the pod's place is taken by another, or the attempt fails: the program is never run twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_is_deleted_before_its_program_runs_it_once_at_most() {
    let Some(scene) = scene("a pod that is deleted early", "").await else { return };
    let client = scene.service.client();
    let run = start(&client, scene.witness.script("echo ready; sleep 1; exit 0")).await;
    let (pods, name) = pod_of(&scene, &run).await;
    let parameters = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    pods.delete(&name, &parameters).await.expect("delete the pod");
    let watched = watch(&client, &run, "").await;
    let end = watched.end();
    let one_word = end.exit_code() == Some(0) && watched.out == b"ready\n";
    let fair = end.cause() == proto::Cause::Backend && end.outcome.retryable;
    assert!(one_word || fair, "{end:?}");
    if one_word {
        scene.witness.assert_one_start(&run).await;
    }
    scene.assert_clean(&[&run]).await;
}

/// Deleted while outputs are stored: either all of them are, or it is said that they are not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_is_deleted_while_it_publishes_stores_all_or_says_so() {
    const BYTES: u64 = 300_000_000;
    let Some(scene) = scene("a pod that is deleted late", "").await else { return };
    let client = scene.service.client();
    let script = format!("head -c {BYTES} /dev/zero > /outputs/a; echo ready");
    let run = start(&client, sh(&script).output("/outputs/a")).await;
    watch_for(&client, &run, "ready").await;
    let (pods, name) = pod_of(&scene, &run).await;
    let parameters = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    pods.delete(&name, &parameters).await.expect("delete the pod");
    let watched = watch(&client, &run, "").await;
    let end = watched.end();
    assert_eq!(String::from_utf8_lossy(&watched.out), "ready\n");
    match end.state {
        proto::RunState::Succeeded => {
            let sizes: Vec<u64> =
                end.outputs().expect("a manifest").entries.iter().map(|entry| entry.size).collect();
            assert_eq!(sizes, [BYTES]);
        }
        proto::RunState::Failed => {
            let causes = [proto::Cause::Output, proto::Cause::Backend];
            assert!(causes.contains(&end.cause()) && end.outcome.retryable, "{end:?}");
        }
        other => panic!("{other:?}: {end:?}"),
    }
    scene.assert_clean(&[&run]).await;
}

/// The agent beside a program is killed: what the program did is not known, so it is no success, and the program does not live on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_whose_agent_was_killed_is_ended_and_no_success() {
    let Some(scene) = scene("a killed agent", "").await else { return };
    let client = scene.service.client();
    let run = start(&client, sh("echo ready; while :; do sleep 1; done")).await;
    watch_for(&client, &run, "ready").await;
    let (pods, name) = pod_of(&scene, &run).await;
    let pod = pods.get(&name).await.expect("the pod");
    let groups = proc::pids_in_control_groups_named(&format!("pod{}", pod.uid().expect("a uid")));
    let agents: Vec<i32> =
        groups.into_iter().filter(|pid| proc::describe(*pid).contains("runner-agent publish")).collect();
    assert_eq!(agents.len(), 1, "the agent beside the program is found");
    agents.into_iter().for_each(proc::kill);
    let watched = watch(&client, &run, "").await;
    assert_failed(&watched, proto::Cause::Backend, true);
    assert_eq!(String::from_utf8_lossy(&watched.out), "ready\n");
    scene.assert_clean(&[&run]).await;
    assert!(proc::with_environment("RUNNER_RUN_ID", &run).is_empty());
}

/// A node evicts a pod that writes more than its volume may have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_eviction_is_told_as_one() {
    let Some(scene) = scene("an eviction", ", scratch_bytes = 4194304").await else { return };
    let client = scene.service.client();
    let run = start(&client, sh("head -c 40000000 /dev/zero > /tmp/much; echo ready; sleep 100000")).await;
    let watched = watch(&client, &run, "").await;
    assert_failed(&watched, proto::Cause::Evicted, true);
    assert_eq!(String::from_utf8_lossy(&watched.out), "ready\n");
    scene.assert_clean(&[&run]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_cannot_be_had_is_told_as_such() {
    let Some(scene) = scene("a missing image", "").await else { return };
    let client = scene.service.client();
    let run = start(&client, sh("echo never").image("docker.io/runner-test/none:1")).await;
    let watched = watch(&client, &run, "").await;
    assert_eq!(watched.end().cause(), proto::Cause::Image, "{:?}", watched.end());
    assert!(watched.end().outcome.message.contains("ErrImageNeverPull"), "{:?}", watched.end());
    scene.assert_clean(&[&run]).await;
}

/// The node's own log of a container is rotated many times meanwhile; nobody reads it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_of_300_mb_is_exact() {
    const BYTES: usize = 300_000_000;
    let settings = [("RUNNER_LIMITS__LOG_BYTES", "400000000")];
    let prepared = Scene::prepare_with(On::K8sJob, "", &settings, "a long log").await;
    let Some(mut scene) = prepared else { return };
    scene.service.restart(&[]).await;
    let client = scene.service.client();
    let run = start(&client, sh(&format!("seq 1 999999999 2>/dev/null | head -c {BYTES}"))).await;
    let watched = watch(&client, &run, "").await;
    assert_eq!(watched.end().exit_code(), Some(0), "{:?}", watched.end());
    assert_eq!((watched.out.len(), watched.dropped), (BYTES, 0));
    assert!(watched.out == Flood::new(false).take(BYTES), "the log differs");
    scene.assert_clean(&[&run]).await;
}

/// Far more than an agent's memory goes in and out.
async fn moved_by_agents_of_64_mib(into: u64, out: u64, past_the_service: bool) {
    let bucket = StoreServer::start_at(Dialect::S3, Ipv4Addr::UNSPECIFIED.into());
    let mut settings = bucket.settings("big");
    settings.push(("RUNNER_OBJECT_STORE__AGENT_URLS", past_the_service.to_string()));
    let settings: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let of_backend = ", agent_memory_bytes = 67108864";
    let prepared = Scene::prepare_with(On::K8sJob, of_backend, &settings, "large objects").await;
    let Some(mut scene) = prepared else { return };
    let of_pods = format!("http://{}", SocketAddr::new(scene.cluster().address, bucket.port()));
    scene.service.restart(&[("RUNNER_OBJECT_STORE__AGENT_ENDPOINT", &of_pods)]).await;
    let client = scene.service.client();
    let key = "uploads/default/zeros/files/a";
    bucket.bucket().put_zeros(&format!("big/{key}"), into);
    let input = proto::Input {
        path: "/inputs/a".to_owned(),
        source: Some(proto::input::Source::Uri(format!("artifact:{key}"))),
        sha256: sha256_of_zeros(into),
        ..proto::Input::default()
    };
    // A hole takes no disk, and is read as any other bytes.
    let script = format!("stat -c %s /inputs/a; truncate -s {out} /outputs/a");
    let run = start(&client, sh(&script).input_spec(input).output("/outputs/a")).await;
    // Longer than any other wait here: three gibibytes are hashed, twice.
    let outcome = eventually_within(Duration::from_secs(900), "the end of the run", async || {
        client.get(&run).await.expect("get").outcome
    })
    .await;
    let manifest = outcome.outputs.clone().unwrap_or_else(|| panic!("{outcome:?}"));
    assert_eq!(
        (manifest.entries[0].size, manifest.entries[0].sha256.as_str()),
        (out, &*sha256_of_zeros(out))
    );
    let metrics = scene.service.ops("/metrics").await.expect("the service tells its metrics");
    let counted = |direction: &str| {
        let line = format!("runner_agent_objects_bytes_total{{direction=\"{direction}\"}} ");
        metrics.lines().find_map(|at| at.strip_prefix(&*line)?.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    let (sent, taken) = (counted("out"), counted("in"));
    if past_the_service {
        // What is left is the manifest.
        assert!(sent < 1 << 20 && taken < 1 << 20, "{sent} and {taken} bytes passed the service");
    } else {
        assert!(sent >= into && taken >= out, "{sent} and {taken} bytes passed the service");
    }
    assert!(!scene.service.log().contains("X-Amz-Signature"), "a signed URL is in the service's log");
    scene.assert_clean(&[&run]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_of_64_mib_move_a_gibibyte_in_and_two_out_past_the_service() {
    moved_by_agents_of_64_mib(1 << 30, 2 << 30, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_of_64_mib_move_twice_and_four_times_as_much_by_the_service() {
    moved_by_agents_of_64_mib(128 << 20, 256 << 20, false).await;
}
