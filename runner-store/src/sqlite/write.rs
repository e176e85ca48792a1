//! What writes. Each verb runs inside of the writer's transaction; its answer is given after the commit.

use runner_core::{
    clock::Timestamp,
    id::{IdempotencyKey, RunId},
    outcome::Outcome,
    state::{Position, RunState},
    store::{
        Accepted, AuditEntry, CancelIntent, CancelRequested, EndedCursor, LiveLimits, NewRun, Removed,
        RunEvent, RunRecord, StoreError, Swept, Timer, TrafficSet, Transition, Transitioned,
    },
    traffic::{Decision, Traffic},
};
use rusqlite::{CachedStatement, Connection, OptionalExtension as _, named_params, params};

use super::{error::Fault, pairs, read};
use crate::{
    live::LiveCounts,
    row::{self, to_json},
};

pub(crate) const INSERT_RUN: &str = "INSERT INTO runs (id, tenant, key, digest, state, attempt, backend, backend_reason, created, decision, last_event) \
     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, 1) ON CONFLICT DO NOTHING";
pub(crate) const INSERT_SPEC: &str = "INSERT INTO specs (rn, spec) VALUES (?1, ?2)";
pub(crate) const INSERT_LABEL: &str =
    "INSERT INTO labels (name, value, created, id, rn) VALUES (?1, ?2, ?3, ?4, ?5)";
pub(crate) const INSERT_NAMED: &str = "INSERT INTO named_uploads (upload, rn) VALUES (?1, ?2)";
pub(crate) const INSERT_EVENT: &str = "INSERT INTO events (rn, seq, time, event) VALUES (?1, ?2, ?3, ?4)";
pub(crate) const INSERT_ATTEMPT: &str =
    "INSERT INTO attempts (rn, number, backend, started, ended, outcome) VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
pub(crate) const INSERT_TIMER: &str = "INSERT INTO timers (rn, kind, due, duration) VALUES (?1, ?2, ?3, ?4)";
pub(crate) const DELETE_TIMERS: &str = "DELETE FROM timers WHERE rn = ?1";
pub(crate) const BY_ID: &str = "SELECT tenant, digest FROM runs WHERE id = ?1";
pub(crate) const BY_KEY: &str = "SELECT id, digest FROM runs WHERE tenant = ?1 AND key = ?2";
/// Leaves `ended` alone, so that the index of live runs is not touched.
pub(crate) const MOVE: &str = "UPDATE runs SET state = :state, attempt = :attempt, started = coalesce(:started, started), \
     not_before = :not_before, last_event = last_event + :events \
     WHERE id = :id AND state = :at_state AND attempt = :at_attempt AND ended IS NULL \
     AND (NOT :unless_cancelled OR cancel IS NULL) RETURNING rn, last_event, tenant";
pub(crate) const END: &str = "UPDATE runs SET state = :state, attempt = :attempt, started = coalesce(:started, started), \
     not_before = :not_before, last_event = last_event + :events, ended = :ended, outcome = :outcome \
     WHERE id = :id AND state = :at_state AND attempt = :at_attempt AND ended IS NULL \
     AND (NOT :unless_cancelled OR cancel IS NULL) RETURNING rn, last_event, tenant";
pub(crate) const NEXT_EVENT: &str =
    "UPDATE runs SET last_event = last_event + 1 WHERE id = ?1 AND ended IS NULL RETURNING rn, last_event";
pub(crate) const CANCEL: &str = "UPDATE runs SET cancel = ?2 WHERE id = ?1 AND ended IS NULL";
pub(crate) const ENDED: &str = "SELECT rn, ended FROM runs WHERE id = ?1";
/// What belongs to a run, and then the run.
pub(crate) const REMOVE: [&str; 8] = [
    "DELETE FROM removals WHERE rn = ?1",
    "DELETE FROM named_uploads WHERE rn = ?1",
    "DELETE FROM timers WHERE rn = ?1",
    "DELETE FROM attempts WHERE rn = ?1",
    "DELETE FROM events WHERE rn = ?1",
    "DELETE FROM labels WHERE rn = ?1",
    "DELETE FROM specs WHERE rn = ?1",
    "DELETE FROM runs WHERE rn = ?1 AND ended IS NOT NULL",
];
pub(crate) const BEGIN_REMOVAL: &str = "INSERT OR IGNORE INTO removals (rn) VALUES (?1)";
pub(crate) const SET_SWEPT: &str = "INSERT INTO sweeps (kind, ended, id) VALUES (?1, ?2, ?3) \
     ON CONFLICT (kind) DO UPDATE SET ended = excluded.ended, id = excluded.id";
