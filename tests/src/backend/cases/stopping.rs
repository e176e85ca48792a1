//! Rules 9 and 10: stop, and what is seen afterwards.

use std::time::Duration;

use runner_core::outcome::{Cause, ExitStatus};

use crate::backend::{
    bench::{Bench, within},
    program::{Program, READY, Then},
};

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_secs(1);
/// Within this, a stop without grace has returned.
const BOUND: Duration = Duration::from_secs(20);

/// SIGTERM ends it at once; the log before is kept.
pub async fn stop_ends_a_program_with_sigterm(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::SleepForever);
    bench.start(&attempt).await;
    let before = bench.now();
    bench.stop(&attempt, LONG).await;
    assert!(bench.now() - before < BOUND, "SIGTERM was enough, the grace is not waited for");
    let observed = bench.observe(&attempt, 0).await;
    let end = observed.end();
    assert_eq!((end.cause, end.status), (Cause::Cancelled, Some(ExitStatus::Signal(15))), "{end:?}");
    assert_eq!(observed.out(), READY);
}

/// A program that handles SIGTERM keeps its exit code, and its last words are in the log.
pub async fn stop_lets_a_program_end_by_itself_within_the_grace(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::HandleTerm(5));
    bench.start(&attempt).await;
    bench.stop(&attempt, LONG).await;
    let observed = bench.observe(&attempt, 0).await;
    let end = observed.end();
    assert_eq!((end.cause, end.status), (Cause::Cancelled, Some(ExitStatus::Code(5))), "{end:?}");
    assert_eq!(observed.out(), "ready\nbye\n");
}

/// What ignores SIGTERM is killed once the grace is over, not before.
pub async fn stop_kills_what_ignores_sigterm_after_the_grace(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::IgnoreTerm);
    bench.start(&attempt).await;
    let before = bench.now();
    bench.stop(&attempt, SHORT).await;
    let took = bench.now() - before;
    assert!(took >= SHORT && took < SHORT + BOUND, "took {took:?}");
    let end = bench.observe(&attempt, 0).await.end().clone();
    assert_eq!((end.cause, end.status), (Cause::Cancelled, Some(ExitStatus::Signal(9))), "{end:?}");
}

/// A process in a session of its own, that no SIGTERM reaches, is dead when stop returns.
pub async fn stop_kills_a_double_forked_daemon(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::Daemonize);
    bench.start(&attempt).await;
    let alive = bench.harness().processes(attempt.attempt);
    assert!(alive.len() >= 2, "the daemon lives: {alive:?}");
    // `Bench::stop` looks for survivors.
    bench.stop(&attempt, SHORT).await;
    assert_eq!(bench.observe(&attempt, 0).await.end().cause, Cause::Cancelled);
}

/// The end of the program is the end of everything that it left behind.
pub async fn a_daemon_does_not_outlive_its_program(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::DaemonizeAndExit(3));
    let end = bench.run(&attempt).await.end().clone();
    assert_eq!((end.cause, end.status), (Cause::Exited, Some(ExitStatus::Code(3))), "{end:?}");
    assert_eq!(bench.harness().processes(attempt.attempt), Vec::<String>::new());
}

/// Of what never was, stop returns at once.
pub async fn stop_before_ensure_returns_at_once(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::SleepForever);
    let before = bench.now();
    bench.stop(&attempt, LONG).await;
    assert!(bench.now() - before < BOUND);
}

/// The program's own exit came first: it stays the outcome.
pub async fn stop_after_the_end_changes_nothing(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::Print { out: "a".into(), err: String::new(), exit: 7 });
    let first = bench.run(&attempt).await;
    let before = bench.now();
    bench.stop(&attempt, LONG).await;
    assert!(bench.now() - before < BOUND);
    assert_eq!(bench.observe(&attempt, 0).await, first);
    assert_eq!((first.end().cause, first.end().status), (Cause::Exited, Some(ExitStatus::Code(7))));
}

/// Stop is idempotent.
pub async fn stop_twice_is_the_same_as_once(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::SleepForever);
    bench.start(&attempt).await;
    bench.stop(&attempt, LONG).await;
    bench.stop(&attempt, Duration::ZERO).await;
    let end = bench.observe(&attempt, 0).await.end().clone();
    assert_eq!((end.cause, end.status), (Cause::Cancelled, Some(ExitStatus::Signal(15))), "{end:?}");
}

/// All of them return, each only when it is dead.
pub async fn concurrent_stops_all_return_when_it_is_dead(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::IgnoreTerm);
    bench.start(&attempt).await;
    let bench = &*bench;
    futures::future::join_all((0..4).map(|_| bench.stop(&attempt, SHORT))).await;
    assert_eq!(bench.observe(&attempt, 0).await.end().status, Some(ExitStatus::Signal(9)));
}

/// A later stop may shorten the grace of an earlier one.
pub async fn a_second_stop_may_shorten_the_grace(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::IgnoreTerm);
    bench.start(&attempt).await;
    let backend = bench.backend();
    let reference = backend.workload_ref(attempt.attempt);
    let before = bench.now();
    let patient = backend.stop(&reference, LONG);
    let impatient = backend.stop(&reference, SHORT);
    let (patient, impatient) = within("stop", futures::future::join(patient, impatient)).await;
    patient.and(impatient).expect("stop");
    assert!(bench.now() - before < LONG, "the shorter grace counts");
}

/// A stop that its caller gave up on is made again.
pub async fn a_stop_that_was_dropped_can_be_repeated(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::IgnoreTerm);
    bench.start(&attempt).await;
    let backend = bench.backend();
    let reference = backend.workload_ref(attempt.attempt);
    let dropped = tokio::time::timeout(Duration::from_millis(50), backend.stop(&reference, LONG)).await;
    assert!(dropped.is_err(), "it ignores SIGTERM, so the stop was still under way");
    bench.stop(&attempt, Duration::ZERO).await;
    assert_eq!(bench.observe(&attempt, 0).await.end().cause, Cause::Cancelled);
}

/// An observer that was there all the time sees the same end.
pub async fn an_observer_sees_the_stop(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::SleepForever);
    bench.start(&attempt).await;
    let bench = &*bench;
    let (observed, ()) = futures::future::join(bench.observe(&attempt, 0), bench.stop(&attempt, LONG)).await;
    assert_eq!(observed.end().cause, Cause::Cancelled);
    assert_eq!(observed.out(), READY);
}

/// Rule 10: outputs that were written so far are stored, and marked as partial.
pub async fn outputs_written_before_a_stop_are_stored(bench: &mut Bench) {
    let files = vec![("/outputs/half".to_owned(), "some bytes".to_owned())];
    let attempt = bench.attempt_with(&Program::Write { files, then: Then::Sleep }, |spec| {
        spec.outputs.push(super::output("/outputs/half", true));
        spec.outputs.push(super::output("/outputs/rest", true));
    });
    bench.start(&attempt).await;
    bench.stop(&attempt, LONG).await;
    let observed = bench.observe(&attempt, 0).await;
    assert_eq!(observed.end().cause, Cause::Cancelled);
    let manifest = observed.published.clone().expect("what was written is published");
    assert_eq!(observed.end().outputs.as_ref(), Some(&manifest));
    assert!(manifest.partial);
    assert_eq!(
        super::contents(bench, &manifest),
        [("/outputs/half".into(), "".into(), b"some bytes".to_vec())]
    );
}
