//! The loop that watches over the workload: moves its log, serves the control socket, keeps its deadlines, sees its end.

mod serve;

use std::{
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    time::Duration,
};

use runner_core::{
    clock::{Clock as _, SystemClock, Timestamp},
    log::LogStream,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
    process::{Pid, Signal},
};

use super::{
    child::{self, Message},
    control::{Control, PendingInput},
    link::Kind,
    link_out::SharedOut,
    protocol::{ExecSpec, ExitReason, StartedRecord, name},
    record,
    spool::Spool,
    sys::{self, Waited},
};

/// Largest payload of a frame, and what is read at once.
const READ_BYTES: usize = 64 * 1024;
/// A set-up that takes longer has failed: a file system that does not answer, for example.
const SET_UP: Duration = Duration::from_secs(60);
/// From SIGKILL to the program until the first process is killed too.
const INSIST: Duration = Duration::from_secs(1);
/// How long the other side of a terminal that nobody has open is left alone.
const TERMINAL_PAUSE: Duration = Duration::from_millis(20);

/// One of the workload's outputs.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) fd: OwnedFd,
    pub(crate) stream: LogStream,
    /// Not before this time.
    paused: Option<Duration>,
    open: bool,
}

impl Output {
    pub(crate) fn new(fd: OwnedFd, stream: LogStream) -> Self {
        Self { fd, stream, paused: None, open: true }
    }
}

/// Where standard input comes in.
#[derive(Debug)]
pub(crate) enum Input {
    /// The specification wants none.
    None,
    /// It was closed.
    Closed,
    Pipe(OwnedFd),
    Terminal(OwnedFd),
}

#[derive(Debug)]
enum Program {
    Unborn,
    Born {
        pid: Pid,
        handle: OwnedFd,
    },
    /// It has ended and was waited for before we had a handle. Its parent is about to say how.
    Gone,
}

/// What [`Watch::wait`] found ready.
#[derive(Debug, Default)]
struct Ready {
    outputs: Vec<bool>,
    signals: bool,
    listener: bool,
    channel: bool,
}

/// How the program ended, as its parent saw it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    pub(crate) status: i32,
    pub(crate) cpu: Duration,
    pub(crate) max_memory_bytes: u64,
    pub(crate) at: Duration,
    pub(crate) time: Timestamp,
}

/// The shim has decided to end the program. Decided once, and only while it had not ended by itself.
#[derive(Debug, Clone, Copy)]
struct Ending {
    reason: ExitReason,
    kill_at: Duration,
    killed_at: Option<Duration>,
    insisted: bool,
}

/// What is known of the workload, for the exit record.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// When the program was started.
    pub(crate) started: Option<Duration>,
    /// Why it could not be executed.
    pub(crate) not_executed: Option<Errno>,
    /// Why it could not be set up.
    pub(crate) fault: Option<String>,
    pub(crate) ended: Option<Ended>,
    /// The end of the first process.
    pub(crate) first: Option<Waited>,
    /// The shim's own decision.
    pub(crate) decided: Option<ExitReason>,
    pub(crate) killed: bool,
    pub(crate) evidence: Vec<(String, String)>,
}

/// What a [`Watch`] is made of.
#[derive(Debug)]
pub(crate) struct Parts<'a> {
    pub(crate) clock: &'a SystemClock,
    pub(crate) spec: &'a ExecSpec,
    pub(crate) dir: &'a Path,
    pub(crate) spool: Spool,
    pub(crate) control: Control,
    pub(crate) signals: OwnedFd,
    pub(crate) channel: OwnedFd,
    pub(crate) first: Pid,
    pub(crate) first_handle: OwnedFd,
    pub(crate) outputs: Vec<Output>,
    pub(crate) input: Input,
    pub(crate) link: Option<SharedOut>,
}

/// Watches one workload.
#[derive(Debug)]
pub(crate) struct Watch<'a> {
    pub(crate) parts: Parts<'a>,
    pub(crate) seen: Seen,
    begun: Duration,
    channel_open: bool,
    pending: Option<PendingInput>,
    terminal: Option<OwnedFd>,
    program: Program,
    /// The program's pid, for the record.
    pid: i32,
    ending: Option<Ending>,
    buffer: Vec<u8>,
}

impl<'a> Watch<'a> {
    pub(crate) fn new(parts: Parts<'a>) -> Self {
        Self {
            begun: parts.clock.monotonic(),
            parts,
            seen: Seen::default(),
            channel_open: true,
            pending: None,
            terminal: None,
            program: Program::Unborn,
            pid: 0,
            ending: None,
            buffer: vec![0; READ_BYTES],
        }
    }

