//! How connections are opened.

use std::{path::Path, time::Duration};

use rusqlite::{Connection, OpenFlags, Result};

use super::store::SqliteOptions;

/// Nobody but this process writes (see [`crate::DataDirLock`]); what is waited for is a checkpoint, or a person with a shell.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// More than the number of different statements; listings have variants.
const STATEMENTS: usize = 64;
/// Pages in the log before they are moved into the database: 16 MiB. A move costs two more syncs, so not too often.
const CHECKPOINT_PAGES: i64 = 4096;
/// What the log file shrinks to after a burst.
const JOURNAL_BYTES: i64 = 64 * 1024 * 1024;

/// Opens the connection that writes. Makes the file where there is none.
pub(crate) fn writer(path: &Path, options: &SqliteOptions) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX
        | OpenFlags::SQLITE_OPEN_EXRESCODE;
    let conn = Connection::open_with_flags(path, flags)?;
    common(&conn)?;
    // Answers with the mode that it is in; a file system without shared memory would stay in another.
    conn.pragma_update_and_check(None, "journal_mode", "WAL", |row| {
        let mode: String = row.get(0)?;
        if mode.eq_ignore_ascii_case("wal") { Ok(()) } else { Err(rusqlite::Error::InvalidQuery) }
    })?;
    // A commit is answered after its sync: that is what makes an answer durable.
    conn.pragma_update(None, "synchronous", "FULL")?;
    conn.pragma_update(None, "foreign_keys", true)?;
    conn.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
    conn.pragma_update(None, "journal_size_limit", JOURNAL_BYTES)?;
    conn.pragma_update(None, "cache_size", -16 * 1024)?;
    if let Some(max) = options.max_bytes {
        let page: i64 = conn.pragma_query_value(None, "page_size", |row| row.get(0))?;
        let pages = i64::try_from(max).unwrap_or(i64::MAX) / page;
        conn.pragma_update(None, "max_page_count", pages.clamp(1, i64::from(u32::MAX) - 1))?;
    }
    Ok(conn)
}

/// Opens a connection that reads. The file exists.
pub(crate) fn reader(path: &Path) -> Result<Connection> {
    let flags =
        OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_EXRESCODE;
    let conn = Connection::open_with_flags(path, flags)?;
    common(&conn)?;
    conn.pragma_update(None, "cache_size", -4 * 1024)?;
    Ok(conn)
}

fn common(conn: &Connection) -> Result<()> {
    conn.busy_timeout(BUSY_TIMEOUT)?;
    conn.set_prepared_statement_cache_capacity(STATEMENTS);
    conn.pragma_update(None, "temp_store", "MEMORY")?;
    // The schema is this program's own; nothing in the file is to run as code.
    conn.pragma_update(None, "trusted_schema", false)
}
