//! The shim: claims the attempt, prepares, starts the first process, watches, cleans up, and says how it ended.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    rc::Rc,
    thread,
    time::Duration,
};

use runner_core::{
    clock::{Clock as _, SystemClock},
    log::LogStream,
    outcome::{ExitStatus, Usage},
    spec::path,
};
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    pipe::PipeFlags,
    process::{DumpableBehavior, Pid, PidfdFlags, Signal},
};

use super::{
    cgroup::{self, Counters},
    child::{self, Plan},
    control::Control,
    link::Kind,
    link_out::{LinkIn, LinkOut, SharedOut},
    protocol::{ExecSpec, ExitReason, ExitRecord, Root, name},
    record::{self, Reserved},
    spool::Spool,
    sys::{self, CStrings, Forked},
    tree,
    watch::{Input, Output, Parts, Seen, Watch},
};

/// What a program may have in flight.
const PIPE_BYTES: usize = 1024 * 1024;
/// How long the rest of the outputs is waited for after the death of all.
const DRAIN: Duration = Duration::from_secs(5);
/// How long the removal of the control group is tried.
const CLEAN_UP: Duration = Duration::from_secs(10);
/// How long the link's last words may take. The exit record is written before.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How an attempt at being the shim ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShimExit {
    /// There is an exit record.
    Recorded,
    /// The directory has or had another shim. Nothing was changed.
    Refused,
    /// Not even an exit record could be written; `shim.err` may say why.
    Failed,
}

/// Is the shim of the attempt in `dir`: becomes independent of its parent, executes the specification, and returns when
/// nothing of the workload is left and the exit record is written. Must be called by a process that has one thread and does
/// nothing else: it closes every descriptor that it finds.
pub fn run(dir: &Path) -> ShimExit {
    run_as(dir, Place::Independent)
}

/// The same as the first process of a container, which is what confines the program: standard output and input are the
/// link ([`super::link`]), the container's control groups are read, and every process of the container is the workload's.
pub fn run_contained(dir: &Path) -> ShimExit {
    run_as(dir, Place::Contained { linked: true })
}

/// The same in a container whose standard streams lead to nobody: there is no link, and nothing is written to them. The
/// specification's environment goes over the container's own, which has what the image says; so does its working directory,
/// which is empty where the container's own is meant.
pub fn run_unlinked(dir: &Path) -> ShimExit {
    run_as(dir, Place::Contained { linked: false })
}

/// Where the shim is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// On a machine, as a process of its own.
    Independent,
    /// The first process of a container.
    Contained {
        /// The standard streams are the link.
        linked: bool,
    },
}

/// The link's ends, where this is a container's shim.
#[derive(Debug, Default)]
struct Link {
    out: Option<SharedOut>,
    requests: Option<LinkIn>,
}

fn run_as(dir: &Path, place: Place) -> ShimExit {
    if record::was_claimed(dir) {
        return ShimExit::Refused;
    }
    let clock = SystemClock::new();
    let working_dir = std::env::current_dir();
    let claimed = become_independent(dir, place).and_then(|link| Ok((claim(dir)?, link)));
    let (claimed, link) = match claimed {
        Ok(claimed) => claimed,
        Err(error) => {
            tell(dir, &error);
            return ShimExit::Failed;
        }
    };
    if !claimed {
        return ShimExit::Refused;
    }
    // The end must be sayable on a disk that the log has filled meanwhile.
    let ending = match Reserved::take(dir, name::EXIT) {
        Ok(ending) => ending,
        Err(error) => {
            tell(dir, &error.to_string());
            return ShimExit::Failed;
        }
    };
    let out = link.out.clone();
    let record = match record::read::<ExecSpec>(dir, name::EXEC) {
        Ok(Some(mut spec)) => {
            if matches!(place, Place::Contained { linked: false }) {
                spec.env = below(own_environment(), spec.env);
                if spec.working_dir.is_empty() {
                    let own = working_dir.ok().and_then(|dir| dir.into_os_string().into_string().ok());
                    spec.working_dir = own.unwrap_or_else(|| "/".to_owned());
                }
            }
            execute(dir, &spec, &clock, &ending, link)
        }
        Ok(None) => failed(&clock, format!("{} is missing", name::EXEC)),
        Err(error) => failed(&clock, error.to_string()),
    };
    let _ = fs::remove_file(dir.join(name::CONTROL));
    match ending.write(&record) {
        Ok(()) => {
            if let Some(out) = out {
                let mut out = out.borrow_mut();
                out.record(Kind::Ended, &record);
                out.finish(&clock, LAST_WORDS);
            }
            ShimExit::Recorded
        }
        Err(error) => {
            tell(dir, &error.to_string());
            ShimExit::Failed
        }
    }
}

