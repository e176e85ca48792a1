//! Validation of a spec: a violation per bad field, all of them at once.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

use super::{InputSource, Network, Output, Pattern, RunSpec, SecretTarget, path};
use crate::{
    id::TenantId,
    limits::{Bound, Limits},
};

/// One bad field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldViolation {
    /// Its path in the request, for example `spec.inputs[2].path`.
    pub field: String,
    /// A stable code: `REQUIRED`, `INVALID`, `TOO_LARGE`, `DUPLICATE`, `UNSUPPORTED`, `FORBIDDEN`.
    pub reason: String,
    /// A sentence for a person.
    pub description: String,
}

impl FieldViolation {
    /// A violation.
    pub fn new(field: impl Into<String>, reason: &'static str, description: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.to_owned(), description: description.into() }
    }
}

/// A spec with bad fields. At least one; at most 100 are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidSpec(pub Vec<FieldViolation>);

impl fmt::Display for InvalidSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, violation) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{}: {}", violation.field, violation.description)?;
        }
        Ok(())
    }
}

impl std::error::Error for InvalidSpec {}

const MAX_VIOLATIONS: usize = 100;

struct Check {
    found: Vec<FieldViolation>,
}

impl Check {
    fn add(&mut self, field: impl Into<String>, reason: &'static str, description: impl Into<String>) {
        if self.found.len() < MAX_VIOLATIONS {
            self.found.push(FieldViolation::new(field, reason, description));
        }
    }

    fn path(&mut self, field: String, value: &str) {
        if let Some(fault) = path::fault(value) {
            self.add(field, "INVALID", format!("the path {fault}"));
        }
    }

    fn no_nul(&mut self, field: impl Into<String>, value: &str) {
        if value.contains('\0') {
            self.add(field, "INVALID", "must not contain NUL");
        }
    }

    fn positive_up_to<T: PartialOrd + Default + fmt::Debug + Copy>(
        &mut self,
        field: String,
        value: Option<T>,
        bound: Bound<T>,
        unit: &str,
    ) {
        match value {
            Some(value) if value == T::default() => self.add(field, "INVALID", "must be larger than zero"),
            Some(value) if value > bound.ceiling => {
                self.add(
                    field,
                    "TOO_LARGE",
                    format!("{value:?}{unit} is above the ceiling of {:?}{unit}", bound.ceiling),
                );
            }
            _ => {}
        }
    }
}

impl Output {
    /// The pattern of a glob.
    ///
    /// # Errors
    /// Why the path is no pattern; reads on after nothing.
    pub fn pattern(&self) -> Result<Pattern, String> {
        let pattern = Pattern::parse(&self.path).map_err(|fault| format!("the pattern {fault}"))?;
        if pattern.base().starts_with('/') {
            Ok(pattern)
        } else {
            Err("the pattern must be absolute".to_owned())
        }
    }
}

impl RunSpec {
    /// Checks every field against the contract and the service's limits. Says nothing of what a backend can do:
    /// [`Capabilities::lacks`](crate::capability::Capabilities::lacks) does.
    ///
    /// # Errors
    /// All bad fields at once.
    pub fn validate(&self, tenant: &TenantId, limits: &Limits) -> Result<(), InvalidSpec> {
        let mut check = Check { found: Vec::new() };
        self.validate_program(&mut check, limits);
        self.validate_inputs(&mut check, tenant, limits);
        self.validate_outputs(&mut check, tenant, limits);
        self.validate_mount_overlaps(&mut check);
        self.validate_globs(&mut check);
        self.validate_limits(&mut check, limits);
        self.validate_rest(&mut check, limits);
        if check.found.is_empty() { Ok(()) } else { Err(InvalidSpec(check.found)) }
    }

