//! The state store in memory.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;

use super::pairs::Pairs;
use crate::{
    artifact::ArtifactKey,
    clock::Timestamp,
    id::{IdempotencyKey, RunId, TenantId},
    outcome::Outcome,
    shadow::{PairFilter, PairRecord, Stage, Verdict},
    state::{Position, RunState},
    store::{
        Accepted, AttemptRecord, AuditEntry, CancelIntent, CancelRequested, EndedCursor, EndedRun,
        Inconsistency, LiveLimits, LiveRuns, NewRun, PageCursor, Removed, RunEvent, RunFilter, RunPage,
        RunRecord, Store, StoreError, StoredAudit, StoredEvent, StoredTraffic, Swept, Timer, TimerKind,
        TrafficSet, Transition, Transitioned,
    },
    traffic::Traffic,
};

/// A [`Store`] that keeps everything in memory and passes the same suite as the real one.
///
/// A clone is another handle to the same data: it outlives a service that is dropped, as a database outlives a process.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    runs: HashMap<RunId, Row>,
    keys: HashMap<(TenantId, IdempotencyKey), RunId>,
    /// The order of listings.
    created: BTreeMap<(Timestamp, RunId), ()>,
    sweeps: HashMap<Swept, EndedCursor>,
    /// Runs that are being removed.
    removals: BTreeSet<RunId>,
    traffic: Option<StoredTraffic>,
    audit: Vec<StoredAudit>,
    pairs: Pairs,
    fault: Option<StoreError>,
    /// How often a verb met the fault.
    faults_met: u64,
}

#[derive(Debug)]
struct Row {
    record: RunRecord,
    digest: [u8; 32],
    events: Vec<StoredEvent>,
    attempts: Vec<AttemptRecord>,
    timers: BTreeMap<TimerKind, Timer>,
    corrupt: bool,
}

impl Row {
    fn live(&self) -> bool {
        !self.record.position.state.is_terminal()
    }

    /// Whether limits and numbers of live runs know it.
    fn counts(&self) -> bool {
        self.live() && !self.record.id.is_shadow()
    }

    fn ended(&self) -> Option<EndedRun> {
        let run = &self.record;
        Some(EndedRun { id: run.id, tenant: run.tenant.clone(), ended: run.ended? })
    }

    fn decode(&self) -> Result<&RunRecord, Inconsistency> {
        if self.corrupt {
            return Err(Inconsistency {
                table: "runs",
                column: "state",
                key: self.record.id.to_string(),
                detail: "was made undecodable by a test".to_owned(),
            });
        }
        Ok(&self.record)
    }

    fn push(&mut self, time: Timestamp, event: RunEvent) -> u64 {
        self.record.last_event += 1;
        self.events.push(StoredEvent { seq: self.record.last_event, time, event });
        self.record.last_event
    }
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on every verb answers this, and does nothing. `None`: they work again.
    pub fn set_fault(&self, fault: Option<StoreError>) {
        self.lock().fault = fault;
    }

    /// How many calls were answered with a fault so far.
    pub fn faults_met(&self) -> u64 {
        self.lock().faults_met
    }

    /// Makes a run's row one that does not decode. Does nothing where there is no such run.
    pub fn corrupt(&self, id: RunId) {
        if let Some(row) = self.lock().runs.get_mut(&id) {
            row.corrupt = true;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A test that panicked elsewhere is reported there.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn usable(&self) -> Result<MutexGuard<'_, Inner>, StoreError> {
        let mut inner = self.lock();
        if let Some(fault) = inner.fault.clone() {
            inner.faults_met += 1;
            return Err(fault);
        }
        Ok(inner)
    }
}

impl Inner {
    fn row(&self, id: RunId) -> Result<&Row, StoreError> {
        self.runs.get(&id).ok_or(StoreError::NotFound(id))
    }

    fn row_mut(&mut self, id: RunId) -> Result<&mut Row, StoreError> {
        self.runs.get_mut(&id).ok_or(StoreError::NotFound(id))
    }

