//! Settings of a Kubernetes backend.

use std::{collections::BTreeMap, path::PathBuf};

use runner_agent::backend::{DefaultUser, InvalidConfig};
use runner_core::id::{BackendName, InvalidId};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::template::PodTemplate;

/// When images are pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs, reason = "Kubernetes' own words")]
pub enum PullPolicy {
    Always,
    IfNotPresent,
    Never,
}

impl PullPolicy {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Always => "Always",
            Self::IfNotPresent => "IfNotPresent",
            Self::Never => "Never",
        }
    }
}

/// A taint that pods tolerate, in Kubernetes' own words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Toleration {
    /// The taint's key.
    pub key: String,
    /// Its value. None: any.
    pub value: Option<String>,
    /// Its effect. None: any.
    pub effect: Option<String>,
}

/// How many requests the API server is sent in a second, each kind for itself: many attempts that begin at once neither blind the
/// watch nor delay the end of others. A second's worth may go at once; more wait in turn, and what would wait for 15 seconds fails
/// and is tried again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ApiBudgets {
    /// What is made: two for each attempt.
    pub creates_per_second: u32,
    /// Begins of watches, and lists for them.
    pub watches_per_second: u32,
    /// Everything else: one for each attempt, more where something goes wrong.
    pub others_per_second: u32,
}

impl Default for ApiBudgets {
    fn default() -> Self {
        Self { creates_per_second: 40, watches_per_second: 10, others_per_second: 40 }
    }
}

/// Settings of a Kubernetes backend. A cluster and a namespace are a backend; two clusters are two.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct K8sJobConfig {
    /// Its name.
    #[schemars(with = "String")]
    pub name: BackendName,
    /// A kubeconfig file. Default: the service account of the pod that this service runs in, else the usual files.
    pub kubeconfig: Option<PathBuf>,
    /// The kubeconfig's context. Default: its current one.
    pub context: Option<String>,
    /// Where Jobs are made. It has nothing but workloads.
    pub namespace: String,
    /// Largest number of attempts at once.
    pub slots: usize,
    /// Largest number of Jobs that are made at once.
    pub concurrent_creates: usize,
    /// How often the API server is called.
    pub api: ApiBudgets,
    /// Where agents dial this service, as pods reach it: `http://HOST:PORT`, the address of `agent_listen`.
    pub agent_url: String,
    /// The image with `runner-agent` at `/runner-agent`.
    pub agent_image: String,
    /// The image of a spec that names none. Without it such a spec is refused.
    pub default_image: Option<String>,
    /// When images are pulled.
    pub pull_policy: PullPolicy,
    /// Names of Secrets with registries' credentials.
    pub image_pull_secrets: Vec<String>,
    /// The service account of the pods. None: the namespace's `default`. Its token is in no pod either way.
    pub service_account: Option<String>,
    /// Who a program runs as where its spec does not say.
    pub default_user: DefaultUser,
    /// Labels of the nodes to run on.
    pub node_selector: BTreeMap<String, String>,
    /// Taints to run on nevertheless.
    pub tolerations: Vec<Toleration>,
    /// The container runtime, such as one with a kernel of its own.
    pub runtime_class: Option<String>,
    /// The pods' priority.
    pub priority_class: Option<String>,
    /// The queue of Kueue that Jobs are submitted to.
    pub queue_name: Option<String>,
    /// What pods have beside what the service puts into them.
    pub pod_template: PodTemplate,
    /// The cluster enforces network policies, and those of the chart are installed. Without this, a spec that asks for network
    /// `none` is refused: nothing would keep it.
    pub enforces_network_policies: bool,
    /// Names of network policies of the namespace's own, selecting pods by the label `runner.network`.
    pub networks: Vec<String>,
    /// How much of a program's cpu limit is reserved for it, in percent.
    pub cpu_request_percent: u8,
    /// How much of a program's memory limit is reserved for it, in percent.
    pub memory_request_percent: u8,
    /// Memory of each agent, in bytes.
    pub agent_memory_bytes: u64,
    /// Room in `/tmp`, `/var/tmp` and `HOME`, in bytes each.
    pub scratch_bytes: u64,
    /// Room for inputs and outputs together, in bytes.
    pub stage_bytes: u64,
    /// How long a pod may find no node, in seconds, before the attempt ends as `UNSCHEDULABLE`.
    pub unschedulable_seconds: u64,
    /// How long this service may be away at most, in seconds, until a pod is given up by the cluster: its log and its outputs
    /// are in it until the service has them.
    pub away_seconds: u64,
    /// How long the cluster keeps a Job that has ended and that nobody deletes, in seconds. A backstop.
    pub ttl_seconds: u32,
}

