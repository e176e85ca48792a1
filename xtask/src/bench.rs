//! `cargo xtask bench`: builds everything for release and runs the measurements of the crate `runner-tests`.

use anyhow::Result;

use crate::{
    agent,
    process::{self, say},
    setup,
};

/// The rows that need a Docker Engine: the measurements start one of their own.
const WITH_ENGINE: [&str; 3] = ["1", "2", "5"];

/// Measures; `rows` are numbers of `docs/benchmarks.md`, none means all.
pub(crate) fn run(rows: &[String]) -> Result<()> {
    process::run(process::cargo()?.args([
        "build",
        "--release",
        "-p",
        "runner",
        "-p",
        "runner-agent",
        "-p",
        "runner-tests",
        "--bins",
    ]))?;
    if rows.is_empty() || rows.iter().any(|row| WITH_ENGINE.contains(&row.as_str())) {
        if let Err(why) = setup::install_missing(&["docker.io", "busybox-static", "openssl", "iproute2"]) {
            say(&format!("bench: no Docker Engine: {why:#}"));
        }
        agent::run(true, agent::Roles::Shim)?;
    }
    if (rows.is_empty() || rows.iter().any(|row| row == "8"))
        && let Err(why) = setup::install_missing(&["rclone"])
    {
        say(&format!("bench: no rclone: {why:#}"));
    }
    let folder = process::target()?.join("release");
    let mut bench = std::process::Command::new(folder.join("runner-bench"));
    process::run(bench.env("RUNNER_TEST_BINARIES", &folder).args(rows))
}
