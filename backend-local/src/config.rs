//! Settings of a local backend.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use runner_agent::backend::{DefaultUser, InvalidConfig};
use runner_core::id::{BackendName, InvalidId};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The image that stands for the machine's own root file system. Always there, and the default.
pub const HOST_IMAGE: &str = "host";

/// Settings of a local backend. Every field has a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LocalConfig {
    /// Its name.
    #[schemars(with = "String")]
    pub name: BackendName,
    /// Largest number of attempts at once. Default: two for each core, at least four.
    pub slots: Option<usize>,
    /// The `runner-agent` program. Default: the one beside the service's own program.
    pub agent: Option<PathBuf>,
    /// Image names, each with the directory that an image was unpacked into. `host` is built in.
    pub images: BTreeMap<String, PathBuf>,
    /// Who a program runs as where its spec does not say.
    pub default_user: DefaultUser,
    /// Whether a spec may ask for uid 0.
    pub allow_root_user: bool,
    /// Directories of the machine that appear empty to programs of the image `host`; the service's data directory always
    /// does. Default: the home directory of the service's user where that is not root, because programs then have the
    /// same rights to it.
    pub hidden: Option<Vec<PathBuf>>,
    /// The control group below which each attempt gets its own, as a path below the mount of each hierarchy. Default: the
    /// service's own group; with version 2 also the group above it, where the service's own may have no children.
    pub cgroup_parent: Option<String>,
    /// Whether a memory limit may be set where no control group can set it: then each process has it for its own address
    /// space, and passing it is a failed allocation, not `OOM_KILLED`. Else such a spec is refused.
    pub memory_by_rlimit: bool,
    /// Whether a spec may ask for the network `egress`, which is the machine's own network here.
    pub egress: bool,
    /// Names of network policies that mean the machine's own network.
    pub host_networks: Vec<String>,
}

impl Default for LocalConfig {
    fn default() -> Self {
        Self {
            name: default_name(),
            slots: None,
            agent: None,
            images: BTreeMap::new(),
            default_user: DefaultUser::default(),
            allow_root_user: false,
            hidden: None,
            cgroup_parent: None,
            memory_by_rlimit: false,
            egress: true,
            host_networks: Vec::new(),
        }
    }
}

#[allow(clippy::expect_used, reason = "a constant that the tests check")]
fn default_name() -> BackendName {
    "local"
        .parse::<BackendName>()
        .map_err(|error: InvalidId| error.to_string())
        .expect("`local` is a backend name")
}

impl LocalConfig {
    /// Checks what can be checked without the machine.
    ///
    /// # Errors
    /// All bad fields at once.
    pub fn validate(&self) -> Result<(), Vec<InvalidConfig>> {
        let mut bad = Vec::new();
        let mut add = |field: String, rule: &str| bad.push(InvalidConfig::new(field, rule));
        if self.slots == Some(0) {
            add("slots".into(), "must be larger than zero; leave it out for the default");
        }
        for (name, root) in &self.images {
            let field = || format!("images.{name}");
            if name == HOST_IMAGE {
                add(field(), "`host` is built in; choose another name");
            } else if name.is_empty() || name.chars().any(|c| c.is_control() || c.is_whitespace()) {
                add(field(), "an image name has no white space and no control character");
            }
            if !is_normal(root) || root == Path::new("/") {
                add(
                    field(),
                    "must be an absolute path without `..`, and not the root itself; that is `host`",
                );
            }
        }
        if let Some(fault) = self.default_user.fault(self.allow_root_user) {
            add(fault.field, &fault.rule);
        }
        for (i, path) in self.hidden.iter().flatten().enumerate() {
            if !is_normal(path) || path == Path::new("/") {
                add(format!("hidden[{i}]"), "must be an absolute path without `..`, and not the root");
            }
        }
        if self.agent.as_ref().is_some_and(|path| !path.is_absolute()) {
            add("agent".into(), "must be an absolute path");
        }
        if self.cgroup_parent.as_ref().is_some_and(|path| !is_normal(Path::new(path))) {
            add("cgroup_parent".into(), "must be an absolute path without `..`, below the hierarchy's mount");
        }
        for (i, name) in self.host_networks.iter().enumerate() {
            if name.is_empty() || name.len() > 63 {
                add(format!("host_networks[{i}]"), "must have 1 to 63 bytes");
            }
        }
        if bad.is_empty() { Ok(()) } else { Err(bad) }
    }

    /// The number of slots.
    pub fn effective_slots(&self) -> usize {
        self.slots.unwrap_or_else(|| {
            let cores = std::thread::available_parallelism().map_or(2, usize::from);
            (cores * 2).max(4)
        })
    }
}

/// Whether a path is absolute and has only plain names.
fn is_normal(path: &Path) -> bool {
    use std::path::Component;
    path.is_absolute()
        && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_valid() {
        let config = LocalConfig::default();
        assert_eq!(config.validate(), Ok(()));
        assert!(config.effective_slots() >= 4);
        assert_eq!(config.name.as_str(), "local");
    }

    #[test]
    fn an_unknown_field_is_refused() {
        assert!(serde_json::from_str::<LocalConfig>(r#"{"slot": 3}"#).is_err());
        assert_eq!(serde_json::from_str::<LocalConfig>("{}").unwrap(), LocalConfig::default());
    }

    #[test]
    fn every_bad_field_is_told_at_once() {
        let config = LocalConfig {
            slots: Some(0),
            agent: Some("runner-agent".into()),
            images: [
                ("host".into(), "/srv/host".into()),
                ("a b".into(), "relative".into()),
                ("up".into(), "/a/../b".into()),
            ]
            .into(),
            default_user: DefaultUser { uid: 0, gid: 0 },
            hidden: Some(vec!["/".into()]),
            cgroup_parent: Some("../x".into()),
            host_networks: vec![String::new()],
            ..LocalConfig::default()
        };
        let fields: Vec<String> = config.validate().unwrap_err().into_iter().map(|bad| bad.field).collect();
        let expected = [
            "slots",
            "images.a b",
            "images.a b",
            "images.host",
            "images.up",
            "default_user.uid",
            "hidden[0]",
            "agent",
            "cgroup_parent",
            "host_networks[0]",
        ];
        assert_eq!(fields, expected);
    }
}