    /// What the id or the key names already.
    fn existing(&self, run: &NewRun) -> Result<Option<Accepted>, StoreError> {
        let by_id = self.runs.get(&run.id);
        let by_key = run
            .key
            .as_ref()
            .and_then(|key| self.keys.get(&(run.tenant.clone(), key.clone())))
            .and_then(|id| self.runs.get(id));
        if let Some(row) = by_id
            && (row.record.tenant != run.tenant || row.digest != run.digest)
        {
            return Ok(Some(Accepted::Conflict { field: "run_id" }));
        }
        if let Some(row) = by_key
            && row.digest != run.digest
        {
            return Ok(Some(Accepted::Conflict { field: "idempotency_key" }));
        }
        match by_id.or(by_key) {
            Some(row) => Ok(Some(Accepted::Existing(row.decode()?.clone()))),
            None => Ok(None),
        }
    }

    fn full(&self, tenant: &TenantId, limits: LiveLimits) -> Option<Accepted> {
        let live = || self.runs.values().filter(|row| row.counts());
        let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
        if count(live().count()) >= limits.total {
            return Some(Accepted::Full { limit: "live_runs", max: limits.total });
        }
        if count(live().filter(|row| row.record.tenant == *tenant).count()) >= limits.per_tenant {
            return Some(Accepted::Full { limit: "live_runs_per_tenant", max: limits.per_tenant });
        }
        None
    }
}

fn matches(filter: &RunFilter, run: &RunRecord) -> bool {
    filter.tenant.as_ref().is_none_or(|tenant| *tenant == run.tenant)
        && (filter.states.is_empty() || filter.states.contains(&run.position.state))
        && filter.backend.as_ref().is_none_or(|backend| *backend == run.backend)
        && filter.labels.iter().all(|(name, value)| run.spec.labels.get(name) == Some(value))
        && filter.created_from.is_none_or(|from| run.created >= from)
        && filter.created_until.is_none_or(|until| run.created < until)
}

#[async_trait]
impl Store for MemoryStore {
    async fn accept(&self, run: NewRun, limits: LiveLimits) -> Result<Accepted, StoreError> {
        let mut inner = self.usable()?;
        if let Some(answer) = inner.existing(&run)? {
            return Ok(answer);
        }
        if run.id.is_shadow() {
            let Inner { pairs, removals, .. } = &mut *inner;
            if !pairs.begin(run.id, |primary| removals.contains(&primary)) {
                return Ok(Accepted::Conflict { field: "run_id" });
            }
        } else if let Some(answer) = inner.full(&run.tenant, limits) {
            return Ok(answer);
        }
        let (digest, time) = (run.digest, run.time);
        let record = run.into_record();
        if let Some(key) = &record.key {
            inner.keys.insert((record.tenant.clone(), key.clone()), record.id);
        }
        inner.created.insert((record.created, record.id), ());
        let row = Row {
            record: record.clone(),
            digest,
            events: vec![StoredEvent { seq: 1, time, event: NewRun::first_event() }],
            attempts: Vec::new(),
            timers: BTreeMap::new(),
            corrupt: false,
        };
        inner.runs.insert(record.id, row);
        Ok(Accepted::Created(record))
    }

    async fn get(&self, id: RunId) -> Result<Option<RunRecord>, StoreError> {
        let inner = self.usable()?;
        Ok(inner.runs.get(&id).map(|row| row.decode().cloned()).transpose()?)
    }

    async fn attempts(&self, id: RunId) -> Result<Vec<AttemptRecord>, StoreError> {
        Ok(self.usable()?.row(id)?.attempts.clone())
    }

    async fn list(
        &self,
        filter: &RunFilter,
        after: Option<PageCursor>,
        max: usize,
    ) -> Result<RunPage, StoreError> {
        let inner = self.usable()?;
        let mut found = inner
            .created
            .keys()
            .rev()
            .skip_while(|place| after.is_some_and(|cursor| **place >= (cursor.created, cursor.id)))
            .filter_map(|(_, id)| inner.runs.get(id)?.decode().ok())
            .filter(|run| !run.id.is_shadow() && matches(filter, run));
        let runs: Vec<_> = found.by_ref().take(max.max(1)).cloned().collect();
        let next =
            found.next().and_then(|_| runs.last()).map(|run| PageCursor { created: run.created, id: run.id });
        Ok(RunPage { runs, next })
    }

