//! The backend's side of the protocol. Everything here blocks for the time of a file access, or up to the deadline given.
//!
//! The order of things: [`write_spec`], [`spawn`], then [`started`] and a [`SpoolReader`] until [`exit`] is there and the
//! reader has no more. After a restart the same functions find everything in the directory: [`shim`] and [`is_alive`] say
//! whether somebody still works on it. A dead shim ([`is_alive`] is false) without an exit record means that nobody knows
//! how the program ended; look for the record once more after the shim was seen dead, for it is written at the end.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    os::unix::{fs::OpenOptionsExt as _, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use runner_core::clock::{Clock as _, SystemClock};
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
    process::{Pid, PidfdFlags, Signal},
};

use super::{
    cgroup,
    protocol::{ControlReply, ControlRequest, ExecSpec, ExitRecord, ShimRecord, StartedRecord, name},
    record,
};
pub use super::{
    reader::{SpoolError, SpoolReader},
    record::{RecordError, is_alive},
};

/// Longest line on the control socket, in bytes, its end included.
pub const MAX_CONTROL_LINE: usize = 128 * 1024;
/// Most bytes that one [`ControlRequest::Stdin`] may carry.
pub const MAX_STDIN_BYTES: usize = 64 * 1024;

const POLL: Duration = Duration::from_millis(5);

/// Writes the specification. It must be complete before [`spawn`].
///
/// # Errors
/// The file system's.
pub fn write_spec(dir: &Path, spec: &ExecSpec) -> Result<(), RecordError> {
    record::write(dir, name::EXEC, spec)
}

/// The specification that was written.
///
/// # Errors
/// Where it is there and cannot be understood.
pub fn spec(dir: &Path) -> Result<Option<ExecSpec>, RecordError> {
    record::read(dir, name::EXEC)
}

/// Who the shim is or was. `None`: it did not get so far (yet).
///
/// # Errors
/// Where the record is there and cannot be understood.
pub fn shim(dir: &Path) -> Result<Option<ShimRecord>, RecordError> {
    record::read(dir, name::SHIM)
}

/// When the program was started. `None`: it was not (yet).
///
/// # Errors
/// Where the record is there and cannot be understood.
pub fn started(dir: &Path) -> Result<Option<StartedRecord>, RecordError> {
    record::read(dir, name::STARTED)
}

/// How the program ended. `None`: it did not, or nobody knows.
///
/// # Errors
/// Where the record is there and cannot be understood.
pub fn exit(dir: &Path) -> Result<Option<ExitRecord>, RecordError> {
    record::read(dir, name::EXIT)
}

/// Starts the shim: `AGENT exec DIR`, with nothing of this process's environment, files and directory. It makes itself
/// independent of its parent. What it says before that (the dynamic linker's words, too) goes where its errors go. The caller waits for the child when it ends ([`Child::wait`]), or lets it become a zombie,
/// which counts as dead. A second shim for one directory ends at once and changes nothing.
///
/// # Errors
/// Where the agent cannot be executed.
pub fn spawn(agent: &Path, dir: &Path) -> io::Result<Child> {
    let dir = std::path::absolute(dir)?;
    let errors = fs::File::options().create(true).append(true).mode(0o600).open(dir.join(name::ERRORS));
    Command::new(agent)
        .arg("exec")
        .arg(dir)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // A disk that is full must not keep it from saying so in its exit record.
        .stderr(errors.map_or_else(|_| Stdio::null(), Stdio::from))
        .spawn()
}

/// A request that was not answered.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// There is no control socket, or nobody serves it: the shim has not begun or has ended.
    #[error("no shim serves the control socket")]
    Gone,
    /// The deadline passed. Whether the request takes effect is not known.
    #[error("no answer in {0:?}")]
    Deadline(Duration),
    /// The request is longer than [`MAX_CONTROL_LINE`].
    #[error("a request of {0} bytes")]
    TooLong(usize),
    /// The socket failed, or the answer is malformed.
    #[error("control socket: {0}")]
    Io(#[from] io::Error),
}

/// Makes one request and waits for its answer, at most for `deadline`. Standard input is answered when the program's pipe
/// has taken it, which may be never.
///
/// # Errors
/// See [`ControlError`].
pub fn control(
    dir: &Path,
    request: &ControlRequest,
    deadline: Duration,
) -> Result<ControlReply, ControlError> {
    let mut line = serde_json::to_vec(request).map_err(io::Error::other)?;
    line.push(b'\n');
    if line.len() > MAX_CONTROL_LINE {
        return Err(ControlError::TooLong(line.len()));
    }
    let clock = SystemClock::new();
    let left = || match deadline.checked_sub(clock.monotonic()) {
        Some(left) if !left.is_zero() => Ok(left),
        Some(_) | None => Err(ControlError::Deadline(deadline)),
    };
    let judge = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ControlError::Deadline(deadline),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => {
            ControlError::Gone
        }
        _ => ControlError::Io(error),
    };
    let mut socket = loop {
        match connect(dir) {
            Ok(socket) => break socket,
            // The queue of connections is full.
            Err(Errno::AGAIN) => thread::sleep(left()?.min(POLL)),
            Err(Errno::NOENT | Errno::CONNREFUSED) => return Err(ControlError::Gone),
            Err(error) => return Err(ControlError::Io(error.into())),
        }
    };
    socket.set_write_timeout(Some(left()?))?;
    socket.write_all(&line).map_err(judge)?;
    socket.set_read_timeout(Some(left()?))?;
    let mut answer = Vec::new();
    BufReader::new(&socket).take(MAX_CONTROL_LINE as u64).read_until(b'\n', &mut answer).map_err(judge)?;
    if answer.last() != Some(&b'\n') {
        return Err(ControlError::Gone);
    }
    serde_json::from_slice(&answer).map_err(|error| ControlError::Io(io::Error::other(error)))
}

