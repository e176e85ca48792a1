//! Between the wire (`runner.v1`) and the domain. The one place that knows both.
//!
//! Requests become domain values with [`TryFrom`] on a [`Wire`]; every bad field is a violation with its path, and all of
//! them are told at once. Domain values become messages with [`From`]. Nothing is decided here: what a field must hold
//! beyond its form is the domain's to say.

pub mod backend;
pub mod outcome;
pub mod parity;
pub mod request;
pub mod run;
pub mod spec;
pub mod stream;
pub mod traffic;

use std::time::Duration;

use runner_core::{
    clock::Timestamp,
    outcome::Cause,
    spec::{FieldViolation, InvalidSpec},
    state::RunState,
};
use runner_proto::v1;

/// A message, as it came or as it goes. Foreign types on both sides of a conversion need one that is ours.
#[derive(Debug, Clone, PartialEq)]
pub struct Wire<T>(pub T);

/// Bad fields, as they are found.
#[derive(Debug, Default)]
pub struct Violations(Vec<FieldViolation>);

impl Violations {
    /// The most that are told.
    const MAX: usize = 100;

    /// Adds one.
    pub fn add(&mut self, field: impl Into<String>, reason: &'static str, description: impl Into<String>) {
        if self.0.len() < Self::MAX {
            self.0.push(FieldViolation::new(field, reason, description));
        }
    }

