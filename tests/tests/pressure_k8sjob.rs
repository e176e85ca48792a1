//! A cluster without room: quotas, a full node, a pod that makes room for another, memory that is used up. Each is told for what it is,
//! with the cluster's own words, and nothing is left.

use std::{
    fs,
    process::{Child, Command, Stdio},
};

use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt as _, api::ListParams};
use runner_core::clock::{IdGen as _, SystemIds};
use runner_tests::{
    cluster::{self, Cluster, IMAGE, NAMESPACE},
    proc,
    scene::{On, Scene},
    service::{Watched, eventually, watch, watch_for},
};
use serde_json::{Value, json};
use worker_client::{Client, Finished, RunSpec, proto};

/// How long a run may find no room in tests that have none to give.
const NO_ROOM: &str = "8s";

fn sh(script: &str) -> RunSpec {
    RunSpec::command(["sh", "-c", script])
}

async fn start(client: &Client, spec: RunSpec) -> String {
    client.run(spec).await.expect("run").id().to_owned()
}

fn assert_failed(end: &Finished, cause: proto::Cause, retryable: bool) {
    assert_eq!((end.state, end.cause()), (proto::RunState::Failed, cause), "{end:?}");
    assert_eq!(end.outcome.retryable, retryable, "{end:?}");
}

/// Message and evidence, as one text.
fn told(end: &Finished) -> String {
    format!("{:?}", end.outcome)
}

/// A quota that refuses the Job, then one that refuses its pod: the cluster says no in two places, and the run tells of both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_quota_refuses_is_unschedulable_with_the_quotas_words() {
    const TEST: &str = "quotas";
    let Ok(cluster) = cluster::shared().await.map_err(|missing| missing.skip("k8sjob", TEST)) else { return };
    let own = tokio::task::block_in_place(|| cluster.own_namespace(&json!({ "count/jobs.batch": "0" })));
    let of_backend = format!(", namespace = '{}', unschedulable_seconds = 2", own.name);
    let settings = [("RUNNER_LIMITS__PENDING_TIMEOUT", NO_ROOM)];
    let prepared = Scene::prepare_with(On::K8sJob, &of_backend, &settings, TEST).await;
    let Some(mut scene) = prepared else { return };
    scene.service.restart(&[]).await;
    let client = scene.service.client();
    let refused = [("count/jobs.batch", "exceeded quota"), ("pods", "FailedCreate")];
    for (counted, words) in refused {
        tokio::task::block_in_place(|| own.set_quota(&json!({ counted: "0" })));
        let run = start(&client, sh("echo never")).await;
        let watched = watch(&client, &run, "").await;
        assert_failed(watched.end(), proto::Cause::Unschedulable, true);
        let told = told(watched.end());
        assert!(told.contains(words) && told.contains("exceeded quota"), "{counted}: {told}");
        assert_eq!(watched.out, b"");
        let label = format!("runner.attempt={run}.1");
        eventually("nothing of the run on the cluster", async || {
            tokio::task::block_in_place(|| own.labelled(&label)).is_empty().then_some(())
        })
        .await;
    }
    scene.service.kill();
    tokio::task::block_in_place(|| drop(own));
}

/// Two priorities of the test's own, gone when it is.
struct Priorities {
    cluster: Cluster,
    low: String,
    high: String,
}

impl Priorities {
    fn make(cluster: &Cluster) -> Self {
        let tag = format!("{:x}", SystemIds.random());
        let made = Self {
            cluster: cluster.clone(),
            low: format!("runner-test-low-{tag}"),
            high: format!("runner-test-high-{tag}"),
        };
        let class = |name: &str, value: i32, preempts: &str| {
            json!({
                "apiVersion": "scheduling.k8s.io/v1",
                "kind": "PriorityClass",
                "metadata": { "name": name },
                "value": value,
                "preemptionPolicy": preempts,
            })
        };
        // Below everything else, so that nothing else is in the way of the other one.
        let items = json!([class(&made.low, -1000, "Never"), class(&made.high, 10, "PreemptLowerPriority")]);
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": items });
        cluster.kubectl(&["apply", "--filename=-"], &list).expect("make two priorities");
        made
    }
}

impl Drop for Priorities {
    fn drop(&mut self) {
        let _ = self.cluster.kubectl(&["delete", "priorityclass", &self.low, &self.high], &Value::Null);
    }
}

/// A pod of somebody else, gone when this is.
struct Stranger {
    cluster: Cluster,
    name: String,
}

impl Stranger {
    fn come(priorities: &Priorities, memory: u64) -> Self {
        let cluster = priorities.cluster.clone();
        let name = format!("stranger-{:x}", SystemIds.random());
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": name, "namespace": NAMESPACE },
            "spec": {
                "priorityClassName": priorities.high,
                "terminationGracePeriodSeconds": 0,
                "automountServiceAccountToken": false,
                "containers": [{
                    "name": "sleep",
                    "image": IMAGE,
                    "imagePullPolicy": "Never",
                    "command": ["sleep", "100000"],
                    "resources": { "requests": { "memory": memory.to_string() } },
                }],
            },
        });
        cluster.kubectl(&["create", "--filename=-"], &pod).expect("make a pod");
        Self { cluster, name }
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let args = ["delete", "pod", &self.name, "--namespace", NAMESPACE, "--wait=true", "--timeout=60s"];
        let _ = self.cluster.kubectl(&args, &Value::Null);
    }
}

