//! Finds out by trying what confinement this machine allows.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    os::fd::AsRawFd as _,
    path::Path,
    time::Duration,
};

use runner_core::{
    clock::{IdGen as _, SystemIds},
    id::AttemptId,
    spec::User,
};
use rustix::{fs::Mode, pipe::PipeFlags};

use super::{
    protocol::{ExecSpec, Namespaces, ProbeReport, Root},
    root, shim,
    sys::{self, Forked},
};

/// Adds one to what is wanted.
type Want = fn(&mut Namespaces);

/// Tries every kind of confinement in short-lived children, and reports which work together. Overlays are tried in
/// `directory`, for it depends on the file system: give the one where root file systems will be written to. Must be called
/// by a process with one thread. Leaves nothing behind.
pub fn probe(directory: &Path) -> ProbeReport {
    let mut report = ProbeReport::default();
    let user = !rustix::process::geteuid().is_root();
    let scratch = directory.join(format!(".runner-probe.{}", std::process::id()));
    let prepared = ["", "stage", "lower", "upper", "work"]
        .iter()
        .try_for_each(|name| fs::create_dir(scratch.join(name)));
    match prepared {
        Ok(()) => probe_in(&scratch, user, &mut report),
        Err(error) => report.notes.push(format!("{}: {error}", scratch.display())),
    }
    // The kernel leaves an unreadable directory in overlayfs's `work`, empty.
    let _ = fs::remove_dir_all(&scratch);
    report
}

fn probe_in(scratch: &Path, user: bool, report: &mut ProbeReport) {
    let host = || Root::Host { hidden: Vec::new() };
    let all = Namespaces { user, mount: true, pid: true, network: true, ipc: true, uts: true };
    match attempt(scratch, all, host()) {
        Ok(()) => report.namespaces = all,
        // Not all at once: one after the other, each beside those that work.
        Err(together) => {
            report.notes.push(format!("all namespaces together: {together}"));
            let base = Namespaces { user, ..Namespaces::default() };
            let mut have = base;
            let wishes: [(&str, Want); 5] = [
                ("pid", |wish| wish.pid = true),
                ("mount", |wish| wish.mount = true),
                ("network", |wish| wish.network = true),
                ("ipc", |wish| wish.ipc = true),
                ("uts", |wish| wish.uts = true),
            ];
            for (name, want) in wishes {
                let mut wish = have;
                want(&mut wish);
                match attempt(scratch, wish, host()) {
                    Ok(()) => have = wish,
                    Err(fault) => report.notes.push(format!("{name} namespace: {fault}")),
                }
            }
            if have != base {
                report.namespaces = have;
            }
        }
    }
    if report.namespaces.mount {
        let root = Root::Directory { lower: scratch.join("lower"), upper: Some(scratch.join("upper")) };
        match attempt(scratch, report.namespaces, root) {
            Ok(()) => report.overlay = true,
            Err(fault) => report.notes.push(format!("overlay: {fault}")),
        }
    }
}

/// Makes the namespaces and the root in a child, as for a workload.
fn attempt(scratch: &Path, namespaces: Namespaces, root: Root) -> Result<(), String> {
    let stage =
        fs::canonicalize(scratch.join("stage")).map_err(|error| format!("{}: {error}", scratch.display()))?;
    let spec = spec(namespaces, root);
    let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|error| format!("pipe: {error}"));
    let ((go, let_go), (answer, tell)) = (pipe()?, pipe()?);
    let pid = match sys::fork(shim::clone_flags(&spec)).map_err(|error| format!("clone: {error}"))? {
        Forked::Parent(pid) => pid,
        Forked::Child => {
            let body = || {
                let _ = sys::close_all_but([0, 1, 2, go.as_raw_fd(), tell.as_raw_fd()]);
                if rustix::io::read(&go, &mut [0]) != Ok(1) {
                    return;
                }
                rustix::process::umask(Mode::empty());
                let mut done = Ok(());
                if namespaces.network {
                    done = sys::loopback_up().map_err(|error| format!("loopback: {error}"));
                }
                if namespaces.mount {
                    done = done.and_then(|()| root::enter(&spec, &stage));
                }
                let _ = rustix::io::write(&tell, done.err().unwrap_or_else(|| "ok".to_owned()).as_bytes());
            };
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            sys::exit_now(0)
        }
    };
    drop((go, tell));
    let mapped = shim::map_user(&spec, pid);
    if mapped.is_ok() {
        let _ = fs::File::from(let_go).write_all(&[1]);
    } else {
        drop(let_go);
    }
    let mut said = String::new();
    let read = fs::File::from(answer).read_to_string(&mut said);
    let _ = sys::wait4(Some(pid), true);
    mapped?;
    match (read, said.as_str()) {
        (Ok(_), "ok") => Ok(()),
        (Ok(_), "") => Err("the first process died".to_owned()),
        (Ok(_), fault) => Err(fault.to_owned()),
        (Err(error), _) => Err(error.to_string()),
    }
}

fn spec(namespaces: Namespaces, root: Root) -> ExecSpec {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    ExecSpec {
        attempt: AttemptId { run: SystemIds.run_id(), number: 1 },
        argv: vec!["true".to_owned()],
        env: BTreeMap::new(),
        working_dir: "/".to_owned(),
        root,
        read_only_root: true,
        mounts: Vec::new(),
        user: User { uid, gid },
        namespaces,
        cgroup: None,
        file_size_bytes: None,
        address_space_bytes: None,
        nproc: None,
        timeout: Duration::ZERO,
        stop_grace: Duration::ZERO,
        terminal: None,
        stdin: false,
        log_limit_bytes: 0,
    }
}
