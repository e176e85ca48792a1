//! Rules 4, 5 and 11: the log.

use std::time::Duration;

use runner_core::{
    fake::backend::Flood,
    log::LogStream,
    outcome::{Cause, ExitStatus},
};

use crate::backend::{
    bench::Bench,
    observed::{Observed, Stretch},
    program::{Program, READY},
};

const MIB: u64 = 1024 * 1024;

fn flood(bytes: u64, binary: bool) -> Vec<u8> {
    Flood::new(binary).take(usize::try_from(bytes).expect("it fits into memory"))
}

/// Not `assert_eq`: nobody reads 64 MiB of a failed comparison.
fn assert_same(got: &[u8], expected: &[u8]) {
    let differs = got.iter().zip(expected).position(|(a, b)| a != b);
    assert!(
        got.len() == expected.len() && differs.is_none(),
        "{} bytes, not {}; the first difference is at {differs:?}",
        got.len(),
        expected.len()
    );
}

fn assert_exited_0(observed: &Observed) {
    let end = observed.end();
    assert_eq!((end.cause, end.status), (Cause::Exited, Some(ExitStatus::Code(0))), "{end:?}");
}

/// Each stream's bytes are told as that stream's, verbatim.
pub async fn both_streams_are_exact_and_apart(bench: &mut Bench) {
    let program = Program::Print { out: "out ü\n\tlast".into(), err: "err\r\n\n".into(), exit: 7 };
    let observed = bench.run(&bench.attempt(&program)).await;
    assert_eq!((observed.out().as_str(), observed.err().as_str()), ("out ü\n\tlast", "err\r\n\n"));
    assert_eq!(observed.end, "out ü\n\tlasterr\r\n\n".len() as u64);
    assert_eq!(observed.end().usage.log_bytes, observed.end, "usage tells the log's size");
}

/// Nothing printed, nothing told.
pub async fn a_program_that_prints_nothing_has_an_empty_log(bench: &mut Bench) {
    let observed = bench.run(&bench.attempt(&Program::exit(0))).await;
    assert_eq!((observed.log.len(), observed.end), (0, 0));
    assert_exited_0(&observed);
}

/// From the beginning, the middle of a frame, the end: exactly the rest.
pub async fn an_observation_may_begin_at_every_offset(bench: &mut Bench) {
    let program = Program::Print { out: "0123456789".into(), err: "abcdefghij".into(), exit: 0 };
    let attempt = bench.attempt(&program);
    let whole = bench.run(&attempt).await;
    assert_eq!(whole.end, 20);
    for cursor in 0..=20 {
        let rest = bench.observe(&attempt, cursor).await;
        assert_eq!(rest.log, whole.log_from(cursor), "from {cursor}");
        assert_eq!((rest.started, rest.end, &rest.ended), (1, 20, &whole.ended), "from {cursor}");
    }
}

/// While it runs and afterwards.
pub async fn two_observers_see_the_same(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::Count { count: 50, pause: 5 });
    bench.ensure(&attempt).await;
    let shared = &*bench;
    let (one, other) = futures::future::join(shared.observe(&attempt, 0), shared.observe(&attempt, 0)).await;
    let expected: String = (0..50).map(|number| format!("{number}\n")).collect();
    assert_eq!(one.out(), expected);
    assert_eq!(one, other);
    assert_eq!(one, shared.observe(&attempt, 0).await);
}

/// The log is followed live: what a program printed is seen before it ends.
pub async fn frames_come_while_the_program_runs(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::SleepForever);
    let observed = bench.start(&attempt).await;
    assert_eq!((observed.out().as_str(), observed.exited), (READY, 0));
    assert!(!bench.harness().processes(attempt.attempt).is_empty(), "it is alive");
}

/// An observation that is dropped in the middle changes nothing for those that follow.
pub async fn an_observer_that_goes_away_disturbs_nobody(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::Flood { stream: LogStream::Stdout, bytes: 4 * MIB, binary: false });
    bench.ensure(&attempt).await;
    for _ in 0..3 {
        bench.observe_until(&attempt, 0, |observed| observed.end > 0).await;
    }
    let observed = bench.observe(&attempt, 0).await;
    assert_same(&observed.stream(LogStream::Stdout), &flood(4 * MIB, false));
}

