//! What the program can see and do.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    time::Duration,
};

use runner_agent::exec::protocol::{ExitReason, Namespaces, Root};
use runner_core::{
    outcome::ExitStatus,
    spec::{TerminalSize, User},
};

use crate::harness::{AGENT, Finished, NOBODY, Running, is_root, mount, probed, run, shell, skip, spec};

fn open_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    dir
}

fn ok(done: &Finished) {
    assert_eq!(
        (done.exit.reason, done.exit.status),
        (ExitReason::Exited, Some(ExitStatus::Code(0))),
        "{} {}",
        done.evidence(),
        String::from_utf8_lossy(&done.bytes(runner_core::log::LogStream::Stderr)),
    );
}

macro_rules! needs {
    ($namespace:ident) => {
        if !probed().namespaces.$namespace {
            return skip(concat!("no namespace: ", stringify!($namespace)));
        }
    };
}

#[test]
fn the_program_has_no_capability_and_cannot_get_one() {
    let done = run(shell("grep -E '^(Cap|NoNewPrivs|Groups)' /proc/self/status"));
    ok(&done);
    let text = done.stdout();
    for line in text.lines().filter(|line| line.starts_with("Cap")) {
        // Who is not root and has no user namespace may not shrink the bounding set; `no_new_privs` makes it moot.
        if line.starts_with("CapBnd") && !is_root() && !probed().namespaces.user {
            continue;
        }
        assert!(line.ends_with("\t0000000000000000"), "{text}");
    }
    assert!(text.contains("NoNewPrivs:\t1"), "{text}");
    if is_root() {
        assert!(text.lines().any(|line| line.trim_end() == "Groups:"), "{text}");
    }
}

#[test]
fn the_program_runs_as_the_user_that_was_asked_for() {
    let mut users = vec![crate::harness::user()];
    if is_root() {
        users.extend([User { uid: 12345, gid: 54321 }, User { uid: 0, gid: 0 }]);
    }
    for user in users {
        let mut spec = shell("id -u; id -g; umask; grep ^Cap /proc/self/status");
        spec.user = user;
        let done = run(spec);
        ok(&done);
        assert!(
            done.stdout().starts_with(&format!("{}\n{}\n0022\n", user.uid, user.gid)),
            "{}",
            done.stdout()
        );
        assert!(done.stdout().contains("CapEff:\t0000000000000000"));
    }
}

#[test]
fn inputs_can_be_read_and_not_written_and_outputs_can_be_written() {
    needs!(mount);
    let (inputs, outputs) = (open_dir(), open_dir());
    fs::create_dir(inputs.path().join("deep")).unwrap();
    fs::write(inputs.path().join("deep/a"), "input").unwrap();
    fs::set_permissions(inputs.path().join("deep/a"), fs::Permissions::from_mode(0o666)).unwrap();
    let one = outputs.path().join("one");
    fs::write(&one, "single").unwrap();
    let mut spec = shell(
        "cat /inputs/deep/a; cat /some/new/place/file; \
         if echo x > /inputs/deep/a || echo x > /inputs/new || rm -f /inputs/deep/a; then exit 8; fi 2>/dev/null; \
         if chmod 777 /inputs 2>/dev/null; then exit 7; fi; echo result > /outputs/b",
    );
    spec.mounts = vec![
        mount(inputs.path(), "/inputs", true),
        mount(outputs.path(), "/outputs", false),
        mount(&one, "/some/new/place/file", true),
    ];
    let done = run(spec);
    ok(&done);
    assert_eq!(done.stdout(), "inputsingle");
    assert_eq!(fs::read_to_string(inputs.path().join("deep/a")).unwrap(), "input");
    assert_eq!(fs::read_to_string(outputs.path().join("b")).unwrap(), "result\n");
    assert!(!Path::new("/some").exists() && !Path::new("/inputs").exists());
}

#[test]
fn the_network_is_loopback_and_it_works() {
    needs!(network);
    needs!(mount);
    let done = run(shell(
        "tail -n +3 /proc/net/dev; ls /sys/class/net 2>/dev/null; cat /proc/net/route | tail -n +2",
    ));
    ok(&done);
    for line in done.stdout().lines() {
        assert!(line.trim_start().starts_with("lo"), "{}", done.stdout());
    }
    assert!(done.stdout().contains("lo:"));
    // Up: its address is in the table of local routes.
    let done = run(shell("cat /proc/net/fib_trie"));
    assert!(done.stdout().contains("127.0.0.1"), "{}", done.stdout());
}

