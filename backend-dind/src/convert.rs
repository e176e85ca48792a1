//! From a spec to the body of a container, and to what the shim is to execute. Pure.
//!
//! The body is built from nothing: every field that is set is set here, and no text of a caller becomes a field. What a
//! caller chooses ends in the shim's specification, which is a file in the container.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use bollard::models::{
    ContainerCreateBody, HealthConfig, HostConfig, HostConfigLogConfig, ImageConfig, Mount, MountType,
    MountVolumeOptions, ResourcesUlimits, RestartPolicy, RestartPolicyNameEnum,
};
use runner_agent::{
    exec::protocol::{ExecSpec, Namespaces, Root},
    staging::{MountKind, MountPlan, PlannedMount},
};
use runner_core::{
    backend::BackendError,
    capability::Capabilities,
    id::AttemptId,
    spec::{InvalidSpec, Network, RunSpec, User},
};

use crate::{
    capability::OWN_PIDS,
    config::DindConfig,
    error::unsupported,
    images::ImageId,
    names::{AGENT_PATH, Names, OWN_DIR, RUN_DIR},
};

/// What the program sees as its home directory.
pub(crate) const HOME: &str = "/home/runner";
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The kernel's own period for sharing processors, in microseconds.
const CPU_PERIOD: i64 = 100_000;
const SHM_BYTES: i64 = 64 * 1024 * 1024;

/// The embedded defaults, for a spec that did not pass admission.
const TIMEOUT: Duration = Duration::from_secs(3600);
const STOP_GRACE: Duration = Duration::from_secs(10);
const PIDS: u32 = 4096;

/// What a conversion needs beside the spec.
#[derive(Debug)]
pub(crate) struct Conversion<'a> {
    pub(crate) attempt: AttemptId,
    pub(crate) spec: &'a RunSpec,
    pub(crate) log_limit_bytes: u64,
    pub(crate) plan: &'a MountPlan,
    pub(crate) capabilities: &'a Capabilities,
    pub(crate) config: &'a DindConfig,
    pub(crate) names: &'a Names,
    pub(crate) image: &'a ImageId,
    /// What the image says of itself.
    pub(crate) image_config: &'a ImageConfig,
}

/// Who the program runs as.
pub(crate) fn user(spec: &RunSpec, config: &DindConfig) -> User {
    spec.user.unwrap_or_else(|| config.default_user.into())
}

/// The mounts of a spec.
pub(crate) fn mount_plan(spec: &RunSpec) -> Result<MountPlan, BackendError> {
    MountPlan::new(spec)
        .map_err(|error: InvalidSpec| unsupported(format!("place inputs and outputs: {error}")))
}

/// What stands behind a planned mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Behind {
    /// A volume of the attempt.
    Volume,
    /// Memory: nothing is staged into it and nothing is published from it.
    Scratch,
    /// A file in the container's own layer, owned by root.
    Layer,
}

/// What stands behind the mount with this number.
pub(crate) fn behind(plan: &MountPlan, number: usize) -> Behind {
    let mount = &plan.mounts[number];
    let places = if mount.writable { &plan.outputs } else { &plan.inputs };
    match mount.kind {
        MountKind::File => Behind::Layer,
        MountKind::Directory if places.iter().any(|place| place.mount == number) => Behind::Volume,
        MountKind::Directory => Behind::Scratch,
    }
}

/// The last part of the name of the mount's volume: `in-0`, `out-1`.
pub(crate) fn volume_part(mount: &PlannedMount) -> String {
    mount.host.replace('/', "-")
}

/// Whether the attempt needs a way into its volumes beside the workload itself.
pub(crate) fn needs_door(plan: &MountPlan) -> bool {
    (0..plan.mounts.len()).any(|number| behind(plan, number) == Behind::Volume)
}

