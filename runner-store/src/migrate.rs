//! The schema's versions. `PRAGMA user_version` says which one a database has; each migration runs in a transaction with
//! its new number, so a database is never between two versions.

use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};

use crate::error::OpenError;

/// Marks a file as this program's. The bytes say `rnnr`.
const APPLICATION_ID: i64 = 0x726e_6e72;

/// The migration at index `i` leads from version `i` to `i + 1`. Append only.
pub(crate) const MIGRATIONS: &[&str] = &[include_str!("../migrations/0001-runs.sql")];

/// Brings a database to the newest version.
pub(crate) fn migrate(conn: &mut Connection, path: &Path, migrations: &[&str]) -> Result<(), OpenError> {
    let sqlite = |source| OpenError::Sqlite { path: path.to_owned(), source };
    let pragma = |conn: &Connection, name| conn.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let known = i64::try_from(migrations.len()).unwrap_or(i64::MAX);

    let tables: i64 =
        conn.query_row("SELECT count(*) FROM sqlite_schema", (), |row| row.get(0)).map_err(sqlite)?;
    let id = pragma(conn, "application_id").map_err(sqlite)?;
    if id != APPLICATION_ID && !(id == 0 && tables == 0) {
        return Err(OpenError::Foreign { path: path.to_owned() });
    }
    let found = pragma(conn, "user_version").map_err(sqlite)?;
    if found > known {
        return Err(OpenError::NewerSchema { path: path.to_owned(), found, known });
    }
    for (to, sql) in (1i64..).zip(migrations).filter(|(to, _)| *to > found) {
        one(conn, sql, to).map_err(|source| OpenError::Migration { path: path.to_owned(), to, source })?;
    }
    Ok(())
}

fn one(conn: &mut Connection, sql: &str, to: i64) -> rusqlite::Result<()> {
    let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
    tx.execute_batch(sql)?;
    tx.pragma_update(None, "application_id", APPLICATION_ID)?;
    tx.pragma_update(None, "user_version", to)?;
    tx.commit()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = "CREATE TABLE a (x INTEGER) STRICT; INSERT INTO a VALUES (1);";

    fn version(conn: &Connection) -> i64 {
        conn.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap()
    }

    #[test]
    fn each_migration_runs_once_and_keeps_what_was_there() {
        let mut conn = Connection::open_in_memory().unwrap();
        let path = Path::new("x");
        migrate(&mut conn, path, &[FIRST]).unwrap();
        assert_eq!(version(&conn), 1);
        let both = [FIRST, "ALTER TABLE a ADD COLUMN y INTEGER; UPDATE a SET y = x + 1;"];
        migrate(&mut conn, path, &both).unwrap();
        migrate(&mut conn, path, &both).unwrap();
        assert_eq!(version(&conn), 2);
        let row: (i64, i64) =
            conn.query_row("SELECT x, y FROM a", (), |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
        assert_eq!(row, (1, 2));
    }

    #[test]
    fn a_migration_that_fails_leaves_the_version_before() {
        let mut conn = Connection::open_in_memory().unwrap();
        let path = Path::new("x");
        let broken = [FIRST, "INSERT INTO a VALUES (2); INSERT INTO nowhere VALUES (1);"];
        let error = migrate(&mut conn, path, &broken).unwrap_err();
        assert!(matches!(error, OpenError::Migration { to: 2, .. }), "{error:?}");
        assert_eq!(version(&conn), 1);
        let rows: i64 = conn.query_row("SELECT count(*) FROM a", (), |row| row.get(0)).unwrap();
        assert_eq!(rows, 1, "half a migration stayed");
    }

    #[test]
    fn a_newer_schema_is_refused_and_left_alone() {
        let mut conn = Connection::open_in_memory().unwrap();
        let path = Path::new("x");
        migrate(&mut conn, path, &[FIRST, "SELECT 1;"]).unwrap();
        let error = migrate(&mut conn, path, &[FIRST]).unwrap_err();
        assert!(matches!(error, OpenError::NewerSchema { found: 2, known: 1, .. }), "{error:?}");
        assert_eq!(version(&conn), 2);
    }

    #[test]
    fn another_program_s_database_is_refused() {
        let mut conn = Connection::open_in_memory().unwrap();
        conn.execute_batch("CREATE TABLE theirs (x);").unwrap();
        let error = migrate(&mut conn, Path::new("x"), MIGRATIONS).unwrap_err();
        assert!(matches!(error, OpenError::Foreign { .. }), "{error:?}");
    }
}
