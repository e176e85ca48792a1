//! Configuration: one tree, from defaults, file, environment and flags, in this order; validated once.
//!
//! The key `limits.log_bytes` is `log_bytes` of the table `limits` in the file (TOML, or JSON), and the variable
//! `RUNNER_LIMITS__LOG_BYTES`. Durations are texts such as `30s`, sizes are integers or texts such as `4GiB`. A list as a
//! variable is written as in the file: `RUNNER_BACKENDS='[{ kind = "local", name = "local" }]'`.

pub mod inputs;
pub mod layers;
pub mod limits;
pub mod objects;
pub mod retention;
pub mod store;
pub mod value;

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use backend_dind::DindConfig;
use backend_k8sjob::K8sJobConfig;
use backend_local::LocalConfig;
use runner_core::{id::BackendName, limits::Limits, role::Role, traffic::Policy};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::layers::{ConfigError, Layers, Loaded, Problem, Source};
use self::{
    inputs::InputsConfig,
    limits::LimitsConfig,
    objects::ObjectStoreConfig,
    retention::RetentionConfig,
    store::StoreConfig,
    value::{ByteSize, Span},
};

/// The longest time that the service may take to stop.
pub const MAX_DRAIN: Duration = Duration::from_secs(30);

/// Everything that can be configured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What this service is for.
    pub environment: Environment,
    /// Where state, logs and artifacts are kept. Default: `/var/lib/runner` for root, else `$XDG_DATA_HOME/runner` or
    /// `~/.local/share/runner`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<PathBuf>,
    /// Address of gRPC and of the blob endpoint. Loopback only, unless `unauthenticated_callers` says that others may reach it.
    #[schemars(with = "String", example = &"127.0.0.1:7600")]
    pub listen: SocketAddr,
    /// Address of `/healthz`, `/readyz` and `/metrics`. May be reached from elsewhere: there is nothing else on it.
    #[schemars(with = "String", example = &"127.0.0.1:7601")]
    pub ops_listen: SocketAddr,
    /// Address that the agents of Kubernetes backends dial. Unlike the others it may be reached from elsewhere: every call on it needs
    /// the token of a live attempt. Needed where there is such a backend.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", example = &"0.0.0.0:7602")]
    pub agent_listen: Option<SocketAddr>,
    /// Callers are not authenticated. To listen beyond loopback all the same, say that whoever reaches `listen` may run programs
    /// here, and read and write every artifact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unauthenticated_callers: Option<UnauthenticatedCallers>,
    /// What callers are who are not authenticated, that is all: `worker`, `operator`, `viewer`. The traffic's policy says which of these
    /// may name the backend of a run.
    #[schemars(with = "Vec<String>", example = &["worker"])]
    pub unauthenticated_roles: BTreeSet<Role>,
    /// The backend of runs that name none.
    #[schemars(with = "String", example = &"local")]
    pub default_backend: BackendName,
    /// Where new runs go, at the first start: from then on the store says so, and `runnerctl traffic` changes it. As in docs/cutover.md.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Map<String, serde_json::Value>>")]
    pub traffic: Option<Policy>,
    /// The backends. A list replaces the one of the layer before, whole.
    pub backends: Vec<BackendConfig>,
    /// Where the state of runs is kept.
    pub store: StoreConfig,
    /// Where artifacts and logs are kept.
    pub object_store: ObjectStoreConfig,
    /// What the service writes to standard error.
    pub log: LogConfig,
    /// What callers may cost.
    pub server: ServerConfig,
    /// How the service stops.
    pub shutdown: ShutdownConfig,
    /// Limits of runs.
    pub limits: LimitsConfig,
    /// How long what is kept.
    pub retention: RetentionConfig,
    /// What may become an input of a run.
    pub inputs: InputsConfig,
}

/// What the operator says of callers that nobody authenticates. There is nothing else to be said than this, in these words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum UnauthenticatedCallers {
    /// Something else than the service decides who reaches the port, and whoever does is trusted with everything on it.
    #[serde(rename = "whoever reaches the port is trusted")]
    Trusted,
}

