//! When a call is made again, and how long to wait before.

use std::{future::Future, time::Duration};

use crate::{
    clock,
    error::{ClientError, ErrorKind},
};

/// How often and how patiently calls are tried again. Used only where a repeat is harmless.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Largest number of tries in a row without progress, the first included. 1 means no retry.
    pub max_attempts: u32,
    /// Wait before the second try; doubles each time. The actual wait lies between half of it and all of it.
    pub initial_backoff: Duration,
    /// Longest wait that the client chooses.
    pub max_backoff: Duration,
    /// Longest wait that the service may ask for (`RetryInfo`). Where it asks for more, the error is given at once.
    pub max_retry_after: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_attempts: 6,
            initial_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(5),
            max_retry_after: Duration::from_secs(30),
        }
    }
}

impl RetryPolicy {
    /// No retries.
    pub fn never() -> Self {
        Self { max_attempts: 1, ..Self::default() }
    }

    /// The wait before try number `next` (2 or more), with `random` as the source of jitter.
    fn backoff(&self, next: u32, random: u64) -> Duration {
        let doublings = next.saturating_sub(2).min(20);
        let full = self.initial_backoff.saturating_mul(1 << doublings).min(self.max_backoff);
        let half = full / 2;
        let jitter_micros = u64::try_from((full - half).as_micros()).unwrap_or(u64::MAX);
        half + Duration::from_micros(random % jitter_micros.saturating_add(1))
    }
}

/// The tries of one call, or of one stream since its last progress.
#[derive(Debug)]
pub(crate) struct Tries {
    policy: RetryPolicy,
    made: u32,
}

impl Tries {
    pub(crate) fn new(policy: RetryPolicy) -> Self {
        Self { policy, made: 0 }
    }

    /// Something was got: the count starts again.
    pub(crate) fn progress(&mut self) {
        self.made = 0;
    }

    /// Waits before the next try, or hands the error back where there is to be none.
    pub(crate) async fn failed(&mut self, error: ClientError) -> Result<(), ClientError> {
        let wait = self.wait_after(error, clock::random())?;
        clock::sleep(wait).await;
        Ok(())
    }

    fn wait_after(&mut self, error: ClientError, random: u64) -> Result<Duration, ClientError> {
        self.made += 1;
        if self.made >= self.policy.max_attempts {
            return Err(error);
        }
        let own = self.policy.backoff(self.made + 1, random);
        match error.retry_after() {
            Some(asked) if asked > self.policy.max_retry_after => Err(error),
            // Never earlier than asked; jitter on top, so that callers that were refused together do not return together.
            Some(asked) => Ok(asked + own / 2),
            None => Ok(own),
        }
    }
}

/// Makes a call that is harmless to repeat, again and again until it succeeds, fails for good, or the policy is spent.
pub(crate) async fn idempotent<T, F, Fut>(policy: RetryPolicy, mut call: F) -> Result<T, ClientError>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, ClientError>>,
{
    let mut tries = Tries::new(policy);
    loop {
        match call().await {
            Ok(value) => return Ok(value),
            // Without `RetryInfo`, a limit is not one that time alone lifts.
            Err(error) if error.kind() == ErrorKind::Exhausted && error.retry_after().is_none() => {
                return Err(error);
            }
            Err(error) if error.is_retryable() => tries.failed(error).await?,
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::{Code, Status};
    use tonic_types::{ErrorDetails, StatusExt as _};

    use super::*;

    fn exhausted(delay: Duration) -> ClientError {
        let details = ErrorDetails::with_retry_info(Some(delay));
        let status = Status::with_error_details(Code::ResourceExhausted, "full", details);
        ClientError::status("start the run", status)
    }

    #[test]
    fn the_wait_doubles_up_to_its_ceiling_and_jitters_within_its_upper_half() {
        let policy = RetryPolicy::default();
        for (next, full) in [(2, 100), (3, 200), (4, 400), (8, 5_000), (4_000_000_000, 5_000)] {
            assert_eq!(policy.backoff(next, 0), Duration::from_millis(full) / 2);
            for random in [1, 77, u64::MAX] {
                let wait = policy.backoff(next, random);
                assert!(wait >= Duration::from_millis(full) / 2 && wait <= Duration::from_millis(full));
            }
        }
    }

    #[test]
    fn the_service_is_never_asked_earlier_than_it_wished() {
        let mut tries = Tries::new(RetryPolicy::default());
        let wait = tries.wait_after(exhausted(Duration::from_secs(7)), 0).expect("one more try");
        assert!(wait >= Duration::from_secs(7));
    }

    #[test]
    fn a_wait_longer_than_the_caller_permits_is_an_error_at_once() {
        let mut tries = Tries::new(RetryPolicy::default());
        let error = tries.wait_after(exhausted(Duration::from_secs(3600)), 0).expect_err("too long");
        assert_eq!(error.kind(), ErrorKind::Exhausted);
    }

    #[test]
    fn tries_are_counted_from_the_last_progress() {
        let mut tries = Tries::new(RetryPolicy { max_attempts: 3, ..RetryPolicy::default() });
        let lost = || ClientError::new(ErrorKind::Unreachable, "x", "y");
        assert!(tries.wait_after(lost(), 0).is_ok());
        assert!(tries.wait_after(lost(), 0).is_ok());
        tries.progress();
        assert!(tries.wait_after(lost(), 0).is_ok());
        assert!(tries.wait_after(lost(), 0).is_ok());
        assert!(tries.wait_after(lost(), 0).is_err());
    }
}
