//! The run's record: read, changed by events, stored as one transition, and told to whoever watches.

use std::{sync::Arc, time::Duration};

use super::{Driver, LetGo};
use crate::{
    clock::Timestamp,
    outcome::Outcome,
    service::{store_may_recover, watchdog::arm},
    shadow::Pair,
    state::{self, Event, RunState},
    store::{
        AttemptRecord, RunEvent, RunRecord, StoreError, StoredEvent, Timer, TimerKind, Transition,
        Transitioned,
    },
};

/// What goes with a change of position. What is not set is not changed, but for timers, of which this is the whole set.
#[derive(Debug, Default)]
pub(super) struct Change {
    pub(super) unless_cancelled: bool,
    pub(super) started: Option<Timestamp>,
    pub(super) not_before: Option<Timestamp>,
    pub(super) outcome: Option<Outcome>,
    pub(super) ended_attempt: Option<AttemptRecord>,
    pub(super) events: Vec<RunEvent>,
    pub(super) timers: Vec<(TimerKind, Duration)>,
}

impl Driver {
    /// Reads the record anew: somebody stored an intent.
    pub(super) async fn reload(&mut self) -> Result<(), LetGo> {
        self.record = self.read().await?;
        Ok(())
    }

    pub(super) async fn read(&self) -> Result<RunRecord, LetGo> {
        let mut failures = 0;
        loop {
            match self.core.parts.store.get(self.record.id).await {
                Ok(Some(record)) => return Ok(record),
                Ok(None) => return Err(LetGo::Parked(StoreError::NotFound(self.record.id))),
                Err(error) => self.store_failed(error, &mut failures).await?,
            }
        }
    }

    pub(super) async fn store_failed(&self, error: StoreError, failures: &mut u32) -> Result<(), LetGo> {
        if !store_may_recover(&error) {
            return Err(LetGo::Parked(error));
        }
        *failures += 1;
        tracing::warn!(run.id = %self.record.id, failures, %error, "the state store failed; trying again");
        if self.core.pause(self.core.backoff(*failures)).await { Ok(()) } else { Err(LetGo::Shutdown) }
    }

    /// Applies `events` one after the other and stores the result as one transition, with an event for watchers for each
    /// position on the way.
    pub(super) async fn advance(&mut self, events: &[Event], change: Change) -> Result<(), LetGo> {
        let mut position = self.record.position;
        let mut told = Vec::new();
        let mut path = Vec::new();
        for event in events {
            // An event that changes nothing here is late or a duplicate: that is what a restart looks like.
            if let Ok(next) = state::apply(position, *event) {
                position = next;
                path.push(next);
            }
        }
        if path.is_empty() {
            return self.reload().await.and(Err(LetGo::Moved));
        }
        let last = path.len() - 1;
        for (i, position) in path.iter().enumerate() {
            if i == last {
                told.extend(change.events.iter().cloned());
            }
            told.push(match (&change.outcome, position.state.is_terminal()) {
                (Some(outcome), true) => {
                    RunEvent::Terminated { position: *position, outcome: outcome.clone() }
                }
                _ => RunEvent::StateChanged { position: *position, reason: String::new() },
            });
        }
        let time = self.core.parts.clock.now();
        let timers: Vec<Timer> = change
            .timers
            .iter()
            .map(|(kind, duration)| Timer { kind: *kind, due: time + *duration, duration: *duration })
            .collect();
        let pair = match position.state {
            RunState::Succeeded | RunState::Failed => Pair::of(&self.record),
            RunState::Queued
            | RunState::Preparing
            | RunState::Running
            | RunState::Publishing
            | RunState::Cancelled => None,
        };
        let transition = Transition {
            run: self.record.id,
            expected: self.record.position,
            next: position,
            unless_cancelled: change.unless_cancelled,
            time,
            started: change.started,
            not_before: change.not_before,
            outcome: change.outcome,
            ended_attempt: change.ended_attempt,
            events: told,
            timers,
            pair,
        };
        self.store(transition).await
    }

    pub(super) async fn store(&mut self, transition: Transition) -> Result<(), LetGo> {
        let core = Arc::clone(&self.core);
        let mut failures = 0;
        let last_event = loop {
            match core.parts.store.transition(transition.clone()).await {
                Ok(Transitioned::Applied { last_event }) => break last_event,
                Ok(Transitioned::Conflict(record)) => {
                    // A commit whose answer was lost shows as a conflict with what we wanted: then it is ours.
                    let ours = failures > 0 && record.position == transition.next;
                    self.record = *record;
                    if ours {
                        break self.record.last_event;
                    }
                    return Err(LetGo::Moved);
                }
                Err(error) => self.store_failed(error, &mut failures).await?,
            }
        };
        self.applied(transition, last_event);
        Ok(())
    }

    /// How long the run waited for its first attempt, and for its program to run.
    fn measure_first_attempt(&self, transition: &Transition) {
        if transition.next.attempt != 1 {
            return;
        }
        let (run, meter) = (&self.record, &self.core.parts.meter);
        if transition.expected.attempt == 0 {
            meter.begun(&run.backend, run.placed_by(), transition.time.since(run.created));
        }
        if let (Some(started), None) = (transition.started, run.started) {
            meter.started(&run.backend, run.placed_by(), started.since(run.created));
        }
    }

    pub(super) fn applied(&mut self, transition: Transition, last_event: u64) {
        let parts = &self.core.parts;
        let now = parts.clock.monotonic();
        let spent = now.saturating_sub(self.since);
        // What is measured of a backend is what it does for callers.
        if !self.record.id.is_shadow() {
            parts.meter.phase(&self.record.backend, self.record.position.state, spent);
            self.measure_first_attempt(&transition);
        }
        self.since = now;
        self.record.position = transition.next;
        self.record.not_before = transition.not_before;
        self.record.last_event = last_event;
        if transition.started.is_some() {
            self.record.started = transition.started;
        }
        if transition.next.state.is_terminal() {
            self.record.outcome = transition.outcome;
            self.record.ended = Some(transition.time);
        }
        self.timers = transition.timers.iter().map(|timer| arm(&self.core, timer)).collect();
        let first = last_event.saturating_sub(transition.events.len() as u64) + 1;
        let stored = (first..).zip(transition.events).map(|(seq, event)| StoredEvent {
            seq,
            time: transition.time,
            event,
        });
        self.live.publish(stored);
        if transition.next.state.is_terminal() && transition.pair.is_some() {
            self.core.shadows.wake();
        }
    }
}
