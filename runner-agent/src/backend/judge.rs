//! How an attempt ended, from what was seen. Pure.

use runner_core::{
    artifact::Manifest,
    backend::{BackendError, BackendErrorKind, EndedAttempt},
    clock::Timestamp,
    outcome::{Cause, Evidence, ExitStatus, Usage},
};
use serde::{Deserialize, Serialize};

use crate::{
    exec::protocol::{ExitReason, ExitRecord},
    staging::Published,
};

/// Longest detail of one piece of evidence, in bytes.
const MAX_DETAIL: usize = 4096;
/// Most notes of the publishing that become evidence.
const MAX_NOTES: usize = 32;
const SIGKILL: i32 = 9;
/// What a shell says whose last command was killed.
const KILLED_CODE: i32 = 128 + SIGKILL;

/// What was seen, oldest first: (source, detail). Details are cut to 4 KiB.
pub type Seen = Vec<(&'static str, String)>;

/// What publishing came to. Serialised where a backend keeps it, so that it is found and not done again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishRecord {
    /// What was stored. `None` where nothing could be.
    pub manifest: Option<Manifest>,
    /// What went wrong.
    pub failure: Option<PublishFailure>,
    /// What was left out and why.
    pub notes: Vec<String>,
}

/// Why publishing did not do all of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishFailure {
    /// For people.
    pub message: String,
    /// Whether another attempt may do better.
    pub retryable: bool,
}

impl PublishRecord {
    /// Publishing failed for good: another try would do no better.
    pub fn failed(error: &BackendError) -> Self {
        let failure = PublishFailure { message: error.chain(), retryable: false };
        Self { manifest: None, failure: Some(failure), notes: Vec::new() }
    }
}

impl From<Published> for PublishRecord {
    fn from(published: Published) -> Self {
        let failure = published
            .failure
            .map(|error| PublishFailure { retryable: error.kind.retryable(), message: error.to_string() });
        Self { manifest: Some(published.manifest), failure, notes: published.notes }
    }
}

/// How the program's side of it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The shim wrote how.
    Recorded {
        /// What it wrote.
        record: Box<ExitRecord>,
        /// The substrate says that the memory limit killed something. The shim's own count may be unreadable.
        out_of_memory: bool,
        /// What the substrate says beside it.
        seen: Seen,
    },
    /// It was stopped by us, and there is no shim to say so: it never had one, or it did not answer and was killed.
    Stopped {
        /// When.
        time: Timestamp,
        /// Whether the program may have been started.
        started: bool,
    },
    /// The shim died before it began, so that the program was certainly not started.
    NeverBegan {
        /// What was seen.
        seen: Seen,
        /// When.
        time: Timestamp,
    },
    /// Everything that was the workload's ended at once, and its shim did not say why: it was killed from outside.
    Died {
        /// The substrate says that the memory limit did it.
        out_of_memory: bool,
        /// What was seen.
        seen: Seen,
        /// When.
        time: Timestamp,
    },
    /// Nobody knows.
    Lost {
        /// What was seen instead.
        seen: Seen,
        /// When.
        time: Timestamp,
    },
}

impl Ending {
    /// What the shim wrote, where the substrate has nothing to say.
    pub fn recorded(record: ExitRecord) -> Self {
        Self::Recorded { record: Box::new(record), out_of_memory: false, seen: Seen::new() }
    }

    /// Whether the program may have written outputs. Whether they can be had is the backend's to know.
    pub fn may_have_outputs(&self) -> bool {
        match self {
            Self::Recorded { record, .. } => record.reason != ExitReason::SetupFailed,
            Self::Stopped { started, .. } => *started,
            Self::NeverBegan { .. } => false,
            Self::Died { .. } | Self::Lost { .. } => true,
        }
    }

    /// Whether the program exited 0 by itself, so that its outputs are what it promised.
    pub fn is_success(&self) -> bool {
        match self {
            Self::Recorded { record, .. } => {
                record.reason == ExitReason::Exited && record.status == Some(ExitStatus::Code(0))
            }
            Self::Stopped { .. } | Self::NeverBegan { .. } | Self::Died { .. } | Self::Lost { .. } => false,
        }
    }

    /// Where the log ends, where somebody said so.
    pub fn log_end(&self) -> Option<u64> {
        match self {
            Self::Recorded { record, .. } => Some(record.usage.log_bytes),
            Self::Stopped { .. } | Self::NeverBegan { .. } | Self::Died { .. } | Self::Lost { .. } => None,
        }
    }
}

/// What the backend itself counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counted {
    /// Bytes of inputs that were staged.
    pub input_bytes: u64,
    /// Offset at which the log ended that was delivered.
    pub log_bytes: u64,
}

