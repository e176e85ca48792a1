//! A workload of the fake: what exists of an attempt on the substrate, and the execution of its program.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::watch;

use super::script::{self, Flood, OnTerm, Statement};
use crate::{
    artifact::Manifest,
    backend::AttemptContext,
    clock::{Clock, Timestamp},
    id::AttemptId,
    log::{Frame, FrameBody, LogStream, codec::MAX_PAYLOAD},
    outcome::{Cause, ExitStatus},
    spec::{RunSpec, TerminalSize, path},
};

const SIGKILL: i32 = 9;
const SIGTERM: i32 = 15;
const SIGXFSZ: i32 = 25;

/// A file or directory that the workload has.
#[derive(Debug, Clone)]
pub(super) enum Node {
    File { bytes: Bytes, mode: u32 },
    Directory,
}

/// How the program ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ending {
    pub(super) time: Timestamp,
    pub(super) cause: Cause,
    pub(super) status: ExitStatus,
    pub(super) wall: Duration,
}

/// What publishing came to.
#[derive(Debug, Clone)]
pub(super) struct PublishedOutputs {
    pub(super) manifest: Manifest,
    /// Why a program that exited 0 has not succeeded.
    pub(super) fault: Option<String>,
    /// Whether publishing again may end otherwise.
    pub(super) retryable: bool,
}

/// The log, as the substrate keeps it.
#[derive(Debug, Default)]
pub(super) struct Log {
    pub(super) frames: VecDeque<Frame>,
    pub(super) end: u64,
    /// What is before this was released.
    pub(super) start: u64,
    kept: u64,
}

impl Log {
    fn append(&mut self, stream: LogStream, mut bytes: Bytes, limit: u64, time: Timestamp) {
        while !bytes.is_empty() {
            let room = usize::try_from(limit - self.kept).unwrap_or(usize::MAX);
            if room == 0 {
                return self.drop_bytes(bytes.len() as u64, limit, time);
            }
            let bytes = bytes.split_to(bytes.len().min(MAX_PAYLOAD).min(room));
            let span = bytes.len() as u64;
            self.frames.push_back(Frame { offset: self.end, time, body: FrameBody::Data { stream, bytes } });
            self.end += span;
            self.kept += span;
        }
    }

    fn drop_bytes(&mut self, count: u64, limit: u64, time: Timestamp) {
        self.end += count;
        // One growing mark, however much is dropped: a log that is over its limit costs no more memory.
        if let Some(Frame { body: FrameBody::Truncated { dropped, .. }, .. }) = self.frames.back_mut() {
            *dropped += count;
            return;
        }
        let reason = format!("log size limit of {limit} bytes");
        let body = FrameBody::Truncated { dropped: count, reason };
        self.frames.push_back(Frame { offset: self.end - count, time, body });
    }

    pub(super) fn release(&mut self, offset: u64) {
        while self.frames.front().is_some_and(|frame| frame.end() <= offset) {
            if let Some(frame) = self.frames.pop_front() {
                self.start = frame.end();
            }
        }
    }

    /// What is known from `cursor` on, at most about 1 MiB.
    pub(super) fn read(&self, cursor: u64) -> Vec<Frame> {
        let mut bytes = 0;
        self.frames
            .iter()
            .skip(self.frames.partition_point(|frame| frame.end() <= cursor))
            .filter_map(|frame| frame.clone().from_offset(cursor))
            .take_while(|frame| {
                let before = bytes;
                bytes += frame.span();
                before < 1024 * 1024
            })
            .collect()
    }
}

/// What changes of a workload.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) files: BTreeMap<String, Node>,
    pub(super) staged: bool,
    pub(super) started: Option<Timestamp>,
    pub(super) processes: u32,
    pub(super) stop: Option<Duration>,
    pub(super) ended: Option<Ending>,
    pub(super) log: Log,
    pub(super) stdin: VecDeque<Bytes>,
    pub(super) stdin_ended: bool,
    pub(super) size: TerminalSize,
    pub(super) published: Option<PublishedOutputs>,
    pub(super) vanished: bool,
    on_term: OnTerm,
}

/// What exists of an attempt on the substrate. Lives on while nobody holds a backend.
#[derive(Debug)]
pub(super) struct Workload {
    pub(super) attempt: AttemptId,
    /// Held by the one call that makes it.
    pub(super) making: tokio::sync::Mutex<()>,
    /// Held by the one observer that publishes.
    pub(super) publishing: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    changed: watch::Sender<()>,
}

