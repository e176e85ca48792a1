//! `runnerctl` against a real service: what a person at a terminal and a script rely on.

mod support;

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::fs::PermissionsExt as _,
    process::{Child, Output, Stdio},
    time::Duration,
};

use nix::sys::signal::Signal;
use runner_tests::service::Service;
use serde_json::Value;
use support::{
    ctl::{command, ctl, json, ok, text},
    start, until,
};

const DEADLINE: Duration = Duration::from_secs(60);

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

fn state(service: &Service, id: &str) -> String {
    json(service, &["get", id, "--output", "json"])["state"].as_str().expect("a state").to_owned()
}

/// A run that goes on until it is ended, and has begun.
fn sleeper(service: &Service) -> String {
    let id = ok(service, &["run", "--detach", "--", "sleep", "600"]).trim().to_owned();
    until("the run to be running", DEADLINE, || state(service, &id) == "RUNNING");
    id
}

/// Whether a child has ended, without waiting for it.
fn wait(mut child: Child) -> Output {
    until("runnerctl to end", DEADLINE, || child.try_wait().expect("wait").is_some());
    child.wait_with_output().expect("output")
}

#[test]
fn the_streams_are_apart_and_exact_and_the_exit_status_is_the_programs() {
    let service = start();
    let output = ctl(&service, &["run", "--", "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(
        (text(&output.stdout), text(&output.stderr)),
        ("out\n".into(), "err\n".into()),
        "{}",
        service.log()
    );
    assert_eq!(output.status.code(), Some(7));

    let output = ctl(&service, &["run", "--", "printf", r"\377\000no newline"]);
    assert_eq!((output.stdout.as_slice(), output.status.code()), (&b"\xff\0no newline"[..], Some(0)));

    let output = ctl(&service, &["run", "--", "sh", "-c", "kill -9 $$"]);
    assert_eq!(output.status.code(), Some(137));
    let output = ctl(&service, &["run", "--", "sh", "-c", "exit 137"]);
    assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(137), ""));
}

#[test]
fn a_program_that_cannot_be_run_is_125_with_the_reason() {
    let service = start();
    let output = ctl(&service, &["run", "--output", "/outputs/never:/dev/null", "--", "true"]);
    assert_eq!(output.status.code(), Some(125), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("OUTPUT"), "{}", text(&output.stderr));
}

#[test]
fn bad_fields_are_named_by_their_flags() {
    let service = start();
    let args = ["run", "--backend", "nowhere", "--output", "/outputs/../x:y", "--", "true"];
    let output = ctl(&service, &args);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.lines().any(|line| line.trim().starts_with("--output number 1:")), "{said}");
    let output = ctl(&service, &["run", "--backend", "nowhere", "--", "true"]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("--backend:"), "{said}");
    assert_eq!(ctl(&service, &["run", "--memory", "lots", "--", "true"]).status.code(), Some(2));
    assert_eq!(ctl(&service, &["get", "not-an-id"]).status.code(), Some(2));
    let output = ctl(&service, &["get", "00000000-0000-7000-8000-000000000001"]);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn nobody_at_the_endpoint_says_how_to_start_a_service() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let endpoint = format!("http://{}", listener.local_addr().expect("address"));
    drop(listener);
    let output = command(&endpoint, &["list"]).output().expect("runnerctl");
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said.contains(&endpoint) && said.contains("runner serve") && said.contains("RUNNER_ENDPOINT"),
        "{said}"
    );
    assert!(output.stdout.is_empty());
    let output = command(&endpoint, &["run", "--", "true"]).output().expect("runnerctl");
    assert_eq!(output.status.code(), Some(125), "no program ended with 1");
}

