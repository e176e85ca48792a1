//! What went wrong, and what to do next.

use std::{fmt::Write as _, io, process::ExitCode};

use worker_client::{ClientError, ErrorKind, FieldViolation};

use crate::{exit::Exit, output};

/// An error for a person, with the exit status that goes with it.
#[derive(Debug)]
pub(crate) struct Failure {
    text: String,
    exit: Exit,
}

impl Failure {
    pub(crate) fn new(text: impl Into<String>, exit: Exit) -> Self {
        Self { text: text.into(), exit }
    }

    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self::new(text, Exit::USAGE)
    }

    pub(crate) fn local(doing: &str, error: &io::Error) -> Self {
        Self::new(format!("{doing}: {error}"), Exit::FAILURE)
    }

    /// The end of a process whose standard output failed. A reader that went away is not worth a word.
    pub(crate) fn stdout(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::new("", Exit::BROKEN_PIPE),
            _ => Self::new(format!("write to standard output: {error}"), Exit::FAILURE),
        }
    }

    /// The same, ended with another status where it is not the caller's fault.
    #[must_use]
    pub(crate) fn or_exit(mut self, exit: Exit) -> Self {
        if self.exit == Exit::FAILURE {
            self.exit = exit;
        }
        self
    }

    /// Writes it to standard error.
    pub(crate) fn report(self) -> ExitCode {
        if !self.text.is_empty() {
            output::note(&self.text);
        }
        self.exit.into()
    }

    /// What the client said, and what helps.
    pub(crate) fn client(error: &ClientError, endpoint: &str) -> Self {
        let mut text = error.to_string();
        let mut exit = Exit::FAILURE;
        match error.kind() {
            ErrorKind::Unreachable => {
                let _ = write!(
                    text,
                    "\n  No service answers at {endpoint}. Start one on this machine with: runner serve\n  \
                     For another service: --endpoint URL, or RUNNER_ENDPOINT=URL"
                );
            }
            ErrorKind::Unavailable => {
                text.push_str("\n  The service cannot serve now. Try again in a moment.");
            }
            ErrorKind::DeadlineExceeded => {
                text.push_str(
                    "\n  The service took too long. Try again; `runnerctl list` shows what it accepted.",
                );
            }
            ErrorKind::Exhausted => {
                for quota in error.quota() {
                    let _ = write!(text, "\n  {}: {}", quota.subject, quota.description);
                }
                match error.retry_after() {
                    Some(wait) => {
                        let _ = write!(text, "\n  Try again in {}.", humantime::format_duration(wait));
                    }
                    None => text.push_str("\n  Wait until runs have ended, or cancel some: runnerctl list"),
                }
            }
            ErrorKind::Invalid => {
                exit = Exit::USAGE;
                if !error.violations().is_empty() {
                    text = format!("{}: the service refuses:", error.doing());
                }
                for violation in error.violations() {
                    let _ = write!(text, "\n  {}", explain(violation));
                }
            }
            ErrorKind::NotFound => text.push_str("\n  `runnerctl list` shows the runs that there are."),
            ErrorKind::AlreadyExists => {
                text.push_str("\n  The key belongs to a run with another spec. Choose another --key.");
            }
            ErrorKind::UnsafePath => {
                text.push_str("\n  Nothing was written there. Choose an empty directory.")
            }
            ErrorKind::FailedPrecondition
            | ErrorKind::Unauthenticated
            | ErrorKind::PermissionDenied
            | ErrorKind::Unimplemented
            | ErrorKind::Cancelled
            | ErrorKind::Internal
            | ErrorKind::Protocol
            | ErrorKind::Integrity
            | ErrorKind::Io
            | ErrorKind::Unsupported => {}
        }
        Self::new(text, exit)
    }
}

/// A bad field, by the flag that it comes from.
fn explain(violation: &FieldViolation) -> String {
    match flag_of(&violation.field) {
        Some(flag) => format!("{flag}: {} ({})", violation.description, violation.field),
        None => format!("{}: {}", violation.field, violation.description),
    }
}

/// The flag that sets a field of the request.
fn flag_of(field: &str) -> Option<String> {
    let field = field.strip_prefix("spec.").unwrap_or(field);
    let (head, rest) = field.split_at(field.find(['.', '[']).unwrap_or(field.len()));
    // Counted from 1, as a person counts.
    let nth = || {
        let number = rest.strip_prefix('[')?.split(']').next()?.parse::<usize>().ok()?;
        Some(format!(" number {}", number + 1))
    };
    let flag = match (head, rest) {
        ("image", _) => "--image".to_owned(),
        ("command" | "args", _) => "CMD".to_owned(),
        ("env", _) => "--env".to_owned(),
        ("working_dir", _) => "--workdir".to_owned(),
        ("inputs", _) => format!("--input{}", nth().unwrap_or_default()),
        ("outputs", _) => format!("--output{}", nth().unwrap_or_default()),
        ("resources", ".cpu_millis") => "--cpu".to_owned(),
        ("resources", ".memory_bytes") => "--memory".to_owned(),
        ("resources", ".pids") => "--pids".to_owned(),
        ("resources", ".file_size_bytes") => "--file-size".to_owned(),
        ("network", _) => "--network".to_owned(),
        ("user", _) => "--user".to_owned(),
        ("read_only_root", _) => "--read-only".to_owned(),
        ("timeout", _) => "--timeout".to_owned(),
        ("stop_grace", _) => "--stop-grace".to_owned(),
        ("retry", _) => "--retries".to_owned(),
        ("terminal", _) => "--tty".to_owned(),
        ("stdin", _) => "--stdin".to_owned(),
        ("labels", _) => "--label".to_owned(),
        ("routing", _) => "--backend".to_owned(),
        ("idempotent", _) => "--idempotent".to_owned(),
        ("idempotency_key", _) => "--key".to_owned(),
        ("run_id", _) => "RUN".to_owned(),
        ("cursor", _) => "--cursor".to_owned(),
        _ => return None,
    };
    Some(flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_field_names_the_flag_that_it_comes_from() {
        for (field, flag) in [
            ("spec.image", Some("--image")),
            ("spec.command[0]", Some("CMD")),
            ("spec.inputs[2].path", Some("--input number 3")),
            ("spec.outputs[0].max_bytes", Some("--output number 1")),
            ("spec.inputs", Some("--input")),
            ("spec.resources.cpu_millis", Some("--cpu")),
            ("spec.retry.max_attempts", Some("--retries")),
            ("spec.env[\"A\"]", Some("--env")),
            ("run_id", Some("RUN")),
            ("spec.resources.gpus", None),
            ("something.new", None),
        ] {
            assert_eq!(flag_of(field).as_deref(), flag, "{field}");
        }
    }
}
