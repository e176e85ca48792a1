//! The chart on a real cluster: installed, used, killed, and uninstalled; and what the accounts that it makes may do there.
//!
//! Needs what the tests of the Kubernetes backend need, Helm, and the service's image, which `cargo xtask test` makes where there is a
//! cluster.

use std::{collections::BTreeSet, fs, net::Ipv4Addr, time::Duration};

use runner_core::clock::{IdGen as _, SystemIds};
use runner_tests::{
    chart::{Chart, Right, documented_rights, folder, rights},
    cluster::{self, Cluster, IMAGE},
    service::{eventually, watch},
};
use serde_json::{Value, json};
use worker_client::{Client, RetryPolicy, RunSpec, TransferOptions, proto};

/// What Helm waits at most for.
const TIMEOUT: &str = "--timeout=120s";

/// An installed release. Dropping it removes everything that it brought, whatever state it is in.
struct Release {
    chart: Chart,
    cluster: Cluster,
    /// Its name, and the namespace of the service.
    name: String,
    workloads: String,
    /// The folder of its volume, on the node, which is this machine.
    folder: tempfile::TempDir,
}

impl Release {
    /// A name, a namespace and a volume of their own, or a visible skip.
    async fn prepare(test: &str) -> Option<Self> {
        let chart = Chart::find(test)?;
        let cluster = cluster::shared().await.map_err(|missing| missing.skip("k8sjob", test)).ok()?;
        Cluster::load_service_image().map_err(|missing| missing.skip("chart-installation", test)).ok()?;
        let name = format!("chart-{:08x}", SystemIds.random() as u32);
        let folder =
            tempfile::Builder::new().prefix("runner-chart-").tempdir().expect("a temporary directory");
        let release = Self { chart, cluster, workloads: format!("{name}-workloads"), name, folder };
        release.kubectl(&["create", "namespace", &release.name]);
        release.make_volume();
        Some(release)
    }

    /// The service's name, of which the chart makes all others.
    fn service(&self) -> String {
        format!("{}-runner", self.name)
    }

    fn kubectl(&self, args: &[&str]) -> String {
        self.cluster.kubectl(args, &Value::Null).unwrap_or_else(|said| panic!("{said}"))
    }

    fn get(&self, args: &[&str]) -> Value {
        let text = self.kubectl(&[&["get", "--output=json"], args].concat());
        serde_json::from_str(&text).expect("JSON")
    }

    /// The cluster has nobody who makes volumes, so the claim of the chart finds one that is there: a folder of the node.
    fn make_volume(&self) {
        let here =
            [json!({ "key": "kubernetes.io/hostname", "operator": "In", "values": [self.cluster.node] })];
        let volume = json!({
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": { "name": self.name },
            "spec": {
                "capacity": { "storage": "1Gi" },
                "accessModes": ["ReadWriteOnce"],
                "persistentVolumeReclaimPolicy": "Retain",
                "claimRef": { "namespace": self.name, "name": self.service() },
                "local": { "path": self.folder.path() },
                "nodeAffinity": { "required": { "nodeSelectorTerms": [{ "matchExpressions": here }] } },
            },
        });
        self.cluster.kubectl(&["create", "--filename=-"], &volume).expect("make a volume");
    }

    /// An address of the cluster's Services that nothing has.
    fn free_address(&self) -> Ipv4Addr {
        let services = self.get(&["services", "--all-namespaces"]);
        let taken: BTreeSet<Ipv4Addr> = services["items"]
            .as_array()
            .expect("a list")
            .iter()
            .filter_map(|service| service["spec"]["clusterIP"].as_str()?.parse().ok())
            .collect();
        let [a, b, ..] = taken.first().expect("the API server has a Service").octets();
        let candidates = std::iter::repeat_with(|| {
            let [c, d, ..] = SystemIds.random().to_le_bytes();
            // Away from both ends of the range, and from where the first Services are.
            Ipv4Addr::new(a, b, 128 | (c & 0x3f), 1 + d % 250)
        });
        candidates.take(1000).find(|address| !taken.contains(address)).expect("a free address")
    }

