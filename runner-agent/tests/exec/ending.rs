//! How it ended: exactly, once, and with nothing left alive.

use std::{fs, path::Path, process::Command, time::Duration};

use runner_agent::exec::{
    client,
    protocol::{ControlReply, ControlRequest, ExitReason},
};
use runner_core::{log::Frame, outcome::ExitStatus};

use crate::harness::{
    AGENT, DEADLINE, Running, cgroup, frames, is_root, probed, run, shell, skip, spec, survivors, wait_for,
};

#[test]
fn exit_codes_are_verbatim_137_included() {
    for code in [0, 1, 7, 126, 127, 137, 255] {
        let done = run(shell(&format!("exit {code}")));
        assert_eq!((done.exit.reason, done.exit.status), (ExitReason::Exited, Some(ExitStatus::Code(code))));
    }
}

#[test]
fn a_signal_from_elsewhere_is_the_programs_own_end() {
    for signal in [6, 9, 15] {
        let done = run(shell(&format!("kill -{signal} $$")));
        assert_eq!(
            (done.exit.reason, done.exit.status),
            (ExitReason::Exited, Some(ExitStatus::Signal(signal)))
        );
    }
}

#[test]
fn a_program_that_is_not_there_is_127_and_one_that_cannot_be_executed_is_126() {
    let done = run(spec(&["no-such-program"]));
    assert_eq!((done.exit.reason, done.exit.status), (ExitReason::Exited, Some(ExitStatus::Code(127))));
    assert_eq!(done.stderr(), "runner: no-such-program: not found\n");
    assert!(done.evidence().contains("no-such-program"));
    for not_executable in ["/etc/passwd", "/etc"] {
        let done = run(spec(&[not_executable]));
        assert_eq!((done.exit.reason, done.exit.status), (ExitReason::Exited, Some(ExitStatus::Code(126))));
        assert!(done.stderr().contains(not_executable));
    }
}

#[test]
fn the_program_gets_its_arguments_and_exactly_its_environment() {
    let mut spec = spec(&["env", "-0"]);
    spec.env.insert("A".to_owned(), "line\nbreak".to_owned());
    let expected = spec.env.clone();
    let done = run(spec);
    let got: std::collections::BTreeMap<_, _> = done
        .stdout()
        .split_terminator('\0')
        .map(|pair| pair.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned())).unwrap())
        .collect();
    assert_eq!(got, expected);
}

#[test]
fn the_timeout_ends_a_program_and_its_own_answer_to_sigterm_is_kept() {
    let mut spec = shell("trap 'echo term; exit 3' TERM; echo ready; while :; do sleep 0.05; done");
    spec.timeout = Duration::from_millis(500);
    spec.stop_grace = Duration::from_secs(20);
    let done = run(spec);
    assert_eq!((done.exit.reason, done.exit.status), (ExitReason::TimedOut, Some(ExitStatus::Code(3))));
    assert_eq!(done.stdout(), "ready\nterm\n");
    assert!(done.exit.usage.wall >= Duration::from_millis(500));
    assert!(done.exit.usage.wall < Duration::from_secs(15));
}

/// Children that left the session and the group, lost their parent, and ignore what can be ignored.
const STUBBORN: &str = "trap '' TERM HUP INT; \
    (setsid sh -c 'sleep 1000 & setsid sleep 1001 & sleep 1002' >/dev/null 2>&1 &) ; \
    (sleep 1003 &); echo ready; while :; do sleep 0.05; done";

#[test]
fn a_tree_that_ignores_sigterm_and_hides_is_dead_after_the_grace() {
    let mut spec = shell(STUBBORN);
    spec.stop_grace = Duration::from_millis(300);
    let running = Running::start(spec);
    running.wait_for_output("ready");
    wait_for("the tree", || survivors(&running.spec).len() >= 5);
    let reply = client::control(running.dir(), &ControlRequest::Stop { grace_ms: 300 }, DEADLINE).unwrap();
    assert_eq!(reply, ControlReply::Ok);
    // `finish` looks for survivors.
    let done = running.finish();
    assert_eq!((done.exit.reason, done.exit.status), (ExitReason::Stopped, Some(ExitStatus::Signal(9))));
}

#[test]
fn daemons_do_not_outlive_a_program_that_exits() {
    let done = run(shell("(setsid sleep 1000 >/dev/null 2>&1 &); sleep 1000 & exit 5"));
    assert_eq!((done.exit.reason, done.exit.status), (ExitReason::Exited, Some(ExitStatus::Code(5))));
}

#[test]
fn without_a_pid_namespace_the_tree_dies_too() {
    let mut spec = shell(STUBBORN);
    spec.namespaces = Default::default();
    spec.namespaces.user = probed().namespaces.user;
    spec.stop_grace = Duration::from_millis(200);
    spec.timeout = Duration::from_millis(700);
    let done = run(spec);
    assert_eq!((done.exit.reason, done.exit.status), (ExitReason::TimedOut, Some(ExitStatus::Signal(9))));
}

