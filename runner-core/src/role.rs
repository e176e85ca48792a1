//! What a caller is to the service.

use std::{collections::BTreeSet, fmt};

use serde::{Deserialize, Serialize};

/// What a caller is to the service. One caller may be several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Has work done: runs, streams, cancels.
    Worker,
    /// Keeps the service: moves traffic, drains backends.
    Operator,
    /// Looks on.
    Viewer,
}

impl Role {
    /// All that there are.
    pub const ALL: [Self; 3] = [Self::Worker, Self::Operator, Self::Viewer];

    /// As configuration and policies write it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Operator => "operator",
            Self::Viewer => "viewer",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Names roles in a sentence.
pub fn listed(roles: &BTreeSet<Role>) -> String {
    match roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().as_slice() {
        [] => "nobody".to_owned(),
        names => names.join(", "),
    }
}
