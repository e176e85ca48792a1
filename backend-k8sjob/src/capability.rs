//! What the backend can promise.

use runner_agent::{pod::path as pod_path, staging::MountPlan};
use runner_core::{
    capability::Capabilities,
    spec::{FieldViolation, InputSource, InvalidSpec, Network, RunSpec, path},
};

use crate::{config::K8sJobConfig, convert};

/// Everything of the agent's is below it.
const OWN_DIR: &str = "/.runner";

/// What a spec may ask for.
pub(crate) fn capabilities(config: &K8sJobConfig) -> Capabilities {
    debug_assert!(pod_path::RUN.starts_with(OWN_DIR));
    Capabilities {
        inputs_outputs: true,
        // Only a cluster that enforces policies can keep a pod from its network.
        network_none: config.enforces_network_policies,
        network_egress: true,
        named_networks: if config.enforces_network_policies { config.networks.clone() } else { Vec::new() },
        memory_limit: true,
        cpu_limit: true,
        // A kubelet limits the processes of all pods alike.
        pids_limit: false,
        file_size_limit: true,
        // What the spec means is the program's own; a pod's limit counts inputs and the log, too.
        ephemeral_storage_limit: false,
        gpus: false,
        user: true,
        root_user: false,
        read_only_root: true,
        terminal: true,
        stdin: true,
        secrets: false,
        extract: true,
        // The image's ENTRYPOINT is not looked up in its registry.
        image_command: false,
        images: None,
    }
}

/// What of a spec cannot be honoured, beyond the capabilities.
pub(crate) fn objections(config: &K8sJobConfig, spec: &RunSpec) -> Vec<FieldViolation> {
    if let Err(InvalidSpec(violations)) = MountPlan::new(spec) {
        return violations;
    }
    let mut found = Vec::new();
    let mut object = |field: String, reason: &'static str, what: &str| {
        found.push(FieldViolation::new(field, reason, what));
    };
    if spec.image.is_none() && config.default_image.is_none() {
        object("spec.image".into(), "REQUIRED", "this backend has no default image");
    }
    if spec.command.is_empty() {
        let what = "this backend does not look up an image's ENTRYPOINT: say what to execute";
        object("spec.command".into(), "REQUIRED", what);
    }
    let ours = |at: &str| path::overlap(at, OWN_DIR) || at == convert::HOME;
    for (i, input) in spec.inputs.iter().enumerate() {
        if ours(&input.path) {
            object(format!("spec.inputs[{i}].path"), "FORBIDDEN", "this path belongs to the backend");
        }
        if matches!(input.source, InputSource::Https(_)) && spec.network == Network::None {
            let what = "it would be fetched in the pod, whose network is `none`: ask for `egress`, or upload it first";
            object(format!("spec.inputs[{i}].source"), "UNSUPPORTED", what);
        }
    }
    for (i, output) in spec.outputs.iter().enumerate() {
        if ours(&output.path) {
            object(format!("spec.outputs[{i}].path"), "FORBIDDEN", "this path belongs to the backend");
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use runner_core::spec::{Input, Output};

    use super::*;

    #[test]
    fn what_cannot_be_done_is_refused_by_field() {
        let input =
            |path: &str, source| Input { path: path.into(), source, sha256: None, mode: None, extract: None };
        let spec = RunSpec {
            args: vec!["only".into()],
            inputs: vec![
                input("/.runner/x", InputSource::Inline(bytes::Bytes::from_static(b"x"))),
                input("/inputs/x", InputSource::Https("https://example.org/x".parse().unwrap())),
            ],
            outputs: vec![Output {
                path: "/.runner/run".into(),
                glob: false,
                destination: None,
                required: false,
                max_bytes: None,
            }],
            ..RunSpec::default()
        };
        let fields: Vec<_> = objections(&K8sJobConfig::default(), &spec)
            .into_iter()
            .map(|violation| violation.field)
            .collect();
        assert_eq!(
            fields,
            [
                "spec.image",
                "spec.command",
                "spec.inputs[0].path",
                "spec.inputs[1].source",
                "spec.outputs[0].path"
            ]
        );
    }

    #[test]
    fn an_input_by_https_needs_a_network() {
        let source = InputSource::Https("https://example.org/x".parse().unwrap());
        let input = Input { path: "/inputs/x".into(), source, sha256: None, mode: None, extract: None };
        let spec = RunSpec {
            image: Some("a".into()),
            command: vec!["x".into()],
            inputs: vec![input],
            ..RunSpec::default()
        };
        let config = K8sJobConfig { enforces_network_policies: true, ..K8sJobConfig::default() };
        let fields = |spec: &RunSpec| -> Vec<String> {
            objections(&config, spec).into_iter().map(|violation| violation.field).collect()
        };
        assert_eq!(fields(&RunSpec { network: Network::None, ..spec.clone() }), ["spec.inputs[0].source"]);
        assert_eq!(fields(&RunSpec { network: Network::Egress, ..spec }), [""; 0]);
    }

    #[test]
    fn no_network_is_promised_only_where_policies_are_enforced() {
        let spec = RunSpec { command: vec!["x".into()], network: Network::None, ..RunSpec::default() };
        let lacks = capabilities(&K8sJobConfig::default()).lacks(&spec);
        assert_eq!(lacks.iter().map(|lack| lack.field.as_str()).collect::<Vec<_>>(), ["spec.network"]);
        let config = K8sJobConfig { enforces_network_policies: true, ..K8sJobConfig::default() };
        assert!(capabilities(&config).lacks(&spec).is_empty());
    }
}
