//! The part `inputs`: what may become an input of a run.

use std::{fs, path::PathBuf, sync::Arc};

use runner_agent::staging::StagingLimits;
use runner_core::https::{AddressRange, HostPattern, HttpsPolicy};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::value::{ByteSize, Span};

/// What may become an input of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InputsConfig {
    /// All inputs of a run together, unpacked.
    pub max_bytes: ByteSize,
    /// Files and directories of all inputs of a run together.
    pub max_entries: u64,
    /// How many times its own size, and 64 MiB, an archive may unpack to.
    pub archive_ratio: u64,
    /// Inputs by `https`.
    pub https: HttpsConfig,
}

/// Whether and how inputs are fetched by `https`. Nothing that identifies the service or the caller is sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HttpsConfig {
    /// Hosts that inputs may come from: `HOST`, or `*.DOMAIN` for every name below a domain, with `:PORT` where that is not
    /// 443. Empty: none.
    #[schemars(example = &["data.example.org", "*.mirror.example.org:8443"])]
    pub hosts: Vec<String>,
    /// Addresses that may be asked though they are not of the public internet, as `10.1.0.0/16`. Loopback, link-local
    /// (which serves credentials in clouds) and private addresses are refused otherwise, whatever name leads to them.
    pub allow_addresses: Vec<String>,
    /// One input.
    pub max_bytes: ByteSize,
    /// Redirects of one input. Each is checked like the first URL.
    pub max_redirects: u32,
    /// Time to resolve a name, and to connect.
    pub connect_timeout: Span,
    /// Time without a byte.
    pub stall_timeout: Span,
    /// Time for one input.
    pub timeout: Span,
    /// Certificates to trust beside the machine's own: a file of PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
}

impl Default for InputsConfig {
    fn default() -> Self {
        let StagingLimits { input_bytes, input_entries, archive_ratio, .. } = StagingLimits::default();
        let HttpsPolicy {
            hosts,
            allow_addresses,
            max_bytes,
            max_redirects,
            connect_timeout,
            stall_timeout,
            timeout,
            ca_pem: _,
            bundled_roots: _,
        } = HttpsPolicy::default();
        Self {
            max_bytes: ByteSize(input_bytes),
            max_entries: input_entries,
            archive_ratio,
            https: HttpsConfig {
                hosts: hosts.iter().map(ToString::to_string).collect(),
                allow_addresses: allow_addresses.iter().map(ToString::to_string).collect(),
                max_bytes: ByteSize(max_bytes),
                max_redirects,
                connect_timeout: Span(connect_timeout),
                stall_timeout: Span(stall_timeout),
                timeout: Span(timeout),
                ca_file: None,
            },
        }
    }
}

impl InputsConfig {
    /// What does not fit together: (key below `inputs`, what is wrong).
    pub(super) fn faults(&self) -> Vec<(String, String)> {
        let https = &self.https;
        let mut faults = Vec::new();
        for (i, host) in https.hosts.iter().enumerate() {
            if let Err(error) = host.parse::<HostPattern>() {
                faults.push((format!("https.hosts[{i}]"), error.to_string()));
            }
        }
        for (i, range) in https.allow_addresses.iter().enumerate() {
            if let Err(error) = range.parse::<AddressRange>() {
                faults.push((format!("https.allow_addresses[{i}]"), error.to_string()));
            }
        }
        for (key, value) in [
            ("connect_timeout", https.connect_timeout),
            ("stall_timeout", https.stall_timeout),
            ("timeout", https.timeout),
        ] {
            if value < Span::secs(1) || value > Span::secs(24 * 3600) {
                faults.push((format!("https.{key}"), "must be from 1 s to 24 h".to_owned()));
            }
        }
        if https.max_redirects > 20 {
            faults.push(("https.max_redirects".to_owned(), "must be at most 20".to_owned()));
        }
        for (key, value) in [
            ("max_bytes", self.max_bytes.0),
            ("max_entries", self.max_entries),
            ("archive_ratio", self.archive_ratio),
        ] {
            if value == 0 {
                faults.push((key.to_owned(), "must be larger than zero".to_owned()));
            }
        }
        if https.ca_file.is_some()
            && let Err(what) = self.read_ca()
        {
            faults.push(("https.ca_file".to_owned(), what));
        }
        faults
    }

    fn read_ca(&self) -> Result<Option<Arc<str>>, String> {
        let Some(path) = &self.https.ca_file else { return Ok(None) };
        let pem = fs::read_to_string(path).map_err(|error| format!("read {}: {error}", path.display()))?;
        if pem.contains("-----BEGIN CERTIFICATE-----") {
            Ok(Some(pem.into()))
        } else {
            Err(format!("{} has no certificate in it", path.display()))
        }
    }

    /// The policy of inputs by `https`. What is not valid is left out; a configuration that was loaded has nothing such.
    pub fn https_policy(&self) -> HttpsPolicy {
        let https = &self.https;
        HttpsPolicy {
            hosts: https.hosts.iter().filter_map(|host| host.parse().ok()).collect(),
            allow_addresses: https.allow_addresses.iter().filter_map(|range| range.parse().ok()).collect(),
            max_bytes: https.max_bytes.0,
            max_redirects: https.max_redirects,
            connect_timeout: https.connect_timeout.0,
            stall_timeout: https.stall_timeout.0,
            timeout: https.timeout.0,
            ca_pem: self.read_ca().unwrap_or_default(),
            bundled_roots: false,
        }
    }

    /// The caps on staging.
    pub fn staging_limits(&self) -> StagingLimits {
        StagingLimits {
            input_bytes: self.max_bytes.0,
            input_entries: self.max_entries,
            archive_ratio: self.archive_ratio,
            https: self.https_policy(),
            ..StagingLimits::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_those_of_the_library() {
        assert_eq!(InputsConfig::default().staging_limits(), StagingLimits::default());
        assert_eq!(InputsConfig::default().faults(), []);
    }

    #[test]
    fn every_bad_key_is_named() {
        let mut config = InputsConfig { archive_ratio: 0, ..InputsConfig::default() };
        config.https.hosts = vec!["good.example".into(), "https://bad".into()];
        config.https.allow_addresses = vec!["10.0.0.0/40".into()];
        config.https.timeout = Span::secs(0);
        config.https.max_redirects = 21;
        config.https.ca_file = Some("/nowhere/ca.pem".into());
        let keys: Vec<String> = config.faults().into_iter().map(|(key, _)| key).collect();
        assert_eq!(
            keys,
            [
                "https.hosts[1]",
                "https.allow_addresses[0]",
                "https.timeout",
                "https.max_redirects",
                "archive_ratio",
                "https.ca_file"
            ]
        );
    }
}
