//! The Kubernetes cluster that tests use: one that somebody started for them, never one that a person works with.
//!
//! `RUNNER_TEST_KUBECONFIG` names its kubeconfig; without it every test that needs a cluster is skipped visibly. Its one node is
//! this machine, with its containerd at `RUNNER_TEST_CONTAINERD`: images are put there, since no registry is asked, and a
//! workload's processes are found in this machine's `/proc`.
//!
//! The backend gets an account with the documented rights and nothing more; tests look around and clean up with another one.

use std::{
    fs,
    io::Write as _,
    net::IpAddr,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use runner_core::clock::{IdGen as _, SystemIds};
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use crate::{backend::Missing, binaries, docker::TestImage, proc};

/// Where every workload of a test is.
pub const NAMESPACE: &str = "runner-test-workloads";
/// The image of every program here.
pub const IMAGE: &str = "docker.io/runner-test/busybox:1";
/// The account of the backend: what docs/k8sjob.md says that it may do, and nothing else.
const SERVICE: &str = "runner";
/// The account of the tests.
const TESTER: &str = "tester";
/// The containerd of the project's own test cluster.
const CONTAINERD: &str = "/run/test-k8s/containerd.sock";
/// How long the cluster may take for what it does by itself.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(200);
/// How long the accounts' tokens are good for: longer than any test.
const TOKEN_SECONDS: u32 = 24 * 3600;

/// A cluster that answers.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// A kubeconfig of the backend's account.
    service: String,
    /// One of the tests' own.
    tester: String,
    /// The path of the administrator's, who made the cluster.
    admin: String,
    /// The node's name.
    pub node: String,
    /// The node's address, which is this machine's: where pods reach a test.
    pub address: IpAddr,
}

impl Cluster {
    /// Writes the kubeconfig of the backend's account.
    ///
    /// # Panics
    /// Where it cannot be written.
    pub fn write_kubeconfig(&self, to: &Path) {
        fs::write(to, &self.service).expect("write a kubeconfig");
    }

    /// A client of its API server, with all rights in the namespace. Of the calling test's own runtime.
    ///
    /// # Panics
    /// Where the kubeconfig is no good.
    pub async fn client(&self) -> Client {
        let file = Kubeconfig::from_yaml(&self.tester).expect("a kubeconfig");
        let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
        Client::try_from(config.expect("a kubeconfig with a context")).expect("a client of the cluster")
    }

    /// Runs `kubectl` as the administrator, with this on its standard input. Answers what it wrote.
    ///
    /// # Errors
    /// What it wrote, where it fails.
    pub fn kubectl(&self, args: &[&str], input: &Value) -> Result<String, String> {
        kubectl(&self.admin, args, input)
    }

    /// The administrator's kubeconfig, for other programs than `kubectl`.
    pub fn admin(&self) -> &str {
        &self.admin
    }

    /// A namespace of the calling test's own, where the backend may do what it may in the shared one, with a quota.
    ///
    /// # Panics
    /// Where the cluster does not make it.
    pub fn own_namespace(&self, quota: &Value) -> OwnNamespace {
        let own =
            OwnNamespace { admin: self.admin.clone(), name: format!("runner-test-{:x}", SystemIds.random()) };
        let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": own.name } });
        let items = json!([namespace, role(&own.name), binding(&own.name, SERVICE, "Role", SERVICE)]);
        own.apply(&json!({ "apiVersion": "v1", "kind": "List", "items": items }));
        own.wait_for(&["serviceaccount", "default"], |_| true);
        own.set_quota(quota);
        own
    }

    /// The image of the agents in pods, as the node has it.
    pub fn agent_image() -> String {
        format!("docker.io/library/runner-agent:{}", env!("CARGO_PKG_VERSION"))
    }

    /// Puts the service's image onto the node.
    ///
    /// # Errors
    /// Where there is none.
    ///
    /// # Panics
    /// Where it cannot be read, or the node does not take it.
    pub fn load_service_image() -> Result<(), Missing> {
        let archive = binaries::service_image().map_err(Missing)?;
        import(&fs::read(archive).expect("read the service's image"));
        Ok(())
    }
}

