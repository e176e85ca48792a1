//! How an attempt ended, from what was seen. Pure.

use runner_agent::exec::protocol::{ExitReason, ExitRecord};
use runner_core::{
    artifact::Manifest,
    backend::{BackendErrorKind, EndedAttempt},
    clock::Timestamp,
    outcome::{Cause, Evidence, ExitStatus, Usage},
};
use serde::{Deserialize, Serialize};

/// Longest detail of one piece of evidence, in bytes.
const MAX_DETAIL: usize = 4096;
/// Most notes of the publishing that become evidence.
const MAX_NOTES: usize = 32;

/// What publishing came to. Written to the attempt's directory, so that it is found and not done again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PublishRecord {
    /// What was stored. `None` where nothing could be.
    pub(crate) manifest: Option<Manifest>,
    /// What went wrong.
    pub(crate) failure: Option<PublishFailure>,
    /// What was left out and why.
    pub(crate) notes: Vec<String>,
}

/// Why publishing did not do all of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PublishFailure {
    pub(crate) message: String,
    pub(crate) retryable: bool,
}

/// How the program's side of it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The shim wrote how.
    Recorded(ExitRecord),
    /// It was stopped, and there is no shim to write so: it never had one, or the shim did not answer and was killed.
    Stopped {
        /// When it was stopped.
        time: Timestamp,
        /// Whether the program was started.
        started: bool,
    },
    /// The shim died before it began, so that the program was certainly not started.
    NeverBegan {
        /// What was seen: (source, detail).
        seen: Vec<(&'static str, String)>,
        /// When.
        time: Timestamp,
    },
    /// Nobody knows.
    Lost {
        /// What was seen instead: (source, detail).
        seen: Vec<(&'static str, String)>,
        /// When.
        time: Timestamp,
    },
}

impl Ending {
    /// Whether the program may have written outputs.
    pub(crate) fn may_have_outputs(&self) -> bool {
        match self {
            Self::Recorded(record) => record.reason != ExitReason::SetupFailed,
            Self::Stopped { started, .. } => *started,
            Self::NeverBegan { .. } => false,
            Self::Lost { .. } => true,
        }
    }

    /// Whether the program exited 0 by itself, so that its outputs are what it promised.
    pub(crate) fn is_success(&self) -> bool {
        matches!(
            self,
            Self::Recorded(ExitRecord { reason: ExitReason::Exited, status: Some(ExitStatus::Code(0)), .. })
        )
    }
}

/// Judges.
pub(crate) fn judge(ending: Ending, input_bytes: u64, published: Option<PublishRecord>) -> EndedAttempt {
    let success = ending.is_success();
    let mut ended = match ending {
        Ending::Recorded(record) => recorded(record),
        Ending::Stopped { time, started } => {
            let (message, seen) = if started {
                (
                    "the program was killed on request",
                    "the shim did not end it in time, and was killed with it",
                )
            } else {
                ("stopped before the program was started", "no program was ever started")
            };
            EndedAttempt {
                message: message.to_owned(),
                evidence: vec![evidence("backend", seen, time)],
                ..ended(Cause::Cancelled, None)
            }
        }
        Ending::NeverBegan { seen, time } => EndedAttempt {
            message: "the program was never started: its shim died first".to_owned(),
            evidence: all(seen, time),
            ..ended(Cause::Backend, None)
        },
        Ending::Lost { seen, time } => EndedAttempt {
            message: "nothing tells how the program ended".to_owned(),
            evidence: all(seen, time),
            ..ended(Cause::Lost, None)
        },
    };
    ended.usage.input_bytes = input_bytes;
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

fn all(seen: Vec<(&'static str, String)>, time: Timestamp) -> Vec<Evidence> {
    seen.into_iter().map(|(source, detail)| evidence(source, &detail, time)).collect()
}

fn recorded(record: ExitRecord) -> EndedAttempt {
    let (cause, message) = match record.reason {
        ExitReason::Exited => (Cause::Exited, format!("the program {}", describe(record.status))),
        ExitReason::OomKilled => {
            (Cause::OomKilled, "the kernel killed the program at its memory limit".to_owned())
        }
        ExitReason::TimedOut => (Cause::TimedOut, "the program was stopped at its timeout".to_owned()),
        // A shim that is no container's says `Stopped` of every stop.
        ExitReason::Stopped | ExitReason::Terminated => {
            (Cause::Cancelled, "the program was stopped on request".to_owned())
        }
        ExitReason::SetupFailed => {
            let why = record.evidence.last().map_or("no reason was given", |(_, detail)| detail.as_str());
            (Cause::Backend, format!("the program could not be started: {}", cut(why)))
        }
    };
    let time = record.time;
    let mut seen: Vec<Evidence> =
        record.evidence.iter().map(|(source, detail)| evidence(source, detail, time)).collect();
    seen.push(evidence(
        "shim",
        &format!("exit record: {:?}, {}", record.reason, describe(record.status)),
        time,
    ));
    EndedAttempt { message, evidence: seen, usage: record.usage, ..ended(cause, record.status) }
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

    fn record(reason: ExitReason, status: Option<ExitStatus>) -> Ending {
        Ending::Recorded(ExitRecord {
            reason,
            status,
            time: Timestamp::from_micros(5),
            usage: Usage { log_bytes: 3, ..Usage::default() },
            evidence: vec![("cgroup".to_owned(), "seen".to_owned())],
        })
    }

    fn publish(failure: Option<PublishFailure>) -> Option<PublishRecord> {
        Some(PublishRecord {
            manifest: Some(Manifest { total_bytes: 9, ..Manifest::default() }),
            failure,
            notes: Vec::new(),
        })
    }

    #[test]
    fn every_reason_has_its_cause_and_keeps_its_status() {
        let code = |code| Some(ExitStatus::Code(code));
        let killed = Some(ExitStatus::Signal(9));
        for (reason, status, cause, retryable) in [
            (ExitReason::Exited, code(0), Cause::Exited, false),
            (ExitReason::Exited, code(137), Cause::Exited, false),
            (ExitReason::Exited, killed, Cause::Exited, false),
            (ExitReason::OomKilled, killed, Cause::OomKilled, false),
            (ExitReason::TimedOut, killed, Cause::TimedOut, false),
            (ExitReason::Stopped, code(3), Cause::Cancelled, false),
            (ExitReason::SetupFailed, None, Cause::Backend, true),
        ] {
            let ended = judge(record(reason, status), 4, publish(None));
            assert_eq!(
                (ended.cause, ended.status, ended.retryable),
                (cause, status, retryable),
                "{reason:?}"
            );
            assert_eq!(ended.usage.input_bytes, 4);
            assert_eq!(ended.usage.output_bytes, 9);
            assert_eq!(ended.usage.log_bytes, 3);
            assert_eq!(ended.evidence[0].source, "cgroup");
        }
    }

    #[test]
    fn a_missing_output_fails_only_a_program_that_succeeded() {
        let failure = PublishFailure { message: "absent".to_owned(), retryable: true };
        let ended =
            judge(record(ExitReason::Exited, Some(ExitStatus::Code(0))), 0, publish(Some(failure.clone())));
        assert_eq!((ended.cause, ended.retryable, ended.message.as_str()), (Cause::Output, true, "absent"));
        assert_eq!(ended.status, Some(ExitStatus::Code(0)), "the exit code stays the truth");
        let ended = judge(record(ExitReason::Exited, Some(ExitStatus::Code(1))), 0, publish(Some(failure)));
        assert_eq!(ended.cause, Cause::Exited);
        assert!(ended.evidence.iter().any(|seen| seen.source == "publish"));
    }

    #[test]
    fn absence_is_lost_and_never_success() {
        let lost = Ending::Lost { seen: vec![("shim", "dead".to_owned())], time: Timestamp::from_micros(1) };
        assert!(!lost.is_success());
        let ended = judge(lost, 0, None);
        assert_eq!((ended.cause, ended.status, ended.outputs), (Cause::Lost, None, None));
        assert_eq!(ended.evidence.len(), 1);
    }

    #[test]
    fn a_setup_failure_says_why_and_evidence_is_bounded() {
        let ending = Ending::Recorded(ExitRecord {
            reason: ExitReason::SetupFailed,
            status: None,
            time: Timestamp::default(),
            usage: Usage::default(),
            evidence: vec![("shim".to_owned(), "ü".repeat(5000))],
        });
        assert!(!ending.may_have_outputs());
        let ended = judge(ending, 0, None);
        assert!(ended.message.starts_with("the program could not be started: ü"));
        assert!(ended.evidence.iter().all(|seen| seen.detail.len() <= MAX_DETAIL));
    }
}