#[test]
fn a_detached_run_is_followed_later_and_again() {
    let service = start();
    let program = "for i in 1 2 3; do echo $i; echo e$i >&2; sleep 0.2; done";
    let id =
        ok(&service, &["run", "--detach", "--label", "who=cli", "--", "sh", "-c", program]).trim().to_owned();
    assert_eq!(id.len(), 36, "{id}");
    let live = ctl(&service, &["logs", "-f", &id]);
    assert_eq!((text(&live.stdout), text(&live.stderr)), ("1\n2\n3\n".into(), "e1\ne2\ne3\n".into()));
    let again = ctl(&service, &["logs", &id]);
    assert_eq!((again.stdout, again.stderr), (live.stdout, live.stderr));

    // From a cursor in the middle: the rest, and nothing twice.
    let events = lines(&ok(&service, &["logs", &id, "--output", "json"]));
    assert!(events.len() >= 6, "{events:?}");
    let cursor = events[2]["cursor"].as_str().expect("a cursor");
    let rest = lines(&ok(&service, &["logs", &id, "--cursor", cursor, "--output", "json"]));
    let of = |events: &[Value]| events.iter().map(|event| event["log"].clone()).collect::<Vec<_>>();
    assert_eq!(of(&rest), of(&events[3..]));
    assert_eq!(ok(&service, &["logs", &id, "--attempt", "2"]), "");

    let table = ok(&service, &["list", "--label", "who=cli", "--state", "succeeded"]);
    let row = table.lines().nth(1).expect("a row");
    assert!(table.starts_with("ID ") && row.starts_with(&id), "{table}");
    assert!(row.contains("SUCCEEDED") && row.contains("exit 0") && row.contains("sh -c"), "{table}");
    assert_eq!(ok(&service, &["list", "--state", "failed"]).lines().count(), 1);
    let listed = json(&service, &["list", "--output", "json"]);
    assert_eq!(listed["runs"][0]["run_id"], id.as_str());
    assert!(ok(&service, &["get", &id]).contains("SUCCEEDED"));
}

#[test]
fn the_first_interrupt_cancels_and_waits_for_the_end() {
    let service = start();
    let mut child = command(&service.endpoint(), &["run", "--output", "json", "--", "sleep", "600"]);
    let mut child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("runnerctl");
    let id = running(&service);
    support::signal(child.id(), Signal::SIGINT);
    let mut said = String::new();
    child.stdout.take().expect("stdout").read_to_string(&mut said).expect("read");
    let output = wait(child);
    assert_ne!(output.status.code(), Some(0));
    let events = lines(&said);
    assert_eq!(events.first().expect("events")["event"], "accepted");
    let last = events.last().expect("events");
    assert_eq!((&last["event"], &last["terminated"]["state"]), (&"terminated".into(), &"CANCELLED".into()));
    assert_eq!(state(&service, &id), "CANCELLED");
}

#[test]
fn the_second_interrupt_leaves_at_once() {
    let service = start();
    let program = "trap '' TERM; echo up; while :; do sleep 1; done";
    let args = ["run", "--stop-grace", "8s", "--", "sh", "-c", program];
    let mut child = command(&service.endpoint(), &args);
    let mut child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("runnerctl");
    let mut up = [0; 3];
    child.stdout.as_mut().expect("stdout").read_exact(&mut up).expect("read");
    support::signal(child.id(), Signal::SIGINT);
    let id = {
        let listed = json(&service, &["list", "--output", "json"]);
        listed["runs"][0]["run_id"].as_str().expect("an id").to_owned()
    };
    until("the cancel to be known", DEADLINE, || {
        json(&service, &["get", &id, "--output", "json"])["cancel_requested"] == true
    });
    support::signal(child.id(), Signal::SIGINT);
    let output = wait(child);
    assert_eq!(output.status.code(), Some(130));
    assert!(text(&output.stderr).contains(&id), "{}", text(&output.stderr));
    // It was left, not awaited.
    assert_eq!(state(&service, &id), "RUNNING");
    until("the end of the run", DEADLINE, || state(&service, &id) == "CANCELLED");
}

/// The id of the one run that is running, when there is one.
fn running(service: &Service) -> String {
    let mut id = String::new();
    until("a run to be running", DEADLINE, || {
        let listed = json(service, &["list", "--state", "running", "--output", "json"]);
        id = listed["runs"][0]["run_id"].as_str().unwrap_or_default().to_owned();
        !id.is_empty()
    });
    id
}