    fn install(&self) {
        // The cluster has no DNS, so agents dial an address; images are on its node, and nowhere else.
        let agents = self.free_address();
        let values = json!({
            "image": { "repository": "docker.io/library/runner", "pullPolicy": "Never" },
            "agentImage": { "repository": "docker.io/library/runner-agent" },
            "agents": { "clusterIP": agents },
            "workloads": { "namespace": self.workloads, "limitRange": [] },
            "data": { "persistence": { "enabled": true, "size": "1Gi", "keep": false } },
            "resources": { "requests": { "cpu": "10m", "memory": "64Mi" } },
            "config": {
                "backends": [{
                    "kind": "k8sjob",
                    "agent_url": format!("http://{agents}:7602"),
                    "default_image": IMAGE,
                    "pull_policy": "Never",
                    "cpu_request_percent": 1,
                    "memory_request_percent": 1,
                }],
            },
        });
        let dir = tempfile::tempdir().expect("a temporary directory");
        let file = dir.path().join("values.json");
        fs::write(&file, values.to_string()).expect("write the values");
        let (chart, file) = (folder(), file.display().to_string());
        let (dev, chart) = (chart.join("values-dev.yaml").display().to_string(), chart.display().to_string());
        let args = ["install", &self.name, &chart, "--values", &dev, "--values", &file, "--wait"];
        if let Err(said) = self.helm(&args) {
            panic!("{said}\n{}", self.told());
        }
    }

    fn helm(&self, args: &[&str]) -> Result<String, String> {
        let place = ["--kubeconfig", self.cluster.admin(), "--namespace", &self.name, TIMEOUT];
        self.chart.run(&[args, &place].concat())
    }

    /// What the cluster and the service say, for a failed test.
    fn told(&self) -> String {
        let ask = |args: &[&str]| self.cluster.kubectl(args, &Value::Null).unwrap_or_else(|said| said);
        let service = format!("deployment/{}", self.service());
        let pods = ask(&["describe", "pods", "--namespace", &self.name]);
        let log = ask(&["logs", "--namespace", &self.name, &service, "--tail=50"]);
        format!("{pods}\n{log}")
    }

    /// A client of the service at its Service's address, which this machine reaches as the cluster's node.
    fn client(&self) -> Client {
        let service = self.get(&["service", &self.service(), "--namespace", &self.name]);
        let address = service["spec"]["clusterIP"].as_str().expect("an address").to_owned();
        let policy = RetryPolicy {
            max_attempts: 200,
            initial_backoff: Duration::from_millis(50),
            max_backoff: Duration::from_millis(500),
            ..RetryPolicy::default()
        };
        let builder = Client::builder(format!("http://{address}:7600"));
        builder.retry(policy).stream_retry(policy).connect_lazy().expect("a client")
    }

    /// What an account may do in a namespace beyond what every account may.
    fn may(&self, account: &str, namespace: &str) -> Vec<Right> {
        let ask = |account: &str| -> (Vec<Right>, Value) {
            let review = json!({
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SelfSubjectRulesReview",
                "spec": { "namespace": namespace },
            });
            let path = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews";
            let account = format!("--as=system:serviceaccount:{account}");
            let answer = self.cluster.kubectl(&["create", "--raw", path, "--filename=-", &account], &review);
            let answer: Value =
                serde_json::from_str(&answer.expect("ask what an account may")).expect("JSON");
            let status = &answer["status"];
            assert_eq!(status["incomplete"], false, "{status}");
            let mut others: Vec<Value> = status["nonResourceRules"].as_array().cloned().unwrap_or_default();
            others.sort_by_key(Value::to_string);
            (rights(&status["resourceRules"]), others.into())
        };
        // An account that nothing names, of the same namespace.
        let (namespace_of, _) = account.split_once(':').expect("NAMESPACE:NAME");
        let (everybody, (all, others)) = (ask(&format!("{namespace_of}:nobody")), ask(account));
        assert_eq!(others, everybody.1, "{account} may more than look at the API server's health");
        all.into_iter().filter(|right| !everybody.0.contains(right)).collect()
    }

    /// What has the release's label, or is in its namespace of workloads.
    fn left(&self) -> Vec<String> {
        let kinds = "pods,services,deployments,replicasets,configmaps,secrets,serviceaccounts,roles,rolebindings,\
                     networkpolicies,persistentvolumeclaims,resourcequotas,limitranges,jobs,namespaces,clusterroles,\
                     clusterrolebindings";
        let label = format!("--selector=app.kubernetes.io/instance={}", self.name);
        let labelled = self.kubectl(&["get", kinds, "--all-namespaces", &label, "--output=name"]);
        let secrets = self.kubectl(&["get", "secrets", "--namespace", &self.name, "--output=name"]);
        // What Helm knows of the release; not the token that the cluster makes for the namespace's own account.
        let secrets = secrets.lines().filter(|secret| secret.contains("sh.helm.release"));
        let mut left: Vec<String> = labelled.lines().chain(secrets).map(str::to_owned).collect();
        if self.cluster.kubectl(&["get", "namespace", &self.workloads], &Value::Null).is_ok() {
            left.push(self.workloads.clone());
        }
        left
    }
}

