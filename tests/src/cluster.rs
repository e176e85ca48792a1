//! The Kubernetes cluster that tests use: one that somebody started for them, never one that a person works with.
//!
//! `RUNNER_TEST_KUBECONFIG` names its kubeconfig; without it every test that needs a cluster is skipped visibly. Its one node is
//! this machine, with its containerd at `RUNNER_TEST_CONTAINERD`: images are put there, since no registry is asked, and a
//! workload's processes are found in this machine's `/proc`.

use std::{
    fs,
    io::Write as _,
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use k8s_openapi::api::core::v1::{Namespace, Node, ServiceAccount};
use kube::{
    Api, Client, Config, Error as KubeError,
    api::{ListParams, ObjectMeta, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::sync::OnceCell;

use crate::{backend::Missing, binaries, docker::TestImage};

/// Where every workload of a test is.
pub const NAMESPACE: &str = "runner-test-workloads";
/// The image of every program here.
pub const IMAGE: &str = "docker.io/runner-test/busybox:1";
/// The containerd of the project's own test cluster.
const CONTAINERD: &str = "/run/test-k8s/containerd.sock";
/// How long the cluster may take for what it does by itself.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);

/// A cluster that answers.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// Its kubeconfig.
    pub kubeconfig: PathBuf,
    /// The node's address, which is this machine's: where pods reach a test.
    pub address: IpAddr,
}

impl Cluster {
    /// A client of its API server, with all rights. Of the calling test's own runtime.
    ///
    /// # Panics
    /// Where the kubeconfig is no good.
    pub async fn client(&self) -> Client {
        client(&self.kubeconfig).await.expect("a client of the cluster")
    }

    /// The image of the agents in pods, as the node has it.
    ///
    /// # Panics
    /// Never: `make` has put it there.
    pub fn agent_image() -> String {
        format!("docker.io/library/runner-agent:{}", env!("CARGO_PKG_VERSION"))
    }
}

async fn client(kubeconfig: &Path) -> Result<Client, String> {
    let file = Kubeconfig::read_from(kubeconfig).map_err(|error| error.to_string())?;
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
    Client::try_from(config.map_err(|error| error.to_string())?).map_err(|error| error.to_string())
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
    SHARED.get_or_init(find).await.clone().map_err(Missing)
}

async fn find() -> Result<Cluster, String> {
    let kubeconfig = std::env::var_os("RUNNER_TEST_KUBECONFIG")
        .map(PathBuf::from)
        .ok_or("RUNNER_TEST_KUBECONFIG names no cluster's kubeconfig")?;
    let client = client(&kubeconfig).await?;
    let version = tokio::time::timeout(PATIENCE, client.apiserver_version()).await;
    version.map_err(|_| "the API server does not answer")?.map_err(|error| error.to_string())?;
    // From here on it is a cluster, and has to work.
    let nodes: Api<Node> = Api::all(client.clone());
    let nodes = nodes.list(&ListParams::default()).await.expect("list the nodes");
    let [node] = &nodes.items[..] else {
        panic!("the test cluster has one node, this has {}", nodes.items.len())
    };
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let address = addresses.into_iter().find(|address| address.type_ == "InternalIP");
    let address = address.expect("the node has an address").address.parse().expect("an IP address");
    make_namespace(&client).await;
    tokio::task::spawn_blocking(load_images).await.expect("loading images does not panic");
    Ok(Cluster { kubeconfig, address })
}

/// Makes the namespace, and waits until pods can be made in it.
async fn make_namespace(client: &Client) {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let named = Namespace {
        metadata: ObjectMeta { name: Some(NAMESPACE.to_owned()), ..ObjectMeta::default() },
        ..Namespace::default()
    };
    match namespaces.create(&PostParams::default(), &named).await {
        Ok(_) => {}
        Err(KubeError::Api(status)) if status.code == 409 => {}
        Err(error) => panic!("make the namespace: {error}"),
    }
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), NAMESPACE);
    let there = async {
        while accounts.get_opt("default").await.expect("look for the account").is_none() {
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::time::timeout(PATIENCE, there).await.expect("the cluster makes the namespace's account");
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
