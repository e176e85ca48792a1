//! An engine: its process, its sockets, and what is done to it.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::SocketAddr,
    os::unix::{net::UnixStream, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use bollard::{API_DEFAULT_VERSION, Docker};
use rustix::process::{Pid, Signal};

use super::tls::{self, ClientCertificate};
use crate::{backend::Missing, place::Place, port::free_address, proc, said};

/// How often an engine is looked at until it answers, or has ended: for 60 seconds.
const LOOKS: u32 = 1200;
const LOOK: Duration = Duration::from_millis(50);
/// How long one request to an engine may take. An engine that is suspended answers nothing.
const TIMEOUT_SECS: u64 = 120;

/// How an engine is started.
#[derive(Debug, Clone, Default)]
pub struct EngineOptions {
    /// Containers live on while the engine is down.
    pub live_restore: bool,
    /// The engine has a bridge, with a network namespace of its own around it: its containers reach the bridge's gateway and
    /// nothing of this machine. Without it they can have the networks `none` and `host` only.
    pub bridge: bool,
    /// The engine serves TCP with TLS too, and asks for a client certificate. Not together with `bridge`.
    pub tls: bool,
    /// Further arguments of `dockerd`.
    pub args: Vec<String>,
}

/// A Docker Engine. Dropping it ends it, and everything that it started, and removes all of it.
#[derive(Debug)]
pub struct Engine {
    /// The first to go: it ends the engine.
    place: Place,
    daemon: Daemon,
    options: EngineOptions,
    tls: Option<(SocketAddr, ClientCertificate)>,
}

/// The engine's process, while it runs. Waited for when it is dropped, so that it does not stay a zombie.
#[derive(Debug, Default)]
struct Daemon(Mutex<Option<Child>>);

impl Daemon {
    fn lock(&self) -> MutexGuard<'_, Option<Child>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.lock().take() {
            let _ = daemon.wait();
        }
    }
}

/// Why this machine cannot have an engine.
fn missing() -> Option<Missing> {
    let in_path = |name: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
    };
    if !rustix::process::geteuid().is_root() {
        return Some(Missing("a Docker Engine is started by root only".to_owned()));
    }
    let needed = ["dockerd", "busybox", "openssl", "unshare", "ip"];
    needed.iter().find(|name| !in_path(name)).map(|name| Missing(format!("no {name} here")))
}

impl Engine {
    /// Starts one, and waits until it answers.
    ///
    /// # Errors
    /// Where this machine cannot have one.
    ///
    /// # Panics
    /// Where it could, and the engine does not come up.
    pub fn start(options: EngineOptions) -> Result<Self, Missing> {
        if let Some(missing) = missing() {
            return Err(missing);
        }
        assert!(!(options.tls && options.bridge), "nobody outside of its network namespace could connect");
        let place = Place::make().expect("a place for an engine");
        let tls = options.tls.then(|| {
            let certificate = tls::make(&place.path().join("tls")).expect("certificates");
            (free_address(), certificate)
        });
        // Not what this machine's administrator configured.
        fs::write(place.path().join("daemon.json"), "{}").expect("write the engine's configuration");
        let engine = Self { options, tls, daemon: Daemon::default(), place };
        engine.resurrect(engine.options.live_restore);
        Ok(engine)
    }