/// Decides everything that the shim is to do.
///
/// # Errors
/// `Unsupported`: the spec asks for what the backend does not have. Admission refuses such a spec; this is the last line,
/// so that nothing is ever silently weakened.
pub(crate) fn exec_spec(with: &Conversion<'_>) -> Result<ExecSpec, BackendError> {
    let Conversion { attempt, spec, config, .. } = *with;
    let lacks = with.capabilities.lacks(spec);
    if !lacks.is_empty() {
        return Err(unsupported(format!("execute the spec: {}", InvalidSpec(lacks))));
    }
    let argv = argv(spec, with.image_config);
    if argv.is_empty() {
        return Err(unsupported("execute the spec: neither it nor its image says what to execute"));
    }
    Ok(ExecSpec {
        attempt,
        argv,
        env: environment(attempt, spec, with.image_config),
        working_dir: working_dir(spec, with.image_config),
        // The container is the root, the mounts and the limits.
        root: Root::Host { hidden: Vec::new() },
        read_only_root: false,
        mounts: Vec::new(),
        user: user(spec, config),
        namespaces: Namespaces::default(),
        cgroup: None,
        file_size_bytes: spec.resources.file_size_bytes,
        address_space_bytes: None,
        nproc: None,
        timeout: spec.timeout.unwrap_or(TIMEOUT),
        stop_grace: spec.stop_grace.unwrap_or(STOP_GRACE),
        terminal: spec.terminal,
        stdin: spec.stdin || spec.terminal.is_some(),
        log_limit_bytes: with.log_limit_bytes,
    })
}

/// As engines do it: a command replaces the image's ENTRYPOINT and its CMD, arguments replace its CMD.
fn argv(spec: &RunSpec, image: &ImageConfig) -> Vec<String> {
    let or_else = |given: &[String], own: &Option<Vec<String>>| -> Vec<String> {
        if given.is_empty() { own.clone().unwrap_or_default() } else { given.to_vec() }
    };
    if spec.command.is_empty() {
        let mut argv = image.entrypoint.clone().unwrap_or_default();
        argv.extend(or_else(&spec.args, &image.cmd));
        argv
    } else {
        spec.command.iter().chain(&spec.args).cloned().collect()
    }
}

fn working_dir(spec: &RunSpec, image: &ImageConfig) -> String {
    let own = image.working_dir.as_deref().filter(|dir| dir.starts_with('/'));
    spec.working_dir.clone().unwrap_or_else(|| own.unwrap_or("/").to_owned())
}

/// The whole environment: the image's own, ours, and the spec has the last word.
fn environment(attempt: AttemptId, spec: &RunSpec, image: &ImageConfig) -> BTreeMap<String, String> {
    let mut env = BTreeMap::from([("PATH".to_owned(), PATH.to_owned())]);
    if spec.terminal.is_some() {
        env.insert("TERM".to_owned(), "xterm".to_owned());
    }
    let own = image.env.iter().flatten().filter_map(|line| line.split_once('='));
    env.extend(own.map(|(name, value)| (name.to_owned(), value.to_owned())));
    env.extend(
        [
            ("HOME", HOME.to_owned()),
            ("TMPDIR", "/tmp".to_owned()),
            ("USER", "runner".to_owned()),
            ("RUNNER_RUN_ID", attempt.run.to_string()),
            ("RUNNER_ATTEMPT", attempt.number.to_string()),
        ]
        .map(|(name, value)| (name.to_owned(), value)),
    );
    env.extend(spec.env.iter().map(|(name, value)| (name.clone(), value.clone())));
    env
}

/// The container that executes the attempt.
///
/// # Errors
/// See [`exec_spec`].
pub(crate) fn workload(with: &Conversion<'_>) -> Result<ContainerCreateBody, BackendError> {
    let Conversion { spec, config, plan, .. } = *with;
    let network_mode = match &spec.network {
        Network::None => Some("none".to_owned()),
        Network::Egress => config.egress_network.clone(),
        Network::Named(name) => config.networks.get(name).cloned(),
    };
    let network_mode =
        network_mode.ok_or_else(|| unsupported(format!("join the network {:?}", spec.network)))?;
    let user = user(spec, config);
    let pids = spec.resources.pids.unwrap_or(PIDS).saturating_add(OWN_PIDS);
    let memory = spec.resources.memory_bytes.map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX));
    let mut host = hardened(with);
    host.network_mode = Some(network_mode);
    host.readonly_rootfs = Some(spec.read_only_root);
    host.memory = memory;
    // Memory and swap together: as much as memory alone, so no swap.
    host.memory_swap = memory;
    if let Some(millis) = spec.resources.cpu_millis {
        host.cpu_period = Some(CPU_PERIOD);
        host.cpu_quota = Some(i64::from(millis) * (CPU_PERIOD / 1000));
    }
    host.pids_limit = Some(i64::from(pids));
    host.mounts = Some(mounts(with, true));
    host.tmpfs = Some(tmpfs(plan, user, config.scratch_bytes));
    Ok(ContainerCreateBody {
        user: Some(format!("{}:{}", user.uid, user.gid)),
        working_dir: Some(working_dir(spec, with.image_config)),
        cmd: Some(vec!["contain".to_owned(), RUN_DIR.to_owned()]),
        // The link: never closed by somebody who goes away.
        attach_stdin: Some(true),
        attach_stdout: Some(true),
        open_stdin: Some(true),
        stdin_once: Some(false),
        ..container(with, host)
    })
}