    fn validate_program(&self, check: &mut Check, limits: &Limits) {
        match &self.image {
            Some(image) if image.is_empty() || image.len() > 1024 => {
                check.add("spec.image", "INVALID", "must have 1 to 1024 bytes");
            }
            Some(image) if image.chars().any(|c| c.is_control() || c.is_whitespace()) => {
                check.add("spec.image", "INVALID", "must not contain white space or control characters");
            }
            _ => {}
        }
        let bytes: usize = self.command.iter().chain(&self.args).map(|arg| arg.len() + 1).sum();
        if bytes > limits.argv_bytes {
            let what =
                format!("command and args have {bytes} bytes, more than the limit of {}", limits.argv_bytes);
            check.add("spec.command", "TOO_LARGE", what);
        }
        for (name, list) in [("command", &self.command), ("args", &self.args)] {
            for (i, arg) in list.iter().enumerate() {
                check.no_nul(format!("spec.{name}[{i}]"), arg);
            }
        }
        if self.command.first().is_some_and(String::is_empty) {
            check.add("spec.command[0]", "INVALID", "the program's name must not be empty");
        }
        let bytes: usize = self.env.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
        if bytes > limits.env_bytes {
            let what =
                format!("the environment has {bytes} bytes, more than the limit of {}", limits.env_bytes);
            check.add("spec.env", "TOO_LARGE", what);
        } else {
            for (name, value) in &self.env {
                if name.is_empty() || name.contains(['=', '\0']) {
                    check.add(
                        "spec.env",
                        "INVALID",
                        format!("the name {name:?} must not be empty or contain `=` or NUL"),
                    );
                }
                check.no_nul(format!("spec.env[{name:?}]"), value);
            }
        }
        if let Some(dir) = &self.working_dir
            && dir != "/"
        {
            check.path("spec.working_dir".into(), dir);
        }
    }

