//! The state machine of a run: one pure function from a position and an event to the next position.
//!
//! `QUEUED → PREPARING → RUNNING → PUBLISHING → SUCCEEDED | FAILED | CANCELLED`; an attempt that is tried again goes back
//! to `QUEUED`. Cancel and deadline are intents stored beside the state, not states.

use serde::{Deserialize, Serialize};

/// Where a run is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum RunState {
    /// Accepted; waits for a slot, or for the back-off of a retry.
    Queued,
    /// Image, inputs, start.
    Preparing,
    /// The program runs.
    Running,
    /// The program has ended; outputs are being stored.
    Publishing,
    /// Exit code 0, every required output stored.
    Succeeded,
    /// Any other end, but for the next.
    Failed,
    /// Ended because somebody asked for it.
    Cancelled,
}

impl RunState {
    /// Every state, in the order of a run's life.
    pub const ALL: [Self; 7] = [
        Self::Queued,
        Self::Preparing,
        Self::Running,
        Self::Publishing,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// Whether it never changes any more.
    pub const fn is_terminal(self) -> bool {
        match self {
            Self::Succeeded | Self::Failed | Self::Cancelled => true,
            Self::Queued | Self::Preparing | Self::Running | Self::Publishing => false,
        }
    }

    /// The contract's name, for example `RUNNING`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "QUEUED",
            Self::Preparing => "PREPARING",
            Self::Running => "RUNNING",
            Self::Publishing => "PUBLISHING",
            Self::Succeeded => "SUCCEEDED",
            Self::Failed => "FAILED",
            Self::Cancelled => "CANCELLED",
        }
    }
}

/// A run's state with the attempt that it is about. What every stored transition is conditional on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Position {
    /// The state.
    pub state: RunState,
    /// The current or last attempt; 0 before the first.
    pub attempt: u32,
}

impl Position {
    /// Where every run begins.
    pub const START: Self = Self { state: RunState::Queued, attempt: 0 };
}

/// Which terminal state an end leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum End {
    Succeeded,
    Failed,
    Cancelled,
}

impl End {
    /// The state.
    pub const fn state(self) -> RunState {
        match self {
            Self::Succeeded => RunState::Succeeded,
            Self::Failed => RunState::Failed,
            Self::Cancelled => RunState::Cancelled,
        }
    }
}

/// Something that happened to a run. Events about an attempt name it, so that a late one is known as such.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// A slot was had; attempt `attempt` begins.
    Begin {
        /// One more than the last.
        attempt: u32,
    },
    /// The program was seen running.
    Started {
        /// Whose.
        attempt: u32,
    },
    /// The program was seen to have ended.
    Exited {
        /// Whose.
        attempt: u32,
    },
    /// The attempt is over and is not tried again.
    Finished {
        /// Whose.
        attempt: u32,
        /// How.
        end: End,
    },
    /// The attempt is over and is tried again.
    Retried {
        /// Whose.
        attempt: u32,
    },
    /// The run ended before an attempt began, or between two.
    FinishedInQueue {
        /// How. Never success.
        end: End,
    },
}

/// Why an event changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// The run is in a terminal state, which never changes.
    #[error("the run is in a terminal state")]
    Terminal,
    /// The event is about an attempt that is over, or was applied already.
    #[error("the event is late or a duplicate")]
    Stale,
    /// The event cannot happen here.
    #[error("the event cannot happen in this state")]
    Impossible,
}

