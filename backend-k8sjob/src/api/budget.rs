//! A rate that requests are held to.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use runner_core::clock::Clock;

const SECOND: Duration = Duration::from_secs(1);
/// Longest that a request waits for its turn: half of what it may take, so that it is answered within the other half. Whoever
/// would wait longer is told at once, and may try again.
pub(super) const PATIENCE: Duration = Duration::from_secs(15);

/// More is asked for than the budget has.
#[derive(Debug, thiserror::Error)]
#[error("the budget of {what}, {per_second} in a second, is used up for the next {wait:?}")]
pub(super) struct Spent {
    what: &'static str,
    per_second: u32,
    wait: Duration,
}

/// A bucket of tokens: a second's worth of requests may go at once, and then one whenever a token has come. Who waits goes in the
/// order of arrival. Kept as the one moment at which the next request may go (the generic cell rate algorithm, ITU-T I.371).
#[derive(Debug)]
pub(super) struct Budget {
    what: &'static str,
    per_second: u32,
    clock: Arc<dyn Clock>,
    next: Mutex<Duration>,
}

impl Budget {
    /// A full one. A rate of 0 is taken as 1.
    pub(super) fn new(what: &'static str, per_second: u32, clock: Arc<dyn Clock>) -> Self {
        Self { what, per_second: per_second.max(1), clock, next: Mutex::default() }
    }

    /// Waits for a turn. One who gives up while he waits has had his turn.
    ///
    /// # Errors
    /// Where that would take too long.
    pub(super) async fn wait(&self) -> Result<(), Spent> {
        let wait = self.turn()?;
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        Ok(())
    }

    /// Takes the next turn; answers how long it is until then.
    fn turn(&self) -> Result<Duration, Spent> {
        let every = SECOND / self.per_second;
        // The clock may have begun just now; a bucket is full before that.
        let now = self.clock.monotonic().saturating_add(SECOND);
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let at = (*next).max(now.saturating_sub(SECOND.saturating_sub(every)));
        let wait = at.saturating_sub(now);
        if wait > PATIENCE {
            return Err(Spent { what: self.what, per_second: self.per_second, wait });
        }
        *next = at.saturating_add(every);
        Ok(wait)
    }
}

#[cfg(test)]
mod tests {
    use runner_core::clock::Timestamp;

    use super::*;

    #[derive(Debug, Default)]
    struct Hand(Mutex<Duration>);

    impl Clock for Hand {
        fn now(&self) -> Timestamp {
            Timestamp::default()
        }

        fn monotonic(&self) -> Duration {
            *self.0.lock().unwrap()
        }
    }

    #[test]
    fn a_second_of_requests_goes_at_once_and_then_one_by_one() {
        let hand = Arc::<Hand>::default();
        let budget = Budget::new("calls", 10, Arc::clone(&hand) as _);
        let waits =
            |count: usize| -> Vec<u128> { (0..count).map(|_| budget.turn().unwrap().as_millis()).collect() };
        assert_eq!(waits(13), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 100, 200, 300]);
        *hand.0.lock().unwrap() += Duration::from_millis(350);
        assert_eq!(waits(2), [50, 150], "who came before goes before");
        // However long nothing is asked for, no more than a second's worth is saved.
        *hand.0.lock().unwrap() += Duration::from_secs(3600);
        assert_eq!(waits(12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 100, 200]);
    }

    #[test]
    fn who_would_wait_too_long_is_told_and_takes_nothing() {
        let hand = Arc::<Hand>::default();
        let budget = Budget::new("calls", 1, Arc::clone(&hand) as _);
        let mut turns = 0;
        while budget.turn().is_ok() {
            turns += 1;
        }
        assert_eq!(turns, 1 + PATIENCE.as_secs());
        assert!(budget.turn().is_err());
        *hand.0.lock().unwrap() += SECOND;
        assert_eq!(budget.turn().unwrap(), PATIENCE, "the refused one took no turn");
    }
}
