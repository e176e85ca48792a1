//! Specs.

use std::collections::BTreeMap;

use runner_core::spec::{
    Archive, Input, InputSource, InvalidSpec, Network, Output, Resources, RetryPolicy, Routing, RunSpec,
    SecretRef, SecretTarget, TerminalSize, User,
};
use runner_proto::v1;

use super::{Violations, Wire, cause, duration};

impl TryFrom<Wire<v1::RunSpec>> for RunSpec {
    type Error = InvalidSpec;

    fn try_from(Wire(spec): Wire<v1::RunSpec>) -> Result<Self, InvalidSpec> {
        let mut violations = Violations::default();
        let spec = from_wire(spec, &mut violations);
        violations.finish(spec)
    }
}

fn some_text(text: String) -> Option<String> {
    if text.is_empty() { None } else { Some(text) }
}

fn some_number<T: Default + PartialEq>(number: T) -> Option<T> {
    if number == T::default() { None } else { Some(number) }
}

/// Converts what can be converted, and stands in a default for what cannot, so that the domain can check the rest.
pub(super) fn from_wire(spec: v1::RunSpec, violations: &mut Violations) -> RunSpec {
    RunSpec {
        image: some_text(spec.image),
        command: spec.command,
        args: spec.args,
        env: spec.env.into_iter().collect(),
        secrets: spec
            .secrets
            .into_iter()
            .enumerate()
            .filter_map(|(i, secret)| secret_from_wire(i, secret, violations))
            .collect(),
        working_dir: some_text(spec.working_dir),
        inputs: spec
            .inputs
            .into_iter()
            .enumerate()
            .map(|(i, input)| input_from_wire(i, input, violations))
            .collect(),
        outputs: spec
            .outputs
            .into_iter()
            .enumerate()
            .map(|(i, output)| Output {
                path: output.path,
                glob: output.glob,
                destination: violations
                    .parse_optional(format!("spec.outputs[{i}].destination"), &output.destination),
                required: output.required,
                max_bytes: some_number(output.max_bytes),
            })
            .collect(),
        resources: resources_from_wire(spec.resources.unwrap_or_default()),
        network: network_from_wire(spec.network, violations),
        user: user_from_wire(&spec.user, violations),
        read_only_root: spec.read_only_root,
        timeout: violations.duration("spec.timeout", spec.timeout),
        stop_grace: violations.duration("spec.stop_grace", spec.stop_grace),
        retry: retry_from_wire(spec.retry.unwrap_or_default(), violations),
        terminal: spec.terminal.map(|terminal| terminal_from_wire("spec.terminal", &terminal, violations)),
        stdin: spec.stdin,
        labels: spec.labels.into_iter().collect(),
        routing: {
            let routing = spec.routing.unwrap_or_default();
            Routing {
                backend: violations.parse_optional("spec.routing.backend", &routing.backend),
                sticky_key: some_text(routing.sticky_key),
            }
        },
        idempotent: spec.idempotent,
    }
}

