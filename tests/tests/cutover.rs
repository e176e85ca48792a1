//! Moving runs from one backend to another, on real ones: the guide's own commands, and a ramp under load with a service
//! that is killed in the middle.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use runner_tests::{
    docker,
    service::{Service, eventually},
};
use support::{
    ctl::{json, ok_in},
    two::start,
    until,
};

use worker_client::{RunSpec, proto};

fn words(line: &str) -> Vec<String> {
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
    let Some(engine) = docker::shared_or_skip(name) else { return };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let service = runtime.block_on(start(engine));
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

/// Callers that run one no-op after the other, and remember how each was accepted.
struct Load {
    stop: Arc<AtomicBool>,
    accepted: Arc<Mutex<Vec<proto::Run>>>,
    callers: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    fn start(service: &Service, callers: usize) -> Self {
        let (stop, accepted) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let caller = || {
            let (client, stop, accepted) =
                (service.patient_client(), Arc::clone(&stop), Arc::clone(&accepted));
            #[allow(clippy::disallowed_methods, reason = "a test's own tasks")]
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let run = client.run(RunSpec::command(["true"])).await.expect("accepted");
                    accepted.lock().expect("no caller panicked").push(run.run().clone());
                    run.wait().await.expect("its end");
                }
            })
        };
        Self { callers: (0..callers).map(|_| caller()).collect(), stop, accepted }
    }

    /// Waits until each of these backends has got another run.
    async fn reaches(&self, backends: &[&str]) {
        let count = |backend: &str| {
            let accepted = self.accepted.lock().expect("no caller panicked");
            accepted.iter().filter(|run| run.backend == backend).count()
        };
        let before: Vec<_> = backends.iter().map(|backend| count(backend)).collect();
        eventually("runs on the backends", async || {
            backends.iter().zip(&before).all(|(backend, before)| count(backend) > *before).then_some(())
        })
        .await;
    }

    /// Waits for the end of every run that was begun.
    async fn stop(self) -> Vec<proto::Run> {
        self.stop.store(true, Ordering::Relaxed);
        for caller in self.callers {
            caller.await.expect("a caller that was never refused");
        }
        std::mem::take(&mut self.accepted.lock().expect("no caller panicked"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ramp_up_and_down_under_load_loses_nothing_though_the_service_is_killed() {
    let name = "a_ramp_up_and_down_under_load_loses_nothing_though_the_service_is_killed";
    let Some(engine) = docker::shared_or_skip(name) else { return };
    let mut service = start(engine).await;
    let client = service.patient_client();
    let change = |change| {
        let request = proto::ChangeTrafficRequest {
            reason: "a test".to_owned(),
            expected_version: None,
            change: Some(change),
        };
        client.change_traffic(request)
    };
    let policy =
        r#"{"default":{"split":{"baseline":"dind","canaries":[{"backend":"cluster","percent":0}]}}}"#;
    change(proto::change_traffic_request::Change::SetPolicy(policy.to_owned()))
        .await
        .expect("set the policy");
    let load = Load::start(&service, 4);
    load.reaches(&["dind"]).await;
    let step = |percent: u32, millis: u64| proto::RampStep {
        share: percent * 100,
        hold: Some(worker_client::convert::duration_to_proto(Duration::from_millis(millis))),
    };
    let steps = vec![step(10, 1000), step(50, 3000), step(100, 1000)];
    let ramp = proto::StartRamp { rule: String::new(), backend: "cluster".to_owned(), steps };
    change(proto::change_traffic_request::Change::StartRamp(ramp)).await.expect("start the ramp");
    let at = async |step: u32| {
        eventually("the ramp's step", async || {
            let ramp = client.traffic().await.ok()?.ramp?;
            (ramp.step >= step).then_some(())
        })
        .await;
    };
    at(2).await;
    service.kill();
    service.restart(&[]).await;
    at(3).await;
    load.reaches(&["cluster"]).await;
    change(proto::change_traffic_request::Change::Rollback(proto::Rollback::default()))
        .await
        .expect("roll back");
    load.reaches(&["dind"]).await;
    let accepted = load.stop().await;
    let ids: BTreeSet<&str> = accepted.iter().map(|run| run.run_id.as_str()).collect();
    assert_eq!(ids.len(), accepted.len(), "no run is two");
    // What each version said, from the audit log.
    let versions: BTreeMap<u64, String> = client
        .audit(0, 1000)
        .await
        .expect("the audit log")
        .into_iter()
        .map(|entry| (entry.version, entry.what))
        .collect();
    let mut by_backend: BTreeMap<String, u32> = BTreeMap::new();
    for before in &accepted {
        let run = client.get(before.run_id.as_str()).await.expect("the run is there");
        assert_eq!(
            (&run.backend, &run.decision),
            (&before.backend, &before.decision),
            "no run changes backends"
        );
        assert_eq!(run.state(), proto::RunState::Succeeded, "{run:?}");
        let decision = run.decision.expect("what decided");
        let bucket = decision.bucket.expect("its bucket");
        let said = &versions[&decision.version];
        let share = if said.contains("running") || said.contains("finished") {
            let percent = said.split(", ").nth(1).and_then(|part| part.strip_suffix(" %")).expect("a share");
            percent.parse::<u32>().expect("a number") * 100
        } else {
            0
        };
        let (first, other) = if bucket < share { ("cluster", "dind") } else { ("dind", "cluster") };
        // On a machine that is busy enough an engine may not answer for a while.
        let expected =
            if decision.passed_over.iter().any(|backend| backend == first) { other } else { first };
        assert_eq!(run.backend, expected, "bucket {bucket}, version {}: {said}", decision.version);
        *by_backend.entry(run.backend).or_default() += 1;
    }
    assert_eq!(by_backend.len(), 2, "{by_backend:?}");
    support::say(&format!("{by_backend:?}"));
    service.assert_clean(&ids.into_iter().collect::<Vec<_>>()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_is_drained_under_load_and_no_run_is_refused() {
    let name = "a_backend_is_drained_under_load_and_no_run_is_refused";
    let Some(engine) = docker::shared_or_skip(name) else { return };
    let service = start(engine).await;
    let dir = tempfile::tempdir().expect("a temporary directory");
    let policy = "default: { split: { baseline: dind, canaries: [ { backend: cluster, percent: 50 } ] } }\n";
    fs::write(dir.path().join("p.yaml"), policy).expect("write the policy");
    ok_in(&service, dir.path(), &words("traffic set p.yaml --reason test"));
    let load = Load::start(&service, 4);
    load.reaches(&["dind", "cluster"]).await;
    let client = service.client();
    ok_in(&service, dir.path(), &words("backend drain dind --wait --reason test"));
    let backends = client.backends().await.expect("the backends");
    let dind = backends.iter().find(|backend| backend.name == "dind").expect("dind");
    assert_eq!((dind.live_runs, dind.drained.is_some()), (0, true), "it is empty, under load");
    // The callers go on meanwhile, and each of their runs is accepted.
    load.reaches(&["cluster"]).await;
    load.stop().await;
}
