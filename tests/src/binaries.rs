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
        None => cargo(&[&["build", "--quiet"], wanted].concat()),
    };
    built.get_or_init(make).clone()
}

/// Runs cargo in the workspace, in the profile of this test's build. Answers the folder of its programs.
fn cargo(args: &[&str]) -> Result<PathBuf, String> {
    let own = std::env::current_exe().map_err(|error| format!("find this test's program: {error}"))?;
    // target/PROFILE/deps/TEST-HASH, or target/PROFILE/PROGRAM
    let folder = own.parent().ok_or("this test's program lies nowhere")?;
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(args);
    // As a person calls it: what cargo told this test of its package makes build scripts run again.
    for (name, _) in std::env::vars_os() {
        let of_the_package =
            |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
        if name.to_str().is_some_and(of_the_package) {
            command.env_remove(name);
        }
    }
    if folder.file_name().is_some_and(|name| name == "release") {
        command.arg("--release");
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("the workspace lies nowhere")?;
    let output = command.current_dir(workspace).output().map_err(|error| format!("start cargo: {error}"))?;
    if output.status.success() {
        Ok(folder.to_owned())
    } else {
        Err(format!("cargo {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr)))
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

/// The shim as it goes into containers: linked statically. Made by `cargo xtask agent`, which knows how.
///
/// # Errors
/// Where it cannot be built.
pub fn static_agent() -> Result<PathBuf, String> {
    static BUILT: Built = OnceLock::new();
    let make = || match std::env::var_os("RUNNER_TEST_BINARIES") {
        Some(folder) => Ok(folder.into()),
        None => cargo(&["run", "--quiet", "--package", "xtask", "--", "agent"]),
    };
    program(BUILT.get_or_init(make).clone(), "runner-agent-static")
}

/// The image of the agents in pods, as an archive. Made by `cargo xtask image`, which knows how.
///
/// # Errors
/// Where it cannot be built.
pub fn agent_image() -> Result<PathBuf, String> {
    static BUILT: Built = OnceLock::new();
    let make = || match std::env::var_os("RUNNER_TEST_BINARIES") {
        Some(folder) => Ok(folder.into()),
        None => cargo(&["run", "--quiet", "--package", "xtask", "--", "image", "agent"]),
    };
    program(BUILT.get_or_init(make).clone(), "runner-agent-image.tar")
}

/// The image of the service, as an archive. Made by `cargo xtask image`, which knows how.
///
/// # Errors
/// Where it cannot be built.
pub fn service_image() -> Result<PathBuf, String> {
    static BUILT: Built = OnceLock::new();
    let make = || match std::env::var_os("RUNNER_TEST_BINARIES") {
        Some(folder) => Ok(folder.into()),
        None => cargo(&["run", "--quiet", "--package", "xtask", "--", "image", "service"]),
    };
    program(BUILT.get_or_init(make).clone(), "runner-image.tar")
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
