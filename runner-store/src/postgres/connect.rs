//! How connections are made, and what each is told.

use std::{
    collections::HashMap,
    fs,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use runner_core::{
    store::StoreError,
    task::{TaskKind, spawn},
};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config, NoTls, Row, Statement, config::SslMode, types::ToSql};

use super::{
    error::{Fault, PostgresError, connect_error},
    options::{PostgresOptions, parse},
    tls::Tls,
};

/// One address, and all of them together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const CONNECT_TIMEOUT_ALL: Duration = Duration::from_secs(8);
/// A peer that does not answer for so long is gone. The server is told the same of us: the lock is to be free soon.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_TRIES: u32 = 3;
/// Half of the lock's name: the bytes say `rnnr`. The other half is the schema's name.
pub(crate) const LOCK: i32 = 0x726e_6e72;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Writes, and holds the lock.
    Writer,
    /// Reads.
    Reader,
    /// Changes the schema.
    Migrator,
}

impl Role {
    /// Settings of the session. The URL's own come after these, and win.
    fn settings(self) -> String {
        let own = match self {
            Self::Writer => {
                "-c statement_timeout=10s -c lock_timeout=5s -c idle_in_transaction_session_timeout=15s"
            }
            // A listing's plan depends on what is asked for.
            Self::Reader => {
                "-c statement_timeout=10s -c lock_timeout=5s -c idle_in_transaction_session_timeout=15s \
                 -c plan_cache_mode=force_custom_plan"
            }
            // An index may take long to build.
            Self::Migrator => {
                "-c statement_timeout=0 -c lock_timeout=60s -c idle_in_transaction_session_timeout=60s"
            }
        };
        format!(
            "-c jit=off -c client_min_messages=warning -c tcp_keepalives_idle={} -c tcp_keepalives_interval={} \
             -c tcp_keepalives_count={KEEPALIVE_TRIES} {own}",
            KEEPALIVE_IDLE.as_secs(),
            KEEPALIVE_INTERVAL.as_secs(),
        )
    }

    const fn application(self) -> &'static str {
        match self {
            Self::Writer => "runner",
            Self::Reader => "runner-reader",
            Self::Migrator => "runner-migrate",
        }
    }
}

/// Makes connections to one database.
pub(crate) struct Connector {
    config: Config,
    password_file: Option<std::path::PathBuf>,
    password: Option<String>,
    /// `None`: without TLS.
    tls: Option<Tls>,
}

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Nothing that could have a password.
        f.debug_struct("Connector").field("hosts", &self.config.get_hosts()).finish_non_exhaustive()
    }
}

