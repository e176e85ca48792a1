//! What this machine allows, found out by trying, and what the backend can promise on it.

use std::{
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use runner_agent::exec::protocol::ProbeReport;
use runner_core::capability::Capabilities;
use rustix::process::{PidfdFlags, Signal};

use crate::{
    cgroup::Cgroups,
    config::{HOST_IMAGE, LocalConfig},
    error::OpenError,
    remove::remove_tree,
};

/// How long the agent may take to find out what the machine allows.
const PROBE_DEADLINE: Duration = Duration::from_secs(20);
/// The longest report that is believed.
const MAX_REPORT_BYTES: u64 = 1024 * 1024;

/// What was found out about the machine. Does not change while the backend lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Machine {
    pub(crate) probe: ProbeReport,
    pub(crate) cgroups: Cgroups,
    /// The service is root: it gives directories to other users and needs no user namespace.
    pub(crate) privileged: bool,
}

impl Machine {
    /// Asks the agent and tries control groups. Whether there are overlays is tried in `base`, where they will be.
    pub(crate) async fn detect(
        config: &LocalConfig,
        agent: &Path,
        base: &Path,
        tag: String,
    ) -> Result<Self, OpenError> {
        // A directory of its own, removed by us: without root's rights the kernel leaves in it what only we can remove.
        let trial = base.join(".probe");
        let fail = |source| OpenError::directory("try what the machine allows in", &trial, source);
        remove_tree(&trial).and_then(|()| fs::create_dir(&trial)).map_err(fail)?;
        let probed = probe(agent, &trial).await;
        remove_tree(&trial).map_err(fail)?;
        let probe = probed?;
        let parent = config.cgroup_parent.clone();
        let cgroups = tokio::task::spawn_blocking(move || Cgroups::detect(parent.as_deref(), &tag))
            .await
            .unwrap_or_default();
        Ok(Self { probe, cgroups, privileged: rustix::process::geteuid().is_root() })
    }

    /// What a spec may ask for.
    pub(crate) fn capabilities(&self, config: &LocalConfig) -> Capabilities {
        let namespaces = self.probe.namespaces;
        let mut images = vec![HOST_IMAGE.to_owned()];
        if self.probe.overlay {
            images.extend(config.images.keys().cloned());
        }
        Capabilities {
            inputs_outputs: namespaces.mount,
            network_none: namespaces.network,
            network_egress: config.egress,
            named_networks: config.host_networks.clone(),
            // Without a control group only by RLIMIT_AS, which means less.
            memory_limit: self.cgroups.memory.is_some() || config.memory_by_rlimit,
            cpu_limit: self.cgroups.cpu.is_some(),
            // Without a control group by RLIMIT_NPROC.
            pids_limit: true,
            file_size_limit: true,
            ephemeral_storage_limit: false,
            gpus: false,
            user: self.privileged || namespaces.user,
            // The kernel exempts the machine's root from RLIMIT_NPROC.
            root_user: config.allow_root_user && (self.cgroups.pids.is_some() || namespaces.user),
            read_only_root: namespaces.mount,
            terminal: true,
            stdin: true,
            secrets: false,
            extract: true,
            image_command: false,
            images: Some(images),
        }
    }

    /// Why no attempt can be executed here at all.
    pub(crate) fn fault(&self) -> Option<&'static str> {
        // Without it a program would see the service's own files, with the service's own rights where that is not root.
        (!self.probe.namespaces.mount).then_some(
            "this machine lets the service make no mount namespace; run it as root, or allow unprivileged user namespaces \
             (sysctl kernel.unprivileged_userns_clone=1 or user.max_user_namespaces, and the security profile of a container)",
        )
    }

    /// How programs are confined, in a line for people.
    pub(crate) fn summary(&self, config: &LocalConfig) -> String {
        let n = self.probe.namespaces;
        let has: Vec<&str> = [
            (n.user, "user"),
            (n.mount, "mount"),
            (n.pid, "pid"),
            (n.network, "network"),
            (n.ipc, "ipc"),
            (n.uts, "uts"),
        ]
        .into_iter()
        .filter_map(|(has, name)| has.then_some(name))
        .collect();
        let groups = &self.cgroups;
        let by = |group: bool, else_by: &'static str| if group { "control group" } else { else_by };
        let mut text = format!(
            "namespaces {}; control groups {}; memory by {}, processes by {}, cpu by {}; overlay {}",
            if has.is_empty() { "none".to_owned() } else { has.join(" ") },
            if groups.version == 0 { "none".to_owned() } else { format!("v{}", groups.version) },
            by(
                groups.memory.is_some(),
                if config.memory_by_rlimit { "rlimit of each process" } else { "nothing" }
            ),
            by(groups.pids.is_some(), "rlimit of the user"),
            by(groups.cpu.is_some(), "nothing"),
            if self.probe.overlay { "yes" } else { "no" },
        );
        for note in self.probe.notes.iter().chain(&groups.notes) {
            text.push_str("; ");
            text.push_str(note);
        }
        text
    }
}