    fn validate_inputs(&self, check: &mut Check, tenant: &TenantId, limits: &Limits) {
        if self.inputs.len() > limits.inputs {
            check.add("spec.inputs", "TOO_LARGE", format!("more than {} inputs", limits.inputs));
            return;
        }
        let mut inline = 0usize;
        for (i, input) in self.inputs.iter().enumerate() {
            let field = |name: &str| format!("spec.inputs[{i}].{name}");
            check.path(field("path"), &input.path);
            match &input.source {
                InputSource::Artifact(uri) => {
                    if uri.owner().as_ref() != Some(tenant) {
                        check.add(
                            field("uri"),
                            "FORBIDDEN",
                            "names an artifact outside of the caller's tenant",
                        );
                    }
                    if uri.is_tree() && (input.sha256.is_some() || input.extract.is_some()) {
                        let what = "a tree's files have their own digests and are not unpacked";
                        check.add(field("uri"), "INVALID", what);
                    }
                }
                InputSource::Run(_) => {
                    if input.extract.is_some() || input.sha256.is_some() {
                        let what = "a run's outputs have their own digests and are not unpacked; to unpack an archive \
                                    that a run wrote, name its object: `artifact:KEY`";
                        check.add(field("uri"), "INVALID", what);
                    }
                }
                InputSource::Https(url) => {
                    if !limits.https.allows_host(url) {
                        let what = format!(
                            "the host {} with port {} is not among those that inputs may come from",
                            url.host(),
                            url.port()
                        );
                        check.add(field("uri"), "FORBIDDEN", what);
                    }
                    if input.sha256.is_none() {
                        check.add(field("sha256"), "REQUIRED", "an input by https names its SHA-256");
                    }
                }
                InputSource::Inline(bytes) => {
                    inline = inline.saturating_add(bytes.len());
                    if bytes.len() > limits.inline_input_bytes {
                        let what =
                            format!("more than {} bytes; upload it instead", limits.inline_input_bytes);
                        check.add(field("inline"), "TOO_LARGE", what);
                    }
                }
            }
            if let Some(digest) = &input.sha256
                && (digest.len() != 64 || !digest.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
            {
                check.add(field("sha256"), "INVALID", "must be 64 lower-case hexadecimal digits");
            }
            if input.mode.is_some_and(|mode| mode > 0o777) {
                check.add(field("mode"), "INVALID", "must be permission bits, 0 to 0777");
            }
        }
        if inline > limits.inline_total_bytes {
            let what = format!(
                "inline inputs have {inline} bytes, more than {} together",
                limits.inline_total_bytes
            );
            check.add("spec.inputs", "TOO_LARGE", what);
        }
    }

    fn validate_outputs(&self, check: &mut Check, tenant: &TenantId, limits: &Limits) {
        if self.outputs.len() > limits.outputs {
            check.add("spec.outputs", "TOO_LARGE", format!("more than {} outputs", limits.outputs));
            return;
        }
        for (i, output) in self.outputs.iter().enumerate() {
            let field = |name: &str| format!("spec.outputs[{i}].{name}");
            if output.glob {
                if let Err(fault) = output.pattern() {
                    check.add(field("path"), "INVALID", fault);
                }
            } else {
                check.path(field("path"), &output.path);
            }
            check.positive_up_to(field("max_bytes"), output.max_bytes, limits.output_bytes, " bytes");
            if let Some(uri) = &output.destination {
                if uri.owner().as_ref() != Some(tenant) {
                    check.add(
                        field("destination"),
                        "FORBIDDEN",
                        "names a place outside of the caller's tenant",
                    );
                } else if !uri.is_tree() {
                    check.add(field("destination"), "INVALID", "must be a prefix: end it with `/`");
                }
            }
        }
    }

    /// An output inside another would be stored twice; an input inside an output would be published as one; two inputs at
    /// one place have no meaning. Inputs inside inputs are fine: the longer path wins. What two outputs share, of which at
    /// least one is a glob, belongs to one of them.
    fn validate_mount_overlaps(&self, check: &mut Check) {
        let mut paths: Vec<(&str, bool, String)> = Vec::new();
        paths.extend(
            self.inputs
                .iter()
                .enumerate()
                .map(|(i, x)| (x.path.as_str(), false, format!("spec.inputs[{i}].path"))),
        );
        paths.extend(
            self.outputs
                .iter()
                .enumerate()
                .filter(|(_, x)| !x.glob)
                .map(|(i, x)| (x.path.as_str(), true, format!("spec.outputs[{i}].path"))),
        );
        // By whole names: `/a/b` sorts right behind `/a`, before `/a-b`.
        paths.sort_by(|a, b| a.0.split('/').cmp(b.0.split('/')));
        let mut above: Vec<(&str, bool)> = Vec::new();
        for (path, is_output, field) in &paths {
            while above.last().is_some_and(|(top, _)| !path::overlap(top, path)) {
                above.pop();
            }
            if let Some((top, top_is_output)) = above.iter().rev().find(|(_, output)| *output || *is_output) {
                let (here, there) = (
                    if *is_output { "output" } else { "input" },
                    if *top_is_output { "output" } else { "input" },
                );
                check.add(field, "DUPLICATE", format!("this {here} overlaps the {there} at {top:?}"));
            } else if let Some((top, _)) = above.last()
                && top == path
            {
                check.add(field, "DUPLICATE", "two inputs have this path");
            }
            above.push((path, *is_output));
        }
    }

    fn validate_globs(&self, check: &mut Check) {
        for (i, output) in self.outputs.iter().enumerate().filter(|(_, output)| output.glob) {
            let field = || format!("spec.outputs[{i}].path");
            if self
                .outputs
                .iter()
                .enumerate()
                .any(|(j, other)| other.path == output.path && (j < i || !other.glob))
            {
                check.add(field(), "DUPLICATE", "another output has this path");
            }
            let Ok(pattern) = output.pattern() else { continue };
            if let Some(input) = self.inputs.iter().find(|input| path::overlap(&input.path, pattern.base())) {
                let what = format!(
                    "what it matches lies in {:?}, which overlaps the input at {:?}",
                    pattern.base(),
                    input.path
                );
                check.add(field(), "DUPLICATE", what);
            }
        }
    }

    fn validate_limits(&self, check: &mut Check, limits: &Limits) {
        let field = |name: &str| format!("spec.resources.{name}");
        let resources = &self.resources;
        if resources.profile.is_some() {
            check.add(field("profile"), "UNSUPPORTED", "no resource profiles are configured");
        }
        check.positive_up_to(field("cpu_millis"), resources.cpu_millis, limits.cpu_millis, " millis");
        check.positive_up_to(field("memory_bytes"), resources.memory_bytes, limits.memory_bytes, " bytes");
        check.positive_up_to(
            field("ephemeral_storage_bytes"),
            resources.ephemeral_storage_bytes,
            limits.ephemeral_storage_bytes,
            " bytes",
        );
        check.positive_up_to(field("pids"), resources.pids, limits.pids, "");
        check.positive_up_to(field("gpus"), resources.gpus, limits.gpus, "");
        check.positive_up_to(
            field("file_size_bytes"),
            resources.file_size_bytes,
            limits.file_size_bytes,
            " bytes",
        );
        check.positive_up_to("spec.timeout".into(), self.timeout, limits.timeout, "");
        if self.stop_grace.is_some_and(|grace| grace > limits.stop_grace.ceiling) {
            let what = format!("is above the ceiling of {:?}", limits.stop_grace.ceiling);
            check.add("spec.stop_grace", "TOO_LARGE", what);
        }
        let retry = &self.retry;
        check.positive_up_to("spec.retry.max_attempts".into(), retry.max_attempts, limits.attempts, "");
        for (name, value, bound) in [
            ("initial_backoff", retry.initial_backoff, limits.backoff),
            ("max_backoff", retry.max_backoff, limits.max_backoff),
        ] {
            if value.is_some_and(|value: Duration| value > bound.ceiling) {
                let what = format!("is above the ceiling of {:?}", bound.ceiling);
                check.add(format!("spec.retry.{name}"), "TOO_LARGE", what);
            }
        }
    }

    fn validate_rest(&self, check: &mut Check, limits: &Limits) {
        if self.secrets.len() > limits.secrets {
            check.add("spec.secrets", "TOO_LARGE", format!("more than {} secrets", limits.secrets));
        }
        for (i, secret) in self.secrets.iter().enumerate().take(limits.secrets) {
            let well_formed = secret
                .reference
                .split_once(':')
                .is_some_and(|(provider, name)| !provider.is_empty() && !name.is_empty());
            if !well_formed || secret.reference.len() > 1024 || secret.reference.chars().any(char::is_control)
            {
                check.add(format!("spec.secrets[{i}].ref"), "INVALID", "must have the form `provider:name`");
            }
            match &secret.target {
                SecretTarget::Env(name) if name.is_empty() || name.contains(['=', '\0']) => {
                    check.add(
                        format!("spec.secrets[{i}].env"),
                        "INVALID",
                        "must not be empty or contain `=` or NUL",
                    );
                }
                SecretTarget::Env(_) => {}
                SecretTarget::Path(value) => check.path(format!("spec.secrets[{i}].path"), value),
            }
        }
        if self.labels.len() > limits.labels {
            check.add("spec.labels", "TOO_LARGE", format!("more than {} labels", limits.labels));
        } else {
            for (key, value) in &self.labels {
                if key.is_empty()
                    || key.len() > 63
                    || value.len() > 255
                    || key.chars().chain(value.chars()).any(char::is_control)
                {
                    let what = format!(
                        "label {key:?}: keys have 1 to 63 bytes, values up to 255, no control characters"
                    );
                    check.add("spec.labels", "INVALID", what);
                }
            }
        }
        if let Network::Named(name) = &self.network
            && (name.is_empty() || name.len() > 63)
        {
            check.add("spec.network.named", "INVALID", "must have 1 to 63 bytes");
        }
        if let Some(size) = self.terminal
            && (size.columns == 0 || size.rows == 0)
        {
            check.add("spec.terminal", "INVALID", "columns and rows must be larger than zero");
        }
        if self.routing.sticky_key.as_ref().is_some_and(|key| key.is_empty() || key.len() > 255) {
            check.add("spec.routing.sticky_key", "INVALID", "must have 1 to 255 bytes");
        }
    }
}
