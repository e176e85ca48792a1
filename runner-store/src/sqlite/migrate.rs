//! The schema's versions. `PRAGMA user_version` says which one a database has; each migration runs in a transaction with
//! its new number, so a database is never between two versions.

use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};

use super::error::OpenError;

/// Marks a file as this program's. The bytes say `rnnr`.
const APPLICATION_ID: i64 = 0x726e_6e72;

/// The migration at index `i` leads from version `i` to `i + 1`. Append only.
pub(crate) const MIGRATIONS: &[&str] = &[
    include_str!("../../migrations/sqlite/0001-runs.sql"),
    include_str!("../../migrations/sqlite/0002-retention.sql"),
    include_str!("../../migrations/sqlite/0003-traffic.sql"),
    include_str!("../../migrations/sqlite/0004-shadows.sql"),
];

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
    fn runs_that_are_there_already_keep_the_uploads_that_they_name() {
        let mut conn = Connection::open_in_memory().unwrap();
        let path = Path::new("x");
        migrate(&mut conn, path, &MIGRATIONS[..1]).unwrap();
        let specs = [
            r#"{"inputs":[{"source":{"artifact":"artifact:uploads/t/a/files/x/y"}},{"source":{"inline":""}},
                {"source":{"artifact":"artifact:uploads/t/b/"}},{"source":{"artifact":"artifact:uploads/t/b/files/x"}}],
                "outputs":[{"destination":"artifact:uploads/t/c/"},{"destination":null}]}"#,
            r#"{"inputs":[{"source":{"artifact":"artifact:runs/t/r/1/outputs/0"}},{"source":{"artifact":"artifact:uploads/t"}}]}"#,
            "not JSON",
        ];
        for (rn, spec) in (0i64..).zip(specs) {
            conn.execute(
                "INSERT INTO runs (rn, id, tenant, digest, state, attempt, backend, backend_reason, created, last_event) \
                 VALUES (?1, randomblob(16), 't', x'00', 'QUEUED', 0, 'local', '', 1, 1)",
                [rn],
            )
            .unwrap();
            conn.execute("INSERT INTO specs (rn, spec) VALUES (?1, ?2)", (rn, spec)).unwrap();
        }
        migrate(&mut conn, path, MIGRATIONS).unwrap();
        let mut named = conn.prepare("SELECT upload, rn FROM named_uploads ORDER BY upload").unwrap();
        let named: Vec<(String, i64)> =
            named.query_map((), |row| Ok((row.get(0)?, row.get(1)?))).unwrap().map(Result::unwrap).collect();
        let expected = ["uploads/t/a", "uploads/t/b", "uploads/t/c"].map(|upload| (upload.to_owned(), 0));
        assert_eq!(named, expected);
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
