//! What writes. Each verb runs inside of the writer's transaction; its answer is given after the commit.
//!
//! There is one writer, so what a verb has read stays as it is until the commit. What of a verb does not wait for an answer is sent at
//! once: most verbs cost two round trips.

use async_trait::async_trait;
use futures::future::{try_join, try_join4};
use runner_core::{
    clock::Timestamp,
    id::{IdempotencyKey, RunId},
    outcome::Outcome,
    state::{Position, RunState},
    store::{
        Accepted, AuditEntry, CancelIntent, CancelRequested, EndedCursor, LiveLimits, NewRun, Removed,
        RunEvent, RunRecord, StoreError, Swept, TrafficSet, Transition, Transitioned,
    },
    traffic::Traffic,
};
use tokio_postgres::types::ToSql;

use super::{columns::prose, connect::Conn, error::Fault, pairs, read};
use crate::{
    live::LiveCounts,
    row::{self, to_json},
};

const INSERT_RUN: &str = "INSERT INTO runs (id, tenant, key, digest, state, attempt, backend, backend_reason, created, decision, last_event) \
     VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, 1) ON CONFLICT DO NOTHING RETURNING rn";
const INSERT_SPEC: &str = "INSERT INTO specs (rn, spec) VALUES ($1, $2)";
const INSERT_LABELS: &str = "INSERT INTO labels (name, value, created, id, rn) \
     SELECT name, value, $3, $4, $5 FROM unnest($1::text[], $2::text[]) AS new (name, value)";
const INSERT_NAMED: &str =
    "INSERT INTO named_uploads (upload, rn) SELECT upload, $2 FROM unnest($1::text[]) AS new (upload)";
/// The first of the events has the number `$2`.
const INSERT_EVENTS: &str = "INSERT INTO events (rn, seq, time, event) \
     SELECT $1, $2 + place - 1, $3, event FROM unnest($4::text[]) WITH ORDINALITY AS new (event, place)";
const INSERT_ATTEMPT: &str =
    "INSERT INTO attempts (rn, number, backend, started, ended, outcome) VALUES ($1, $2, $3, $4, $5, $6)";
const DELETE_TIMERS: &str = "DELETE FROM timers WHERE rn = $1 AND kind <> ALL ($2::text[])";
const SET_TIMERS: &str = "INSERT INTO timers (rn, kind, due, duration) \
     SELECT $1, kind, due, duration FROM unnest($2::text[], $3::bigint[], $4::bigint[]) AS new (kind, due, duration) \
     ON CONFLICT (rn, kind) DO UPDATE SET due = excluded.due, duration = excluded.duration";
const BY_ID: &str = "SELECT tenant, digest FROM runs WHERE id = $1";
const BY_KEY: &str = "SELECT id, digest FROM runs WHERE tenant = $1 AND key = $2";
/// Leaves `ended` alone, so that the index of live runs is not touched.
const MOVE: &str = "UPDATE runs SET state = $1, attempt = $2, started = coalesce($3, started), \
     not_before = $4, last_event = last_event + $5 \
     WHERE id = $6 AND state = $7 AND attempt = $8 AND ended IS NULL AND (NOT $9 OR cancel IS NULL) \
     RETURNING rn, last_event, tenant";
const END: &str = "UPDATE runs SET state = $1, attempt = $2, started = coalesce($3, started), \
     not_before = $4, last_event = last_event + $5, ended = $10, outcome = $11 \
     WHERE id = $6 AND state = $7 AND attempt = $8 AND ended IS NULL AND (NOT $9 OR cancel IS NULL) \
     RETURNING rn, last_event, tenant";
const NEXT_EVENT: &str =
    "UPDATE runs SET last_event = last_event + 1 WHERE id = $1 AND ended IS NULL RETURNING rn, last_event";