#[test]
fn the_machines_processes_are_not_to_be_seen() {
    needs!(pid);
    needs!(mount);
    let done = run(shell("echo $$; ls -d /proc/[0-9]*"));
    ok(&done);
    let mut lines: Vec<_> = done.stdout().lines().map(str::to_owned).collect();
    let own = lines.remove(0);
    // The first process, the shell, `ls`.
    assert!(lines.len() <= 3 && lines.contains(&format!("/proc/{own}")), "{lines:?}");
}

#[test]
fn the_first_process_cannot_be_looked_into_or_killed_by_the_program() {
    needs!(pid);
    needs!(mount);
    let mut specs = vec![shell("ls -l /proc/1/fd/ 2>&1 && exit 9; kill -9 1; sleep 0.1; echo alive")];
    if is_root() {
        // Not even by its own uid.
        specs.push(specs[0].clone());
        specs[1].user = User { uid: 0, gid: 0 };
        specs[1].env.insert("MARKER".to_owned(), spec(&["x"]).attempt.to_string());
    }
    for spec in specs {
        let done = run(spec);
        ok(&done);
        assert!(done.stdout().ends_with("alive\n"), "{}", done.stdout());
    }
}

#[test]
fn hidden_directories_are_empty_and_so_is_the_attempts_own() {
    needs!(mount);
    let mut spec = shell(
        "ls -A /usr/share; ls -A \"$OWN\" 2>/dev/null; ls -A /tmp /run /var/tmp /dev/shm | grep -v :; exit 0",
    );
    spec.root = Root::Host { hidden: vec!["/usr/share".into(), "/no/such/directory".into()] };
    // Not below /tmp, which is fresh anyway.
    let own = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    spec.env.insert("OWN".to_owned(), own.path().to_str().unwrap().to_owned());
    runner_agent::exec::client::write_spec(own.path(), &spec).unwrap();
    let mut child = runner_agent::exec::client::spawn(Path::new(AGENT), own.path()).unwrap();
    assert!(child.wait().unwrap().success());
    let exit = runner_agent::exec::client::exit(own.path()).unwrap().unwrap();
    assert_eq!((exit.reason, exit.status), (ExitReason::Exited, Some(ExitStatus::Code(0))), "{exit:?}");
    assert_eq!(crate::harness::frames(own.path()).iter().filter(|frame| frame.span() > 3).count(), 0);
}

#[test]
fn a_read_only_root_takes_nothing_but_tmp_and_the_mounts() {
    needs!(mount);
    let outputs = open_dir();
    let mut spec = shell(
        "for place in /new /etc/new /usr/new /home/new /var/new /sys/new /proc/sys/kernel/hostname; do \
         if (echo x > $place) 2>/dev/null; then echo wrote $place; exit 9; fi; done; \
         for place in /tmp /var/tmp /dev/shm /outputs /work-here; do echo x > $place/$(id -u) || exit 8; done",
    );
    spec.read_only_root = true;
    let scratch = open_dir();
    spec.mounts = vec![mount(outputs.path(), "/outputs", false), mount(scratch.path(), "/work-here", false)];
    if is_root() {
        let mut as_root = spec.clone();
        as_root.user = User { uid: 0, gid: 0 };
        ok(&run(as_root));
    }
    ok(&run(spec));
    assert!(outputs.path().join(crate::harness::user().uid.to_string()).exists());
}

#[test]
fn uid_0_without_capabilities_cannot_change_the_machine() {
    needs!(mount);
    needs!(pid);
    if !is_root() {
        return skip("not root");
    }
    let mut spec = shell(
        "for file in /proc/sys/kernel/core_pattern /proc/sysrq-trigger /sys/kernel/mm/ksm/run; do \
         if [ -e $file ] && (echo 0 > $file) 2>/dev/null; then echo wrote $file; exit 9; fi; done; \
         if mount -t tmpfs none /tmp 2>/dev/null || mknod /tmp/x b 8 0 2>/dev/null; then exit 8; fi; \
         if unshare -U true 2>/dev/null; then :; fi; chroot / true 2>/dev/null && exit 7; exit 0",
    );
    spec.user = User { uid: 0, gid: 0 };
    ok(&run(spec));
}

