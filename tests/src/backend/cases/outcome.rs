//! How a program's end is told.

use std::time::Duration;

use runner_core::outcome::{Cause, ExitStatus};

use crate::backend::{bench::Bench, program::Program};

const SIGNAL_KILL: i32 = 9;
const SIGNAL_TERM: i32 = 15;

/// Exit codes are told verbatim, those that a shell gives a meaning to as well.
pub async fn exit_codes_are_told_verbatim(bench: &mut Bench) {
    for code in [0, 1, 7, 137, 143, 255] {
        let attempt = bench.attempt(&Program::exit(code));
        let observed = bench.run(&attempt).await;
        let end = observed.end();
        assert_eq!((end.cause, end.status), (Cause::Exited, Some(ExitStatus::Code(code))));
        assert_eq!((observed.started, observed.exited), (1, 1));
        assert!(!end.retryable, "an exit is the program's own: {end:?}");
        assert!(!end.message.is_empty() && !end.evidence.is_empty(), "a person can judge: {end:?}");
        assert_eq!(observed.end, 0, "nothing was printed");
    }
}

/// A signal that nobody of ours sent is the program's own end.
pub async fn a_signal_is_told_as_a_signal(bench: &mut Bench) {
    for signal in [SIGNAL_KILL, 11, SIGNAL_TERM] {
        let attempt = bench.attempt(&Program::Signal(signal));
        let end = bench.run(&attempt).await.end().clone();
        assert_eq!((end.cause, end.status), (Cause::Exited, Some(ExitStatus::Signal(signal))));
    }
}

/// As from a shell.
pub async fn a_program_that_does_not_exist_exits_127(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::NotFound);
    let end = bench.run(&attempt).await.end().clone();
    assert_eq!((end.cause, end.status), (Cause::Exited, Some(ExitStatus::Code(127))));
}

/// As from a shell.
pub async fn a_program_that_is_not_executable_exits_126(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::NotExecutable);
    let end = bench.run(&attempt).await.end().clone();
    assert_eq!((end.cause, end.status), (Cause::Exited, Some(ExitStatus::Code(126))));
}

/// The run's own timeout is told as such, and the log before it is kept.
pub async fn a_timeout_ends_the_program_and_is_told_as_such(bench: &mut Bench) {
    let attempt = bench.attempt_with(&Program::SleepForever, |spec| {
        spec.timeout = Some(Duration::from_secs(1));
        spec.stop_grace = Some(Duration::from_secs(20));
    });
    let before = bench.now();
    let observed = bench.run(&attempt).await;
    let end = observed.end();
    assert_eq!((end.cause, end.status), (Cause::TimedOut, Some(ExitStatus::Signal(SIGNAL_TERM))));
    assert_eq!(observed.out(), "ready\n");
    assert!(bench.now() - before >= Duration::from_secs(1), "not before its time");
    assert_eq!(bench.harness().processes(attempt.attempt), Vec::<String>::new());
}

/// What ignores SIGTERM at its timeout is killed after the grace.
pub async fn a_timeout_kills_what_ignores_sigterm(bench: &mut Bench) {
    let attempt = bench.attempt_with(&Program::IgnoreTerm, |spec| {
        spec.timeout = Some(Duration::from_secs(1));
        spec.stop_grace = Some(Duration::from_secs(1));
    });
    let before = bench.now();
    let end = bench.run(&attempt).await.end().clone();
    assert_eq!((end.cause, end.status), (Cause::TimedOut, Some(ExitStatus::Signal(SIGNAL_KILL))));
    assert!(bench.now() - before >= Duration::from_secs(2), "not before the grace was over");
    assert_eq!(bench.harness().processes(attempt.attempt), Vec::<String>::new());
}

/// The memory limit is told from a program that says 137 by itself, or kills itself.
pub async fn an_oom_kill_is_told_from_an_exit_with_137(bench: &mut Bench) {
    const LIMIT: u64 = 64 * 1024 * 1024;
    let eater = bench.attempt_with(&Program::TakeMemory(4 * LIMIT), |spec| {
        spec.resources.memory_bytes = Some(LIMIT);
    });
    let end = bench.run(&eater).await.end().clone();
    assert_eq!((end.cause, end.status), (Cause::OomKilled, Some(ExitStatus::Signal(SIGNAL_KILL))), "{end:?}");
    let cases = [
        (Program::exit(137), ExitStatus::Code(137)),
        (Program::Signal(SIGNAL_KILL), ExitStatus::Signal(SIGNAL_KILL)),
    ];
    for (program, status) in cases {
        let attempt = bench.attempt_with(&program, |spec| spec.resources.memory_bytes = Some(LIMIT));
        let end = bench.run(&attempt).await.end().clone();
        assert_eq!((end.cause, end.status), (Cause::Exited, Some(status)), "{end:?}");
    }
}

/// A program within its memory limit is not disturbed.
pub async fn memory_below_the_limit_may_be_used(bench: &mut Bench) {
    let attempt = bench.attempt_with(&Program::TakeMemory(16 * 1024 * 1024), |spec| {
        spec.resources.memory_bytes = Some(128 * 1024 * 1024);
    });
    let end = bench.run(&attempt).await.end().clone();
    assert_eq!((end.cause, end.status), (Cause::Exited, Some(ExitStatus::Code(0))), "{end:?}");
}

/// A workload that never was is lost: absence is never success (rule 6).
pub async fn a_workload_that_never_was_is_lost(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::exit(0));
    let observed = bench.observe(&attempt, 0).await;
    let end = observed.end();
    assert_eq!((end.cause, end.status), (Cause::Lost, None));
    assert_eq!((observed.started, observed.end), (0, 0));
    assert!(!end.evidence.is_empty(), "what was looked for is told");
}