impl UnauthenticatedCallers {
    /// The words, as in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Trusted => "whoever reaches the port is trusted",
        }
    }
}

/// What a service is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Environment {
    /// One person's machine.
    Dev,
    /// As production, with nothing at stake.
    Staging,
    /// Others depend on it.
    Production,
}

/// A backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum BackendConfig {
    /// Processes of this machine.
    Local(LocalConfig),
    /// Containers of a Docker Engine. Each engine is a backend; several are a pool.
    Dind(Box<DindConfig>),
    /// Jobs of a Kubernetes cluster. Each cluster, and each namespace, is a backend.
    K8sJob(Box<K8sJobConfig>),
}

impl BackendConfig {
    /// Its name.
    pub fn name(&self) -> &BackendName {
        match self {
            Self::Local(local) => &local.name,
            Self::Dind(dind) => &dind.name,
            Self::K8sJob(jobs) => &jobs.name,
        }
    }

    /// Its kind.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Local(_) => "local",
            Self::Dind(_) => "dind",
            Self::K8sJob(_) => "k8sjob",
        }
    }

    fn faults(&self) -> Vec<(String, String)> {
        match self {
            Self::Local(local) => {
                let bad = local.validate().err().unwrap_or_default();
                bad.into_iter().map(|bad| (bad.field, bad.rule)).collect()
            }
            Self::Dind(dind) => {
                let bad = dind.validate().err().unwrap_or_default();
                bad.into_iter().map(|bad| (bad.field, bad.rule)).collect()
            }
            Self::K8sJob(jobs) => {
                let bad = jobs.validate().err().unwrap_or_default();
                bad.into_iter().map(|bad| (bad.field, bad.rule)).collect()
            }
        }
    }
}

/// The form of the service's own log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Human,
    /// One object a line.
    Json,
}

/// What the service writes to standard error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LogConfig {
    /// `human` or `json`.
    pub format: LogFormat,
    /// Levels, as `info` or `info,runner_core=debug`.
    pub filter: String,
}

/// What callers may cost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServerConfig {
    /// Connections at once. Further ones wait to be accepted.
    pub max_connections: u32,
    /// Calls at once on one connection.
    pub max_streams_per_connection: u32,
    /// One request message.
    pub max_request_bytes: ByteSize,
    /// All headers of a request together.
    pub max_header_bytes: ByteSize,
    /// What may wait in memory for one reader that does not read.
    pub send_buffer_bytes: ByteSize,
    /// Time between pings on a connection that is quiet.
    pub keep_alive_interval: Span,
    /// A connection whose ping is not answered for so long is closed; so is one that takes none of what is sent.
    pub keep_alive_timeout: Span,
    /// Time that a client may take to send a request's headers, and between two pieces of an upload.
    pub read_timeout: Span,
    /// How long a signed URL is valid.
    pub grant_lifetime: Span,
    /// The largest object that one signed URL may store.
    pub max_upload_bytes: ByteSize,
    /// Disk, in the data directory, for what has come of uploads that may be resumed, all together. What does not fit must be sent
    /// in one piece.
    pub resumable_bytes: ByteSize,
    /// An upload that got nothing for so long is not resumed any more.
    pub resumable_idle: Span,
}

/// How the service stops.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ShutdownConfig {
    /// Time that calls under way get to end after the first signal. At most 30 s.
    pub drain: Span,
}

