//! A service with two backends.

use runner_tests::{
    backend::{
        dind::{self, IMAGE},
        k8sjob,
    },
    cluster,
    docker::{self, TestImage},
    service::Service,
};
use tempfile::TempDir;

/// The image of the backend `cluster` on a cluster: that of `dind`, and a shell more.
const IMAGE_AND_MORE: &str = "docker.io/runner-test/busybox-and-more:1";
const MORE: &str = "/bin/only-there";

/// What the backend `cluster` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Other {
    /// `local`, which stands for any other.
    Local,
    /// `k8sjob`, on the cluster that was started for tests.
    K8sJob,
}

impl Other {
    /// A shell that it has and `dind` has not.
    pub const fn shell(self) -> &'static str {
        match self {
            Self::Local => "/bin/bash",
            Self::K8sJob => MORE,
        }
    }
}

/// A service with `dind`, the default, on an engine; and `cluster`.
#[derive(Debug)]
pub struct Two {
    pub service: Service,
    pub other: Other,
    /// Goes with this, so it is kept as long as the service runs.
    pub kubeconfig: TempDir,
}

/// Starts one, or skips `test` visibly.
///
/// # Panics
/// Where one of the two is missing and `RUNNER_REQUIRE_BACKENDS` names it.
pub async fn start(other: Other, test: &str) -> Option<Two> {
    let engine = docker::shared_or_skip(test)?;
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut settings = vec![("RUNNER_DEFAULT_BACKEND", "dind".to_owned())];
    let second = match other {
        Other::Local => "{ kind = 'local', name = 'cluster', slots = 4 }".to_owned(),
        Other::K8sJob => {
            let cluster = cluster::shared().await.map_err(|missing| missing.skip("k8sjob", test)).ok()?;
            let image =
                TestImage::busybox().and(MORE.trim_start_matches('/'), b"#!/bin/sh\nexec sh \"$@\"\n");
            cluster::import(&image.archive(IMAGE_AND_MORE));
            let agents = k8sjob::agents_address();
            settings.push(("RUNNER_AGENT_LISTEN", agents.to_string()));
            k8sjob::table(&cluster, dir.path(), agents, ("cluster", IMAGE_AND_MORE), ", slots = 8")
        }
    };
    TestImage::busybox().load(&engine.connect(), IMAGE).await;
    let agent = dind::config(engine).agent.expect("the harness names the agent");
    let backends = format!(
        "[{{ kind = 'dind', name = 'dind', host = '{}', agent = '{}', default_image = '{IMAGE}', slots = 4 }}, {second}]",
        engine.host(),
        agent.display()
    );
    settings.push(("RUNNER_BACKENDS", backends));
    let settings: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    Some(Two { service: Service::start_with(&settings).await, other, kubeconfig: dir })
}
