//! A pleasant way to write a spec.

use std::{collections::HashMap, time::Duration};

use bytes::Bytes;
use runner_proto::v1 as proto;

use crate::convert;

/// What to run. Built step by step; every step that is left out means the service's default.
///
/// ```
/// use std::time::Duration;
/// use worker_client::RunSpec;
///
/// let spec = RunSpec::command(["sh", "-c", "wc -c < /inputs/text > /outputs/count"])
///     .env("LANG", "C")
///     .input_bytes("/inputs/text", "some text")
///     .output("/outputs/count")
///     .memory_bytes(256 << 20)
///     .timeout(Duration::from_secs(30))
///     .label("team", "docs");
/// assert_eq!(spec.as_proto().command[0], "sh");
/// ```
#[derive(Debug, Clone, PartialEq, Default)]
#[must_use = "a spec does nothing until it is given to `Client::run`"]
pub struct RunSpec {
    proto: proto::RunSpec,
}

impl RunSpec {
    /// A program and its arguments, in place of whatever the image would start.
    pub fn command<I, S>(command: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        let mut spec = Self::default();
        spec.proto.command = command.into_iter().map(Into::into).collect();
        spec
    }

    /// An image with its own program. [`RunSpec::args`] gives it arguments.
    pub fn from_image(image: impl Into<String>) -> Self {
        Self::default().image(image)
    }

    /// The image. Which names are valid depends on the backend.
    pub fn image(mut self, image: impl Into<String>) -> Self {
        self.proto.image = image.into();
        self
    }

    /// Arguments of the program, in place of the image's own.
    pub fn args<I, S>(mut self, args: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        self.proto.args = args.into_iter().map(Into::into).collect();
        self
    }

