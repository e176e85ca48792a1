//! Between rows and the domain. What does not decode is an [`Inconsistency`] that names table, column and key, never the
//! value.

use std::{str::FromStr, sync::Arc, time::Duration};

use runner_core::{
    clock::Timestamp,
    id::RunId,
    shadow::{Pair, PairRecord, Stage, Verdict},
    state::{Position, RunState},
    store::{
        AttemptRecord, AuditEntry, EndedRun, Inconsistency, RunRecord, StoreError, StoredAudit, StoredEvent,
        StoredTraffic, Timer, TimerKind,
    },
};
use rusqlite::{Row, types::FromSql};
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

/// One row of one table, and the key that an inconsistency names it by.
struct Source<'a, 'stmt> {
    row: &'a Row<'stmt>,
    table: &'static str,
    key: String,
}

impl Source<'_, '_> {
    fn wrong(&self, column: &'static str, detail: impl Into<String>) -> Inconsistency {
        Inconsistency { table: self.table, column, key: self.key.clone(), detail: detail.into() }
    }

    fn get<T: FromSql>(&self, at: usize, column: &'static str) -> Result<T, Inconsistency> {
        // The error would quote the value's type or text; the column is enough.
        self.row.get(at).map_err(|_| self.wrong(column, "is of a wrong type"))
    }

    fn parse<T: FromStr>(&self, at: usize, column: &'static str) -> Result<T, Inconsistency> {
        let text: String = self.get(at, column)?;
        text.parse().map_err(|_| self.wrong(column, "is not a valid name"))
    }

    fn number<T: TryFrom<i64>>(&self, at: usize, column: &'static str) -> Result<T, Inconsistency> {
        let number: i64 = self.get(at, column)?;
        number.try_into().map_err(|_| self.wrong(column, "is out of range"))
    }

    fn time(&self, at: usize, column: &'static str) -> Result<Option<Timestamp>, Inconsistency> {
        Ok(self.get::<Option<i64>>(at, column)?.map(Timestamp::from_micros))
    }

