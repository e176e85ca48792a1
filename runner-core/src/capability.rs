//! What a backend can honour, and which field of a spec asks for more.

use serde::{Deserialize, Serialize};

use crate::spec::{FieldViolation, Network, RunSpec};

/// What a backend can honour. Admission refuses a spec that needs more, naming the field; nothing is silently weakened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[allow(missing_docs, reason = "each names the field of the spec that it excuses")]
#[allow(clippy::struct_excessive_bools, reason = "a set of independent facts")]
pub struct Capabilities {
    /// Inputs and outputs appear at the paths that the spec names.
    pub inputs_outputs: bool,
    pub network_none: bool,
    pub network_egress: bool,
    /// Named network policies that the backend's configuration has.
    pub named_networks: Vec<String>,
    pub memory_limit: bool,
    pub cpu_limit: bool,
    pub pids_limit: bool,
    pub file_size_limit: bool,
    pub ephemeral_storage_limit: bool,
    pub gpus: bool,
    /// Runs as the uid that the spec names.
    pub user: bool,
    /// Runs as uid 0.
    pub root_user: bool,
    pub read_only_root: bool,
    pub terminal: bool,
    pub stdin: bool,
    pub secrets: bool,
    /// Unpacks inputs.
    pub extract: bool,
    /// Knows the image's own ENTRYPOINT and CMD, so that a spec may leave out both command and args.
    pub image_command: bool,
    /// Image names that it knows; `None`: any reference.
    pub images: Option<Vec<String>>,
}

impl Capabilities {
    /// Everything. For fakes, and as a start to take away from.
    pub fn all() -> Self {
        Self {
            inputs_outputs: true,
            network_none: true,
            network_egress: true,
            named_networks: Vec::new(),
            memory_limit: true,
            cpu_limit: true,
            pids_limit: true,
            file_size_limit: true,
            ephemeral_storage_limit: true,
            gpus: true,
            user: true,
            root_user: true,
            read_only_root: true,
            terminal: true,
            stdin: true,
            secrets: true,
            extract: true,
            image_command: true,
            images: None,
        }
    }

    /// What `spec` needs and this backend lacks, a violation per field. Empty: it can be honoured.
    pub fn lacks(&self, spec: &RunSpec) -> Vec<FieldViolation> {
        let mut lacks = Vec::new();
        if spec.command.is_empty() && spec.args.is_empty() && !self.image_command {
            let what = "this backend's images have no command of their own: say what to execute";
            lacks.push(FieldViolation::new("spec.command", "REQUIRED", what));
        }
        let mut need = |wanted: bool, has: bool, field: String, what: &str| {
            if wanted && !has {
                lacks.push(FieldViolation::new(
                    field,
                    "UNSUPPORTED",
                    format!("this backend cannot honour {what}"),
                ));
            }
        };
        if let (Some(known), Some(image)) = (&self.images, &spec.image) {
            let what = format!("image {image:?}; it knows {known:?}");
            need(!known.contains(image), false, "spec.image".into(), &what);
        }
        need(!spec.inputs.is_empty(), self.inputs_outputs, "spec.inputs".into(), "inputs");
        need(!spec.outputs.is_empty(), self.inputs_outputs, "spec.outputs".into(), "outputs");
        for (i, input) in spec.inputs.iter().enumerate() {
            need(
                input.extract.is_some(),
                self.extract,
                format!("spec.inputs[{i}].extract"),
                "unpacking of archives",
            );
        }
        match &spec.network {
            Network::None => need(true, self.network_none, "spec.network".into(), "network `none`"),
            Network::Egress => need(true, self.network_egress, "spec.network".into(), "network `egress`"),
            Network::Named(name) => {
                let what = format!("network policy {name:?}; it knows {:?}", self.named_networks);
                need(true, self.named_networks.contains(name), "spec.network.named".into(), &what);
            }
        }
        let resources = &spec.resources;
        let field = |name: &str| format!("spec.resources.{name}");
        need(resources.memory_bytes.is_some(), self.memory_limit, field("memory_bytes"), "a memory limit");
        need(resources.cpu_millis.is_some(), self.cpu_limit, field("cpu_millis"), "a cpu limit");
        need(resources.pids.is_some(), self.pids_limit, field("pids"), "a limit on processes");
        need(
            resources.file_size_bytes.is_some(),
            self.file_size_limit,
            field("file_size_bytes"),
            "a file size limit",
        );
        need(
            resources.ephemeral_storage_bytes.is_some(),
            self.ephemeral_storage_limit,
            field("ephemeral_storage_bytes"),
            "a limit on ephemeral storage",
        );
        need(resources.gpus.is_some_and(|gpus| gpus > 0), self.gpus, field("gpus"), "GPUs");
        if let Some(user) = spec.user {
            need(true, self.user, "spec.user".into(), "another user");
            need(user.uid == 0, self.root_user, "spec.user".into(), "uid 0");
        }
        need(spec.read_only_root, self.read_only_root, "spec.read_only_root".into(), "a read-only root");
        need(spec.terminal.is_some(), self.terminal, "spec.terminal".into(), "a terminal");
        need(spec.stdin, self.stdin, "spec.stdin".into(), "standard input");
        need(!spec.secrets.is_empty(), self.secrets, "spec.secrets".into(), "secrets");
        lacks
    }
}