pub(crate) const FIRST_TRAFFIC: &str =
    "INSERT INTO traffic (one, version, state) VALUES (1, 1, ?1) ON CONFLICT DO NOTHING";
pub(crate) const NEXT_TRAFFIC: &str =
    "UPDATE traffic SET version = version + 1, state = ?1 WHERE version = ?2";
pub(crate) const TRAFFIC_VERSION: &str = "SELECT version FROM traffic";
pub(crate) const INSERT_AUDIT: &str =
    "INSERT INTO audit (time, actor, action, what, reason, version) VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
pub(crate) const PROBE: &str = "UPDATE probe SET count = count + 1";

/// What a verb works on.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    pub(crate) conn: &'a Connection,
    pub(crate) live: &'a mut LiveCounts,
}

impl Context<'_> {
    pub(crate) fn statement(&self, sql: &str) -> Result<CachedStatement<'_>, Fault> {
        Ok(self.conn.prepare_cached(sql)?)
    }

    fn insert_event(&self, rn: i64, seq: i64, time: Timestamp, json: &str) -> Result<(), Fault> {
        self.statement(INSERT_EVENT)?.execute(params![rn, seq, time.as_micros(), json])?;
        Ok(())
    }

    fn must_get(&self, id: RunId) -> Result<RunRecord, Fault> {
        read::get(self.conn, id)?.ok_or(Fault::Answer(StoreError::NotFound(id)))
    }
}

/// A verb that writes. It may be executed more than once, the transaction of the first time having been rolled back.
pub(crate) trait Verb: Send + 'static {
    /// What the caller is told.
    type Answer: Send + 'static;
    /// Does it. On an error the caller of this function takes back what was done.
    fn execute(&self, cx: &mut Context<'_>) -> Result<Self::Answer, Fault>;
}

/// `Store::accept`. Made by the caller's task, so that the writer has no JSON to write.
pub(crate) struct Accept {
    run: NewRun,
    limits: LiveLimits,
    spec: String,
    event: String,
    decision: Option<String>,
}

impl Accept {
    pub(crate) fn new(run: NewRun, limits: LiveLimits) -> Result<Self, StoreError> {
        let spec = to_json(&*run.spec)?;
        let event = to_json(&NewRun::first_event())?;
        let decision = run.decision.as_ref().map(to_json::<Decision>).transpose()?;
        Ok(Self { run, limits, spec, event, decision })
    }

    /// The limit that is reached. A shadow counts against none.
    fn full(&self, live: &LiveCounts) -> Option<(&'static str, u64)> {
        if self.run.id.is_shadow() { None } else { live.full(self.run.tenant.as_str(), self.limits) }
    }

    fn insert(&self, cx: &mut Context<'_>) -> Result<bool, Fault> {
        let run = &self.run;
        let id = row::key(run.id);
        let created = run.time.as_micros();
        let inserted = cx.statement(INSERT_RUN)?.execute(params![
            id,
            run.tenant.as_str(),
            run.key.as_ref().map(IdempotencyKey::as_str),
            run.digest,
            Position::START.state.as_str(),
            Position::START.attempt,
            run.backend.as_str(),
            run.backend_reason,
            created,
            self.decision,
        ])?;
        if inserted == 0 {
            return Ok(false);
        }
        let rn = cx.conn.last_insert_rowid();
        cx.statement(INSERT_SPEC)?.execute(params![rn, self.spec])?;
        cx.insert_event(rn, 1, run.time, &self.event)?;
        // Labels are there for listings, and no listing shows a shadow.
        let labels = run.spec.labels.iter().filter(|_| !run.id.is_shadow());
        for (name, value) in labels {
            cx.statement(INSERT_LABEL)?.execute(params![name, value, created, id, rn])?;
        }
        for upload in run.spec.uploads() {
            cx.statement(INSERT_NAMED)?.execute(params![upload.as_str(), rn])?;
        }
        if !run.id.is_shadow() {
            cx.live.add(run.tenant.as_str());
        }
        Ok(true)
    }

