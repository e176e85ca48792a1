//! Exit statuses.

use std::process::ExitCode;

use worker_client::{Finished, proto::Cause};

/// How the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit(u8);

impl Exit {
    /// All is well.
    pub(crate) const OK: Self = Self(0);
    /// It did not work.
    pub(crate) const FAILURE: Self = Self(1);
    /// It was not asked for properly.
    pub(crate) const USAGE: Self = Self(2);
    /// `run` only: not the program, but what was to run it, failed.
    pub(crate) const INFRASTRUCTURE: Self = Self(125);
    /// Ended by Ctrl-C.
    pub(crate) const INTERRUPTED: Self = Self(128 + 2);
    /// Nobody reads standard output any more; what a shell shows for SIGPIPE.
    pub(crate) const BROKEN_PIPE: Self = Self(128 + 13);

    pub(crate) fn from_clap(error: &clap::Error) -> Self {
        if error.exit_code() == 0 { Self::OK } else { Self::USAGE }
    }

    /// The status that stands for the end of a run: the program's own, and never 0 for a run that did not succeed.
    pub(crate) fn of_run(end: &Finished) -> Self {
        match end.cause() {
            Cause::Exited | Cause::OomKilled | Cause::TimedOut | Cause::Cancelled => {
                match (end.exit_code(), end.signal()) {
                    (Some(0), _) if end.succeeded() => Self::OK,
                    (Some(0), _) => Self::INFRASTRUCTURE,
                    // As the kernel does it; but never 0 for what is not 0.
                    (Some(code), _) => Self(u8::try_from(code & 0xff).unwrap_or(u8::MAX).max(1)),
                    (None, Some(signal)) => Self(u8::try_from((128 + signal) & 0xff).unwrap_or(u8::MAX)),
                    (None, None) => Self::INFRASTRUCTURE,
                }
            }
            // What became of the program, if anything, is not the answer.
            Cause::Unspecified
            | Cause::Image
            | Cause::Input
            | Cause::Output
            | Cause::Unschedulable
            | Cause::Evicted
            | Cause::Backend
            | Cause::Lost => Self::INFRASTRUCTURE,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.0)
    }
}

#[cfg(test)]
mod tests {
    use worker_client::proto::{Outcome, RunState, outcome::Status};

    use super::*;

    fn end(cause: Cause, status: Option<Status>, state: RunState) -> Finished {
        let outcome = Outcome { cause: cause.into(), status, ..Outcome::default() };
        Finished { run_id: "x".to_owned(), state, outcome }
    }

    #[test]
    fn the_programs_own_status_is_passed_on() {
        for (code, expected) in
            [(0, 0), (1, 1), (7, 7), (125, 125), (137, 137), (255, 255), (256, 1), (-1, 255)]
        {
            let state = if code == 0 { RunState::Succeeded } else { RunState::Failed };
            let exit = Exit::of_run(&end(Cause::Exited, Some(Status::ExitCode(code)), state));
            assert_eq!(exit, Exit(expected), "{code}");
        }
        let exit = Exit::of_run(&end(Cause::Exited, Some(Status::Signal(9)), RunState::Failed));
        assert_eq!(exit, Exit(137));
        let exit = Exit::of_run(&end(Cause::TimedOut, Some(Status::Signal(15)), RunState::Failed));
        assert_eq!(exit, Exit(143));
    }

    #[test]
    fn what_is_not_the_programs_doing_is_125() {
        for cause in [Cause::Image, Cause::Input, Cause::Output, Cause::Lost, Cause::Evicted, Cause::Backend]
        {
            for status in
                [None, Some(Status::ExitCode(0)), Some(Status::ExitCode(3)), Some(Status::Signal(9))]
            {
                assert_eq!(Exit::of_run(&end(cause, status, RunState::Failed)), Exit(125));
            }
        }
    }

    #[test]
    fn a_run_that_did_not_succeed_is_never_0() {
        for cause in [Cause::TimedOut, Cause::Cancelled, Cause::OomKilled] {
            let exit = Exit::of_run(&end(cause, Some(Status::ExitCode(0)), RunState::Failed));
            assert_ne!(exit, Exit::OK);
        }
    }
}