#[test]
fn cancel_ends_a_run_and_is_told_twice_without_harm() {
    let service = start();
    let id = sleeper(&service);
    let run = json(&service, &["cancel", &id, "--wait", "--reason", "test", "--output", "json"]);
    assert_eq!((&run["state"], &run["outcome"]["cause"]), (&"CANCELLED".into(), &"CANCELLED".into()));
    assert!(ok(&service, &["cancel", &id]).contains("CANCELLED"));
}

#[test]
fn files_and_directories_go_in_and_come_out() {
    let service = start();
    let dir = tempfile::tempdir().expect("temp dir");
    let at = |name: &str| dir.path().join(name).to_str().expect("text").to_owned();
    let bytes: Vec<u8> = (0..2_000_000u32).map(|i| (i * 7 % 251) as u8).collect();
    fs::create_dir_all(at("tree/sub/empty")).expect("dirs");
    fs::write(at("tree/sub/data"), &bytes).expect("write");
    fs::write(at("tool"), "#!/bin/sh\ncp -r /inputs/tree /outputs/copy\ncat >/outputs/note\n")
        .expect("write");
    fs::set_permissions(at("tool"), fs::Permissions::from_mode(0o755)).expect("mode");
    let inputs = [format!("{}:/inputs/tree", at("tree")), format!("{}:/inputs/tool", at("tool"))];
    let outputs = [format!("/outputs/copy:{}", at("copy")), format!("/outputs/note:{}", at("note.txt"))];
    let args = [
        "run",
        "--stdin",
        "--env",
        "A=1",
        "--input",
        &inputs[0],
        "--input",
        &inputs[1],
        "--output",
        &outputs[0],
        "--output",
        &outputs[1],
        "--",
        "/inputs/tool",
    ];
    let mut child = command(&service.endpoint(), &args);
    let mut child =
        child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("spawn");
    child.stdin.take().expect("stdin").write_all(b"from standard input\n").expect("write");
    let output = wait(child);
    assert_eq!(output.status.code(), Some(0), "{}\n{}", text(&output.stderr), service.log());
    assert!(fs::read(at("copy/sub/data")).expect("the copy") == bytes);
    assert!(fs::metadata(at("copy/sub/empty")).expect("the empty directory").is_dir());
    assert_eq!(fs::read(at("note.txt")).expect("the note"), b"from standard input\n");
}

#[test]
fn a_link_in_an_input_is_refused_unless_it_may_be_left_out() {
    let service = start();
    let dir = tempfile::tempdir().expect("temp dir");
    std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).expect("link");
    fs::write(dir.path().join("file"), "x").expect("write");
    let input = format!("{}:/inputs/tree", dir.path().display());
    let output = ctl(&service, &["run", "--input", &input, "--", "ls", "/inputs/tree"]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("link") && said.contains("--skip-special"), "{said}");
    assert_eq!(
        ok(&service, &["run", "--skip-special", "--input", &input, "--", "ls", "/inputs/tree"]),
        "file\n"
    );
}

#[test]
fn every_event_of_a_run_is_a_line_of_json() {
    let service = start();
    let output = ctl(&service, &["--output", "json", "run", "--", "sh", "-c", "echo hi; exit 3"]);
    assert_eq!(output.status.code(), Some(3));
    let events = lines(&text(&output.stdout));
    let log = events.iter().find(|event| event["event"] == "log").expect("a log event");
    assert_eq!((&log["log"]["data"], &log["log"]["stream"]), (&"aGkK".into(), &"stdout".into()));
    let last = events.last().expect("events");
    assert_eq!(
        (&last["event"], &last["terminated"]["outcome"]["exit_code"]),
        (&"terminated".into(), &3.into())
    );
}

#[test]
fn the_same_key_is_the_same_run() {
    let service = start();
    let args = ["run", "--detach", "--key", "k", "--", "true"];
    assert_eq!(ok(&service, &args), ok(&service, &args));
    let output = ctl(&service, &["run", "--detach", "--key", "k", "--", "false"]);
    assert!(!output.status.success() && text(&output.stderr).contains("--key"), "{}", text(&output.stderr));
}