    /// Watches until the first process is gone.
    pub(crate) fn until_the_first_is_gone(&mut self) {
        while self.seen.first.is_none() {
            self.keep_deadlines();
            let ready = self.wait();
            if ready.channel {
                self.take_messages();
            }
            self.take_outputs(&ready.outputs);
            if ready.listener {
                self.parts.control.accept();
            }
            self.serve_control();
            self.serve_link();
            if ready.signals {
                self.take_signals();
                self.reap();
            }
            self.parts.spool.tick(self.parts.clock);
        }
        // What it sent before its end.
        self.take_messages();
        self.seen.decided = self.ending.map(|ending| ending.reason);
        self.seen.killed = self.ending.is_some_and(|ending| ending.killed_at.is_some());
    }

    /// Waits for anything to happen, or the next deadline.
    fn wait(&self) -> Ready {
        let now = self.parts.clock.monotonic();
        let timeout = self.next_deadline(now).map(|at| {
            let left = at.saturating_sub(now);
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        // The program may write before its parent comes to say that it was executed. Its output waits in the pipe, so that
        // the record of the start is there before the log.
        let started = self.seen.started.is_some();
        let listening =
            |output: &Output| started && output.open && output.paused.is_none_or(|until| until <= now);
        let mut fds: Vec<PollFd<'_>> = self
            .parts
            .outputs
            .iter()
            .filter(|output| listening(output))
            .map(|output| PollFd::new(&output.fd, PollFlags::IN))
            .collect();
        fds.push(PollFd::new(&self.parts.signals, PollFlags::IN));
        fds.push(PollFd::from_borrowed_fd(self.parts.control.listener(), PollFlags::IN));
        if self.channel_open {
            fds.push(PollFd::new(&self.parts.channel, PollFlags::IN));
        }
        if self.pending.is_some()
            && let Input::Pipe(fd) | Input::Terminal(fd) = &self.parts.input
        {
            fds.push(PollFd::new(fd, PollFlags::OUT));
        }
        if let Some(requests) = self.parts.control.link_interest() {
            fds.push(PollFd::from_borrowed_fd(requests, PollFlags::IN));
        }
        let link = self.parts.link.as_ref().map(|link| link.borrow());
        if let Some(full) = link.as_ref().and_then(|link| link.interest()) {
            fds.push(PollFd::from_borrowed_fd(full, PollFlags::OUT));
        }
        for interest in self.parts.control.interests() {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, interest.read);
            flags.set(PollFlags::OUT, interest.write);
            fds.push(PollFd::from_borrowed_fd(interest.socket, flags));
        }
        if rustix::event::poll(&mut fds, timeout.as_ref()).is_err() {
            // Interrupted: nothing was seen; the loop comes again.
            return Ready::default();
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        let mut next = || ready.next().unwrap_or(false);
        Ready {
            outputs: self.parts.outputs.iter().map(|output| listening(output) && next()).collect(),
            signals: next(),
            listener: next(),
            channel: self.channel_open && next(),
        }
    }

    fn next_deadline(&self, now: Duration) -> Option<Duration> {
        let ending = match self.ending {
            _ if self.seen.ended.is_some() => None,
            None => Some(match self.seen.started {
                Some(started) => started.saturating_add(self.parts.spec.timeout),
                None => self.begun + SET_UP,
            }),
            Some(Ending { killed_at: None, kill_at, .. }) => Some(kill_at),
            Some(Ending { killed_at: Some(at), insisted: false, .. }) => Some(at + INSIST),
            Some(Ending { insisted: true, .. }) => None,
        };
        let paused =
            self.parts.outputs.iter().filter(|output| output.open).filter_map(|output| output.paused);
        let paused = paused.filter(|&until| until > now).min();
        [ending, self.parts.spool.next_tick(), paused].into_iter().flatten().min()
    }

    fn keep_deadlines(&mut self) {
        if self.seen.ended.is_some() {
            return;
        }
        let now = self.parts.clock.monotonic();
        match self.ending {
            None => match self.seen.started {
                Some(started) if now >= started.saturating_add(self.parts.spec.timeout) => {
                    self.begin_ending(ExitReason::TimedOut, self.parts.spec.stop_grace);
                }
                None if now >= self.begun + SET_UP && self.seen.fault.is_none() => {
                    self.seen.fault = Some(format!("the set-up took longer than {SET_UP:?}"));
                    self.kill_first();
                }
                _ => {}
            },
            Some(ending) => {
                self.take_messages();
                if self.seen.ended.is_some() {
                    return;
                }
                if ending.killed_at.is_none() && now >= ending.kill_at {
                    if let Program::Born { pid, handle } = &self.program {
                        // Where it is gone its parent is about to say so. Other failures are met by insisting.
                        let _ = signal(*pid, handle, Signal::KILL);
                    }
                    self.ending = Some(Ending { killed_at: Some(now), ..ending });
                } else if !ending.insisted && ending.killed_at.is_some_and(|at| now >= at + INSIST) {
                    self.kill_first();
                    self.ending = Some(Ending { insisted: true, ..ending });
                }
            }
        }
    }

    fn kill_first(&self) {
        // ESRCH: it is gone already.
        let _ = rustix::process::pidfd_send_signal(&self.parts.first_handle, Signal::KILL);
    }

    /// Asks the program to end, unless it has by itself.
    fn begin_ending(&mut self, reason: ExitReason, grace: Duration) {
        self.take_messages();
        if self.seen.ended.is_some() || self.seen.fault.is_some() {
            return;
        }
        let now = self.parts.clock.monotonic();
        let ending = Ending { reason, kill_at: now.saturating_add(grace), killed_at: None, insisted: false };
        match &self.program {
            Program::Unborn => {
                self.kill_first();
                self.ending = Some(Ending { killed_at: Some(now), insisted: true, ..ending });
            }
            Program::Gone => {}
            // Readable: it has ended, and its own end counts. Its parent is about to say so.
            Program::Born { handle, .. } if is_readable(handle) => {}
            Program::Born { pid, handle } => match signal(*pid, handle, Signal::TERM) {
                Err(Errno::SRCH) => {}
                sent => {
                    self.ending = Some(ending);
                    if let Err(error) = sent {
                        self.note("shim", format!("SIGTERM could not be sent: {error}"));
                    }
                }
            },
        }
    }

    fn stop(&mut self, reason: ExitReason, grace: Duration) {
        match &mut self.ending {
            None => self.begin_ending(reason, grace),
            Some(ending) => {
                ending.kill_at = ending.kill_at.min(self.parts.clock.monotonic().saturating_add(grace))
            }
        }
    }

    /// Takes what the workload's processes tell.
    fn take_messages(&mut self) {
        while self.channel_open {
            match child::receive(&self.parts.channel) {
                Ok(Some(message)) => self.take_message(message),
                Ok(None) => self.channel_open = false,
                Err(Errno::AGAIN) => return,
                Err(error) => {
                    self.note("shim", format!("the channel failed: {error}"));
                    self.channel_open = false;
                }
            }
        }
    }

    fn take_message(&mut self, message: Message) {
        match message {
            Message::Terminal(fd) => {
                let copies = (rustix::io::ioctl_fionbio(&fd, true), fd.try_clone(), fd.try_clone());
                match copies {
                    (Ok(()), Ok(for_output), Ok(for_size)) => {
                        self.parts.outputs.push(Output::new(for_output, LogStream::Terminal));
                        self.terminal = Some(for_size);
                        if self.parts.spec.stdin {
                            self.parts.input = Input::Terminal(fd);
                        }
                    }
                    _ => self.seen.fault = Some("the terminal cannot be used".to_owned()),
                }
            }
            Message::Born(pid) => self.program = self.find_program(pid),
            Message::Failed(fault) => self.seen.fault = Some(fault),
            Message::NotExecuted(error) => self.seen.not_executed = Some(error),
            Message::Executed => {
                if self.seen.fault.is_some() {
                    return;
                }
                self.seen.started = Some(self.parts.clock.monotonic());
                let record = StartedRecord { time: self.parts.clock.now(), pid: self.pid };
                if let Err(error) = record::write(self.parts.dir, name::STARTED, &record) {
                    self.note("shim", error.to_string());
                }
                if let Some(link) = &self.parts.link {
                    link.borrow_mut().record(Kind::Started, &record);
                }
                if let Some(error) = self.seen.not_executed {
                    self.tell_not_executed(error);
                }
            }
            Message::Ended { status, cpu, max_memory_bytes } => {
                let (at, time) = (self.parts.clock.monotonic(), self.parts.clock.now());
                self.seen.ended = Some(Ended { status, cpu, max_memory_bytes, at, time });
            }
        }
    }

    /// Says in the log, as a shell would, why the program could not be executed.
    fn tell_not_executed(&mut self, error: Errno) {
        let program = self.parts.spec.argv.first().map_or("", String::as_str);
        let text = match error {
            Errno::NOENT => format!("{program}: not found"),
            error => format!("{program}: {error}"),
        };
        let (stream, end) = match self.parts.spec.terminal {
            Some(_) => (LogStream::Terminal, "\r\n"),
            None => (LogStream::Stderr, "\n"),
        };
        self.parts.spool.append(self.parts.clock, stream, format!("runner: {text}{end}").as_bytes());
        self.note("shim", format!("cannot execute {text}"));
    }

    /// Gets a handle on the program: the child of the first process that has this pid.
    fn find_program(&mut self, pid: Pid) -> Program {
        self.pid = pid.as_raw_pid();
        let handle = match rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) {
            Ok(handle) => handle,
            Err(Errno::SRCH) => return Program::Gone,
            Err(error) => {
                // What cannot be stopped for sure is not let go on.
                self.note("shim", format!("no handle on the program: {error}"));
                self.kill_first();
                return Program::Gone;
            }
        };
        // It may have ended, and its pid been given to another, before the handle was had.
        match record::stat(self.pid) {
            Ok(Some(stat)) if stat.parent == self.parts.first.as_raw_pid() => Program::Born { pid, handle },
            _ => Program::Gone,
        }
    }

    /// Reads each ready output once.
    fn take_outputs(&mut self, ready: &[bool]) {
        for (output, _) in self.parts.outputs.iter_mut().zip(ready).filter(|(_, ready)| **ready) {
            output.paused = None;
            match read(output, &mut self.buffer) {
                Ok(Some(bytes)) => self.parts.spool.append(self.parts.clock, output.stream, bytes),
                // A terminal that nobody has open now may be opened again.
                Ok(None) if output.stream == LogStream::Terminal => {
                    output.paused = Some(self.parts.clock.monotonic() + TERMINAL_PAUSE);
                }
                Ok(None) => output.open = false,
                Err(()) => {}
            }
        }
    }

    /// Reads what is left in the outputs after the death of all who could write, for at most `deadline`: another process
    /// may have been given an end of a pipe. Returns whether every end was seen.
    pub(crate) fn drain(&mut self, deadline: Duration) -> bool {
        let end = self.parts.clock.monotonic() + deadline;
        for output in &mut self.parts.outputs {
            output.paused = None;
        }
        while self.parts.outputs.iter().any(|output| output.open) {
            let now = self.parts.clock.monotonic();
            if now >= end {
                return false;
            }
            let left =
                Timespec { tv_sec: 0, tv_nsec: 100_000_000.min((end - now).subsec_nanos().max(1)).into() };
            let mut fds: Vec<_> = self
                .parts
                .outputs
                .iter()
                .filter(|output| output.open)
                .map(|output| PollFd::new(&output.fd, PollFlags::IN))
                .collect();
            let _ = rustix::event::poll(&mut fds, Some(&left));
            for output in self.parts.outputs.iter_mut().filter(|output| output.open) {
                match read(output, &mut self.buffer) {
                    Ok(Some(bytes)) => self.parts.spool.append(self.parts.clock, output.stream, bytes),
                    Ok(None) => output.open = false,
                    Err(()) => {}
                }
            }
        }
        true
    }

    fn take_signals(&mut self) {
        // struct signalfd_siginfo; the first four bytes are the signal's number.
        let mut info = [0_u8; 128];
        while let Ok(128) = rustix::io::read(&self.parts.signals, &mut info) {
            let number = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
            if number.cast_signed() == Signal::TERM.as_raw() {
                // In a container our own request comes over the link: this is somebody else's.
                let reason =
                    if self.parts.link.is_some() { ExitReason::Terminated } else { ExitReason::Stopped };
                self.stop(reason, self.parts.spec.stop_grace);
            }
        }
    }

    /// Waits for children that have ended. Besides the first process there are orphans, where there is no pid namespace.
    /// Returns whether there are children left.
    pub(crate) fn reap(&mut self) -> bool {
        loop {
            match sys::wait4(None, false) {
                Ok(Some(ended)) if ended.pid == self.parts.first.as_raw_pid() => {
                    self.seen.first = Some(ended)
                }
                Ok(Some(_)) | Err(Errno::INTR) => {}
                Ok(None) => return true,
                // ECHILD. It cannot fail otherwise.
                Err(_) => return false,
            }
        }
    }

    pub(crate) fn note(&mut self, source: &str, detail: String) {
        self.seen.evidence.push((source.to_owned(), detail));
    }
}

/// Reads an output. `Ok(None)`: nobody has the other end open. `Err`: nothing now.
fn read<'a>(output: &Output, buffer: &'a mut [u8]) -> Result<Option<&'a [u8]>, ()> {
    match rustix::io::read(&output.fd, &mut *buffer) {
        Ok(0) => Ok(None),
        Ok(count) => Ok(Some(&buffer[..count])),
        Err(Errno::AGAIN | Errno::INTR) => Err(()),
        // EIO is how a terminal says it.
        Err(_) => Ok(None),
    }
}

/// Signals the program's group; the program alone in the moment before it leads one.
fn signal(pid: Pid, handle: &OwnedFd, signal: Signal) -> Result<(), Errno> {
    match sys::signal_group(handle.as_fd(), pid, signal) {
        Err(Errno::SRCH) => rustix::process::pidfd_send_signal(handle, signal),
        sent => sent,
    }
}

fn is_readable(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
}
