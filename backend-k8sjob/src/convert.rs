//! From a spec to a Job, and to what its shim is to execute. Pure.
//!
//! The Job is built from nothing: every field that is set is set here, and no text of a caller becomes a field but the
//! image's name. What a caller chooses is in the order that the agent asks for. Only fields are used that Kubernetes 1.20 has.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::{
    ByteString,
    api::{
        batch::v1::{Job, JobSpec},
        core::v1::{
            Capabilities as KernelCapabilities, Container, EmptyDirVolumeSource, EnvVar, EnvVarSource,
            LocalObjectReference, ObjectFieldSelector, PodSecurityContext, PodSpec, PodTemplateSpec,
            ResourceRequirements, SeccompProfile, Secret, SecretVolumeSource, SecurityContext, Toleration,
            Volume, VolumeMount,
        },
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{ObjectMeta, OwnerReference},
    },
};
use runner_agent::{
    exec::protocol::{ExecSpec, Namespaces, Root},
    pod::{POD_VARIABLE, URL_VARIABLE, path},
    staging::MountPlan,
};
use runner_core::{
    backend::BackendError,
    id::AttemptId,
    spec::{InvalidSpec, Network, RunSpec, User},
};

use crate::{
    config::K8sJobConfig,
    error::unsupported,
    names::{NETWORK, Names},
};

/// What the program sees as its home directory.
pub(crate) const HOME: &str = "/home/runner";
/// Names of the containers.
pub(crate) const FETCH: &str = "fetch";
pub(crate) const MAIN: &str = "main";
pub(crate) const PUBLISH: &str = "publish";

/// The embedded defaults, for a spec that did not pass admission.
const TIMEOUT: Duration = Duration::from_secs(3600);
const STOP_GRACE: Duration = Duration::from_secs(10);
/// Beyond the program's own grace: how long the agent beside it may take to store what is left.
const UPLOAD_GRACE: Duration = Duration::from_secs(60);
/// The Job's deadline comes so long after its pod's.
const JOB_SLACK: Duration = Duration::from_secs(300);
/// Beside the log itself, in the spool's volume.
const SPOOL_SLACK: u64 = 64 << 20;
/// The agent's own program, and then some.
const BIN_BYTES: u64 = 256 << 20;
/// What an agent reserves of a core.
const AGENT_CPU: &str = "10m";
const AGENT_MEMORY_REQUEST: u64 = 16 << 20;

/// What a conversion needs.
#[derive(Debug)]
pub(crate) struct Conversion<'a> {
    pub(crate) attempt: AttemptId,
    pub(crate) spec: &'a RunSpec,
    pub(crate) log_limit_bytes: u64,
    pub(crate) config: &'a K8sJobConfig,
    pub(crate) names: &'a Names,
}

fn user(with: &Conversion<'_>) -> User {
    with.spec.user.unwrap_or_else(|| with.config.default_user.into())
}

fn timeout(spec: &RunSpec) -> Duration {
    spec.timeout.unwrap_or(TIMEOUT)
}

fn stop_grace(spec: &RunSpec) -> Duration {
    spec.stop_grace.unwrap_or(STOP_GRACE)
}

/// Decides everything that the shim is to do.
///
/// # Errors
/// `Unsupported`: the spec asks for what the backend does not have. Admission refuses such a spec; this is the last line,
/// so that nothing is ever silently weakened.
pub(crate) fn exec_spec(with: &Conversion<'_>) -> Result<ExecSpec, BackendError> {
    let Conversion { attempt, spec, config, log_limit_bytes, .. } = *with;
    let mut lacks = crate::capability::capabilities(config).lacks(spec);
    lacks.extend(crate::capability::objections(config, spec));
    if !lacks.is_empty() {
        return Err(unsupported(format!("execute the spec: {}", InvalidSpec(lacks))));
    }
    let user = user(with);
    if user.uid == 0 || user.gid == 0 {
        return Err(unsupported("execute the spec as root"));
    }
    Ok(ExecSpec {
        attempt,
        argv: spec.command.iter().chain(&spec.args).cloned().collect(),
        env: environment(attempt, spec),
        // Empty: the container's own, which is its image's.
        working_dir: spec.working_dir.clone().unwrap_or_default(),
        // The container is the root, the mounts and the limits.
        root: Root::Host { hidden: Vec::new() },
        read_only_root: false,
        mounts: Vec::new(),
        user,
        namespaces: Namespaces::default(),
        cgroup: None,
        file_size_bytes: spec.resources.file_size_bytes,
        address_space_bytes: None,
        nproc: None,
        timeout: timeout(spec),
        stop_grace: stop_grace(spec),
        terminal: spec.terminal,
        stdin: spec.stdin || spec.terminal.is_some(),
        log_limit_bytes,
    })
}