/// NUL, bytes that are not UTF-8, no newline in 64 MiB.
pub async fn a_binary_log_of_64_mib_is_exact(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::Flood { stream: LogStream::Stdout, bytes: 64 * MIB, binary: true });
    let observed = bench.run(&attempt).await;
    assert_same(&observed.stream(LogStream::Stdout), &flood(64 * MIB, true));
    assert_exited_0(&observed);
    let rest = bench.observe(&attempt, 64 * MIB - 10).await;
    assert_same(&rest.stream(LogStream::Stdout), &flood(64 * MIB, true)[(64 * 1024 * 1024) - 10..]);
}

/// The other stream.
pub async fn a_line_of_64_mib_on_stderr_is_exact(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::Flood { stream: LogStream::Stderr, bytes: 64 * MIB, binary: true });
    let observed = bench.run(&attempt).await;
    assert_same(&observed.stream(LogStream::Stderr), &flood(64 * MIB, true));
    assert_eq!(observed.stream(LogStream::Stdout), b"");
    assert_exited_0(&observed);
}

/// However the two are interleaved, each is in order and whole.
pub async fn two_streams_at_once_are_each_exact(bench: &mut Bench) {
    let observed = bench.run(&bench.attempt(&Program::FloodBoth { bytes: 8 * MIB })).await;
    assert_same(&observed.stream(LogStream::Stdout), &flood(8 * MIB, false));
    assert_same(&observed.stream(LogStream::Stderr), &flood(8 * MIB, false));
    assert_eq!(observed.end, 16 * MIB);
}

/// Above the limit, every byte is either delivered or counted, and the program is not disturbed.
pub async fn beyond_the_limit_bytes_are_dropped_and_counted(bench: &mut Bench) {
    let program = Program::Flood { stream: LogStream::Stdout, bytes: 3 * MIB, binary: false };
    let mut attempt = bench.attempt(&program);
    attempt.log_limit_bytes = MIB;
    let observed = bench.run(&attempt).await;
    assert_exited_0(&observed);
    assert_same(&observed.stream(LogStream::Stdout), &flood(MIB, false));
    assert_eq!((observed.dropped(), observed.end), (2 * MIB, 3 * MIB));
    assert!(matches!(observed.log.last(), Some(Stretch::Dropped(_))));
    let rest = bench.observe(&attempt, 2 * MIB).await;
    assert_eq!(rest.log, [Stretch::Dropped(MIB)], "a cursor within what was dropped");
}

/// The smallest limit.
pub async fn a_limit_of_nothing_drops_all_and_counts_it(bench: &mut Bench) {
    let mut attempt = bench.attempt(&Program::Print { out: "12345".into(), err: String::new(), exit: 0 });
    attempt.log_limit_bytes = 0;
    let observed = bench.run(&attempt).await;
    assert_eq!(observed.log, [Stretch::Dropped(5)]);
}

/// Rule 11: what comes after a released offset stays until `remove`, through a restart too.
pub async fn what_was_not_released_is_kept(bench: &mut Bench) {
    const RELEASED: u64 = 20 * MIB + 5;
    let attempt =
        bench.attempt(&Program::Flood { stream: LogStream::Stdout, bytes: 24 * MIB, binary: false });
    let whole = bench.run(&attempt).await;
    for _ in 0..2 {
        let backend = bench.backend();
        let reference = backend.workload_ref(attempt.attempt);
        backend.release(&reference, MIB).await.expect("release");
        backend.release(&reference, RELEASED).await.expect("release");
        backend.release(&reference, MIB).await.expect("release of what is released");
        drop(backend);
        let rest = bench.observe(&attempt, RELEASED).await;
        let start = usize::try_from(RELEASED).expect("it fits into memory");
        assert_same(&rest.stream(LogStream::Stdout), &flood(24 * MIB, false)[start..]);
        assert_eq!(rest.ended, whole.ended);
        bench.reopen().await;
    }
    bench.stop(&attempt, Duration::ZERO).await;
}
