//! Settings of images: which, from where, with whose credentials, and how many of them are kept.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ImageRefusal, reference::Reference};

/// When an image is pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Default)]
#[serde(rename_all = "kebab-case")]
pub enum PullPolicy {
    /// The registry is asked for every attempt; what it has is pulled unless the engine has it.
    Always,
    /// Where the engine does not have it.
    #[default]
    IfNotPresent,
    /// No registry is asked for anything. Whatever the engine has is for every tenant of the backend.
    Never,
}

/// What to show to a registry, and for whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RegistryLogin {
    /// The registry: `registry.example.com`, `registry.example.com:5000`, `docker.io`.
    pub registry: String,
    /// The user.
    pub username: String,
    /// The file that has the password. Read whenever it is needed, so that it can be replaced.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// The environment variable that has it. One of the two is needed.
    #[serde(default)]
    pub password_env: Option<String>,
    /// The tenants that it is for. Default: all of them.
    #[serde(default)]
    pub tenants: Vec<String>,
}

/// Settings of images. Every field has a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ImagesConfig {
    /// When an image is pulled: `always`, `if-not-present` or `never`.
    pub pull: PullPolicy,
    /// What images may be from: registries (`registry.example.com`) or parts of one (`registry.example.com/team`).
    /// Default: any.
    pub allowed: Vec<String>,
    /// Whether a reference must name a digest.
    pub require_digest: bool,
    /// What is shown to registries. The first that fits the registry and the tenant is used.
    pub logins: Vec<RegistryLogin>,
    /// A docker config file, whose entries of `auths` are for every tenant, after `logins`. Credential helpers are not run.
    pub docker_config: Option<PathBuf>,
    /// How long, in seconds, an answer of a registry counts that somebody with these credentials may have an image which
    /// the engine already has. 0: it is asked for every attempt.
    pub authorisation_seconds: u64,
    /// Largest number of pulls at once.
    pub concurrent_pulls: usize,
    /// How long a pull may go without progress, in seconds.
    pub pull_pause_seconds: u64,
    /// Where the images of the engine together are larger than this, those that no container uses are removed, the longest
    /// unused first, down to four fifths of it. Layers that images share are counted for each of them. Only images that a
    /// registry gave are removed. Default: none are.
    pub high_water_bytes: Option<u64>,
}

impl Default for ImagesConfig {
    fn default() -> Self {
        Self {
            pull: PullPolicy::default(),
            allowed: Vec::new(),
            require_digest: false,
            logins: Vec::new(),
            docker_config: None,
            authorisation_seconds: 900,
            concurrent_pulls: 3,
            pull_pause_seconds: 120,
            high_water_bytes: None,
        }
    }
}

impl ImagesConfig {
    /// What is wrong with it: (field, rule). Everything at once.
    pub fn faults(&self) -> Vec<(String, String)> {
        let mut bad = Vec::new();
        let mut add = |field: String, rule: &str| bad.push((field, rule.to_owned()));
        for (i, allowed) in self.allowed.iter().enumerate() {
            if allowed.is_empty() || allowed.contains("://") || allowed.ends_with('/') {
                add(
                    format!("allowed[{i}]"),
                    "must be a registry or a part of one, without scheme and final slash",
                );
            }
        }
        for (i, login) in self.logins.iter().enumerate() {
            if login.registry.is_empty() || login.registry.contains('/') {
                add(format!("logins[{i}].registry"), "must be a host name with an optional port");
            }
            if login.password_file.is_some() == login.password_env.is_some() {
                add(format!("logins[{i}]"), "needs one of `password_file` and `password_env`");
            }
            if login.password_file.as_ref().is_some_and(|path| !path.is_absolute()) {
                add(format!("logins[{i}].password_file"), "must be an absolute path");
            }
        }
        if self.docker_config.as_ref().is_some_and(|path| !path.is_absolute()) {
            add("docker_config".into(), "must be an absolute path");
        }
        if self.concurrent_pulls == 0 {
            add("concurrent_pulls".into(), "must be larger than zero");
        }
        if self.pull_pause_seconds == 0 {
            add("pull_pause_seconds".into(), "must be larger than zero");
        }
        if self.high_water_bytes == Some(0) {
            add("high_water_bytes".into(), "must be larger than zero; leave it out to remove nothing");
        }
        bad
    }

    /// Takes a reference apart and holds it against the policy.
    pub(crate) fn admit(&self, image: &str) -> Result<Reference, ImageRefusal> {
        let reference: Reference = image.parse().map_err(ImageRefusal::Malformed)?;
        let name = reference.name();
        let within = |allowed: &String| {
            name == *allowed || name.strip_prefix(allowed).is_some_and(|rest| rest.starts_with('/'))
        };
        if !self.allowed.is_empty() && !self.allowed.iter().any(within) {
            return Err(ImageRefusal::NotAllowed(self.allowed.join(", ")));
        }
        if self.require_digest && !reference.is_pinned() {
            return Err(ImageRefusal::NotPinned);
        }
        Ok(reference)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_valid_and_admits_any_reference() {
        let config = ImagesConfig::default();
        assert!(config.faults().is_empty());
        assert!(config.admit("busybox").is_ok());
        assert!(matches!(config.admit("Busybox"), Err(ImageRefusal::Malformed(_))));
    }

    #[test]
    fn only_what_is_allowed_is_admitted_and_a_part_of_a_word_is_not_enough() {
        let allowed = vec!["registry.example.com/team".to_owned(), "127.0.0.1:5000".to_owned()];
        let config = ImagesConfig { allowed, ..ImagesConfig::default() };
        for good in ["registry.example.com/team/a:1", "127.0.0.1:5000/x", "127.0.0.1:5000/x/y"] {
            assert!(config.admit(good).is_ok(), "{good}");
        }
        for bad in
            ["registry.example.com/teamwork/a", "registry.example.com/a", "127.0.0.1:50001/x", "busybox"]
        {
            assert!(matches!(config.admit(bad), Err(ImageRefusal::NotAllowed(_))), "{bad}");
        }
    }

    #[test]
    fn a_digest_can_be_required() {
        let config = ImagesConfig { require_digest: true, ..ImagesConfig::default() };
        assert!(matches!(config.admit("busybox:1"), Err(ImageRefusal::NotPinned)));
        assert!(config.admit(&format!("busybox@sha256:{}", "0".repeat(64))).is_ok());
    }

    #[test]
    fn every_bad_field_is_told_at_once() {
        let login = RegistryLogin {
            registry: "https://x".into(),
            username: "u".into(),
            password_file: Some("relative".into()),
            password_env: Some("X".into()),
            tenants: Vec::new(),
        };
        let config = ImagesConfig {
            allowed: vec!["https://x".into(), String::new()],
            logins: vec![login],
            docker_config: Some("relative".into()),
            concurrent_pulls: 0,
            pull_pause_seconds: 0,
            high_water_bytes: Some(0),
            ..ImagesConfig::default()
        };
        let fields: Vec<String> = config.faults().into_iter().map(|(field, _)| field).collect();
        assert_eq!(
            fields,
            [
                "allowed[0]",
                "allowed[1]",
                "logins[0].registry",
                "logins[0]",
                "logins[0].password_file",
                "docker_config",
                "concurrent_pulls",
                "pull_pause_seconds",
                "high_water_bytes",
            ]
        );
    }
}
