//! A Python caller that was made from the proto files alone, against a real service.
//!
//! Needs `python3` with `venv` and a package index that `pip` reaches. Without them the test is a visible skip, and a
//! failure where `RUNNER_REQUIRE_PYTHON=1`.

mod support;

use std::process::Command;

use support::{
    python::{folder, generate, interpreter, run},
    start,
};

#[test]
fn a_python_client_runs_streams_resumes_cancels_and_moves_artifacts() {
    let python = match interpreter() {
        Ok(python) => python,
        Err(why) => {
            assert!(std::env::var_os("RUNNER_REQUIRE_PYTHON").is_none_or(|v| v != "1"), "no Python: {why}");
            support::skip(&format!("python_client: {why}"));
            return;
        }
    };
    let stubs = tempfile::tempdir().expect("temp dir");
    generate(&python, stubs.path()).expect("stubs");
    let service = start();
    let endpoint = service.endpoint();
    let mut check = Command::new(&python);
    check.arg(folder().join("client_check.py")).arg(endpoint.trim_start_matches("http://"));
    check.env("PYTHONPATH", stubs.path()).env("PYTHONDONTWRITEBYTECODE", "1");
    match run(&mut check) {
        Ok(output) => support::say(&String::from_utf8_lossy(&output.stdout)),
        Err(why) => panic!("{why}\n--- the service said\n{}", service.log()),
    }
}