/// Applies an event. Pure; the only place that knows which transitions exist.
///
/// # Errors
/// Says why the position stays as it is.
pub fn apply(at: Position, event: Event) -> Result<Position, Rejected> {
    use RunState::{Preparing, Publishing, Queued, Running};

    if at.state.is_terminal() {
        return Err(Rejected::Terminal);
    }
    let go = |state| Ok(Position { state, attempt: at.attempt });
    // How an event about an attempt relates to the position's attempt.
    let about = |attempt: u32| match attempt.cmp(&at.attempt) {
        std::cmp::Ordering::Less => Err(Rejected::Stale),
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Greater => Err(Rejected::Impossible),
    };
    match event {
        Event::Begin { attempt } => match at.state {
            Queued if attempt == at.attempt.saturating_add(1) => Ok(Position { state: Preparing, attempt }),
            _ if attempt <= at.attempt => Err(Rejected::Stale),
            _ => Err(Rejected::Impossible),
        },
        Event::Started { attempt } => {
            about(attempt)?;
            match at.state {
                Preparing => go(Running),
                _ => Err(Rejected::Stale),
            }
        }
        Event::Exited { attempt } => {
            about(attempt)?;
            match at.state {
                // A program may be over before it was seen running.
                Preparing | Running => go(Publishing),
                _ => Err(Rejected::Stale),
            }
        }
        Event::Finished { attempt, end } => {
            about(attempt)?;
            match at.state {
                // In the queue this attempt is over already: it was tried again.
                Queued => Err(Rejected::Stale),
                // A program that was not seen to end cannot have succeeded.
                Preparing | Running if end == End::Succeeded => Err(Rejected::Impossible),
                _ => go(end.state()),
            }
        }
        Event::Retried { attempt } => {
            about(attempt)?;
            match at.state {
                Queued => Err(Rejected::Stale),
                _ => go(Queued),
            }
        }
        Event::FinishedInQueue { end } => match at.state {
            Queued if end != End::Succeeded => go(end.state()),
            _ => Err(Rejected::Impossible),
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_event() -> impl Strategy<Value = Event> {
        let end = prop::sample::select(vec![End::Succeeded, End::Failed, End::Cancelled]);
        (0..6usize, 0..5u32, end).prop_map(|(kind, attempt, end)| match kind {
            0 => Event::Begin { attempt },
            1 => Event::Started { attempt },
            2 => Event::Exited { attempt },
            3 => Event::Finished { attempt, end },
            4 => Event::Retried { attempt },
            _ => Event::FinishedInQueue { end },
        })
    }

    /// The life of a run with `retries` failed attempts before the last.
    fn life(retries: u32, end: End) -> Vec<Event> {
        let mut events = Vec::new();
        for attempt in 1..=retries + 1 {
            events.extend([Event::Begin { attempt }, Event::Started { attempt }, Event::Exited { attempt }]);
            if attempt <= retries {
                events.push(Event::Retried { attempt });
            } else {
                events.push(Event::Finished { attempt, end });
            }
        }
        events
    }

    fn run(events: &[Event]) -> Vec<Position> {
        let mut seen = vec![Position::START];
        for event in events {
            if let Ok(next) = apply(*seen.last().unwrap(), *event) {
                seen.push(next);
            }
        }
        seen
    }

    proptest! {
        #[test]
        fn under_any_events_the_invariants_hold(events in prop::collection::vec(any_event(), 0..60)) {
            let seen = run(&events);
            for pair in seen.windows(2) {
                let (a, b) = (pair[0], pair[1]);
                prop_assert!(!a.state.is_terminal(), "a terminal state changed: {a:?} to {b:?}");
                prop_assert!(b.attempt == a.attempt || b.attempt == a.attempt + 1, "{a:?} to {b:?}");
                prop_assert!(b.attempt == a.attempt || (a.state, b.state) == (RunState::Queued, RunState::Preparing));
                prop_assert!(b.state != RunState::Succeeded || a.state == RunState::Publishing, "{a:?} to {b:?}");
                prop_assert!(b.state > a.state || b.state == RunState::Queued, "{a:?} to {b:?}");
            }
        }

        #[test]
        fn duplicated_and_late_events_change_nothing(
            retries in 0..3u32,
            end in prop::sample::select(vec![End::Succeeded, End::Failed, End::Cancelled]),
            late in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..20),
        ) {
            let life = life(retries, end);
            let expected = run(&life);
            // Each late event is one that happened before the place where it comes again.
            let mut mixed: Vec<(usize, Event)> = life.iter().copied().enumerate().collect();
            for (which, place) in late {
                let which = which.index(life.len());
                let place = which + 1 + place.index(life.len() - which);
                let at = mixed.iter().rposition(|(i, _)| *i < place).map_or(0, |at| at + 1);
                mixed.insert(at, (place.saturating_sub(1).max(which), life[which]));
            }
            let mixed: Vec<Event> = mixed.into_iter().map(|(_, event)| event).collect();
            let got = run(&mixed);
            prop_assert_eq!(got.last(), expected.last());
        }

        #[test]
        fn reordered_events_never_reach_success_without_an_exit(
            events in Just(life(1, End::Succeeded)).prop_shuffle(),
        ) {
            let seen = run(&events);
            if seen.last().unwrap().state == RunState::Succeeded {
                prop_assert!(seen.iter().any(|at| at.state == RunState::Publishing));
            }
        }
    }

    #[test]
    fn a_run_without_surprises_goes_through_every_state() {
        let states: Vec<_> = run(&life(0, End::Succeeded)).into_iter().map(|at| at.state).collect();
        use RunState::*;
        assert_eq!(states, [Queued, Preparing, Running, Publishing, Succeeded]);
    }

    #[test]
    fn an_exit_that_is_seen_before_the_start_is_enough() {
        let at = Position { state: RunState::Preparing, attempt: 1 };
        let at = apply(at, Event::Exited { attempt: 1 }).unwrap();
        assert_eq!(apply(at, Event::Started { attempt: 1 }), Err(Rejected::Stale));
    }
}