/// The environment that the container gives its first process: mostly its image's own.
fn own_environment() -> BTreeMap<String, String> {
    // What is not UTF-8 cannot be meant for a specification that is.
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

/// `over` on top of `own`, without what Kubernetes adds to every container: the pod's name, and where its API is.
fn below(own: BTreeMap<String, String>, over: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut env = own;
    env.retain(|name, _| name != "HOSTNAME" && !name.starts_with("KUBERNETES_"));
    env.extend(over);
    env
}

fn claim(dir: &Path) -> Result<bool, String> {
    let pid = rustix::process::getpid().as_raw_pid();
    let shim = record::identify(pid).map_err(|error| format!("/proc: {error}"))?;
    record::write_first(dir, name::SHIM, &shim).map_err(|error| error.to_string())
}

/// Leaves the session, the descriptors, the directory and the signals of the parent behind.
fn become_independent(dir: &Path, place: Place) -> Result<Link, String> {
    // A parent may have had SIGCHLD ignored, which hides how a child ended.
    sys::reset_signals();
    sys::close_all_but([0, 1, 2]).map_err(|error| format!("closing descriptors: {error}"))?;
    let step = |what: &'static str| move |error: Errno| format!("{what}: {error}");
    if !sys::leads_session() {
        rustix::process::setsid().map_err(step("setsid (the shim must not lead a process group)"))?;
    }
    rustix::process::umask(Mode::from_raw_mode(0o077));
    let null = child::null().map_err(step("/dev/null"))?;
    let mut link = Link::default();
    if let Place::Contained { linked } = place {
        let copy =
            |fd: rustix::fd::BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, 3).map_err(step("the link"));
        // Without a link its place is taken by nothing at all, so that all else is the same.
        let (out, requests) = if linked {
            (rustix::stdio::stdout(), rustix::stdio::stdin())
        } else {
            (null.as_fd(), null.as_fd())
        };
        link.out = Some(Rc::new(RefCell::new(LinkOut::new(copy(out)?))));
        link.requests = Some(LinkIn::new(copy(requests)?));
    }
    let flags = OFlags::CREATE | OFlags::APPEND | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let errors = rustix::fs::open(dir.join(name::ERRORS), flags, Mode::from_raw_mode(0o600))
        .map_err(step(name::ERRORS))?;
    rustix::stdio::dup2_stdin(&null).map_err(step("standard input"))?;
    rustix::stdio::dup2_stdout(&null).map_err(step("standard output"))?;
    rustix::stdio::dup2_stderr(&errors).map_err(step("standard error"))?;
    rustix::process::chdir("/").map_err(step("/"))?;
    for signal in [Signal::HUP, Signal::PIPE, Signal::INT, Signal::QUIT] {
        sys::ignore_signal(signal);
    }
    sys::block_signals(&[Signal::TERM, Signal::CHILD]);
    Ok(link)
}

fn tell(dir: &Path, text: &str) {
    use std::io::Write as _;
    if let Ok(mut file) = fs::File::options().append(true).create(true).open(dir.join(name::ERRORS)) {
        let _ = writeln!(file, "{text}");
    }
}

fn failed(clock: &SystemClock, why: String) -> ExitRecord {
    ExitRecord {
        reason: ExitReason::SetupFailed,
        status: None,
        time: clock.now(),
        usage: Usage::default(),
        evidence: vec![("shim".to_owned(), why)],
    }
}

