//! `cargo xtask test`: everything that must hold before a change lands.

use std::process::Command;

use anyhow::Result;

use crate::{
    agent::{self, Roles},
    check_deps, image, process, setup,
};

/// Sets up, then checks and tests everything. With filters: only the tests that they name.
pub(crate) fn run(filters: &[String]) -> Result<()> {
    setup::run()?;
    if filters.is_empty() {
        process::run(cargo()?.args(["fmt", "--all", "--check"]))?;
        process::run(cargo()?.args([
            "clippy",
            "--workspace",
            "--all-targets",
            "--keep-going",
            "--",
            "-D",
            "warnings",
        ]))?;
        check_deps::run()?;
    }
    // All at once, with the features that the tests have too: the programs that tests start are built once, here.
    process::run(cargo()?.args(["build", "--workspace", "--all-targets"]))?;
    agent::run(false, Roles::Shim)?;
    if std::env::var_os("RUNNER_TEST_KUBECONFIG").is_some() {
        // Only pods have a use for it, and it takes long to build.
        image::run(false)?;
    }
    let mut test = cargo()?;
    test.env("RUNNER_TEST_BINARIES", process::target()?.join("debug"));
    test.args(["test", "--workspace", "--no-fail-fast"]);
    if !filters.is_empty() {
        test.arg("--").args(filters);
    }
    process::run(&mut test)
}

fn cargo() -> Result<Command> {
    process::cargo()
}