    /// What the id or the key names already.
    fn existing(&self, cx: &Context<'_>) -> Result<Option<Accepted>, Fault> {
        let run = &self.run;
        let by_id: Option<(String, Vec<u8>)> = cx
            .statement(BY_ID)?
            .query_row([row::key(run.id)], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()?;
        let by_key: Option<(Vec<u8>, Vec<u8>)> = match &run.key {
            None => None,
            Some(key) => cx
                .statement(BY_KEY)?
                .query_row([run.tenant.as_str(), key.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()?,
        };
        if let Some((tenant, digest)) = &by_id
            && (tenant != run.tenant.as_str() || *digest != run.digest)
        {
            return Ok(Some(Accepted::Conflict { field: "run_id" }));
        }
        if let Some((_, digest)) = &by_key
            && *digest != run.digest
        {
            return Ok(Some(Accepted::Conflict { field: "idempotency_key" }));
        }
        let id = match (by_id, by_key) {
            (Some(_), _) => run.id,
            (None, Some((id, _))) => uuid::Uuid::from_slice(&id)
                .map(RunId::new)
                .map_err(|_| StoreError::Other("a run's id is not 16 bytes".to_owned()))?,
            (None, None) => return Ok(None),
        };
        Ok(Some(Accepted::Existing(cx.must_get(id)?)))
    }
}

impl Verb for Accept {
    type Answer = Accepted;

    fn execute(&self, cx: &mut Context<'_>) -> Result<Accepted, Fault> {
        let full = self.full(cx.live);
        if self.run.id.is_shadow() {
            return match self.existing(cx)? {
                Some(answer) => Ok(answer),
                None if !pairs::begin(cx, self.run.id)? => Ok(Accepted::Conflict { field: "run_id" }),
                None if self.insert(cx)? => Ok(Accepted::Created(self.run.clone().into_record())),
                // The pair must not be left without its shadow.
                None => Err(StoreError::Other("a shadow was neither inserted nor found".to_owned()).into()),
            };
        }
        if full.is_none() && self.insert(cx)? {
            return Ok(Accepted::Created(self.run.clone().into_record()));
        }
        match (self.existing(cx)?, full) {
            (Some(answer), _) => Ok(answer),
            (None, Some((limit, max))) => Ok(Accepted::Full { limit, max }),
            // One writer: what was in the way cannot have gone.
            (None, None) => Err(StoreError::Other("a run was neither inserted nor found".to_owned()).into()),
        }
    }
}

/// `Store::transition`.
pub(crate) struct Move {
    transition: Transition,
    events: Vec<String>,
    outcome: Option<String>,
    attempt_outcome: Option<String>,
}

impl Move {
    pub(crate) fn new(transition: Transition) -> Result<Self, StoreError> {
        if let Some(fault) = transition.fault() {
            return Err(StoreError::Other(format!("the transition is malformed: {fault}")));
        }
        Ok(Self {
            events: transition.events.iter().map(to_json).collect::<Result<_, _>>()?,
            outcome: transition.outcome.as_ref().map(to_json).transpose()?,
            attempt_outcome: transition
                .ended_attempt
                .as_ref()
                .map(|attempt| to_json(&attempt.outcome))
                .transpose()?,
            transition,
        })
    }
}

impl Verb for Move {
    type Answer = Transitioned;

    fn execute(&self, cx: &mut Context<'_>) -> Result<Transitioned, Fault> {
        let t = &self.transition;
        let changed =
            update(cx, t, i64::try_from(self.events.len()).unwrap_or(i64::MAX), self.outcome.as_deref())?;
        let Some((rn, last_event, tenant)) = changed else {
            return Ok(Transitioned::Conflict(Box::new(cx.must_get(t.run)?)));
        };
        let first = last_event - i64::try_from(self.events.len()).unwrap_or(0) + 1;
        for (seq, event) in (first..).zip(&self.events) {
            cx.insert_event(rn, seq, t.time, event)?;
        }
        if let (Some(attempt), Some(outcome)) = (&t.ended_attempt, &self.attempt_outcome) {
            cx.statement(INSERT_ATTEMPT)?.execute(params![
                rn,
                attempt.number,
                attempt.backend.as_str(),
                attempt.started.map(Timestamp::as_micros),
                attempt.ended.as_micros(),
                outcome,
            ])?;
        }
        cx.statement(DELETE_TIMERS)?.execute([rn])?;
        for Timer { kind, due, duration } in &t.timers {
            cx.statement(INSERT_TIMER)?.execute(params![
                rn,
                row::timer_name(*kind),
                due.as_micros(),
                row::nanos(*duration)
            ])?;
        }
        if t.next.state.is_terminal() && !t.run.is_shadow() {
            cx.live.remove(&tenant);
        }
        if let Some(pair) = &t.pair {
            pairs::insert(cx, pair, t.time)?;
        }
        Ok(Transitioned::Applied { last_event: u64::try_from(last_event).unwrap_or(0) })
    }
}

/// The conditional update. `id` is unique, so at most one row changes; what it returns says that one did.
fn update(
    cx: &Context<'_>,
    t: &Transition,
    events: i64,
    outcome: Option<&str>,
) -> Result<Option<(i64, i64, String)>, Fault> {
    let id = row::key(t.run);
    let mut params: Vec<(&str, &dyn rusqlite::ToSql)> = Vec::with_capacity(11);
    let (state, at_state) = (t.next.state.as_str(), t.expected.state.as_str());
    let (started, not_before) = (t.started.map(Timestamp::as_micros), t.not_before.map(Timestamp::as_micros));
    let ended = t.time.as_micros();
    params.extend_from_slice(named_params! {
        ":state": state,
        ":attempt": t.next.attempt,
        ":started": started,
        ":not_before": not_before,
        ":events": events,
        ":id": id,
        ":at_state": at_state,
        ":at_attempt": t.expected.attempt,
        ":unless_cancelled": t.unless_cancelled,
    });
    let sql = if t.next.state.is_terminal() {
        params.extend_from_slice(named_params! { ":ended": ended, ":outcome": outcome });
        END
    } else {
        MOVE
    };
    let changed = cx
        .statement(sql)?
        .query_row(params.as_slice(), |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .optional()?;
    Ok(changed)
}

/// `Store::append_event`.
pub(crate) struct Append {
    id: RunId,
    time: Timestamp,
    event: String,
}

impl Append {
    pub(crate) fn new(id: RunId, event: &RunEvent, time: Timestamp) -> Result<Self, StoreError> {
        match event {
            RunEvent::Outputs(_) | RunEvent::Notice(_) => Ok(Self { id, time, event: to_json(event)? }),
            RunEvent::StateChanged { .. } | RunEvent::Terminated { .. } => Err(StoreError::Other(
                "a change of position is stored by a transition, not appended".to_owned(),
            )),
        }
    }
}

impl Verb for Append {
    type Answer = Option<u64>;

    fn execute(&self, cx: &mut Context<'_>) -> Result<Option<u64>, Fault> {
        let id = row::key(self.id);
        let next: Option<(i64, i64)> =
            cx.statement(NEXT_EVENT)?.query_row([id], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
        match next {
            Some((rn, seq)) => {
                cx.insert_event(rn, seq, self.time, &self.event)?;
                Ok(u64::try_from(seq).ok())
            }
            None if cx.statement(read::RN)?.exists([id])? => Ok(None),
            None => Err(StoreError::NotFound(self.id).into()),
        }
    }
}

/// `Store::request_cancel`.
pub(crate) struct Cancel {
    pub(crate) id: RunId,
    pub(crate) intent: CancelIntent,
    pub(crate) in_queue: Outcome,
}

impl Verb for Cancel {
    type Answer = CancelRequested;

    fn execute(&self, cx: &mut Context<'_>) -> Result<CancelRequested, Fault> {
        let mut run = cx.must_get(self.id)?;
        if run.position.state.is_terminal() {
            return Ok(CancelRequested { run, newly: false });
        }
        let newly = run.cancel.is_none();
        if newly {
            let changed =
                cx.statement(CANCEL)?.execute(params![row::key(self.id), to_json(&self.intent)?])?;
            if changed != 1 {
                return Err(
                    StoreError::Other(format!("storing an intent to cancel changed {changed} rows")).into()
                );
            }
            run.cancel = Some(self.intent.clone());
        }
        if run.position.state == RunState::Queued {
            self.end_in_queue(cx, &mut run)?;
        }
        Ok(CancelRequested { run, newly })
    }
}

impl Cancel {
    /// No attempt executes the run, so nobody has to be waited for.
    fn end_in_queue(&self, cx: &mut Context<'_>, run: &mut RunRecord) -> Result<(), Fault> {
        let next = Position { state: RunState::Cancelled, attempt: run.position.attempt };
        let end = Move::new(Transition {
            run: run.id,
            expected: run.position,
            next,
            unless_cancelled: false,
            time: self.intent.time,
            started: None,
            not_before: None,
            outcome: Some(self.in_queue.clone()),
            ended_attempt: None,
            events: vec![RunEvent::Terminated { position: next, outcome: self.in_queue.clone() }],
            timers: Vec::new(),
            // A cancelled run has no shadow.
            pair: None,
        })?;
        match end.execute(cx)? {
            Transitioned::Applied { last_event } => {
                run.position = next;
                run.not_before = None;
                run.ended = Some(self.intent.time);
                run.outcome = Some(self.in_queue.clone());
                run.last_event = last_event;
                Ok(())
            }
            // It was read in this very transaction.
            Transitioned::Conflict(_) => {
                Err(StoreError::Other("a queued run changed under its own transaction".to_owned()).into())
            }
        }
    }
}

/// The row number of a terminal run; else why there is none.
fn terminal(cx: &Context<'_>, id: RunId) -> Result<Result<i64, Removed>, Fault> {
    let found: Option<(i64, Option<i64>)> =
        cx.statement(ENDED)?.query_row([row::key(id)], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
    Ok(match found {
        None => Err(Removed::Unknown),
        Some((_, None)) => Err(Removed::Live),
        Some((rn, Some(_))) => Ok(rn),
    })
}

/// `Store::begin_removal`.
pub(crate) struct BeginRemoval(pub(crate) RunId);

impl Verb for BeginRemoval {
    type Answer = Removed;

    fn execute(&self, cx: &mut Context<'_>) -> Result<Removed, Fault> {
        match terminal(cx, self.0)? {
            Err(answer) => Ok(answer),
            Ok(rn) => {
                cx.statement(BEGIN_REMOVAL)?.execute([rn])?;
                Ok(Removed::Gone)
            }
        }
    }
}

/// `Store::remove`.
pub(crate) struct Remove(pub(crate) RunId);

impl Verb for Remove {
    type Answer = Removed;

    fn execute(&self, cx: &mut Context<'_>) -> Result<Removed, Fault> {
        let rn = match terminal(cx, self.0)? {
            Err(answer) => return Ok(answer),
            Ok(rn) => rn,
        };
        let mut removed = 0;
        for sql in REMOVE {
            removed = cx.statement(sql)?.execute([rn])?;
        }
        pairs::removed(cx, self.0)?;
        // The last statement is the run's own.
        match removed {
            1 => Ok(Removed::Gone),
            rows => Err(StoreError::Other(format!("removing a run changed {rows} rows")).into()),
        }
    }
}

/// `Store::set_swept`.
pub(crate) struct SetSwept(pub(crate) Swept, pub(crate) EndedCursor);

impl Verb for SetSwept {
    type Answer = ();

    fn execute(&self, cx: &mut Context<'_>) -> Result<(), Fault> {
        let (what, cursor) = (self.0, self.1);
        let ended = cursor.ended.as_micros();
        match cx.statement(SET_SWEPT)?.execute(params![what.as_str(), ended, row::key(cursor.id)])? {
            1 => Ok(()),
            rows => Err(StoreError::Other(format!("storing a sweep changed {rows} rows")).into()),
        }
    }
}

/// `Store::set_traffic`.
pub(crate) struct SetTraffic {
    expected: u64,
    state: String,
    entry: AuditEntry,
}

impl SetTraffic {
    pub(crate) fn new(expected: u64, traffic: &Traffic, entry: AuditEntry) -> Result<Self, StoreError> {
        Ok(Self { expected, state: to_json(traffic)?, entry })
    }
}

impl Verb for SetTraffic {
    type Answer = TrafficSet;

    fn execute(&self, cx: &mut Context<'_>) -> Result<TrafficSet, Fault> {
        let stored = match self.expected {
            0 => cx.statement(FIRST_TRAFFIC)?.execute([&self.state])?,
            expected => cx.statement(NEXT_TRAFFIC)?.execute(params![self.state, row::int(expected)])?,
        };
        if stored == 0 {
            let version: Option<i64> =
                cx.statement(TRAFFIC_VERSION)?.query_row((), |row| row.get(0)).optional()?;
            return Ok(TrafficSet::Conflict {
                version: version.and_then(|it| u64::try_from(it).ok()).unwrap_or(0),
            });
        }
        let version = self.expected + 1;
        let AuditEntry { time, actor, action, what, reason } = &self.entry;
        let values = params![time.as_micros(), actor, action, what, reason, row::int(version)];
        cx.statement(INSERT_AUDIT)?.execute(values)?;
        Ok(TrafficSet::Stored { version })
    }
}

/// The write of `Store::probe`.
pub(crate) struct Probe;

impl Verb for Probe {
    type Answer = ();

    fn execute(&self, cx: &mut Context<'_>) -> Result<(), Fault> {
        match cx.statement(PROBE)?.execute(())? {
            1 => Ok(()),
            rows => Err(StoreError::Other(format!("the probe's write changed {rows} rows")).into()),
        }
    }
}