    /// One environment variable. Stored in clear: a credential belongs into [`RunSpec::secret_env`].
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.proto.env.insert(name.into(), value.into());
        self
    }

    /// Makes a secret's value appear as an environment variable. `reference` has the form `provider:name`.
    pub fn secret_env(mut self, name: impl Into<String>, reference: impl Into<String>) -> Self {
        let target = Some(proto::secret_ref::Target::Env(name.into()));
        self.proto.secrets.push(proto::SecretRef { r#ref: reference.into(), target });
        self
    }

    /// Makes a secret's value appear as a file.
    pub fn secret_file(mut self, path: impl Into<String>, reference: impl Into<String>) -> Self {
        let target = Some(proto::secret_ref::Target::Path(path.into()));
        self.proto.secrets.push(proto::SecretRef { r#ref: reference.into(), target });
        self
    }

    /// The program's working directory. Absolute.
    pub fn working_dir(mut self, dir: impl Into<String>) -> Self {
        self.proto.working_dir = dir.into();
        self
    }

    /// An artifact that lies at `path` before the program starts; `uri` is for example what
    /// [`Client::upload_file`](crate::Client::upload_file) answered.
    pub fn input(self, path: impl Into<String>, uri: impl Into<String>) -> Self {
        self.input_spec(proto::Input {
            path: path.into(),
            source: Some(proto::input::Source::Uri(uri.into())),
            ..proto::Input::default()
        })
    }

    /// What another run stored: the file or directory that lay at `output` in the run `run_id`, which must have succeeded.
    /// An empty `output` means all of them, each at its own path below `path`.
    pub fn input_from_run(
        self,
        path: impl Into<String>,
        run_id: impl std::fmt::Display,
        output: impl std::fmt::Display,
    ) -> Self {
        self.input(path, format!("run:{run_id}{output}"))
    }

    /// A file of an allowed host. `sha256` is in lower-case hex.
    pub fn input_https(
        self,
        path: impl Into<String>,
        url: impl Into<String>,
        sha256: impl Into<String>,
    ) -> Self {
        self.input_spec(proto::Input {
            path: path.into(),
            source: Some(proto::input::Source::Uri(url.into())),
            sha256: sha256.into(),
            ..proto::Input::default()
        })
    }

    /// An archive that is unpacked at `path`, which becomes a directory, before the program starts.
    pub fn input_archive(
        self,
        path: impl Into<String>,
        uri: impl Into<String>,
        format: proto::Archive,
    ) -> Self {
        self.input_spec(proto::Input {
            path: path.into(),
            source: Some(proto::input::Source::Uri(uri.into())),
            extract: format.into(),
            ..proto::Input::default()
        })
    }

    /// Small contents that lie at `path` before the program starts.
    pub fn input_bytes(self, path: impl Into<String>, contents: impl Into<Bytes>) -> Self {
        self.input_spec(proto::Input {
            path: path.into(),
            source: Some(proto::input::Source::Inline(contents.into())),
            ..proto::Input::default()
        })
    }

    /// An input with every field in the caller's hand.
    pub fn input_spec(mut self, input: proto::Input) -> Self {
        self.proto.inputs.push(input);
        self
    }

    /// A file or directory that is stored when the program has ended. A run that succeeds has it.
    pub fn output(self, path: impl Into<String>) -> Self {
        self.output_spec(proto::Output { path: path.into(), required: true, ..proto::Output::default() })
    }

    /// Like [`RunSpec::output`], but its absence is not a failure.
    pub fn optional_output(self, path: impl Into<String>) -> Self {
        self.output_spec(proto::Output { path: path.into(), ..proto::Output::default() })
    }

    /// What a pattern matches when the program has ended; see `Output.glob` of the contract. A run that succeeds has at
    /// least one match.
    pub fn output_glob(self, pattern: impl Into<String>) -> Self {
        self.output_spec(proto::Output {
            path: pattern.into(),
            glob: true,
            required: true,
            ..proto::Output::default()
        })
    }

    /// Like [`RunSpec::output_glob`], but no match is not a failure.
    pub fn optional_output_glob(self, pattern: impl Into<String>) -> Self {
        self.output_spec(proto::Output { path: pattern.into(), glob: true, ..proto::Output::default() })
    }

    /// An output with every field in the caller's hand.
    pub fn output_spec(mut self, output: proto::Output) -> Self {
        self.proto.outputs.push(output);
        self
    }

    fn resources(&mut self) -> &mut proto::Resources {
        self.proto.resources.get_or_insert_default()
    }

    /// Thousandths of a core.
    pub fn cpu_millis(mut self, millis: u32) -> Self {
        self.resources().cpu_millis = millis;
        self
    }

    /// Memory limit in bytes.
    pub fn memory_bytes(mut self, bytes: u64) -> Self {
        self.resources().memory_bytes = bytes;
        self
    }

    /// Largest number of processes and threads.
    pub fn pids(mut self, pids: u32) -> Self {
        self.resources().pids = pids;
        self
    }

    /// Largest size of any one file that the program writes, in bytes.
    pub fn file_size_bytes(mut self, bytes: u64) -> Self {
        self.resources().file_size_bytes = bytes;
        self
    }

    /// Disk that the program may fill, in bytes.
    pub fn ephemeral_storage_bytes(mut self, bytes: u64) -> Self {
        self.resources().ephemeral_storage_bytes = bytes;
        self
    }

    /// A named set of resources of the service's configuration.
    pub fn resource_profile(mut self, name: impl Into<String>) -> Self {
        self.resources().profile = name.into();
        self
    }

    fn network(mut self, policy: proto::network::Policy) -> Self {
        self.proto.network = Some(proto::Network { policy: Some(policy) });
        self
    }

    /// No network but the program's own loopback. The default, said aloud.
    pub fn network_none(self) -> Self {
        self.network(proto::network::Policy::None(true))
    }

    /// What the backend's egress policy allows.
    pub fn network_egress(self) -> Self {
        self.network(proto::network::Policy::Egress(true))
    }

    /// A network policy that the service's configuration names.
    pub fn network_named(self, name: impl Into<String>) -> Self {
        self.network(proto::network::Policy::Named(name.into()))
    }

    /// `UID` or `UID:GID`.
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.proto.user = user.into();
        self
    }

    /// The program cannot write to its root file system.
    pub fn read_only_root(mut self) -> Self {
        self.proto.read_only_root = true;
        self
    }

    /// Wall time that the program may take.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.proto.timeout = Some(convert::duration_to_proto(timeout));
        self
    }

    /// Time between the request to stop and its enforcement.
    pub fn stop_grace(mut self, grace: Duration) -> Self {
        self.proto.stop_grace = Some(convert::duration_to_proto(grace));
        self
    }

    /// Largest number of attempts, and the wait before the second.
    pub fn retries(mut self, max_attempts: u32, initial_backoff: Duration) -> Self {
        let retry = self.proto.retry.get_or_insert_default();
        retry.max_attempts = max_attempts;
        retry.initial_backoff = Some(convert::duration_to_proto(initial_backoff));
        self
    }

    /// The retry policy, with every field in the caller's hand.
    pub fn retry_policy(mut self, policy: proto::RetryPolicy) -> Self {
        self.proto.retry = Some(policy);
        self
    }

    /// Running it twice is harmless, so that it may be tried again after it was lost.
    pub fn idempotent(mut self) -> Self {
        self.proto.idempotent = true;
        self
    }

    /// Gives the program a terminal of this size, with input by [`Client::attach`](crate::Client::attach).
    pub fn terminal(mut self, columns: u32, rows: u32) -> Self {
        self.proto.terminal = Some(proto::Terminal { columns, rows });
        self
    }

    /// Keeps standard input open for [`Client::attach`](crate::Client::attach).
    pub fn stdin(mut self) -> Self {
        self.proto.stdin = true;
        self
    }

    /// One label.
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.proto.labels.insert(key.into(), value.into());
        self
    }

    /// Many labels.
    pub fn labels(mut self, labels: HashMap<String, String>) -> Self {
        self.proto.labels.extend(labels);
        self
    }

    /// Names the backend.
    pub fn backend(mut self, name: impl Into<String>) -> Self {
        self.proto.routing.get_or_insert_default().backend = name.into();
        self
    }

    /// Runs with the same key go to the same side of a split of traffic.
    pub fn sticky_key(mut self, key: impl Into<String>) -> Self {
        self.proto.routing.get_or_insert_default().sticky_key = key.into();
        self
    }

    /// The message as it goes over the wire.
    pub fn as_proto(&self) -> &proto::RunSpec {
        &self.proto
    }
}

impl From<RunSpec> for proto::RunSpec {
    fn from(spec: RunSpec) -> Self {
        spec.proto
    }
}

impl From<proto::RunSpec> for RunSpec {
    fn from(proto: proto::RunSpec) -> Self {
        Self { proto }
    }
}
