//! Standard input, terminals and the control socket.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    time::Duration,
};

use bytes::Bytes;
use runner_agent::exec::{
    client::{self, ControlError},
    protocol::{ControlReply, ControlRequest, ExitReason},
};
use runner_core::{log::LogStream, outcome::ExitStatus, spec::TerminalSize};

use crate::harness::{DEADLINE, Running, run, shell, spec};

fn ask(running: &Running, request: &ControlRequest) -> ControlReply {
    client::control(running.dir(), request, DEADLINE).unwrap()
}

fn input(text: &[u8]) -> ControlRequest {
    ControlRequest::Stdin(Bytes::copy_from_slice(text))
}

fn terminal(script: &str, stdin: bool) -> Running {
    let mut spec = shell(script);
    spec.terminal = Some(TerminalSize { columns: 97, rows: 31 });
    spec.stdin = stdin;
    Running::start(spec)
}

#[test]
fn standard_input_is_empty_unless_it_is_asked_for() {
    let done = run(shell("wc -c; readlink /proc/self/fd/0"));
    assert_eq!(done.stdout(), "0\n/dev/null\n");
    let running = Running::start(shell("sleep 0.5"));
    running.wait_for_start();
    assert!(matches!(ask(&running, &input(b"x")), ControlReply::Refused(_)));
    assert!(matches!(ask(&running, &ControlRequest::Eof), ControlReply::Refused(_)));
    assert!(matches!(
        ask(&running, &ControlRequest::Resize(TerminalSize::default())),
        ControlReply::Refused(_)
    ));
    running.finish();
}

#[test]
fn standard_input_arrives_exactly_and_ends_when_it_is_told_to() {
    let mut spec = spec(&["cat"]);
    spec.stdin = true;
    let running = Running::start(spec);
    running.wait_for_start();
    let mut sent = Vec::new();
    for round in 0..40_u8 {
        let chunk: Vec<u8> =
            (0..client::MAX_STDIN_BYTES).map(|at| (at as u8).wrapping_mul(7) ^ round).collect();
        assert_eq!(ask(&running, &input(&chunk)), ControlReply::Ok);
        sent.extend(chunk);
    }
    assert_eq!(ask(&running, &ControlRequest::Eof), ControlReply::Ok);
    let done = running.finish();
    assert_eq!(done.exit.status, Some(ExitStatus::Code(0)));
    assert!(done.bytes(LogStream::Stdout) == sent);
}

#[test]
fn input_that_is_not_read_is_not_acknowledged_and_blocks_nothing_else() {
    let mut spec = spec(&["sleep", "1000"]);
    spec.stdin = true;
    let running = Running::start(spec);
    running.wait_for_start();
    // The pipe takes 64 KiB; what is more must wait.
    let chunk = vec![b'x'; client::MAX_STDIN_BYTES];
    let mut answers = Vec::new();
    for _ in 0..3 {
        answers.push(client::control(running.dir(), &input(&chunk), Duration::from_millis(300)));
    }
    assert!(matches!(answers[0], Ok(ControlReply::Ok)), "{answers:?}");
    assert!(matches!(answers.last(), Some(Err(ControlError::Deadline(_)))), "{answers:?}");
    assert_eq!(ask(&running, &ControlRequest::Stop { grace_ms: 5000 }), ControlReply::Ok);
    assert_eq!(running.finish().exit.reason, ExitReason::Stopped);
}

#[test]
fn input_for_a_program_that_closed_it_is_refused() {
    let mut spec = shell("exec 0<&-; echo closed; sleep 1000");
    spec.stdin = true;
    let running = Running::start(spec);
    running.wait_for_output("closed");
    // The first process lets go of its own end of the pipe a moment after the program was executed.
    crate::harness::wait_for("a refusal", || matches!(ask(&running, &input(b"x")), ControlReply::Refused(_)));
    ask(&running, &ControlRequest::Stop { grace_ms: 100 });
    running.finish();
}

#[test]
fn a_terminal_has_its_size_and_is_the_controlling_one() {
    let running = terminal(
        "stty size; tty; tty < /dev/tty; ls -l $(tty) | cut -c1-10; [ -t 1 ] && [ -t 2 ] && exit 4",
        true,
    );
    let done = running.finish();
    let text = String::from_utf8(done.bytes(LogStream::Terminal)).unwrap();
    assert!(
        text.starts_with("31 97\r\n/dev/pts/0\r\n/dev/tty\r\n") || text.starts_with("31 97\r\n/dev/pts/"),
        "{text:?}"
    );
    assert_eq!(done.exit.status, Some(ExitStatus::Code(4)), "{text:?} {}", done.evidence());
    assert!(done.bytes(LogStream::Stdout).is_empty() && done.bytes(LogStream::Stderr).is_empty());
}

