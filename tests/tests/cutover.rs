//! Moving runs from one backend to another, on real ones: the guide's own commands, and a ramp under load with a service
//! that is killed in the middle. With a cluster as the other backend: `cutover_k8sjob.rs`.

mod support;

use std::{fs, path::Path, time::Duration};

use runner_tests::service::Service;
use support::{
    ctl::{json, ok_in, words},
    ramp,
    two::{Other, Two, start},
    until,
};

const DEADLINE: Duration = Duration::from_secs(60);

/// The blocks of a page: the word after the fence, and the lines.
fn blocks(page: &str) -> Vec<(String, Vec<String>)> {
    let mut blocks: Vec<(String, Vec<String>)> = Vec::new();
    let mut within = false;
    for line in page.lines() {
        match line.strip_prefix("```") {
            Some(_) if within => within = false,
            Some(kind) => {
                within = true;
                blocks.push((kind.to_owned(), Vec::new()));
            }
            None if within => blocks.last_mut().expect("a block").1.push(line.to_owned()),
            None => {}
        }
    }
    blocks
}

#[test]
fn every_command_of_the_guide_does_what_it_says() {
    let name = "every_command_of_the_guide_does_what_it_says";
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let Some(Two { service, .. }) = runtime.block_on(start(Other::Local, name)) else { return };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cutover.md"))
        .expect("the guide");
    let mut executed = 0;
    for (kind, lines) in blocks(&page) {
        match kind.as_str() {
            "yaml" => fs::write(dir.path().join("policy.yaml"), lines.join("\n")).expect("write the policy"),
            "console" => {
                for line in lines {
                    let line = line.strip_prefix("$ runnerctl ").expect("a command").to_owned();
                    let line = prepared(&service, line);
                    let said = ok_in(&service, dir.path(), &words(&line));
                    assert!(!said.is_empty(), "{line}");
                    check(&line, &said);
                    executed += 1;
                }
            }
            other => panic!("what is a block of {other:?}?"),
        }
    }
    assert!(executed >= 29, "{executed} commands");
}

/// Waits for what a person would wait for before this command, and names the run that it is about.
fn prepared(service: &Service, line: String) -> String {
    if line.starts_with("parity") {
        until("a run was compared", DEADLINE, || {
            json(service, &["parity", "report", "-o", "json"])["total"]["pairs"] != 0
        });
        let listed = json(service, &["parity", "report", "-o", "json"]);
        assert_eq!(listed["total"]["agreeing"], 1, "{listed}");
        let runs = json(service, &["list", "-o", "json"]);
        return line.replace("RUN", runs["runs"][0]["run_id"].as_str().expect("an id"));
    }
    if line.ends_with("\"dind is gone\"") {
        until("the ramp is over", DEADLINE, || {
            json(service, &["traffic", "get", "-o", "json"])["ramp"]["status"] != "RUNNING"
        });
    }
    line
}

/// What the guide says of a command, where it says something that can be seen.
fn check(line: &str, said: &str) {
    let shows = |part: &str| assert!(said.contains(part), "{line}: {part:?} is not in\n{said}");
    let starts = |start: &str| line.starts_with(start);
    if starts("traffic explain --label workflow") {
        shows("Goes to dind (policy 1, its default, bucket ");
    } else if starts("traffic explain --label pin") {
        shows("Goes to dind (policy 1, rule \"pinned\")");
    } else if starts("traffic ramp cluster --step 1%") {
        shows("cluster: step 1 of 4, 1 %, running until ");
    } else if starts("traffic pause") {
        shows("1 %, paused");
    } else if starts("traffic abort") {
        shows("0 %, aborted");
        shows("percent: 0");
    } else if starts("traffic rollback") {
        shows("0 %, rolled back");
    } else if starts("traffic get --policy") {
        shows("salt:");
        shows("baseline: dind");
    } else if starts("run --idempotent") {
        shows("hello");
    } else if starts("traffic explain --idempotent") {
        shows("Shadow: on cluster");
    } else if starts("parity report --differing") {
        shows("all    0      0      0       0        -");
    } else if starts("parity report") {
        shows("all        1      1      0       0        100 %");
    } else if starts("parity show") {
        shows("agrees");
        shows("exit 0");
    } else if starts("backend health") {
        shows("healthy");
    } else if starts("cancel --all") {
        shows("0 cancelled, 0 had ended, 0 failed");
    } else if starts("traffic explain -- true") {
        shows("Goes to cluster (policy ");
    } else if starts("audit") {
        shows("traffic.rollback");
        shows("too slow");
    } else if starts("backend drain") {
        shows("Drained:");
        shows(if line.contains("for good") { "for good" } else { "it is to be switched off" });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ramp_up_and_down_under_load_loses_nothing_though_the_service_is_killed() {
    ramp::ramps_up_and_down(Other::Local).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_is_drained_under_load_and_no_run_is_refused() {
    ramp::drains(Other::Local).await;
}