/// A root file system with what `/bin/sh` needs, made of links to mounts of the machine's own directories.
fn image() -> tempfile::TempDir {
    let image = open_dir();
    for name in ["usr", "etc", "proc"] {
        fs::create_dir(image.path().join(name)).unwrap();
    }
    for name in ["bin", "lib", "lib64", "sbin"] {
        if let Ok(target) = fs::read_link(Path::new("/").join(name)) {
            symlink(target, image.path().join(name)).unwrap();
        }
    }
    fs::write(image.path().join("etc/name"), "image").unwrap();
    image
}

#[test]
fn an_image_is_the_root_and_is_never_written_to() {
    needs!(mount);
    if !fs::symlink_metadata("/bin").is_ok_and(|bin| bin.is_symlink()) {
        return skip("the machine's /bin is not in /usr, so it cannot be lent to an image");
    }
    let image = image();
    let mut read_only = shell(
        "cat /etc/name; ls -d /home /var 2>/dev/null; if (echo x > /etc/new) 2>/dev/null; then exit 9; fi; exit 0",
    );
    read_only.root = Root::Directory { lower: image.path().to_owned(), upper: None };
    read_only.read_only_root = true;
    read_only.mounts = vec![mount(Path::new("/usr"), "/usr", true)];
    let done = run(read_only.clone());
    ok(&done);
    assert_eq!(done.stdout(), "image");
    if !probed().overlay {
        return skip("no overlay");
    }
    let changes = open_dir();
    for name in ["upper", "work"] {
        fs::create_dir(changes.path().join(name)).unwrap();
        fs::set_permissions(changes.path().join(name), fs::Permissions::from_mode(0o755)).unwrap();
        if is_root() {
            std::os::unix::fs::chown(changes.path().join(name), Some(NOBODY.uid), Some(NOBODY.gid)).unwrap();
        }
    }
    let mut writable = shell("cat /etc/name; echo x > /new && rm /new && mkdir /made && echo y > /made/file");
    writable.root =
        Root::Directory { lower: image.path().to_owned(), upper: Some(changes.path().join("upper")) };
    writable.mounts = read_only.mounts;
    let done = run(writable);
    ok(&done);
    assert_eq!(fs::read_to_string(changes.path().join("upper/made/file")).unwrap(), "y\n");
    assert!(!image.path().join("made").exists());
}

#[test]
fn a_mount_target_that_is_a_link_stays_inside_of_the_root() {
    needs!(mount);
    if !fs::symlink_metadata("/bin").is_ok_and(|bin| bin.is_symlink()) {
        return skip("the machine's /bin is not in /usr, so it cannot be lent to an image");
    }
    let (image, victim, source) = (image(), open_dir(), open_dir());
    fs::write(source.path().join("mine"), "mine").unwrap();
    // Absolute, and upwards beyond the root.
    symlink(victim.path(), image.path().join("absolute")).unwrap();
    let upwards = format!("../../../../../../../..{}", victim.path().display());
    symlink(upwards, image.path().join("upwards")).unwrap();
    symlink("/etc", image.path().join("inside")).unwrap();
    for (target, works) in [("/absolute/x", false), ("/upwards/x", false), ("/inside", true)] {
        let mut spec = shell("cat /etc/mine");
        spec.root = Root::Directory { lower: image.path().to_owned(), upper: None };
        spec.read_only_root = true;
        spec.mounts = vec![mount(Path::new("/usr"), "/usr", true), mount(source.path(), target, false)];
        let done = run(spec);
        if works {
            ok(&done);
            assert_eq!(done.stdout(), "mine");
        } else {
            assert_eq!(done.exit.reason, ExitReason::SetupFailed, "{target}: {}", done.evidence());
            assert!(done.evidence().contains(target), "{}", done.evidence());
        }
        assert_eq!(fs::read_dir(victim.path()).unwrap().count(), 0, "{target}");
    }
}

#[test]
fn what_cannot_be_set_up_is_said_and_nothing_runs() {
    needs!(mount);
    let dir = open_dir();
    let mut missing = spec(&["true"]);
    missing.mounts = vec![mount(&dir.path().join("missing"), "/inputs", true)];
    let mut on_the_machine = spec(&["true"]);
    on_the_machine.mounts = vec![mount(dir.path(), "/usr/no-such-place", true)];
    let mut working_dir = spec(&["true"]);
    working_dir.working_dir = "/usr/no-such-place".to_owned();
    let mut not_normal = spec(&["true"]);
    not_normal.mounts = vec![mount(dir.path(), "/a/../b", true)];
    let mut no_namespace = spec(&["true"]);
    no_namespace.namespaces.mount = false;
    no_namespace.read_only_root = true;
    let mut nul = spec(&["true", "a\0b"]);
    nul.env.insert("B".to_owned(), "x".to_owned());
    for (spec, word) in [
        (missing, "missing"),
        (on_the_machine, "/usr/no-such-place"),
        (working_dir, "/usr/no-such-place"),
        (not_normal, ".."),
        (no_namespace, "mount namespace"),
        (nul, "NUL"),
    ] {
        let done = run(spec);
        assert_eq!((done.exit.reason, done.exit.status), (ExitReason::SetupFailed, None), "{word}");
        assert!(done.evidence().contains(word), "{}", done.evidence());
        assert!(done.frames.is_empty());
    }
    assert!(!Path::new("/usr/no-such-place").exists());
}