const CANCEL: &str = "UPDATE runs SET cancel = $2 WHERE id = $1 AND ended IS NULL";
const ENDED: &str = "SELECT rn, ended FROM runs WHERE id = $1";
/// What belongs to a run, and then the run.
const REMOVE: [&str; 8] = [
    "DELETE FROM removals WHERE rn = $1",
    "DELETE FROM named_uploads WHERE rn = $1",
    "DELETE FROM timers WHERE rn = $1",
    "DELETE FROM attempts WHERE rn = $1",
    "DELETE FROM events WHERE rn = $1",
    "DELETE FROM labels WHERE rn = $1",
    "DELETE FROM specs WHERE rn = $1",
    "DELETE FROM runs WHERE rn = $1 AND ended IS NOT NULL",
];
const BEGIN_REMOVAL: &str = "INSERT INTO removals (rn) VALUES ($1) ON CONFLICT DO NOTHING";
const SET_SWEPT: &str = "INSERT INTO sweeps (kind, ended, id) VALUES ($1, $2, $3) \
     ON CONFLICT (kind) DO UPDATE SET ended = excluded.ended, id = excluded.id";
const FIRST_TRAFFIC: &str =
    "INSERT INTO traffic (one, version, state) VALUES (1, 1, $1) ON CONFLICT DO NOTHING";
const NEXT_TRAFFIC: &str = "UPDATE traffic SET version = version + 1, state = $1 WHERE version = $2";
const TRAFFIC_VERSION: &str = "SELECT version FROM traffic";
/// The row of `traffic` was changed in this transaction, so nobody else takes the same number.
const INSERT_AUDIT: &str = "INSERT INTO audit (seq, time, actor, action, what, reason, version) \
     SELECT coalesce(max(seq), 0) + 1, $1, $2, $3, $4, $5, $6 FROM audit";
const PROBE: &str = "UPDATE probe SET count = count + 1";

/// What a verb works on.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    pub(crate) conn: &'a Conn,
    pub(crate) live: &'a mut LiveCounts,
}

/// A verb that writes. It may be executed more than once, the transaction of the first time having been rolled back.
#[async_trait]
pub(crate) trait Verb: Send + Sync + 'static {
    /// What the caller is told.
    type Answer: Send + 'static;
    /// Does it. On an error the caller of this function takes back what was done.
    async fn execute(&self, cx: &mut Context<'_>) -> Result<Self::Answer, Fault>;
}

async fn insert_events(
    conn: &Conn,
    rn: i64,
    first: i64,
    time: Timestamp,
    events: &[String],
) -> Result<(), Fault> {
    if !events.is_empty() {
        conn.execute(INSERT_EVENTS, &[&rn, &first, &time.as_micros(), &events]).await?;
    }
    Ok(())
}

/// `Store::accept`. Made by the caller's task, so that the writer has no JSON to write.
pub(crate) struct Accept {
    run: NewRun,
    limits: LiveLimits,
    spec: String,
    event: String,
    decision: Option<String>,
    reason: String,
}

impl Accept {
    pub(crate) fn new(run: NewRun, limits: LiveLimits) -> Result<Self, StoreError> {
        Ok(Self {
            spec: to_json(&*run.spec)?,
            event: to_json(&NewRun::first_event())?,
            decision: run.decision.as_ref().map(to_json).transpose()?,
            reason: prose(&run.backend_reason)?,
            run,
            limits,
        })
    }

    fn full(&self, live: &LiveCounts) -> Option<(&'static str, u64)> {
        if self.run.id.is_shadow() { None } else { live.full(self.run.tenant.as_str(), self.limits) }
    }

    async fn insert(&self, cx: &mut Context<'_>) -> Result<bool, Fault> {
        let run = &self.run;
        let (id, created) = (row::key(run.id), run.time.as_micros());
        let key = run.key.as_ref().map(IdempotencyKey::as_str);
        let params: [&(dyn ToSql + Sync); 10] = [
            &id.as_slice(),
            &run.tenant.as_str(),
            &key,
            &run.digest.as_slice(),
            &Position::START.state.as_str(),
            &i64::from(Position::START.attempt),
            &run.backend.as_str(),
            &self.reason,
            &created,
            &self.decision,
        ];
        let Some(inserted) = cx.conn.row(INSERT_RUN, &params).await? else { return Ok(false) };
        let rn: i64 = inserted.try_get(0)?;
        // Labels are there for listings, and no listing shows a shadow.
        let labels = run.spec.labels.iter().filter(|_| !run.id.is_shadow());
        let (names, values): (Vec<&str>, Vec<&str>) =
            labels.map(|(name, value)| (name.as_str(), value.as_str())).unzip();
        let uploads = run.spec.uploads();
        let uploads: Vec<&str> = uploads.iter().map(|upload| upload.as_str()).collect();
        try_join4(
            async { cx.conn.execute(INSERT_SPEC, &[&rn, &self.spec]).await },
            insert_events(cx.conn, rn, 1, run.time, std::slice::from_ref(&self.event)),
            async {
                if names.is_empty() {
                    return Ok(0);
                }
                cx.conn.execute(INSERT_LABELS, &[&names, &values, &created, &id.as_slice(), &rn]).await
            },
            async {
                if uploads.is_empty() {
                    return Ok(0);
                }
                cx.conn.execute(INSERT_NAMED, &[&uploads, &rn]).await
            },
        )
        .await?;
        if !run.id.is_shadow() {
            cx.live.add(run.tenant.as_str());
        }
        Ok(true)
    }