impl Default for Config {
    fn default() -> Self {
        let local = LocalConfig::default();
        Self {
            environment: Environment::Dev,
            data_dir: None,
            listen: SocketAddr::from(([127, 0, 0, 1], 7600)),
            ops_listen: SocketAddr::from(([127, 0, 0, 1], 7601)),
            agent_listen: None,
            unauthenticated_callers: None,
            unauthenticated_roles: Role::ALL.into(),
            default_backend: local.name.clone(),
            traffic: None,
            backends: vec![BackendConfig::Local(local)],
            store: StoreConfig::default(),
            object_store: ObjectStoreConfig::default(),
            log: LogConfig { format: LogFormat::Human, filter: "info".to_owned() },
            server: ServerConfig {
                max_connections: 16_384,
                max_streams_per_connection: 1024,
                max_request_bytes: ByteSize(4 << 20),
                max_header_bytes: ByteSize(16 << 10),
                send_buffer_bytes: ByteSize(64 << 10),
                keep_alive_interval: Span::secs(20),
                keep_alive_timeout: Span::secs(20),
                read_timeout: Span::secs(30),
                grant_lifetime: Span::secs(15 * 60),
                max_upload_bytes: ByteSize(1 << 40),
                resumable_bytes: ByteSize(32 << 30),
                resumable_idle: Span::secs(24 * 3600),
            },
            shutdown: ShutdownConfig { drain: Span::secs(10) },
            limits: LimitsConfig::default(),
            retention: RetentionConfig::default(),
            inputs: InputsConfig::default(),
        }
    }
}

impl Config {
    /// The data directory, with its default.
    pub fn data_dir(&self) -> PathBuf {
        self.data_dir.clone().unwrap_or_else(|| {
            default_data_dir(
                rustix::process::geteuid().is_root(),
                std::env::var_os("XDG_DATA_HOME").map(PathBuf::from),
                std::env::var_os("HOME").map(PathBuf::from),
            )
        })
    }

    /// What a spec may ask for.
    pub fn run_limits(&self) -> Limits {
        Limits { https: self.inputs.https_policy(), ..Limits::from(&self.limits) }
    }