impl Default for K8sJobConfig {
    fn default() -> Self {
        Self {
            name: default_name(),
            kubeconfig: None,
            context: None,
            namespace: "runner-workloads".to_owned(),
            slots: 200,
            concurrent_creates: 8,
            api: ApiBudgets::default(),
            agent_url: String::new(),
            agent_image: String::new(),
            default_image: None,
            pull_policy: PullPolicy::IfNotPresent,
            image_pull_secrets: Vec::new(),
            service_account: None,
            default_user: DefaultUser::default(),
            node_selector: BTreeMap::new(),
            tolerations: Vec::new(),
            runtime_class: None,
            priority_class: None,
            queue_name: None,
            pod_template: PodTemplate::default(),
            enforces_network_policies: false,
            networks: Vec::new(),
            cpu_request_percent: 100,
            memory_request_percent: 100,
            agent_memory_bytes: 128 << 20,
            scratch_bytes: 256 << 20,
            stage_bytes: 20 << 30,
            unschedulable_seconds: 300,
            away_seconds: 6 * 3600,
            ttl_seconds: 24 * 3600,
        }
    }
}

#[allow(clippy::expect_used, reason = "a constant that the tests check")]
fn default_name() -> BackendName {
    "k8sjob"
        .parse::<BackendName>()
        .map_err(|error: InvalidId| error.to_string())
        .expect("`k8sjob` is a backend name")
}

impl K8sJobConfig {
    /// Checks what can be checked without looking at a cluster.
    ///
    /// # Errors
    /// Every setting that cannot be.
    pub fn validate(&self) -> Result<(), Vec<InvalidConfig>> {
        let mut bad = Vec::new();
        let mut check = |fine: bool, field: &str, rule: &str| {
            if !fine {
                bad.push(InvalidConfig::new(field, rule));
            }
        };
        check(
            self.agent_url.strip_prefix("http://").is_some_and(|rest| !rest.is_empty()),
            "agent_url",
            "must be `http://HOST:PORT`, where pods reach `agent_listen`",
        );
        check(!self.agent_image.is_empty(), "agent_image", "must name the image with runner-agent");
        let dns_label = !self.namespace.is_empty()
            && self.namespace.len() <= 63
            && self.namespace.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        check(dns_label, "namespace", "must be the name of a namespace");
        check(self.slots > 0, "slots", "must be at least 1");
        check(self.concurrent_creates > 0, "concurrent_creates", "must be at least 1");
        for (field, rate) in [
            ("api.creates_per_second", self.api.creates_per_second),
            ("api.watches_per_second", self.api.watches_per_second),
            ("api.others_per_second", self.api.others_per_second),
        ] {
            check((1..=10_000).contains(&rate), field, "must be from 1 to 10000");
        }
        check(
            self.default_user.uid != 0 && self.default_user.gid != 0,
            "default_user",
            "must not be root: pods are held to the restricted Pod Security Standard",
        );
        for (field, percent) in [
            ("cpu_request_percent", self.cpu_request_percent),
            ("memory_request_percent", self.memory_request_percent),
        ] {
            check((1..=100).contains(&percent), field, "must be from 1 to 100");
        }
        check(self.agent_memory_bytes >= 32 << 20, "agent_memory_bytes", "must be at least 32 MiB");
        check(self.scratch_bytes >= 1 << 20, "scratch_bytes", "must be at least 1 MiB");
        check(self.stage_bytes >= 1 << 20, "stage_bytes", "must be at least 1 MiB");
        let hours = |seconds: u64, most: u64| (60..=most * 3600).contains(&seconds);
        check(hours(self.away_seconds, 30 * 24), "away_seconds", "must be from one minute to 30 days");
        check(
            (1..=24 * 3600).contains(&self.unschedulable_seconds),
            "unschedulable_seconds",
            "must be from one second to a day",
        );
        for network in &self.networks {
            let fine = !["none", "egress", ""].contains(&network.as_str());
            check(fine, "networks", "must be names of their own: `none` and `egress` are taken");
        }
        self.pod_template.validate(&mut bad);
        if bad.is_empty() { Ok(()) } else { Err(bad) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_lack_what_nobody_can_guess() {
        let bad = K8sJobConfig::default().validate().unwrap_err();
        let fields: Vec<_> = bad.iter().map(|bad| bad.field.as_str()).collect();
        assert_eq!(fields, ["agent_url", "agent_image"]);
        let config = K8sJobConfig {
            agent_url: "http://runner:7602".into(),
            agent_image: "runner-agent:1".into(),
            ..K8sJobConfig::default()
        };
        assert_eq!(config.validate(), Ok(()));
    }

    #[test]
    fn what_cannot_be_is_named() {
        let config = K8sJobConfig {
            agent_url: "runner:7602".into(),
            agent_image: "a".into(),
            namespace: "Not A Namespace".into(),
            slots: 0,
            api: ApiBudgets { others_per_second: 0, ..ApiBudgets::default() },
            default_user: DefaultUser { uid: 0, gid: 1 },
            cpu_request_percent: 0,
            networks: vec!["none".into()],
            pod_template: PodTemplate { dns_policy: Some("Any".into()), ..PodTemplate::default() },
            ..K8sJobConfig::default()
        };
        let bad = config.validate().unwrap_err();
        let fields: Vec<_> = bad.iter().map(|bad| bad.field.as_str()).collect();
        assert_eq!(
            fields,
            [
                "agent_url",
                "namespace",
                "slots",
                "api.others_per_second",
                "default_user",
                "cpu_request_percent",
                "networks",
                "pod_template.dns_policy"
            ]
        );
    }
}
