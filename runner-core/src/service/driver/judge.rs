//! What the service's own stop makes of what the backend saw. Pure.

use crate::{
    outcome::{Cause, Outcome},
    service::watchdog::StopReason,
};

/// What the service's own stop means for what the backend saw. By now the workload is proven dead.
pub(super) fn judge(mut outcome: Outcome, stopped: Option<StopReason>, never_started: bool) -> Outcome {
    let Some(reason) = stopped else { return outcome };
    match outcome.cause {
        Cause::Cancelled => {}
        // Our stop left nothing behind that could tell; that it is dead is known.
        Cause::Lost => {}
        // A start that our stop interrupted is no failure of the start.
        Cause::Image | Cause::Input | Cause::Unschedulable | Cause::Backend if never_started => {}
        // It ended first, for a reason of its own.
        Cause::Exited
        | Cause::OomKilled
        | Cause::TimedOut
        | Cause::Image
        | Cause::Input
        | Cause::Output
        | Cause::Unschedulable
        | Cause::Evicted
        | Cause::Backend => return outcome,
    }
    let (cause, message) = match reason {
        StopReason::Cancel => (Cause::Cancelled, "cancelled"),
        StopReason::Pending => {
            (Cause::Unschedulable, "the attempt was not running within the pending timeout")
        }
        StopReason::Deadline => (Cause::TimedOut, "the run's time was up"),
        StopReason::Unobservable => return outcome,
    };
    outcome.retryable = cause.retryable_by_default();
    if outcome.cause != Cause::Cancelled || reason != StopReason::Cancel {
        outcome.message = message.to_owned();
    }
    outcome.cause = cause;
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::ExitStatus;

    #[test]
    fn a_program_that_ended_first_keeps_its_outcome() {
        let mut outcome = Outcome::new(1, Cause::Exited, "exited with 0");
        outcome.status = Some(ExitStatus::Code(0));
        assert_eq!(judge(outcome.clone(), Some(StopReason::Cancel), false), outcome);
    }

    #[test]
    fn a_stop_for_the_deadline_is_a_time_out() {
        let outcome = judge(Outcome::new(1, Cause::Cancelled, ""), Some(StopReason::Deadline), false);
        assert_eq!((outcome.cause, outcome.retryable), (Cause::TimedOut, false));
    }

    #[test]
    fn a_start_that_came_too_late_is_unschedulable() {
        for cause in [Cause::Lost, Cause::Backend, Cause::Cancelled] {
            let outcome = judge(Outcome::new(1, cause, ""), Some(StopReason::Pending), true);
            assert_eq!((outcome.cause, outcome.retryable), (Cause::Unschedulable, true), "{cause:?}");
        }
    }

    #[test]
    fn absence_without_a_stop_stays_lost() {
        assert_eq!(judge(Outcome::new(1, Cause::Lost, ""), None, true).cause, Cause::Lost);
    }
}