/// Judges.
///
/// Absence is never success: only an exit record makes [`Cause::Exited`]. What publishing came to changes the cause of a
/// program that succeeded, and of no other.
pub fn judge(ending: Ending, counted: Counted, published: Option<PublishRecord>) -> EndedAttempt {
    let success = ending.is_success();
    let mut ended = match ending {
        Ending::Recorded { record, out_of_memory, seen } => recorded(*record, out_of_memory, seen),
        Ending::Stopped { time, started } => {
            let (message, seen) = if started {
                (
                    "the program was killed on request",
                    "the shim did not end it in time, and was killed with it",
                )
            } else {
                ("stopped before the program was started", "no program was ever started")
            };
            ended(Cause::Cancelled, message, vec![evidence("backend", seen, time)])
        }
        Ending::NeverBegan { seen, time } => {
            let message = "the program was never started: its shim died first";
            ended(Cause::Backend, message, all(seen, time))
        }
        Ending::Died { out_of_memory: true, seen, time } => EndedAttempt {
            status: Some(ExitStatus::Signal(SIGKILL)),
            ..ended(
                Cause::OomKilled,
                "the kernel killed everything of the workload at its memory limit",
                all(seen, time),
            )
        },
        Ending::Died { out_of_memory: false, seen, time } => {
            let message =
                "the workload was killed from outside: its machine or engine went down, or a person did it";
            ended(Cause::Backend, message, all(seen, time))
        }
        Ending::Lost { seen, time } => {
            ended(Cause::Lost, "nothing tells how the program ended", all(seen, time))
        }
    };
    ended.usage.input_bytes = counted.input_bytes;
    ended.usage.log_bytes = counted.log_bytes;
    if let Some(published) = published {
        publish(&mut ended, published, success);
    }
    ended
}

