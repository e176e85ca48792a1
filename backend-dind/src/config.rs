//! Settings of a Docker backend.

use std::{collections::BTreeMap, path::PathBuf};

use runner_agent::backend::{DefaultUser, InvalidConfig};
use runner_core::id::{BackendName, InvalidId};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::images::ImagesConfig;

/// The files of a connection by TLS, PEM all three.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// Who signs the engine's certificate.
    pub ca: PathBuf,
    /// Our certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// Settings of a Docker backend. Every field has a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DindConfig {
    /// Its name.
    #[schemars(with = "String")]
    pub name: BackendName,
    /// Where the engine listens: `unix:///PATH`, or `tcp://HOST:PORT`, with TLS where `tls` is given.
    pub host: String,
    /// For `tcp`: the files of a connection by TLS, with client certificates. A connection without it is refused unless it
    /// is to this machine: whoever can reach an engine without TLS is root on its machine.
    pub tls: Option<TlsFiles>,
    /// Largest number of attempts at once.
    pub slots: usize,
    /// Largest number of containers that are started at once. Engines collapse under parallel starts.
    pub concurrent_starts: usize,
    /// How long a request may stay without an answer, in seconds. A request that moves bytes is measured by its pauses.
    pub request_timeout_seconds: u64,
    /// How long making a workload waits for an engine that does not answer, in seconds. Observing one waits for ever.
    pub engine_patience_seconds: u64,
    /// The statically linked `runner-agent` that becomes the first process of every container. Default: `runner-agent-static`
    /// beside the service's own program, else `runner-agent` there.
    pub agent: Option<PathBuf>,
    /// The image of a spec that names none. Without it such a spec is refused.
    pub default_image: Option<String>,
    /// Which images, from where, with whose credentials, and how many of them are kept.
    pub images: ImagesConfig,
    /// The backend's own name, written once more: whoever runs it where `environment` is `production` has read `docs/dind.md`.
    #[schemars(with = "Option<String>")]
    pub acknowledged_for_production: Option<BackendName>,
    /// Whether an engine with a known escape takes no work. Where a distribution may have mended it, it does.
    pub refuse_known_escapes: bool,
    /// Who a program runs as where its spec does not say.
    pub default_user: DefaultUser,
    /// Whether a spec may ask for uid 0. It has no capabilities either way.
    pub allow_root_user: bool,
    /// The engine's network for specs that ask for `egress`, for example `bridge`. Without it they are refused.
    pub egress_network: Option<String>,
    /// Names of network policies, each with the engine's network that it means.
    pub networks: BTreeMap<String, String>,
    /// Room in `/tmp`, in `HOME`, and in `/outputs` where nothing is published from it, in bytes each. They are in memory and
    /// count towards the memory limit.
    pub scratch_bytes: u64,
}

impl Default for DindConfig {
    fn default() -> Self {
        Self {
            name: default_name(),
            host: "unix:///var/run/docker.sock".to_owned(),
            tls: None,
            slots: 16,
            concurrent_starts: 4,
            request_timeout_seconds: 60,
            engine_patience_seconds: 300,
            agent: None,
            default_image: None,
            images: ImagesConfig::default(),
            acknowledged_for_production: None,
            refuse_known_escapes: false,
            default_user: DefaultUser::default(),
            allow_root_user: false,
            egress_network: None,
            networks: BTreeMap::new(),
            scratch_bytes: 256 * 1024 * 1024,
        }
    }
}

#[allow(clippy::expect_used, reason = "a constant that the tests check")]
fn default_name() -> BackendName {
    "dind"
        .parse::<BackendName>()
        .map_err(|error: InvalidId| error.to_string())
        .expect("`dind` is a backend name")
}