fn secret_from_wire(i: usize, secret: v1::SecretRef, violations: &mut Violations) -> Option<SecretRef> {
    let target = match secret.target {
        Some(v1::secret_ref::Target::Env(name)) => SecretTarget::Env(name),
        Some(v1::secret_ref::Target::Path(path)) => SecretTarget::Path(path),
        None => {
            let what = "say where the value appears: `env` or `path`";
            violations.add(format!("spec.secrets[{i}].target"), "REQUIRED", what);
            return None;
        }
    };
    Some(SecretRef { reference: secret.r#ref, target })
}

fn input_from_wire(i: usize, input: v1::Input, violations: &mut Violations) -> Input {
    let nothing = || InputSource::Inline(bytes::Bytes::new());
    let source = match input.source {
        Some(v1::input::Source::Uri(uri)) => InputSource::from_uri(&uri).unwrap_or_else(|error| {
            violations.add(format!("spec.inputs[{i}].uri"), "INVALID", error.to_string());
            nothing()
        }),
        Some(v1::input::Source::Inline(bytes)) => InputSource::Inline(bytes),
        None => {
            let what = "say where the bytes come from: `uri` or `inline`";
            violations.add(format!("spec.inputs[{i}].source"), "REQUIRED", what);
            nothing()
        }
    };
    let extract = match v1::Archive::try_from(input.extract) {
        Ok(v1::Archive::Unspecified) => None,
        Ok(v1::Archive::Tar) => Some(Archive::Tar),
        Ok(v1::Archive::TarGz) => Some(Archive::TarGz),
        Ok(v1::Archive::TarZst) => Some(Archive::TarZst),
        Ok(v1::Archive::Zip) => Some(Archive::Zip),
        Err(_) => {
            let what = format!("{} is not an archive format", input.extract);
            violations.add(format!("spec.inputs[{i}].extract"), "INVALID", what);
            None
        }
    };
    Input {
        path: input.path,
        source,
        sha256: some_text(input.sha256),
        mode: some_number(input.mode),
        extract,
    }
}

fn resources_from_wire(resources: v1::Resources) -> Resources {
    Resources {
        profile: some_text(resources.profile),
        cpu_millis: some_number(resources.cpu_millis),
        memory_bytes: some_number(resources.memory_bytes),
        ephemeral_storage_bytes: some_number(resources.ephemeral_storage_bytes),
        pids: some_number(resources.pids),
        gpus: some_number(resources.gpus),
        file_size_bytes: some_number(resources.file_size_bytes),
    }
}

fn network_from_wire(network: Option<v1::Network>, violations: &mut Violations) -> Network {
    use v1::network::Policy;
    let mut not_true = |name: &str| {
        violations.add(format!("spec.network.{name}"), "INVALID", "must be true where it is set");
        Network::None
    };
    match network.and_then(|network| network.policy) {
        None | Some(Policy::None(true)) => Network::None,
        Some(Policy::Egress(true)) => Network::Egress,
        Some(Policy::None(false)) => not_true("none"),
        Some(Policy::Egress(false)) => not_true("egress"),
        Some(Policy::Named(name)) => Network::Named(name),
    }
}

fn user_from_wire(user: &str, violations: &mut Violations) -> Option<User> {
    if user.is_empty() {
        return None;
    }
    // Only plain digits: `+1` and ` 1` parse elsewhere, and are somebody's mistake.
    let number = |text: &str| -> Option<u32> {
        if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
    };
    let (uid, gid) = user.split_once(':').unwrap_or((user, user));
    match (number(uid), number(gid)) {
        // The last id means "unchanged" to the kernel.
        (Some(uid), Some(gid)) if uid != u32::MAX && gid != u32::MAX => Some(User { uid, gid }),
        _ => {
            violations.add("spec.user", "INVALID", "must be `UID` or `UID:GID`, in digits");
            None
        }
    }
}

fn retry_from_wire(retry: v1::RetryPolicy, violations: &mut Violations) -> RetryPolicy {
    RetryPolicy {
        max_attempts: some_number(retry.max_attempts),
        initial_backoff: violations.duration("spec.retry.initial_backoff", retry.initial_backoff),
        max_backoff: violations.duration("spec.retry.max_backoff", retry.max_backoff),
        causes: retry
            .causes
            .into_iter()
            .enumerate()
            .filter_map(|(i, cause)| violations.cause(format!("spec.retry.causes[{i}]"), cause))
            .collect(),
    }
}

/// A terminal's size; zero means the default of each.
pub(super) fn terminal_from_wire(
    field: &str,
    terminal: &v1::Terminal,
    violations: &mut Violations,
) -> TerminalSize {
    let default = TerminalSize::default();
    let mut side = |name: &str, value: u32, default: u16| match u16::try_from(value) {
        Ok(0) => default,
        Ok(value) => value,
        Err(_) => {
            violations.add(format!("{field}.{name}"), "TOO_LARGE", format!("must be at most {}", u16::MAX));
            default
        }
    };
    TerminalSize {
        columns: side("columns", terminal.columns, default.columns),
        rows: side("rows", terminal.rows, default.rows),
    }
}

impl From<&RunSpec> for Wire<v1::RunSpec> {
    fn from(spec: &RunSpec) -> Self {
        // Destructured without `..`: a field that is added to the domain does not compile until it is on the wire.
        let RunSpec {
            image,
            command,
            args,
            env,
            secrets,
            working_dir,
            inputs,
            outputs,
            resources,
            network,
            user,
            read_only_root,
            timeout,
            stop_grace,
            retry,
            terminal,
            stdin,
            labels,
            routing,
            idempotent,
        } = spec;
        Self(v1::RunSpec {
            image: image.clone().unwrap_or_default(),
            command: command.clone(),
            args: args.clone(),
            env: map(env),
            secrets: secrets.iter().map(secret_to_wire).collect(),
            working_dir: working_dir.clone().unwrap_or_default(),
            inputs: inputs.iter().map(input_to_wire).collect(),
            outputs: outputs.iter().map(output_to_wire).collect(),
            resources: Some(resources_to_wire(resources)),
            network: Some(network_to_wire(network)),
            user: user.map(|user| format!("{}:{}", user.uid, user.gid)).unwrap_or_default(),
            read_only_root: *read_only_root,
            timeout: timeout.map(duration),
            stop_grace: stop_grace.map(duration),
            retry: Some(retry_to_wire(retry)),
            terminal: terminal
                .map(|size| v1::Terminal { columns: size.columns.into(), rows: size.rows.into() }),
            stdin: *stdin,
            labels: map(labels),
            routing: Some(v1::Routing {
                backend: routing.backend.as_ref().map(ToString::to_string).unwrap_or_default(),
                sticky_key: routing.sticky_key.clone().unwrap_or_default(),
            }),
            idempotent: *idempotent,
        })
    }
}

/// A map on the wire.
pub(super) fn map(map: &BTreeMap<String, String>) -> std::collections::HashMap<String, String> {
    map.iter().map(|(key, value)| (key.clone(), value.clone())).collect()
}

fn secret_to_wire(secret: &SecretRef) -> v1::SecretRef {
    v1::SecretRef {
        r#ref: secret.reference.clone(),
        target: Some(match &secret.target {
            SecretTarget::Env(name) => v1::secret_ref::Target::Env(name.clone()),
            SecretTarget::Path(path) => v1::secret_ref::Target::Path(path.clone()),
        }),
    }
}

fn input_to_wire(input: &Input) -> v1::Input {
    v1::Input {
        path: input.path.clone(),
        source: Some(match &input.source {
            InputSource::Artifact(uri) => v1::input::Source::Uri(uri.to_string()),
            InputSource::Run(output) => v1::input::Source::Uri(output.to_string()),
            InputSource::Https(url) => v1::input::Source::Uri(url.to_string()),
            InputSource::Inline(bytes) => v1::input::Source::Inline(bytes.clone()),
        }),
        sha256: input.sha256.clone().unwrap_or_default(),
        mode: input.mode.unwrap_or_default(),
        extract: match input.extract {
            None => v1::Archive::Unspecified,
            Some(Archive::Tar) => v1::Archive::Tar,
            Some(Archive::TarGz) => v1::Archive::TarGz,
            Some(Archive::TarZst) => v1::Archive::TarZst,
            Some(Archive::Zip) => v1::Archive::Zip,
        }
        .into(),
    }
}

fn output_to_wire(output: &Output) -> v1::Output {
    v1::Output {
        path: output.path.clone(),
        destination: output.destination.as_ref().map(ToString::to_string).unwrap_or_default(),
        required: output.required,
        max_bytes: output.max_bytes.unwrap_or_default(),
        glob: output.glob,
    }
}

fn resources_to_wire(resources: &Resources) -> v1::Resources {
    v1::Resources {
        profile: resources.profile.clone().unwrap_or_default(),
        cpu_millis: resources.cpu_millis.unwrap_or_default(),
        memory_bytes: resources.memory_bytes.unwrap_or_default(),
        ephemeral_storage_bytes: resources.ephemeral_storage_bytes.unwrap_or_default(),
        pids: resources.pids.unwrap_or_default(),
        gpus: resources.gpus.unwrap_or_default(),
        file_size_bytes: resources.file_size_bytes.unwrap_or_default(),
    }
}

fn network_to_wire(network: &Network) -> v1::Network {
    use v1::network::Policy;
    v1::Network {
        policy: Some(match network {
            Network::None => Policy::None(true),
            Network::Egress => Policy::Egress(true),
            Network::Named(name) => Policy::Named(name.clone()),
        }),
    }
}

fn retry_to_wire(retry: &RetryPolicy) -> v1::RetryPolicy {
    v1::RetryPolicy {
        max_attempts: retry.max_attempts.unwrap_or_default(),
        initial_backoff: retry.initial_backoff.map(duration),
        max_backoff: retry.max_backoff.map(duration),
        causes: retry.causes.iter().map(|found| cause(*found).into()).collect(),
    }
}
