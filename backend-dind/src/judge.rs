//! How an attempt ended, from what was seen. Pure.

use bollard::models::ContainerState;
use runner_agent::exec::protocol::{ExitReason, ExitRecord};
use runner_core::{
    artifact::Manifest,
    backend::{BackendErrorKind, EndedAttempt},
    clock::Timestamp,
    outcome::{Cause, Evidence, ExitStatus, Usage},
};

/// Longest detail of one piece of evidence, in bytes.
const MAX_DETAIL: usize = 4096;
/// Most notes of the publishing that become evidence.
const MAX_NOTES: usize = 32;
const SIGKILL: i32 = 9;
/// What a shell says whose last command was killed.
const KILLED_CODE: i32 = 128 + SIGKILL;

/// What publishing came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PublishRecord {
    /// What was stored. `None` where nothing could be.
    pub(crate) manifest: Option<Manifest>,
    /// What went wrong.
    pub(crate) failure: Option<PublishFailure>,
    /// What was left out and why.
    pub(crate) notes: Vec<String>,
}

/// Why publishing did not do all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PublishFailure {
    pub(crate) message: String,
    pub(crate) retryable: bool,
}

/// How the program's side of it ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Ending {
    /// The shim wrote how.
    Recorded {
        record: Box<ExitRecord>,
        /// What the engine says of the container.
        state: Box<ContainerState>,
    },
    /// It was stopped by us, and there is no shim to say so: it was never started, or it did not answer and was killed.
    Stopped {
        time: Timestamp,
        /// Whether the container was started.
        started: bool,
    },
    /// The container ended and its shim did not say why: it was killed from outside.
    Died {
        state: Box<ContainerState>,
        /// The shim's last words.
        said: String,
        time: Timestamp,
    },
    /// Nobody knows.
    Lost {
        /// What was seen instead: (source, detail).
        seen: Vec<(&'static str, String)>,
        time: Timestamp,
    },
}

impl Ending {
    /// Whether the program may have written outputs, and they may be had.
    pub(crate) fn may_have_outputs(&self) -> bool {
        match self {
            Self::Recorded { record, .. } => record.reason != ExitReason::SetupFailed,
            Self::Stopped { started, .. } => *started,
            Self::Died { .. } => true,
            Self::Lost { .. } => false,
        }
    }

    /// Whether the program exited 0 by itself, so that its outputs are what it promised.
    pub(crate) fn is_success(&self) -> bool {
        matches!(
            self,
            Self::Recorded { record, .. }
                if record.reason == ExitReason::Exited && record.status == Some(ExitStatus::Code(0))
        )
    }

    /// Where the log ends, where somebody said so.
    pub(crate) fn log_end(&self) -> Option<u64> {
        match self {
            Self::Recorded { record, .. } => Some(record.usage.log_bytes),
            Self::Stopped { .. } | Self::Died { .. } | Self::Lost { .. } => None,
        }
    }
}

/// Judges.
pub(crate) fn judge(
    ending: Ending,
    input_bytes: u64,
    log_bytes: u64,
    published: Option<PublishRecord>,
) -> EndedAttempt {
    let success = ending.is_success();
    let mut ended = match ending {
        Ending::Recorded { record, state } => recorded(*record, &state),
        Ending::Stopped { time, started } => {
            let (message, seen) = if started {
                (
                    "the program was killed on request",
                    "the shim did not end it in time, and the container was killed",
                )
            } else {
                ("stopped before the program was started", "the container was never started")
            };
            EndedAttempt {
                message: message.to_owned(),
                evidence: vec![evidence("backend", seen, time)],
                ..ended(Cause::Cancelled, None)
            }
        }
        Ending::Died { state, said, time } => died(&state, &said, time),
        Ending::Lost { seen, time } => EndedAttempt {
            message: "nothing tells how the program ended".to_owned(),
            evidence: seen.into_iter().map(|(source, detail)| evidence(source, &detail, time)).collect(),
            ..ended(Cause::Lost, None)
        },
    };
    ended.usage.input_bytes = input_bytes;
    ended.usage.log_bytes = log_bytes;
    let Some(published) = published else { return ended };
    if let Some(manifest) = published.manifest {
        ended.usage.output_bytes = manifest.total_bytes;
        ended.outputs = Some(manifest);
    }
    let time = ended.evidence.last().map_or_else(Timestamp::default, |last| last.time);
    ended.evidence.extend(published.notes.iter().take(MAX_NOTES).map(|note| evidence("publish", note, time)));
    if let Some(failure) = published.failure {
        if !published.notes.contains(&failure.message) {
            ended.evidence.push(evidence("publish", &failure.message, time));
        }
        // What a program that failed anyway did not write is no news.
        if success {
            ended.cause = BackendErrorKind::Output.cause();
            ended.retryable = failure.retryable;
            ended.message = failure.message;
        }
    }
    ended
}