impl DindConfig {
    /// Checks what can be checked without the engine.
    ///
    /// # Errors
    /// All bad fields at once.
    pub fn validate(&self) -> Result<(), Vec<InvalidConfig>> {
        let mut bad = Vec::new();
        let mut add = |field: &str, rule: &str| bad.push(InvalidConfig::new(field, rule));
        if let Some(path) = self.host.strip_prefix("unix://") {
            if !path.starts_with('/') {
                add("host", "the path of the socket must be absolute");
            }
            if self.tls.is_some() {
                add("tls", "is for tcp; a socket needs none");
            }
        } else if let Some(address) = self.host.strip_prefix("tcp://") {
            let port = address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
            if address.contains('/') || port.is_none() {
                add("host", "must be tcp://HOST:PORT");
            } else if self.tls.is_none() && !is_loopback(address) {
                add("tls", "is missing: an engine that takes requests without TLS gives its machine away");
            }
        } else {
            add("host", "must be unix:///PATH or tcp://HOST:PORT");
        }
        for (name, value) in [
            ("slots", self.slots as u64),
            ("concurrent_starts", self.concurrent_starts as u64),
            ("request_timeout_seconds", self.request_timeout_seconds),
            ("engine_patience_seconds", self.engine_patience_seconds),
            ("scratch_bytes", self.scratch_bytes),
        ] {
            if value == 0 {
                add(name, "must be larger than zero");
            }
        }
        for (field, rule) in self.images.faults() {
            add(&format!("images.{field}"), &rule);
        }
        if let Some(fault) = self.default_user.fault(self.allow_root_user) {
            add(&fault.field, &fault.rule);
        }
        if self.agent.as_ref().is_some_and(|path| !path.is_absolute()) {
            add("agent", "must be an absolute path");
        }
        for (name, network) in
            self.networks.iter().chain(self.egress_network.iter().map(|network| (network, network)))
        {
            if name.is_empty() || name.len() > 63 {
                add("networks", "a policy's name must have 1 to 63 bytes");
            }
            // `host` and `container:` would hand out the engine's or another container's network.
            if network == "host" || network.contains(':') || network.is_empty() {
                add("networks", "`host` and `container:…` are never a run's network");
            }
        }
        if bad.is_empty() { Ok(()) } else { Err(bad) }
    }
}

fn is_loopback(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_valid() {
        assert_eq!(DindConfig::default().validate(), Ok(()));
        assert_eq!(DindConfig::default().name.as_str(), "dind");
    }

    #[test]
    fn an_unknown_field_is_refused() {
        assert!(serde_json::from_str::<DindConfig>(r#"{"privileged": true}"#).is_err());
        assert_eq!(serde_json::from_str::<DindConfig>("{}").unwrap(), DindConfig::default());
    }

    #[test]
    fn an_engine_elsewhere_needs_tls_and_one_here_does_not() {
        let fields = |host: &str, tls: bool| -> Vec<String> {
            let files = TlsFiles { ca: "/a".into(), cert: "/b".into(), key: "/c".into() };
            let config =
                DindConfig { host: host.to_owned(), tls: tls.then_some(files), ..DindConfig::default() };
            config.validate().err().into_iter().flatten().map(|bad| bad.field).collect()
        };
        assert_eq!(fields("tcp://engine:2375", false), ["tls"]);
        assert!(fields("tcp://engine:2376", true).is_empty());
        for here in ["tcp://127.0.0.1:2375", "tcp://[::1]:2375", "tcp://localhost:2375"] {
            assert!(fields(here, false).is_empty(), "{here}");
        }
        assert_eq!(fields("unix:///run/x", true), ["tls"]);
        for bad in ["unix://x", "http://x", "tcp://", "tcp://x/y", "tcp://x", ""] {
            assert_eq!(fields(bad, false), ["host"], "{bad}");
        }
    }

    #[test]
    fn every_bad_field_is_told_at_once() {
        let config = DindConfig {
            slots: 0,
            concurrent_starts: 0,
            default_user: DefaultUser { uid: 0, gid: 0 },
            agent: Some("x".into()),
            egress_network: Some("host".into()),
            networks: [("lab".into(), "container:abc".into())].into(),
            ..DindConfig::default()
        };
        let fields: Vec<String> = config.validate().unwrap_err().into_iter().map(|bad| bad.field).collect();
        assert_eq!(
            fields,
            ["slots", "concurrent_starts", "default_user.uid", "agent", "networks", "networks"]
        );
    }
}
