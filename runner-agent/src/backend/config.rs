//! Settings that every backend has.

use runner_core::spec::User;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Who a program runs as where its spec does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DefaultUser {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl Default for DefaultUser {
    /// 65532, which distributions and images call `nonroot` or not at all: nothing of a machine belongs to it.
    fn default() -> Self {
        Self { uid: 65532, gid: 65532 }
    }
}

impl From<DefaultUser> for User {
    fn from(user: DefaultUser) -> Self {
        Self { uid: user.uid, gid: user.gid }
    }
}

impl DefaultUser {
    /// What of a backend's settings is wrong with it: root, where a spec may not ask for root either.
    pub fn fault(self, allow_root_user: bool) -> Option<InvalidConfig> {
        (self.uid == 0 && !allow_root_user)
            .then(|| InvalidConfig::new("default_user.uid", "is 0, which needs `allow_root_user = true`"))
    }
}

/// A setting that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {rule}")]
pub struct InvalidConfig {
    /// The field, for example `tls.key`.
    pub field: String,
    /// What it breaks, and what to do.
    pub rule: String,
}

impl InvalidConfig {
    /// One fault of one field.
    pub fn new(field: impl Into<String>, rule: impl Into<String>) -> Self {
        Self { field: field.into(), rule: rule.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_by_default_needs_that_root_is_allowed() {
        let root = DefaultUser { uid: 0, gid: 5 };
        assert_eq!(root.fault(false).map(|fault| fault.field).as_deref(), Some("default_user.uid"));
        assert_eq!((root.fault(true), DefaultUser::default().fault(false)), (None, None));
    }
}
