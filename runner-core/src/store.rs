//! The state store: what is known of runs, durable.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{
    artifact::{ArtifactKey, Manifest},
    clock::Timestamp,
    id::{AttemptId, BackendName, IdempotencyKey, RunId, TenantId},
    outcome::Outcome,
    shadow::{Pair, PairFilter, PairRecord, Stage, Verdict},
    spec::RunSpec,
    state::{Position, RunState},
    traffic::{Decision, Traffic},
};

/// A run to be accepted.
#[derive(Debug, Clone)]
pub struct NewRun {
    /// Chosen by the caller or by the service.
    pub id: RunId,
    /// From the caller's credentials.
    pub tenant: TenantId,
    /// The caller's own name for it.
    pub key: Option<IdempotencyKey>,
    /// With every default filled in.
    pub spec: Arc<RunSpec>,
    /// Digest of the spec as the caller sent it, before defaults: the same request is the same run, even where a default
    /// has changed in between.
    pub digest: [u8; 32],
    /// Chosen at admission.
    pub backend: BackendName,
    /// Why it was chosen, for people.
    pub backend_reason: String,
    /// What decided.
    pub decision: Option<Decision>,
    /// When.
    pub time: Timestamp,
}

/// How many live runs there may be. Checked in the transaction that accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveLimits {
    /// Of all tenants.
    pub total: u64,
    /// Of one tenant.
    pub per_tenant: u64,
}

/// The store's answer to [`Store::accept`].
#[derive(Debug, Clone, PartialEq)]
pub enum Accepted {
    /// A new run; durable now.
    Created(RunRecord),
    /// The id, or the key, named a run of the same tenant with the same digest. Nothing changed.
    Existing(RunRecord),
    /// The id or the key is taken by another spec, or the id by another tenant; or it is a shadow's that is not to be. Nothing changed.
    Conflict {
        /// `run_id` or `idempotency_key`.
        field: &'static str,
    },
    /// A limit is reached. Nothing was stored.
    Full {
        /// `live_runs` or `live_runs_per_tenant`.
        limit: &'static str,
        /// Its value.
        max: u64,
    },
}

/// A run as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct RunRecord {
    /// Its id.
    pub id: RunId,
    /// Whose.
    pub tenant: TenantId,
    /// The caller's own name for it.
    pub key: Option<IdempotencyKey>,
    /// What was asked for, defaults filled in.
    pub spec: Arc<RunSpec>,
    /// State and attempt.
    pub position: Position,
    /// Chosen at admission.
    pub backend: BackendName,
    /// Why, for people.
    pub backend_reason: String,
    /// What decided. `None` for a run from before decisions were stored.
    pub decision: Option<Decision>,
    /// A caller asked for the end.
    pub cancel: Option<CancelIntent>,
    /// No attempt begins before this.
    pub not_before: Option<Timestamp>,
    /// When it was accepted.
    pub created: Timestamp,
    /// When the program of the last attempt was seen running.
    pub started: Option<Timestamp>,
    /// When it reached its terminal state.
    pub ended: Option<Timestamp>,
    /// Set in a terminal state only.
    pub outcome: Option<Outcome>,
    /// Number of its last event. Every event of a run has the next number, from 1.
    pub last_event: u64,
}

impl NewRun {
    /// The run as it is right after its acceptance.
    pub fn into_record(self) -> RunRecord {
        RunRecord {
            id: self.id,
            tenant: self.tenant,
            key: self.key,
            spec: self.spec,
            position: Position::START,
            backend: self.backend,
            backend_reason: self.backend_reason,
            decision: self.decision,
            cancel: None,
            not_before: None,
            created: self.time,
            started: None,
            ended: None,
            outcome: None,
            last_event: 1,
        }
    }

    /// The event that every run begins with.
    pub fn first_event() -> RunEvent {
        RunEvent::StateChanged { position: Position::START, reason: String::new() }
    }
}

impl RunRecord {
    /// Version of the traffic's state that placed it; 0: none did, or nothing is known of it.
    pub fn placed_by(&self) -> u64 {
        self.decision.as_ref().map_or(0, |decision| decision.version)
    }

    /// The current or last attempt. `None` before the first.
    pub fn attempt(&self) -> Option<AttemptId> {
        (self.position.attempt > 0).then_some(AttemptId { run: self.id, number: self.position.attempt })
    }
}

