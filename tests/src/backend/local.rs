//! The harness of the local backend: real shims and programs of this machine.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use backend_local::{LocalBackend, LocalConfig, LocalParts};
use runner_agent::staging::StagingLimits;
use runner_core::{
    backend::Backend, clock::SystemClock, fake::backend::Flood, id::AttemptId, log::LogStream, spec::RunSpec,
};
use tempfile::TempDir;

use super::{
    Harness, Missing,
    bench::MARK,
    program::{Program, Then},
};
use crate::{binaries, proc};

/// The harness of the local backend.
#[derive(Debug)]
pub struct LocalHarness {
    dir: TempDir,
    backend: Option<Arc<LocalBackend>>,
    foreign: Mutex<Option<Foreign>>,
    seen: Mutex<BTreeSet<AttemptId>>,
}

/// What is not the backend's: files where its own lie, with the mark of another service, and a process.
#[derive(Debug)]
struct Foreign {
    paths: Vec<PathBuf>,
    process: Child,
}

const FOREIGN_TEXT: &str = "of another service";

async fn open(data_dir: &Path) -> Result<LocalBackend, String> {
    let config = LocalConfig { agent: Some(binaries::agent()?), ..LocalConfig::default() };
    let parts = LocalParts {
        config,
        data_dir: data_dir.to_owned(),
        instance: "conformance".to_owned(),
        clock: Arc::new(SystemClock::new()),
        staging: StagingLimits::default(),
    };
    LocalBackend::open(parts).await.map_err(|error| error.to_string())
}

/// A local backend over a data directory of its own.
///
/// # Errors
/// Where this machine cannot confine programs.
///
/// # Panics
/// Where the backend cannot be opened at all: that is a failure, not a missing backend.
pub async fn make() -> Result<Box<dyn Harness>, Missing> {
    let dir =
        tempfile::Builder::new().prefix("runner-conformance-").tempdir().expect("a temporary directory");
    let backend = open(dir.path()).await.expect("open the local backend");
    let health = backend.health().await.expect("health");
    if !health.healthy {
        return Err(Missing(health.detail));
    }
    let backend = Some(Arc::new(backend));
    Ok(Box::new(LocalHarness { dir, backend, foreign: Mutex::default(), seen: Mutex::default() }))
}

impl LocalHarness {
    fn base(&self) -> PathBuf {
        self.dir.path().join("local")
    }

    fn foreign_paths(&self) -> Vec<PathBuf> {
        let foreign = self.foreign.lock().expect("no case panicked");
        foreign.as_ref().map(|foreign| foreign.paths.clone()).unwrap_or_default()
    }
}

#[async_trait]
impl Harness for LocalHarness {
    fn backend(&self) -> Arc<dyn Backend> {
        let backend = self.backend.as_ref().expect("the backend is open");
        Arc::clone(backend) as Arc<dyn Backend>
    }

    async fn reopen(&mut self) {
        let before = self.backend.take().map(|backend| Arc::downgrade(&backend));
        if let Some(before) = before {
            assert!(before.upgrade().is_none(), "the case holds the backend that is to be dropped");
        }
        self.backend = Some(Arc::new(open(self.dir.path()).await.expect("open the local backend again")));
    }

    fn spec(&self, program: &Program) -> RunSpec {
        RunSpec { command: command(program), ..RunSpec::default() }
    }

    fn processes(&self, attempt: AttemptId) -> Vec<String> {
        self.seen.lock().expect("no case panicked").insert(attempt);
        proc::with_environment(MARK, &attempt.to_string())
    }

    fn starts(&self, _: AttemptId) -> Option<u32> {
        None
    }

    fn added_environment(&self) -> Vec<(&'static str, Option<&'static str>)> {
        vec![
            ("PATH", Some("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")),
            ("HOME", Some("/home/runner")),
            ("TMPDIR", Some("/tmp")),
            ("USER", Some("runner")),
            ("RUNNER_RUN_ID", None),
            ("RUNNER_ATTEMPT", Some("1")),
        ]
    }

