//! What reads. Each function is one verb on one connection; none changes anything.

use std::fmt::Write as _;

use runner_core::{
    artifact::ArtifactKey,
    clock::Timestamp,
    id::RunId,
    store::{
        AttemptRecord, EndedCursor, EndedRun, LiveRuns, PageCursor, RunFilter, RunPage, RunRecord,
        StoreError, StoredAudit, StoredEvent, StoredTraffic, Swept,
    },
};
use rusqlite::{Connection, OptionalExtension as _, params_from_iter, types::Value};

use super::error::Fault;
use crate::row::{self, run_columns};

pub(crate) const GET: &str =
    concat!("SELECT ", run_columns!(), " FROM runs r LEFT JOIN specs s ON s.rn = r.rn WHERE r.id = ?1");
/// See `RunId::is_shadow`.
pub(crate) const NO_SHADOW: &str = "substr(r.id, 7, 3) <> x'85adb5'";
pub(crate) const RN: &str = "SELECT rn FROM runs WHERE id = ?1";
pub(crate) const ATTEMPTS: &str =
    "SELECT number, backend, started, ended, outcome FROM attempts WHERE rn = ?1 ORDER BY number";
pub(crate) const EVENTS: &str =
    "SELECT seq, time, event FROM events WHERE rn = ?1 AND seq > ?2 ORDER BY seq LIMIT ?3";
pub(crate) const LIVE: &str = concat!(
    "SELECT ",
    run_columns!(),
    " FROM runs r INDEXED BY runs_live LEFT JOIN specs s ON s.rn = r.rn \
      WHERE r.ended IS NULL ORDER BY r.created, r.id"
);
pub(crate) const LIVE_TIMERS: &str = "SELECT r.id, t.kind, t.due, t.duration FROM timers t CROSS JOIN runs r ON r.rn = t.rn \
     ORDER BY t.rn, t.kind";

pub(crate) const ENDED: &str = "SELECT id, tenant, ended FROM runs INDEXED BY runs_ended \
     WHERE ended IS NOT NULL AND ended < ?1 AND (ended, id) > (?2, ?3) ORDER BY ended, id LIMIT ?4";
pub(crate) const SWEPT: &str = "SELECT id, ended FROM sweeps WHERE kind = ?1";

pub(crate) const REMOVALS: &str =
    "SELECT r.id, r.tenant, r.ended FROM removals m CROSS JOIN runs r ON r.rn = m.rn ORDER BY m.rn LIMIT ?1";
pub(crate) const NAMES_UPLOAD: &str = "SELECT rn FROM named_uploads WHERE upload = ?1 LIMIT 1";

pub(crate) const TRAFFIC: &str = "SELECT version, state FROM traffic";
pub(crate) const AUDIT: &str = "SELECT seq, time, actor, action, what, reason, version FROM audit WHERE seq < ?1 \
     ORDER BY seq DESC LIMIT ?2";

/// The traffic's state.
pub(crate) fn traffic(conn: &Connection) -> Result<Option<StoredTraffic>, Fault> {
    let mut statement = conn.prepare_cached(TRAFFIC)?;
    let found = statement.query_row((), |row| Ok(row::traffic(row))).optional()?;
    Ok(found.transpose()?)
}

/// Entries of the audit log, newest first.
pub(crate) fn audit(conn: &Connection, before: Option<u64>, max: usize) -> Result<Vec<StoredAudit>, Fault> {
    let mut statement = conn.prepare_cached(AUDIT)?;
    let before = before.map_or(i64::MAX, row::int);
    let mut rows = statement.query((before, i64::try_from(max).unwrap_or(i64::MAX)))?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(row::audit(row)?);
    }
    Ok(found)
}

/// Runs whose removal was begun.
pub(crate) fn removals(conn: &Connection, max: usize) -> Result<Vec<EndedRun>, Fault> {
    let mut statement = conn.prepare_cached(REMOVALS)?;
    let mut rows = statement.query([i64::try_from(max).unwrap_or(i64::MAX)])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.extend(row::ended(row).ok());
    }
    Ok(found)
}