/// More than half of what the node has for pods, in bytes.
fn most_of_the_node(cluster: &Cluster) -> u64 {
    let node = cluster.kubectl(&["get", "node", &cluster.node, "--output=json"], &Value::Null);
    let node: Value = serde_json::from_str(&node.expect("the node")).expect("JSON");
    let memory = node["status"]["allocatable"]["memory"].as_str().expect("the node says what it has");
    let kib: u64 = memory.strip_suffix("Ki").expect("in KiB").parse().expect("a number");
    kib / 100 * 55 * 1024
}

/// One run has most of the node. A second finds no room. Then somebody more important comes, and the first has to go.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_full_node_one_finds_no_room_and_one_makes_room_for_another() {
    const TEST: &str = "a full node";
    let Ok(cluster) = cluster::shared().await.map_err(|missing| missing.skip("k8sjob", TEST)) else { return };
    let priorities = tokio::task::block_in_place(|| Priorities::make(&cluster));
    let memory = tokio::task::block_in_place(|| most_of_the_node(&cluster));
    let of_backend = format!(
        ", priority_class = '{}', memory_request_percent = 100, unschedulable_seconds = 2",
        priorities.low
    );
    let Some(mut scene) = Scene::prepare_with(On::K8sJob, &of_backend, &[], TEST).await else { return };
    scene.service.restart(&[]).await;
    let client = scene.service.client();
    let large = |script| sh(script).memory_bytes(memory);
    let first = start(&client, large("echo ready; while :; do sleep 1; done")).await;
    watch_for(&client, &first, "ready").await;
    // From now on nothing waits for long.
    scene.service.kill();
    scene.service.restart(&[("RUNNER_LIMITS__PENDING_TIMEOUT", NO_ROOM)]).await;
    let client = scene.service.client();
    let second = start(&client, large("echo never")).await;
    let watched = watch(&client, &second, "").await;
    assert_failed(watched.end(), proto::Cause::Unschedulable, true);
    assert!(told(watched.end()).contains("Insufficient memory"), "{:?}", watched.end());
    assert_eq!(watched.out, b"");
    let stranger = tokio::task::block_in_place(|| Stranger::come(&priorities, memory));
    let watched: Watched = watch(&client, &first, "").await;
    assert_failed(watched.end(), proto::Cause::Evicted, true);
    assert!(watched.end().outcome.message.contains("Preempted"), "{:?}", watched.end());
    assert_eq!(String::from_utf8_lossy(&watched.out), "ready\n", "what it said is kept");
    scene.assert_clean(&[&first, &second]).await;
    assert!(proc::with_environment("RUNNER_RUN_ID", &first).is_empty());
    tokio::task::block_in_place(|| drop((stranger, priorities)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_at_its_memory_limit_is_told_as_such() {
    let Some(mut scene) = Scene::prepare(On::K8sJob, "memory of a program").await else { return };
    scene.service.restart(&[]).await;
    let client = scene.service.client();
    let script = "echo ready; dd if=/dev/zero of=/dev/null bs=400000000 count=1";
    let run = start(&client, sh(&format!("{script}; exit $?")).memory_bytes(64 << 20)).await;
    let watched = watch(&client, &run, "").await;
    assert_failed(watched.end(), proto::Cause::OomKilled, false);
    assert_eq!(String::from_utf8_lossy(&watched.out), "ready\n");
    scene.assert_clean(&[&run]).await;
}

/// Somebody who takes all the memory of a control group. The kernel kills a pod's own process for it: a kubelet marks those of pods
/// that reserve less than their limit as the first to go.
struct Hog(Child);

impl Hog {
    /// In the group of this process.
    fn beside(pid: i32) -> Self {
        let group = proc::memory_group(pid).expect("the process is limited");
        let procs = group.join("cgroup.procs");
        let script = format!(
            "echo $$ > '{}' && exec dd if=/dev/zero of=/dev/null bs=256M count=100000",
            procs.display()
        );
        let child = Command::new("sh")
            .args(["-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Self(child.expect("start a program"))
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The kernel kills the agent beside a program at the agent's memory limit. That is not the program's failure.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_at_its_memory_limit_is_not_told_as_the_programs() {
    let of_backend = ", agent_memory_bytes = 67108864";
    let prepared = Scene::prepare_with(On::K8sJob, of_backend, &[], "memory of an agent").await;
    let Some(mut scene) = prepared else { return };
    scene.service.restart(&[]).await;
    let client = scene.service.client();
    let run = start(&client, sh("echo ready; while :; do sleep 1; done")).await;
    watch_for(&client, &run, "ready").await;
    let pods: Api<Pod> = Api::namespaced(scene.cluster().client().await, NAMESPACE);
    let of_run = ListParams::default().labels(&format!("runner.attempt={run}.1"));
    let pod = pods.list(&of_run).await.expect("list the pods").items.pop().expect("the pod");
    let agent = || {
        let all = proc::pids_in_control_groups_named(&format!("pod{}", pod.uid().expect("a uid")));
        all.into_iter().find(|pid| proc::describe(*pid).contains("runner-agent publish"))
    };
    let pid = agent().expect("the agent beside the program is found");
    let hog = Hog::beside(pid);
    eventually("the agent's death", async || {
        (!fs::exists(format!("/proc/{pid}/exe")).unwrap_or(false) || agent() != Some(pid)).then_some(())
    })
    .await;
    drop(hog);
    let watched = watch(&client, &run, "").await;
    assert_failed(watched.end(), proto::Cause::Backend, true);
    assert!(told(watched.end()).contains("publish ended: OOMKilled"), "{:?}", watched.end());
    assert_eq!(String::from_utf8_lossy(&watched.out), "ready\n");
    scene.assert_clean(&[&run]).await;
    assert!(proc::with_environment("RUNNER_RUN_ID", &run).is_empty());
}
