//! The processes of the workload: the first one, which sets everything up and waits, and the program.
//!
//! The first process is pid 1 of the pid namespace where there is one. It dies with the shim, and with it dies everything
//! in the namespace. It tells the shim what happens by [`Message`]s over a socket that no program inherits.

use std::{
    ffi::CString,
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags,
    },
    process::{DumpableBehavior, Gid, Pid, Resource, Rlimit, Signal, Uid},
    pty::OpenptFlags,
    termios::Winsize,
    thread::{CapabilitySet, CapabilitySets},
};

use super::{
    protocol::ExecSpec,
    root,
    sys::{self, CStrings, Forked},
};

/// Longest message, in bytes.
const MAX_MESSAGE: usize = 4096;
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the workload's processes tell the shim, in this order as far as it comes.
#[derive(Debug)]
pub(crate) enum Message {
    /// The other side of the terminal, for the shim.
    Terminal(OwnedFd),
    /// The program's process exists; this is its pid as the shim sees it.
    Born(Pid),
    /// Something that the specification demands cannot be had. Nothing else comes.
    Failed(String),
    /// The program cannot be executed.
    NotExecuted(Errno),
    /// The program was executed, unless the message before said that it was not.
    Executed,
    /// The program has ended.
    Ended {
        /// As `wait` reports it.
        status: i32,
        /// Of the program and the children that it waited for.
        cpu: Duration,
        /// The largest of them.
        max_memory_bytes: u64,
    },
}

/// Everything that the workload's processes need, prepared by the shim.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) spec: &'a ExecSpec,
    pub(crate) argv: CStrings,
    pub(crate) env: CStrings,
    /// The attempt's directory, absolute.
    pub(crate) dir: PathBuf,
    /// To the shim.
    pub(crate) channel: BorrowedFd<'a>,
    /// Standard input, output, error. With a terminal the last two are not used.
    pub(crate) stdio: [BorrowedFd<'a>; 3],
}

/// Receives the next message. `Ok(None)`: every process that could send one is gone.
///
/// # Errors
/// `EAGAIN`: there is none now.
pub(crate) fn receive(channel: &OwnedFd) -> Result<Option<Message>, Errno> {
    let mut buffer = [0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1), ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let length = loop {
        let mut parts = [IoSliceMut::new(&mut buffer)];
        match rustix::net::recvmsg(channel, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            received => break received?.bytes,
        }
    };
    let (mut descriptor, mut sender) = (None, None);
    for message in control.drain() {
        match message {
            RecvAncillaryMessage::ScmRights(fds) => descriptor = fds.last(),
            RecvAncillaryMessage::ScmCredentials(credentials) => sender = Some(credentials.pid),
            _ => {}
        }
    }
    let Some((&tag, payload)) = buffer[..length].split_first() else { return Ok(None) };
    let word = |at: usize| {
        payload.get(at..at + 8).map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().unwrap_or_default()))
    };
    #[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "sent from an i32")]
    let number = word(0) as i32;
    Ok(match (tag, descriptor, sender) {
        (b'T', Some(descriptor), _) => Some(Message::Terminal(descriptor)),
        (b'B', _, Some(pid)) => Some(Message::Born(pid)),
        (b'F', ..) => Some(Message::Failed(String::from_utf8_lossy(payload).into_owned())),
        (b'N', ..) => Some(Message::NotExecuted(Errno::from_raw_os_error(number))),
        (b'X', ..) => Some(Message::Executed),
        (b'E', ..) => Some(Message::Ended {
            status: number,
            cpu: Duration::from_micros(word(8)),
            max_memory_bytes: word(16),
        }),
        (tag, ..) => Some(Message::Failed(format!("the first process sent {tag}"))),
    })
}

