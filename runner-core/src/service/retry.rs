//! Whether and when a failed attempt is tried again.

use std::time::Duration;

use crate::{
    outcome::{Cause, Outcome},
    spec::RunSpec,
};

/// How long to wait before attempt `outcome.attempt + 1`; `None` where the attempt was the last.
///
/// The wait doubles from `initial_backoff` up to `max_backoff`; of that, a random part between one half and all is taken
/// ("equal jitter"), so that runs that failed together do not come back together.
pub(super) fn next_attempt(spec: &RunSpec, outcome: &Outcome, random: u64) -> Option<Duration> {
    let policy = &spec.retry;
    if outcome.is_success() || outcome.cause == Cause::Cancelled {
        return None;
    }
    if outcome.attempt >= policy.max_attempts.unwrap_or(1) {
        return None;
    }
    let wanted =
        if policy.causes.is_empty() { outcome.retryable } else { policy.causes.contains(&outcome.cause) };
    // Nobody knows whether a lost attempt did its work: only a spec that says so may be executed twice.
    if !wanted || (outcome.cause == Cause::Lost && !spec.idempotent) {
        return None;
    }
    let initial = policy.initial_backoff.unwrap_or_default();
    let most = policy.max_backoff.unwrap_or(Duration::MAX);
    let doublings = outcome.attempt.saturating_sub(1).min(31);
    let wait = initial.saturating_mul(1 << doublings).min(most);
    let half = wait / 2;
    let micros = u64::try_from(half.as_micros()).unwrap_or(u64::MAX);
    Some(half + Duration::from_micros(if micros == 0 { 0 } else { random % (micros + 1) }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec(max_attempts: u32) -> RunSpec {
        let mut spec = RunSpec::default();
        spec.retry.max_attempts = Some(max_attempts);
        spec.retry.initial_backoff = Some(Duration::from_secs(1));
        spec.retry.max_backoff = Some(Duration::from_secs(10));
        spec
    }

    #[test]
    fn the_last_attempt_is_the_last() {
        assert!(next_attempt(&spec(2), &Outcome::new(1, Cause::Backend, ""), 0).is_some());
        assert!(next_attempt(&spec(2), &Outcome::new(2, Cause::Backend, ""), 0).is_none());
    }

    #[test]
    fn a_users_failure_is_not_retried_unless_the_policy_says_so() {
        let outcome = Outcome::new(1, Cause::Exited, "");
        assert!(next_attempt(&spec(2), &outcome, 0).is_none());
        let mut spec = spec(2);
        spec.retry.causes = vec![Cause::Exited];
        assert!(next_attempt(&spec, &outcome, 0).is_some());
        assert!(next_attempt(&spec, &Outcome::new(1, Cause::Backend, ""), 0).is_none());
    }

    #[test]
    fn a_lost_attempt_is_retried_only_where_that_is_harmless() {
        let mut spec = spec(2);
        for causes in [vec![], vec![Cause::Lost]] {
            spec.retry.causes = causes;
            spec.idempotent = false;
            assert!(next_attempt(&spec, &Outcome::new(1, Cause::Lost, ""), 0).is_none());
            spec.idempotent = true;
            assert!(next_attempt(&spec, &Outcome::new(1, Cause::Lost, ""), 0).is_some());
        }
    }

    #[test]
    fn a_cancelled_attempt_is_never_retried() {
        let mut spec = spec(2);
        spec.retry.causes = vec![Cause::Cancelled];
        assert!(next_attempt(&spec, &Outcome::new(1, Cause::Cancelled, ""), 0).is_none());
    }

    proptest! {
        #[test]
        fn the_wait_is_between_half_and_all_of_the_doubled_backoff(attempt in 1u32..100, random: u64) {
            let wait = next_attempt(&spec(1000), &Outcome::new(attempt, Cause::Backend, ""), random).unwrap();
            let full = Duration::from_secs((1u64 << (attempt - 1).min(20)).min(10));
            prop_assert!(wait >= full / 2 && wait <= full, "{wait:?} of {full:?}");
        }
    }
}
