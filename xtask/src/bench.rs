//! `cargo xtask bench`: builds everything for release and runs the measurements of the crate `runner-tests`.

use anyhow::Result;

use crate::process;

/// Measures; `rows` are numbers of `docs/benchmarks.md`, none means all.
pub(crate) fn run(rows: &[String]) -> Result<()> {
    process::run(process::cargo()?.args(["build", "--release", "-p", "runner", "-p", "runner-agent"]))?;
    let mut bench = process::cargo()?;
    bench.args(["run", "--release", "--quiet", "-p", "runner-tests", "--bin", "runner-bench", "--"]);
    process::run(bench.args(rows))
}