/// What goes over the image's own environment: ours, and the spec has the last word.
fn environment(attempt: AttemptId, spec: &RunSpec) -> BTreeMap<String, String> {
    let mut env: BTreeMap<String, String> = [
        ("HOME", HOME.to_owned()),
        ("TMPDIR", "/tmp".to_owned()),
        ("USER", "runner".to_owned()),
        ("RUNNER_RUN_ID", attempt.run.to_string()),
        ("RUNNER_ATTEMPT", attempt.number.to_string()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    if spec.terminal.is_some() {
        env.insert("TERM".to_owned(), "xterm".to_owned());
    }
    env.extend(spec.env.iter().map(|(name, value)| (name.clone(), value.clone())));
    env
}

/// The Secret with the agent's token. It goes when the Job goes.
pub(crate) fn secret(names: &Names, attempt: AttemptId, job_uid: &str, token: &str) -> Secret {
    let name = names.workload(attempt);
    Secret {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            labels: Some(names.labels(attempt)),
            owner_references: Some(vec![OwnerReference {
                api_version: "batch/v1".to_owned(),
                kind: "Job".to_owned(),
                name,
                uid: job_uid.to_owned(),
                controller: Some(true),
                block_owner_deletion: Some(true),
            }]),
            ..ObjectMeta::default()
        },
        data: Some([(path::TOKEN_FILE.to_owned(), ByteString(token.as_bytes().to_vec()))].into()),
        immutable: Some(true),
        ..Secret::default()
    }
}

/// The Job that executes the attempt.
///
/// # Errors
/// See [`exec_spec`].
pub(crate) fn job(with: &Conversion<'_>) -> Result<Job, BackendError> {
    let Conversion { attempt, spec, config, names, .. } = *with;
    let plan =
        MountPlan::new(spec).map_err(|error| unsupported(format!("place inputs and outputs: {error}")))?;
    let image = spec.image.as_ref().or(config.default_image.as_ref());
    let image = image.ok_or_else(|| unsupported("execute the spec: it names no image"))?;
    let network = match &spec.network {
        Network::None => "none",
        Network::Egress => "egress",
        Network::Named(name) => name,
    };
    let mut labels = names.labels(attempt);
    labels.insert(NETWORK.to_owned(), network.to_owned());
    let mut job_labels = labels.clone();
    if let Some(queue) = &config.queue_name {
        job_labels.insert("kueue.x-k8s.io/queue-name".to_owned(), queue.clone());
    }
    // What is ours goes over what was configured.
    labels = config.pod_template.labels.clone().into_iter().chain(labels).collect();
    let template = config.pod_template.typed().map_err(|bad| {
        unsupported(
            bad.first().map_or_else(String::new, |bad| format!("make a pod: {}: {}", bad.field, bad.rule)),
        )
    })?;
    let lifetime = timeout(spec)
        .saturating_add(stop_grace(spec))
        .saturating_add(Duration::from_secs(config.unschedulable_seconds))
        .saturating_add(Duration::from_secs(config.away_seconds));
    let user = user(with);
    let pod = PodSpec {
        restart_policy: Some("Never".to_owned()),
        service_account_name: config.service_account.clone(),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        active_deadline_seconds: Some(seconds(lifetime)),
        termination_grace_period_seconds: Some(seconds(stop_grace(spec).saturating_add(UPLOAD_GRACE))),
        node_selector: (!config.node_selector.is_empty()).then(|| config.node_selector.clone()),
        tolerations: (!config.tolerations.is_empty())
            .then(|| config.tolerations.iter().map(toleration).collect()),
        runtime_class_name: config.runtime_class.clone(),
        priority_class_name: config.priority_class.clone(),
        affinity: template.affinity,
        topology_spread_constraints: template.topology_spread_constraints,
        scheduler_name: config.pod_template.scheduler_name.clone(),
        dns_policy: config.pod_template.dns_policy.clone(),
        dns_config: template.dns_config,
        image_pull_secrets: (!config.image_pull_secrets.is_empty()).then(|| {
            config.image_pull_secrets.iter().map(|name| LocalObjectReference { name: name.clone() }).collect()
        }),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(user.uid.into()),
            run_as_group: Some(user.gid.into()),
            fs_group: Some(user.gid.into()),
            seccomp_profile: Some(SeccompProfile {
                type_: "RuntimeDefault".to_owned(),
                localhost_profile: None,
            }),
            ..PodSecurityContext::default()
        }),
        volumes: Some(volumes(with)),
        init_containers: Some(vec![agent(with, FETCH)]),
        containers: vec![main(with, &plan, image), agent(with, PUBLISH)],
        ..PodSpec::default()
    };
    Ok(Job {
        metadata: ObjectMeta {
            name: Some(names.workload(attempt)),
            labels: Some(job_labels),
            ..ObjectMeta::default()
        },
        spec: Some(JobSpec {
            completions: Some(1),
            parallelism: Some(1),
            // The service owns retries.
            backoff_limit: Some(0),
            active_deadline_seconds: Some(seconds(lifetime.saturating_add(JOB_SLACK))),
            ttl_seconds_after_finished: Some(i32::try_from(config.ttl_seconds).unwrap_or(i32::MAX)),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta {
                    labels: Some(labels),
                    annotations: (!config.pod_template.annotations.is_empty())
                        .then(|| config.pod_template.annotations.clone()),
                    ..ObjectMeta::default()
                }),
                spec: Some(pod),
            },
            ..JobSpec::default()
        }),
        status: None,
    })
}