fn connect(dir: &Path) -> Result<UnixStream, Errno> {
    // A socket's address has room for 108 bytes; the directory's path may be longer, so it is named by its descriptor.
    let dir = rustix::fs::open(
        dir,
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    let address = SocketAddrUnix::new(super::control::address(&dir))?;
    // Connecting waits for as long as the queue is full, unless the socket does not wait at all.
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    rustix::net::connect(&socket, &address)?;
    rustix::io::ioctl_fionbio(&socket, false)?;
    Ok(UnixStream::from(socket))
}

/// Kills a process of a record with SIGKILL, after checking that it is the one. With the shim dies its whole tree, and
/// there will be no exit record. `false`: it was dead already.
///
/// # Errors
/// Where it could not be killed, or nothing is known of it.
pub fn kill(record: &ShimRecord) -> io::Result<bool> {
    let Some(pid) = Pid::from_raw(record.pid) else { return Ok(false) };
    // The descriptor is opened first and names one process for ever; then the check, then the signal.
    let process = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(Errno::SRCH) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    if !is_alive(record)? {
        return Ok(false);
    }
    match rustix::process::pidfd_send_signal(&process, Signal::KILL) {
        Ok(()) => Ok(true),
        Err(Errno::SRCH) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Death that could not be proven.
#[derive(Debug, thiserror::Error)]
pub enum NotProven {
    /// Something was still alive at the deadline.
    #[error("still alive after {after:?}: {what}")]
    Alive {
        /// What.
        what: String,
        /// The deadline.
        after: Duration,
    },
    /// The shim died without an exit record, and the attempt had neither a process namespace nor a control group by which
    /// its processes could be found.
    #[error("the shim died early, and nothing tells its processes from others")]
    Untraceable,
    /// A record cannot be read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The system's answer.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Proves that nothing of the attempt is alive, and removes its control group. Waits up to `deadline` for what is dying;
/// after the death of the shim it kills what is left. It does not end a living shim: use [`control`] or [`kill`] before.
///
/// # Errors
/// See [`NotProven`].
pub fn prove_dead(dir: &Path, deadline: Duration) -> Result<(), NotProven> {
    let clock = SystemClock::new();
    let Some(shim) = shim(dir)? else { return Ok(()) };
    wait_for_death(&shim, "the shim", &clock, deadline)?;
    let spec = spec(dir)?;
    let plan = spec.as_ref().and_then(|spec| spec.cgroup.as_ref());
    // The shim writes the exit record after it proved the death of all.
    let proven = exit(dir)?.is_some();
    if !proven {
        let init: Option<ShimRecord> = record::read(dir, name::INIT)?;
        if let Some(init) = &init {
            kill(init)?;
            wait_for_death(init, "the first process", &clock, deadline)?;
        }
        let pid_namespace = spec.as_ref().is_some_and(|spec| spec.namespaces.pid);
        // Without the record of the first process, that process was never told to go on.
        if init.is_some() && !pid_namespace && plan.is_none() {
            return Err(NotProven::Untraceable);
        }
    }
    if let Some(plan) = plan {
        let left = deadline.saturating_sub(clock.monotonic());
        cgroup::destroy(plan, left).map_err(|what| NotProven::Alive { what, after: deadline })?;
    }
    Ok(())
}

fn wait_for_death(
    record: &ShimRecord,
    what: &str,
    clock: &SystemClock,
    deadline: Duration,
) -> Result<(), NotProven> {
    while is_alive(record)? {
        if clock.monotonic() >= deadline {
            return Err(NotProven::Alive { what: format!("{what}, pid {}", record.pid), after: deadline });
        }
        thread::sleep(POLL);
    }
    Ok(())
}

/// What the shim said of its own troubles, for people: the end of `shim.err`, at most 4 KiB. Empty where it had none.
pub fn shim_errors(dir: &Path) -> String {
    const MOST: u64 = 4096;
    let read = || -> io::Result<String> {
        let mut file = record::open_plain(&dir.join(name::ERRORS))?;
        let length = file.metadata()?.len();
        io::Seek::seek(&mut file, io::SeekFrom::Start(length.saturating_sub(MOST)))?;
        let mut bytes = Vec::new();
        file.take(MOST).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_default()
}

/// The agent that lies beside this process's own executable, where there is one.
pub fn agent_beside_us() -> Option<PathBuf> {
    let path = std::env::current_exe().ok()?.with_file_name("runner-agent");
    path.is_file().then_some(path)
}