impl Workload {
    pub(super) fn new(attempt: AttemptId) -> Self {
        Self {
            attempt,
            making: tokio::sync::Mutex::default(),
            publishing: tokio::sync::Mutex::default(),
            state: Mutex::default(),
            changed: watch::Sender::new(()),
        }
    }

    /// The state. Whoever changes it calls [`Workload::update`] instead.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and wakes everyone who waits for it.
    pub(super) fn update<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let result = change(&mut self.state());
        self.changed.send_replace(());
        result
    }

    /// Waits until `wanted` finds what it looks for.
    pub(super) async fn wait<R>(&self, mut wanted: impl FnMut(&mut State) -> Option<R>) -> R {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(found) = wanted(&mut self.state()) {
                return found;
            }
            if changed.changed().await.is_err() {
                // The sender lives as long as `self`.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Asks for the end. A later call may shorten the grace, never lengthen it.
    pub(super) fn ask_to_stop(&self, grace: Duration) {
        self.update(|state| state.stop = Some(state.stop.map_or(grace, |before| before.min(grace))));
    }

    /// Executes the program to its end.
    pub(super) async fn execute(self: Arc<Self>, attempt: AttemptContext, clock: Arc<dyn Clock>) {
        let begun = clock.monotonic();
        let (cause, status) = self.race(&attempt, clock.as_ref()).await;
        let ending =
            Ending { time: clock.now(), cause, status, wall: clock.monotonic().saturating_sub(begun) };
        self.update(|state| {
            // The death of the first process is the death of all.
            state.processes = 0;
            state.ended = Some(ending);
        });
    }

    /// The program against its timeout and whoever asks for its end. The first of them decides the cause.
    async fn race(&self, attempt: &AttemptContext, clock: &dyn Clock) -> (Cause, ExitStatus) {
        let spec = attempt.spec.as_ref();
        let mut program = std::pin::pin!(self.program(attempt, clock));
        let timeout = async {
            match spec.timeout {
                Some(timeout) => tokio::time::sleep(timeout).await,
                None => std::future::pending().await,
            }
        };
        let cause = tokio::select! {
            // Its own exit, if it came first, stays the outcome.
            biased;
            end = &mut program => return end,
            _ = self.wait(|state| state.stop) => Cause::Cancelled,
            () = timeout => Cause::TimedOut,
        };
        let on_term = self.state().on_term.clone();
        match on_term {
            OnTerm::Die => return (cause, ExitStatus::Signal(SIGTERM)),
            OnTerm::Exit { code, words } => {
                self.print(false, words, attempt, clock);
                return (cause, ExitStatus::Code(code));
            }
            OnTerm::Ignore => {}
        }
        let mut grace = match cause {
            Cause::Cancelled => None,
            _ => Some(spec.stop_grace.unwrap_or_default()),
        };
        loop {
            let asked = self.state().stop;
            let least = [grace, asked].into_iter().flatten().min().unwrap_or_default();
            grace = Some(least);
            tokio::select! {
                biased;
                (ended, status) = &mut program => {
                    return (if ended == Cause::OomKilled { ended } else { cause }, status);
                }
                () = tokio::time::sleep(least) => return (cause, ExitStatus::Signal(SIGKILL)),
                _ = self.wait(|state| state.stop.filter(|stop| *stop < least)) => {}
            }
        }
    }

    async fn program(&self, attempt: &AttemptContext, clock: &dyn Clock) -> (Cause, ExitStatus) {
        let exited = |code| (Cause::Exited, ExitStatus::Code(code));
        let statements = match script::parse(&attempt.spec) {
            Ok(statements) => statements,
            Err(code) => return exited(code),
        };
        for statement in statements {
            if let Err(end) = self.step(statement, attempt, clock).await {
                return end;
            }
        }
        exited(0)
    }

    fn print(&self, err: bool, bytes: impl Into<Bytes>, attempt: &AttemptContext, clock: &dyn Clock) {
        let stream = script::log_stream(&attempt.spec, err);
        let (bytes, time) = (bytes.into(), clock.now());
        self.update(|state| state.log.append(stream, bytes, attempt.log_limit_bytes, time));
    }

    /// `Err` is the program's end.
    async fn step(
        &self,
        statement: Statement,
        attempt: &AttemptContext,
        clock: &dyn Clock,
    ) -> Result<(), (Cause, ExitStatus)> {
        let spec = attempt.spec.as_ref();
        let exit = |code| Err((Cause::Exited, ExitStatus::Code(code)));
        let print = |text: String| self.print(false, text, attempt, clock);
        match statement {
            Statement::Print { err, text } => self.print(err, text, attempt, clock),
            Statement::Flood { err, bytes, binary } => {
                let mut flood = Flood::new(binary);
                let mut left = bytes;
                while left > 0 {
                    let count = left.min(64 * 1024);
                    self.print(err, flood.take(usize::try_from(count).unwrap_or(0)), attempt, clock);
                    left -= count;
                    tokio::task::yield_now().await;
                }
            }
            Statement::Exit(code) => return exit(code),
            Statement::Signal(signal) => return Err((Cause::Exited, ExitStatus::Signal(signal))),
            Statement::Sleep(millis) => tokio::time::sleep(Duration::from_millis(millis)).await,
            Statement::SleepUntilStopped => std::future::pending().await,
            Statement::OnTerm(on_term) => self.update(|state| state.on_term = on_term),
            Statement::Daemonize => self.update(|state| state.processes += 1),
            Statement::Write { path, text } => self.write(&path, text.into(), spec)?,
            Statement::WriteZeros { path, bytes } => {
                if spec.resources.file_size_bytes.is_some_and(|limit| bytes > limit) {
                    return Err((Cause::Exited, ExitStatus::Signal(SIGXFSZ)));
                }
                self.write(&path, vec![0; usize::try_from(bytes).unwrap_or(0)].into(), spec)?;
            }
            Statement::MakeDir { path } => {
                if !writable(&path, spec) {
                    return exit(1);
                }
                self.update(|state| state.files.insert(path, Node::Directory));
            }
            Statement::TryWrite { path } => {
                print(if writable(&path, spec) { "written\n" } else { "refused\n" }.to_owned());
            }
            Statement::Cat { path } => {
                let found = self.state().files.get(&path).cloned();
                match found {
                    Some(Node::File { bytes, .. }) => self.print(false, bytes, attempt, clock),
                    Some(Node::Directory) | None => return exit(1),
                }
            }
            Statement::Allocate(bytes) => {
                if spec.resources.memory_bytes.is_some_and(|limit| bytes > limit) {
                    return Err((Cause::OomKilled, ExitStatus::Signal(SIGKILL)));
                }
            }
            Statement::Fork(count) => {
                let refused = spec.resources.pids.is_some_and(|limit| count >= limit);
                print(if refused { "refused\n" } else { "forked\n" }.to_owned());
            }
            Statement::Env => {
                print(spec.env.iter().map(|(name, value)| format!("{name}={value}\n")).collect())
            }
            Statement::WhoAmI => {
                let (uid, gid) = spec.user.map_or((65534, 65534), |user| (user.uid, user.gid));
                print(format!("{uid} {gid}\n"));
            }
            Statement::WorkingDir => print(format!("{}\n", spec.working_dir.as_deref().unwrap_or("/"))),
            Statement::Interfaces => print("lo\n".to_owned()),
            Statement::EchoStdin => {
                while let Some(bytes) = self.wait(next_stdin).await {
                    self.print(false, bytes, attempt, clock);
                }
            }
            Statement::TerminalSize => {
                let show = |size: TerminalSize| print(format!("{} {}\n", size.rows, size.columns));
                let first = self.state().size;
                show(first);
                show(self.wait(|state| (state.size != first).then_some(state.size)).await);
            }
        }
        Ok(())
    }

    fn write(&self, path: &str, bytes: Bytes, spec: &RunSpec) -> Result<(), (Cause, ExitStatus)> {
        if !writable(path, spec) {
            return Err((Cause::Exited, ExitStatus::Code(1)));
        }
        self.update(|state| state.files.insert(path.to_owned(), Node::File { bytes, mode: 0o644 }));
        Ok(())
    }
}

/// `Some(None)` is the end of input.
fn next_stdin(state: &mut State) -> Option<Option<Bytes>> {
    match state.stdin.pop_front() {
        Some(bytes) => Some(Some(bytes)),
        None => state.stdin_ended.then_some(None),
    }
}

fn writable(at: &str, spec: &RunSpec) -> bool {
    let within = |root: &str| at != root && path::overlap(root, at) && at.len() > root.len();
    let input = spec.inputs.iter().any(|input| path::overlap(&input.path, at));
    let output = spec.outputs.iter().any(|output| at == output.path || within(&output.path));
    output || within("/tmp") || (!input && !spec.read_only_root)
}