/// The cluster that all tests share, with the images on its node and the namespace made.
///
/// # Errors
/// Where there is none.
///
/// # Panics
/// Where there is one and it does not do what it is for: that is a failure, not a missing cluster.
pub async fn shared() -> Result<Cluster, Missing> {
    static SHARED: OnceCell<Result<Cluster, String>> = OnceCell::const_new();
    let found =
        || async { tokio::task::spawn_blocking(find).await.expect("looking for a cluster does not panic") };
    SHARED.get_or_init(found).await.clone().map_err(Missing)
}

fn find() -> Result<Cluster, String> {
    let admin = std::env::var("RUNNER_TEST_KUBECONFIG")
        .map_err(|_| "RUNNER_TEST_KUBECONFIG names no cluster's kubeconfig".to_owned())?;
    let kubectl = |args: &[&str], input: &Value| kubectl(&admin, args, input);
    kubectl(&["get", "--raw", "/readyz", "--request-timeout=20s"], &Value::Null)?;
    // From here on it is a cluster, and has to work.
    let nodes = kubectl(&["get", "nodes", "--output=json"], &Value::Null).expect("list the nodes");
    let nodes: Value = serde_json::from_str(&nodes).expect("JSON");
    let [node] = &nodes["items"].as_array().expect("a list")[..] else {
        panic!("the test cluster has one node")
    };
    let addresses = node["status"]["addresses"].as_array().expect("the node has addresses");
    let address = addresses.iter().find(|address| address["type"] == "InternalIP");
    let address =
        address.and_then(|address| address["address"].as_str()?.parse().ok()).expect("an IP address");
    let name = node["metadata"]["name"].as_str().expect("the node has a name").to_owned();
    kubectl(&["apply", "--filename=-"], &accounts()).expect("make the namespace and the accounts");
    let mut waited = Duration::ZERO;
    // Pods cannot be made before the cluster has made their account.
    while kubectl(&["get", "serviceaccount", "default", "--namespace", NAMESPACE], &Value::Null).is_err() {
        assert!(waited < PATIENCE, "the cluster makes no account for the namespace");
        std::thread::sleep(POLL);
        waited += POLL;
    }
    let ours = kubectl(&["config", "view", "--raw", "--minify", "--flatten", "--output=json"], &Value::Null);
    let ours: Value = serde_json::from_str(&ours.expect("read the kubeconfig")).expect("JSON");
    let kubeconfig = |account: &str| {
        let path = format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{account}/token");
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": { "expirationSeconds": TOKEN_SECONDS },
        });
        let answer = kubectl(&["create", "--raw", &path, "--filename=-"], &request).expect("ask for a token");
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "test", "cluster": ours["clusters"][0]["cluster"] }],
            "users": [{ "name": account, "user": { "token": answer["status"]["token"] } }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": account } }],
            "current-context": "test",
        })
        .to_string()
    };
    let (service, tester) = (kubeconfig(SERVICE), kubeconfig(TESTER));
    let cluster = Cluster { service, tester, admin: admin.clone(), node: name, address };
    load_images();
    Ok(cluster)
}

/// A namespace that goes when this is dropped, with all that is in it.
#[derive(Debug)]
pub struct OwnNamespace {
    admin: String,
    /// What it is called.
    pub name: String,
}

impl OwnNamespace {
    /// Gives it this quota (`{"pods": "0"}`) in place of the one before, and waits until it counts.
    ///
    /// # Panics
    /// Where the cluster does not take it.
    pub fn set_quota(&self, hard: &Value) {
        self.apply(&json!({
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": { "name": "quota", "namespace": self.name },
            "spec": { "hard": hard },
        }));
        self.wait_for(&["resourcequota", "quota"], |quota| quota["status"]["hard"] == *hard);
    }

    /// What is in it with these labels: Jobs, pods, Secrets.
    ///
    /// # Panics
    /// Where the cluster does not say.
    pub fn labelled(&self, selector: &str) -> String {
        let args =
            ["get", "jobs,pods,secrets", "--namespace", &self.name, "--output=name", "--selector", selector];
        kubectl(&self.admin, &args, &Value::Null).expect("list what is there")
    }

    fn apply(&self, object: &Value) {
        kubectl(&self.admin, &["apply", "--filename=-"], object).expect("make it");
    }

