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
use tokio_postgres::{
    Row,
    types::{ToSql, Type},
};

use super::{connect::Conn, error::Fault};
use crate::row::{self, Columns as _, run_columns};

const GET: &str =
    concat!("SELECT ", run_columns!(), " FROM runs r LEFT JOIN specs s ON s.rn = r.rn WHERE r.id = $1");
/// See `RunId::is_shadow`.
const NO_SHADOW: &str = "substr(r.id, 7, 3) <> '\\x85adb5'";
const RN: &str = "SELECT rn FROM runs WHERE id = $1";
const ATTEMPTS: &str =
    "SELECT number, backend, started, ended, outcome FROM attempts WHERE rn = $1 ORDER BY number";
const EVENTS: &str = "SELECT seq, time, event FROM events WHERE rn = $1 AND seq > $2 ORDER BY seq LIMIT $3";
const LIVE: &str = concat!(
    "SELECT ",
    run_columns!(),
    " FROM runs r LEFT JOIN specs s ON s.rn = r.rn WHERE r.ended IS NULL ORDER BY r.created, r.id"
);
const LIVE_TIMERS: &str = "SELECT r.id, t.kind, t.due, t.duration FROM timers t JOIN runs r ON r.rn = t.rn \
     ORDER BY t.rn, t.kind";
const ENDED: &str = "SELECT id, tenant, ended FROM runs \
     WHERE ended IS NOT NULL AND ended < $1 AND (ended, id) > ($2, $3) ORDER BY ended, id LIMIT $4";
const SWEPT: &str = "SELECT id, ended FROM sweeps WHERE kind = $1";
const REMOVALS: &str =
    "SELECT r.id, r.tenant, r.ended FROM removals m JOIN runs r ON r.rn = m.rn ORDER BY m.rn LIMIT $1";
const NAMES_UPLOAD: &str = "SELECT rn FROM named_uploads WHERE upload = $1 LIMIT 1";
const TRAFFIC: &str = "SELECT version, state FROM traffic";
const AUDIT: &str = "SELECT seq, time, actor, action, what, reason, version FROM audit WHERE seq < $1 \
     ORDER BY seq DESC LIMIT $2";
/// Rows of one fetch of a listing: what a caller who wants many costs in memory at a time.
const FETCH: usize = 500;

fn most(max: usize) -> i64 {
    i64::try_from(max).unwrap_or(i64::MAX)
}

/// The traffic's state.
pub(crate) async fn traffic(conn: &Conn) -> Result<Option<StoredTraffic>, Fault> {
    Ok(conn.row(TRAFFIC, &[]).await?.map(|row| row::traffic(&row)).transpose()?)
}

/// Entries of the audit log, newest first.
pub(crate) async fn audit(conn: &Conn, before: Option<u64>, max: usize) -> Result<Vec<StoredAudit>, Fault> {
    let rows = conn.rows(AUDIT, &[&before.map_or(i64::MAX, row::int), &most(max)]).await?;
    Ok(rows.iter().map(row::audit).collect::<Result<_, _>>()?)
}

/// Runs whose removal was begun.
pub(crate) async fn removals(conn: &Conn, max: usize) -> Result<Vec<EndedRun>, Fault> {
    let rows = conn.rows(REMOVALS, &[&most(max)]).await?;
    Ok(rows.iter().filter_map(|row| row::ended(row).ok()).collect())
}

/// Whether a run names an upload.
pub(crate) async fn names_upload(conn: &Conn, upload: &ArtifactKey) -> Result<bool, Fault> {
    Ok(conn.row(NAMES_UPLOAD, &[&upload.as_str()]).await?.is_some())
}

/// Runs that ended before `until`, after a place in the order of ends.
pub(crate) async fn ended(
    conn: &Conn,
    after: Option<EndedCursor>,
    until: Timestamp,
    max: usize,
) -> Result<Vec<EndedRun>, Fault> {
    // Before every run: no time is as early.
    let place = after.map_or((i64::MIN, [0; 16]), |after| (after.ended.as_micros(), row::key(after.id)));
    let params: [&(dyn ToSql + Sync); 4] = [&until.as_micros(), &place.0, &place.1.as_slice(), &most(max)];
    let rows = conn.rows(ENDED, &params).await?;
    // One whose tenant does not decode cannot be acted upon; it is left as it is.
    Ok(rows.iter().filter_map(|row| row::ended(row).ok()).collect())
}

