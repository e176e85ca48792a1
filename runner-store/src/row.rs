//! Between rows and the domain. What does not decode is an [`Inconsistency`] that names table, column and key, never the
//! value.

use std::{str::FromStr, sync::Arc, time::Duration};

use runner_core::{
    clock::Timestamp,
    id::RunId,
    shadow::{Pair, PairRecord, Stage, Verdict},
    state::{Position, RunState},
    store::{
        AttemptRecord, AuditEntry, EndedCursor, EndedRun, Inconsistency, RunRecord, StoreError, StoredAudit,
        StoredEvent, StoredTraffic, Timer, TimerKind,
    },
};
use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

/// What [`run`] decodes, in its order. `r` is `runs`, `s` is `specs`, joined to the left.
macro_rules! run_columns {
    () => {
        "r.id, r.tenant, r.key, r.state, r.attempt, r.backend, r.backend_reason, r.cancel, r.not_before, \
         r.created, r.started, r.ended, r.outcome, r.last_event, s.spec, r.decision"
    };
}
pub(crate) use run_columns;

/// What [`pair`] decodes, in its order.
macro_rules! pair_columns {
    () => {
        "pn, primary_id, tenant, image, primary_backend, shadow_backend, stage, since, judged, verdict"
    };
}
pub(crate) use pair_columns;

/// A value of another type than the column's. What it is stays in the database.
#[derive(Debug)]
pub(crate) struct WrongType;

/// A row of either database. `None`: null.
pub(crate) trait Columns {
    fn int(&self, at: usize) -> Result<Option<i64>, WrongType>;
    fn text(&self, at: usize) -> Result<Option<&str>, WrongType>;
    fn bytes(&self, at: usize) -> Result<Option<&[u8]>, WrongType>;
    /// Text of people, which may have any character: a database that cannot store each has it in another form.
    fn prose(&self, at: usize) -> Result<Option<String>, WrongType>;
}

/// One row of one table, and the key that an inconsistency names it by.
struct Source<'a, R> {
    row: &'a R,
    table: &'static str,
    key: String,
}

impl<R: Columns> Source<'_, R> {
    fn wrong(&self, column: &'static str, detail: impl Into<String>) -> Inconsistency {
        Inconsistency { table: self.table, column, key: self.key.clone(), detail: detail.into() }
    }

    fn checked<T>(&self, value: Result<T, WrongType>, column: &'static str) -> Result<T, Inconsistency> {
        value.map_err(|WrongType| self.wrong(column, "is of a wrong type"))
    }

    /// A value that the column must have.
    fn must<T>(&self, value: Result<Option<T>, WrongType>, column: &'static str) -> Result<T, Inconsistency> {
        self.checked(value, column)?.ok_or_else(|| self.wrong(column, "is missing"))
    }

    fn text(&self, at: usize, column: &'static str) -> Result<&str, Inconsistency> {
        self.must(self.row.text(at), column)
    }

    fn prose(&self, at: usize, column: &'static str) -> Result<String, Inconsistency> {
        self.must(self.row.prose(at), column)
    }

    fn parse<T: FromStr>(&self, at: usize, column: &'static str) -> Result<T, Inconsistency> {
        self.text(at, column)?.parse().map_err(|_| self.wrong(column, "is not a valid name"))
    }

    fn number<T: TryFrom<i64>>(&self, at: usize, column: &'static str) -> Result<T, Inconsistency> {
        let number = self.must(self.row.int(at), column)?;
        number.try_into().map_err(|_| self.wrong(column, "is out of range"))
    }

    fn time(&self, at: usize, column: &'static str) -> Result<Option<Timestamp>, Inconsistency> {
        Ok(self.checked(self.row.int(at), column)?.map(Timestamp::from_micros))
    }

    fn must_time(&self, at: usize, column: &'static str) -> Result<Timestamp, Inconsistency> {
        self.must(self.row.int(at), column).map(Timestamp::from_micros)
    }

    fn json<T: DeserializeOwned>(&self, at: usize, column: &'static str) -> Result<Option<T>, Inconsistency> {
        let Some(text) = self.checked(self.row.text(at), column)? else { return Ok(None) };
        serde_json::from_str(text).map(Some).map_err(|error| self.wrong(column, json_fault(&error)))
    }

    fn must_json<T: DeserializeOwned>(&self, at: usize, column: &'static str) -> Result<T, Inconsistency> {
        self.json(at, column)?.ok_or_else(|| self.wrong(column, "is missing"))
    }
}