fn recorded(record: ExitRecord, state: &ContainerState) -> EndedAttempt {
    let oom_killed = state.oom_killed == Some(true);
    let killed = matches!(record.status, Some(ExitStatus::Signal(SIGKILL) | ExitStatus::Code(KILLED_CODE)));
    let out_of_memory = || (Cause::OomKilled, "the kernel killed the program at its memory limit".to_owned());
    let (cause, message) = match record.reason {
        // The shim's own count may be unreadable; the engine's is another source of the same.
        ExitReason::Exited if oom_killed && killed => out_of_memory(),
        ExitReason::Exited => (Cause::Exited, format!("the program {}", describe(record.status))),
        ExitReason::OomKilled => out_of_memory(),
        ExitReason::TimedOut => (Cause::TimedOut, "the program was stopped at its timeout".to_owned()),
        ExitReason::Stopped => (Cause::Cancelled, "the program was stopped on request".to_owned()),
        ExitReason::Terminated => {
            let message = "the container was told to end by somebody else: its engine was shut down, or a person did it";
            (Cause::Backend, message.to_owned())
        }
        ExitReason::SetupFailed => {
            let why = record.evidence.last().map_or("no reason was given", |(_, detail)| detail.as_str());
            (Cause::Backend, format!("the program could not be started: {}", cut(why)))
        }
    };
    let time = record.time;
    let mut seen: Vec<Evidence> =
        record.evidence.iter().map(|(source, detail)| evidence(source, detail, time)).collect();
    let detail = format!("exit record: {:?}, {}", record.reason, describe(record.status));
    seen.push(evidence("shim", &detail, time));
    seen.push(evidence("container", &describe_state(state), time));
    EndedAttempt { message, evidence: seen, usage: record.usage, ..ended(cause, record.status) }
}

/// The shim is the container's first process: where it is killed, the kernel kills all others with it.
fn died(state: &ContainerState, said: &str, time: Timestamp) -> EndedAttempt {
    let mut seen = vec![evidence("container", &describe_state(state), time)];
    if !said.is_empty() {
        seen.push(evidence("shim", said, time));
    }
    if state.oom_killed == Some(true) {
        return EndedAttempt {
            message: "the kernel killed everything in the container at its memory limit".to_owned(),
            evidence: seen,
            ..ended(Cause::OomKilled, Some(ExitStatus::Signal(SIGKILL)))
        };
    }
    EndedAttempt {
        message:
            "the container was killed from outside: its engine or its machine went down, or a person did it"
                .to_owned(),
        evidence: seen,
        ..ended(Cause::Backend, None)
    }
}

/// What the engine says, in a line.
pub(crate) fn describe_state(state: &ContainerState) -> String {
    let status = state.status.map_or_else(|| "unknown".to_owned(), |status| status.to_string());
    let mut text = format!(
        "{status}, exit code {}, out of memory {}, started {}, finished {}",
        state.exit_code.map_or_else(|| "unknown".to_owned(), |code| code.to_string()),
        state.oom_killed.unwrap_or_default(),
        state.started_at.as_deref().unwrap_or("never"),
        state.finished_at.as_deref().unwrap_or("never"),
    );
    if let Some(error) = state.error.as_deref().filter(|error| !error.is_empty()) {
        text.push_str(": ");
        text.push_str(error);
    }
    text
}

fn ended(cause: Cause, status: Option<ExitStatus>) -> EndedAttempt {
    EndedAttempt {
        cause,
        status,
        retryable: cause.retryable_by_default(),
        message: String::new(),
        evidence: Vec::new(),
        usage: Usage::default(),
        outputs: None,
    }
}

fn describe(status: Option<ExitStatus>) -> String {
    match status {
        Some(ExitStatus::Code(code)) => format!("exited with code {code}"),
        Some(ExitStatus::Signal(signal)) => format!("was ended by signal {signal}"),
        None => "never ran".to_owned(),
    }
}