/// How far a sweep has come.
pub(crate) async fn swept(conn: &Conn, what: Swept) -> Result<Option<EndedCursor>, Fault> {
    Ok(conn.row(SWEPT, &[&what.as_str()]).await?.map(|row| row::swept(&row)).transpose()?)
}

/// Finds a run.
pub(crate) async fn get(conn: &Conn, id: RunId) -> Result<Option<RunRecord>, Fault> {
    Ok(conn.row(GET, &[&row::key(id).as_slice()]).await?.map(|row| row::run(&row)).transpose()?)
}

/// Finds a run that is there.
pub(crate) async fn must_get(conn: &Conn, id: RunId) -> Result<RunRecord, Fault> {
    get(conn, id).await?.ok_or(Fault::Answer(StoreError::NotFound(id)))
}

/// The number that other tables know a run by.
pub(crate) async fn rn(conn: &Conn, id: RunId) -> Result<i64, Fault> {
    match conn.row(RN, &[&row::key(id).as_slice()]).await? {
        Some(row) => Ok(row.try_get(0)?),
        None => Err(Fault::Answer(StoreError::NotFound(id))),
    }
}

/// The ended attempts of a run.
pub(crate) async fn attempts(conn: &Conn, id: RunId) -> Result<Vec<AttemptRecord>, Fault> {
    let rows = conn.rows(ATTEMPTS, &[&rn(conn, id).await?]).await?;
    Ok(rows.iter().map(|row| row::attempt(row, id)).collect::<Result<_, _>>()?)
}

/// Events of a run after number `after`.
pub(crate) async fn events(
    conn: &Conn,
    id: RunId,
    after: u64,
    max: usize,
) -> Result<Vec<StoredEvent>, Fault> {
    let rows = conn.rows(EVENTS, &[&rn(conn, id).await?, &row::int(after), &most(max)]).await?;
    Ok(rows.iter().map(|row| row::event(row, id)).collect::<Result<_, _>>()?)
}

/// Every run that is not terminal, with its timers; one snapshot.
pub(crate) async fn live(conn: &Conn) -> Result<LiveRuns, Fault> {
    conn.client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    let (runs, timers) = (conn.rows(LIVE, &[]).await?, conn.rows(LIVE_TIMERS, &[]).await?);
    conn.client.batch_execute("COMMIT").await?;
    let mut live = LiveRuns::default();
    for row in &runs {
        match row::run(row) {
            Ok(run) => live.runs.push(run),
            Err(inconsistency) => live.quarantined.push(inconsistency),
        }
    }
    let known: std::collections::HashSet<RunId> = live.runs.iter().map(|run| run.id).collect();
    for row in &timers {
        match row::timer(row) {
            Ok(timer) if known.contains(&timer.0) => live.timers.push(timer),
            // Of a run that is quarantined itself.
            Ok(_) => {}
            Err(inconsistency) => live.quarantined.push(inconsistency),
        }
    }
    Ok(live)
}

/// A parameter of a statement that is put together.
pub(crate) enum Value {
    Int(i64),
    Text(String),
    Bytes(Vec<u8>),
}

/// A statement that is put together: conditions that must all hold, and their parameters.
#[derive(Default)]
pub(crate) struct Conditions {
    sql: String,
    values: Vec<Value>,
}

impl Conditions {
    /// Adds one. Each `?` stands for the next of the values.
    pub(crate) fn and(&mut self, condition: &str, values: impl IntoIterator<Item = Value>) {
        self.sql.push_str(if self.sql.is_empty() { " WHERE " } else { " AND " });
        let mut values = values.into_iter();
        for (i, part) in condition.split('?').enumerate() {
            if i > 0 {
                self.values.extend(values.next());
                // Writing to a `String` does not fail.
                let _ = write!(self.sql, "${}", self.values.len());
            }
            self.sql.push_str(part);
        }
    }

    /// The rows of `SELECT {what}{conditions}{order}`, at most so many.
    pub(crate) async fn rows(
        &self,
        conn: &Conn,
        what: &str,
        order: &str,
        max: usize,
    ) -> Result<Vec<Row>, Fault> {
        let sql = format!("SELECT {what}{}{order} LIMIT {max}", self.sql);
        let params: Vec<(&(dyn ToSql + Sync), Type)> = self
            .values
            .iter()
            .map(|value| match value {
                Value::Int(value) => (value as &(dyn ToSql + Sync), Type::INT8),
                Value::Text(value) => (value as _, Type::TEXT),
                Value::Bytes(value) => (value as _, Type::BYTEA),
            })
            .collect();
        Ok(conn.client.query_typed(&sql, &params).await?)
    }
}

