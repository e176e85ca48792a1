//! Trying again: with a fresh signature, after a wait that grows and is jittered, and never for ever.

use std::{future::Future, time::Duration};

use object_store::Error;
use runner_core::artifact::ArtifactError;

use super::{
    Tuning,
    failure::{TooSlow, class, mapped},
};

/// The tries of one request.
#[derive(Debug)]
pub(super) struct Tries {
    most: u32,
    backoff: Duration,
    max_backoff: Duration,
    made: u32,
}

impl Tries {
    pub(super) fn new(tuning: &Tuning) -> Self {
        Self { most: tuning.tries, backoff: tuning.backoff, max_backoff: tuning.max_backoff, made: 0 }
    }

    /// Something was got: the count begins again.
    pub(super) fn progress(&mut self) {
        self.made = 0;
    }

    /// How many tries were made and failed.
    pub(super) fn made(&self) -> u32 {
        self.made
    }

    /// Waits before the next try, or hands the error back where there is to be none.
    pub(super) async fn failed(&mut self, error: Error) -> Result<(), Error> {
        self.made += 1;
        if self.made >= class(&error).tries(self.most) {
            return Err(error);
        }
        tracing::debug!(error = %error, tries = self.made, "a request to the object store is tried again");
        tokio::time::sleep(wait(self.backoff, self.max_backoff, self.made, random())).await;
        Ok(())
    }
}

/// The wait after `made` failed tries: it doubles, up to `most`, and lies between half of itself and all of it.
fn wait(first: Duration, most: Duration, made: u32, random: u64) -> Duration {
    let full = first.saturating_mul(1 << made.saturating_sub(1).min(20)).min(most);
    let half = full / 2;
    let spread = u64::try_from((full - half).as_micros()).unwrap_or(u64::MAX);
    half + Duration::from_micros(random % spread.saturating_add(1))
}

/// Without randomness there is no jitter, which is no reason to fail.
fn random() -> u64 {
    getrandom::u64().unwrap_or(0)
}

/// Does a request that is harmless to repeat until it succeeds, fails for good, or its tries are used up. Each try takes at
/// most `limit`.
pub(super) async fn again<T, F, Fut>(
    tuning: &Tuning,
    doing: &str,
    limit: Duration,
    mut request: F,
) -> Result<T, ArtifactError>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, Error>>,
{
    let mut tries = Tries::new(tuning);
    loop {
        let error = match within(limit, request()).await {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        if let Err(error) = tries.failed(error).await {
            return Err(mapped(error, doing, tries.made()));
        }
    }
}

/// The request's result, or a failure after `limit`.
pub(super) async fn within<T>(
    limit: Duration,
    request: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    match tokio::time::timeout(limit, request).await {
        Ok(done) => done,
        Err(_) => Err(TooSlow(limit).into_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_doubles_up_to_its_ceiling_and_jitters_within_its_upper_half() {
        let (first, most) = (Duration::from_millis(100), Duration::from_secs(5));
        for (made, full) in [(1, 100), (2, 200), (3, 400), (7, 5000), (u32::MAX, 5000)] {
            let full = Duration::from_millis(full);
            for random in [0, 1, 77, u64::MAX] {
                let wait = wait(first, most, made, random);
                assert!(wait >= full / 2 && wait <= full, "{made}: {wait:?}");
            }
        }
    }

    #[tokio::test]
    async fn a_failure_for_good_is_not_tried_again_and_one_that_passes_is() {
        let tuning = Tuning { backoff: Duration::ZERO, tries: 5, ..Tuning::default() };
        let mut calls = 0;
        let limit = Duration::from_secs(60);
        let failing = |error: fn() -> Error| {
            calls += 1;
            std::future::ready(Err::<(), _>(error()))
        };
        let mut failing = failing;
        let denied = || Error::NotFound { path: "a".into(), source: "gone".into() };
        again(&tuning, "look", limit, || failing(denied)).await.unwrap_err();
        let passing = || TooSlow(Duration::ZERO).into_error();
        let error = again(&tuning, "look", limit, || failing(passing)).await.unwrap_err();
        assert!(error.context.ends_with("(5 tries)"), "{error}");
        assert_eq!(calls, 1 + 5);
    }
}
