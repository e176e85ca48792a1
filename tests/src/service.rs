//! A real `runner serve` process on a data directory of its own: started, killed, started again, searched for leftovers.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use worker_client::{Builder, Client, Event, Finished, RetryPolicy, StreamOptions, proto};

use crate::{binaries, port::free_address, postgres::Postgres, proc, said};

/// Where every service keeps its state whose test does not say: `postgres`, or anything else for SQLite.
const STORE: &str = "RUNNER_TEST_STORE";
/// What a test waits at most for anything.
pub const DEADLINE: Duration = Duration::from_secs(120);
/// Between two looks at something that cannot say by itself that it changed.
const LOOK: Duration = Duration::from_millis(20);
/// The same, of what takes minutes.
const SLOW_LOOK: Duration = Duration::from_millis(500);

/// Waits until `found` answers something.
///
/// # Panics
/// Where that does not come within [`DEADLINE`].
pub async fn eventually<T>(what: &str, mut found: impl AsyncFnMut() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(found) = found().await {
                return found;
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    within(what, looking).await
}

/// As [`eventually`], for what takes longer than anything else.
///
/// # Panics
/// Where that does not come within `deadline`.
pub async fn eventually_within<T>(
    deadline: Duration,
    what: &str,
    mut found: impl AsyncFnMut() -> Option<T>,
) -> T {
    let looking = async {
        loop {
            if let Some(found) = found().await {
                return found;
            }
            tokio::time::sleep(SLOW_LOOK).await;
        }
    };
    match tokio::time::timeout(deadline, looking).await {
        Ok(value) => value,
        Err(_) => panic!("{what} took longer than {deadline:?}"),
    }
}

/// Waits with the deadline.
///
/// # Panics
/// Where it passes.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what} took longer than {DEADLINE:?}"),
    }
}

/// A service and its data directory.
#[derive(Debug)]
pub struct Service {
    dir: TempDir,
    listen: SocketAddr,
    ops: SocketAddr,
    settings: Vec<(String, String)>,
    process: Option<Child>,
    starts: u32,
}

impl Service {
    /// Starts one with default settings.
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Starts one with variables of the configuration, for example `("RUNNER_LIMITS__LIVE_RUNS", "2")`.
    pub async fn start_with(settings: &[(&str, &str)]) -> Self {
        let mut service = Self::prepare(settings);
        service.restart(&[]).await;
        service
    }

    /// A data directory, and a service that is not started yet.
    pub fn prepare(settings: &[(&str, &str)]) -> Self {
        let dir =
            tempfile::Builder::new().prefix("runner-service-").tempdir().expect("a temporary directory");
        let mut settings: Vec<(String, String)> =
            settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        if std::env::var(STORE).is_ok_and(|store| store == "postgres")
            && !settings.iter().any(|(name, _)| name == "RUNNER_STORE__URL")
        {
            let server = Postgres::shared().expect("PostgreSQL");
            settings.extend(server.settings().map(|(name, value)| (name.to_owned(), value)));
        }
        fs::create_dir(dir.path().join("data")).expect("make the data directory");
        let (listen, ops) = (free_address(), free_address());
        Self { dir, listen, ops, settings, process: None, starts: 0 }
    }