#[test]
fn sigterm_to_the_shim_is_a_stop_and_a_second_stop_shortens_the_grace() {
    let mut spec = shell("trap '' TERM; echo ready; while :; do sleep 0.05; done");
    spec.stop_grace = Duration::from_secs(3600);
    let running = Running::start(spec);
    running.wait_for_output("ready");
    let shim = client::shim(running.dir()).unwrap().unwrap();
    let pid = rustix::process::Pid::from_raw(shim.pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    client::control(running.dir(), &ControlRequest::Stop { grace_ms: 100 }, DEADLINE).unwrap();
    let done = running.finish();
    assert_eq!((done.exit.reason, done.exit.status), (ExitReason::Stopped, Some(ExitStatus::Signal(9))));
}

#[test]
fn a_killed_shim_takes_everything_along_and_leaves_no_exit_record() {
    if !probed().namespaces.pid {
        return skip("no pid namespace");
    }
    let mut spec = shell(STUBBORN);
    spec.cgroup = cgroup(None, Some(100));
    let mut running = Running::start(spec);
    running.wait_for_output("ready");
    let shim = client::shim(running.dir()).unwrap().unwrap();
    assert!(client::is_alive(&shim).unwrap());
    assert!(client::kill(&shim).unwrap());
    client::prove_dead(running.dir(), Duration::from_secs(20)).unwrap();
    assert_eq!(survivors(&running.spec), Vec::<String>::new());
    for directory in running.spec.cgroup.iter().flat_map(|plan| &plan.directories) {
        assert!(!directory.exists());
    }
    // Dead though nobody has waited for it yet.
    assert!(!client::is_alive(&shim).unwrap());
    assert!(!client::kill(&shim).unwrap());
    running.child.wait().unwrap();
    assert!(client::exit(running.dir()).unwrap().is_none());
    // Nor does another shim take it up again.
    assert_eq!(client::spawn(Path::new(AGENT), running.dir()).unwrap().wait().unwrap().code(), Some(3));
    assert!(client::exit(running.dir()).unwrap().is_none());
}

#[test]
fn a_second_shim_is_refused_while_the_first_lives_and_after() {
    let running = Running::start(shell("echo once; sleep 0.3"));
    running.wait_for_start();
    for _ in 0..2 {
        assert_eq!(client::spawn(Path::new(AGENT), running.dir()).unwrap().wait().unwrap().code(), Some(3));
    }
    let dir = running.dir().to_owned();
    wait_for("the end", || client::exit(&dir).unwrap().is_some());
    let before = fs::read(dir.join("exit.json")).unwrap();
    assert_eq!(client::spawn(Path::new(AGENT), &dir).unwrap().wait().unwrap().code(), Some(3));
    assert_eq!(fs::read(dir.join("exit.json")).unwrap(), before);
    assert_eq!(running.finish().stdout(), "once\n");
}

#[test]
fn many_shims_at_once_for_one_directory_make_one_workload() {
    let dir = tempfile::tempdir().unwrap();
    client::write_spec(dir.path(), &shell("echo once; sleep 0.2")).unwrap();
    let children: Vec<_> = (0..6).map(|_| client::spawn(Path::new(AGENT), dir.path()).unwrap()).collect();
    let codes: Vec<_> = children.into_iter().map(|mut child| child.wait().unwrap().code().unwrap()).collect();
    assert_eq!(codes.iter().filter(|&&code| code == 0).count(), 1, "{codes:?}");
    assert_eq!(codes.iter().filter(|&&code| code == 3).count(), 5, "{codes:?}");
    assert_eq!(crate::harness::frames(dir.path()).len(), 1);
}

/// As in a container that somebody entered, or under an init that made no session.
#[test]
fn a_shim_whose_session_lies_outside_of_its_pid_namespace_works() {
    if !is_root() {
        return skip("not root");
    }
    let dir = tempfile::tempdir().unwrap();
    client::write_spec(dir.path(), &shell("echo inside; exit 7")).unwrap();
    let output = Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", AGENT, "exec"])
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{} {}", output.status, client::shim_errors(dir.path()));
    let exit = client::exit(dir.path()).unwrap().unwrap();
    assert_eq!((exit.reason, exit.status), (ExitReason::Exited, Some(ExitStatus::Code(7))));
    assert_eq!(frames(dir.path()).iter().map(Frame::span).sum::<u64>(), "inside\n".len() as u64);
}

#[test]
fn a_missing_or_malformed_specification_is_a_failed_set_up() {
    for text in [None, Some("{}"), Some("not json")] {
        let dir = tempfile::tempdir().unwrap();
        if let Some(text) = text {
            fs::write(dir.path().join("exec.json"), text).unwrap();
        }
        assert!(client::spawn(Path::new(AGENT), dir.path()).unwrap().wait().unwrap().success());
        let exit = client::exit(dir.path()).unwrap().unwrap();
        assert_eq!((exit.reason, exit.status), (ExitReason::SetupFailed, None));
        assert!(format!("{:?}", exit.evidence).contains("exec.json"));
    }
}

#[test]
fn a_fork_bomb_stays_within_its_limit_and_dies() {
    let Some(plan) = cgroup(None, Some(32)) else { return skip("no control group for processes") };
    let mut spec = shell("echo ready; b() { b | b & }; b; sleep 0.5; exit 0");
    spec.cgroup = Some(plan);
    spec.timeout = Duration::from_secs(10);
    spec.stop_grace = Duration::ZERO;
    let done = run(spec);
    assert!(done.evidence().contains("forks were refused"), "{}", done.evidence());
}

#[test]
fn the_memory_limit_kills_and_is_told_from_a_kill_by_anyone_else() {
    let Some(plan) = cgroup(Some(32 << 20), None) else { return skip("no control group for memory") };
    // `tail` keeps the last line, which has no end, in memory.
    let mut spec = spec(&["tail", "/dev/zero"]);
    spec.cgroup = Some(plan);
    let done = run(spec);
    assert_eq!((done.exit.reason, done.exit.status), (ExitReason::OomKilled, Some(ExitStatus::Signal(9))));
    assert!(done.exit.usage.max_memory_bytes > 16 << 20, "{:?}", done.exit.usage);
    assert!(done.exit.usage.max_memory_bytes <= 33 << 20, "{:?}", done.exit.usage);
}

#[test]
fn a_child_that_is_killed_at_the_memory_limit_is_evidence_and_not_the_end() {
    let Some(plan) = cgroup(Some(32 << 20), None) else { return skip("no control group for memory") };
    let mut spec = shell("tail /dev/zero; echo child: $?; exit 4");
    spec.cgroup = Some(plan);
    let done = run(spec);
    assert_eq!((done.exit.reason, done.exit.status), (ExitReason::Exited, Some(ExitStatus::Code(4))));
    assert_eq!(done.stdout(), "child: 137\n");
    assert!(done.evidence().contains("memory limit"), "{}", done.evidence());
}

#[test]
fn a_shell_that_passes_on_the_death_of_its_last_command_is_killed_at_the_memory_limit_too() {
    let Some(plan) = cgroup(Some(32 << 20), None) else { return skip("no control group for memory") };
    let mut spec = shell("echo before; tail /dev/zero; exit $?");
    spec.cgroup = Some(plan);
    let done = run(spec);
    assert_eq!((done.exit.reason, done.exit.status), (ExitReason::OomKilled, Some(ExitStatus::Code(137))));
}

#[test]
fn a_control_group_that_cannot_be_made_is_a_failed_set_up_that_names_it() {
    let mut spec = spec(&["true"]);
    let directory = std::path::PathBuf::from("/sys/fs/cgroup/no-such-controller/x/y");
    spec.cgroup = Some(runner_agent::exec::protocol::CgroupPlan {
        directories: vec![directory],
        settings: Vec::new(),
        version: 1,
    });
    let done = run(spec);
    assert_eq!((done.exit.reason, done.exit.status), (ExitReason::SetupFailed, None));
    assert!(done.evidence().contains("no-such-controller"), "{}", done.evidence());
}

#[test]
fn a_file_that_grows_over_its_limit_is_a_signal() {
    let mut spec = shell("exec head -c 100000 /dev/zero > /tmp/file");
    if !probed().namespaces.mount {
        return skip("no mount namespace: /tmp would be the machine's");
    }
    spec.file_size_bytes = Some(4096);
    let done = run(spec);
    assert_eq!((done.exit.reason, done.exit.status), (ExitReason::Exited, Some(ExitStatus::Signal(25))));
}

#[test]
fn an_output_that_is_held_open_elsewhere_does_not_hold_the_end_up_for_ever() {
    if !is_root() {
        return skip("not root: cannot open another's pipe");
    }
    let mut spec = shell("echo ready; cat");
    spec.stdin = true;
    let running = Running::start(spec);
    running.wait_for_output("ready");
    let pid = client::started(running.dir()).unwrap().unwrap().pid;
    let held = fs::File::options().write(true).open(format!("/proc/{pid}/fd/1")).unwrap();
    client::control(running.dir(), &ControlRequest::Eof, DEADLINE).unwrap();
    let done = running.finish();
    drop(held);
    assert_eq!(done.exit.status, Some(ExitStatus::Code(0)));
    assert!(done.evidence().contains("still open"), "{}", done.evidence());
}
