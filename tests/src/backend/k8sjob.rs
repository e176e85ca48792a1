//! The harness of the Kubernetes backend: real pods of a real cluster, real agents that dial a surface of the test's own.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use backend_k8sjob::{K8sJobBackend, K8sJobConfig, K8sJobParts, PullPolicy};
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{Pod, Secret},
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, ListParams, PostParams, PropagationPolicy},
};
use runner::{
    agents::{self, Agents, LiveAttempts},
    config::Config,
    metrics::Metrics,
    server::{Server, bind_for_agents},
};
use runner_agent::staging::StagingLimits;
use runner_core::{
    agent::{AgentHub, AgentKey},
    backend::Backend,
    clock::{IdGen as _, SystemClock, SystemIds},
    id::AttemptId,
    service::NoMeter,
    spec::{Network, RunSpec},
    task::{TaskKind, spawn},
};
use serde_json::json;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{
    Harness, Missing,
    bench::{MARK, within},
    local::command,
    program::Program,
};
use crate::{
    cluster::{self, Cluster, IMAGE, NAMESPACE},
    port::free_address,
    proc,
};

const POLL: Duration = Duration::from_millis(50);

/// Tokens of attempts are good for as long as the test goes on.
#[derive(Debug)]
struct AllLive;

#[async_trait]
impl LiveAttempts for AllLive {
    async fn is_live(&self, _: AttemptId) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
        Ok(true)
    }
}

/// The surface that agents dial, as the service serves it.
#[derive(Debug)]
pub struct Surface {
    /// Where agents meet the backend.
    pub hub: Arc<AgentHub>,
    /// Where it is reached on this machine.
    pub address: SocketAddr,
    draining: CancellationToken,
    abort: CancellationToken,
    task: JoinHandle<Option<()>>,
}

impl Surface {
    /// Serves on every address, at a port of its own or at that of the one before.
    ///
    /// # Panics
    /// Where it cannot.
    pub async fn serve(port: u16) -> Self {
        let address = SocketAddr::from(([0, 0, 0, 0], port));
        // The one before may not quite have left its port.
        let listener = within("listen for agents", async {
            loop {
                match bind_for_agents("agent_listen", "--agent-listen", address).await {
                    Ok(listener) => return listener,
                    Err(_) => tokio::time::sleep(POLL).await,
                }
            }
        })
        .await;
        let address = listener.local_addr().expect("a listener has an address");
        let hub = AgentHub::new(AgentKey::new([7; 32]));
        let (draining, abort) = (CancellationToken::new(), CancellationToken::new());
        let server = Server {
            name: "agents",
            config: Config::default().server,
            metrics: Arc::new(Metrics::new()),
            draining: draining.clone(),
            abort: abort.clone(),
        };
        let surface = Agents {
            hub: Arc::clone(&hub),
            live: Arc::new(AllLive),
            direct: None,
            metrics: Arc::new(Metrics::new()),
            draining: draining.clone(),
        };
        let task = spawn(TaskKind::Loop, "agents", server.serve(listener, agents::router(surface)));
        Self { hub, address, draining, abort, task }
    }

    /// Ends it, with every connection.
    pub async fn end(self) {
        self.draining.cancel();
        self.abort.cancel();
        let _ = within("end the surface", self.task).await;
    }
}

/// The harness of the Kubernetes backend.
#[derive(Debug)]
pub struct K8sJobHarness {
    dir: TempDir,
    cluster: Cluster,
    instance: String,
    surface: Option<Surface>,
    backend: Option<Arc<K8sJobBackend>>,
    foreign: Mutex<Vec<Foreign>>,
}

/// What is not the backend's.
#[derive(Debug)]
enum Foreign {
    Job(String),
    Pod(String),
}

/// The settings of a backend on the test cluster: many pods fit beside one another, since nearly nothing is reserved.
///
/// # Panics
/// Where the kubeconfig cannot be written into the directory.
pub fn config(cluster: &Cluster, dir: &Path, port: u16) -> K8sJobConfig {
    let kubeconfig = dir.join("kubeconfig");
    cluster.write_kubeconfig(&kubeconfig);
    K8sJobConfig {
        kubeconfig: Some(kubeconfig),
        namespace: NAMESPACE.to_owned(),
        agent_url: format!("http://{}", SocketAddr::new(cluster.address, port)),
        agent_image: Cluster::agent_image(),
        default_image: Some(IMAGE.to_owned()),
        pull_policy: PullPolicy::Never,
        cpu_request_percent: 1,
        memory_request_percent: 1,
        ..K8sJobConfig::default()
    }
}

