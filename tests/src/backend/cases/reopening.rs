//! Rule 14: after the backend was dropped and made anew, everything holds for what was made before.

use std::time::Duration;

use bytes::Bytes;
use runner_core::{
    backend::WorkloadInput,
    fake::backend::Flood,
    id::AttemptId,
    log::LogStream,
    outcome::{Cause, ExitStatus},
};

use super::{contents, drop_ensure_while_staging, output, with_object_input};
use crate::backend::{
    bench::{Bench, within},
    program::{Program, READY, Then},
};

fn numbers(count: u32) -> String {
    (0..count).map(|number| format!("{number}\n")).collect()
}

/// The live processes, without what may change of one: its state and its command line.
fn names(bench: &Bench, attempt: AttemptId) -> Vec<String> {
    let name = |text: String| text.split(" (").next().unwrap_or_default().to_owned();
    bench.harness().processes(attempt).into_iter().map(name).collect()
}

/// The restart came while inputs were staged: `list` knows of it, and `ensure` goes on with it.
pub async fn reopen_while_preparing(bench: &mut Bench) {
    let attempt = with_object_input(bench, &Program::Cat("/inputs/x".into()), b"bytes");
    drop_ensure_while_staging(bench, &attempt).await;
    bench.reopen().await;
    bench.store.open_gate();
    assert!(bench.listed().await.contains(&attempt.attempt));
    let observed = bench.run(&attempt).await;
    assert_eq!((observed.out().as_str(), observed.end().status), ("bytes", Some(ExitStatus::Code(0))));
    assert_ne!(bench.harness().starts(attempt.attempt), Some(2));
}

/// The program runs on while nobody is there, and is adopted.
pub async fn reopen_while_running(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::SleepForever);
    bench.start(&attempt).await;
    let alive = names(bench, attempt.attempt);
    assert_eq!(alive.len(), 1);
    bench.reopen().await;
    assert_eq!(names(bench, attempt.attempt), alive, "it lives on");
    assert!(bench.listed().await.contains(&attempt.attempt));
    bench.ensure(&attempt).await;
    assert_eq!(names(bench, attempt.attempt), alive, "it was adopted, not started again");
    let observed = bench.observe_text(&attempt, READY).await;
    assert_eq!((observed.started, observed.exited), (1, 0));
    bench.stop(&attempt, Duration::ZERO).await;
    assert_eq!(bench.observe(&attempt, 0).await.out(), READY, "it was started once");
}

/// What one observation saw before the restart and another after it is the whole log, without a gap or a repeat.
pub async fn reopen_in_the_middle_of_a_log(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::Count { count: 100, pause: 10 });
    bench.ensure(&attempt).await;
    let mut all = String::new();
    let mut cursor = 0;
    for _ in 0..3 {
        let part = bench.observe_until(&attempt, cursor, |part| part.end > cursor + 20).await;
        all.push_str(&part.out());
        cursor = part.end;
        bench.reopen().await;
    }
    let rest = bench.observe(&attempt, cursor).await;
    all.push_str(&rest.out());
    assert_eq!(all, numbers(100));
    let whole = bench.observe(&attempt, 0).await;
    assert_eq!((whole.out(), whole.ended), (all, rest.ended));
}

/// The program ended while nobody was there.
pub async fn reopen_after_the_exit(bench: &mut Bench) {
    const BYTES: usize = 4 * 1024 * 1024;
    let attempt =
        bench.attempt(&Program::Flood { stream: LogStream::Stdout, bytes: BYTES as u64, binary: true });
    bench.ensure(&attempt).await;
    bench.observe_until(&attempt, 0, |observed| observed.exited == 1).await;
    bench.reopen().await;
    bench.ensure(&attempt).await;
    let observed = bench.observe(&attempt, 0).await;
    assert!(observed.stream(LogStream::Stdout) == Flood::new(true).take(BYTES), "the bytes differ");
    assert_eq!((observed.end().cause, observed.end().status), (Cause::Exited, Some(ExitStatus::Code(0))));
    assert_ne!(bench.harness().starts(attempt.attempt), Some(2));
}