/// Executes it and says how it ended.
fn execute(dir: &Path, spec: &ExecSpec, clock: &SystemClock, ending: &Reserved, link: Link) -> ExitRecord {
    if let Err(fault) = check(spec) {
        return failed(clock, fault);
    }
    let own_groups = link.out.as_ref().map(|_| cgroup::of_this_container());
    let started = start(dir, spec, clock, link);
    let mut watch = match started {
        Ok(watch) => watch,
        Err(fault) => {
            let mut record = failed(clock, fault);
            clean_up(spec, &mut record.evidence);
            return record;
        }
    };
    watch.until_the_first_is_gone();
    // In a pid namespace the end of the first process is the end of all, by the kernel's own waiting. Elsewhere all orphans
    // have become ours, so having no child means that there is none.
    while watch.reap() {
        if let Some(plan) = &spec.cgroup {
            cgroup::kill(plan);
        }
        tree::kill_descendants();
        thread::sleep(Duration::from_millis(2));
    }
    if !watch.drain(DRAIN) {
        watch.note("shim", format!("an output was still open {DRAIN:?} after the death of all processes"));
    }
    if watch.parts.spool.has_failed() {
        // The log's own word of what is missing fits into this.
        ending.give_way();
    }
    for note in watch.parts.spool.finish(clock) {
        watch.note("shim", note);
    }
    let log_bytes = watch.parts.spool.end();
    let seen = std::mem::take(&mut watch.seen);
    let counters = spec.cgroup.as_ref().or(own_groups.as_ref()).map(cgroup::counters).unwrap_or_default();
    let mut record = judge(seen, counters, log_bytes, clock);
    clean_up(spec, &mut record.evidence);
    record
}

fn clean_up(spec: &ExecSpec, evidence: &mut Vec<(String, String)>) {
    if let Some(plan) = &spec.cgroup
        && let Err(left) = cgroup::destroy(plan, CLEAN_UP)
    {
        evidence.push(("cgroup".to_owned(), format!("could not be removed: {left}")));
    }
}

/// Demands that contradict one another, or this process's own rights.
fn check(spec: &ExecSpec) -> Result<(), String> {
    let namespaces = spec.namespaces;
    if spec.argv.is_empty() {
        return Err("argv is empty".to_owned());
    }
    if !namespaces.mount {
        let plain = matches!(&spec.root, Root::Host { hidden } if hidden.is_empty());
        if !plain || spec.read_only_root || !spec.mounts.is_empty() {
            return Err("a root, hidden directories and mounts need a mount namespace".to_owned());
        }
    }
    if namespaces.user && rustix::process::geteuid().is_root() {
        return Err("root needs no user namespace, and would be the program's user outside of it".to_owned());
    }
    for mount in &spec.mounts {
        if let Some(fault) = path::fault(&mount.target) {
            return Err(format!("mount target {:?} {fault}", mount.target));
        }
    }
    if spec.working_dir != "/"
        && let Some(fault) = path::fault(&spec.working_dir)
    {
        return Err(format!("working directory {:?} {fault}", spec.working_dir));
    }
    Ok(())
}

/// Prepares everything and starts the first process.
///
/// # Errors
/// What could not be had. The control group may have been made.
fn start<'a>(
    dir: &'a Path,
    spec: &'a ExecSpec,
    clock: &'a SystemClock,
    link: Link,
) -> Result<Watch<'a>, String> {
    let step = |what: &'static str| move |error: Errno| format!("{what}: {error}");
    let argv = CStrings::new(spec.argv.iter().cloned())?;
    let env = CStrings::new(spec.env.iter().map(|(key, value)| format!("{key}={value}")))?;
    let mut spool =
        Spool::create(dir, spec.log_limit_bytes).map_err(|error| format!("{}: {error}", name::LOG))?;
    spool.copy_to(link.out.clone());
    let dir_fd = rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| format!("{}: {error}", dir.display()))?;
    let mut control = Control::bind(&dir_fd).map_err(step("control socket"))?;
    control.serve_link(link.requests);
    let signals =
        sys::signal_fd(&[Signal::TERM, Signal::CHILD]).map_err(|error| format!("signalfd: {error}"))?;
    if !spec.namespaces.pid {
        // Any number but 0 means yes.
        rustix::process::set_child_subreaper(Some(Pid::INIT)).map_err(step("subreaper"))?;
    }
    if let Some(plan) = &spec.cgroup {
        cgroup::create(plan)?;
    }
    let streams = Streams::make(spec).map_err(step("pipes"))?;
    let (channel, theirs) = child::channel().map_err(step("socketpair"))?;
    let plan = Plan {
        spec,
        argv,
        env,
        dir: absolute(dir)?,
        channel: theirs.as_fd(),
        stdio: [streams.stdin.as_fd(), streams.stdout.as_fd(), streams.stderr.as_fd()],
    };
    let first = match sys::fork(clone_flags(spec)).map_err(|error| format!("namespaces: {error}"))? {
        Forked::Parent(pid) => pid,
        Forked::Child => {
            // A panic must not unwind into the shim's own code in this process.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| child::first_process(&plan)));
            sys::exit_now(1);
        }
    };
    drop(theirs);
    let admitted = admit(dir, spec, first, &channel);
    let first_handle = admitted.inspect_err(|_| {
        // Without the byte that it waits for it has done nothing and does nothing.
        let _ = rustix::process::kill_process(first, Signal::KILL);
        let _ = sys::wait4(Some(first), true);
    })?;
    Ok(Watch::new(Parts {
        clock,
        spec,
        dir,
        spool,
        control,
        signals,
        channel,
        first,
        first_handle,
        outputs: streams.outputs,
        input: streams.input,
        link: link.out,
    }))
}