    fn json<T: DeserializeOwned>(&self, at: usize, column: &'static str) -> Result<Option<T>, Inconsistency> {
        let value = self.row.get_ref(at).map_err(|_| self.wrong(column, "is of a wrong type"))?;
        let Some(text) = value.as_str_or_null().map_err(|_| self.wrong(column, "is of a wrong type"))? else {
            return Ok(None);
        };
        serde_json::from_str(text).map(Some).map_err(|error| self.wrong(column, json_fault(&error)))
    }
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
pub(crate) fn ended(row: &Row<'_>) -> Result<EndedRun, Inconsistency> {
    let mut source = Source { row, table: "runs", key: String::new() };
    let id = RunId::new(Uuid::from_bytes(source.get(0, "id")?));
    source.key = id.to_string();
    let ended = Timestamp::from_micros(source.get(2, "ended")?);
    Ok(EndedRun { id, tenant: source.parse(1, "tenant")?, ended })
}

/// Decodes `version, state` of `traffic`.
pub(crate) fn traffic(row: &Row<'_>) -> Result<StoredTraffic, Inconsistency> {
    let src = Source { row, table: "traffic", key: "1".to_owned() };
    let traffic = src.json(1, "state")?.ok_or_else(|| src.wrong("state", "is missing"))?;
    Ok(StoredTraffic { version: src.number(0, "version")?, traffic })
}

/// Decodes `seq, time, actor, action, what, reason, version` of `audit`.
pub(crate) fn audit(row: &Row<'_>) -> Result<StoredAudit, Inconsistency> {
    let number: i64 = row.get(0).unwrap_or(-1);
    let src = Source { row, table: "audit", key: number.to_string() };
    let entry = AuditEntry {
        time: src.time(1, "time")?.ok_or_else(|| src.wrong("time", "is missing"))?,
        actor: src.get(2, "actor")?,
        action: src.get(3, "action")?,
        what: src.get(4, "what")?,
        reason: src.get(5, "reason")?,
    };
    Ok(StoredAudit { seq: src.number(0, "seq")?, version: src.number(6, "version")?, entry })
}

/// Decodes `pn, primary_id, tenant, image, primary_backend, shadow_backend, stage, since, judged, verdict` of `pairs`.
pub(crate) fn pair(row: &Row<'_>) -> Result<PairRecord, Inconsistency> {
    let primary = run_id(row, 1, "pairs")?;
    let src = Source { row, table: "pairs", key: primary.to_string() };
    let stage: String = src.get(6, "stage")?;
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
        image: src.get(3, "image")?,
        primary_backend: src.parse(4, "primary_backend")?,
        shadow_backend: src.parse(5, "shadow_backend")?,
    };
    Ok(PairRecord {
        number: src.number(0, "pn")?,
        pair,
        stage,
        since: src.time(7, "since")?.ok_or_else(|| src.wrong("since", "is missing"))?,
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

fn run_id(row: &Row<'_>, at: usize, table: &'static str) -> Result<RunId, Inconsistency> {
    let wrong =
        |detail: &str| Inconsistency { table, column: "id", key: "?".to_owned(), detail: detail.to_owned() };
    let bytes: Vec<u8> = row.get(at).map_err(|_| wrong("is of a wrong type"))?;
    let uuid = Uuid::from_slice(&bytes).map_err(|_| wrong("is not 16 bytes"))?;
    Ok(RunId::new(uuid))
}

/// Decodes a row of [`run_columns`].
pub(crate) fn run(row: &Row<'_>) -> Result<RunRecord, Inconsistency> {
    let id = run_id(row, 0, "runs")?;
    let src = Source { row, table: "runs", key: id.to_string() };
    let state: String = src.get(3, "state")?;
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
    let key: Option<String> = src.get(2, "key")?;
    let key = key.map(|key| key.parse().map_err(|_| src.wrong("key", "is not a valid name"))).transpose()?;
    let created = src.time(9, "created")?.ok_or_else(|| src.wrong("created", "is missing"))?;
    let spec_src = Source { row, table: "specs", key: src.key.clone() };
    let spec = spec_src.json(14, "spec")?.ok_or_else(|| spec_src.wrong("spec", "is missing"))?;
    Ok(RunRecord {
        id,
        tenant: src.parse(1, "tenant")?,
        key,
        spec: Arc::new(spec),
        position: Position { state, attempt: src.number(4, "attempt")? },
        backend: src.parse(5, "backend")?,
        backend_reason: src.get(6, "backend_reason")?,
        decision: src.json(15, "decision")?,
        cancel: src.json(7, "cancel")?,
        not_before: src.time(8, "not_before")?,
        created,
        started: src.time(10, "started")?,
        ended,
        outcome,
        last_event: src.number(13, "last_event")?,
    })
}

/// Decodes `number, backend, started, ended, outcome` of `attempts`.
pub(crate) fn attempt(row: &Row<'_>, run: RunId) -> Result<AttemptRecord, Inconsistency> {
    let number: i64 = row.get(0).unwrap_or(-1);
    let src = Source { row, table: "attempts", key: format!("{run}.{number}") };
    Ok(AttemptRecord {
        number: src.number(0, "number")?,
        backend: src.parse(1, "backend")?,
        started: src.time(2, "started")?,
        ended: src.time(3, "ended")?.ok_or_else(|| src.wrong("ended", "is missing"))?,
        outcome: src.json(4, "outcome")?.ok_or_else(|| src.wrong("outcome", "is missing"))?,
    })
}

/// Decodes `seq, time, event` of `events`.
pub(crate) fn event(row: &Row<'_>, run: RunId) -> Result<StoredEvent, Inconsistency> {
    let seq: i64 = row.get(0).unwrap_or(-1);
    let src = Source { row, table: "events", key: format!("{run}#{seq}") };
    Ok(StoredEvent {
        seq: src.number(0, "seq")?,
        time: src.time(1, "time")?.ok_or_else(|| src.wrong("time", "is missing"))?,
        event: src.json(2, "event")?.ok_or_else(|| src.wrong("event", "is missing"))?,
    })
}

/// Decodes `id, kind, due, duration` of `runs` and `timers`.
pub(crate) fn timer(row: &Row<'_>) -> Result<(RunId, Timer), Inconsistency> {
    let id = run_id(row, 0, "runs")?;
    let src = Source { row, table: "timers", key: id.to_string() };
    let kind: String = src.get(1, "kind")?;
    let kind = [TimerKind::Pending, TimerKind::Deadline, TimerKind::Retry]
        .into_iter()
        .find(|known| timer_name(*known) == kind)
        .ok_or_else(|| src.wrong("kind", "is not a known kind"))?;
    let due = src.time(2, "due")?.ok_or_else(|| src.wrong("due", "is missing"))?;
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
