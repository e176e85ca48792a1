//! Rules 1, 2, 3 and 15: making a workload.

use std::time::Duration;

use runner_core::{
    id::AttemptId,
    outcome::{Cause, ExitStatus},
};

use crate::backend::{
    bench::{Bench, within},
    program::{Program, READY},
};

fn assert_started_once(bench: &Bench, attempt: AttemptId) {
    if let Some(starts) = bench.harness().starts(attempt) {
        assert_eq!(starts, 1, "one workload");
    }
}

/// Twice in turn is once.
pub async fn ensure_twice_makes_one_workload(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::SleepForever);
    bench.start(&attempt).await;
    let alive = bench.harness().processes(attempt.attempt).len();
    bench.ensure(&attempt).await;
    assert_eq!(bench.harness().processes(attempt.attempt).len(), alive);
    assert_eq!(bench.listed().await.len(), 1);
    bench.stop(&attempt, Duration::ZERO).await;
    assert_eq!(bench.observe(&attempt, 0).await.out(), READY, "it was started once");
    assert_started_once(bench, attempt.attempt);
}

/// Many at the same time are one.
pub async fn concurrent_ensures_make_one_workload(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::SleepForever);
    let shared = &*bench;
    futures::future::join_all((0..8).map(|_| shared.ensure(&attempt))).await;
    bench.observe_text(&attempt, READY).await;
    assert_eq!(bench.listed().await.len(), 1);
    bench.stop(&attempt, Duration::ZERO).await;
    assert_eq!(bench.observe(&attempt, 0).await.out(), READY, "it was started once");
    assert_started_once(bench, attempt.attempt);
}

/// What has ended is not started again.
pub async fn ensure_after_the_end_starts_nothing(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::Print { out: "once\n".into(), err: String::new(), exit: 7 });
    let first = bench.run(&attempt).await;
    bench.ensure(&attempt).await;
    assert_eq!(bench.observe(&attempt, 0).await, first);
    assert_started_once(bench, attempt.attempt);
}

/// Rule 3: the name comes from the attempt alone, and no two attempts share one.
pub async fn the_name_is_derived_from_the_attempt(bench: &mut Bench) {
    let (one, other) = (bench.attempt(&Program::exit(0)), bench.attempt(&Program::exit(0)));
    let second = bench.next_attempt(&one);
    let names = |bench: &Bench| {
        let backend = bench.backend();
        [&one, &other, &second].map(|attempt| backend.workload_ref(attempt.attempt))
    };
    let before = names(bench);
    assert_eq!(before, names(bench));
    assert!(before[0] != before[1] && before[0] != before[2] && before[1] != before[2]);
    bench.reopen().await;
    assert_eq!(before, names(bench));
}

/// Two attempts of one run have their own logs and outcomes.
pub async fn attempts_of_one_run_are_separate(bench: &mut Bench) {
    let first = bench.attempt(&Program::Print { out: "one".into(), err: String::new(), exit: 1 });
    let second = bench.next_attempt(&first);
    let one = bench.run(&first).await;
    bench.remove(&first).await;
    let two = bench.run(&second).await;
    assert_eq!((one.out(), two.out()), ("one".to_owned(), "one".to_owned()));
    assert_eq!(two.end().status, Some(ExitStatus::Code(1)));
}

/// Rule 2: what a dropped `ensure` left behind is found by `list` and removed by `remove`.
pub async fn a_dropped_ensure_is_found_and_removed(bench: &mut Bench) {
    let attempt = super::with_object_input(bench, &Program::Cat("/inputs/x".into()), b"bytes");
    super::drop_ensure_while_staging(bench, &attempt).await;
    assert_eq!(bench.listed().await.into_iter().collect::<Vec<_>>(), [attempt.attempt], "list finds it");
    bench.stop(&attempt, Duration::ZERO).await;
    bench.remove(&attempt).await;
    assert!(bench.listed().await.is_empty());
    let leaks = bench.harness().leaks();
    assert!(leaks.is_empty(), "{leaks:?}");
}

/// Rule 2: a dropped `ensure` can be made again, and then all is as if it had never been dropped.
pub async fn a_dropped_ensure_can_be_repeated(bench: &mut Bench) {
    let attempt = super::with_object_input(bench, &Program::Cat("/inputs/x".into()), b"bytes");
    super::drop_ensure_while_staging(bench, &attempt).await;
    bench.store.open_gate();
    let observed = bench.run(&attempt).await;
    assert_eq!((observed.out().as_str(), observed.end().status), ("bytes", Some(ExitStatus::Code(0))));
    assert_started_once(bench, attempt.attempt);
}

/// Rule 2, at whatever moment: drops `ensure` after ever longer times; there never is more than one workload, and nothing
/// is left.
pub async fn ensure_may_be_dropped_at_any_moment(bench: &mut Bench) {
    for micros in [0, 50, 200, 1_000, 3_000, 10_000, 30_000] {
        let attempt = super::with_object_input(bench, &Program::Cat("/inputs/x".into()), b"bytes");
        let backend = bench.backend();
        let _ = tokio::time::timeout(Duration::from_micros(micros), backend.ensure(&attempt)).await;
        let observed = bench.run(&attempt).await;
        assert_eq!((observed.out().as_str(), observed.end().status), ("bytes", Some(ExitStatus::Code(0))));
        assert_started_once(bench, attempt.attempt);
        bench.remove(&attempt).await;
    }
}

/// Rule 15: while one workload's inputs do not come, another runs from beginning to end.
pub async fn no_workload_waits_for_another(bench: &mut Bench) {
    let slow = super::with_object_input(bench, &Program::Cat("/inputs/x".into()), b"bytes");
    let quick = bench.attempt(&Program::exit(7));
    bench.store.close_gate();
    let backend = bench.backend();
    let shared = &*bench;
    let meanwhile = async {
        within("reach the gate", shared.store.wait_for_waiting(1)).await;
        assert_eq!(shared.run(&quick).await.end().status, Some(ExitStatus::Code(7)));
        shared.stop(&quick, Duration::ZERO).await;
        shared.listed().await;
        shared.remove(&quick).await;
        shared.store.open_gate();
    };
    let (made, ()) = within("both", futures::future::join(backend.ensure(&slow), meanwhile)).await;
    made.expect("ensure");
    assert_eq!(bench.observe(&slow, 0).await.end().cause, Cause::Exited);
}
