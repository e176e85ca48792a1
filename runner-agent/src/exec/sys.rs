//! The system calls that no safe library offers, each in a wrapper that says why it is sound. The only `unsafe` of the
//! shim is here.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
    ptr,
    time::Duration,
};

use rustix::{
    io::Errno,
    mount::MountAttrFlags,
    process::{Pid, Signal},
};

/// Which side of a [`fork`] this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Forked {
    /// The old process, and the child's pid.
    Parent(Pid),
    /// The new process.
    Child,
}

/// Makes a child that is a copy of this process, in new namespaces where `flags` (`CLONE_NEW…`) say so. With `CLONE_VFORK`
/// the parent waits until the child has executed a program or ended.
///
/// The child may do what any process may, allocate included: that is forbidden only where another thread may hold a lock at
/// the moment of the fork, and there is no other thread; it is refused otherwise.
pub(crate) fn fork(flags: libc::c_int) -> io::Result<Forked> {
    let flags = libc::c_long::from(flags | libc::SIGCHLD);
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("a process with threads must not fork"));
    }
    fork_unchecked(flags)
}

/// As [`fork`], in a process that is itself such a child, where `/proc` may be another one's. It has one thread: a fork
/// copies only the one that forks, and nothing here starts any.
pub(crate) fn fork_again(flags: libc::c_int) -> io::Result<Forked> {
    fork_unchecked(libc::c_long::from(flags | libc::SIGCHLD))
}

#[allow(unsafe_code, reason = "no safe library offers clone with namespaces")]
fn fork_unchecked(flags: libc::c_long) -> io::Result<Forked> {
    debug_assert_eq!(flags & libc::c_long::from(libc::CLONE_VM), 0);
    // SAFETY: without CLONE_VM the child gets a copy of the memory, and a null stack means to go on with the copy of this
    // one: a fork. There is one thread (see the callers), so no lock of the allocator or of std is held by another.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::try_from(pid).ok().and_then(Pid::from_raw).map_or(Forked::Child, Forked::Parent))
}

/// Ends this process at once: no destructor and no exit handler of the copied parent runs.
#[allow(unsafe_code, reason = "std::process::exit runs the handlers of the parent")]
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: it takes a number and does not return.
    unsafe { libc::_exit(code) }
}

/// Strings in the form that `execve` takes.
#[derive(Debug)]
pub(crate) struct CStrings {
    strings: Vec<CString>,
}

impl CStrings {
    /// # Errors
    /// The string that has a NUL.
    pub(crate) fn new(strings: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let strings: Result<_, _> = strings
            .into_iter()
            .map(|string| CString::new(string).map_err(|error| format!("a NUL in {:?}", error.into_vec())))
            .collect();
        Ok(Self { strings: strings? })
    }

    fn pointers(&self) -> Vec<*const libc::c_char> {
        self.strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
    }
}

/// Becomes another program. Returns only where that failed.
#[allow(unsafe_code, reason = "rustix offers it only as unsafe too")]
pub(crate) fn execve(path: &CStr, argv: &CStrings, env: &CStrings) -> Errno {
    let (argv, env) = (argv.pointers(), env.pointers());
    // SAFETY: all three are valid C strings and null-terminated arrays of such, which live until the call is over.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), env.as_ptr()) };
    last_errno()
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Whether this process leads its session.
///
/// Not rustix's `getsid`: in a container that was entered from outside, the session's leader has no pid, which the kernel
/// reports as 0 and rustix's type cannot hold.
#[allow(unsafe_code, reason = "rustix's type cannot hold what the kernel may answer")]
pub(crate) fn leads_session() -> bool {
    // SAFETY: it takes no pointer and changes nothing.
    let session = unsafe { libc::getsid(0) };
    session == rustix::process::getpid().as_raw_pid()
}

/// Gives every signal its default action and an empty mask, as a program may expect.
#[allow(unsafe_code, reason = "no safe library resets them all")]
pub(crate) fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL is always a valid action. Numbers that do not exist or cannot be changed are refused without
        // effect.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    set_mask(libc::SIG_SETMASK, &[]);
}

/// Ignores a signal. A child inherits it, until [`reset_signals`].
#[allow(unsafe_code, reason = "no safe library sets it")]
pub(crate) fn ignore_signal(signal: Signal) {
    // SAFETY: SIG_IGN is always a valid action.
    unsafe { libc::signal(signal.as_raw(), libc::SIG_IGN) };
}

/// Lets the signals be delivered no more but by [`signal_fd`]. A child inherits it, until [`reset_signals`].
pub(crate) fn block_signals(signals: &[Signal]) {
    set_mask(libc::SIG_BLOCK, signals);
}

#[allow(unsafe_code, reason = "see `signal_set`")]
fn set_mask(how: libc::c_int, signals: &[Signal]) {
    let set = signal_set(signals);
    // SAFETY: the set is initialised; the old one is not asked for.
    unsafe { libc::sigprocmask(how, &raw const set, ptr::null_mut()) };
}

