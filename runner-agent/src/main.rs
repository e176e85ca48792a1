//! `runner-agent`: what runs beside or around a workload. See the library.

use std::{ffi::OsString, io::Write as _, path::Path, process::ExitCode};

use runner_agent::exec::{self, ShimExit};

const USAGE: &str =
    "usage: runner-agent exec DIR | contain [--unlinked] DIR | fetch | publish | probe [DIR] | --version";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let command: Vec<_> = arguments.iter().map(|argument| argument.to_string_lossy()).collect();
    match command.iter().map(AsRef::as_ref).collect::<Vec<_>>()[..] {
        ["exec", _] => ended(exec::run(Path::new(&arguments[1]))),
        ["contain", _] => ended(exec::run_contained(Path::new(&arguments[1]))),
        ["contain", "--unlinked", _] => ended(exec::run_unlinked(Path::new(&arguments[2]))),
        #[cfg(feature = "pod")]
        ["fetch"] => in_pod(async |pod| runner_agent::pod::fetch(&pod).await),
        #[cfg(feature = "pod")]
        ["publish"] => in_pod(async |pod| runner_agent::pod::publish(&pod).await),
        ["probe"] => probe(&std::env::temp_dir()),
        ["probe", _] => probe(Path::new(&arguments[1])),
        ["--version"] => print(concat!("runner-agent ", env!("CARGO_PKG_VERSION"))),
        _ => fail(USAGE),
    }
}

fn ended(exit: ShimExit) -> ExitCode {
    match exit {
        ShimExit::Recorded => ExitCode::SUCCESS,
        ShimExit::Failed => ExitCode::FAILURE,
        ShimExit::Refused => ExitCode::from(3),
    }
}

/// A role beside a program. What it has to say goes to the container's own log.
#[cfg(feature = "pod")]
fn in_pod(
    role: impl AsyncFnOnce(runner_agent::pod::Pod) -> Result<(), runner_agent::pod::PodError>,
) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("no runtime: {error}")),
    };
    let done = runner_agent::pod::Pod::this().and_then(|pod| runtime.block_on(role(pod)));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "runner-agent: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn probe(directory: &Path) -> ExitCode {
    match serde_json::to_string(&exec::probe(directory)) {
        Ok(report) => print(&report),
        Err(error) => fail(&error.to_string()),
    }
}

fn print(line: &str) -> ExitCode {
    match writeln!(std::io::stdout(), "{line}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn fail(line: &str) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "{line}");
    ExitCode::from(2)
}
