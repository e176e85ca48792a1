//! `cargo xtask test`: everything that must hold before a change lands.

use std::{fs, process::Command};

use anyhow::Result;

use crate::{
    agent::{self, Roles},
    beside::Beside,
    check_deps, process, setup,
};

/// Names the kubeconfig of the cluster that tests may use.
const KUBECONFIG: &str = "RUNNER_TEST_KUBECONFIG";
/// The backends whose absence is a failure, with commas between.
const REQUIRED: &str = "RUNNER_REQUIRE_BACKENDS";
/// The backend that needs a cluster, as it is required and as the tests of it are named.
const CLUSTER_BACKEND: &str = "k8sjob";
/// How many of a cluster's tests run at once. More do not end earlier: the one node has two cores to start pods with.
const CLUSTER_THREADS: u32 = 8;

/// Sets up, then checks and tests everything. With filters: only the tests that they name.
pub(crate) fn run(filters: &[String]) -> Result<()> {
    setup::run()?;
    if filters.is_empty() {
        process::run(cargo()?.args(["fmt", "--all", "--check"]))?;
        check_deps::run()?;
    }
    // All at once, with the features that the tests have too: the programs that tests start are built once, here.
    process::run(cargo()?.args(["build", "--workspace", "--all-targets"]))?;
    agent::run(false, Roles::Shim)?;
    let required = std::env::var(REQUIRED).unwrap_or_default();
    let on_cluster = std::env::var_os(KUBECONFIG).is_some() || required.contains(CLUSTER_BACKEND);
    let mut commands = Vec::new();
    if filters.is_empty() {
        commands.push(vec!["lint"]);
    }
    if on_cluster {
        commands.push(vec!["image", "for-tests"]);
    }
    let beside = Beside::start(commands)?;
    // A cluster's tests wait for its node nearly all the time, and a busy node is late: so they run beside one another, in
    // numbers, and beside nothing else.
    let mut on_this_machine = tests(&[])?;
    on_this_machine.env_remove(KUBECONFIG).env(REQUIRED, required.replace(CLUSTER_BACKEND, ""));
    let failed = process::run(on_this_machine.args(to_programs(filters, None))).err();
    beside.wait()?;
    if on_cluster {
        let mut on_the_cluster = tests(&cluster_tests()?)?;
        process::run(on_the_cluster.args(to_programs(filters, Some(CLUSTER_THREADS))))?;
    }
    failed.map_or(Ok(()), Err)
}

/// Clippy over everything, in a folder of its own: cargo lets nobody else work in a folder where it builds.
pub(crate) fn lint() -> Result<()> {
    let mut clippy = cargo()?;
    clippy.args(["clippy", "--workspace", "--all-targets", "--keep-going", "--target-dir"]);
    process::run(clippy.arg(process::target()?.join("lint")).args(["--", "-D", "warnings"]))
}

/// `cargo test`, of everything or of these test targets.
fn tests(only: &[String]) -> Result<Command> {
    let mut test = cargo()?;
    test.env("RUNNER_TEST_BINARIES", process::target()?.join("debug"));
    // Always the whole workspace: another selection has other features, and is built anew.
    test.args(["test", "--workspace", "--no-fail-fast"]);
    for name in only {
        test.args(["--test", name]);
    }
    Ok(test)
}

/// What goes to the tests' own programs.
fn to_programs(filters: &[String], threads: Option<u32>) -> Vec<String> {
    let mut all: Vec<String> = filters.to_vec();
    all.extend(threads.map(|threads| format!("--test-threads={threads}")));
    if !all.is_empty() {
        all.insert(0, "--".to_owned());
    }
    all
}

/// The test targets that need a cluster: those with its backend in their names.
fn cluster_tests() -> Result<Vec<String>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(process::root()?.join("tests/tests"))? {
        let name = entry?.file_name();
        if let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".rs"))
            && name.contains(CLUSTER_BACKEND)
        {
            all.push(name.to_owned());
        }
    }
    all.sort();
    Ok(all)
}

fn cargo() -> Result<Command> {
    process::cargo()
}