#[allow(unsafe_code, reason = "sigset_t is filled by C functions")]
fn signal_set(signals: &[Signal]) -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the whole set, sigaddset changes an initialised one; signal numbers are valid.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), signal.as_raw());
        }
        set.assume_init()
    }
}

/// A descriptor that is readable when one of the (blocked) signals has come. It does not wait.
#[allow(unsafe_code, reason = "rustix has no signalfd")]
pub(crate) fn signal_fd(signals: &[Signal]) -> io::Result<OwnedFd> {
    let set = signal_set(signals);
    // SAFETY: -1 asks for a new descriptor; the set is initialised.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    // SAFETY: the descriptor is new and nobody else's.
    if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
}

/// Closes every descriptor but these. Objects of this process that own others must not be used any more; it is called at
/// the start of the shim, where there are none, and in its children, which end by [`exit_now`] or `execve`.
pub(crate) fn close_all_but<const N: usize>(keep: [RawFd; N]) -> io::Result<()> {
    let mut keep = keep.map(RawFd::cast_unsigned);
    keep.sort_unstable();
    let mut first = 0;
    for fd in keep {
        if fd > first {
            close_range(first, fd - 1)?;
        }
        first = fd + 1;
    }
    close_range(first, u32::MAX)
}

#[allow(unsafe_code, reason = "rustix has no close_range")]
fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: see `close_all_but`: no object that is used later owns these descriptors.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How a child ended, and what it and its waited-for children used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Waited {
    pub(crate) pid: i32,
    pub(crate) status: i32,
    pub(crate) cpu: Duration,
    pub(crate) max_memory_bytes: u64,
}

/// Waits for a child, any where `pid` is `None`. `Ok(None)`: none has ended, where `wait` is false.
#[allow(unsafe_code, reason = "rustix does not report what a child used")]
pub(crate) fn wait4(pid: Option<Pid>, wait: bool) -> Result<Option<Waited>, Errno> {
    let mut status = 0;
    // SAFETY: rusage is plain numbers, for which zero is valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    let flags = if wait { 0 } else { libc::WNOHANG };
    // SAFETY: both places are valid for writing for the time of the call.
    let got = unsafe { libc::wait4(pid.map_or(-1, Pid::as_raw_pid), &raw mut status, flags, &raw mut usage) };
    match got {
        0 => Ok(None),
        pid if pid > 0 => Ok(Some(Waited {
            pid,
            status,
            cpu: duration(usage.ru_utime) + duration(usage.ru_stime),
            max_memory_bytes: u64::try_from(usage.ru_maxrss).unwrap_or(0) * 1024,
        })),
        _ => Err(last_errno()),
    }
}

fn duration(time: libc::timeval) -> Duration {
    Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0))
        + Duration::from_micros(u64::try_from(time.tv_usec).unwrap_or(0))
}

#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Adds attributes to a mount (named by a descriptor of its root) and, where `recursive`, to all below it. Linux 5.12.
#[allow(unsafe_code, reason = "rustix has no mount_setattr")]
pub(crate) fn add_mount_attributes(
    mount: BorrowedFd<'_>,
    attributes: MountAttrFlags,
    recursive: bool,
) -> Result<(), Errno> {
    let attr =
        MountAttr { attr_set: u64::from(attributes.bits()), attr_clr: 0, propagation: 0, userns_fd: 0 };
    let recursion = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string, the structure has the layout and the size that the kernel is told.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursion,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(last_errno()) }
}

/// Sends a signal to the process group that the process leads. `ESRCH`: it was waited for already, or leads none. Before
/// Linux 6.9 by number, after the process itself has just been found alive.
#[allow(unsafe_code, reason = "rustix does not offer the flag")]
pub(crate) fn signal_group(process: BorrowedFd<'_>, group: Pid, signal: Signal) -> Result<(), Errno> {
    const PIDFD_SIGNAL_PROCESS_GROUP: u32 = 1 << 2;
    // SAFETY: no information is passed, so the pointer is null.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal.as_raw(),
            ptr::null::<libc::siginfo_t>(),
            PIDFD_SIGNAL_PROCESS_GROUP,
        )
    };
    if result == 0 {
        return Ok(());
    }
    match last_errno() {
        Errno::INVAL => {
            rustix::process::pidfd_send_signal(process, signal)?;
            rustix::process::kill_process_group(group, signal)
        }
        error => Err(error),
    }
}

/// Brings the loopback interface of this network namespace up.
#[allow(unsafe_code, reason = "an ioctl on a structure of C")]
pub(crate) fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: ifreq is plain bytes and numbers, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = libc::c_char::try_from(*from).unwrap_or_default();
    }
    #[allow(clippy::cast_possible_truncation, reason = "the flags that matter are in the lower half")]
    let flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    request.ifr_ifru.ifru_flags = flags;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which the request is.
    let result =
        unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