    /// What the id or the key names already.
    async fn existing(&self, cx: &Context<'_>) -> Result<Option<Accepted>, Fault> {
        let run = &self.run;
        let by_id = match cx.conn.row(BY_ID, &[&row::key(run.id).as_slice()]).await? {
            Some(row) => Some((row.try_get::<_, String>(0)?, row.try_get::<_, Vec<u8>>(1)?)),
            None => None,
        };
        let by_key = match &run.key {
            None => None,
            Some(key) => match cx.conn.row(BY_KEY, &[&run.tenant.as_str(), &key.as_str()]).await? {
                Some(row) => Some((row::run_id(&row, 0, "runs")?, row.try_get::<_, Vec<u8>>(1)?)),
                None => None,
            },
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
            (None, Some((id, _))) => id,
            (None, None) => return Ok(None),
        };
        Ok(Some(Accepted::Existing(read::must_get(cx.conn, id).await?)))
    }
}

#[async_trait]
impl Verb for Accept {
    type Answer = Accepted;

    async fn execute(&self, cx: &mut Context<'_>) -> Result<Accepted, Fault> {
        let full = self.full(cx.live);
        if self.run.id.is_shadow() {
            return match self.existing(cx).await? {
                Some(answer) => Ok(answer),
                None if !pairs::begin(cx, self.run.id).await? => Ok(Accepted::Conflict { field: "run_id" }),
                None if self.insert(cx).await? => Ok(Accepted::Created(self.run.clone().into_record())),
                // The pair must not be left without its shadow.
                None => Err(StoreError::Other("a shadow was neither inserted nor found".to_owned()).into()),
            };
        }
        if full.is_none() && self.insert(cx).await? {
            return Ok(Accepted::Created(self.run.clone().into_record()));
        }
        match (self.existing(cx).await?, full) {
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

    /// The conditional update. `id` is unique, so at most one row changes; what it returns says that one did.
    async fn update(&self, conn: &Conn, events: i64) -> Result<Option<(i64, i64, String)>, Fault> {
        let t = &self.transition;
        let id = row::key(t.run);
        let (id, ended) = (id.as_slice(), t.time.as_micros());
        let (state, at_state) = (t.next.state.as_str(), t.expected.state.as_str());
        let (attempt, at_attempt) = (i64::from(t.next.attempt), i64::from(t.expected.attempt));
        let (started, not_before) =
            (t.started.map(Timestamp::as_micros), t.not_before.map(Timestamp::as_micros));
        let mut params: Vec<&(dyn ToSql + Sync)> = vec![
            &state,
            &attempt,
            &started,
            &not_before,
            &events,
            &id,
            &at_state,
            &at_attempt,
            &t.unless_cancelled,
        ];
        let changed = if t.next.state.is_terminal() {
            params.extend([&ended as &(dyn ToSql + Sync), &self.outcome]);
            conn.row(END, &params).await?
        } else {
            conn.row(MOVE, &params).await?
        };
        Ok(match changed {
            Some(row) => Some((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?)),
            None => None,
        })
    }

    async fn set_timers(&self, conn: &Conn, rn: i64) -> Result<(), Fault> {
        let timers = &self.transition.timers;
        let kinds: Vec<&str> = timers.iter().map(|timer| row::timer_name(timer.kind)).collect();
        let due: Vec<i64> = timers.iter().map(|timer| timer.due.as_micros()).collect();
        let durations: Vec<i64> = timers.iter().map(|timer| row::nanos(timer.duration)).collect();
        // Their kinds are disjoint, so their order does not matter.
        try_join(async { conn.execute(DELETE_TIMERS, &[&rn, &kinds]).await }, async {
            if kinds.is_empty() {
                return Ok(0);
            }
            conn.execute(SET_TIMERS, &[&rn, &kinds, &due, &durations]).await
        })
        .await?;
        Ok(())
    }

    async fn end_attempt(&self, conn: &Conn, rn: i64) -> Result<(), Fault> {
        if let (Some(attempt), Some(outcome)) = (&self.transition.ended_attempt, &self.attempt_outcome) {
            let params: [&(dyn ToSql + Sync); 6] = [
                &rn,
                &i64::from(attempt.number),
                &attempt.backend.as_str(),
                &attempt.started.map(Timestamp::as_micros),
                &attempt.ended.as_micros(),
                outcome,
            ];
            conn.execute(INSERT_ATTEMPT, &params).await?;
        }
        Ok(())
    }
}

#[async_trait]
impl Verb for Move {
    type Answer = Transitioned;

    async fn execute(&self, cx: &mut Context<'_>) -> Result<Transitioned, Fault> {
        let t = &self.transition;
        let events = i64::try_from(self.events.len()).unwrap_or(i64::MAX);
        let Some((rn, last_event, tenant)) = self.update(cx.conn, events).await? else {
            return Ok(Transitioned::Conflict(Box::new(read::must_get(cx.conn, t.run).await?)));
        };
        try_join4(
            insert_events(cx.conn, rn, last_event - events + 1, t.time, &self.events),
            self.end_attempt(cx.conn, rn),
            self.set_timers(cx.conn, rn),
            async {
                match &t.pair {
                    Some(pair) => pairs::insert(cx, pair, t.time).await,
                    None => Ok(()),
                }
            },
        )
        .await?;
        if t.next.state.is_terminal() && !t.run.is_shadow() {
            cx.live.remove(&tenant);
        }
        Ok(Transitioned::Applied { last_event: u64::try_from(last_event).unwrap_or(0) })
    }
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

#[async_trait]
impl Verb for Append {
    type Answer = Option<u64>;

    async fn execute(&self, cx: &mut Context<'_>) -> Result<Option<u64>, Fault> {
        let id = row::key(self.id);
        let Some(next) = cx.conn.row(NEXT_EVENT, &[&id.as_slice()]).await? else {
            // Of a terminal run: nothing. Of none: an error.
            read::rn(cx.conn, self.id).await?;
            return Ok(None);
        };
        let (rn, seq): (i64, i64) = (next.try_get(0)?, next.try_get(1)?);
        insert_events(cx.conn, rn, seq, self.time, std::slice::from_ref(&self.event)).await?;
        Ok(u64::try_from(seq).ok())
    }
}

/// `Store::request_cancel`.
pub(crate) struct Cancel {
    pub(crate) id: RunId,
    pub(crate) intent: CancelIntent,
    pub(crate) in_queue: Outcome,
}

#[async_trait]
impl Verb for Cancel {
    type Answer = CancelRequested;

    async fn execute(&self, cx: &mut Context<'_>) -> Result<CancelRequested, Fault> {
        let mut run = read::must_get(cx.conn, self.id).await?;
        if run.position.state.is_terminal() {
            return Ok(CancelRequested { run, newly: false });
        }
        let newly = run.cancel.is_none();
        if newly {
            let intent = to_json(&self.intent)?;
            let changed = cx.conn.execute(CANCEL, &[&row::key(self.id).as_slice(), &intent]).await?;
            if changed != 1 {
                return Err(
                    StoreError::Other(format!("storing an intent to cancel changed {changed} rows")).into()
                );
            }
            run.cancel = Some(self.intent.clone());
        }
        if run.position.state == RunState::Queued {
            self.end_in_queue(cx, &mut run).await?;
        }
        Ok(CancelRequested { run, newly })
    }
}

impl Cancel {
    /// No attempt executes the run, so nobody has to be waited for.
    async fn end_in_queue(&self, cx: &mut Context<'_>, run: &mut RunRecord) -> Result<(), Fault> {
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
        match end.execute(cx).await? {
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
async fn terminal(cx: &Context<'_>, id: RunId) -> Result<Result<i64, Removed>, Fault> {
    let Some(found) = cx.conn.row(ENDED, &[&row::key(id).as_slice()]).await? else {
        return Ok(Err(Removed::Unknown));
    };
    Ok(match found.try_get::<_, Option<i64>>(1)? {
        None => Err(Removed::Live),
        Some(_) => Ok(found.try_get(0)?),
    })
}

/// `Store::begin_removal`.
pub(crate) struct BeginRemoval(pub(crate) RunId);

#[async_trait]
impl Verb for BeginRemoval {
    type Answer = Removed;

    async fn execute(&self, cx: &mut Context<'_>) -> Result<Removed, Fault> {
        match terminal(cx, self.0).await? {
            Err(answer) => Ok(answer),
            Ok(rn) => {
                cx.conn.execute(BEGIN_REMOVAL, &[&rn]).await?;
                Ok(Removed::Gone)
            }
        }
    }
}

/// `Store::remove`.
pub(crate) struct Remove(pub(crate) RunId);

#[async_trait]
impl Verb for Remove {
    type Answer = Removed;

    async fn execute(&self, cx: &mut Context<'_>) -> Result<Removed, Fault> {
        let rn = match terminal(cx, self.0).await? {
            Err(answer) => return Ok(answer),
            Ok(rn) => rn,
        };
        let mut removed = 0;
        for sql in REMOVE {
            removed = cx.conn.execute(sql, &[&rn]).await?;
        }
        pairs::removed(cx, self.0).await?;
        // The last statement is the run's own.
        match removed {
            1 => Ok(Removed::Gone),
            rows => Err(StoreError::Other(format!("removing a run changed {rows} rows")).into()),
        }
    }
}

/// `Store::set_swept`.
pub(crate) struct SetSwept(pub(crate) Swept, pub(crate) EndedCursor);

#[async_trait]
impl Verb for SetSwept {
    type Answer = ();

    async fn execute(&self, cx: &mut Context<'_>) -> Result<(), Fault> {
        let (what, cursor) = (self.0, self.1);
        let id = row::key(cursor.id);
        match cx.conn.execute(SET_SWEPT, &[&what.as_str(), &cursor.ended.as_micros(), &id.as_slice()]).await?
        {
            1 => Ok(()),
            rows => Err(StoreError::Other(format!("storing a sweep changed {rows} rows")).into()),
        }
    }
}

/// `Store::set_traffic`.
pub(crate) struct SetTraffic {
    expected: u64,
    state: String,
    time: Timestamp,
    /// Actor, action, what, reason.
    words: [String; 4],
}

impl SetTraffic {
    pub(crate) fn new(expected: u64, traffic: &Traffic, entry: &AuditEntry) -> Result<Self, StoreError> {
        let AuditEntry { time, actor, action, what, reason } = entry;
        let words = [prose(actor)?, prose(action)?, prose(what)?, prose(reason)?];
        Ok(Self { expected, state: to_json(traffic)?, time: *time, words })
    }
}

#[async_trait]
impl Verb for SetTraffic {
    type Answer = TrafficSet;

    async fn execute(&self, cx: &mut Context<'_>) -> Result<TrafficSet, Fault> {
        let stored = match self.expected {
            0 => cx.conn.execute(FIRST_TRAFFIC, &[&self.state]).await?,
            expected => cx.conn.execute(NEXT_TRAFFIC, &[&self.state, &row::int(expected)]).await?,
        };
        if stored == 0 {
            let version: Option<i64> = match cx.conn.row(TRAFFIC_VERSION, &[]).await? {
                Some(row) => Some(row.try_get(0)?),
                None => None,
            };
            return Ok(TrafficSet::Conflict {
                version: version.and_then(|it| u64::try_from(it).ok()).unwrap_or(0),
            });
        }
        let version = self.expected + 1;
        let [actor, action, what, reason] = &self.words;
        let params: [&(dyn ToSql + Sync); 6] =
            [&self.time.as_micros(), actor, action, what, reason, &row::int(version)];
        cx.conn.execute(INSERT_AUDIT, &params).await?;
        Ok(TrafficSet::Stored { version })
    }
}

/// The write of `Store::probe`.
pub(crate) struct Probe;

#[async_trait]
impl Verb for Probe {
    type Answer = ();

    async fn execute(&self, cx: &mut Context<'_>) -> Result<(), Fault> {
        match cx.conn.execute(PROBE, &[]).await? {
            1 => Ok(()),
            rows => Err(StoreError::Other(format!("the probe's write changed {rows} rows")).into()),
        }
    }
}
