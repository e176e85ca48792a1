//! `runnerctl`, against a service.

use std::{
    ffi::OsStr,
    path::Path,
    process::{Command, Output, Stdio},
    sync::OnceLock,
};

use runner_tests::{binaries, service::Service};

/// The command, with nothing on standard input.
pub fn command<S: AsRef<OsStr>>(endpoint: &str, args: &[S]) -> Command {
    static PROGRAM: OnceLock<std::path::PathBuf> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| binaries::runnerctl().expect("the command line is built"));
    let mut command = Command::new(program);
    command.env_remove("RUNNER_ENDPOINT").args(["--endpoint", endpoint]).args(args).stdin(Stdio::null());
    command
}

/// Runs it to its end.
pub fn ctl<S: AsRef<OsStr>>(service: &Service, args: &[S]) -> Output {
    command(&service.endpoint(), args).output().expect("runnerctl")
}

/// What it wrote, as text.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn must_succeed<S: AsRef<OsStr>>(service: &Service, args: &[S], output: &Output) -> String {
    let args: Vec<_> = args.iter().map(AsRef::as_ref).collect();
    let said = text(&output.stderr);
    assert!(output.status.success(), "{args:?}: {}\n{said}\n{}", output.status, service.log());
    text(&output.stdout)
}

/// The output of a command that succeeded.
pub fn ok<S: AsRef<OsStr>>(service: &Service, args: &[S]) -> String {
    must_succeed(service, args, &ctl(service, args))
}

/// The same, in this directory.
pub fn ok_in<S: AsRef<OsStr>>(service: &Service, dir: &Path, args: &[S]) -> String {
    let output = command(&service.endpoint(), args).current_dir(dir).output().expect("runnerctl");
    must_succeed(service, args, &output)
}

/// The output of a command that succeeded, as a document.
pub fn json(service: &Service, args: &[&str]) -> serde_json::Value {
    let text = ok(service, args);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{args:?}: {error}: {text}"))
}

/// The words of a command line, with `"` around those that have blanks in them.
pub fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (i, part) in line.split('"').enumerate() {
        if i % 2 == 1 {
            words.push(part.to_owned());
        } else {
            words.extend(part.split_whitespace().map(str::to_owned));
        }
    }
    words
}