/// The backend as a table of a service's configuration, with this name and image, and with more settings (`, key = value`), which go
/// before the usual ones.
///
/// It says that the cluster enforces network policies, so that a spec may be the same as on other backends. It does not; no test
/// with this is about networks.
///
/// # Panics
/// Where the kubeconfig cannot be written into the directory.
pub fn table(
    cluster: &Cluster,
    dir: &Path,
    agents: SocketAddr,
    (name, image): (&str, &str),
    more: &str,
) -> String {
    let config = config(cluster, dir, agents.port());
    let quoted = |text: &str| format!("'{text}'");
    let usual = [
        ("kind", quoted("k8sjob")),
        ("name", quoted(name)),
        ("kubeconfig", quoted(&config.kubeconfig.unwrap_or_default().display().to_string())),
        ("namespace", quoted(&config.namespace)),
        ("agent_url", quoted(&config.agent_url)),
        ("agent_image", quoted(&config.agent_image)),
        ("default_image", quoted(image)),
        ("pull_policy", quoted("Never")),
        ("cpu_request_percent", config.cpu_request_percent.to_string()),
        ("memory_request_percent", config.memory_request_percent.to_string()),
        ("enforces_network_policies", "true".to_owned()),
    ];
    // What is asked for goes before what is usual.
    let asked: Vec<&str> =
        more.split(',').filter_map(|setting| setting.split_once('=')).map(|(key, _)| key.trim()).collect();
    let usual: Vec<String> = usual
        .into_iter()
        .filter(|(key, _)| !asked.contains(key))
        .map(|(key, value)| format!("{key} = {value}"))
        .collect();
    format!("{{ {}{more} }}", usual.join(", "))
}

/// Settings of a service with this backend, as variables of its environment.
///
/// # Panics
/// As [`table`].
pub fn settings(
    cluster: &Cluster,
    dir: &Path,
    agents: SocketAddr,
    more: &str,
) -> Vec<(&'static str, String)> {
    let table = table(cluster, dir, agents, ("k8sjob", IMAGE), more);
    vec![
        ("RUNNER_AGENT_LISTEN", agents.to_string()),
        ("RUNNER_BACKENDS", format!("[{table}]")),
        ("RUNNER_DEFAULT_BACKEND", "k8sjob".to_owned()),
    ]
}

/// An address for agents to dial: a port that nobody listens on now, on every address of this machine.
///
/// # Panics
/// Where there is none.
pub fn agents_address() -> SocketAddr {
    (Ipv4Addr::UNSPECIFIED, free_address().port()).into()
}

/// Opens a backend whose agents meet it at this hub.
///
/// # Panics
/// Where it cannot be opened.
pub async fn open(config: K8sJobConfig, hub: &Arc<AgentHub>, instance: &str) -> K8sJobBackend {
    let parts = K8sJobParts {
        config,
        instance: instance.to_owned(),
        hub: Arc::clone(hub),
        clock: Arc::new(SystemClock::new()),
        staging: StagingLimits::default(),
        meter: Arc::new(NoMeter),
    };
    K8sJobBackend::open(parts).await.expect("open the Kubernetes backend")
}

/// A Kubernetes backend of its own service on the shared cluster.
///
/// # Errors
/// Where there is no cluster.
///
/// # Panics
/// Where there is one and the backend cannot use it: that is a failure, not a missing backend.
pub async fn make() -> Result<Box<dyn Harness>, Missing> {
    let cluster = cluster::shared().await?;
    let instance = format!("conformance-{:x}", SystemIds.random());
    let dir =
        tempfile::Builder::new().prefix("runner-conformance-").tempdir().expect("a temporary directory");
    let surface = Surface::serve(0).await;
    let backend = open(config(&cluster, dir.path(), surface.address.port()), &surface.hub, &instance).await;
    let health = backend.health().await.expect("health");
    assert!(health.healthy, "the cluster is there and the backend cannot use it: {}", health.detail);
    Ok(Box::new(K8sJobHarness {
        dir,
        cluster,
        instance,
        surface: Some(surface),
        backend: Some(Arc::new(backend)),
        foreign: Mutex::default(),
    }))
}

/// What a namespace has with these labels: Jobs, pods, Secrets.
///
/// # Panics
/// Where the cluster does not answer.
pub async fn labelled(client: &Client, selector: &str) -> Vec<String> {
    async fn names<K>(client: &Client, kind: &str, selector: &str) -> Vec<String>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope> + Clone + std::fmt::Debug,
        K: serde::de::DeserializeOwned,
        K::DynamicType: Default,
    {
        let api: Api<K> = Api::namespaced(client.clone(), NAMESPACE);
        let found = api.list(&ListParams::default().labels(selector)).await.expect("list what is there");
        found.items.iter().map(|one| format!("{kind} {}", one.name_any())).collect()
    }
    let mut all = names::<Job>(client, "Job", selector).await;
    all.extend(names::<Pod>(client, "pod", selector).await);
    all.extend(names::<Secret>(client, "Secret", selector).await);
    all
}

impl K8sJobHarness {
    fn block<T: Send>(&self, work: impl Future<Output = T> + Send) -> T {
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(work))
    }

    fn selector(&self) -> String {
        format!("runner.instance={}", self.instance)
    }
}

fn sleeper(name: &str, labels: &serde_json::Value) -> serde_json::Value {
    json!({
        "metadata": { "name": name, "labels": labels },
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": false,
            "containers": [{
                "name": "sleep", "image": IMAGE, "imagePullPolicy": "Never", "command": ["sleep", "100000"],
            }],
        },
    })
}