fn publish(ended: &mut EndedAttempt, published: PublishRecord, success: bool) {
    if let Some(manifest) = published.manifest {
        ended.usage.output_bytes = manifest.total_bytes;
        ended.outputs = Some(manifest);
    }
    let time = ended.evidence.last().map_or_else(Timestamp::default, |last| last.time);
    ended.evidence.extend(published.notes.iter().take(MAX_NOTES).map(|note| evidence("publish", note, time)));
    let Some(failure) = published.failure else { return };
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

fn recorded(record: ExitRecord, out_of_memory: bool, beside: Seen) -> EndedAttempt {
    let killed = matches!(record.status, Some(ExitStatus::Signal(SIGKILL) | ExitStatus::Code(KILLED_CODE)));
    let at_the_limit = || (Cause::OomKilled, "the kernel killed the program at its memory limit".to_owned());
    let (cause, message) = match record.reason {
        // Something may be killed for memory and the program live on: then its end is its own.
        ExitReason::Exited if out_of_memory && killed => at_the_limit(),
        ExitReason::Exited => (Cause::Exited, format!("the program {}", describe(record.status))),
        ExitReason::OomKilled => at_the_limit(),
        ExitReason::TimedOut => (Cause::TimedOut, "the program was stopped at its timeout".to_owned()),
        ExitReason::Stopped => (Cause::Cancelled, "the program was stopped on request".to_owned()),
        // Only the shim of a container says so.
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
    seen.extend(all(beside, time));
    EndedAttempt { status: record.status, usage: record.usage, ..ended(cause, message, seen) }
}

fn ended(cause: Cause, message: impl Into<String>, evidence: Vec<Evidence>) -> EndedAttempt {
    EndedAttempt {
        cause,
        status: None,
        retryable: cause.retryable_by_default(),
        message: message.into(),
        evidence,
        usage: Usage::default(),
        outputs: None,
    }
}

fn all(seen: Seen, time: Timestamp) -> Vec<Evidence> {
    seen.into_iter().map(|(source, detail)| evidence(source, &detail, time)).collect()
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

    const COUNTED: Counted = Counted { input_bytes: 4, log_bytes: 3 };

    fn record(reason: ExitReason, status: Option<ExitStatus>) -> ExitRecord {
        ExitRecord {
            reason,
            status,
            time: Timestamp::from_micros(5),
            usage: Usage { wall: std::time::Duration::from_secs(1), ..Usage::default() },
            evidence: vec![("cgroup".to_owned(), "seen".to_owned())],
        }
    }

    fn publishing(failure: Option<PublishFailure>) -> Option<PublishRecord> {
        let manifest = Some(Manifest { total_bytes: 9, ..Manifest::default() });
        Some(PublishRecord { manifest, failure, notes: Vec::new() })
    }

    #[test]
    fn every_reason_has_its_cause_and_keeps_its_status() {
        let code = |code| Some(ExitStatus::Code(code));
        let killed = Some(ExitStatus::Signal(9));
        for (reason, status, out_of_memory, cause, retryable) in [
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
            let record = Box::new(record(reason, status));
            let seen = vec![("container", "as the engine has it".to_owned())];
            let ended = judge(Ending::Recorded { record, out_of_memory, seen }, COUNTED, publishing(None));
            assert_eq!(
                (ended.cause, ended.status, ended.retryable),
                (cause, status, retryable),
                "{reason:?}"
            );
            let usage = ended.usage;
            assert_eq!((usage.input_bytes, usage.log_bytes, usage.output_bytes), (4, 3, 9));
            assert_eq!(usage.wall.as_secs(), 1, "what the shim measured is kept");
            let sources: Vec<&str> = ended.evidence.iter().map(|seen| seen.source.as_str()).collect();
            assert_eq!(sources, ["cgroup", "shim", "container"]);
        }
    }

    #[test]
    fn a_workload_that_died_without_a_word_is_the_backends_or_the_memorys() {
        let died = |out_of_memory| Ending::Died {
            out_of_memory,
            seen: vec![("container", "exit code 137".to_owned())],
            time: Timestamp::default(),
        };
        assert!(!died(false).is_success() && died(false).may_have_outputs());
        let ended = judge(died(false), COUNTED, None);
        assert_eq!((ended.cause, ended.status, ended.retryable), (Cause::Backend, None, true));
        assert!(ended.evidence[0].detail.contains("137"));
        let ended = judge(died(true), COUNTED, None);
        assert_eq!((ended.cause, ended.status), (Cause::OomKilled, Some(ExitStatus::Signal(9))));
    }

    #[test]
    fn what_was_stopped_without_a_shim_is_cancelled() {
        for started in [false, true] {
            let ending = Ending::Stopped { time: Timestamp::from_micros(1), started };
            assert_eq!((ending.may_have_outputs(), ending.is_success()), (started, false));
            let ended = judge(ending, COUNTED, None);
            assert_eq!((ended.cause, ended.status, ended.evidence.len()), (Cause::Cancelled, None, 1));
        }
    }

    #[test]
    fn absence_is_lost_and_never_success() {
        let seen = || vec![("shim", "dead".to_owned())];
        let time = Timestamp::from_micros(1);
        for (ending, cause) in [
            (Ending::Lost { seen: seen(), time }, Cause::Lost),
            (Ending::NeverBegan { seen: seen(), time }, Cause::Backend),
        ] {
            assert!(!ending.is_success());
            assert_eq!(ending.log_end(), None);
            let ended = judge(ending, COUNTED, None);
            assert_eq!((ended.cause, ended.status, ended.outputs), (cause, None, None));
            assert_eq!((ended.evidence.len(), ended.retryable), (1, true));
        }
    }

    #[test]
    fn a_missing_output_fails_only_a_program_that_succeeded() {
        let failure = PublishFailure { message: "absent".to_owned(), retryable: true };
        let of = |code| {
            let ending = Ending::recorded(record(ExitReason::Exited, Some(ExitStatus::Code(code))));
            judge(ending, COUNTED, publishing(Some(failure.clone())))
        };
        let ended = of(0);
        assert_eq!((ended.cause, ended.retryable, ended.message.as_str()), (Cause::Output, true, "absent"));
        assert_eq!(ended.status, Some(ExitStatus::Code(0)), "the exit code stays the truth");
        let ended = of(1);
        assert_eq!(ended.cause, Cause::Exited);
        assert!(ended.evidence.iter().any(|seen| seen.source == "publish"));
    }

    #[test]
    fn a_setup_failure_says_why_and_evidence_is_bounded() {
        let mut record = record(ExitReason::SetupFailed, None);
        record.evidence = vec![("shim".to_owned(), "ü".repeat(5000))];
        let ending = Ending::recorded(record);
        assert!(!ending.may_have_outputs());
        let ended = judge(ending, COUNTED, None);
        assert!(ended.message.starts_with("the program could not be started: ü"));
        assert!(ended.evidence.iter().all(|seen| seen.detail.len() <= MAX_DETAIL));
    }

    #[test]
    fn notes_are_told_once_and_not_without_end() {
        let notes: Vec<String> = (0..100).map(|number| format!("note {number}")).collect();
        let failure = Some(PublishFailure { message: "note 0".to_owned(), retryable: false });
        let published = PublishRecord { manifest: None, failure, notes };
        let ending = Ending::recorded(record(ExitReason::Exited, Some(ExitStatus::Code(0))));
        let ended = judge(ending, COUNTED, Some(published));
        let told = ended.evidence.iter().filter(|seen| seen.source == "publish").count();
        assert_eq!((told, ended.cause), (MAX_NOTES, Cause::Output));
    }
}
