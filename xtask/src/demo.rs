//! `cargo xtask demo`: the first five minutes of a newcomer, in one command.
//!
//! Starts the service with the embedded defaults, uploads this project's own source tree, scans it for secrets with a
//! real tool (ripsecrets), streams the findings and downloads the report. A file with a made-up credential is put beside
//! the sources first, so that there is something to find.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::process::{self, say};

/// The scanner, from crates.io.
const TOOL: (&str, &str) = ("ripsecrets", "0.1.11");
/// How long the service may take to be ready.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(50);

/// Runs the demo.
pub(crate) fn run() -> Result<()> {
    say("== building the service, the agent and the command line");
    process::run(process::cargo()?.args([
        "build",
        "--quiet",
        "-p",
        "runner",
        "-p",
        "runner-agent",
        "-p",
        "runnerctl",
    ]))?;
    let tool = scanner()?;

    let place = process::target()?.join("demo");
    if place.exists() {
        fs::remove_dir_all(&place).with_context(|| format!("remove {}", place.display()))?;
    }
    let source = place.join("source");
    let files = copy_sources(&source)?;
    plant(&source)?;

    let bin = process::target()?.join("debug");
    let (listen, ops) = (free_address()?, free_address()?);
    say(&format!("== starting the service on {listen}, its data in {}", place.join("data").display()));
    let mut service = Service::start(&bin, &place, listen, ops)?;
    service.wait_until_ready(ops)?;

    say(&format!("== uploading {files} files, scanning them without a network, streaming what is found"));
    let report = place.join("report.txt");
    let script = "/inputs/ripsecrets /inputs/source >/outputs/report.txt 2>/outputs/errors.txt; code=$?; \
                  cat /outputs/report.txt; cat /outputs/errors.txt >&2; \
                  echo \"scanned $(find /inputs/source -type f | wc -l) files as $(id -u), exit code $code\"; \
                  test $code -le 1";
    let mut scan = Command::new(bin.join("runnerctl"));
    scan.args(["--endpoint", &format!("http://{listen}"), "run", "--label", "demo=secrets"])
        .args(["--input", &format!("{}:/inputs/source", source.display())])
        .args(["--input", &format!("{}:/inputs/ripsecrets", tool.display())])
        .args(["--output", &format!("/outputs/report.txt:{}", report.display())])
        .args(["--timeout", "5m", "--", "sh", "-c", script]);
    process::run(&mut scan)?;

    say("== the downloaded report");
    let text = fs::read_to_string(&report).with_context(|| format!("read {}", report.display()))?;
    say(&text);
    ensure!(text.contains("planted.env"), "the scanner did not find the planted credential");

    say("== the run, as the service remembers it");
    process::run(Command::new(bin.join("runnerctl")).args([
        "--endpoint",
        &format!("http://{listen}"),
        "list",
    ]))?;
    say("== stopping the service");
    service.stop()?;
    say("demo: done");
    Ok(())
}

/// The scanner's executable, built once and kept.
fn scanner() -> Result<PathBuf> {
    let (name, version) = TOOL;
    let place = process::target()?.join("tools").join(format!("{name}-{version}"));
    let program = place.join("bin").join(name);
    if !program.exists() {
        say(&format!("== building the scanner {name} {version}, once"));
        let mut install = process::cargo()?;
        install
            .args(["install", "--quiet", "--locked", "--version", version, name])
            .arg("--root")
            .arg(&place);
        process::run(install.env("CARGO_TARGET_DIR", place.join("build")))?;
        // Only the program is needed from here on.
        fs::remove_dir_all(place.join("build")).context("remove the scanner's build directory")?;
    }
    Ok(program)
}

/// Copies the project's sources, without what git ignores. Returns the number of files.
fn copy_sources(to: &Path) -> Result<usize> {
    let root = process::root()?;
    let mut ls = Command::new("git");
    ls.current_dir(&root).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let list = process::output(&mut ls).context("list the sources; the demo needs git and a checkout")?;
    let mut files = 0;
    for name in String::from_utf8(list)?.split_terminator('\0') {
        let from = root.join(name);
        if !from.is_file() {
            continue;
        }
        let target = to.join(name);
        fs::create_dir_all(target.parent().context("a file lies in a directory")?)?;
        fs::copy(&from, &target).with_context(|| format!("copy {name}"))?;
        files += 1;
    }
    Ok(files)
}

/// Puts a made-up credential beside the sources. It is put together here, so that no file of the repository has it.
fn plant(source: &Path) -> Result<()> {
    let made_up: String = "xK9vQ2mZ7pL4wR8tB3nJ6yD1".chars().rev().collect();
    let line = format!("API_{} = \"{made_up}{}\"\n", "SECRET_KEY", "hT5cF0gS");
    fs::write(source.join("planted.env"), line).context("plant a credential")
}

/// An address of loopback that was free a moment ago.
fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

struct Service {
    child: Child,
}

impl Service {
    fn start(bin: &Path, place: &Path, listen: SocketAddr, ops: SocketAddr) -> Result<Self> {
        let log = fs::File::create(place.join("service.log"))?;
        let child = Command::new(bin.join("runner"))
            .arg("serve")
            .arg("--data-dir")
            .arg(place.join("data"))
            .args(["--listen", &listen.to_string(), "--ops-listen", &ops.to_string()])
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .context("start the service")?;
        Ok(Self { child })
    }

    fn wait_until_ready(&mut self, ops: SocketAddr) -> Result<()> {
        let mut waited = Duration::ZERO;
        while waited < PATIENCE {
            if let Some(status) = self.child.try_wait()? {
                bail!("the service ended at once: {status}; see target/demo/service.log");
            }
            if ready(ops) {
                return Ok(());
            }
            std::thread::sleep(PAUSE);
            waited += PAUSE;
        }
        bail!("the service was not ready within {PATIENCE:?}; see target/demo/service.log")
    }

    /// Asks for the end as an operator does, and waits for it.
    fn stop(&mut self) -> Result<()> {
        process::run(Command::new("kill").args(["-TERM", &self.child.id().to_string()]))?;
        let status = self.child.wait()?;
        ensure!(status.success(), "the service ended with {status}");
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // After a success it is gone already; after a failure nothing must be left behind.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ready(ops: SocketAddr) -> bool {
    use std::io::{Read as _, Write as _};
    let Ok(mut stream) = TcpStream::connect_timeout(&ops, Duration::from_secs(1)) else { return false };
    let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
    let mut answer = String::new();
    stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").is_ok()
        && stream.read_to_string(&mut answer).is_ok()
        && answer.starts_with("HTTP/1.1 200")
}
