//! Who calls. The one place that authentication will replace.
//!
//! Callers are not authenticated yet: everyone who reaches the port is the tenant `default`. That is why the service
//! refuses to listen beyond loopback, unless the operator says in words that whoever reaches the port is trusted; see
//! [`reachable`].

use std::{collections::BTreeSet, net::SocketAddr};

use runner_core::{id::TenantId, role::Role, service::Caller};

use crate::config::UnauthenticatedCallers;

/// The tenant of every caller, as long as callers are not told apart.
const TENANT: &str = "default";

/// Tells callers apart.
#[derive(Debug, Clone)]
pub struct Authenticator {
    caller: Caller,
}

impl Authenticator {
    /// Takes everybody for the one tenant that there is, with these roles.
    #[allow(clippy::expect_used, reason = "a constant that a test checks")]
    pub fn unauthenticated(roles: BTreeSet<Role>) -> Self {
        let tenant: TenantId = TENANT.parse().expect("the default tenant's name is valid");
        Self { caller: Caller { tenant, subject: "anonymous".to_owned(), roles } }
    }

    /// The caller of a request.
    pub fn caller(&self) -> &Caller {
        &self.caller
    }
}

/// The service would be open to whoever reaches the address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "refusing to listen on {address} ({key}): callers are not authenticated, so whoever reaches that address could run \
     programs here. Listen on a loopback address such as 127.0.0.1:{} and reach it through a tunnel; or, where something else \
     decides who reaches the port, set unauthenticated_callers = {:?}",
    address.port(),
    UnauthenticatedCallers::Trusted.as_str()
)]
pub struct BeyondLoopback {
    /// The configuration's key.
    pub key: &'static str,
    /// The address.
    pub address: SocketAddr,
}

/// Refuses an address that others can reach, unless the operator says that they are trusted.
///
/// # Errors
/// Where the address is not loopback, and nobody said so.
pub fn reachable(
    key: &'static str,
    address: SocketAddr,
    callers: Option<UnauthenticatedCallers>,
) -> Result<(), BeyondLoopback> {
    // `::ffff:127.0.0.1` is loopback, too.
    let loopback = address.ip().to_canonical().is_loopback();
    match callers {
        Some(UnauthenticatedCallers::Trusted) => Ok(()),
        None if loopback => Ok(()),
        None => Err(BeyondLoopback { key, address }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_pass_only_where_the_operator_says_so() {
        let trusted = Some(UnauthenticatedCallers::Trusted);
        for good in ["127.0.0.1:7600", "127.9.9.9:1", "[::1]:7600", "[::ffff:127.0.0.1]:7600"] {
            reachable("listen", good.parse().unwrap(), None).unwrap();
            reachable("listen", good.parse().unwrap(), trusted).unwrap();
        }
        for bad in ["0.0.0.0:7600", "[::]:7600", "192.0.2.1:7600", "[::ffff:192.0.2.1]:1"] {
            let error = reachable("listen", bad.parse().unwrap(), None).unwrap_err();
            assert!(error.to_string().contains(bad), "{error}");
            assert!(
                error
                    .to_string()
                    .contains("unauthenticated_callers = \"whoever reaches the port is trusted\""),
                "{error}"
            );
            reachable("listen", bad.parse().unwrap(), trusted).unwrap();
        }
    }

    #[test]
    fn the_default_tenant_is_valid() {
        assert_eq!(Authenticator::unauthenticated(Role::ALL.into()).caller().tenant.as_str(), TENANT);
    }
}