    /// Its data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Where it serves gRPC.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.listen)
    }

    /// Who it is: the mark of ownership of all of its workloads, wherever they are.
    ///
    /// # Panics
    /// Where it was never started.
    pub fn instance(&self) -> String {
        let written = fs::read_to_string(self.data_dir().join("instance")).expect("the service was started");
        written.trim().to_owned()
    }

    /// Its pid.
    ///
    /// # Panics
    /// Where it does not run.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("the service runs").id()
    }

    fn log_path(&self, start: u32) -> PathBuf {
        self.dir.path().join(format!("service.{start}.log"))
    }

    /// What it wrote to standard error since its last start.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log_path(self.starts)).unwrap_or_default()).into_owned()
    }

    /// The command that serves `data_dir`, with nothing of this process's environment but the path.
    fn command(&self, data_dir: &Path, listen: SocketAddr, ops: SocketAddr) -> Command {
        let mut command = Command::new(binaries::runner().expect("the service's program"));
        command.arg("serve").arg("--data-dir").arg(data_dir);
        command.arg("--listen").arg(listen.to_string()).arg("--ops-listen").arg(ops.to_string());
        command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        command.envs(self.settings.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    /// Starts it on the same directory and ports, without waiting until it is ready.
    pub fn spawn(&mut self, settings: &[(&str, &str)]) {
        assert!(self.process.is_none(), "the service runs already");
        self.starts += 1;
        let log = fs::File::create(self.log_path(self.starts)).expect("a log file");
        let mut command = self.command(&self.data_dir(), self.listen, self.ops);
        command.envs(settings.iter().copied()).stderr(log);
        self.process = Some(command.spawn().expect("start the service"));
    }

    /// Starts it on the same directory and ports, and waits until it is ready.
    ///
    /// # Panics
    /// Where it ends instead.
    pub async fn restart(&mut self, settings: &[(&str, &str)]) {
        self.spawn(settings);
        for _ in 0..5 {
            if self.ready().await {
                return;
            }
            let log = self.log();
            assert!(
                self.starts == 1 && log.contains("in use"),
                "the service ended before it was ready:\n{log}"
            );
            // Somebody took the port since it was found free.
            (self.listen, self.ops) = (free_address(), free_address());
            self.process = None;
            self.spawn(settings);
        }
        panic!("found no port to listen on");
    }

    /// Waits until it is ready. False: it ended.
    async fn ready(&mut self) -> bool {
        let ops = self.ops;
        let process = self.process.as_mut().expect("the service was started");
        eventually("readiness", async || {
            if process.try_wait().expect("look at the service").is_some() {
                return Some(false);
            }
            let answer = http_get(ops, "/readyz").await?;
            answer.starts_with("HTTP/1.1 200").then_some(true)
        })
        .await
    }

    /// What a command of the service's program with the same settings wrote, both streams together, and how it ended.
    ///
    /// # Panics
    /// Where it does not start.
    pub fn command_with(&self, arguments: &[&str], settings: &[(&str, &str)]) -> (ExitStatus, String) {
        let mut command = Command::new(binaries::runner().expect("the service's program"));
        command.args(arguments).env_clear();
        command.envs(self.settings.iter().map(|(name, value)| (name, value))).envs(settings.iter().copied());
        let output = command.stdin(Stdio::null()).output().expect("the program starts");
        let said = [output.stdout, output.stderr].concat();
        (output.status, String::from_utf8_lossy(&said).into_owned())
    }

    /// A second service on the same data directory, on other ports: how it ended, and what it said.
    pub async fn second(&self) -> (ExitStatus, String) {
        let log = self.dir.path().join("second.log");
        let mut command = self.command(&self.data_dir(), free_address(), free_address());
        command.stderr(fs::File::create(&log).expect("a log file"));
        let mut child = Reaped(command.spawn().expect("start a second service"));
        let ended = async || child.0.try_wait().expect("look at the second service");
        let status = eventually("the end of the second service", ended).await;
        (status, fs::read_to_string(log).unwrap_or_default())
    }

    /// Kills it as `kill -9` does. Workloads live on.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw).expect("a pid");
        rustix::process::kill_process(pid, Signal::TERM).expect("send SIGTERM");
    }

    /// Waits until it has ended.
    pub async fn ended(&mut self) -> ExitStatus {
        let process = self.process.as_mut().expect("the service was started");
        let look = async || process.try_wait().expect("look at the service");
        let status = eventually("the end of the service", look).await;
        self.process = None;
        status
    }

    /// A page of the operators' port, head and body.
    pub async fn ops(&self, path: &str) -> Option<String> {
        http_get(self.ops, path).await
    }

    /// A client that repeats nothing, so that a test sees every failure.
    pub fn client(&self) -> Client {
        self.builder()
            .retry(RetryPolicy::never())
            .stream_retry(RetryPolicy::never())
            .connect_lazy()
            .expect("a client")
    }

    /// A client that repeats what is safe, as callers use it.
    pub fn patient_client(&self) -> Client {
        let policy = RetryPolicy {
            max_attempts: 200,
            initial_backoff: Duration::from_millis(50),
            max_backoff: Duration::from_millis(500),
            ..RetryPolicy::default()
        };
        self.builder().retry(policy).stream_retry(policy).connect_lazy().expect("a client")
    }

    fn builder(&self) -> Builder {
        Client::builder(self.endpoint())
    }

    /// Waits until nothing of these runs is left on the machine. The service removes after it has told the end.
    pub async fn assert_clean(&self, runs: &[&str]) {
        let mut left = Vec::new();
        let clean = async {
            loop {
                left = self.leftovers(runs);
                if left.is_empty() {
                    return;
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(30), clean).await.is_err() {
            panic!("left behind: {left:#?}\nthe service's log:\n{}", self.log());
        }
    }

    fn leftovers(&self, runs: &[&str]) -> Vec<String> {
        let mut left = Vec::new();
        let data_dir = self.data_dir();
        for entry in fs::read_dir(data_dir.join("local")).into_iter().flatten().filter_map(Result::ok) {
            left.push(entry.path().display().to_string());
        }
        for run in runs {
            left.extend(proc::with_environment("RUNNER_RUN_ID", run));
            left.extend(proc::control_groups_named(run));
        }
        left.extend(proc::mounts_below(&data_dir.join("local")));
        let own = self.process.as_ref().map(Child::id);
        let shims = proc::pids_naming(&data_dir.join("local"));
        left.extend(
            shims.iter().filter(|pid| u32::try_from(**pid).ok() != own).map(|pid| format!("pid {pid}")),
        );
        left.extend(own.into_iter().flat_map(proc::zombies_of));
        // What was cut short on its way into the object store.
        for entry in
            fs::read_dir(data_dir.join("objects/partial")).into_iter().flatten().filter_map(Result::ok)
        {
            left.push(entry.path().display().to_string());
        }
        left
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.kill();
        proc::kill_with_argument_below(self.dir.path());
        self.remove_control_groups();
        if std::thread::panicking() {
            #[allow(clippy::print_stderr, reason = "a failed test shows what the service said")]
            {
                eprintln!("service:\n{}", said::tail(self.log().lines()));
            }
        }
    }
}

impl Service {
    /// Who removes a control group is the shim, or the next start of the service; after the end of both it is the test.
    fn remove_control_groups(&self) {
        let instance = fs::read_to_string(self.data_dir().join("instance")).unwrap_or_default();
        let instance = instance.trim();
        // A group can be removed once its last process is gone, which a kill does not wait for.
        for _ in 0..200 {
            if instance.is_empty() || proc::control_groups_named(instance).is_empty() {
                return;
            }
            proc::remove_control_groups_named(instance);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Killed when it is dropped.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn http_get(address: SocketAddr, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    Some(answer)
}

/// What a watcher saw of a run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Watched {
    /// The states, in order, each with its attempt.
    pub states: Vec<(proto::RunState, u32)>,
    /// Standard output, of all attempts.
    pub out: Vec<u8>,
    /// Standard error, of all attempts.
    pub err: Vec<u8>,
    /// Dropped bytes.
    pub dropped: u64,
    /// Cursor of each event, in order.
    pub cursors: Vec<String>,
    /// How often the terminal event came.
    pub terminated: u32,
    /// The terminal event.
    pub end: Option<Finished>,
}

impl Watched {
    /// Takes an event.
    ///
    /// # Panics
    /// Where it comes after the terminal one.
    pub fn take(&mut self, run: &str, cursor: String, event: Event) {
        assert_eq!(self.terminated, 0, "{event:?} came after the terminal event");
        self.cursors.push(cursor);
        match event {
            Event::StateChanged(change) => self.states.push((change.state(), change.attempt)),
            Event::Log(frame) if frame.stream() == proto::LogStream::Stderr => {
                self.err.extend_from_slice(&frame.data);
            }
            Event::Log(frame) => self.out.extend_from_slice(&frame.data),
            Event::LogTruncated(mark) => self.dropped += mark.dropped_bytes,
            Event::Staging(_) | Event::Outputs(_) | Event::Notice(_) => {}
            Event::Terminated(terminated) => {
                self.terminated += 1;
                let state = terminated.state();
                let outcome = terminated.outcome.unwrap_or_default();
                self.end = Some(Finished { run_id: run.to_owned(), state, outcome });
            }
        }
    }

    /// How it ended.
    ///
    /// # Panics
    /// Where it has not.
    pub fn end(&self) -> &Finished {
        self.end.as_ref().expect("the run ended")
    }
}

/// Watches a run from a cursor to its end.
///
/// # Panics
/// Where the stream fails, or ends without the terminal event.
pub async fn watch(client: &Client, run: &str, cursor: &str) -> Watched {
    let mut watched = Watched::default();
    let mut events = client.stream(run, StreamOptions::default().from_cursor(cursor));
    while let Some(event) = within("the next event", events.next()).await {
        let event = event.expect("the stream goes on");
        watched.take(run, event.cursor, event.event);
    }
    assert_eq!(watched.terminated, 1, "the terminal event is the last: {:?}", watched.states);
    watched
}

/// Watches a run until its standard output contains `text`.
///
/// # Panics
/// Where it ends without.
pub async fn watch_for(client: &Client, run: &str, text: &str) {
    let mut watched = Watched::default();
    let mut events = client.stream(run, StreamOptions::default());
    while let Some(event) = within("the next event", events.next()).await {
        let event = event.expect("the stream goes on");
        watched.take(run, event.cursor, event.event);
        if String::from_utf8_lossy(&watched.out).contains(text) {
            return;
        }
    }
    panic!("the run ended without {text:?}: {watched:?}");
}
