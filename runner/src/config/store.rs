//! The part `store`: where the state of runs is kept.

use std::path::PathBuf;

use runner_store::{PostgresOptions, postgres::check_url};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where the state of runs is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    /// A database of PostgreSQL, without the password: `postgres://user@host:port/database?sslmode=verify-full`. Its schema is made, and
    /// brought to this version, by `runner migrate`. Default: SQLite in the data directory, which the service looks after itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = &"postgres://runner@db.example.org/runner?sslmode=verify-full")]
    pub url: Option<String>,
    /// A file with the password, read at every new connection. Default: the variable `PGPASSWORD`, if it is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// A PEM file with the authorities of the server's certificate. Default: those of the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Connections to PostgreSQL: one that writes, and the others read.
    pub connections: u32,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self { url: None, password_file: None, ca_file: None, connections: 5 }
    }
}

impl StoreConfig {
    /// How the store is opened, where it is PostgreSQL.
    pub fn postgres(&self) -> Option<PostgresOptions> {
        let url = self.url.clone()?;
        let readers = usize::try_from(self.connections.saturating_sub(1)).unwrap_or(usize::MAX);
        Some(PostgresOptions {
            password_file: self.password_file.clone(),
            authorities: self.ca_file.clone(),
            readers,
            ..PostgresOptions::new(url)
        })
    }

    /// What does not fit: (key, what is wrong).
    pub(super) fn faults(&self) -> Vec<(String, String)> {
        let mut faults = Vec::new();
        if let Some(why) = self.url.as_deref().and_then(|url| check_url(url).err()) {
            faults.push(("url".to_owned(), why));
        }
        if !(2..=100).contains(&self.connections) {
            faults.push(("connections".to_owned(), "must be from 2 to 100".to_owned()));
        }
        for (key, is_set) in
            [("password_file", self.password_file.is_some()), ("ca_file", self.ca_file.is_some())]
        {
            if is_set && self.url.is_none() {
                faults.push((key.to_owned(), "is for PostgreSQL; `store.url` is not set".to_owned()));
            }
        }
        faults
    }
}