/// That a caller asked for the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelIntent {
    /// When it was first asked for.
    pub time: Timestamp,
    /// Why, in the first caller's words.
    pub reason: String,
}

/// An attempt that ended.
#[derive(Debug, Clone, PartialEq)]
pub struct AttemptRecord {
    /// Its number.
    pub number: u32,
    /// Where it ran.
    pub backend: BackendName,
    /// When its program was seen running.
    pub started: Option<Timestamp>,
    /// When it was judged.
    pub ended: Timestamp,
    /// How.
    pub outcome: Outcome,
}

/// Something that a watcher is told, in order, exactly once. Log frames are not among these: they are in the log store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunEvent {
    /// The run has another position. A change to `PREPARING` opens the attempt's log. A change to `QUEUED` with an attempt
    /// above 0, that is a retry, comes after the attempt's log was sealed.
    StateChanged {
        /// The new position.
        position: Position,
        /// Why, where there is more to say than the state.
        reason: String,
    },
    /// Outputs were stored.
    Outputs(Manifest),
    /// Something for a person.
    Notice(String),
    /// The end. Always the last; comes after the last attempt's log was sealed.
    Terminated {
        /// The terminal position.
        position: Position,
        /// How it ended.
        outcome: Outcome,
    },
}

/// A stored event.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredEvent {
    /// Its number within the run, from 1, without gaps.
    pub seq: u64,
    /// When it was stored.
    pub time: Timestamp,
    /// What happened.
    pub event: RunEvent,
}

/// What a timer is for. A run has at most one of each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimerKind {
    /// The attempt must be running by then.
    Pending,
    /// The attempt must have ended by then; the backstop of the shim's own timeout.
    Deadline,
    /// The next attempt may begin then.
    Retry,
}

/// A timer's row. Rows survive restarts; while a process lives it counts `duration` on its monotonic clock, so that a
/// step of the wall clock fires nothing early or late.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timer {
    /// What for.
    pub kind: TimerKind,
    /// When it fires, on the wall clock.
    pub due: Timestamp,
    /// How long it was set for.
    pub duration: Duration,
}

/// A stored transition: conditional on `expected`, all or nothing.
#[derive(Debug, Clone)]
pub struct Transition {
    /// Of which run.
    pub run: RunId,
    /// Nothing happens where the run is elsewhere.
    pub expected: Position,
    /// Where it goes; an answer of [`crate::state::apply`].
    pub next: Position,
    /// Where true, nothing happens if a cancel intent is stored. Set by the step that begins an attempt, so that cancel
    /// against begin has one winner.
    pub unless_cancelled: bool,
    /// When.
    pub time: Timestamp,
    /// Set to this where `Some`.
    pub started: Option<Timestamp>,
    /// The run's `not_before` afterwards.
    pub not_before: Option<Timestamp>,
    /// The outcome, where `next` is terminal. Stored with `ended = time`.
    pub outcome: Option<Outcome>,
    /// The attempt that ended with this transition.
    pub ended_attempt: Option<AttemptRecord>,
    /// Told to watchers, in this order.
    pub events: Vec<RunEvent>,
    /// The run's timers afterwards: the whole set.
    pub timers: Vec<Timer>,
    /// The pair that the run becomes the primary of. Only a terminal position has one.
    pub pair: Option<Pair>,
}

impl Transition {
    /// Says what makes this a transition that no run can take, whatever is stored, or `None` where it is well formed.
    /// Every store refuses such a one with [`StoreError::Other`] before it looks at the run.
    pub fn fault(&self) -> Option<&'static str> {
        let terminal = self.next.state.is_terminal();
        if terminal != self.outcome.is_some() {
            return Some("an outcome belongs to a terminal position, and to no other");
        }
        if terminal && !self.timers.is_empty() {
            return Some("a terminal position leaves no timers");
        }
        if let Some(pair) = &self.pair
            && (!terminal || pair.primary != self.run || self.run.is_shadow())
        {
            return Some("a pair belongs to the end of its primary");
        }
        if self.next.attempt < self.expected.attempt {
            return Some("the number of the attempt goes back");
        }
        if let Some(ended) = &self.ended_attempt
            && (ended.number == 0 || ended.number != self.expected.attempt)
        {
            return Some("only the current attempt can end");
        }
        let twice =
            |(i, timer): (usize, &Timer)| self.timers[..i].iter().any(|other| other.kind == timer.kind);
        if self.timers.iter().enumerate().any(twice) {
            return Some("two timers of one kind");
        }
        None
    }
}

