//! Rules 12 and 13: remove and list.

use std::time::Duration;

use crate::backend::{
    bench::{Bench, within},
    program::Program,
};

/// Nothing of the attempt stays on the substrate, whatever became of it.
pub async fn remove_leaves_nothing(bench: &mut Bench) {
    for program in [
        Program::Print { out: "o".into(), err: "e".into(), exit: 1 },
        Program::NotFound,
        Program::DaemonizeAndExit(0),
        Program::Signal(9),
    ] {
        let attempt = bench.attempt(&program);
        bench.run(&attempt).await;
        bench.remove(&attempt).await;
        assert!(bench.listed().await.is_empty(), "{program:?}");
        assert_eq!(bench.harness().leaks(), Vec::<String>::new(), "{program:?}");
        assert_eq!(bench.harness().processes(attempt.attempt), Vec::<String>::new(), "{program:?}");
    }
}

/// Remove is idempotent, also at the same time and after a restart.
pub async fn remove_twice_is_the_same_as_once(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::exit(0));
    bench.run(&attempt).await;
    let shared = &*bench;
    futures::future::join_all((0..4).map(|_| shared.remove(&attempt))).await;
    bench.remove(&attempt).await;
    bench.reopen().await;
    bench.remove(&attempt).await;
    assert!(bench.listed().await.is_empty());
}

/// Of what never was, there is nothing to remove.
pub async fn remove_of_what_never_was_succeeds(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::exit(0));
    bench.remove(&attempt).await;
    assert_eq!(bench.harness().leaks(), Vec::<String>::new());
}

/// It must not be called so; where it is, the workload is stopped first.
pub async fn remove_stops_what_is_alive(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::IgnoreTerm);
    bench.start(&attempt).await;
    bench.remove(&attempt).await;
    assert_eq!(bench.harness().processes(attempt.attempt), Vec::<String>::new());
    assert!(bench.listed().await.is_empty());
}

/// Live and ended workloads; not those that were removed, nor what was never made, nor what is not ours.
pub async fn list_names_what_is_there_and_nothing_else(bench: &mut Bench) {
    bench.harness().plant_foreign();
    assert!(bench.listed().await.is_empty());
    let (live, ended, gone, never) = (
        bench.attempt(&Program::SleepForever),
        bench.attempt(&Program::exit(0)),
        bench.attempt(&Program::exit(0)),
        bench.attempt(&Program::exit(0)),
    );
    bench.start(&live).await;
    bench.run(&ended).await;
    bench.run(&gone).await;
    bench.remove(&gone).await;
    let expected = [live.attempt, ended.attempt].into();
    assert_eq!(bench.listed().await, expected);
    bench.reopen().await;
    assert_eq!(bench.listed().await, expected);
    assert!(!bench.listed().await.contains(&never.attempt));
}

/// Neither verbs nor a restart touch what does not carry our mark.
pub async fn what_is_not_ours_is_left_alone(bench: &mut Bench) {
    bench.harness().plant_foreign();
    let attempt = bench.attempt(&Program::SleepForever);
    bench.start(&attempt).await;
    bench.reopen().await;
    bench.stop(&attempt, Duration::ZERO).await;
    bench.remove(&attempt).await;
    assert!(bench.harness().foreign_is_intact());
}

/// What operators see.
pub async fn the_backend_is_healthy_and_says_what_it_is(bench: &mut Bench) {
    let backend = bench.backend();
    let health = within("health", backend.health()).await.expect("health");
    assert!(health.healthy, "{health:?}");
    assert!(!health.detail.is_empty(), "what was found is told");
    assert!(backend.slots() > 0);
    assert!(!backend.kind().is_empty());
}