    fn plant_foreign(&self) {
        let attempt = "0199aaaa-0000-7000-8000-00000000000a.1";
        let owned = self.base().join(attempt);
        fs::create_dir(&owned).expect("plant a directory");
        let paths = vec![owned.join("owner"), owned.join("exec.json"), self.base().join("file")];
        for path in &paths {
            fs::write(path, FOREIGN_TEXT).expect("plant a file");
        }
        let process =
            Command::new("sleep").arg("100000").stdin(Stdio::null()).spawn().expect("plant a process");
        *self.foreign.lock().expect("no case panicked") = Some(Foreign { paths, process });
    }

    fn foreign_is_intact(&self) -> bool {
        let mut foreign = self.foreign.lock().expect("no case panicked");
        let Some(foreign) = foreign.as_mut() else { return true };
        let files =
            foreign.paths.iter().all(|path| fs::read(path).is_ok_and(|text| text == FOREIGN_TEXT.as_bytes()));
        files && matches!(foreign.process.try_wait(), Ok(None))
    }

    fn leaks(&self) -> Vec<String> {
        let foreign = self.foreign_paths();
        let mut leaks: Vec<String> = fs::read_dir(self.base())
            .expect("read the backend's directory")
            .filter_map(Result::ok)
            .map(|entry| entry.path())
            .filter(|path| !foreign.iter().any(|foreign| foreign.starts_with(path)))
            .map(|path| path.display().to_string())
            .collect();
        leaks.extend(proc::with_argument_below(self.dir.path()));
        leaks.extend(proc::mounts_below(self.dir.path()));
        for attempt in self.seen.lock().expect("no case panicked").iter() {
            leaks.extend(proc::control_groups_named(&attempt.to_string()));
        }
        leaks
    }
}

impl Drop for LocalHarness {
    /// Ends what a failed case left running.
    fn drop(&mut self) {
        let foreign = self.foreign.get_mut().map(Option::take);
        if let Ok(Some(mut foreign)) = foreign {
            let _ = foreign.process.kill();
            let _ = foreign.process.wait();
        }
        proc::kill_with_argument_below(self.dir.path());
        if let Ok(seen) = self.seen.get_mut() {
            for attempt in seen.iter() {
                proc::kill_with_environment(MARK, &attempt.to_string());
                proc::remove_control_groups_named(&attempt.to_string());
            }
        }
    }
}

/// The arguments of `tr` that make a text flood a binary one.
fn translation() -> String {
    Flood::BINARY.iter().map(|byte| format!("\\{byte:03o}")).collect()
}