fn seconds(time: Duration) -> i64 {
    // Kubernetes takes no more than 32 bits.
    i64::try_from(time.as_secs().max(1)).unwrap_or(i64::MAX).min(i32::MAX.into())
}

fn toleration(from: &crate::config::Toleration) -> Toleration {
    Toleration {
        key: Some(from.key.clone()),
        operator: Some(if from.value.is_some() { "Equal" } else { "Exists" }.to_owned()),
        value: from.value.clone(),
        effect: from.effect.clone(),
        toleration_seconds: None,
    }
}

fn bytes(count: u64) -> Quantity {
    Quantity(count.to_string())
}

fn empty_dir(name: &str, limit: u64) -> Volume {
    Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource { medium: None, size_limit: Some(bytes(limit)) }),
        ..Volume::default()
    }
}

fn volumes(with: &Conversion<'_>) -> Vec<Volume> {
    let config = with.config;
    let spool = with.log_limit_bytes.saturating_add(with.log_limit_bytes / 8).saturating_add(SPOOL_SLACK);
    let mut all = vec![
        empty_dir("bin", BIN_BYTES),
        empty_dir("run", spool),
        empty_dir("stage", config.stage_bytes),
        empty_dir("tmp", config.scratch_bytes),
        empty_dir("var-tmp", config.scratch_bytes),
        empty_dir("home", config.scratch_bytes),
    ];
    all.push(Volume {
        name: "token".to_owned(),
        secret: Some(SecretVolumeSource {
            secret_name: Some(with.names.workload(with.attempt)),
            default_mode: Some(0o440),
            ..SecretVolumeSource::default()
        }),
        ..Volume::default()
    });
    all
}

