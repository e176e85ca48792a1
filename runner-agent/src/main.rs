//! `runner-agent`: what runs beside or around a workload. See the library.

use std::{ffi::OsString, io::Write as _, path::Path, process::ExitCode};

use runner_agent::exec::{self, ShimExit};

const USAGE: &str = "usage: runner-agent exec DIR | contain DIR | probe [DIR] | --version";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let command: Vec<_> = arguments.iter().map(|argument| argument.to_string_lossy()).collect();
    match command.iter().map(AsRef::as_ref).collect::<Vec<_>>()[..] {
        ["exec", _] => ended(exec::run(Path::new(&arguments[1]))),
        ["contain", _] => ended(exec::run_contained(Path::new(&arguments[1]))),
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
