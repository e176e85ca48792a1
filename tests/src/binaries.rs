//! Where the programs under test are. They are built on demand, so that a test never runs yesterday's.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

type Built = OnceLock<Result<PathBuf, String>>;

/// The folder of the programs: `RUNNER_TEST_BINARIES` where it is set, else that of this build, after building them.
fn folder(built: &Built, wanted: &[&str]) -> Result<PathBuf, String> {
    let make = || match std::env::var_os("RUNNER_TEST_BINARIES") {
        Some(folder) => Ok(folder.into()),
        None => build(wanted),
    };
    built.get_or_init(make).clone()
}

fn build(wanted: &[&str]) -> Result<PathBuf, String> {
    let own = std::env::current_exe().map_err(|error| format!("find this test's program: {error}"))?;
    // target/PROFILE/deps/TEST-HASH
    let folder = own.parent().and_then(Path::parent).ok_or("this test's program lies nowhere")?.to_owned();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet"]).args(wanted);
    if folder.file_name().is_some_and(|name| name == "release") {
        command.arg("--release");
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("the workspace lies nowhere")?;
    let output = command.current_dir(workspace).output().map_err(|error| format!("start cargo: {error}"))?;
    if output.status.success() {
        Ok(folder)
    } else {
        Err(format!("build the programs: {}", String::from_utf8_lossy(&output.stderr)))
    }
}

fn program(folder: Result<PathBuf, String>, name: &str) -> Result<PathBuf, String> {
    let path = folder?.join(name);
    if path.is_file() { Ok(path) } else { Err(format!("there is no {}", path.display())) }
}

/// The shim.
///
/// # Errors
/// Where it cannot be built.
pub fn agent() -> Result<PathBuf, String> {
    static BUILT: Built = OnceLock::new();
    program(folder(&BUILT, &["--bins", "--package", "runner-agent"]), "runner-agent")
}

/// The shim as it goes into containers: linked statically. `runner-agent-static` of `RUNNER_TEST_BINARIES` where that is set.
///
/// # Errors
/// Where it cannot be built.
pub fn static_agent() -> Result<PathBuf, String> {
    static BUILT: Built = OnceLock::new();
    let make = || {
        if let Some(folder) = std::env::var_os("RUNNER_TEST_BINARIES") {
            return Ok(PathBuf::from(folder).join("runner-agent-static"));
        }
        let own = std::env::current_exe().map_err(|error| format!("find this test's program: {error}"))?;
        // target/PROFILE/deps/TEST-HASH, or target/PROFILE/PROGRAM
        let folders =
            own.ancestors().skip(if own.ancestors().any(|path| path.ends_with("deps")) { 3 } else { 2 });
        let target = { folders }.next().ok_or("this test's program lies nowhere")?.join("static");
        let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("the workspace lies nowhere")?;
        let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args([
                "build",
                "--quiet",
                "--package",
                "runner-agent",
                "--bin",
                "runner-agent",
                "--no-default-features",
            ])
            .args(["--target", &triple, "--target-dir"])
            .arg(&target)
            .env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols -C opt-level=s")
            .current_dir(workspace)
            .output()
            .map_err(|error| format!("start cargo: {error}"))?;
        if output.status.success() {
            Ok(target.join(triple).join("debug/runner-agent"))
        } else {
            Err(format!("build the static agent: {}", String::from_utf8_lossy(&output.stderr)))
        }
    };
    program_at(BUILT.get_or_init(make).clone()?)
}

fn program_at(path: PathBuf) -> Result<PathBuf, String> {
    if path.is_file() { Ok(path) } else { Err(format!("there is no {}", path.display())) }
}

/// The service. The shim lies beside it.
///
/// # Errors
/// Where it cannot be built.
pub fn runner() -> Result<PathBuf, String> {
    static BUILT: Built = OnceLock::new();
    program(folder(&BUILT, &["--bins", "--package", "runner", "--package", "runner-agent"]), "runner")
}

/// The command line.
///
/// # Errors
/// Where it cannot be built.
pub fn runnerctl() -> Result<PathBuf, String> {
    static BUILT: Built = OnceLock::new();
    program(folder(&BUILT, &["--bins", "--package", "runnerctl"]), "runnerctl")
}

/// Who cleans up after a test, see [`place`](crate::place). Cargo builds it before it runs a test of this package; it is built
/// here for others only.
///
/// # Errors
/// Where it cannot be built.
pub fn keeper() -> Result<PathBuf, String> {
    const NAME: &str = "engine-keeper";
    static BUILT: Built = OnceLock::new();
    let own = std::env::current_exe().map_err(|error| format!("find this program: {error}"))?;
    // target/PROFILE/deps/TEST-HASH, or target/PROFILE/PROGRAM.
    let beside = own.ancestors().skip(1).take(2).map(|folder| folder.join(NAME)).find(|path| path.is_file());
    match beside {
        Some(path) => Ok(path),
        None => program(folder(&BUILT, &["--bin", NAME, "--package", "runner-tests"]), NAME),
    }
}