/// The program as a command of this machine.
pub fn command(program: &Program) -> Vec<String> {
    let shell = |script: &str, args: &[&str]| -> Vec<String> {
        ["sh", "-c", script, "sh"].iter().chain(args).map(|word| (*word).to_owned()).collect()
    };
    let plain = |words: &[&str]| -> Vec<String> { words.iter().map(|word| (*word).to_owned()).collect() };
    // In a session of its own, its parent gone, deaf to every polite signal. Its output goes to descriptor 4. What
    // waits for the substitution waits for the daemon to let go of descriptor 3: it is deaf then.
    const DAEMON: &str = r#": "$( (setsid sh -c 'trap "" TERM HUP INT; exec 3>&-; while :; do sleep 1; done' 3>&1 >&4 4>&- &) )""#;
    match program {
        Program::Print { out, err, exit } => {
            shell(r#"printf %s "$1"; printf %s "$2" >&2; exit "$3""#, &[out, err, &exit.to_string()])
        }
        Program::Signal(signal) => shell(r#"kill -"$1" $$; sleep 5"#, &[&signal.to_string()]),
        Program::NotFound => plain(&["no-such-program"]),
        Program::NotExecutable => plain(&["/etc/passwd"]),
        Program::SleepForever => shell("echo ready; exec sleep 100000", &[]),
        Program::HandleTerm(code) => {
            let script = r#"trap "echo bye; exit $1" TERM; echo ready; while :; do sleep 1; done"#;
            shell(script, &[&code.to_string()])
        }
        Program::IgnoreTerm => shell(r#"trap "" TERM; echo ready; while :; do sleep 1; done"#, &[]),
        Program::Daemonize => {
            let script = format!("exec 4>/dev/null 2>&4; {DAEMON}; echo ready; exec sleep 100000 4>&-");
            shell(&script, &[])
        }
        // This daemon holds the log's pipes open.
        Program::DaemonizeAndExit(code) => {
            shell(&format!("exec 4>&1; {DAEMON}; echo ready; exit $1"), &[&code.to_string()])
        }
        Program::Count { count, pause } => {
            let script = r#"i=0; while [ $i -lt $1 ]; do sleep $2; echo $i; i=$((i+1)); done"#;
            shell(script, &[&count.to_string(), &format!("{}.{:03}", pause / 1000, pause % 1000)])
        }
        Program::Write { files, then } => {
            let script = r#"then=$1; shift
                while [ $# -ge 2 ]; do
                    case $1 in
                        */) mkdir -p "$1" ;;
                        *) mkdir -p "${1%/*}" && printf %s "$2" > "$1" ;;
                    esac || exit 99
                    shift 2
                done
                echo ready
                [ "$then" = sleep ] && exec sleep 100000
                exit "$then""#;
            let then = match then {
                Then::Exit(code) => code.to_string(),
                Then::Sleep => "sleep".to_owned(),
            };
            let mut args = vec![then.as_str()];
            args.extend(files.iter().flat_map(|(path, text)| [path.as_str(), text.as_str()]));
            shell(script, &args)
        }
        Program::Cat(path) => plain(&["cat", path]),
        Program::WriteZeros { path, bytes } => {
            shell(r#"exec head -c "$1" /dev/zero > "$2""#, &[&bytes.to_string(), path])
        }
        Program::TryWrite(path) => {
            shell(r#"if (: >> "$1") 2>/dev/null; then echo written; else echo refused; fi"#, &[path])
        }
        Program::Flood { stream, bytes, binary } => {
            let to = if *stream == LogStream::Stderr { "exec 1>&2; " } else { "" };
            let translate =
                if *binary { format!(" | tr '0-9\\n' '{}'", translation()) } else { String::new() };
            shell(&format!("{to}seq 1 999999999 | head -c $1{translate}"), &[&bytes.to_string()])
        }
        Program::FloodBoth { bytes } => {
            let script = "seq 1 999999999 | head -c $1 & seq 1 999999999 | head -c $1 >&2; wait";
            shell(script, &[&bytes.to_string()])
        }
        // One allocation, made at once and then filled: the kernel meets its limit in memory that is being used, not in a
        // further allocation, which it could refuse. It is the program itself, not its child.
        Program::TakeMemory(bytes) => {
            plain(&["dd", "if=/dev/zero", "of=/dev/null", "count=1", &format!("bs={bytes}")])
        }
        Program::Fork(count) => {
            let script = r#"if (i=0; while [ $i -lt $1 ]; do sleep 20 & i=$((i+1)); done) >/dev/null 2>&1
                then echo forked; else echo refused; fi"#;
            shell(script, &[&count.to_string()])
        }
        Program::Environment => plain(&["env"]),
        Program::WhoAmI => shell(r#"echo "$(id -u) $(id -g)""#, &[]),
        Program::WorkingDir => plain(&["/bin/pwd"]),
        Program::Interfaces => shell("tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '", &[]),
        Program::EchoStdin => plain(&["cat"]),
        Program::TerminalSize => {
            let script = r#"first=$(stty size); echo "$first"; now=$first
                while [ "$now" = "$first" ]; do sleep 0.02; now=$(stty size); done; echo "$now""#;
            shell(script, &[])
        }
    }
}