fn absolute(dir: &Path) -> Result<PathBuf, String> {
    fs::canonicalize(dir).map_err(|error| format!("{}: {error}", dir.display()))
}

pub(crate) fn clone_flags(spec: &ExecSpec) -> i32 {
    let namespaces = spec.namespaces;
    [
        (namespaces.user, libc::CLONE_NEWUSER),
        (namespaces.mount, libc::CLONE_NEWNS),
        (namespaces.pid, libc::CLONE_NEWPID),
        (namespaces.network, libc::CLONE_NEWNET),
        (namespaces.ipc, libc::CLONE_NEWIPC),
        (namespaces.uts, libc::CLONE_NEWUTS),
    ]
    .into_iter()
    .filter_map(|(wanted, flag)| wanted.then_some(flag))
    .fold(0, |flags, flag| flags | flag)
}

/// Gives the first process its user, its control group and its record, then lets it go.
fn admit(dir: &Path, spec: &ExecSpec, first: Pid, channel: &OwnedFd) -> Result<OwnedFd, String> {
    let pid = first.as_raw_pid();
    let handle =
        rustix::process::pidfd_open(first, PidfdFlags::empty()).map_err(|error| format!("pidfd: {error}"))?;
    map_user(spec, first)?;
    if !spec.namespaces.pid {
        // The program sees this process and may be of the same user.
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
            .map_err(|error| format!("dumpable: {error}"))?;
    }
    if let Some(plan) = &spec.cgroup {
        cgroup::join(plan, pid)?;
    }
    let identity = record::identify(pid).map_err(|error| format!("/proc/{pid}: {error}"))?;
    record::write(dir, name::INIT, &identity).map_err(|error| error.to_string())?;
    rustix::io::write(channel, &[1]).map_err(|error| format!("the first process: {error}"))?;
    Ok(handle)
}

/// Makes the caller the program's user in a new user namespace, where there is one.
///
/// # Errors
/// What could not be written, with the file's name.
pub(crate) fn map_user(spec: &ExecSpec, first: Pid) -> Result<(), String> {
    if !spec.namespaces.user {
        return Ok(());
    }
    let ours = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    for (file, text) in [
        // Without this the kernel lets nobody map a group.
        ("setgroups", "deny".to_owned()),
        ("gid_map", format!("{} {} 1", spec.user.gid, ours.1)),
        ("uid_map", format!("{} {} 1", spec.user.uid, ours.0)),
    ] {
        let path = format!("/proc/{}/{file}", first.as_raw_pid());
        fs::write(&path, text).map_err(|error| format!("{path}: {error}"))?;
    }
    Ok(())
}

/// The ends of the program's streams.
struct Streams {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
    outputs: Vec<Output>,
    input: Input,
}

