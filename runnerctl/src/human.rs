//! Times, durations, sizes and names as people read them.

use std::time::{Duration, SystemTime};

use worker_client::{
    convert,
    proto::{Capabilities, Cause, Outcome, Run, RunState, outcome::Status},
};

/// The wall clock.
#[allow(clippy::disallowed_methods, reason = "the one place of the command line that reads the clock")]
pub(crate) fn now() -> SystemTime {
    SystemTime::now()
}

/// A duration in at most two units: `1h 5m`, `3m 20s`, `1.5s`, `20ms`.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    let two = |big: u64, big_unit: &str, small: u64, small_unit: &str| match small {
        0 => format!("{big}{big_unit}"),
        small => format!("{big}{big_unit} {small}{small_unit}"),
    };
    match seconds {
        0 => format!("{}ms", duration.as_millis()),
        1..10 => format!("{:.1}s", duration.as_secs_f64()),
        10..60 => format!("{seconds}s"),
        60..3_600 => two(minutes, "m", seconds % 60, "s"),
        3_600..86_400 => two(hours, "h", minutes, "m"),
        _ => two(days, "d", hours, "h"),
    }
}

/// How long ago something was: `12s`, `5m`, `3h`, `2d`.
pub(crate) fn age(since: SystemTime, now: SystemTime) -> String {
    let seconds = now.duration_since(since).unwrap_or_default().as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        3_600..86_400 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A moment, in UTC, to the second.
pub(crate) fn moment(time: &worker_client::convert::Timestamp) -> String {
    match jiff::Timestamp::new(time.seconds, 0) {
        Ok(time) => time.to_string(),
        Err(_) => format!("{} s after 1970", time.seconds),
    }
}

/// A number of bytes.
pub(crate) fn bytes(bytes: u64) -> String {
    indicatif::HumanBytes(bytes).to_string()
}

/// A state's name.
pub(crate) fn state(state: RunState) -> &'static str {
    state.as_str_name().strip_prefix("RUN_STATE_").unwrap_or_default()
}

/// A cause's name.
pub(crate) fn cause(cause: Cause) -> &'static str {
    cause.as_str_name().strip_prefix("CAUSE_").unwrap_or_default()
}

/// How a run ended, in a word or two: `exit 7`, `TIMED_OUT`, `OOM_KILLED, signal 9`; `-` while it has not.
pub(crate) fn ending(run: &Run) -> String {
    run.outcome.as_ref().map_or_else(|| "-".to_owned(), outcome)
}

/// See [`ending`].
pub(crate) fn outcome(outcome: &Outcome) -> String {
    let status = match outcome.status {
        Some(Status::ExitCode(code)) => format!("exit {code}"),
        Some(Status::Signal(number)) => format!("signal {number}"),
        None => String::new(),
    };
    match (outcome.cause(), status.is_empty()) {
        (Cause::Exited, false) => status,
        (other, true) => cause(other).to_owned(),
        (other, false) => format!("{}, {status}", cause(other)),
    }
}

/// How long a run took, or has taken.
pub(crate) fn took(run: &Run, now: SystemTime) -> Option<Duration> {
    let start = convert::time_from_proto(run.start_time.as_ref()?)?;
    let end = run.end_time.as_ref().and_then(convert::time_from_proto).unwrap_or(now);
    end.duration_since(start).ok()
}

/// A command as one line that a shell would read the same way, cut to `width` characters.
pub(crate) fn command<'a>(words: impl IntoIterator<Item = &'a String>, width: usize) -> String {
    let mut line = String::new();
    for word in words {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(&quoted(word));
        if line.len() > width.saturating_mul(4) {
            break;
        }
    }
    cut(&line, width)
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./:=,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", visible(&word.replace('\'', "'\\''")))
}

/// Text without what would move a terminal's cursor or change its colours.
pub(crate) fn visible(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let mut text: String = text.chars().take(width.saturating_sub(1)).collect();
    text.push('…');
    text
}

/// What a backend can do, by name.
pub(crate) fn capabilities(has: &Capabilities) -> impl Iterator<Item = (&'static str, bool)> {
    [
        ("inputs_outputs", has.inputs_outputs),
        ("network_none", has.network_none),
        ("network_egress", has.network_egress),
        ("memory_limit", has.memory_limit),
        ("cpu_limit", has.cpu_limit),
        ("pids_limit", has.pids_limit),
        ("file_size_limit", has.file_size_limit),
        ("ephemeral_storage_limit", has.ephemeral_storage_limit),
        ("gpus", has.gpus),
        ("user", has.user),
        ("root_user", has.root_user),
        ("read_only_root", has.read_only_root),
        ("terminal", has.terminal),
        ("stdin", has.stdin),
        ("secrets", has.secrets),
        ("extract", has.extract),
    ]
    .into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_at_most_two_units() {
        for (millis, text) in [
            (0, "0ms"),
            (20, "20ms"),
            (1_500, "1.5s"),
            (59_000, "59s"),
            (200_000, "3m 20s"),
            (3_600_000, "1h"),
            (3_900_000, "1h 5m"),
            (180_000_000, "2d 2h"),
        ] {
            assert_eq!(duration(Duration::from_millis(millis)), text);
        }
    }

    #[test]
    fn a_command_reads_as_a_shell_would_and_moves_no_cursor() {
        let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        assert_eq!(command(&words(&["sh", "-c", "echo 'a'; ls"]), 80), r"sh -c 'echo '\''a'\''; ls'");
        assert_eq!(command(&words(&["a\u{1b}[2J", ""]), 80), r"'a\u{1b}[2J' ''");
        assert_eq!(command(&words(&["abcdefgh"]), 5), "abcd…");
    }

    #[test]
    fn an_ending_tells_the_cause_where_it_is_not_the_program() {
        let with =
            |cause: Cause, status| outcome(&Outcome { cause: cause.into(), status, ..Outcome::default() });
        assert_eq!(with(Cause::Exited, Some(Status::ExitCode(7))), "exit 7");
        assert_eq!(with(Cause::OomKilled, Some(Status::Signal(9))), "OOM_KILLED, signal 9");
        assert_eq!(with(Cause::Lost, None), "LOST");
    }
}
