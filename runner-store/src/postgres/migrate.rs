//! The schema's versions. The table `runner_schema` says which one there is; each migration runs in a transaction with its new number,
//! so a schema is never between two versions.

use runner_core::store::StoreError;

use super::{
    connect::{Conn, Connector, LOCK, Role, schema_key},
    error::{Fault, PostgresError},
    options::PostgresOptions,
};

/// The migration at index `i` leads from version `i` to `i + 1`. Append only. While one runs, a service of the version before may be
/// running: what it uses must stay.
const MIGRATIONS: &[&str] = &[include_str!("../../migrations/postgres/0001-start.sql")];

/// What [`migrate`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Migrated {
    /// The version that was there; 0: none.
    pub from: i64,
    /// The version that is there now.
    pub to: i64,
}

/// Brings the schema to this program's version. Several at once take turns, and all but the first find nothing to do.
///
/// # Errors
/// See [`PostgresError`].
pub async fn migrate(options: &PostgresOptions) -> Result<Migrated, PostgresError> {
    let options = options.clone();
    let connector = tokio::task::spawn_blocking(move || Connector::new(&options)).await;
    let connector = connector
        .map_err(|_| PostgresError::Server(StoreError::Unavailable("the runtime shuts down".to_owned())))??;
    let conn = connector.connect(Role::Migrator).await?;
    let server = |fault: Fault| PostgresError::Server(fault.into());
    let key = schema_key(&conn).await.map_err(server)?;
    // Let go when the session ends.
    conn.row("SELECT pg_advisory_lock($1, $2)", &[&(LOCK + 1), &key]).await.map_err(server)?;
    let found = version(&conn).await.map_err(server)?;
    let known = known();
    if found > known {
        return Err(PostgresError::NewerSchema { found, known });
    }
    for (to, sql) in (1i64..).zip(MIGRATIONS).filter(|(to, _)| *to > found) {
        let whole = format!(
            "BEGIN; \
             CREATE TABLE IF NOT EXISTS runner_schema (one INTEGER PRIMARY KEY CHECK (one = 1), version BIGINT NOT NULL); \
             {sql}\n\
             INSERT INTO runner_schema VALUES (1, {to}) ON CONFLICT (one) DO UPDATE SET version = {to}; \
             COMMIT"
        );
        let done = conn.client.batch_execute(&whole).await;
        done.map_err(|error| PostgresError::Migration { to, source: Fault::from(error).into() })?;
        tracing::info!(version = to, "migrated the state store");
    }
    Ok(Migrated { from: found, to: known })
}

/// The newest version that this program knows.
fn known() -> i64 {
    i64::try_from(MIGRATIONS.len()).unwrap_or(i64::MAX)
}

/// The version that is there; 0: none.
async fn version(conn: &Conn) -> Result<i64, Fault> {
    let there = "SELECT to_regclass(format('%I.runner_schema', current_schema())) IS NOT NULL";
    if !conn.client.query_one(there, &[]).await?.try_get::<_, bool>(0)? {
        return Ok(0);
    }
    match conn.client.query_opt("SELECT version FROM runner_schema", &[]).await? {
        Some(row) => Ok(row.try_get(0)?),
        None => Ok(0),
    }
}

/// Refuses a schema of another version.
pub(crate) async fn check(conn: &Conn) -> Result<(), PostgresError> {
    let found = version(conn).await.map_err(|fault| PostgresError::Server(fault.into()))?;
    let needed = known();
    match found.cmp(&needed) {
        std::cmp::Ordering::Less => Err(PostgresError::OlderSchema { found, needed }),
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Greater => Err(PostgresError::NewerSchema { found, known: needed }),
    }
}
