//! How a run ended, in the words that a program asks with.

use runner_proto::v1 as proto;

/// A run that has ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    /// The run's id.
    pub run_id: String,
    /// `SUCCEEDED`, `FAILED` or `CANCELLED`.
    pub state: proto::RunState,
    /// Exit code or signal, cause, evidence, outputs.
    pub outcome: proto::Outcome,
}

impl Finished {
    pub(crate) fn new(run_id: &str, terminated: proto::Terminated) -> Self {
        let state = terminated.state();
        Self { run_id: run_id.to_owned(), state, outcome: terminated.outcome.unwrap_or_default() }
    }

    /// Exit code 0, and every required output is stored.
    pub fn succeeded(&self) -> bool {
        self.state == proto::RunState::Succeeded
    }

    /// The program's exit code. `None` where a signal ended it, or it never ran, or nobody knows.
    pub fn exit_code(&self) -> Option<i32> {
        match self.outcome.status {
            Some(proto::outcome::Status::ExitCode(code)) => Some(code),
            Some(proto::outcome::Status::Signal(_)) | None => None,
        }
    }

    /// The signal that ended the program.
    pub fn signal(&self) -> Option<i32> {
        match self.outcome.status {
            Some(proto::outcome::Status::Signal(signal)) => Some(signal),
            Some(proto::outcome::Status::ExitCode(_)) | None => None,
        }
    }

    /// Why it ended.
    pub fn cause(&self) -> proto::Cause {
        self.outcome.cause()
    }

    /// What it wrote. Marked `partial` where it did not succeed.
    pub fn outputs(&self) -> Option<&proto::Manifest> {
        self.outcome.outputs.as_ref()
    }
}
