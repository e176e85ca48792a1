//! Runs a specification under a real shim and collects everything that it left.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use runner_agent::exec::{
    client::{self, SpoolReader},
    protocol::{CgroupPlan, ExecSpec, ExitRecord, Mount, ProbeReport, Root},
};
use runner_core::{
    clock::{Clock as _, IdGen as _, SystemClock, SystemIds},
    id::AttemptId,
    log::{Frame, FrameBody, LogStream},
    spec::User,
};

pub(crate) const AGENT: &str = env!("CARGO_BIN_EXE_runner-agent");
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
pub(crate) const NOBODY: User = User { uid: 65534, gid: 65534 };

/// What the machine allows, asked once.
pub(crate) fn probed() -> &'static ProbeReport {
    static REPORT: OnceLock<ProbeReport> = OnceLock::new();
    REPORT.get_or_init(|| {
        let output = Command::new(AGENT).arg("probe").output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    })
}

/// Says why a test did nothing.
#[allow(clippy::print_stderr, reason = "a skipped test must be seen")]
pub(crate) fn skip(why: &str) {
    eprintln!("SKIPPED: {why}");
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A user that this process may run programs as.
pub(crate) fn user() -> User {
    if is_root() {
        NOBODY
    } else {
        User { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() }
    }
}

/// A specification with every namespace that the machine has.
pub(crate) fn spec(argv: &[&str]) -> ExecSpec {
    let id = AttemptId { run: SystemIds.run_id(), number: 1 };
    ExecSpec {
        attempt: id,
        argv: argv.iter().map(|&argument| argument.to_owned()).collect(),
        // The marker finds every process of the workload, wherever it hides.
        env: BTreeMap::from([
            ("PATH".to_owned(), "/usr/bin:/bin".to_owned()),
            ("MARKER".to_owned(), id.to_string()),
        ]),
        working_dir: "/".to_owned(),
        root: Root::Host { hidden: Vec::new() },
        read_only_root: false,
        mounts: Vec::new(),
        user: user(),
        namespaces: probed().namespaces,
        cgroup: None,
        file_size_bytes: None,
        address_space_bytes: None,
        nproc: None,
        timeout: Duration::from_secs(50),
        stop_grace: Duration::from_secs(2),
        terminal: None,
        stdin: false,
        log_limit_bytes: 1 << 40,
    }
}

pub(crate) fn shell(script: &str) -> ExecSpec {
    spec(&["sh", "-c", script])
}

pub(crate) fn mount(source: &Path, target: &str, read_only: bool) -> Mount {
    Mount { source: source.to_owned(), target: target.to_owned(), read_only }
}

/// Waits until `done` is true.
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let clock = SystemClock::new();
    while !done() {
        assert!(clock.monotonic() < DEADLINE, "waited too long for {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A living shim and its directory.
pub(crate) struct Running {
    dir: tempfile::TempDir,
    pub(crate) child: Child,
    pub(crate) spec: ExecSpec,
}

impl Running {
    pub(crate) fn start(spec: ExecSpec) -> Self {
        let dir = tempfile::tempdir().unwrap();
        client::write_spec(dir.path(), &spec).unwrap();
        let child = client::spawn(Path::new(AGENT), dir.path()).unwrap();
        Self { dir, child, spec }
    }

    /// Starts the shim as `nobody`, where this process is root.
    pub(crate) fn start_unprivileged(spec: ExecSpec) -> Self {
        let dir = tempfile::tempdir().unwrap();
        client::write_spec(dir.path(), &spec).unwrap();
        for path in [dir.path().to_owned(), dir.path().join("exec.json")] {
            std::os::unix::fs::chown(path, Some(NOBODY.uid), Some(NOBODY.gid)).unwrap();
        }
        let child = Command::new("setpriv")
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", AGENT, "exec"])
            .arg(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { dir, child, spec }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn wait_for_start(&self) {
        wait_for("the start", || {
            assert!(client::exit(self.dir()).unwrap().is_none(), "{:?}", client::exit(self.dir()));
            client::started(self.dir()).unwrap().is_some()
        });
    }

    pub(crate) fn output(&self) -> Vec<u8> {
        data(&frames(self.dir()), None)
    }

    pub(crate) fn wait_for_output(&self, text: &str) {
        wait_for(text, || String::from_utf8_lossy(&self.output()).contains(text));
    }

    /// Waits for the end, and checks what holds after every end.
    pub(crate) fn finish(mut self) -> Finished {
        wait_for("the exit record", || client::exit(self.dir()).unwrap().is_some());
        // Whatever is proven by the record is proven now, not after the shim's own end.
        assert_eq!(survivors(&self.spec), Vec::<String>::new());
        if let Some(plan) = &self.spec.cgroup {
            for directory in &plan.directories {
                assert!(!directory.exists(), "{}", directory.display());
            }
        }
        assert!(!self.dir().join("ctl").exists());
        assert!(self.child.wait().unwrap().success());
        client::prove_dead(self.dir(), Duration::from_secs(5)).unwrap();
        let frames = frames(self.dir());
        let mut end = 0;
        for frame in &frames {
            assert_eq!(frame.offset, end);
            end = frame.end();
        }
        let exit = client::exit(self.dir()).unwrap().unwrap();
        assert_eq!(exit.usage.log_bytes, end);
        Finished { exit, frames, errors: client::shim_errors(self.dir()) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A test that failed must not leave its workload behind.
        if let Ok(Some(shim)) = client::shim(self.dir.path()) {
            let _ = client::kill(&shim);
        }
        let _ = self.child.wait();
        let _ = client::prove_dead(self.dir.path(), Duration::from_secs(5));
    }
}

/// What is left after the end.
pub(crate) struct Finished {
    pub(crate) exit: ExitRecord,
    pub(crate) frames: Vec<Frame>,
    pub(crate) errors: String,
}

impl Finished {
    pub(crate) fn bytes(&self, stream: LogStream) -> Vec<u8> {
        data(&self.frames, Some(stream))
    }

    pub(crate) fn stdout(&self) -> String {
        String::from_utf8(self.bytes(LogStream::Stdout)).unwrap()
    }

    pub(crate) fn stderr(&self) -> String {
        String::from_utf8(self.bytes(LogStream::Stderr)).unwrap()
    }

    pub(crate) fn evidence(&self) -> String {
        format!("{:?} {}", self.exit.evidence, self.errors)
    }
}

pub(crate) fn run(spec: ExecSpec) -> Finished {
    Running::start(spec).finish()
}

pub(crate) fn frames(dir: &Path) -> Vec<Frame> {
    let mut reader = SpoolReader::open(dir, 0);
    let mut frames = Vec::new();
    loop {
        let more = reader.read().unwrap();
        if more.is_empty() {
            return frames;
        }
        frames.extend(more);
    }
}

fn data(frames: &[Frame], of: Option<LogStream>) -> Vec<u8> {
    let mut all = Vec::new();
    for frame in frames {
        if let FrameBody::Data { stream, bytes } = &frame.body
            && of.is_none_or(|of| of == *stream)
        {
            all.extend_from_slice(bytes);
        }
    }
    all
}

/// Living processes that carry the specification's marker.
pub(crate) fn survivors(spec: &ExecSpec) -> Vec<String> {
    let marker = format!("MARKER={}", spec.env["MARKER"]);
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        if environment.split(|&byte| byte == 0).any(|line| line == marker.as_bytes()) {
            found.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    found
}

/// A control group with these limits, where the machine lets us make one.
pub(crate) fn cgroup(memory: Option<u64>, pids: Option<u32>) -> Option<CgroupPlan> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("runner-agent-test.{}.{}", std::process::id(), NEXT.fetch_add(1, Ordering::SeqCst));
    let base = Path::new("/sys/fs/cgroup");
    let writable = |directory: &Path| {
        let trial = directory.join(format!("{name}.trial"));
        fs::create_dir(&trial).is_ok() && fs::remove_dir(&trial).is_ok()
    };
    let mut plan = CgroupPlan { directories: Vec::new(), settings: Vec::new(), version: 1 };
    if base.join("cgroup.controllers").exists() {
        plan.version = 2;
        let enabled = fs::read_to_string(base.join("cgroup.subtree_control")).unwrap_or_default();
        if !writable(base) || !["memory", "pids"].iter().all(|wanted| enabled.contains(wanted)) {
            return None;
        }
        let directory = base.join(&name);
        let mut set = |file: &str, value: String| plan.settings.push((directory.join(file), value));
        if let Some(memory) = memory {
            set("memory.max", memory.to_string());
            set("memory.swap.max", "0".to_owned());
        }
        if let Some(pids) = pids {
            set("pids.max", pids.to_string());
        }
        plan.directories.push(directory);
        return Some(plan);
    }
    let mut add = |controller: &str, file: &str, value: String| -> Option<PathBuf> {
        let hierarchy = base.join(controller);
        if !writable(&hierarchy) {
            return None;
        }
        let directory = hierarchy.join(&name);
        plan.settings.push((directory.join(file), value));
        plan.directories.push(directory.clone());
        Some(directory)
    };
    if let Some(memory) = memory {
        add("memory", "memory.limit_in_bytes", memory.to_string())?;
    }
    if let Some(pids) = pids {
        add("pids", "pids.max", pids.to_string())?;
    }
    Some(plan)
}
