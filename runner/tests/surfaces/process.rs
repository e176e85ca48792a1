//! The program itself: what it refuses, and how it says so.

use std::{
    path::Path,
    process::{Command, Output},
};

use runner_store::DataDirLock;

fn runner(args: &[&str]) -> Output {
    runner_with(args, &[])
}

fn runner_with(args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_runner"));
    // Nothing of the caller's own configuration.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("RUNNER_") {
            command.env_remove(name);
        }
    }
    command.args(args).envs(env.iter().copied()).output().unwrap()
}

fn refused(output: &Output, code: i32, part: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(stderr.contains(part), "{stderr}");
    assert!(output.stdout.is_empty(), "standard output is for data");
}

fn serve(dir: &Path, more: &[&str]) -> Output {
    let mut args = vec!["serve", "--data-dir", dir.to_str().unwrap()];
    args.extend(
        ["--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"].iter().filter(|_| more.is_empty()),
    );
    args.extend(more);
    runner(&args)
}

#[test]
fn a_second_service_on_a_data_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let _first = DataDirLock::acquire(dir.path()).unwrap();
    refused(&serve(dir.path(), &[]), 1, "is in use by another service");
}

#[test]
fn a_data_directory_that_cannot_be_written_is_refused() {
    // Nobody, root included, makes a directory here.
    refused(&serve(Path::new("/proc/runner-test"), &[]), 1, "/proc/runner-test cannot be written");
}

#[test]
fn an_address_beyond_loopback_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for address in ["0.0.0.0:0", "[::]:0"] {
        let args = ["--listen", address, "--ops-listen", "127.0.0.1:0"];
        refused(&serve(dir.path(), &args), 1, "callers are not authenticated");
    }
}

#[test]
fn whoever_trusts_callers_may_listen_beyond_loopback_and_operators_may_always() {
    let dir = tempfile::tempdir().unwrap();
    // A port that is taken: that it is asked for shows that the address is not refused.
    let taken = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let args = |listen, ops| {
        ["serve", "--data-dir", dir.path().to_str().unwrap(), "--listen", listen, "--ops-listen", ops]
    };
    let trusted = [("RUNNER_UNAUTHENTICATED_CALLERS", "whoever reaches the port is trusted")];
    let output = runner_with(&args(&address, "127.0.0.1:0"), &trusted);
    refused(&output, 1, &format!("{address} (listen) is in use"));
    let output = runner(&args("127.0.0.1:0", &address));
    refused(&output, 1, &format!("{address} (ops_listen) is in use"));
    let output = runner_with(&args(&address, "127.0.0.1:0"), &[("RUNNER_UNAUTHENTICATED_CALLERS", "yes")]);
    refused(&output, 2, "unauthenticated_callers = \"yes\" (from environment variable");
}

#[test]
fn a_port_that_is_taken_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = serve(dir.path(), &["--listen", &address, "--ops-listen", "127.0.0.1:0"]);
    refused(&output, 1, &format!("{address} (listen) is in use"));
}

#[test]
fn a_missing_agent_is_named_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("runner.toml");
    std::fs::write(&file, "[[backends]]\nkind = 'local'\nagent = '/nonexistent/runner-agent'\n").unwrap();
    let data = dir.path().join("data");
    let more = ["--config", file.to_str().unwrap(), "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"];
    refused(&serve(&data, &more), 1, "cannot execute the agent /nonexistent/runner-agent");
}

#[test]
fn a_wrong_configuration_ends_with_status_2() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("runner.toml");
    std::fs::write(&file, "[limits]\nlive_runs = 'many'\n").unwrap();
    let output = runner(&["config", "dump", "--config", file.to_str().unwrap()]);
    refused(&output, 2, "limits.live_runs = \"many\" (from file ");
    refused(&runner(&["config", "dump", "--config", "/nonexistent.toml"]), 2, "/nonexistent.toml");
}

#[test]
fn dump_and_schema_are_data() {
    let dump = runner(&["config", "dump", "--output", "json", "--data-dir", "/srv/x"]);
    assert!(dump.status.success());
    let json: serde_json::Value = serde_json::from_slice(&dump.stdout).unwrap();
    assert_eq!(
        (json["data_dir"].as_str(), json["listen"].as_str()),
        (Some("/srv/x"), Some("127.0.0.1:7600"))
    );
    let schema: serde_json::Value = serde_json::from_slice(&runner(&["config", "schema"]).stdout).unwrap();
    assert!(schema["properties"]["limits"].is_object());
}