/// The store's answer to [`Store::transition`].
#[derive(Debug, Clone, PartialEq)]
pub enum Transitioned {
    /// Exactly one row changed; durable now. The number of the run's last event.
    Applied {
        /// Number of the run's last event afterwards.
        last_event: u64,
    },
    /// The run was elsewhere, or cancelled. Nothing changed; this is what it is.
    Conflict(Box<RunRecord>),
}

/// The store's answer to [`Store::request_cancel`].
#[derive(Debug, Clone, PartialEq)]
pub struct CancelRequested {
    /// The run afterwards.
    pub run: RunRecord,
    /// Whether this call stored the intent. False where the run was terminal or the intent was there.
    pub newly: bool,
}

/// Which runs to list. All that are given must hold.
#[derive(Debug, Clone, Default)]
pub struct RunFilter {
    /// Always set by the service: a tenant never sees another's. `None` for operators.
    pub tenant: Option<TenantId>,
    /// Any of these; empty: any.
    pub states: Vec<RunState>,
    /// This backend.
    pub backend: Option<BackendName>,
    /// All of these labels.
    pub labels: BTreeMap<String, String>,
    /// Accepted at or after.
    pub created_from: Option<Timestamp>,
    /// Accepted before.
    pub created_until: Option<Timestamp>,
}

/// Where a page ended. Runs are listed newest first, by (created, id).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageCursor {
    /// Of the last run of the page.
    pub created: Timestamp,
    /// Of the last run of the page.
    pub id: RunId,
}

/// A finished run, as retention needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndedRun {
    /// Which.
    pub id: RunId,
    /// Whose.
    pub tenant: TenantId,
    /// When it reached its terminal state.
    pub ended: Timestamp,
}

/// A place in the order of ends, by (ended, id).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct EndedCursor {
    /// Of the last run before the place.
    pub ended: Timestamp,
    /// Of the last run before the place.
    pub id: RunId,
}

impl EndedRun {
    /// The place right after this run.
    pub const fn cursor(&self) -> EndedCursor {
        EndedCursor { ended: self.ended, id: self.id }
    }
}

/// What of finished runs is swept apart from their rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Swept {
    /// Their logs.
    Logs,
    /// Their outputs.
    Outputs,
}

impl Swept {
    /// Its name in stores.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Logs => "logs",
            Self::Outputs => "outputs",
        }
    }
}

/// The store's answer to [`Store::remove`] and [`Store::begin_removal`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removed {
    /// It was done; after [`Store::remove`], nothing of the run is stored any more.
    Gone,
    /// There was no such run.
    Unknown,
    /// The run is not terminal. Nothing changed.
    Live,
}

/// The stored state of the traffic. Its default is what holds where none was ever stored.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StoredTraffic {
    /// From 1, one more with every change; 0 where none was ever stored.
    pub version: u64,
    /// The state.
    pub traffic: Traffic,
}

/// What somebody did, for the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditEntry {
    /// When.
    pub time: Timestamp,
    /// Who; `service` where nobody asked.
    pub actor: String,
    /// What kind of thing, for example `backend.drain`.
    pub action: String,
    /// What it did, for people.
    pub what: String,
    /// Why, in the actor's words.
    pub reason: String,
}

/// An entry of the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredAudit {
    /// Its number, from 1, without gaps.
    pub seq: u64,
    /// The traffic's version that it made.
    pub version: u64,
    /// What happened.
    pub entry: AuditEntry,
}

/// The store's answer to [`Store::set_traffic`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrafficSet {
    /// Durable now, with its entry in the audit log.
    Stored {
        /// The new version.
        version: u64,
    },
    /// Another version is stored. Nothing changed.
    Conflict {
        /// Which; 0: none.
        version: u64,
    },
}

/// Stored data that does not decode. It is quarantined: reported, left as it is, and everything else goes on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("table {table}, column {column}, key {key}: {detail}")]
pub struct Inconsistency {
    /// Where.
    pub table: &'static str,
    /// Where.
    pub column: &'static str,
    /// Which row.
    pub key: String,
    /// What is wrong with it. Never the value itself.
    pub detail: String,
}