    fn command(&self, live_restore: bool) -> Command {
        let place = self.place.path();
        let mut command = if self.options.bridge {
            let mut unshare = Command::new("unshare");
            unshare.args(["--net", "sh", "-c", r#"ip link set lo up && exec dockerd "$@""#, "dockerd"]);
            unshare
        } else {
            let mut dockerd = Command::new("dockerd");
            // Two engines with bridges in one network namespace would share the bridge's name and the firewall's rules.
            dockerd.args(["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false"]);
            dockerd
        };
        command.arg("--config-file").arg(place.join("daemon.json"));
        command.arg("--data-root").arg(place.join("data"));
        command.arg("--exec-root").arg(place.join("exec"));
        command.arg("--pidfile").arg(self.place.pid_file("dockerd"));
        command.arg("--host").arg(self.host());
        // Whose name tells who sweeps which groups are this engine's.
        command.arg("--cgroup-parent").arg(format!("/{}", self.place.name()));
        command.args(["--shutdown-timeout", "5"]);
        if let Some((address, _)) = &self.tls {
            let dir = place.join("tls");
            command.arg("--host").arg(format!("tcp://{address}")).arg("--tlsverify");
            for (flag, file) in [("cacert", "ca.pem"), ("cert", "server.pem"), ("key", "server-key.pem")] {
                command.arg(format!("--tls{flag}")).arg(dir.join(file));
            }
        }
        if live_restore {
            command.arg("--live-restore");
        }
        command.args(&self.options.args);
        // Neither proxies nor credentials of whoever runs the tests.
        command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        // An interrupt from the terminal is for the test.
        command.stdin(Stdio::null()).process_group(0);
        command
    }

    /// Starts it again, and waits until it answers.
    ///
    /// # Panics
    /// Where it runs, or does not come up.
    pub fn resurrect(&self, live_restore: bool) {
        let mut daemon = self.daemon.lock();
        assert!(daemon.is_none(), "the engine runs already");
        let log = File::options().create(true).append(true).open(self.log_path()).expect("the engine's log");
        let out = log.try_clone().expect("the log again");
        let mut command = self.command(live_restore);
        let child = daemon.insert(command.stdout(out).stderr(log).spawn().expect("start dockerd"));
        for _ in 0..LOOKS {
            if self.answers() {
                return;
            }
            let ended = child.try_wait().expect("look at dockerd");
            assert!(ended.is_none(), "dockerd ended: {ended:?}\n{}", self.log_tail());
            thread::sleep(LOOK);
        }
        panic!("dockerd does not answer\n{}", self.log_tail());
    }

    /// Asks it to end, and waits until it has. Without live-restore its containers end with it.
    pub fn stop(&self) {
        self.end(Signal::TERM);
    }

    /// Kills it as `kill -9` does. Its containers live on until its next start.
    pub fn kill(&self) {
        self.end(Signal::KILL);
    }

    fn end(&self, signal: Signal) {
        let Some(mut daemon) = self.daemon.lock().take() else { return };
        send(&daemon, signal);
        daemon.wait().expect("wait for dockerd");
        // Its containerd dies with it, which takes a moment.
        let manager = self.place.path().join("exec/containerd");
        for _ in 0..LOOKS {
            if proc::with_argument_below(&manager.join("containerd.toml")).is_empty() {
                // Who adopted it may be slow to take notice, and the next engine would take a zombie for one that runs.
                let _ = fs::remove_file(manager.join("containerd.pid"));
                return;
            }
            thread::sleep(LOOK);
        }
        panic!("containerd outlives dockerd\n{}", self.log_tail());
    }

    /// Stops it and starts it again, with or without live-restore. What lives of its containers is decided by what it was
    /// started with before.
    pub fn restart(&self, live_restore: bool) {
        self.stop();
        self.resurrect(live_restore);
    }

    /// Stops the process from running, with SIGSTOP: it takes connections and answers nothing.
    pub fn suspend(&self) {
        self.send(Signal::STOP);
    }

    /// Lets it run again.
    pub fn resume(&self) {
        self.send(Signal::CONT);
    }

    fn send(&self, signal: Signal) {
        send(self.daemon.lock().as_ref().expect("the engine runs"), signal);
    }

    /// Pid of the engine's process.
    ///
    /// # Panics
    /// Where it does not run.
    pub fn pid(&self) -> u32 {
        self.daemon.lock().as_ref().expect("the engine runs").id()
    }

    /// Where it listens, as `unix:///…`.
    pub fn host(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    /// The socket that it listens on.
    pub fn socket(&self) -> PathBuf {
        self.place.path().join("docker.sock")
    }

    /// Its directory. Gone after it.
    pub fn dir(&self) -> &Path {
        self.place.path()
    }

    /// Name of the control group above those of its containers.
    pub fn cgroup(&self) -> String {
        self.place.name()
    }

    /// Where it serves TLS, and what it wants to see there.
    ///
    /// # Panics
    /// Where it was not started with [`EngineOptions::tls`].
    pub fn tls(&self) -> (SocketAddr, &ClientCertificate) {
        let (address, certificate) = self.tls.as_ref().expect("the engine serves TLS");
        (*address, certificate)
    }

    /// A client over the socket. Each runtime needs one of its own.
    ///
    /// # Panics
    /// Where the engine does not listen.
    pub fn connect(&self) -> Docker {
        Docker::connect_with_unix(&self.host(), TIMEOUT_SECS, API_DEFAULT_VERSION)
            .expect("the engine's socket")
    }

    fn log_path(&self) -> PathBuf {
        self.place.path().join("dockerd.log")
    }

    /// The end of what it said, without what it says of each container that ends.
    pub fn log_tail(&self) -> String {
        let log = fs::read(self.log_path()).unwrap_or_default();
        let usual = ["level=info", "level=debug", "cleaning up after shim", "cleanup warnings"];
        let unusual = |line: &&str| !usual.iter().any(|part| line.contains(part));
        said::tail(String::from_utf8_lossy(&log).lines().filter(unusual))
    }

    /// Whether it answers a ping. Blocks, needs no runtime.
    fn answers(&self) -> bool {
        let ping = || {
            let mut stream = UnixStream::connect(self.socket())?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n")?;
            let mut answer = Vec::new();
            stream.take(4096).read_to_end(&mut answer)?;
            Ok::<_, std::io::Error>(answer.starts_with(b"HTTP/1.1 200"))
        };
        ping().unwrap_or(false)
    }

    /// The same as [`Self::processes`], for people: what each is, whose child, in which groups.
    pub fn process_lines(&self) -> Vec<String> {
        let line = |pid: i32| {
            let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            format!("{} in {}", proc::describe(pid), groups.lines().next().unwrap_or_default())
        };
        self.processes().into_iter().map(line).collect()
    }

    /// Live processes of its containers' programs, seen from outside of it.
    ///
    /// Without those that have not executed the program yet: an engine that ends between making a container's first process and
    /// starting it forgets that process, which waits for ever, has done nothing of the workload, and cannot be seen or removed
    /// through the engine's interface.
    pub fn processes(&self) -> Vec<i32> {
        let unborn = |pid: &i32| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("runc:["))
        };
        proc::pids_in_control_groups_named(&self.cgroup()).into_iter().filter(|pid| !unborn(pid)).collect()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            #[allow(clippy::print_stderr, reason = "a failed test shows what the engine said")]
            {
                eprintln!("engine:\n{}", self.log_tail());
            }
        }
    }
}

fn send(daemon: &Child, signal: Signal) {
    if let Some(pid) = i32::try_from(daemon.id()).ok().and_then(Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}