fn send(channel: BorrowedFd<'_>, tag: u8, payload: &[u8], descriptor: Option<BorrowedFd<'_>>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.map(|descriptor| [descriptor]);
    if let Some(descriptors) = &descriptors {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let payload = &payload[..payload.len().min(MAX_MESSAGE - 1)];
    // Where the shim is gone, so are we in a moment.
    let _ = rustix::net::sendmsg(
        channel,
        &[IoSlice::new(&[tag]), IoSlice::new(payload)],
        &mut control,
        SendFlags::NOSIGNAL,
    );
}

fn send_numbers(channel: BorrowedFd<'_>, tag: u8, numbers: &[u64]) {
    let payload: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    send(channel, tag, &payload, None);
}

#[allow(clippy::cast_sign_loss, reason = "read back as it was")]
fn as_word(number: i32) -> u64 {
    i64::from(number) as u64
}

/// The life of the first process. It waits for one byte from the shim before it does anything.
pub(crate) fn first_process(plan: &Plan<'_>) -> ! {
    // Set before the wait: a shim that dies before is noticed by the end of the channel, one that dies later by the signal.
    let tied = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    let told = told_to_go(plan.channel);
    if tied.is_err() || !told {
        sys::exit_now(1);
    }
    if let Err(fault) = set_up_and_wait(plan) {
        send(plan.channel, b'F', fault.as_bytes(), None);
    }
    sys::exit_now(1)
}

fn told_to_go(channel: BorrowedFd<'_>) -> bool {
    let mut byte = [0];
    loop {
        match rustix::io::read(channel, &mut byte) {
            Err(Errno::INTR) => {}
            got => return matches!(got, Ok(1)),
        }
    }
}

/// # Errors
/// What could not be set up. The program was not started.
fn set_up_and_wait(plan: &Plan<'_>) -> Result<(), String> {
    let spec = plan.spec;
    let step = |what: &'static str| move |error: Errno| format!("{what}: {error}");
    // Descriptors of the shim must not stay open here: an open end of a pipe is a reader or a writer.
    let [input, output, errors] = plan.stdio.map(|fd| fd.as_raw_fd());
    // The first three stay, so that nothing else gets their numbers before the program's streams do.
    sys::close_all_but([0, 1, 2, plan.channel.as_raw_fd(), input, output, errors])
        .map_err(|error| format!("closing descriptors: {error}"))?;
    rustix::process::umask(Mode::empty());
    if spec.namespaces.uts {
        rustix::system::sethostname(host_name(spec).as_bytes()).map_err(step("host name"))?;
    }
    if spec.namespaces.network {
        sys::loopback_up().map_err(|error| format!("loopback: {error}"))?;
    }
    if spec.namespaces.mount {
        root::enter(spec, &plan.dir)?;
    }
    let terminal = match spec.terminal {
        Some(size) => Some(
            open_terminal(
                plan,
                Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 },
            )
            .map_err(step("terminal"))?,
        ),
        None => None,
    };
    drop_bounding_set().map_err(step("dropping the bounding set"))?;
    rustix::thread::set_no_new_privs(true).map_err(step("no_new_privs"))?;
    // The program, be it of the same user, cannot look into this process: into the channel above all.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("dumpable"))?;

    // The wait until the program is executed orders the messages, and keeps this process from being in its way.
    let program = match sys::fork_again(libc::CLONE_VFORK) {
        Ok(Forked::Child) => {
            let fault = become_program(plan, terminal.as_ref().map(AsFd::as_fd));
            match fault {
                Fault::Setup(text) => send(plan.channel, b'F', text.as_bytes(), None),
                Fault::Execute(error) => send_numbers(plan.channel, b'N', &[as_word(error.raw_os_error())]),
            }
            sys::exit_now(127)
        }
        Ok(Forked::Parent(pid)) => pid,
        Err(error) => return Err(format!("starting the program: {error}")),
    };
    send(plan.channel, b'X', &[], None);
    drop(terminal);
    // From here on only the program and its children hold their ends.
    sys::close_all_but([plan.channel.as_raw_fd()])
        .map_err(|error| format!("closing descriptors: {error}"))?;
    rustix::thread::set_capabilities(None, NO_CAPABILITIES).map_err(step("dropping capabilities"))?;
    loop {
        match sys::wait4(None, true) {
            Ok(Some(ended)) if ended.pid == program.as_raw_pid() => {
                let cpu = u64::try_from(ended.cpu.as_micros()).unwrap_or(u64::MAX);
                send_numbers(plan.channel, b'E', &[as_word(ended.status), cpu, ended.max_memory_bytes]);
                // In a pid namespace the kernel now kills what is left, and lets this process end after it.
                sys::exit_now(0);
            }
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(format!("waiting for the program: {error}")),
        }
    }
}

fn host_name(spec: &ExecSpec) -> String {
    // The end of the id is its random part.
    let run = spec.attempt.run.to_string();
    format!("run-{}-{}", &run[run.len() - 12..], spec.attempt.number)
}

fn open_terminal(plan: &Plan<'_>, size: Winsize) -> Result<OwnedFd, Errno> {
    let ours = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::unlockpt(&ours)?;
    let theirs = rustix::pty::ioctl_tiocgptpeer(
        &ours,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )?;
    rustix::termios::tcsetwinsize(&ours, size)?;
    give_to_user(plan, theirs.as_fd())?;
    send(plan.channel, b'T', &[], Some(ours.as_fd()));
    Ok(theirs)
}

/// Lets the program open its own standard streams anew, as `/dev/stdout` does.
fn give_to_user(plan: &Plan<'_>, file: BorrowedFd<'_>) -> Result<(), Errno> {
    if plan.spec.namespaces.user || !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    rustix::fs::fchown(file, Some(Uid::from_raw_unchecked(plan.spec.user.uid)), None)
}

const NO_CAPABILITIES: CapabilitySets = CapabilitySets {
    effective: CapabilitySet::empty(),
    permitted: CapabilitySet::empty(),
    inheritable: CapabilitySet::empty(),
};

