//! Standard input and terminals.

use std::time::Duration;

use bytes::Bytes;
use runner_core::{
    backend::{BackendErrorKind, WorkloadInput},
    log::LogStream,
    outcome::{Cause, ExitStatus},
    spec::TerminalSize,
};

use crate::backend::{
    bench::{Bench, within},
    program::Program,
};

/// Without `stdin` in the spec, a program that reads finds the end at once.
pub async fn standard_input_is_empty_unless_asked_for(bench: &mut Bench) {
    // Where it would wait for input, its timeout would end it.
    let attempt =
        bench.attempt_with(&Program::EchoStdin, |spec| spec.timeout = Some(Duration::from_secs(30)));
    let end = bench.run(&attempt).await.end().clone();
    assert_eq!((end.cause, end.status), (Cause::Exited, Some(ExitStatus::Code(0))), "{end:?}");
}

/// Every byte, in order, more than a pipe holds; then the end.
pub async fn standard_input_arrives_in_order_until_its_end(bench: &mut Bench) {
    let attempt = bench.attempt_with(&Program::EchoStdin, |spec| spec.stdin = true);
    bench.ensure(&attempt).await;
    let backend = bench.backend();
    let reference = backend.workload_ref(attempt.attempt);
    let pieces: Vec<Bytes> = (0..20u8).map(|number| Bytes::from(vec![number; 20_000])).collect();
    for piece in &pieces {
        let sent = backend.input(&reference, WorkloadInput::Stdin(piece.clone()));
        within("input", sent).await.expect("input");
    }
    within("input", backend.input(&reference, WorkloadInput::Eof)).await.expect("end of input");
    let observed = bench.observe(&attempt, 0).await;
    assert!(observed.stream(LogStream::Stdout) == pieces.concat(), "the bytes differ");
    assert_eq!(observed.end().status, Some(ExitStatus::Code(0)));
}

/// A workload that did not ask for input, one that has ended, one that never was.
pub async fn input_is_refused_where_nobody_takes_it(bench: &mut Bench) {
    let deaf = bench.attempt(&Program::SleepForever);
    bench.start(&deaf).await;
    let ended = bench.attempt_with(&Program::exit(0), |spec| spec.stdin = true);
    bench.run(&ended).await;
    let never = bench.attempt_with(&Program::EchoStdin, |spec| spec.stdin = true);
    let backend = bench.backend();
    for (attempt, kinds) in [
        (&deaf, &[BackendErrorKind::NotAttachable][..]),
        (&ended, &[BackendErrorKind::NotAttachable]),
        (&never, &[BackendErrorKind::NotFound, BackendErrorKind::NotAttachable]),
    ] {
        let reference = backend.workload_ref(attempt.attempt);
        let sent = backend.input(&reference, WorkloadInput::Stdin(Bytes::from_static(b"x")));
        let error = within("input", sent).await.expect_err("nobody takes it");
        assert!(kinds.contains(&error.kind), "{:?}: {}", error.kind, error.chain());
    }
}

/// One stream, the size that the spec gave, then the one that it was changed to.
pub async fn a_terminal_is_one_stream_with_a_size_that_changes(bench: &mut Bench) {
    let attempt = bench.attempt_with(&Program::TerminalSize, |spec| {
        spec.terminal = Some(TerminalSize { columns: 91, rows: 33 });
    });
    bench.ensure(&attempt).await;
    bench.observe_text(&attempt, "33 91").await;
    let backend = bench.backend();
    let reference = backend.workload_ref(attempt.attempt);
    let resized = backend.input(&reference, WorkloadInput::Resize(TerminalSize { columns: 120, rows: 50 }));
    within("input", resized).await.expect("resize");
    let observed = bench.observe(&attempt, 0).await;
    assert_eq!(observed.terminal().replace('\r', ""), "33 91\n50 120\n");
    assert_eq!((observed.out(), observed.err()), (String::new(), String::new()), "there is one stream");
    assert_eq!(observed.end().status, Some(ExitStatus::Code(0)));
}