/// Whether a run names an upload.
pub(crate) fn names_upload(conn: &Connection, upload: &ArtifactKey) -> Result<bool, Fault> {
    Ok(conn.prepare_cached(NAMES_UPLOAD)?.exists([upload.as_str()])?)
}

/// Runs that ended before `until`, after a place in the order of ends.
pub(crate) fn ended(
    conn: &Connection,
    after: Option<EndedCursor>,
    until: Timestamp,
    max: usize,
) -> Result<Vec<EndedRun>, Fault> {
    let mut statement = conn.prepare_cached(ENDED)?;
    // Before every run: no time is as early.
    let place = after.map_or((i64::MIN, [0; 16]), |after| (after.ended.as_micros(), row::key(after.id)));
    let max = i64::try_from(max).unwrap_or(i64::MAX);
    let mut rows = statement.query((until.as_micros(), place.0, place.1, max))?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        // One whose tenant does not decode cannot be acted upon; it is left as it is.
        found.extend(row::ended(row).ok());
    }
    Ok(found)
}

/// How far a sweep has come.
pub(crate) fn swept(conn: &Connection, what: Swept) -> Result<Option<EndedCursor>, Fault> {
    let mut statement = conn.prepare_cached(SWEPT)?;
    let found = statement.query_row([what.as_str()], |row| Ok(row::swept(row))).optional()?;
    Ok(found.transpose()?)
}

/// Finds a run.
pub(crate) fn get(conn: &Connection, id: RunId) -> Result<Option<RunRecord>, Fault> {
    let mut statement = conn.prepare_cached(GET)?;
    let found = statement.query_row([row::key(id)], |row| Ok(row::run(row))).optional()?;
    Ok(found.transpose()?)
}

/// The number that other tables know a run by.
fn rn(conn: &Connection, id: RunId) -> Result<i64, Fault> {
    let found = conn.prepare_cached(RN)?.query_row([row::key(id)], |row| row.get(0)).optional()?;
    found.ok_or(Fault::Answer(StoreError::NotFound(id)))
}

/// The ended attempts of a run.
pub(crate) fn attempts(conn: &Connection, id: RunId) -> Result<Vec<AttemptRecord>, Fault> {
    let rn = rn(conn, id)?;
    let mut statement = conn.prepare_cached(ATTEMPTS)?;
    let mut rows = statement.query([rn])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(row::attempt(row, id)?);
    }
    Ok(found)
}

/// Events of a run after number `after`.
pub(crate) fn events(
    conn: &Connection,
    id: RunId,
    after: u64,
    max: usize,
) -> Result<Vec<StoredEvent>, Fault> {
    let rn = rn(conn, id)?;
    let mut statement = conn.prepare_cached(EVENTS)?;
    let mut rows = statement.query((rn, row::int(after), i64::try_from(max).unwrap_or(i64::MAX)))?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(row::event(row, id)?);
    }
    Ok(found)
}

/// Every run that is not terminal, with its timers; one snapshot.
pub(crate) fn live(conn: &Connection) -> Result<LiveRuns, Fault> {
    let snapshot = conn.unchecked_transaction()?;
    let mut live = LiveRuns::default();
    let mut statement = snapshot.prepare_cached(LIVE)?;
    let mut rows = statement.query(())?;
    while let Some(row) = rows.next()? {
        match row::run(row) {
            Ok(run) => live.runs.push(run),
            Err(inconsistency) => live.quarantined.push(inconsistency),
        }
    }
    let known: std::collections::HashSet<RunId> = live.runs.iter().map(|run| run.id).collect();
    let mut statement = snapshot.prepare_cached(LIVE_TIMERS)?;
    let mut rows = statement.query(())?;
    while let Some(row) = rows.next()? {
        match row::timer(row) {
            Ok(timer) if known.contains(&timer.0) => live.timers.push(timer),
            // Of a run that is quarantined itself.
            Ok(_) => {}
            Err(inconsistency) => live.quarantined.push(inconsistency),
        }
    }
    Ok(live)
}

