//! What an earlier release wrote is read by this one; what a later one wrote is refused.

use std::{sync::Arc, time::Duration};

use runner_core::{
    clock::Timestamp,
    id::RunId,
    outcome::{Cause, ExitStatus},
    state::{Position, RunState},
    store::{CancelIntent, RunEvent, RunFilter, Store as _, TimerKind},
};
use runner_store::{DataDirLock, OpenError, SqliteOptions, SqliteStore};
use tempfile::TempDir;

const T: Timestamp = Timestamp::from_micros(1_750_000_000_000_000);

fn id(n: u128) -> RunId {
    RunId::new(uuid::Uuid::from_u128(0x0193_0000_0000_7000_8000_0000_0000_0000 + n))
}

/// A data directory with a database of version 1.
fn version_1() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let conn = rusqlite::Connection::open(SqliteStore::path(dir.path())).unwrap();
    conn.execute_batch(include_str!("../fixtures/state-v1.sql")).unwrap();
    dir
}

fn open(dir: &TempDir) -> Result<SqliteStore, OpenError> {
    SqliteStore::open(Arc::new(DataDirLock::acquire(dir.path()).unwrap()), &SqliteOptions::default())
}

#[tokio::test]
async fn a_database_of_version_1_is_read_whole() {
    let dir = version_1();
    let store = open(&dir).unwrap();
    let run = store.get(id(1)).await.unwrap().unwrap();
    assert_eq!(run.position, Position { state: RunState::Failed, attempt: 2 });
    assert_eq!((run.tenant.as_str(), run.key.as_ref().map(|key| key.as_str())), ("a", Some("k1")));
    assert_eq!((run.created, run.started), (T, Some(T + Duration::from_secs(5))));
    assert_eq!(run.spec.timeout, Some(Duration::from_secs(60)));
    let outcome = run.outcome.unwrap();
    assert_eq!((outcome.status, outcome.cause), (Some(ExitStatus::Code(7)), Cause::Exited));
    assert_eq!(outcome.usage.wall, Duration::new(1, 5));

    let attempts = store.attempts(id(1)).await.unwrap();
    let causes: Vec<_> = attempts.iter().map(|attempt| (attempt.number, attempt.outcome.cause)).collect();
    assert_eq!(causes, [(1, Cause::Lost), (2, Cause::Exited)]);
    assert_eq!(attempts[1].outcome, outcome);
    let events = store.events(id(1), 0, 100).await.unwrap();
    assert_eq!(events.len(), 5);
    assert_eq!(events[2].event, RunEvent::Notice("tried again".to_owned()));
    assert_eq!(events[4].event, RunEvent::Terminated { position: run.position, outcome });

    let live = store.live().await.unwrap();
    assert_eq!(live.quarantined, []);
    assert_eq!((live.runs.len(), live.runs[0].id), (1, id(2)));
    let reason = "enough".to_owned();
    assert_eq!(live.runs[0].cancel, Some(CancelIntent { time: T + Duration::from_secs(8), reason }));
    assert_eq!((live.timers[0].0, live.timers[0].1.kind), (id(2), TimerKind::Deadline));
    assert_eq!(live.timers[0].1.duration, Duration::from_secs(60));
    assert_eq!(store.live_count().await.unwrap(), 1);
    let labels = [("team".to_owned(), "x".to_owned())].into();
    let page = store.list(&RunFilter { labels, ..RunFilter::default() }, None, 10).await.unwrap();
    assert_eq!(page.runs.iter().map(|run| run.id).collect::<Vec<_>>(), [id(2), id(1)]);

    let number = store.append_event(id(2), RunEvent::Notice("upgraded".to_owned()), T).await.unwrap();
    assert_eq!(number, Some(4));
}

#[test]
fn a_newer_database_is_refused_and_left_as_it_is() {
    let dir = version_1();
    let conn = rusqlite::Connection::open(SqliteStore::path(dir.path())).unwrap();
    conn.pragma_update(None, "user_version", 1000).unwrap();
    drop(conn);
    let error = open(&dir).unwrap_err();
    assert!(matches!(error, OpenError::NewerSchema { found: 1000, .. }), "{error:?}");
    assert!(error.to_string().contains("1000"), "{error}");
    let conn = rusqlite::Connection::open(SqliteStore::path(dir.path())).unwrap();
    let (version, runs): (i64, i64) = conn
        .query_row("SELECT (SELECT user_version FROM pragma_user_version), count(*) FROM runs", (), |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .unwrap();
    assert_eq!((version, runs), (1000, 2));
}

#[test]
fn a_file_that_is_no_database_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = SqliteStore::path(dir.path());
    let text = "not a database, but long enough to be looked at as one ".repeat(40);
    std::fs::write(&path, &text).unwrap();
    assert!(matches!(open(&dir), Err(OpenError::Sqlite { .. })));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
}
