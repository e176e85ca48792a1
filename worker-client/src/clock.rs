//! Time, ids and randomness. The one module of this crate that reads the real ones.

use std::time::Duration;

use uuid::Uuid;

/// A new run id: a UUID of version 7, so that ids sort by time of creation.
#[allow(clippy::disallowed_methods, reason = "the clock module is where ids are made")]
pub(crate) fn run_id() -> String {
    Uuid::now_v7().hyphenated().to_string()
}

/// A random number, for jitter and names. Zero where the system has no randomness: jitter is then at its least.
pub(crate) fn random() -> u64 {
    getrandom::u64().unwrap_or(0)
}

/// Waits.
pub(crate) async fn sleep(duration: Duration) {
    tokio::time::sleep(duration).await;
}

/// Measures how long something has lasted, on the monotonic clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stopwatch(std::time::Instant);

impl Stopwatch {
    #[allow(clippy::disallowed_methods, reason = "the clock module is where the clock is read")]
    pub(crate) fn start() -> Self {
        Self(std::time::Instant::now())
    }

    pub(crate) fn elapsed(self) -> Duration {
        self.0.elapsed()
    }
}