    /// What does not fit together: (key, what is wrong). Everything at once.
    fn faults(&self) -> Vec<(String, String)> {
        let mut faults: Vec<(String, String)> = Vec::new();
        let mut add = |key: &str, message: String| faults.push((key.to_owned(), message));
        if self.backends.is_empty() {
            add("backends", "needs at least one backend".to_owned());
        }
        for (i, backend) in self.backends.iter().enumerate() {
            if self.backends[..i].iter().any(|other| other.name() == backend.name()) {
                add(&format!("backends[{i}].name"), "another backend has this name".to_owned());
            }
            for (field, rule) in backend.faults() {
                add(&format!("backends[{i}].{field}"), rule);
            }
            if matches!(backend, BackendConfig::K8sJob(_)) && self.agent_listen.is_none() {
                let rule = format!("must be set: the agents of the backend {} dial it", backend.name());
                add("agent_listen", rule);
            }
            let is_local = |backend: &BackendConfig| backend.kind() == "local";
            if is_local(backend) && self.backends[..i].iter().any(is_local) {
                let rule =
                    "another backend is `local` too, and both would keep their workloads in one directory";
                add(&format!("backends[{i}].kind"), rule.to_owned());
            }
            if let BackendConfig::Dind(dind) = backend
                && self.environment == Environment::Production
                && dind.acknowledged_for_production.as_ref() != Some(&dind.name)
            {
                let rule = format!(
                    "must be {:?} where `environment` is `production`: containers of one engine share a kernel, and \
                     whoever controls the engine controls its machine; see docs/dind.md",
                    dind.name.as_str()
                );
                add(&format!("backends[{i}].acknowledged_for_production"), rule);
            }
        }
        if !self.backends.iter().any(|backend| *backend.name() == self.default_backend) {
            let known: Vec<&str> = self.backends.iter().map(|backend| backend.name().as_str()).collect();
            add("default_backend", format!("no backend has this name; there are {}", known.join(", ")));
        }
        if let Some(policy) = &self.traffic {
            let known = self.backends.iter().map(|backend| backend.name().clone()).collect();
            let bad = policy.validate(&known).err().map(|invalid| invalid.0).unwrap_or_default();
            for violation in bad {
                add(&format!("traffic.{}", violation.field), violation.description);
            }
        }
        for (key, message) in self.store.faults() {
            add(&format!("store.{key}"), message);
        }
        for (key, message) in self.object_store.faults() {
            add(&format!("object_store.{key}"), message);
        }
        if let Err(error) = self.log.filter.parse::<tracing_subscriber::EnvFilter>() {
            add("log.filter", format!("is not a filter such as `info,runner_core=debug`: {error}"));
        }
        if self.shutdown.drain.0 > MAX_DRAIN {
            add("shutdown.drain", format!("must be at most {}", Span(MAX_DRAIN)));
        }
        if self.data_dir.as_ref().is_some_and(|dir| dir.as_os_str().is_empty()) {
            add("data_dir", "must not be empty".to_owned());
        }
        if self.listen == self.ops_listen && self.listen.port() != 0 {
            add("ops_listen", "must not be the address of `listen`".to_owned());
        }
        let server = &self.server;
        for (key, value, least, most) in [
            ("max_connections", u64::from(server.max_connections), 1, 1 << 20),
            ("max_streams_per_connection", u64::from(server.max_streams_per_connection), 1, 1 << 20),
            ("max_request_bytes", server.max_request_bytes.0, 64 << 10, 64 << 20),
            ("max_header_bytes", server.max_header_bytes.0, 8 << 10, 1 << 20),
            ("send_buffer_bytes", server.send_buffer_bytes.0, 16 << 10, 16 << 20),
            ("max_upload_bytes", server.max_upload_bytes.0, 1, u64::MAX),
        ] {
            if value < least || value > most {
                add(&format!("server.{key}"), format!("must be from {least} to {most}"));
            }
        }
        for (key, value) in [
            ("keep_alive_interval", server.keep_alive_interval),
            ("keep_alive_timeout", server.keep_alive_timeout),
            ("read_timeout", server.read_timeout),
            ("grant_lifetime", server.grant_lifetime),
            ("resumable_idle", server.resumable_idle),
        ] {
            if value < Span::secs(1) || value > Span::secs(24 * 3600) {
                add(&format!("server.{key}"), "must be from 1 s to 24 h".to_owned());
            }
        }
        if server.grant_lifetime.0 > runner_artifacts::blob::MAX_LIFETIME {
            let most = Span(runner_artifacts::blob::MAX_LIFETIME);
            add("server.grant_lifetime", format!("must be at most {most}"));
        }
        for (key, message) in self.limits.faults() {
            add(&format!("limits.{key}"), message);
        }
        for (key, message) in self.retention.faults() {
            add(&format!("retention.{key}"), message);
        }
        for (key, message) in self.inputs.faults() {
            add(&format!("inputs.{key}"), message);
        }
        faults
    }

    /// The configuration as it may be shown: without credentials.
    #[must_use]
    pub fn redacted(&self) -> Self {
        let mut shown = self.clone();
        shown.store.url = shown.store.url.map(|url| redact(&url));
        shown.object_store.url = shown.object_store.url.map(|url| redact(&url));
        shown
    }
}

/// Takes the credentials out of a URL, `scheme://user:secret@host`, and the query, which may sign something.
fn redact(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text.to_owned() };
    let authority = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, rest) = rest.split_at(authority);
    let host = authority
        .rsplit_once('@')
        .map_or_else(|| authority.to_owned(), |(_, host)| format!("REDACTED@{host}"));
    let rest = rest.split_once('?').map_or_else(|| rest.to_owned(), |(path, _)| format!("{path}?REDACTED"));
    format!("{scheme}://{host}{rest}")
}

fn default_data_dir(root: bool, xdg: Option<PathBuf>, home: Option<PathBuf>) -> PathBuf {
    if root {
        return PathBuf::from("/var/lib/runner");
    }
    match (xdg.filter(|path| path.is_absolute()), home) {
        (Some(xdg), _) => xdg.join("runner"),
        (None, Some(home)) => home.join(".local/share/runner"),
        (None, None) => Path::new("/var/lib/runner").to_owned(),
    }
}

#[cfg(test)]
mod tests;
