//! What the backend can promise.

use runner_agent::staging::{MountKind, MountPlan};
use runner_core::{
    capability::Capabilities,
    spec::{FieldViolation, InvalidSpec, RunSpec, path},
};

use crate::{config::DindConfig, convert, names::OWN_DIR};

/// The least memory that engines limit a container to; the shim needs a part of it.
const LEAST_MEMORY: u64 = 16 * 1024 * 1024;
/// The least that the kernel schedules by, in thousandths of a core.
const LEAST_CPU_MILLIS: u32 = 10;
/// Beside the program's own: the shim and the process that waits for the program.
pub(crate) const OWN_PIDS: u32 = 2;

/// What a spec may ask for.
pub(crate) fn capabilities(config: &DindConfig) -> Capabilities {
    Capabilities {
        inputs_outputs: true,
        network_none: true,
        network_egress: config.egress_network.is_some(),
        named_networks: config.networks.keys().cloned().collect(),
        memory_limit: true,
        cpu_limit: true,
        pids_limit: true,
        file_size_limit: true,
        // Engines limit a container's own layer only on some file systems, and volumes on none.
        ephemeral_storage_limit: false,
        gpus: false,
        user: true,
        root_user: config.allow_root_user,
        read_only_root: true,
        terminal: true,
        stdin: true,
        secrets: false,
        extract: true,
        image_command: true,
        images: None,
    }
}

/// What of a spec cannot be honoured, beyond the capabilities.
pub(crate) fn objections(spec: &RunSpec) -> Vec<FieldViolation> {
    let plan = match MountPlan::new(spec) {
        Ok(plan) => plan,
        Err(InvalidSpec(violations)) => return violations,
    };
    let mut found = Vec::new();
    let mut object = |field: String, reason: &'static str, what: String| {
        found.push(FieldViolation::new(field, reason, what));
    };
    let resources = &spec.resources;
    if resources.memory_bytes.is_some_and(|bytes| bytes < LEAST_MEMORY) {
        let what = format!("a container has at least {LEAST_MEMORY} bytes of memory");
        object("spec.resources.memory_bytes".into(), "TOO_SMALL", what);
    }
    if resources.cpu_millis.is_some_and(|millis| millis < LEAST_CPU_MILLIS) {
        let what = format!("a container has at least {LEAST_CPU_MILLIS} thousandths of a core");
        object("spec.resources.cpu_millis".into(), "TOO_SMALL", what);
    }
    let ours = |at: &str| path::overlap(at, OWN_DIR) || at == convert::HOME;
    for (i, input) in spec.inputs.iter().enumerate() {
        let field = || format!("spec.inputs[{i}].path");
        if ours(&input.path) {
            object(field(), "FORBIDDEN", format!("{} belongs to the backend", input.path));
        }
        let mount = &plan.mounts[plan.inputs[i].mount];
        if mount.kind == MountKind::File && spec.read_only_root {
            let what =
                "a single file cannot be put into a read-only root; put it below /inputs, or make it a tree";
            object(field(), "UNSUPPORTED", what.into());
        }
    }
    for (i, output) in spec.outputs.iter().enumerate() {
        if ours(&output.path) {
            object(
                format!("spec.outputs[{i}].path"),
                "FORBIDDEN",
                format!("{} belongs to the backend", output.path),
            );
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use runner_core::spec::{Input, InputSource, Output};

    use super::*;

    fn input(path: &str) -> Input {
        Input {
            path: path.to_owned(),
            source: InputSource::Inline(Bytes::from_static(b"x")),
            sha256: None,
            mode: None,
            extract: None,
        }
    }

    fn fields(spec: &RunSpec) -> Vec<String> {
        objections(spec).into_iter().map(|violation| violation.field).collect()
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_field() {
        let mut spec =
            RunSpec { inputs: vec![input("/etc/app.conf")], read_only_root: true, ..RunSpec::default() };
        spec.resources.memory_bytes = Some(1024);
        spec.resources.cpu_millis = Some(1);
        spec.outputs = vec![Output {
            path: "/.runner/run".into(),
            glob: false,
            destination: None,
            required: false,
            max_bytes: None,
        }];
        assert_eq!(
            fields(&spec),
            [
                "spec.resources.memory_bytes",
                "spec.resources.cpu_millis",
                "spec.inputs[0].path",
                "spec.outputs[0].path",
            ]
        );
    }

    #[test]
    fn an_ordinary_spec_is_fine() {
        let spec = RunSpec { inputs: vec![input("/inputs/a"), input("/etc/app.conf")], ..RunSpec::default() };
        assert_eq!(fields(&spec), Vec::<String>::new());
    }

    #[test]
    fn networks_are_promised_only_where_the_configuration_has_them() {
        let none = capabilities(&DindConfig::default());
        assert!(!none.network_egress && none.named_networks.is_empty() && !none.root_user);
        let some = capabilities(&DindConfig {
            egress_network: Some("bridge".into()),
            networks: [("lab".into(), "lab-net".into())].into(),
            ..DindConfig::default()
        });
        assert!(some.network_egress);
        assert_eq!(some.named_networks, ["lab"]);
    }
}