impl Connector {
    /// Blocks on the disk.
    pub(crate) fn new(options: &PostgresOptions) -> Result<Self, PostgresError> {
        let mut config = parse(&options.url).map_err(PostgresError::Url)?;
        let tls = match config.get_ssl_mode() {
            SslMode::Disable => None,
            _ => Some(Tls::new(options.authorities.as_deref())?),
        };
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT_TIMEOUT);
        }
        config
            .keepalives_idle(KEEPALIVE_IDLE)
            .keepalives_interval(KEEPALIVE_INTERVAL)
            .keepalives_retries(KEEPALIVE_TRIES)
            .tcp_user_timeout(KEEPALIVE_IDLE + KEEPALIVE_INTERVAL * KEEPALIVE_TRIES);
        let password = PostgresOptions::password_from_environment();
        Ok(Self { config, password_file: options.password_file.clone(), password, tls })
    }

    /// Makes a connection.
    pub(crate) async fn connect(&self, role: Role) -> Result<Conn, PostgresError> {
        let mut config = self.config.clone();
        if let Some(path) = self.password_file.clone() {
            // Again each time: it may have been changed since.
            let read = tokio::task::spawn_blocking(move || {
                fs::read_to_string(&path).map_err(|source| PostgresError::Password { path, source })
            });
            let stopped =
                |_| PostgresError::Server(StoreError::Unavailable("the runtime shuts down".to_owned()));
            config.password(read.await.map_err(stopped)??.trim_end_matches(['\r', '\n']));
        } else if let Some(password) = &self.password {
            config.password(password);
        }
        let settings = format!("{} {}", role.settings(), config.get_options().unwrap_or_default());
        config.options(settings.trim_end());
        if config.get_application_name().is_none() {
            config.application_name(role.application());
        }
        let made = tokio::time::timeout(CONNECT_TIMEOUT_ALL, async {
            // The task ends with the client, or with the connection; whoever uses the client is told of that.
            Ok::<_, tokio_postgres::Error>(match &self.tls {
                None => {
                    let (client, connection) = config.connect(NoTls).await?;
                    (client, spawn(TaskKind::Helper, "postgres", async move { drop(connection.await) }))
                }
                Some(tls) => {
                    let (client, connection) = config.connect(tls.clone()).await?;
                    (client, spawn(TaskKind::Helper, "postgres", async move { drop(connection.await) }))
                }
            })
        });
        match made.await {
            Ok(Ok((client, task))) => Ok(Conn { client, task, statements: Mutex::default() }),
            Ok(Err(error)) => Err(PostgresError::Server(connect_error(&error))),
            Err(_) => Err(PostgresError::Server(StoreError::Unavailable("no connection in time".to_owned()))),
        }
    }
}

/// A connection with the statements that it knows. It ends when it is dropped.
pub(crate) struct Conn {
    pub(crate) client: Client,
    task: JoinHandle<Option<()>>,
    statements: Mutex<HashMap<&'static str, Statement>>,
}

impl std::fmt::Debug for Conn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Conn").field("closed", &self.client.is_closed()).finish_non_exhaustive()
    }
}

impl Conn {
    /// Closes the socket now, whatever is still under way on it.
    pub(crate) fn abandon(&self) {
        self.task.abort();
    }

    /// The statement, prepared once. Only texts of this program, so there is no end of them.
    async fn statement(&self, sql: &'static str) -> Result<Statement, Fault> {
        let known = self.statements.lock().unwrap_or_else(PoisonError::into_inner).get(sql).cloned();
        if let Some(statement) = known {
            return Ok(statement);
        }
        let statement = self.client.prepare(sql).await?;
        self.statements.lock().unwrap_or_else(PoisonError::into_inner).insert(sql, statement.clone());
        Ok(statement)
    }

    /// Executes, and says how many rows that changed.
    pub(crate) async fn execute(
        &self,
        sql: &'static str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<u64, Fault> {
        let statement = self.statement(sql).await?;
        Ok(self.client.execute(&statement, params).await?)
    }

    /// All rows. The statement itself says how many there may be.
    pub(crate) async fn rows(
        &self,
        sql: &'static str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Fault> {
        let statement = self.statement(sql).await?;
        Ok(self.client.query(&statement, params).await?)
    }

    /// The row, where there is one.
    pub(crate) async fn row(
        &self,
        sql: &'static str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Option<Row>, Fault> {
        let statement = self.statement(sql).await?;
        Ok(self.client.query_opt(&statement, params).await?)
    }
}

/// The schema that the connection works in, as half of the name of its locks.
///
/// # Errors
/// Also where the search path names none that exists.
pub(crate) async fn schema_key(conn: &Conn) -> Result<i32, Fault> {
    let row = conn.client.query_one("SELECT current_schema()::text", &[]).await?;
    let Some(schema) = row.try_get::<_, Option<String>>(0)? else {
        return Err(StoreError::Other("the search path names no schema that exists".to_owned()).into());
    };
    // FNV-1a. Two schemas of one database whose keys are equal exclude each other, which is harmless and visible.
    let hash =
        schema.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    Ok(i32::from_ne_bytes(hash.to_ne_bytes()))
}