#[test]
fn a_terminal_echoes_resizes_and_ends_its_input() {
    let running = terminal("echo ready; while read line; do echo got $line; stty size; done; echo end", true);
    running.wait_for_output("ready");
    assert_eq!(ask(&running, &input(b"hello\n")), ControlReply::Ok);
    running.wait_for_output("got hello\r\n31 97");
    assert_eq!(
        ask(&running, &ControlRequest::Resize(TerminalSize { columns: 50, rows: 20 })),
        ControlReply::Ok
    );
    assert_eq!(ask(&running, &input(b"again\n")), ControlReply::Ok);
    running.wait_for_output("got again\r\n20 50");
    assert_eq!(ask(&running, &ControlRequest::Eof), ControlReply::Ok);
    let done = running.finish();
    let text = String::from_utf8(done.bytes(LogStream::Terminal)).unwrap();
    assert!(text.contains("hello\r\n") && text.ends_with("end\r\n"), "{text:?}");
    assert_eq!(done.exit.status, Some(ExitStatus::Code(0)));
}

#[test]
fn control_c_in_a_terminal_is_a_signal_to_the_program() {
    // Not by way of a shell, which catches it for itself.
    let mut spec = spec(&["cat"]);
    spec.terminal = Some(TerminalSize::default());
    spec.stdin = true;
    let running = Running::start(spec);
    running.wait_for_start();
    assert_eq!(ask(&running, &input(b"typed\n")), ControlReply::Ok);
    running.wait_for_output("typed\r\ntyped\r\n");
    assert_eq!(ask(&running, &input(b"\x03")), ControlReply::Ok);
    let done = running.finish();
    assert_eq!((done.exit.reason, done.exit.status), (ExitReason::Exited, Some(ExitStatus::Signal(2))));
}

#[test]
fn a_terminal_without_input_reads_as_empty() {
    let done = terminal("wc -c", false).finish();
    assert_eq!(done.bytes(LogStream::Terminal), b"0\r\n");
}

#[test]
fn what_a_terminal_shows_at_the_very_end_is_not_lost() {
    let done = terminal("head -c 300000 /dev/zero | tr '\\0' x; printf last", true).finish();
    let text = done.bytes(LogStream::Terminal);
    assert_eq!(text.len(), 300_004);
    assert!(text.ends_with(b"xlast"));
}

#[test]
fn malformed_and_endless_lines_are_refused_and_the_run_goes_on() {
    let running = Running::start(shell("sleep 1000"));
    running.wait_for_start();
    let path = running.dir().join("ctl");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let mut socket = UnixStream::connect(&path).unwrap();
    socket.write_all(b"nonsense\n{\"stop\":{}}\n\xff\n").unwrap();
    let mut answers = BufReader::new(socket.try_clone().unwrap()).lines();
    for _ in 0..3 {
        let reply: ControlReply = serde_json::from_str(&answers.next().unwrap().unwrap()).unwrap();
        assert!(matches!(reply, ControlReply::Refused(_)));
    }
    // A line without an end: refused, and the connection closed.
    let mut endless = UnixStream::connect(&path).unwrap();
    let _ = endless.write_all(&vec![b'x'; client::MAX_CONTROL_LINE + 1]);
    let line = BufReader::new(endless).lines().next();
    assert!(line.is_none_or(|line| line.is_err() || line.is_ok_and(|line| line.contains("too long"))));
    // Silent connections take the places, and are not kept for ever in the way of those that come after they leave.
    let silent: Vec<_> = (0..20).filter_map(|_| UnixStream::connect(&path).ok()).collect();
    drop((silent, socket, answers));
    crate::harness::wait_for("a served request", || {
        client::control(running.dir(), &ControlRequest::Stop { grace_ms: 1000 }, DEADLINE)
            .is_ok_and(|reply| reply == ControlReply::Ok)
    });
    let dir = running.dir().to_owned();
    crate::harness::wait_for("the end", || client::exit(&dir).unwrap().is_some());
    assert!(matches!(
        client::control(&dir, &ControlRequest::Stop { grace_ms: 1000 }, DEADLINE),
        Err(ControlError::Gone)
    ));
    assert_eq!(running.finish().exit.reason, ExitReason::Stopped);
}