/// The number that names a row in a message, where it has one.
fn named(row: &impl Columns, at: usize) -> i64 {
    row.int(at).ok().flatten().unwrap_or(-1)
}

/// Where and what kind; serde's own message may quote the value.
fn json_fault(error: &serde_json::Error) -> String {
    format!("is not the JSON that is expected: {:?} at byte {}", error.classify(), error.column())
}

/// JSON of a domain value.
pub(crate) fn to_json<T: Serialize>(value: &T) -> Result<String, StoreError> {
    serde_json::to_string(value)
        .map_err(|error| StoreError::Other(format!("cannot be written as JSON: {error}")))
}

/// A row of `read::ENDED`.
pub(crate) fn ended(row: &impl Columns) -> Result<EndedRun, Inconsistency> {
    let id = run_id(row, 0, "runs")?;
    let src = Source { row, table: "runs", key: id.to_string() };
    Ok(EndedRun { id, tenant: src.parse(1, "tenant")?, ended: src.must_time(2, "ended")? })
}

/// Decodes `id, ended` of `sweeps`.
pub(crate) fn swept(row: &impl Columns) -> Result<EndedCursor, Inconsistency> {
    let id = run_id(row, 0, "sweeps")?;
    let src = Source { row, table: "sweeps", key: id.to_string() };
    Ok(EndedCursor { ended: src.must_time(1, "ended")?, id })
}

/// Says that a listing goes on without a row.
pub(crate) fn left_out(inconsistency: &Inconsistency) {
    tracing::warn!(
        table = inconsistency.table,
        column = inconsistency.column,
        key = inconsistency.key,
        detail = inconsistency.detail,
        "left a row out of a listing"
    );
}

/// Decodes `version, state` of `traffic`.
pub(crate) fn traffic(row: &impl Columns) -> Result<StoredTraffic, Inconsistency> {
    let src = Source { row, table: "traffic", key: "1".to_owned() };
    Ok(StoredTraffic { version: src.number(0, "version")?, traffic: src.must_json(1, "state")? })
}

/// Decodes `seq, time, actor, action, what, reason, version` of `audit`.
pub(crate) fn audit(row: &impl Columns) -> Result<StoredAudit, Inconsistency> {
    let src = Source { row, table: "audit", key: named(row, 0).to_string() };
    let entry = AuditEntry {
        time: src.must_time(1, "time")?,
        actor: src.prose(2, "actor")?,
        action: src.prose(3, "action")?,
        what: src.prose(4, "what")?,
        reason: src.prose(5, "reason")?,
    };
    Ok(StoredAudit { seq: src.number(0, "seq")?, version: src.number(6, "version")?, entry })
}

/// Decodes `pn, primary_id, tenant, image, primary_backend, shadow_backend, stage, since, judged, verdict` of `pairs`.
pub(crate) fn pair(row: &impl Columns) -> Result<PairRecord, Inconsistency> {
    let primary = run_id(row, 1, "pairs")?;
    let src = Source { row, table: "pairs", key: primary.to_string() };
    let stage = src.text(6, "stage")?;
    let stage = Stage::ALL
        .into_iter()
        .find(|known| known.as_str() == stage)
        .ok_or_else(|| src.wrong("stage", "is not a known stage"))?;
    let verdict: Option<Verdict> = src.json(9, "verdict")?;
    let expected = match stage {
        Stage::Pending | Stage::Running | Stage::Orphaned => None,
        Stage::Compared | Stage::Skipped => Some(stage),
    };
    if verdict.as_ref().map(Verdict::stage) != expected {
        return Err(src.wrong("verdict", "does not agree with the stage"));
    }
    let pair = Pair {
        primary,
        tenant: src.parse(2, "tenant")?,
        image: src.checked(row.prose(3), "image")?,
        primary_backend: src.parse(4, "primary_backend")?,
        shadow_backend: src.parse(5, "shadow_backend")?,
    };
    Ok(PairRecord {
        number: src.number(0, "pn")?,
        pair,
        stage,
        since: src.must_time(7, "since")?,
        judged: src.time(8, "judged")?,
        verdict,
    })
}

/// The key of a run's row: the UUID's bytes.
pub(crate) fn key(id: RunId) -> [u8; 16] {
    *id.as_uuid().as_bytes()
}

