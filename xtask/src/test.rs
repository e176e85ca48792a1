//! `cargo xtask test`: everything that must hold before a change lands.

use std::process::Command;

use anyhow::Result;

use crate::{check_deps, process, setup};

/// Sets up, then checks and tests everything. With filters: only the tests that they name.
pub(crate) fn run(filters: &[String]) -> Result<()> {
    setup::run()?;
    if filters.is_empty() {
        process::run(cargo()?.args(["fmt", "--all", "--check"]))?;
        process::run(cargo()?.args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
        check_deps::run()?;
    }
    // The service's tests start these as processes.
    process::run(cargo()?.args(["build", "-p", "runner", "-p", "runner-agent", "-p", "runnerctl"]))?;
    let mut test = cargo()?;
    test.args(["test", "--workspace", "--no-fail-fast"]);
    if !filters.is_empty() {
        test.arg("--").args(filters);
    }
    process::run(&mut test)
}

fn cargo() -> Result<Command> {
    process::cargo()
}
