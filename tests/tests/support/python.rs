//! Python callers: an environment with the pinned packages, and the stubs of the contract.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// Where the scripts are.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("python")
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").to_owned()
}

/// Runs a command; answers what it wrote, or why it failed.
///
/// # Errors
/// Where it cannot be started or does not succeed.
pub fn run(command: &mut Command) -> Result<Output, String> {
    let line = format!("{command:?}");
    let output = command.output().map_err(|error| format!("{line}: {error}"))?;
    if output.status.success() {
        return Ok(output);
    }
    let text = [output.stdout, output.stderr].concat();
    Err(format!("{line}: {}\n{}", output.status, String::from_utf8_lossy(&text)))
}

/// The interpreter of a virtual environment with the pinned packages, made once for each list of packages.
///
/// # Errors
/// Why there is none.
pub fn interpreter() -> Result<PathBuf, String> {
    let wanted = fs::read_to_string(folder().join("requirements.txt")).map_err(|e| e.to_string())?;
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    // target/PROFILE/deps/TEST-HASH
    let target = own.ancestors().nth(3).ok_or("this test's program lies nowhere")?;
    let environment = target.join("python-venv");
    let (mark, python) = (environment.join("installed.txt"), environment.join("bin/python3"));
    if fs::read_to_string(&mark).is_ok_and(|installed| installed == wanted) {
        return Ok(python);
    }
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&environment))?;
    let requirements = folder().join("requirements.txt");
    run(Command::new(&python)
        .args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--only-binary",
            ":all:",
            "-r",
        ])
        .arg(requirements))?;
    // Written last: an environment without it is made anew.
    fs::write(mark, wanted).map_err(|e| e.to_string())?;
    Ok(python)
}

/// Makes the stubs of the contract.
///
/// # Errors
/// Where that fails.
pub fn generate(python: &Path, into: &Path) -> Result<(), String> {
    let proto = workspace().join("proto");
    let mut command = Command::new(python);
    command.args(["-m", "grpc_tools.protoc", "-I"]).arg(&proto);
    command.arg(format!("--python_out={}", into.display()));
    command.arg(format!("--grpc_python_out={}", into.display()));
    for name in ["types", "runner", "artifacts", "admin"] {
        command.arg(format!("runner/v1/{name}.proto"));
    }
    run(&mut command).map(drop)
}
