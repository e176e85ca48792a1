//! What can be chosen, and what a URL of a database may say.

use std::{path::PathBuf, str::FromStr as _, time::Duration};

use tokio_postgres::{
    Config,
    config::{Host, SslMode},
};

/// The variable that has the password, where no file does: the one that PostgreSQL's own tools read.
const PASSWORD_VARIABLE: &str = "PGPASSWORD";

/// How a store on PostgreSQL is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PostgresOptions {
    /// `postgres://user@host:port/database?sslmode=verify-full`. See [`check_url`].
    pub url: String,
    /// A file with the password, read at every new connection. `None`: the variable `PGPASSWORD`; where that is not set either, the
    /// server is to ask for none.
    pub password_file: Option<PathBuf>,
    /// A PEM file with the authorities that the server's certificate may come from. `None`: the machine's.
    pub authorities: Option<PathBuf>,
    /// How many verbs read at once, each on a connection of its own. At least 1. One more connection writes.
    pub readers: usize,
    /// Longest time that opening the store waits for another service to let go of the schema.
    pub wait_for_other: Duration,
}

impl PostgresOptions {
    /// For a database, with what else there is as it is best for most.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            password_file: None,
            authorities: None,
            readers: 4,
            wait_for_other: Duration::from_secs(10),
        }
    }

    /// The variable's value, where it counts.
    pub(crate) fn password_from_environment() -> Option<String> {
        std::env::var(PASSWORD_VARIABLE).ok().filter(|password| !password.is_empty())
    }
}

/// Whether a URL can be used; else why not. What is wrong is said without the URL: somebody may have put a password into it.
///
/// - It has the form that PostgreSQL's own tools read, without a password.
/// - `sslmode` is `disable`, or one of `require`, `verify-ca` and `verify-full`, which all mean the last: a session with whoever
///   answers is no safer than none. Without it, `verify-full`, or `disable` where the server is on this machine.
///
/// # Errors
/// The reason, for people.
pub fn check_url(url: &str) -> Result<(), String> {
    parse(url).map(|_| ())
}

/// A URL's meaning.
pub(crate) fn parse(url: &str) -> Result<Config, String> {
    if !["postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme)) {
        return Err("must be a URL: `postgres://user@host/database`".to_owned());
    }
    let (base, query) = url.split_once('?').unwrap_or((url, ""));
    let mut mode = None;
    let mut rest: Vec<&str> = Vec::new();
    for part in query.split('&').filter(|part| !part.is_empty()) {
        match part.split_once('=') {
            Some(("sslmode", value)) => mode = Some(value),
            Some(("sslrootcert" | "sslcert" | "sslkey", _)) => {
                return Err(
                    "authorities are named by `ca_file`, and there are no certificates of clients".to_owned()
                );
            }
            Some(("password", _)) => return Err("must not have a password".to_owned()),
            _ => rest.push(part),
        }
    }
    let plain = if rest.is_empty() { base.to_owned() } else { format!("{base}?{}", rest.join("&")) };
    // Its own words could quote the URL.
    let mut config = Config::from_str(&plain).map_err(|_| "is not a URL of a database".to_owned())?;
    if config.get_password().is_some() {
        return Err("must not have a password: it belongs into a file, or into PGPASSWORD".to_owned());
    }
    if config.get_hosts().is_empty() {
        return Err("names no host".to_owned());
    }
    let here = config.get_hosts().iter().all(|host| match host {
        Host::Tcp(name) => {
            name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
        }
        Host::Unix(_) => true,
    });
    config.ssl_mode(match mode {
        Some("disable") => SslMode::Disable,
        Some("require" | "verify-ca" | "verify-full") => SslMode::Require,
        None if here => SslMode::Disable,
        None => SslMode::Require,
        Some(_) => return Err("has an `sslmode` other than `disable` and `verify-full`".to_owned()),
    });
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tls_is_left_out_only_on_this_machine_or_where_that_is_said() {
        let mode = |url: &str| parse(url).unwrap().get_ssl_mode();
        assert_eq!(mode("postgres://u@127.0.0.1/d"), SslMode::Disable);
        assert_eq!(mode("postgres://u@localhost/d"), SslMode::Disable);
        assert_eq!(mode("postgres://u@%2Frun%2Fpostgresql/d"), SslMode::Disable);
        assert_eq!(mode("postgres://u@127.0.0.1/d?sslmode=verify-full"), SslMode::Require);
        assert_eq!(mode("postgresql://u@db.example.org/d"), SslMode::Require);
        assert_eq!(mode("postgres://u@127.0.0.1,db.example.org/d"), SslMode::Require);
        assert_eq!(mode("postgres://u@db.example.org/d?sslmode=disable&connect_timeout=3"), SslMode::Disable);
    }

    #[test]
    fn what_is_refused_is_refused_without_repeating_it() {
        for url in [
            "postgres://u:hunter2@h/d",
            "postgres://u@h/d?password=hunter2",
            "mysql://u:hunter2@h/d",
            "postgres://u:hunter2@h:port/d",
            "postgres://u@h/d?hunter2=1",
            "postgres://u@h/d?sslmode=hunter2",
            "postgres:///d?user=hunter2",
            "postgres://u@h/d?sslmode=prefer",
            "postgres://u@h/d?sslrootcert=hunter2",
        ] {
            let why = check_url(url).unwrap_err();
            assert!(!why.contains("hunter2"), "{why}");
        }
    }
}
