//! Time, ids and randomness, passed in. The one module that reads the real ones.

use std::{
    fmt,
    ops::{Add, Sub},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::id::RunId;

/// A moment on the wall clock: microseconds since the Unix epoch. For people and for rows; durations are measured on
/// the monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct Timestamp(i64);

impl Timestamp {
    /// From microseconds since the epoch.
    pub const fn from_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// Microseconds since the epoch.
    pub const fn as_micros(self) -> i64 {
        self.0
    }

    /// Time from `earlier` to `self`; zero where the wall clock went backwards in between.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

impl Add<Duration> for Timestamp {
    type Output = Self;

    fn add(self, rhs: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(rhs.as_micros()).unwrap_or(i64::MAX)))
    }
}

impl Sub<Duration> for Timestamp {
    type Output = Self;

    fn sub(self, rhs: Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(rhs.as_micros()).unwrap_or(i64::MAX)))
    }
}

/// A source of time.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// The wall clock. May jump.
    fn now(&self) -> Timestamp;
    /// Time since some fixed moment. Never goes backwards, and a step of the wall clock does not move it.
    fn monotonic(&self) -> Duration;
}

/// A source of ids and random numbers.
pub trait IdGen: fmt::Debug + Send + Sync + 'static {
    /// A new run id that sorts after the ones made before it.
    fn run_id(&self) -> RunId;
    /// A random number, for jitter and sampling. Not for keys.
    fn random(&self) -> u64;
}

/// The machine's clock.
#[derive(Debug)]
pub struct SystemClock {
    start: std::time::Instant,
}

impl SystemClock {
    /// Starts the monotonic clock at zero.
    #[allow(clippy::disallowed_methods, reason = "the clock module is where the clock is read")]
    pub fn new() -> Self {
        Self { start: std::time::Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    #[allow(clippy::disallowed_methods, reason = "the clock module is where the clock is read")]
    fn now(&self) -> Timestamp {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Timestamp(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
    }

    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }
}

/// Ids from the operating system's randomness.
#[derive(Debug, Default)]
pub struct SystemIds;

impl IdGen for SystemIds {
    #[allow(clippy::disallowed_methods, reason = "the clock module is where ids are made")]
    fn run_id(&self) -> RunId {
        RunId::new(Uuid::now_v7())
    }

    fn random(&self) -> u64 {
        getrandom::u64().unwrap_or(0)
    }
}

/// The real clock and ids.
pub fn system() -> (Arc<dyn Clock>, Arc<dyn IdGen>) {
    (Arc::new(SystemClock::new()), Arc::new(SystemIds))
}
