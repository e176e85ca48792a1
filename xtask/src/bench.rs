//! `cargo xtask bench`: builds everything for release and runs the measurements of the crate `runner-tests`.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    process::{self, say},
    setup,
};

/// How long an engine may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(200);

/// Measures; `rows` are numbers of `docs/benchmarks.md`, none means all.
pub(crate) fn run(rows: &[String]) -> Result<()> {
    process::run(process::cargo()?.args(["build", "--release", "-p", "runner", "-p", "runner-agent"]))?;
    let needs_engine = rows.is_empty() || rows.iter().any(|row| row == "5");
    let engine = if needs_engine { Engine::find() } else { Ok(None) };
    if let Err(why) = &engine {
        say(&format!("bench: no Docker Engine for a peer: {why:#}"));
    }
    let mut bench = process::cargo()?;
    bench.args(["run", "--release", "--quiet", "-p", "runner-tests", "--bin", "runner-bench", "--"]);
    process::run(bench.args(rows))
}

/// A Docker Engine of our own, stopped when dropped.
struct Engine {
    daemon: Child,
    place: PathBuf,
}

impl Engine {
    /// The peer of row 5: the engine that answers already, else, as root on Debian, one that is installed and started here.
    fn find() -> Result<Option<Self>> {
        if answers() {
            return Ok(None);
        }
        setup::install(&["docker.io", "busybox-static"])?;
        let place = process::target()?.join("bench-docker");
        fs::create_dir_all(&place)?;
        let log = fs::File::create(place.join("dockerd.log"))?;
        let daemon = Command::new("dockerd")
            .arg("--data-root")
            .arg(place.join("data"))
            .arg("--exec-root")
            .arg(place.join("exec"))
            .arg("--pidfile")
            .arg(place.join("pid"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("start dockerd")?;
        let engine = Self { daemon, place };
        let mut waited = Duration::ZERO;
        while waited < PATIENCE {
            if answers() {
                return Ok(Some(engine));
            }
            std::thread::sleep(PAUSE);
            waited += PAUSE;
        }
        bail!(
            "dockerd did not answer within {PATIENCE:?}; see {}",
            engine.place.join("dockerd.log").display()
        )
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Asked first: an engine that is killed leaves its mounts behind.
        let _ = Command::new("kill").arg(self.daemon.id().to_string()).status();
        let _ = self.daemon.wait();
        let _ = fs::remove_dir_all(&self.place);
    }
}

fn answers() -> bool {
    process::output(Command::new("docker").args(["version", "--format", "{{.Server.Version}}"])).is_ok()
}
