//! Backends, as operators see them.

use runner_core::{capability::Capabilities, service::BackendStatus};
use runner_proto::v1;

use super::{Wire, traffic};

impl From<&BackendStatus> for Wire<v1::Backend> {
    fn from(backend: &BackendStatus) -> Self {
        let BackendStatus { name, kind, health, capabilities, active, slots, live_runs, drained } = backend;
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Self(v1::Backend {
            name: name.to_string(),
            kind: (*kind).to_owned(),
            healthy: health.healthy,
            detail: health.detail.clone(),
            capabilities: Some(capabilities_to_wire(capabilities)),
            active_attempts: count(*active),
            max_attempts: count(*slots),
            live_runs: count(*live_runs),
            drained: drained.as_ref().map(traffic::drained),
        })
    }
}

fn capabilities_to_wire(can: &Capabilities) -> v1::Capabilities {
    v1::Capabilities {
        inputs_outputs: can.inputs_outputs,
        network_none: can.network_none,
        network_egress: can.network_egress,
        memory_limit: can.memory_limit,
        cpu_limit: can.cpu_limit,
        pids_limit: can.pids_limit,
        file_size_limit: can.file_size_limit,
        ephemeral_storage_limit: can.ephemeral_storage_limit,
        gpus: can.gpus,
        user: can.user,
        root_user: can.root_user,
        read_only_root: can.read_only_root,
        terminal: can.terminal,
        stdin: can.stdin,
        secrets: can.secrets,
        images: can.images.clone().unwrap_or_default(),
        extract: can.extract,
        named_networks: can.named_networks.clone(),
    }
}