/// A number that is never near the limit, for a column.
pub(crate) fn int(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub(crate) fn run_id(row: &impl Columns, at: usize, table: &'static str) -> Result<RunId, Inconsistency> {
    let wrong =
        |detail: &str| Inconsistency { table, column: "id", key: "?".to_owned(), detail: detail.to_owned() };
    let bytes = row.bytes(at).map_err(|WrongType| wrong("is of a wrong type"))?;
    let uuid =
        Uuid::from_slice(bytes.ok_or_else(|| wrong("is missing"))?).map_err(|_| wrong("is not 16 bytes"))?;
    Ok(RunId::new(uuid))
}

/// Decodes a row of [`run_columns`].
pub(crate) fn run(row: &impl Columns) -> Result<RunRecord, Inconsistency> {
    let id = run_id(row, 0, "runs")?;
    let src = Source { row, table: "runs", key: id.to_string() };
    let state = src.text(3, "state")?;
    let state = RunState::ALL
        .into_iter()
        .find(|known| known.as_str() == state)
        .ok_or_else(|| src.wrong("state", "is not a known state"))?;
    let ended = src.time(11, "ended")?;
    // What is live is selected by `ended`: were the two to disagree, a run would be lost or driven again.
    if state.is_terminal() != ended.is_some() {
        return Err(src.wrong("ended", "does not agree with the state"));
    }
    let outcome = src.json(12, "outcome")?;
    if state.is_terminal() != outcome.is_some() {
        return Err(src.wrong("outcome", "does not agree with the state"));
    }
    let key = src.checked(row.text(2), "key")?;
    let key = key.map(|key| key.parse().map_err(|_| src.wrong("key", "is not a valid name"))).transpose()?;
    let spec_src = Source { row, table: "specs", key: src.key.clone() };
    let spec = spec_src.must_json(14, "spec")?;
    Ok(RunRecord {
        id,
        tenant: src.parse(1, "tenant")?,
        key,
        spec: Arc::new(spec),
        position: Position { state, attempt: src.number(4, "attempt")? },
        backend: src.parse(5, "backend")?,
        backend_reason: src.prose(6, "backend_reason")?,
        decision: src.json(15, "decision")?,
        cancel: src.json(7, "cancel")?,
        not_before: src.time(8, "not_before")?,
        created: src.must_time(9, "created")?,
        started: src.time(10, "started")?,
        ended,
        outcome,
        last_event: src.number(13, "last_event")?,
    })
}

/// Decodes `number, backend, started, ended, outcome` of `attempts`.
pub(crate) fn attempt(row: &impl Columns, run: RunId) -> Result<AttemptRecord, Inconsistency> {
    let src = Source { row, table: "attempts", key: format!("{run}.{}", named(row, 0)) };
    Ok(AttemptRecord {
        number: src.number(0, "number")?,
        backend: src.parse(1, "backend")?,
        started: src.time(2, "started")?,
        ended: src.must_time(3, "ended")?,
        outcome: src.must_json(4, "outcome")?,
    })
}

/// Decodes `seq, time, event` of `events`.
pub(crate) fn event(row: &impl Columns, run: RunId) -> Result<StoredEvent, Inconsistency> {
    let src = Source { row, table: "events", key: format!("{run}#{}", named(row, 0)) };
    Ok(StoredEvent {
        seq: src.number(0, "seq")?,
        time: src.must_time(1, "time")?,
        event: src.must_json(2, "event")?,
    })
}

/// Decodes `id, kind, due, duration` of `runs` and `timers`.
pub(crate) fn timer(row: &impl Columns) -> Result<(RunId, Timer), Inconsistency> {
    let id = run_id(row, 0, "runs")?;
    let src = Source { row, table: "timers", key: id.to_string() };
    let kind = src.text(1, "kind")?;
    let kind = [TimerKind::Pending, TimerKind::Deadline, TimerKind::Retry]
        .into_iter()
        .find(|known| timer_name(*known) == kind)
        .ok_or_else(|| src.wrong("kind", "is not a known kind"))?;
    let due = src.must_time(2, "due")?;
    let duration = Duration::from_nanos(src.number(3, "duration")?);
    Ok((id, Timer { kind, due, duration }))
}

/// How a timer's kind is written.
pub(crate) const fn timer_name(kind: TimerKind) -> &'static str {
    match kind {
        TimerKind::Pending => "pending",
        TimerKind::Deadline => "deadline",
        TimerKind::Retry => "retry",
    }
}

/// A duration as it is stored. 292 years are for ever.
pub(crate) fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}