fn evidence(source: &str, detail: &str, time: Timestamp) -> Evidence {
    Evidence { source: source.to_owned(), detail: cut(detail).to_owned(), time }
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_DETAIL)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(reason: ExitReason, status: Option<ExitStatus>, oom_killed: bool) -> Ending {
        let record = ExitRecord {
            reason,
            status,
            time: Timestamp::from_micros(5),
            usage: Usage::default(),
            evidence: vec![("cgroup".to_owned(), "seen".to_owned())],
        };
        let state =
            ContainerState { oom_killed: Some(oom_killed), exit_code: Some(0), ..ContainerState::default() };
        Ending::Recorded { record: Box::new(record), state: Box::new(state) }
    }

    #[test]
    fn every_reason_has_its_cause_and_keeps_its_status() {
        let code = |code| Some(ExitStatus::Code(code));
        let killed = Some(ExitStatus::Signal(9));
        for (reason, status, oom, cause, retryable) in [
            (ExitReason::Exited, code(0), false, Cause::Exited, false),
            (ExitReason::Exited, code(137), false, Cause::Exited, false),
            (ExitReason::Exited, killed, false, Cause::Exited, false),
            (ExitReason::Exited, killed, true, Cause::OomKilled, false),
            (ExitReason::Exited, code(137), true, Cause::OomKilled, false),
            // Something was killed for memory, and the program lived on: its end is its own.
            (ExitReason::Exited, code(1), true, Cause::Exited, false),
            (ExitReason::OomKilled, killed, false, Cause::OomKilled, false),
            (ExitReason::TimedOut, killed, true, Cause::TimedOut, false),
            (ExitReason::Stopped, code(3), false, Cause::Cancelled, false),
            (ExitReason::Terminated, code(143), false, Cause::Backend, true),
            (ExitReason::SetupFailed, None, false, Cause::Backend, true),
        ] {
            let ended = judge(recorded(reason, status, oom), 4, 3, None);
            assert_eq!(
                (ended.cause, ended.status, ended.retryable),
                (cause, status, retryable),
                "{reason:?}"
            );
            assert_eq!((ended.usage.input_bytes, ended.usage.log_bytes), (4, 3));
            assert_eq!(ended.evidence[0].source, "cgroup");
        }
    }

    #[test]
    fn a_container_that_died_without_a_word_is_the_backends_or_the_memorys() {
        let died = |oom_killed| Ending::Died {
            state: Box::new(ContainerState {
                oom_killed: Some(oom_killed),
                exit_code: Some(137),
                ..ContainerState::default()
            }),
            said: String::new(),
            time: Timestamp::default(),
        };
        assert!(!died(false).is_success());
        let ended = judge(died(false), 0, 0, None);
        assert_eq!((ended.cause, ended.status, ended.retryable), (Cause::Backend, None, true));
        assert!(ended.evidence[0].detail.contains("137"));
        let ended = judge(died(true), 0, 0, None);
        assert_eq!((ended.cause, ended.status), (Cause::OomKilled, Some(ExitStatus::Signal(9))));
    }

    #[test]
    fn absence_is_lost_and_never_success() {
        let lost = Ending::Lost { seen: vec![("engine", "gone".to_owned())], time: Timestamp::default() };
        assert!(!lost.is_success() && !lost.may_have_outputs());
        let ended = judge(lost, 0, 0, None);
        assert_eq!((ended.cause, ended.status, ended.outputs), (Cause::Lost, None, None));
        assert_eq!(ended.evidence.len(), 1);
    }

    #[test]
    fn a_missing_output_fails_only_a_program_that_succeeded() {
        let failure = PublishFailure { message: "absent".to_owned(), retryable: true };
        let published = |failure: &PublishFailure| {
            Some(PublishRecord {
                manifest: Some(Manifest { total_bytes: 9, ..Manifest::default() }),
                failure: Some(failure.clone()),
                notes: Vec::new(),
            })
        };
        let good = recorded(ExitReason::Exited, Some(ExitStatus::Code(0)), false);
        let ended = judge(good, 0, 0, published(&failure));
        assert_eq!((ended.cause, ended.retryable, ended.message.as_str()), (Cause::Output, true, "absent"));
        assert_eq!((ended.status, ended.usage.output_bytes), (Some(ExitStatus::Code(0)), 9));
        let bad = recorded(ExitReason::Exited, Some(ExitStatus::Code(1)), false);
        let ended = judge(bad, 0, 0, published(&failure));
        assert_eq!(ended.cause, Cause::Exited);
        assert!(ended.evidence.iter().any(|seen| seen.source == "publish"));
    }
}