impl Streams {
    fn make(spec: &ExecSpec) -> Result<Self, Errno> {
        let mut streams = Self {
            stdin: child::null()?,
            stdout: child::null()?,
            stderr: child::null()?,
            outputs: Vec::new(),
            input: Input::None,
        };
        if spec.terminal.is_some() {
            return Ok(streams);
        }
        let mut output = |stream| -> Result<OwnedFd, Errno> {
            let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            // A user may have used up their share of it; then the pipe is a small one.
            let _ = rustix::pipe::fcntl_setpipe_size(&read, PIPE_BYTES);
            rustix::io::ioctl_fionbio(&read, true)?;
            streams.outputs.push(Output::new(read, stream));
            Ok(write)
        };
        streams.stdout = output(LogStream::Stdout)?;
        streams.stderr = output(LogStream::Stderr)?;
        if spec.stdin {
            let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            rustix::io::ioctl_fionbio(&write, true)?;
            streams.stdin = read;
            streams.input = Input::Pipe(write);
        }
        Ok(streams)
    }
}

/// Makes the exit record of what was seen.
fn judge(seen: Seen, counters: Counters, log_bytes: u64, clock: &SystemClock) -> ExitRecord {
    let mut evidence = seen.evidence;
    let mut note = |source: &str, detail: String| evidence.push((source.to_owned(), detail));
    let first_status = seen.first.map_or(0, |first| first.status);
    let status = match (seen.not_executed, seen.ended) {
        (Some(Errno::NOENT | Errno::NOTDIR), _) => Some(ExitStatus::Code(127)),
        (Some(_), _) => Some(ExitStatus::Code(126)),
        (None, Some(ended)) => Some(exit_status(ended.status)),
        // It died with the first process, before its end could be told.
        (None, None) if seen.started.is_some() => Some(ExitStatus::Signal(libc::SIGKILL)),
        (None, None) => None,
    };
    if counters.oom_kills > 0 {
        note("cgroup", format!("{} processes were killed at the memory limit", counters.oom_kills));
    }
    if counters.forks_refused > 0 {
        note("cgroup", format!("{} forks were refused at the limit of processes", counters.forks_refused));
    }
    let reason = if let Some(fault) = seen.fault {
        note("shim", fault);
        ExitReason::SetupFailed
    } else if let Some(decided) = seen.decided {
        decided
    } else if seen.started.is_none() && seen.not_executed.is_none() {
        note("shim", format!("the first process ended during the set-up: {:?}", exit_status(first_status)));
        if counters.oom_kills > 0 { ExitReason::OomKilled } else { ExitReason::SetupFailed }
    } else {
        if seen.ended.is_none() {
            note(
                "shim",
                format!("the first process was ended from outside: {:?}", exit_status(first_status)),
            );
        }
        match status {
            // 137 is what a shell says whose last command was killed: passed on, the limit is still what ended the run.
            Some(ExitStatus::Signal(libc::SIGKILL) | ExitStatus::Code(137)) if counters.oom_kills > 0 => {
                ExitReason::OomKilled
            }
            _ => ExitReason::Exited,
        }
    };
    if seen.killed {
        note("shim", "SIGKILL was sent after the grace period".to_owned());
    }
    let now = clock.monotonic();
    let wall = seen
        .started
        .map_or(Duration::ZERO, |started| seen.ended.map_or(now, |ended| ended.at).saturating_sub(started));
    // What the first process reports contains the program and all that was waited for.
    let cpu = seen
        .first
        .map_or(Duration::ZERO, |first| first.cpu)
        .max(seen.ended.map_or(Duration::ZERO, |ended| ended.cpu));
    let memory = seen.ended.map_or(0, |ended| ended.max_memory_bytes);
    ExitRecord {
        reason,
        status: if reason == ExitReason::SetupFailed { None } else { status },
        time: seen.ended.map_or_else(|| clock.now(), |ended| ended.time),
        usage: Usage {
            wall,
            cpu: counters.cpu.unwrap_or(cpu),
            max_memory_bytes: counters.max_memory_bytes.unwrap_or(memory),
            log_bytes,
            ..Usage::default()
        },
        evidence,
    }
}

fn exit_status(status: i32) -> ExitStatus {
    if libc::WIFSIGNALED(status) {
        ExitStatus::Signal(libc::WTERMSIG(status))
    } else {
        ExitStatus::Code(libc::WEXITSTATUS(status))
    }
}