#[test]
fn a_reader_that_goes_away_ends_the_command_and_not_the_run() {
    let service = start();
    let mut child =
        command(&service.endpoint(), &["run", "--", "sh", "-c", "while echo yes; do sleep 0.01; done"]);
    let mut child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("spawn");
    let mut some = [0; 100];
    child.stdout.as_mut().expect("stdout").read_exact(&mut some).expect("read");
    drop(child.stdout.take());
    let output = wait(child);
    assert_eq!(output.status.code(), Some(141), "{}", text(&output.stderr));
    let id = running(&service);
    assert!(text(&output.stderr).contains(&id), "{}", text(&output.stderr));
    ok(&service, &["cancel", &id, "--wait"]);
}

#[test]
fn backends_and_completion_are_shown() {
    let service = start();
    let table = ok(&service, &["backend", "list"]);
    assert!(table.starts_with("NAME ") && table.contains("healthy"), "{table}");
    let backends = json(&service, &["backend", "list", "--output", "json"]);
    assert_eq!(backends["backends"][0]["healthy"], true);
    for shell in ["bash", "zsh", "fish"] {
        assert!(ok(&service, &["completion", shell]).contains("runnerctl"), "{shell}");
    }
}

/// Cancels every run that matches, and no other.
#[test]
fn a_bulk_cancel_shows_what_it_would_do_asks_and_does_it() {
    let service = start();
    let sleep = |label: &str| {
        let args = ["run", "--detach", "--label", label, "--", "sleep", "600"];
        ok(&service, &args).trim().to_owned()
    };
    let (mut wanted, other) = ([sleep("team=a"), sleep("team=a"), sleep("team=a")], sleep("team=b"));
    let all = ["cancel", "--all", "--label", "team=a", "--backend", "local", "--reason", "enough"];
    // Nobody can be asked: nothing happens.
    let refused = ctl(&service, &all);
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused.stderr));
    assert!(text(&refused.stderr).contains("3 runs match"), "{}", text(&refused.stderr));
    for id in &wanted {
        assert!(text(&refused.stderr).contains(id.as_str()), "{}", text(&refused.stderr));
        assert!(!json(&service, &["get", id, "-o", "json"])["cancel_requested"].as_bool().unwrap_or(false));
    }
    let over = ctl(&service, &["cancel", "--all", "--state", "failed", "--yes"]);
    assert_eq!(over.status.code(), Some(2), "{}", text(&over.stderr));

    let done = json(&service, &[&all[..], &["--yes", "--wait", "-o", "json"]].concat());
    let mut cancelled: Vec<_> = done["cancelled"]
        .as_array()
        .expect("ids")
        .iter()
        .map(|id| id.as_str().expect("an id").to_owned())
        .collect();
    cancelled.sort();
    wanted.sort();
    assert_eq!(cancelled, wanted);
    assert_eq!(
        (done["ended"].as_array().map(Vec::len), done["failed"].as_array().map(Vec::len)),
        (Some(0), Some(0))
    );
    assert!(wanted.iter().all(|id| state(&service, id) == "CANCELLED"));
    // Asked for again, there is nothing left to do.
    assert_eq!(ok(&service, &[&all[..], &["--yes"]].concat()), "0 cancelled, 0 had ended, 0 failed\n");
    assert_ne!(state(&service, &other), "CANCELLED");
    assert_eq!(ok(&service, &["cancel", "--all", "--yes", "--wait"]), "1 cancelled, 0 had ended, 0 failed\n");
}

#[test]
fn the_health_of_backends_is_an_exit_status() {
    let service = start();
    let said = ok(&service, &["backend", "health", "local"]);
    assert!(said.contains("healthy"), "{said}");
    assert_eq!(json(&service, &["backend", "health", "-o", "json"])["backends"][0]["healthy"], true);
    assert_eq!(ctl(&service, &["backend", "health", "nowhere"]).status.code(), Some(1));
}