fn drop_bounding_set() -> Result<(), Errno> {
    for bit in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The kernel knows no more of them.
            Err(Errno::INVAL) if bit > 0 => return Ok(()),
            // Who holds no capabilities may not drop any from this set either. With `no_new_privs` it grants nothing.
            Err(Errno::PERM) if rustix::thread::capabilities(None)?.permitted.is_empty() => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

enum Fault {
    Setup(String),
    Execute(Errno),
}

fn become_program(plan: &Plan<'_>, terminal: Option<BorrowedFd<'_>>) -> Fault {
    send(plan.channel, b'B', &[], None);
    match prepare_program(plan, terminal) {
        Ok(()) => Fault::Execute(execute(plan)),
        Err(text) => Fault::Setup(text),
    }
}

fn prepare_program(plan: &Plan<'_>, terminal: Option<BorrowedFd<'_>>) -> Result<(), String> {
    let spec = plan.spec;
    let step = |what: &'static str| move |error: Errno| format!("{what}: {error}");
    rustix::process::setsid().map_err(step("setsid"))?;
    if let Some(terminal) = terminal {
        rustix::process::ioctl_tiocsctty(terminal).map_err(step("controlling terminal"))?;
    }
    let [input, output, errors] = plan.stdio;
    let input = if spec.stdin { terminal.unwrap_or(input) } else { input };
    for file in [input, output, errors] {
        // Pipes only: `/dev/null` is everybody's.
        if rustix::fs::fstat(file)
            .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Fifo)
        {
            give_to_user(plan, file).map_err(step("standard streams"))?;
        }
    }
    rustix::stdio::dup2_stdin(input).map_err(step("standard input"))?;
    rustix::stdio::dup2_stdout(terminal.unwrap_or(output)).map_err(step("standard output"))?;
    rustix::stdio::dup2_stderr(terminal.unwrap_or(errors)).map_err(step("standard error"))?;
    set_limits(spec).map_err(step("resource limits"))?;

    let (uid, gid) = (Uid::from_raw_unchecked(spec.user.uid), Gid::from_raw_unchecked(spec.user.gid));
    // In a user namespace the supplementary groups of the caller cannot be dropped: the kernel forbids it there.
    if !spec.namespaces.user && rustix::process::geteuid().is_root() {
        rustix::thread::set_thread_groups(&[]).map_err(step("groups"))?;
    }
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(step("gid"))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(step("uid"))?;
    rustix::thread::clear_ambient_capability_set().map_err(step("ambient capabilities"))?;
    rustix::thread::set_capabilities(None, NO_CAPABILITIES).map_err(step("capabilities"))?;
    // The change of user cleared it. It is what kills the program with the shim where there is no pid namespace.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(step("death signal"))?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    rustix::process::chdir(spec.working_dir.as_str())
        .map_err(|error| format!("working directory {}: {error}", spec.working_dir))?;
    sys::reset_signals();
    Ok(())
}

fn set_limits(spec: &ExecSpec) -> Result<(), Errno> {
    let limit = |resource, value: Option<u64>| -> Result<(), Errno> {
        let Some(value) = value else { return Ok(()) };
        // A hard limit is never raised: that needs a capability. One that is lower already is kept.
        let value = rustix::process::getrlimit(resource).maximum.map_or(value, |maximum| maximum.min(value));
        rustix::process::setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })
    };
    limit(Resource::Core, Some(0))?;
    limit(Resource::Fsize, spec.file_size_bytes)?;
    limit(Resource::As, spec.address_space_bytes)?;
    limit(Resource::Nproc, spec.nproc)
}

/// Looks the program up as a shell would, and becomes it.
fn execute(plan: &Plan<'_>) -> Errno {
    let name = plan.spec.argv.first().map_or("", String::as_str);
    let try_path = |path: String| match CString::new(path) {
        Ok(path) => sys::execve(&path, &plan.argv, &plan.env),
        Err(_) => Errno::NOENT,
    };
    if name.contains('/') {
        return try_path(name.to_owned());
    }
    if name.is_empty() {
        return Errno::NOENT;
    }
    let path = plan.spec.env.get("PATH").map_or(DEFAULT_PATH, String::as_str);
    let mut denied = None;
    for directory in path.split(':') {
        // An empty entry means the working directory.
        let directory = if directory.is_empty() { "." } else { directory };
        match try_path(format!("{directory}/{name}")) {
            Errno::NOENT | Errno::NOTDIR => {}
            Errno::ACCESS => denied = Some(Errno::ACCESS),
            error => return error,
        }
    }
    denied.unwrap_or(Errno::NOENT)
}

/// A pair of sockets for messages: the shim's end does not wait and learns who sends.
///
/// # Errors
/// The system's.
pub(crate) fn channel() -> Result<(OwnedFd, OwnedFd), Errno> {
    let (ours, theirs) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::net::sockopt::set_socket_passcred(&ours, true)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((ours, theirs))
}

/// Opens `/dev/null`.
///
/// # Errors
/// The system's.
pub(crate) fn null() -> Result<OwnedFd, Errno> {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}