/// The container that is never started.
pub(crate) fn door(with: &Conversion<'_>) -> ContainerCreateBody {
    let mut host = hardened(with);
    host.network_mode = Some("none".to_owned());
    host.mounts = Some(mounts(with, false));
    container(with, host)
}

fn container(with: &Conversion<'_>, host: HostConfig) -> ContainerCreateBody {
    ContainerCreateBody {
        image: Some(with.image.as_str().to_owned()),
        entrypoint: Some(vec![AGENT_PATH.to_owned()]),
        // The terminal is the shim's business, within.
        tty: Some(false),
        healthcheck: Some(HealthConfig { test: Some(vec!["NONE".to_owned()]), ..HealthConfig::default() }),
        labels: Some(with.names.labels(with.attempt)),
        host_config: Some(host),
        ..ContainerCreateBody::default()
    }
}

/// What holds for every container of ours, whatever its spec says. Fields that an engine's own configuration would fill in
/// are set, so that it cannot.
fn hardened(_: &Conversion<'_>) -> HostConfig {
    HostConfig {
        privileged: Some(false),
        cap_drop: Some(vec!["ALL".to_owned()]),
        security_opt: Some(vec!["no-new-privileges".to_owned()]),
        ipc_mode: Some("private".to_owned()),
        // The first process must be the shim.
        init: Some(false),
        ulimits: Some(vec![ResourcesUlimits { name: Some("core".to_owned()), soft: Some(0), hard: Some(0) }]),
        shm_size: Some(SHM_BYTES),
        // The shim keeps the log.
        log_config: Some(HostConfigLogConfig { typ: Some("none".to_owned()), config: Some(HashMap::new()) }),
        restart_policy: Some(RestartPolicy {
            name: Some(RestartPolicyNameEnum::NO),
            maximum_retry_count: None,
        }),
        auto_remove: Some(false),
        publish_all_ports: Some(false),
        oom_kill_disable: Some(false),
        ..HostConfig::default()
    }
}

fn mounts(with: &Conversion<'_>, confined: bool) -> Vec<Mount> {
    let labels = with.names.labels(with.attempt);
    let volume = |what: &str, target: &str, read_only: bool| Mount {
        target: Some(target.to_owned()),
        source: Some(with.names.volume(with.attempt, what)),
        typ: Some(MountType::VOLUME),
        read_only: Some(read_only),
        volume_options: Some(MountVolumeOptions {
            // Nothing of the image is copied into it.
            no_copy: Some(true),
            labels: Some(labels.clone()),
            ..MountVolumeOptions::default()
        }),
        ..Mount::default()
    };
    let planned = with
        .plan
        .mounts
        .iter()
        .enumerate()
        .filter(|(number, _)| behind(with.plan, *number) == Behind::Volume);
    let planned =
        planned.map(|(_, mount)| volume(&volume_part(mount), &mount.target, confined && !mount.writable));
    [volume("run", OWN_DIR, false)].into_iter().chain(planned).collect()
}

/// Directories in memory: `/tmp`, `HOME`, and the planned ones that nothing is staged into or published from.
fn tmpfs(plan: &MountPlan, user: User, bytes: u64) -> HashMap<String, String> {
    let mut all = HashMap::from([
        ("/tmp".to_owned(), format!("rw,exec,nosuid,nodev,size={bytes},mode=1777")),
        (HOME.to_owned(), own_scratch(user, bytes, "0700")),
    ]);
    for (number, mount) in plan.mounts.iter().enumerate() {
        match (behind(plan, number), mount.writable) {
            (Behind::Scratch, true) => {
                drop(all.insert(mount.target.clone(), own_scratch(user, bytes, "0755")))
            }
            (Behind::Scratch, false) => {
                all.insert(mount.target.clone(), "ro,noexec,nosuid,nodev,size=4096,mode=0755".to_owned());
            }
            // Where the plan has one of ours, its own is what counts.
            (Behind::Volume, _) => drop(all.remove(&mount.target)),
            (Behind::Layer, _) => {}
        }
    }
    all
}

fn own_scratch(user: User, bytes: u64, mode: &str) -> String {
    format!("rw,exec,nosuid,nodev,size={bytes},mode={mode},uid={},gid={}", user.uid, user.gid)
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;
