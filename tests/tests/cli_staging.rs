//! `runnerctl` and files: patterns, other runs' outputs.

mod support;

use std::{fs, process::Command};

use runner_tests::service::Service;
use support::{
    ctl::{ctl, ok, text},
    start,
};

/// Runs a shell program; answers the run's id.
fn run(service: &Service, args: &[&str], program: &str) -> String {
    let all = [&["run", "--output", "json"], args, &["--", "sh", "-c", program]].concat();
    let said = ok(service, &all);
    let first: serde_json::Value = serde_json::from_str(said.lines().next().expect("a line")).expect("JSON");
    first["accepted"]["run_id"].as_str().expect("an id").to_owned()
}

#[test]
fn a_pattern_downloads_what_it_matches_with_its_directories() {
    let service = start();
    let dir = tempfile::tempdir().expect("temp dir");
    let to = |pattern: &str, name: &str| format!("{pattern}:{}", dir.path().join(name).display());
    let program = "mkdir -p /outputs/x/y; echo a >/outputs/a.txt; echo b >/outputs/x/y/b.txt; \
                   echo c >/outputs/x/c.log; echo '*' > '/outputs/*'";
    let (texts, star) = (to("/outputs/**/*.txt", "texts"), to("/outputs/\\*", "star"));
    run(&service, &["--output", &texts, "--output", &star], program);
    let read = |name: &str| fs::read_to_string(dir.path().join(name)).ok();
    assert_eq!(read("texts/a.txt").as_deref(), Some("a\n"));
    assert_eq!(read("texts/x/y/b.txt").as_deref(), Some("b\n"));
    assert_eq!(read("star").as_deref(), Some("*\n"));
    assert!(!dir.path().join("texts/x/c.log").exists());
    let nothing = ctl(&service, &["run", "--output", "/outputs/*.csv:x", "--", "true"]);
    assert_eq!(nothing.status.code(), Some(125), "{}", text(&nothing.stderr));
}

#[test]
fn a_run_takes_what_another_run_stored() {
    let service = start();
    let program = "mkdir -p /outputs/d/e; echo f >/outputs/d/e/f; echo r >/outputs/r; chmod 750 /outputs/r";
    let dir = tempfile::tempdir().expect("temp dir");
    let out = |path: &str, to: &str| format!("{path}:{}", dir.path().join(to).display());
    let (d, r) = (out("/outputs/d", "d"), out("/outputs/r", "r"));
    let first = run(&service, &["--output", &d, "--output", &r], program);
    let input = |from: &str, to: &str| format!("run:{first}{from}:{to}");
    let said = ok(
        &service,
        &[
            "run",
            "--input",
            &input("/outputs/r", "/inputs/file"),
            "--input",
            &input("/outputs/d", "/inputs/dir"),
            "--input",
            &input("", "/inputs/all"),
            "--",
            "sh",
            "-c",
            "cd /inputs && cat file dir/e/f all/outputs/r all/outputs/d/e/f && stat -c %a file",
        ],
    );
    assert_eq!(said, "r\nf\nr\nf\n750\n");
}

#[test]
fn an_archive_is_unpacked_where_it_is_wanted_and_a_hostile_one_is_an_input_failure() {
    let service = start();
    let dir = tempfile::tempdir().expect("temp dir");
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("src/d")).expect("directory");
    fs::write(at("src/d/x"), "contents\n").expect("file");
    let tar = |args: &[&str]| {
        let done = Command::new("tar").arg("-C").arg(at("src")).args(args).status().expect("tar");
        assert!(done.success(), "{args:?}");
    };
    let good = at("good.tar.gz").display().to_string();
    tar(&["-czf", &good, "."]);
    let said =
        ok(&service, &["run", "--extract", &format!("{good}:/inputs/s"), "--", "cat", "/inputs/s/d/x"]);
    assert_eq!(said, "contents\n");

    std::os::unix::fs::symlink("/etc", at("src/link")).expect("link");
    let evil = at("evil.tar").display().to_string();
    tar(&["-cf", &evil, "."]);
    let output = ctl(&service, &["run", "--extract", &format!("{evil}:/inputs/s"), "--", "true"]);
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{told}");
    assert!(told.contains("INPUT") && told.contains("symbolic link"), "{told}");
}