/// A page of runs.
pub(crate) fn list(
    conn: &Connection,
    filter: &RunFilter,
    after: Option<PageCursor>,
    max: usize,
) -> Result<RunPage, Fault> {
    let (sql, values) = list_sql(filter, after);
    let mut statement = conn.prepare_cached(&sql)?;
    // Rows come in the order of an index, one by one, so no limit is needed: it would count rows that do not decode.
    let mut rows = statement.query(params_from_iter(values))?;
    let mut page = RunPage::default();
    while let Some(row) = rows.next()? {
        if page.runs.len() >= max.max(1) {
            page.next = page.runs.last().map(|run| PageCursor { created: run.created, id: run.id });
            break;
        }
        match row::run(row) {
            Ok(run) => page.runs.push(run),
            Err(inconsistency) => row::left_out(&inconsistency),
        }
    }
    Ok(page)
}

/// The statement of a listing. The index is named, so that the plan does not depend on statistics: it gives the order, and
/// the cursor is a place in it. By label: the first label's own index; by live states: the index of live runs; else by
/// tenant, or all. What else the filter says is checked row by row.
pub(crate) fn list_sql(filter: &RunFilter, after: Option<PageCursor>) -> (String, Vec<Value>) {
    let mut values: Vec<Value> = Vec::new();
    let mut conditions = String::new();
    let mut and = |values: &mut Vec<Value>, condition: &str, new: Vec<Value>| {
        conditions.push_str(if conditions.is_empty() { " WHERE " } else { " AND " });
        conditions.push_str(condition);
        values.extend(new);
    };
    let only_live = !filter.states.is_empty() && filter.states.iter().all(|state| !state.is_terminal());
    let mut labels = filter.labels.iter();
    let first_label = labels.next();
    let (from, by) = match first_label {
        Some(_) => ("labels l CROSS JOIN runs r ON r.rn = l.rn", "l"),
        None if only_live => ("runs r INDEXED BY runs_live", "r"),
        None if filter.tenant.is_some() => ("runs r INDEXED BY runs_tenant_created", "r"),
        None => ("runs r INDEXED BY runs_created", "r"),
    };
    let text = |s: &str| Value::Text(s.to_owned());
    if let Some((name, value)) = first_label {
        and(&mut values, "l.name = ? AND l.value = ?", vec![text(name), text(value)]);
    }
    // Shadows are no caller's.
    and(&mut values, NO_SHADOW, vec![]);
    if let Some(tenant) = &filter.tenant {
        and(&mut values, "r.tenant = ?", vec![text(tenant.as_str())]);
    }
    if only_live {
        and(&mut values, "r.ended IS NULL", vec![]);
    }
    if !filter.states.is_empty() {
        let marks = vec!["?"; filter.states.len()].join(", ");
        let states = filter.states.iter().map(|state| text(state.as_str())).collect();
        and(&mut values, &format!("r.state IN ({marks})"), states);
    }
    if let Some(backend) = &filter.backend {
        and(&mut values, "r.backend = ?", vec![text(backend.as_str())]);
    }
    if let Some(from) = filter.created_from {
        and(&mut values, &format!("{by}.created >= ?"), vec![Value::Integer(from.as_micros())]);
    }
    if let Some(until) = filter.created_until {
        and(&mut values, &format!("{by}.created < ?"), vec![Value::Integer(until.as_micros())]);
    }
    if let Some(cursor) = after {
        let place =
            vec![Value::Integer(cursor.created.as_micros()), Value::Blob(row::key(cursor.id).to_vec())];
        and(&mut values, &format!("({by}.created, {by}.id) < (?, ?)"), place);
    }
    for (name, value) in labels {
        let has = "EXISTS (SELECT 1 FROM labels m WHERE m.name = ? AND m.value = ? AND m.created = r.created AND m.id = r.id)";
        and(&mut values, has, vec![text(name), text(value)]);
    }
    let mut sql = String::new();
    // Writing to a `String` does not fail.
    let _ = write!(
        sql,
        "SELECT {} FROM {from} LEFT JOIN specs s ON s.rn = r.rn{conditions} ORDER BY {by}.created DESC, {by}.id DESC",
        run_columns!()
    );
    (sql, values)
}