    /// Adds what another check found, but for fields that have a violation already: there the value was a stand-in.
    pub fn extend(&mut self, other: InvalidSpec) {
        for violation in other.0 {
            if self.0.len() < Self::MAX && !self.0.iter().any(|known| covers(&known.field, &violation.field))
            {
                self.0.push(violation);
            }
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value, if there are none.
    ///
    /// # Errors
    /// All violations.
    pub fn finish<T>(self, value: T) -> Result<T, InvalidSpec> {
        if self.0.is_empty() { Ok(value) } else { Err(InvalidSpec(self.0)) }
    }

    /// Parses a text field; an error becomes a violation.
    fn parse<T>(&mut self, field: impl Into<String>, text: &str) -> Option<T>
    where
        T: std::str::FromStr,
        T::Err: std::fmt::Display,
    {
        match text.parse() {
            Ok(value) => Some(value),
            Err(error) => {
                self.add(field, "INVALID", error.to_string());
                None
            }
        }
    }

    /// As `parse`, where empty means absent.
    fn parse_optional<T>(&mut self, field: impl Into<String>, text: &str) -> Option<T>
    where
        T: std::str::FromStr,
        T::Err: std::fmt::Display,
    {
        if text.is_empty() { None } else { self.parse(field, text) }
    }

    fn duration(&mut self, field: &str, duration: Option<prost_types::Duration>) -> Option<Duration> {
        let duration = duration?;
        // Checked first: the library normalises, and would wrap some values that are out of its range.
        let in_range =
            (0..=315_576_000_000).contains(&duration.seconds) && (0..1_000_000_000).contains(&duration.nanos);
        match Duration::try_from(duration) {
            Ok(duration) if in_range => Some(duration),
            _ => {
                self.add(field, "INVALID", "must not be negative, and be at most 10,000 years");
                None
            }
        }
    }

    fn timestamp(&mut self, field: &str, time: Option<prost_types::Timestamp>) -> Option<Timestamp> {
        let time = time?;
        let micros = time
            .seconds
            .checked_mul(1_000_000)
            .filter(|_| (0..1_000_000_000).contains(&time.nanos))
            .and_then(|micros| micros.checked_add(i64::from(time.nanos) / 1000));
        if micros.is_none() {
            self.add(field, "INVALID", "is not a time between the years 1 and 9999");
        }
        micros.map(Timestamp::from_micros)
    }

    fn state(&mut self, field: impl Into<String>, state: i32) -> Option<RunState> {
        let found = match v1::RunState::try_from(state) {
            Ok(v1::RunState::Unspecified) | Err(_) => None,
            Ok(v1::RunState::Queued) => Some(RunState::Queued),
            Ok(v1::RunState::Preparing) => Some(RunState::Preparing),
            Ok(v1::RunState::Running) => Some(RunState::Running),
            Ok(v1::RunState::Publishing) => Some(RunState::Publishing),
            Ok(v1::RunState::Succeeded) => Some(RunState::Succeeded),
            Ok(v1::RunState::Failed) => Some(RunState::Failed),
            Ok(v1::RunState::Cancelled) => Some(RunState::Cancelled),
        };
        if found.is_none() {
            self.add(field, "INVALID", format!("{state} is not a state"));
        }
        found
    }

    fn cause(&mut self, field: impl Into<String>, cause: i32) -> Option<Cause> {
        let found = match v1::Cause::try_from(cause) {
            Ok(v1::Cause::Unspecified) | Err(_) => None,
            Ok(v1::Cause::Exited) => Some(Cause::Exited),
            Ok(v1::Cause::OomKilled) => Some(Cause::OomKilled),
            Ok(v1::Cause::TimedOut) => Some(Cause::TimedOut),
            Ok(v1::Cause::Cancelled) => Some(Cause::Cancelled),
            Ok(v1::Cause::Image) => Some(Cause::Image),
            Ok(v1::Cause::Input) => Some(Cause::Input),
            Ok(v1::Cause::Output) => Some(Cause::Output),
            Ok(v1::Cause::Unschedulable) => Some(Cause::Unschedulable),
            Ok(v1::Cause::Evicted) => Some(Cause::Evicted),
            Ok(v1::Cause::Backend) => Some(Cause::Backend),
            Ok(v1::Cause::Lost) => Some(Cause::Lost),
        };
        if found.is_none() {
            self.add(field, "INVALID", format!("{cause} is not a cause"));
        }
        found
    }
}

/// Whether a violation of `known` makes one of `other` pointless.
fn covers(known: &str, other: &str) -> bool {
    other.strip_prefix(known).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

/// A state on the wire.
pub fn state(state: RunState) -> v1::RunState {
    match state {
        RunState::Queued => v1::RunState::Queued,
        RunState::Preparing => v1::RunState::Preparing,
        RunState::Running => v1::RunState::Running,
        RunState::Publishing => v1::RunState::Publishing,
        RunState::Succeeded => v1::RunState::Succeeded,
        RunState::Failed => v1::RunState::Failed,
        RunState::Cancelled => v1::RunState::Cancelled,
    }
}

/// A cause on the wire.
pub fn cause(cause: Cause) -> v1::Cause {
    match cause {
        Cause::Exited => v1::Cause::Exited,
        Cause::OomKilled => v1::Cause::OomKilled,
        Cause::TimedOut => v1::Cause::TimedOut,
        Cause::Cancelled => v1::Cause::Cancelled,
        Cause::Image => v1::Cause::Image,
        Cause::Input => v1::Cause::Input,
        Cause::Output => v1::Cause::Output,
        Cause::Unschedulable => v1::Cause::Unschedulable,
        Cause::Evicted => v1::Cause::Evicted,
        Cause::Backend => v1::Cause::Backend,
        Cause::Lost => v1::Cause::Lost,
    }
}

/// A moment on the wire.
pub fn timestamp(time: Timestamp) -> prost_types::Timestamp {
    let micros = time.as_micros();
    #[allow(clippy::cast_possible_truncation, reason = "a remainder of 1,000,000 times 1,000 fits")]
    let nanos = (micros.rem_euclid(1_000_000) * 1000) as i32;
    prost_types::Timestamp { seconds: micros.div_euclid(1_000_000), nanos }
}

/// A length of time on the wire.
pub fn duration(duration: Duration) -> prost_types::Duration {
    #[allow(clippy::cast_possible_wrap, reason = "below 1,000,000,000")]
    let nanos = duration.subsec_nanos() as i32;
    prost_types::Duration { seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX), nanos }
}

#[cfg(test)]
mod tests;