impl Drop for Release {
    fn drop(&mut self) {
        if std::thread::panicking() {
            #[allow(clippy::print_stderr, reason = "a failed test shows what the cluster said")]
            {
                eprintln!("{}", self.told());
            }
        }
        // Nothing of it may be there, and each may have been removed by the test already.
        let _ = self.helm(&["uninstall", &self.name, "--wait"]);
        for args in
            [["namespace", &self.workloads], ["namespace", &self.name], ["persistentvolume", &self.name]]
        {
            let delete = [&["delete", "--ignore-not-found", "--timeout=120s"], &args[..]].concat();
            let _ = self.cluster.kubectl(&delete, &Value::Null);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_installed_service_runs_jobs_keeps_its_state_in_a_new_pod_and_leaves_nothing_behind() {
    let Some(release) = Release::prepare("install").await else { return };
    release.install();
    let client = release.client();
    let script = "cat /inputs/a | tee /outputs/b; id -u; ls /var/run/secrets 2>/dev/null; true";
    let spec = || {
        RunSpec::command(["sh", "-c", script])
            .network_egress()
            .input_bytes("/inputs/a", "from outside\n")
            .output("/outputs/b")
    };
    let run = async || {
        let run = client.run(spec()).await.expect("the service accepts a run");
        let watched = watch(&client, run.id(), "").await;
        assert_eq!(watched.end().state, proto::RunState::Succeeded, "{watched:?}");
        assert_eq!(String::from_utf8_lossy(&watched.out), "from outside\n65532\n");
        let dir = tempfile::tempdir().expect("a temporary directory");
        let manifest = watched.end().outputs().expect("outputs");
        let taken = client.download_outputs(manifest, dir.path(), TransferOptions::default()).await;
        assert_eq!(taken.expect("download the outputs").len(), 1);
        assert_eq!(fs::read(dir.path().join("outputs/b")).expect("the output"), b"from outside\n");
        run.id().to_owned()
    };
    let before = run().await;

    // Another pod has the volume: its keys are as they were, and so are its runs.
    let of_the_service = "--selector=app.kubernetes.io/component=service";
    let pod = |release: &Release| -> String {
        let pods = release.get(&["pods", "--namespace", &release.name, of_the_service]);
        let pods = pods["items"].as_array().expect("a list").clone();
        pods.iter().map(|pod| pod["metadata"]["uid"].as_str().expect("a uid").to_owned()).collect()
    };
    let first = pod(&release);
    // As an upgrade does it. After a pod that is deleted the next one would come at once, and be refused the data until they are free.
    let deployment = format!("deployment/{}", release.service());
    release.kubectl(&["rollout", "restart", &deployment, "--namespace", &release.name]);
    release.kubectl(&["rollout", "status", &deployment, "--namespace", &release.name, "--timeout=100s"]);
    assert_ne!(pod(&release), first);
    let seen = client.get(before.as_str()).await.expect("the run is known");
    assert_eq!(seen.state(), proto::RunState::Succeeded);
    run().await;

    release.helm(&["uninstall", &release.name, "--wait"]).expect("uninstall");
    eventually("nothing of the release", async || {
        let left = tokio::task::block_in_place(|| release.left());
        left.is_empty().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_may_what_is_documented_where_workloads_are_and_workloads_may_nothing() {
    let Some(release) = Release::prepare("rights").await else { return };
    release.install();
    let (service, workload) = (
        format!("{}:{}", release.name, release.service()),
        format!("{}:{}-workload", release.workloads, release.service()),
    );
    // That the accounts are these: asking for one that is not there answers just as well.
    let account =
        |namespace: &str, name: &str| release.get(&["serviceaccount", name, "--namespace", namespace]);
    account(&release.name, &release.service());
    account(&release.workloads, &format!("{}-workload", release.service()));
    assert_eq!(release.may(&service, &release.workloads), documented_rights());
    for elsewhere in [&release.name, "default", "kube-system"] {
        assert_eq!(release.may(&service, elsewhere), [], "{elsewhere}");
    }
    for everywhere in [&release.workloads, &release.name, "default", "kube-system"] {
        assert_eq!(release.may(&workload, everywhere), [], "{everywhere}");
    }
}
