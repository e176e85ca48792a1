//! The peer of row 3: HyperQueue, driven through its Python package in a virtual environment below the target directory.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use super::service::Fault;

/// Reads a number of tasks a line, executes as many no-ops, answers with the seconds that they took.
const SCRIPT: &str = r#"
import sys, time, tempfile, os
from hyperqueue import LocalCluster, Job
from hyperqueue.cluster import WorkerConfig
os.chdir(tempfile.mkdtemp())
with LocalCluster() as cluster:
    cluster.start_worker(WorkerConfig(cores=64))
    client = cluster.client()
    print("answer ready", flush=True)
    for line in sys.stdin:
        job = Job()
        for _ in range(int(line)):
            job.program(["/bin/true"])
        begin = time.perf_counter()
        client.wait_for_jobs([client.submit(job)])
        print("answer", time.perf_counter() - begin, flush=True)
"#;

/// A HyperQueue cluster of one worker with 64 slots.
pub(crate) struct HyperQueue {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl HyperQueue {
    /// Installs it, once, and starts it.
    pub(crate) fn start() -> Result<Self, Fault> {
        let place = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/tools/hyperqueue");
        let python = place.join("bin/python");
        if !python.exists() {
            run(Command::new("python3").args(["-m", "venv"]).arg(&place))?;
            run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "hyperqueue==0.27.0"]))?;
        }
        let mut child = Command::new(&python)
            .args(["-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let (Some(ask), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("a child without pipes".into());
        };
        let mut queue = Self { child, ask, answers: BufReader::new(answers) };
        let first = queue.line()?;
        if first == "ready" { Ok(queue) } else { Err(format!("it said {first:?}").into()) }
    }

    /// The next answer of the script; HyperQueue itself prints between them.
    fn line(&mut self) -> Result<String, Fault> {
        let mut line = String::new();
        while self.answers.read_line(&mut line)? > 0 {
            if let Some(answer) = line.strip_prefix("answer ") {
                return Ok(answer.trim().to_owned());
            }
            line.clear();
        }
        Err("it ended".into())
    }

    /// Executes no-ops; answers the seconds that they took.
    pub(crate) fn batch(&mut self, tasks: u32) -> Result<f64, Fault> {
        writeln!(self.ask, "{tasks}")?;
        Ok(self.line()?.parse()?)
    }
}

impl Drop for HyperQueue {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(command: &mut Command) -> Result<(), Fault> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr)
        .trim()
        .lines()
        .last()
        .unwrap_or("it failed")
        .to_owned()
        .into())
}