    async fn live(&self) -> Result<LiveRuns, StoreError> {
        let inner = self.usable()?;
        let mut live = LiveRuns::default();
        for row in inner.created.keys().filter_map(|(_, id)| inner.runs.get(id)).filter(|row| row.live()) {
            match row.decode() {
                Ok(run) => {
                    live.runs.push(run.clone());
                    live.timers.extend(row.timers.values().map(|timer| (run.id, *timer)));
                }
                Err(inconsistency) => live.quarantined.push(inconsistency),
            }
        }
        Ok(live)
    }

    async fn transition(&self, transition: Transition) -> Result<Transitioned, StoreError> {
        if let Some(fault) = transition.fault() {
            return Err(StoreError::Other(format!("the transition is malformed: {fault}")));
        }
        let mut inner = self.usable()?;
        let row = inner.row_mut(transition.run)?;
        let run = row.decode()?;
        if run.position.state.is_terminal()
            || run.position != transition.expected
            || (transition.unless_cancelled && run.cancel.is_some())
        {
            return Ok(Transitioned::Conflict(Box::new(run.clone())));
        }
        if let Some(attempt) = transition.ended_attempt {
            if row.attempts.iter().any(|known| known.number == attempt.number) {
                return Err(StoreError::Other("the attempt has ended before".to_owned()));
            }
            row.attempts.push(attempt);
        }
        row.record.position = transition.next;
        row.record.started = transition.started.or(row.record.started);
        row.record.not_before = transition.not_before;
        if transition.next.state.is_terminal() {
            row.record.ended = Some(transition.time);
            row.record.outcome = transition.outcome;
        }
        row.timers = transition.timers.into_iter().map(|timer| (timer.kind, timer)).collect();
        for event in transition.events {
            row.push(transition.time, event);
        }
        let last_event = row.record.last_event;
        if let Some(pair) = transition.pair {
            inner.pairs.add(pair, transition.time);
        }
        Ok(Transitioned::Applied { last_event })
    }

    async fn append_event(
        &self,
        id: RunId,
        event: RunEvent,
        time: Timestamp,
    ) -> Result<Option<u64>, StoreError> {
        match event {
            RunEvent::Outputs(_) | RunEvent::Notice(_) => {}
            RunEvent::StateChanged { .. } | RunEvent::Terminated { .. } => {
                return Err(StoreError::Other(
                    "a change of position is stored by a transition, not appended".to_owned(),
                ));
            }
        }
        let mut inner = self.usable()?;
        let row = inner.row_mut(id)?;
        Ok(row.live().then(|| row.push(time, event)))
    }

    async fn request_cancel(
        &self,
        id: RunId,
        intent: CancelIntent,
        in_queue: Outcome,
    ) -> Result<CancelRequested, StoreError> {
        let mut inner = self.usable()?;
        let row = inner.row_mut(id)?;
        row.decode()?;
        if !row.live() {
            return Ok(CancelRequested { run: row.record.clone(), newly: false });
        }
        let time = intent.time;
        let newly = row.record.cancel.is_none();
        row.record.cancel.get_or_insert(intent);
        if row.record.position.state == RunState::Queued {
            let position = Position { state: RunState::Cancelled, ..row.record.position };
            row.record.position = position;
            row.record.not_before = None;
            row.record.ended = Some(time);
            row.record.outcome = Some(in_queue.clone());
            row.timers.clear();
            row.push(time, RunEvent::Terminated { position, outcome: in_queue });
        }
        Ok(CancelRequested { run: row.record.clone(), newly })
    }

    async fn events(&self, id: RunId, after: u64, max: usize) -> Result<Vec<StoredEvent>, StoreError> {
        let inner = self.usable()?;
        Ok(inner.row(id)?.events.iter().filter(|event| event.seq > after).take(max).cloned().collect())
    }

    async fn ended(
        &self,
        after: Option<EndedCursor>,
        until: Timestamp,
        max: usize,
    ) -> Result<Vec<EndedRun>, StoreError> {
        let inner = self.usable()?;
        let mut found: Vec<EndedRun> = inner
            .runs
            .values()
            .filter_map(Row::ended)
            .filter(|run| run.ended < until && after.is_none_or(|after| run.cursor() > after))
            .collect();
        found.sort_unstable_by_key(EndedRun::cursor);
        found.truncate(max);
        Ok(found)
    }

    async fn swept(&self, what: Swept) -> Result<Option<EndedCursor>, StoreError> {
        Ok(self.usable()?.sweeps.get(&what).copied())
    }