fn mount(name: &str, at: &str, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: name.to_owned(),
        mount_path: at.to_owned(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    }
}

/// What every container is held to.
fn confined() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        run_as_non_root: Some(true),
        privileged: Some(false),
        capabilities: Some(KernelCapabilities { add: None, drop: Some(vec!["ALL".to_owned()]) }),
        ..SecurityContext::default()
    }
}

fn agent(with: &Conversion<'_>, role: &str) -> Container {
    let config = with.config;
    let variable = |name: &str, value: &str| EnvVar {
        name: name.to_owned(),
        value: Some(value.to_owned()),
        value_from: None,
    };
    let pod_uid = EnvVar {
        name: POD_VARIABLE.to_owned(),
        value: None,
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector { api_version: None, field_path: "metadata.uid".to_owned() }),
            ..EnvVarSource::default()
        }),
    };
    Container {
        name: role.to_owned(),
        image: Some(config.agent_image.clone()),
        image_pull_policy: Some(config.pull_policy.as_str().to_owned()),
        command: Some(vec!["/runner-agent".to_owned(), role.to_owned()]),
        env: Some(vec![variable(URL_VARIABLE, &config.agent_url), pod_uid]),
        resources: Some(ResourceRequirements {
            requests: Some(
                [
                    ("cpu".to_owned(), Quantity(AGENT_CPU.to_owned())),
                    ("memory".to_owned(), bytes(AGENT_MEMORY_REQUEST)),
                ]
                .into(),
            ),
            limits: Some(
                [
                    ("cpu".to_owned(), Quantity("1".to_owned())),
                    ("memory".to_owned(), bytes(config.agent_memory_bytes)),
                ]
                .into(),
            ),
            ..ResourceRequirements::default()
        }),
        security_context: Some(confined()),
        volume_mounts: Some(vec![
            mount("bin", path::BIN, role != FETCH),
            mount("run", path::RUN, false),
            mount("stage", path::STAGE, false),
            mount("token", path::TOKEN, true),
        ]),
        ..Container::default()
    }
}

fn main(with: &Conversion<'_>, plan: &MountPlan, image: &str) -> Container {
    let (config, resources) = (with.config, &with.spec.resources);
    let share = |whole: u64, percent: u8| (whole / 100).saturating_mul(percent.into()).max(1);
    let mut limits = BTreeMap::new();
    let mut requests = BTreeMap::new();
    if let Some(millis) = resources.cpu_millis {
        let reserved = (u64::from(millis) * u64::from(config.cpu_request_percent) / 100).max(1);
        limits.insert("cpu".to_owned(), Quantity(format!("{millis}m")));
        requests.insert("cpu".to_owned(), Quantity(format!("{reserved}m")));
    }
    if let Some(memory) = resources.memory_bytes {
        limits.insert("memory".to_owned(), bytes(memory));
        requests.insert("memory".to_owned(), bytes(share(memory, config.memory_request_percent)));
    }
    let mut mounts = vec![
        mount("bin", path::BIN, true),
        mount("run", path::RUN, false),
        mount("tmp", "/tmp", false),
        mount("var-tmp", "/var/tmp", false),
        mount("home", HOME, false),
    ];
    for planned in &plan.mounts {
        // Where the plan has one of ours, its own is what counts.
        mounts.retain(|mount| mount.mount_path != planned.target);
        mounts.push(VolumeMount {
            sub_path: Some(planned.host.clone()),
            ..mount("stage", &planned.target, !planned.writable)
        });
    }
    Container {
        name: MAIN.to_owned(),
        image: Some(image.to_owned()),
        image_pull_policy: Some(config.pull_policy.as_str().to_owned()),
        command: Some([path::AGENT, "contain", "--unlinked", path::SHIM].map(str::to_owned).to_vec()),
        resources: Some(ResourceRequirements {
            requests: Some(requests),
            limits: Some(limits),
            ..ResourceRequirements::default()
        }),
        security_context: Some(confined()),
        volume_mounts: Some(mounts),
        ..Container::default()
    }
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;