/// A failed store operation. Nothing changed, unless it is a failed commit whose fate is unknown: then `retryable`, and the
/// verb is safe to repeat.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// No such run.
    #[error("there is no run {0}")]
    NotFound(RunId),
    /// The row does not decode.
    #[error("stored data is inconsistent: {0}")]
    Inconsistent(#[from] Inconsistency),
    /// No room.
    #[error("the state store has no room: {0}")]
    Full(String),
    /// The store does not answer; trying again may help.
    #[error("the state store is unavailable: {0}")]
    Unavailable(String),
    /// Anything else.
    #[error("the state store failed: {0}")]
    Other(String),
}

/// A page of runs.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RunPage {
    /// At most as many as were asked for.
    pub runs: Vec<RunRecord>,
    /// Where the next page begins; `None` on the last.
    pub next: Option<PageCursor>,
}

/// Every live run, as the reconciler needs it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LiveRuns {
    /// Oldest first.
    pub runs: Vec<RunRecord>,
    /// The timers of these, in no order.
    pub timers: Vec<(RunId, Timer)>,
    /// Rows that did not decode.
    pub quarantined: Vec<Inconsistency>,
}

/// The state store.
///
/// 1. What a verb answered is durable: it survives the death of the process and loss of power.
/// 2. `accept` MUST be atomic under concurrent duplicates: one of them creates, the others find. A key is unique within
///    its tenant, an id in the whole store. An accepted run is at [`Position::START`] and has one event,
///    `StateChanged` to it. A duplicate is answered as `Existing` even where a limit is reached. The id is judged before
///    the key; where it names a run, a key that no run has yet is not given to it.
/// 3. `transition` is one conditional update; the count of changed rows is checked to be one. Events get consecutive
///    numbers. `timers` replaces the run's whole set; a terminal position leaves none. A transition with a
///    [fault](Transition::fault) is refused.
/// 4. A terminal run MUST NOT change, whatever is asked.
/// 5. `request_cancel` stores the first intent only. Of a run that is `QUEUED` it makes, in the same transaction, a
///    `CANCELLED` one with a `Terminated` event, its outcome given by the caller, without timers or `not_before`; of a
///    terminal run, nothing.
/// 6. A row that does not decode MUST NOT fail anything but verbs about that row.
/// 7. `list` MUST be stable: pages that follow one another's cursors show every run that was there at the first page
///    exactly once, whatever is added meanwhile.
/// 8. Cost of a verb on one run MUST NOT grow with the number of finished runs.
/// 9. `remove` takes everything of a terminal run in one transaction, its key included, which may name another run then; of a
///    run that is not terminal, nothing. A run whose row does not decode is removed too, where its end is known.
/// 10. `begin_removal` is durable: until `remove`, `removals` names the run. It changes nothing else.
/// 11. `names_upload` knows every stored run, whether live or ended, whose spec [names](crate::spec::RunSpec::uploads) the upload.
/// 12. `set_traffic` stores the state and its entry in the audit log in one transaction, and only over the expected version: of
///     several at once over the same version, one is stored. The audit log only grows.
/// 13. A run whose id [is a shadow's](RunId::is_shadow) counts against no limit and in no number of live runs, and `list` never shows
///     it. `accept` creates it only where its pair is `Pending` and the removal of its primary was not begun, in one transaction
///     with the pair's change to `Running`, and answers `Conflict` elsewhere. All other verbs treat it like any run.
/// 14. A pair is stored by the transition that ends its primary. `judge_pair` stores a verdict only over `Pending` or `Running`. Removing
///     a primary removes its pair, unless the shadow is still stored: then the pair is `Orphaned`. Removing a shadow removes its pair.
#[async_trait]
pub trait Store: std::fmt::Debug + Send + Sync + 'static {
    /// Accepts a run.
    async fn accept(&self, run: NewRun, limits: LiveLimits) -> Result<Accepted, StoreError>;
    /// Finds a run. `None` where there is none.
    async fn get(&self, id: RunId) -> Result<Option<RunRecord>, StoreError>;
    /// The ended attempts of a run, oldest first. [`StoreError::NotFound`] where there is no such run.
    async fn attempts(&self, id: RunId) -> Result<Vec<AttemptRecord>, StoreError>;
    /// Lists runs, newest first. `max` is at least 1. Rows that do not decode are left out.
    async fn list(
        &self,
        filter: &RunFilter,
        after: Option<PageCursor>,
        max: usize,
    ) -> Result<RunPage, StoreError>;
    /// Every run that is not terminal.
    async fn live(&self) -> Result<LiveRuns, StoreError>;
    /// Applies a transition.
    async fn transition(&self, transition: Transition) -> Result<Transitioned, StoreError>;
    /// Appends an event that is not a change of position (`StateChanged` and `Terminated` are refused with
    /// [`StoreError::Other`]). Of a terminal run: nothing. Returns its number, if stored.
    async fn append_event(
        &self,
        id: RunId,
        event: RunEvent,
        time: Timestamp,
    ) -> Result<Option<u64>, StoreError>;
    /// Stores the intent to cancel. `in_queue` is the outcome of a run that no attempt executes.
    async fn request_cancel(
        &self,
        id: RunId,
        intent: CancelIntent,
        in_queue: Outcome,
    ) -> Result<CancelRequested, StoreError>;
    /// Events of a run after number `after`, in order, at most `max`. [`StoreError::NotFound`] where there is no such run.
    async fn events(&self, id: RunId, after: u64, max: usize) -> Result<Vec<StoredEvent>, StoreError>;
    /// Runs that ended before `until`, in the order of their ends, after a place in it. Rows that do not decode are among them.
    async fn ended(
        &self,
        after: Option<EndedCursor>,
        until: Timestamp,
        max: usize,
    ) -> Result<Vec<EndedRun>, StoreError>;
    /// How far a sweep has come; `None`: nowhere yet.
    async fn swept(&self, what: Swept) -> Result<Option<EndedCursor>, StoreError>;
    /// Stores how far a sweep has come.
    async fn set_swept(&self, what: Swept, cursor: EndedCursor) -> Result<(), StoreError>;
    /// Whether a stored run names the upload with this prefix.
    async fn names_upload(&self, upload: &ArtifactKey) -> Result<bool, StoreError>;
    /// Records that a terminal run is being removed. `Gone`: it is recorded, by this call or one before.
    async fn begin_removal(&self, id: RunId) -> Result<Removed, StoreError>;
    /// Runs whose removal was begun, at most `max`.
    async fn removals(&self, max: usize) -> Result<Vec<EndedRun>, StoreError>;
    /// Removes a terminal run: its row and everything that belongs to it.
    async fn remove(&self, id: RunId) -> Result<Removed, StoreError>;
    /// The traffic's state; `None` where none was ever stored.
    async fn traffic(&self) -> Result<Option<StoredTraffic>, StoreError>;
    /// Stores another state over version `expected`, 0 for none, and says in the audit log who did.
    async fn set_traffic(
        &self,
        expected: u64,
        traffic: &Traffic,
        entry: AuditEntry,
    ) -> Result<TrafficSet, StoreError>;
    /// Entries of the audit log before number `before`, newest first, at most `max`.
    async fn audit(&self, before: Option<u64>, max: usize) -> Result<Vec<StoredAudit>, StoreError>;
    /// The pair that a run is the primary, or the shadow, of.
    async fn pair(&self, run: RunId) -> Result<Option<PairRecord>, StoreError>;
    /// Pairs at a stage that has no verdict, in the order of their numbers, at most `max`. Rows that do not decode are left out. For
    /// another stage: [`StoreError::Other`].
    async fn pairs_at(&self, stage: Stage, max: usize) -> Result<Vec<PairRecord>, StoreError>;
    /// Stores what came of the pair of this primary. False where it is at no stage that could have a verdict; nothing changed then.
    async fn judge_pair(
        &self,
        primary: RunId,
        verdict: &Verdict,
        time: Timestamp,
    ) -> Result<bool, StoreError>;
    /// Pairs with a verdict and a number below `before`, those with the highest number first, at most `max`. Rows that do not decode are left out.
    async fn pairs(
        &self,
        filter: &PairFilter,
        before: Option<u64>,
        max: usize,
    ) -> Result<Vec<PairRecord>, StoreError>;
    /// Number of runs that are not terminal, for metrics.
    async fn live_count(&self) -> Result<u64, StoreError>;
    /// Whether the store answers a write and a read.
    async fn probe(&self) -> Result<(), StoreError>;
}