#[test]
fn an_output_that_is_not_there_is_refused_before_anything_runs() {
    let service = start();
    let first = run(&service, &[], "echo x > /outputs/undeclared");
    let waiting = ok(&service, &["run", "--detach", "--", "sleep", "600"]).trim().to_owned();
    for (from, why) in [
        (format!("run:{first}/outputs/undeclared"), "has no outputs"),
        (format!("run:{waiting}"), "has not ended"),
        ("run:018f0000-0000-7000-8000-000000000001".to_owned(), "there is no run"),
        ("https://example.org/x#sha256=00".to_owned(), "not among those"),
    ] {
        let output = ctl(&service, &["run", "--input", &format!("{from}:/inputs/x"), "--", "true"]);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("--input number 1") && said.contains(why), "{said}");
    }
    ok(&service, &["cancel", "--wait", &waiting]);
}

#[test]
fn artifacts_are_put_listed_taken_and_removed() {
    let service = start();
    let dir = tempfile::tempdir().expect("temp dir");
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("tree/d")).expect("directory");
    fs::create_dir(at("tree/empty")).expect("directory");
    fs::write(at("tree/d/x"), "deep\n").expect("file");
    fs::write(at("one"), "one\n").expect("file");
    let (one, tree) = (at("one").display().to_string(), at("tree").display().to_string());
    let put = ok(&service, &["artifact", "put", &one, &tree]);
    let uris: Vec<&str> = put.lines().collect();
    assert!(uris.len() == 2 && uris[0].starts_with("artifact:") && uris[1].ends_with('/'), "{put}");

    let listed: serde_json::Value =
        serde_json::from_str(&ok(&service, &["artifact", "ls", "-o", "json"])).expect("JSON");
    let listed = listed["artifacts"].as_array().expect("a list");
    assert_eq!(listed.len(), 3, "two files and a manifest: {listed:?}");
    assert!(listed.iter().any(|found| found["uri"] == uris[0] && found["size"] == 4));
    let below = ok(&service, &["artifact", "ls", uris[1]]);
    assert!(below.contains("/d/x") && !below.contains(uris[0]), "{below}");

    let to = at("got").display().to_string();
    ok(&service, &["artifact", "get", uris[1], &to]);
    assert_eq!(fs::read_to_string(at("got/d/x")).expect("file"), "deep\n");
    assert!(at("got/empty").is_dir() && fs::read_dir(at("got")).expect("directory").count() == 2);
    ok(&service, &["artifact", "get", uris[0], &to]);
    assert_eq!(fs::read_to_string(at("got/one")).expect("file"), "one\n");

    let run =
        run(&service, &["--output", &format!("/outputs/r:{}", at("r").display())], "echo r > /outputs/r");
    ok(&service, &["artifact", "get", &format!("run:{run}"), &at("all").display().to_string()]);
    assert_eq!(fs::read_to_string(at("all/outputs/r")).expect("file"), "r\n");
    ok(&service, &["artifact", "get", &format!("run:{run}/outputs/r"), &at("copy").display().to_string()]);
    assert_eq!(fs::read_to_string(at("copy")).expect("file"), "r\n");

    ok(&service, &["artifact", "rm", uris[0], uris[1]]);
    assert_eq!(ok(&service, &["artifact", "ls"]).lines().count(), 1, "only the head");
    let gone = ctl(&service, &["artifact", "get", uris[0], &to]);
    assert_eq!(gone.status.code(), Some(1), "{}", text(&gone.stderr));
    assert_eq!(ctl(&service, &["artifact", "rm", uris[1]]).status.code(), Some(1));
}

#[test]
fn a_local_pattern_uploads_what_it_matches_in_one_tree() {
    let service = start();
    let dir = tempfile::tempdir().expect("temp dir");
    for (path, contents) in [("a.csv", "1\n"), ("b.txt", "2\n"), ("x/y/c.csv", "3\n"), ("x/.h.csv", "4\n")] {
        let at = dir.path().join(path);
        fs::create_dir_all(at.parent().expect("a parent")).expect("directory");
        fs::write(at, contents).expect("file");
    }
    let input = format!("{}/**/*.csv:/inputs/data", dir.path().display());
    let said =
        ok(&service, &["run", "--input", &input, "--", "sh", "-c", "cd /inputs/data; find . -type f | sort"]);
    assert_eq!(said, "./a.csv\n./x/y/c.csv\n");
    let nothing = format!("{}/*.nothing:/inputs/data", dir.path().display());
    let output = ctl(&service, &["run", "--input", &nothing, "--", "true"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
}