    fn wait_for(&self, what: &[&str], is: impl Fn(&Value) -> bool) {
        let args = [&["get", "--output=json", "--namespace", &self.name], what].concat();
        let mut waited = Duration::ZERO;
        loop {
            let found = kubectl(&self.admin, &args, &Value::Null).unwrap_or_default();
            if serde_json::from_str(&found).is_ok_and(|found| is(&found)) {
                return;
            }
            assert!(waited < PATIENCE, "the cluster takes too long for {what:?}");
            std::thread::sleep(POLL);
            waited += POLL;
        }
    }
}

impl Drop for OwnNamespace {
    fn drop(&mut self) {
        let args = ["delete", "namespace", &self.name, "--wait=true", "--timeout=60s"];
        let gone = kubectl(&self.admin, &args, &Value::Null);
        assert!(gone.is_ok() || std::thread::panicking(), "{gone:?}");
    }
}

/// What docs/k8sjob.md says that the backend may do, in a namespace.
fn role(namespace: &str) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": { "name": SERVICE, "namespace": namespace },
        "rules": [
            {
                "apiGroups": ["batch"],
                "resources": ["jobs"],
                "verbs": ["create", "get", "list", "watch", "patch", "delete"],
            },
            { "apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch", "delete"] },
            { "apiGroups": [""], "resources": ["secrets"], "verbs": ["create"] },
            { "apiGroups": [""], "resources": ["events"], "verbs": ["list"] },
        ],
    })
}

/// Gives an account of the shared namespace a role in a namespace.
fn binding(namespace: &str, account: &str, kind: &str, role: &str) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": { "name": account, "namespace": namespace },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": role },
        "subjects": [{ "kind": "ServiceAccount", "name": account, "namespace": NAMESPACE }],
    })
}

/// The namespace, the backend's account with exactly what docs/k8sjob.md says, and the tests' account.
fn accounts() -> Value {
    let account = |name: &str| {
        json!({
            "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": name, "namespace": NAMESPACE },
        })
    };
    json!({
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            { "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } },
            account(SERVICE),
            account(TESTER),
            role(NAMESPACE),
            binding(NAMESPACE, SERVICE, "Role", SERVICE),
            binding(NAMESPACE, TESTER, "ClusterRole", "admin"),
        ],
    })
}

fn kubectl(kubeconfig: &str, args: &[&str], input: &Value) -> Result<String, String> {
    let input = if input.is_null() { String::new() } else { input.to_string() };
    let mut child = Command::new("kubectl")
        .args(["--kubeconfig", kubeconfig])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("start kubectl: {error}"))?;
    let mut to = child.stdin.take().ok_or("no pipe")?;
    // One that reads nothing has ended, and says why.
    let _ = to.write_all(input.as_bytes());
    drop(to);
    let output = child.wait_with_output().map_err(|error| format!("wait for kubectl: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!("kubectl {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
    }
}

fn load_images() {
    let agent = binaries::agent_image().expect("build the agent's image");
    import(&fs::read(&agent).expect("read the agent's image"));
    import(&TestImage::busybox().archive(IMAGE));
}

/// Puts an image onto the node.
///
/// # Panics
/// Where the node does not take it.
pub fn import(archive: &[u8]) {
    let socket = std::env::var("RUNNER_TEST_CONTAINERD").unwrap_or_else(|_| CONTAINERD.to_owned());
    let mut child = Command::new("ctr")
        .args(["--address", &socket, "--namespace", "k8s.io", "images", "import", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .expect("start ctr");
    let mut to = child.stdin.take().expect("a pipe");
    to.write_all(archive).expect("hand the image over");
    drop(to);
    let status = child.wait().expect("wait for ctr");
    assert!(status.success(), "ctr: {status}");
}

/// A program of the test cluster itself that does nothing as long as this lives.
#[derive(Debug)]
pub struct Daemon(Pid);

impl Daemon {
    /// Stops the one process of this machine whose program has that name.
    ///
    /// # Panics
    /// Where there is none or more than one.
    pub fn stop(name: &str) -> Self {
        let found = proc::pids_of_program(name);
        let [pid] = found[..] else { panic!("there is one {name} on this machine, not {found:?}") };
        let pid = Pid::from_raw(pid).expect("a pid");
        rustix::process::kill_process(pid, Signal::STOP).expect("stop it");
        Self(pid)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(self.0, Signal::CONT);
    }
}