/// Finds the agent: the configured one, else the one beside the service's program.
pub(crate) fn find_agent(config: &LocalConfig) -> Result<PathBuf, OpenError> {
    let path = match &config.agent {
        Some(path) => path.clone(),
        None => {
            let own = std::env::current_exe().map_err(|source| OpenError::Agent {
                path: "runner-agent".to_owned(),
                source: source.into(),
            })?;
            own.with_file_name("runner-agent")
        }
    };
    match rustix::fs::access(&path, rustix::fs::Access::EXEC_OK) {
        Ok(()) => Ok(path),
        Err(error) => Err(OpenError::Agent {
            path: path.display().to_string(),
            source: std::io::Error::from(error).into(),
        }),
    }
}

async fn probe(agent: &Path, base: &Path) -> Result<ProbeReport, OpenError> {
    let path = agent.display().to_string();
    let fail =
        |source: Box<dyn std::error::Error + Send + Sync>| OpenError::Agent { path: path.clone(), source };
    let mut child = Command::new(agent)
        .arg("probe")
        .arg(base)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| fail(error.into()))?;
    // A descriptor, so that the kill below can never meet another process.
    let process = rustix::process::pidfd_open(rustix::process::Pid::from_child(&child), PidfdFlags::empty());
    let answer = tokio::task::spawn_blocking(move || {
        let mut report = Vec::new();
        let read = match child.stdout.take() {
            Some(stdout) => stdout.take(MAX_REPORT_BYTES).read_to_end(&mut report).map(drop),
            None => Ok(()),
        };
        let status = child.wait()?;
        read?;
        Ok::<_, std::io::Error>((status, report))
    });
    let answer = match tokio::time::timeout(PROBE_DEADLINE, answer).await {
        Ok(answer) => answer.map_err(|error| fail(error.into()))?,
        Err(_) => {
            if let Ok(process) = process {
                // Gone is fine too.
                let _ = rustix::process::pidfd_send_signal(&process, Signal::KILL);
            }
            return Err(fail(format!("`probe` took longer than {PROBE_DEADLINE:?}").into()));
        }
    };
    let (status, report) = answer.map_err(|error| fail(error.into()))?;
    if !status.success() {
        return Err(fail(format!("`probe` ended with {status}").into()));
    }
    serde_json::from_slice(&report).map_err(|error| fail(error.into()))
}

#[cfg(test)]
mod tests {
    use runner_agent::exec::protocol::Namespaces;

    use super::*;

    fn machine(namespaces: Namespaces, cgroups: Cgroups) -> Machine {
        Machine {
            probe: ProbeReport { namespaces, overlay: false, notes: Vec::new() },
            cgroups,
            privileged: true,
        }
    }

    #[test]
    fn what_the_machine_lacks_is_not_promised() {
        let config = LocalConfig {
            allow_root_user: true,
            images: [("a".into(), "/a".into())].into(),
            ..LocalConfig::default()
        };
        let bare = machine(Namespaces::default(), Cgroups::default());
        let can = bare.capabilities(&config);
        assert!(
            !can.inputs_outputs
                && !can.network_none
                && !can.cpu_limit
                && !can.read_only_root
                && !can.root_user
        );
        assert_eq!(can.images, Some(vec!["host".to_owned()]), "an image needs an overlay");
        assert!(bare.fault().is_some());
    }

    #[test]
    fn root_is_promised_only_where_the_configuration_allows_it() {
        let groups = Cgroups { version: 1, pids: Some("/p".into()), ..Cgroups::default() };
        let machine = machine(Namespaces { mount: true, ..Namespaces::default() }, groups);
        assert!(!machine.capabilities(&LocalConfig::default()).root_user);
        assert!(
            machine.capabilities(&LocalConfig { allow_root_user: true, ..LocalConfig::default() }).root_user
        );
        assert!(machine.fault().is_none());
    }

    #[test]
    fn a_missing_agent_is_an_error_that_says_what_to_do() {
        let config = LocalConfig { agent: Some("/nowhere/runner-agent".into()), ..LocalConfig::default() };
        let text = find_agent(&config).unwrap_err().to_string();
        assert!(
            text.contains("/nowhere/runner-agent") && text.contains("cargo build -p runner-agent"),
            "{text}"
        );
    }
}
