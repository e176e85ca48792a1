//! From a spec to what the shim is to execute. Pure.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use runner_agent::{
    exec::protocol::{ExecSpec, Mount, Root},
    staging::MountPlan,
};
use runner_core::{
    backend::{BackendError, BackendErrorKind},
    capability::Capabilities,
    id::AttemptId,
    spec::{InvalidSpec, Network, RunSpec, User},
};

use crate::{
    attempt_dir::AttemptDir,
    capability::Machine,
    config::{HOST_IMAGE, LocalConfig},
    error::unsupported,
};

/// What the program sees as its home directory.
pub(crate) const HOME: &str = "/home/runner";
const HOMES: &str = "/home";
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The embedded defaults, for a spec that did not pass admission.
const TIMEOUT: Duration = Duration::from_secs(3600);
const STOP_GRACE: Duration = Duration::from_secs(10);

/// What a conversion needs beside the spec.
#[derive(Debug)]
pub(crate) struct Conversion<'a> {
    pub(crate) attempt: AttemptId,
    pub(crate) spec: &'a RunSpec,
    pub(crate) log_limit_bytes: u64,
    pub(crate) dir: &'a AttemptDir,
    pub(crate) plan: &'a MountPlan,
    pub(crate) machine: &'a Machine,
    pub(crate) capabilities: &'a Capabilities,
    pub(crate) config: &'a LocalConfig,
    /// Directories of the machine that programs must not see.
    pub(crate) hidden: &'a [PathBuf],
}

/// Who the program runs as.
pub(crate) fn user(spec: &RunSpec, config: &LocalConfig) -> User {
    spec.user.unwrap_or_else(|| config.default_user.into())
}

/// The directory of the spec's image; `None` for the machine's own root.
pub(crate) fn image<'a>(
    spec: &RunSpec,
    config: &'a LocalConfig,
) -> Result<Option<&'a PathBuf>, BackendError> {
    match spec.image.as_deref() {
        None | Some(HOST_IMAGE) => Ok(None),
        Some(name) => config.images.get(name).map(Some).ok_or_else(|| {
            let context = format!("find the image {name:?}: the backend's configuration does not have it");
            BackendError::new(BackendErrorKind::Image, false, context)
        }),
    }
}

/// The mounts of a spec.
pub(crate) fn mount_plan(spec: &RunSpec) -> Result<MountPlan, BackendError> {
    MountPlan::new(spec)
        .map_err(|error: InvalidSpec| unsupported(format!("place inputs and outputs: {error}")))
}

/// Decides everything that the shim is to do.
///
/// # Errors
/// `Unsupported`, or `Image`: the spec asks for what this machine or its configuration does not have. Admission refuses
/// such a spec; this is the last line, so that nothing is ever silently weakened.
pub(crate) fn exec_spec(with: &Conversion<'_>) -> Result<ExecSpec, BackendError> {
    let Conversion { attempt, spec, dir, machine, config, .. } = *with;
    if let Some(fault) = machine.fault() {
        return Err(unsupported(fault));
    }
    let lacks = with.capabilities.lacks(spec);
    if !lacks.is_empty() {
        return Err(unsupported(format!("execute the spec: {}", InvalidSpec(lacks))));
    }
    let image = image(spec, config)?;
    let (root, read_only_root) = match image {
        // A run never changes the machine, whatever its user's rights are; scratch space is below /tmp and HOME.
        None => (Root::Host { hidden: with.hidden.to_vec() }, true),
        Some(lower) => {
            let upper = (!spec.read_only_root).then(|| dir.upper());
            (Root::Directory { lower: lower.clone(), upper }, spec.read_only_root)
        }
    };
    let mut namespaces = machine.probe.namespaces;
    namespaces.network = match &spec.network {
        Network::None => true,
        Network::Egress | Network::Named(_) => false,
    };
    let resources = &spec.resources;
    let groups = &machine.cgroups;
    Ok(ExecSpec {
        attempt,
        argv: spec.command.iter().chain(&spec.args).cloned().collect(),
        env: environment(attempt, spec),
        working_dir: spec.working_dir.clone().unwrap_or_else(|| "/".to_owned()),
        read_only_root,
        mounts: mounts(dir, with.plan, &root),
        root,
        user: user(spec, config),
        namespaces,
        cgroup: groups.plan(attempt, resources),
        file_size_bytes: resources.file_size_bytes,
        address_space_bytes: resources.memory_bytes.filter(|_| groups.memory.is_none()),
        nproc: resources.pids.filter(|_| groups.pids.is_none()).map(u64::from),
        timeout: spec.timeout.unwrap_or(TIMEOUT),
        stop_grace: spec.stop_grace.unwrap_or(STOP_GRACE),
        terminal: spec.terminal,
        // A terminal goes both ways: programs ask their standard input for its size.
        stdin: spec.stdin || spec.terminal.is_some(),
        log_limit_bytes: with.log_limit_bytes,
    })
}

/// The backend's own mounts, then the plan's, which may lie in them.
fn mounts(dir: &AttemptDir, plan: &MountPlan, root: &Root) -> Vec<Mount> {
    let home = match root {
        // An image that can be written to has room for one more home directory beside its own.
        Root::Directory { upper: Some(_), .. } => (HOME, dir.home()),
        // Nothing can be added to a `/home` that is not ours. The machine's own is no program's business anyway.
        Root::Host { .. } | Root::Directory { upper: None, .. } => (HOMES, dir.homes()),
    };
    let own = [("/tmp", dir.tmp()), home].map(|(target, source)| Mount {
        source,
        target: target.to_owned(),
        read_only: false,
    });
    let planned = plan.mounts.iter().map(|mount| Mount {
        source: dir.path().join(&mount.host),
        target: mount.target.clone(),
        read_only: !mount.writable,
    });
    own.into_iter().chain(planned).collect()
}

/// The whole environment: nothing of the service's own, and the spec has the last word.
fn environment(attempt: AttemptId, spec: &RunSpec) -> BTreeMap<String, String> {
    let mut env: BTreeMap<String, String> = [
        ("PATH", PATH.to_owned()),
        ("HOME", HOME.to_owned()),
        ("TMPDIR", "/tmp".to_owned()),
        ("USER", "runner".to_owned()),
        ("RUNNER_RUN_ID", attempt.run.to_string()),
        ("RUNNER_ATTEMPT", attempt.number.to_string()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    if spec.terminal.is_some() {
        // What a program assumes of a terminal that says nothing of itself.
        env.insert("TERM".to_owned(), "xterm".to_owned());
    }
    env.extend(spec.env.iter().map(|(name, value)| (name.clone(), value.clone())));
    env
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;