#[async_trait]
impl Harness for K8sJobHarness {
    fn backend(&self) -> Arc<dyn Backend> {
        let backend = self.backend.as_ref().expect("the backend is open");
        Arc::clone(backend) as Arc<dyn Backend>
    }

    async fn reopen(&mut self) {
        let before = self.backend.take().map(|backend| Arc::downgrade(&backend));
        if let Some(before) = before {
            assert!(before.upgrade().is_none(), "the case holds the backend that is to be dropped");
        }
        let surface = self.surface.take().expect("the surface is served");
        let port = surface.address.port();
        surface.end().await;
        let surface = Surface::serve(port).await;
        let backend = open(config(&self.cluster, self.dir.path(), port), &surface.hub, &self.instance).await;
        self.backend = Some(Arc::new(backend));
        self.surface = Some(surface);
    }

    fn spec(&self, program: &Program) -> RunSpec {
        RunSpec {
            image: Some(IMAGE.to_owned()),
            command: command(program),
            // The test cluster enforces no policies, so the backend refuses everything else.
            network: Network::Egress,
            ..RunSpec::default()
        }
    }

    fn processes(&self, attempt: AttemptId) -> Vec<String> {
        proc::with_environment(MARK, &attempt.to_string())
    }

    fn starts(&self, _: AttemptId) -> Option<u32> {
        None
    }

    fn added_environment(&self) -> Vec<(&'static str, Option<&'static str>)> {
        vec![
            ("PATH", Some("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")),
            ("HOME", Some("/home/runner")),
            ("TMPDIR", Some("/tmp")),
            ("USER", Some("runner")),
            ("RUNNER_RUN_ID", None),
            ("RUNNER_ATTEMPT", Some("1")),
        ]
    }

    fn plant_foreign(&self) {
        let tag = format!("{:x}", SystemIds.random());
        let planted = self.block(async {
            let client = self.cluster.client().await;
            let (jobs, pods): (Api<Job>, Api<Pod>) =
                (Api::namespaced(client.clone(), NAMESPACE), Api::namespaced(client, NAMESPACE));
            let labels = json!({
                "runner.instance": "another",
                "runner.backend": "k8sjob",
                "runner.attempt": "0199aaaa-0000-7000-8000-00000000000a.1",
            });
            let job = format!("foreign-job-{tag}");
            let planted = json!({
                "metadata": { "name": job, "labels": labels },
                "spec": { "backoffLimit": 0, "template": sleeper(&job, &labels) },
            });
            let planted = serde_json::from_value(planted).expect("a Job");
            jobs.create(&PostParams::default(), &planted).await.expect("plant a Job");
            let pod = format!("foreign-pod-{tag}");
            let planted = serde_json::from_value(sleeper(&pod, &json!({}))).expect("a pod");
            pods.create(&PostParams::default(), &planted).await.expect("plant a pod");
            vec![Foreign::Job(job), Foreign::Pod(pod)]
        });
        self.foreign.lock().expect("no case panicked").extend(planted);
    }

    fn foreign_is_intact(&self) -> bool {
        let foreign = self.foreign.lock().expect("no case panicked");
        self.block(async {
            let client = self.cluster.client().await;
            for one in foreign.iter() {
                let deleting = match one {
                    Foreign::Job(name) => {
                        let found = Api::<Job>::namespaced(client.clone(), NAMESPACE).get_opt(name).await;
                        found.expect("look for the Job").map(|job| job.metadata.deletion_timestamp.is_some())
                    }
                    Foreign::Pod(name) => {
                        let found = Api::<Pod>::namespaced(client.clone(), NAMESPACE).get_opt(name).await;
                        found.expect("look for the pod").map(|pod| pod.metadata.deletion_timestamp.is_some())
                    }
                };
                if deleting != Some(false) {
                    return false;
                }
            }
            true
        })
    }

    fn leaks(&self) -> Vec<String> {
        self.block(async { labelled(&self.cluster.client().await, &self.selector()).await })
    }
}

impl Drop for K8sJobHarness {
    /// Removes what was planted, and what a failed case left. What the cluster has begun to remove it finishes.
    fn drop(&mut self) {
        let foreign = self.foreign.get_mut().map(std::mem::take).unwrap_or_default();
        let selector = self.selector();
        let surface = self.surface.take();
        self.backend = None;
        let clean = async {
            if let Some(surface) = surface {
                surface.end().await;
            }
            let client = self.cluster.client().await;
            let (jobs, pods): (Api<Job>, Api<Pod>) =
                (Api::namespaced(client.clone(), NAMESPACE), Api::namespaced(client, NAMESPACE));
            let at_once = DeleteParams {
                propagation_policy: Some(PropagationPolicy::Background),
                ..DeleteParams::default()
            };
            let ours = ListParams::default().labels(&selector);
            for job in jobs.list(&ours).await.map(|found| found.items).unwrap_or_default() {
                let _ = jobs.delete(&job.name_any(), &at_once).await;
            }
            for one in foreign {
                match one {
                    Foreign::Job(name) => drop(jobs.delete(&name, &at_once).await),
                    Foreign::Pod(name) => drop(pods.delete(&name, &at_once).await),
                }
            }
        };
        self.block(clean);
    }
}