    async fn set_swept(&self, what: Swept, cursor: EndedCursor) -> Result<(), StoreError> {
        self.usable()?.sweeps.insert(what, cursor);
        Ok(())
    }

    async fn names_upload(&self, upload: &ArtifactKey) -> Result<bool, StoreError> {
        let inner = self.usable()?;
        Ok(inner.runs.values().any(|row| row.record.spec.uploads().contains(upload)))
    }

    async fn begin_removal(&self, id: RunId) -> Result<Removed, StoreError> {
        let mut inner = self.usable()?;
        match inner.runs.get(&id) {
            None => return Ok(Removed::Unknown),
            Some(row) if row.live() => return Ok(Removed::Live),
            Some(_) => {}
        }
        inner.removals.insert(id);
        Ok(Removed::Gone)
    }

    async fn removals(&self, max: usize) -> Result<Vec<EndedRun>, StoreError> {
        let inner = self.usable()?;
        Ok(inner.removals.iter().filter_map(|id| inner.runs.get(id)?.ended()).take(max).collect())
    }

    async fn remove(&self, id: RunId) -> Result<Removed, StoreError> {
        let mut inner = self.usable()?;
        let Some(row) = inner.runs.get(&id) else { return Ok(Removed::Unknown) };
        if row.live() {
            return Ok(Removed::Live);
        }
        let run = &row.record;
        let (created, key) = (run.created, run.key.clone().map(|key| (run.tenant.clone(), key)));
        inner.created.remove(&(created, id));
        if let Some(key) = key {
            inner.keys.remove(&key);
        }
        inner.removals.remove(&id);
        inner.runs.remove(&id);
        let shadow_is_stored = inner.runs.contains_key(&id.shadow());
        inner.pairs.removed(id, shadow_is_stored);
        Ok(Removed::Gone)
    }

    async fn traffic(&self) -> Result<Option<StoredTraffic>, StoreError> {
        Ok(self.usable()?.traffic.clone())
    }

    async fn set_traffic(
        &self,
        expected: u64,
        traffic: &Traffic,
        entry: AuditEntry,
    ) -> Result<TrafficSet, StoreError> {
        let mut inner = self.usable()?;
        let version = inner.traffic.as_ref().map_or(0, |stored| stored.version);
        if version != expected {
            return Ok(TrafficSet::Conflict { version });
        }
        let version = version + 1;
        inner.traffic = Some(StoredTraffic { version, traffic: traffic.clone() });
        let seq = u64::try_from(inner.audit.len()).unwrap_or(u64::MAX) + 1;
        inner.audit.push(StoredAudit { seq, version, entry });
        Ok(TrafficSet::Stored { version })
    }

    async fn audit(&self, before: Option<u64>, max: usize) -> Result<Vec<StoredAudit>, StoreError> {
        let inner = self.usable()?;
        let entries = inner.audit.iter().rev().filter(|entry| before.is_none_or(|before| entry.seq < before));
        Ok(entries.take(max).cloned().collect())
    }

    async fn pair(&self, run: RunId) -> Result<Option<PairRecord>, StoreError> {
        Ok(self.usable()?.pairs.get(run))
    }

    async fn pairs_at(&self, stage: Stage, max: usize) -> Result<Vec<PairRecord>, StoreError> {
        if matches!(stage, Stage::Compared | Stage::Skipped) {
            return Err(StoreError::Other("pairs with a verdict are listed, not worked at".to_owned()));
        }
        Ok(self.usable()?.pairs.at(stage, max))
    }

    async fn judge_pair(
        &self,
        primary: RunId,
        verdict: &Verdict,
        time: Timestamp,
    ) -> Result<bool, StoreError> {
        Ok(self.usable()?.pairs.judge(primary, verdict, time))
    }

    async fn pairs(
        &self,
        filter: &PairFilter,
        before: Option<u64>,
        max: usize,
    ) -> Result<Vec<PairRecord>, StoreError> {
        Ok(self.usable()?.pairs.list(filter, before, max))
    }

    async fn live_count(&self) -> Result<u64, StoreError> {
        let live = self.usable()?.runs.values().filter(|row| row.counts()).count();
        Ok(u64::try_from(live).unwrap_or(u64::MAX))
    }

    async fn probe(&self) -> Result<(), StoreError> {
        self.usable().map(|_| ())
    }
}