/// A page of runs.
pub(crate) async fn list(
    conn: &Conn,
    filter: &RunFilter,
    mut after: Option<PageCursor>,
    max: usize,
) -> Result<RunPage, Fault> {
    let max = max.max(1);
    let mut page = RunPage::default();
    loop {
        // One more than is wanted: whether there is a next page.
        let fetch = max.saturating_add(1).saturating_sub(page.runs.len()).min(FETCH);
        let (from, by, conditions) = listing(filter, after);
        let what = format!("{} FROM {from} LEFT JOIN specs s ON s.rn = r.rn", run_columns!());
        let order = format!(" ORDER BY {by}.created DESC, {by}.id DESC");
        let rows = conditions.rows(conn, &what, &order, fetch).await?;
        for row in &rows {
            if page.runs.len() >= max {
                page.next = page.runs.last().map(|run| PageCursor { created: run.created, id: run.id });
                return Ok(page);
            }
            match row::run(row) {
                Ok(run) => page.runs.push(run),
                Err(inconsistency) => row::left_out(&inconsistency),
            }
        }
        let Some(last) = rows.last().filter(|_| rows.len() == fetch) else { return Ok(page) };
        after = Some(place(last)?);
    }
}

/// Where a row of a listing stands, whether the rest of it decodes or not.
fn place(row: &Row) -> Result<PageCursor, Fault> {
    let created = row.int(9).ok().flatten().unwrap_or_default();
    Ok(PageCursor { created: Timestamp::from_micros(created), id: row::run_id(row, 0, "runs")? })
}

/// What a listing reads from, the table that gives the order, and the conditions. Each order is an index's, and the cursor is a place in
/// it. By label: the first label's; by live states: that of live runs; else by tenant, or all. The rest is checked row by row.
fn listing(filter: &RunFilter, after: Option<PageCursor>) -> (&'static str, &'static str, Conditions) {
    let mut conditions = Conditions::default();
    let text = |s: &str| Value::Text(s.to_owned());
    let mut labels = filter.labels.iter();
    let (from, by) = match labels.next() {
        Some((name, value)) => {
            conditions.and("l.name = ? AND l.value = ?", [text(name), text(value)]);
            ("labels l JOIN runs r ON r.rn = l.rn", "l")
        }
        None => ("runs r", "r"),
    };
    // Shadows are no caller's.
    conditions.and(NO_SHADOW, []);
    if let Some(tenant) = &filter.tenant {
        conditions.and("r.tenant = ?", [text(tenant.as_str())]);
    }
    if !filter.states.is_empty() {
        if filter.states.iter().all(|state| !state.is_terminal()) {
            conditions.and("r.ended IS NULL", []);
        }
        let marks = vec!["?"; filter.states.len()].join(", ");
        let states = filter.states.iter().map(|state| text(state.as_str()));
        conditions.and(&format!("r.state IN ({marks})"), states);
    }
    if let Some(backend) = &filter.backend {
        conditions.and("r.backend = ?", [text(backend.as_str())]);
    }
    if let Some(from) = filter.created_from {
        conditions.and(&format!("{by}.created >= ?"), [Value::Int(from.as_micros())]);
    }
    if let Some(until) = filter.created_until {
        conditions.and(&format!("{by}.created < ?"), [Value::Int(until.as_micros())]);
    }
    if let Some(cursor) = after {
        let place = [Value::Int(cursor.created.as_micros()), Value::Bytes(row::key(cursor.id).to_vec())];
        conditions.and(&format!("({by}.created, {by}.id) < (?, ?)"), place);
    }
    for (name, value) in labels {
        let has = "EXISTS (SELECT 1 FROM labels m WHERE m.name = ? AND m.value = ? AND m.created = r.created AND m.id = r.id)";
        conditions.and(has, [text(name), text(value)]);
    }
    (from, by, conditions)
}

/// Whether anything can be read at all.
pub(crate) async fn probe(conn: &Conn) -> Result<(), Fault> {
    conn.row("SELECT count FROM probe", &[]).await?;
    Ok(())
}
