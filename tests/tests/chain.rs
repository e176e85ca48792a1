//! Runs that take what other runs stored, five deep, over S3: from the command line and from Python.

mod support;

use std::{fs, process::Command};

use runner_tests::{
    objects::{Dialect, StoreServer},
    postgres::Postgres,
    service::Service,
};
use support::{
    ctl::ok,
    python::{folder, generate, interpreter, run},
    start_with,
};

/// A service whose objects are in a bucket, and its state where `settings` say.
fn service_on(bucket: &StoreServer, settings: &[(&str, String)]) -> Service {
    let credentials = bucket.credentials_file().display().to_string();
    let (url, endpoint) = (bucket.url("chain"), bucket.endpoint());
    let mut all = vec![
        ("RUNNER_OBJECT_STORE__URL", url.as_str()),
        ("RUNNER_OBJECT_STORE__ENDPOINT", endpoint.as_str()),
        ("RUNNER_OBJECT_STORE__ALLOW_HTTP", "true"),
        ("RUNNER_OBJECT_STORE__CREDENTIALS_FILE", credentials.as_str()),
    ];
    all.extend(settings.iter().map(|(name, value)| (*name, value.as_str())));
    start_with(&all)
}

/// Runs a shell program whose outputs are a directory and what a pattern matches; answers the run's id.
fn link(service: &Service, input: Option<&str>, to: &std::path::Path, program: &str) -> String {
    let (dir, texts) =
        (format!("/outputs/d:{}", to.join("d").display()), format!("/outputs/*.txt:{}", to.display()));
    let mut args = vec!["run", "-o", "json", "--output", &dir, "--output", &texts];
    if let Some(input) = input {
        args.extend(["--input", input]);
    }
    args.extend(["--", "sh", "-c", program]);
    let said = ok(service, &args);
    let first: serde_json::Value = serde_json::from_str(said.lines().next().expect("a line")).expect("JSON");
    first["accepted"]["run_id"].as_str().expect("an id").to_owned()
}

#[test]
fn five_runs_each_take_what_the_one_before_stored_from_the_command_line() {
    five_runs(&[]);
}

#[test]
fn five_runs_each_take_what_the_one_before_stored_with_their_state_in_postgresql() {
    match Postgres::shared() {
        Ok(server) => five_runs(&server.settings()),
        Err(why) => support::skip(&format!("chain, on PostgreSQL: {why}")),
    }
}

fn five_runs(settings: &[(&str, String)]) {
    let bucket = StoreServer::start(Dialect::S3);
    let service = service_on(&bucket, settings);
    let dir = tempfile::tempdir().expect("temp dir");
    let mut id = link(
        &service,
        None,
        &dir.path().join("1"),
        "mkdir /outputs/d; echo 1 | tee /outputs/d/1 > /outputs/log.txt",
    );
    for n in 2..=5 {
        let program =
            format!("cp -r /inputs/before/. /outputs; echo {n} | tee /outputs/d/{n} >> /outputs/log.txt");
        let input = format!("run:{id}/outputs:/inputs/before");
        id = link(&service, Some(&input), &dir.path().join(n.to_string()), &program);
    }
    let read = |path: &str| fs::read_to_string(dir.path().join(path)).expect("a downloaded file");
    assert_eq!(read("5/log.txt"), "1\n2\n3\n4\n5\n");
    assert_eq!((read("5/d/1"), read("5/d/5")), ("1\n".to_owned(), "5\n".to_owned()));
    assert_eq!(read("3/log.txt"), "1\n2\n3\n", "what came later changed nothing before it");
    let manifests = bucket.bucket().keys().iter().filter(|key| key.ends_with("/manifest.json")).count();
    assert_eq!(manifests, 5, "all of it lies in the bucket");
    assert_eq!(bucket.bucket().uploads(), [""; 0], "and no upload is left open");
}

#[test]
fn five_runs_each_take_what_the_one_before_stored_from_python() {
    let python = match interpreter() {
        Ok(python) => python,
        Err(why) => {
            assert!(std::env::var_os("RUNNER_REQUIRE_PYTHON").is_none_or(|v| v != "1"), "no Python: {why}");
            support::skip(&format!("chain, from Python: {why}"));
            return;
        }
    };
    let stubs = tempfile::tempdir().expect("temp dir");
    generate(&python, stubs.path()).expect("stubs");
    let bucket = StoreServer::start(Dialect::S3);
    let service = service_on(&bucket, &[]);
    let mut check = Command::new(&python);
    check.arg(folder().join("client_check.py")).arg(service.endpoint().trim_start_matches("http://"));
    check.args(["check_chain", "check_artifacts"]);
    check.env("PYTHONPATH", stubs.path()).env("PYTHONDONTWRITEBYTECODE", "1");
    match run(&mut check) {
        Ok(output) => support::say(&String::from_utf8_lossy(&output.stdout)),
        Err(why) => panic!("{why}\n--- the service said\n{}", service.log()),
    }
}