/// All was seen, nothing was removed: it is seen again.
pub async fn reopen_before_remove(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::Print { out: "out".into(), err: "err".into(), exit: 7 });
    let first = bench.run(&attempt).await;
    bench.reopen().await;
    let again = bench.observe(&attempt, 0).await;
    assert_eq!((again.out(), again.err(), &again.ended), (first.out(), first.err(), &first.ended));
    bench.remove(&attempt).await;
    assert!(bench.listed().await.is_empty());
    assert_eq!(bench.harness().leaks(), Vec::<String>::new());
}

/// The restart came between the program's end and its outputs.
pub async fn reopen_before_publishing(bench: &mut Bench) {
    let files = vec![("/outputs/x".to_owned(), "bytes".to_owned())];
    let attempt = bench.attempt_with(&Program::Write { files, then: Then::Exit(0) }, |spec| {
        spec.outputs.push(output("/outputs/x", true));
    });
    bench.ensure(&attempt).await;
    bench.observe_until(&attempt, 0, |observed| observed.exited == 1).await;
    bench.reopen().await;
    let observed = bench.observe(&attempt, 0).await;
    assert_eq!((observed.end().cause, observed.end().status), (Cause::Exited, Some(ExitStatus::Code(0))));
    let manifest = observed.published.clone().expect("outputs are published");
    assert_eq!(contents(bench, &manifest), [("/outputs/x".into(), "".into(), b"bytes".to_vec())]);
}

/// What the backend before made is stopped by the one after.
pub async fn reopen_then_stop(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::HandleTerm(5));
    bench.start(&attempt).await;
    bench.reopen().await;
    bench.stop(&attempt, Duration::from_secs(60)).await;
    let end = bench.observe(&attempt, 0).await.end().clone();
    assert_eq!((end.cause, end.status), (Cause::Cancelled, Some(ExitStatus::Code(5))), "{end:?}");
}

/// Its double-forked processes too.
pub async fn reopen_then_stop_a_daemon(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::Daemonize);
    bench.start(&attempt).await;
    bench.reopen().await;
    bench.stop(&attempt, Duration::from_secs(1)).await;
    assert_eq!(bench.observe(&attempt, 0).await.end().cause, Cause::Cancelled);
}

/// Standard input stays open over a restart.
pub async fn reopen_then_send_input(bench: &mut Bench) {
    let attempt = bench.attempt_with(&Program::EchoStdin, |spec| spec.stdin = true);
    bench.ensure(&attempt).await;
    for (i, text) in ["before\n", "after\n"].into_iter().enumerate() {
        if i == 1 {
            bench.reopen().await;
        }
        let backend = bench.backend();
        let reference = backend.workload_ref(attempt.attempt);
        let sent = backend.input(&reference, WorkloadInput::Stdin(Bytes::from_static(text.as_bytes())));
        within("input", sent).await.expect("input");
        drop(backend);
        bench.observe_text(&attempt, text).await;
    }
    let backend = bench.backend();
    let reference = backend.workload_ref(attempt.attempt);
    within("input", backend.input(&reference, WorkloadInput::Eof)).await.expect("end of input");
    drop(backend);
    assert_eq!(bench.observe(&attempt, 0).await.out(), "before\nafter\n");
}

/// The reconciler destroys what nobody claims.
pub async fn reopen_then_remove_what_runs(bench: &mut Bench) {
    let attempt = bench.attempt(&Program::IgnoreTerm);
    bench.start(&attempt).await;
    bench.reopen().await;
    bench.remove(&attempt).await;
    assert_eq!(bench.harness().processes(attempt.attempt), Vec::<String>::new());
    assert_eq!(bench.harness().leaks(), Vec::<String>::new());
}