#[test]
fn a_working_directory_is_made_for_the_user() {
    needs!(mount);
    let mut spec = shell("pwd; echo x > file; cat file");
    spec.working_dir = "/job/here".to_owned();
    let done = run(spec);
    ok(&done);
    assert_eq!(done.stdout(), "/job/here\nx\n");
    assert!(!Path::new("/job").exists());
}

#[test]
fn a_user_namespace_for_root_is_refused() {
    if !is_root() {
        return skip("not root");
    }
    let mut spec = spec(&["true"]);
    spec.namespaces = Namespaces { user: true, ..Namespaces::default() };
    assert_eq!(run(spec).exit.reason, ExitReason::SetupFailed);
}

#[test]
fn nothing_is_left_mounted_on_the_machine() {
    needs!(mount);
    let mark = open_dir();
    let mut spec = spec(&["true"]);
    spec.mounts = vec![mount(mark.path(), "/mark", true)];
    ok(&run(spec));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(mark.path().to_str().unwrap()), "{mounts}");
    assert!(!mounts.contains("/mark"), "{mounts}");
}

#[test]
fn an_ordinary_user_gets_the_same_confinement() {
    if !is_root() {
        return skip("not root: every test is this one");
    }
    let probe = std::process::Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", AGENT, "probe"])
        .output();
    let Ok(probe) = probe else { return skip("no setpriv") };
    let report: runner_agent::exec::protocol::ProbeReport = match serde_json::from_slice(&probe.stdout) {
        Ok(report) => report,
        Err(_) => return skip("an ordinary user cannot execute the agent where it lies"),
    };
    let all = Namespaces { user: true, mount: true, pid: true, network: true, ipc: true, uts: true };
    if report.namespaces != all {
        return skip(&format!("an ordinary user has not all namespaces: {:?}", report.notes));
    }
    let outputs = open_dir();
    let mut spec = shell(
        "id -u; id -g; grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status; tail -n +3 /proc/net/dev | cut -c1-6; \
         echo x > /outputs/file; echo y > /outputs/../tmp/y; if (echo x > /usr/new) 2>/dev/null; then exit 9; fi; \
         tty <&1; exit 0",
    );
    spec.namespaces = all;
    spec.user = User { uid: 1000, gid: 1001 };
    spec.mounts = vec![mount(outputs.path(), "/outputs", false)];
    let running = Running::start_unprivileged(spec.clone());
    let done = running.finish();
    ok(&done);
    assert_eq!(
        done.stdout(),
        "1000\n1001\nCapEff:\t0000000000000000\nCapBnd:\t0000000000000000\nNoNewPrivs:\t1\n    lo\nnot a tty\n"
    );
    // On the machine it was the ordinary user.
    let made = fs::metadata(outputs.path().join("file")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&made), NOBODY.uid);

    let mut terminal = shell("tty; (setsid sleep 1000 &) ; exit 3");
    terminal.namespaces = all;
    terminal.user = User { uid: 0, gid: 0 };
    terminal.terminal = Some(TerminalSize { columns: 100, rows: 30 });
    let done = Running::start_unprivileged(terminal).finish();
    assert_eq!(done.exit.status, Some(ExitStatus::Code(3)), "{}", done.evidence());

    let mut stopped = shell("trap '' TERM; (setsid sleep 1000 &); while :; do sleep 0.05; done");
    stopped.namespaces = all;
    stopped.user = User { uid: 1000, gid: 1001 };
    stopped.timeout = Duration::from_millis(300);
    stopped.stop_grace = Duration::from_millis(100);
    let done = Running::start_unprivileged(stopped).finish();
    assert_eq!((done.exit.reason, done.exit.status), (ExitReason::TimedOut, Some(ExitStatus::Signal(9))));
}
