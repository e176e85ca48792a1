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

/// The namespace, the backend's account with exactly what docs/k8sjob.md says, and the tests' account.
fn accounts() -> Value {
    let account = |name: &str| {
        json!({
            "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": name, "namespace": NAMESPACE },
        })
    };
    let binding = |name: &str, kind: &str, role: &str| {
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": { "name": name, "namespace": NAMESPACE },
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": role },
            "subjects": [{ "kind": "ServiceAccount", "name": name, "namespace": NAMESPACE }],
        })
    };
    json!({
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            { "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } },
            account(SERVICE),
            account(TESTER),
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "Role",
                "metadata": { "name": SERVICE, "namespace": NAMESPACE },
                "rules": [
                    {
                        "apiGroups": ["batch"],
                        "resources": ["jobs"],
                        "verbs": ["create", "get", "list", "watch", "patch", "delete"],
                    },
                    { "apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch", "delete"] },
                    { "apiGroups": [""], "resources": ["secrets"], "verbs": ["create"] },
                ],
            },
            binding(SERVICE, "Role", SERVICE),
            binding(TESTER, "ClusterRole", "admin"),
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
