//! Shadows on real backends: what a report finds, and a service that is killed between any two steps of a shadow's life.

mod support;

use std::{collections::BTreeMap, fs, os::unix::process::ExitStatusExt as _, path::Path, time::Duration};

use runner_core::crash::SHADOW_POINTS;
use runner_tests::{
    docker,
    service::{Service, eventually, within},
};
use support::{
    ctl::{json, ok},
    two,
};
use worker_client::{Client, ErrorKind, RunSpec, proto, proto::parity::Verdict};

const SIGKILL: i32 = 9;
/// Pairs that agree.
const PAIRS: usize = 50;
/// Something that the machine has and the image of the tests does not.
const ONLY_HERE: &str = "/bin/bash";

/// Every idempotent run of `dind` gets a shadow on `cluster`.
async fn shadow_everything(client: &Client, at_once: u32) {
    let policy = format!(r#"{{"shadow":{{"backend":"cluster","percent":100,"at_once":{at_once}}}}}"#);
    let change = Some(proto::change_traffic_request::Change::SetPolicy(policy));
    let request = proto::ChangeTrafficRequest { reason: "a test".to_owned(), expected_version: None, change };
    client.change_traffic(request).await.expect("set the policy");
}

fn script(script: &str) -> RunSpec {
    RunSpec::command(["sh", "-c", script]).idempotent().output("/outputs/d")
}

/// A run's parity, once it has a verdict.
async fn judged(client: &Client, id: &str) -> proto::Parity {
    eventually("the verdict of a pair", async || match client.parity(id).await {
        Ok(record) => (record.verdict() != Verdict::Open).then_some(record),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        // The service is being restarted, or dies.
        Err(error) if error.is_retryable() => None,
        Err(error) => panic!("{error}"),
    })
    .await
}

/// (kind, what) of each difference.
fn differences(record: &proto::Parity) -> Vec<(&'static str, &str)> {
    record.differences.iter().map(|found| (found.kind().as_str_name(), found.what.as_str())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn of_more_than_fifty_pairs_the_report_finds_the_three_that_differ_and_no_others() {
    let name = "of_more_than_fifty_pairs_the_report_finds_the_three_that_differ_and_no_others";
    let Some(engine) = docker::shared_or_skip(name) else { return };
    let service = two::start(engine).await;
    let client = service.client();
    shadow_everything(&client, 4).await;
    let agreeing = (0..PAIRS).map(|n| {
        let program = format!(
            "mkdir -p /outputs/d/x; seq 1 {n} | tee /outputs/d/x/seq; echo problem {n} >&2
             printf '%s' {n} > /outputs/d/{n}; : > /outputs/d/empty; exit {}",
            n % 3
        );
        script(&program)
    });
    let planted = [
        ("environment", script("mkdir /outputs/d; cat /proc/sys/kernel/hostname > /outputs/d/host")),
        // What is fast enough on one backend and not on the other.
        (
            "timeout",
            script(&format!("mkdir /outputs/d; [ -e {ONLY_HERE} ] || sleep 600"))
                .timeout(Duration::from_secs(3)),
        ),
        ("tool", script("mkdir /outputs/d; /bin/bash -c 'echo here > /outputs/d/made'")),
    ];
    let specs: Vec<_> = agreeing.map(|spec| (String::new(), spec)).collect();
    let planted = planted.into_iter().map(|(what, spec)| (what.to_owned(), spec));
    let mut kinds: BTreeMap<String, String> = BTreeMap::new();
    let mut runs = Vec::new();
    for (what, spec) in specs.into_iter().chain(planted) {
        let run = client.run(spec).await.expect("accepted");
        kinds.insert(run.id().to_owned(), what);
        runs.push(run);
    }
    for run in &runs {
        within("the end of a run", run.wait()).await.expect("the run ends");
    }
    let mut found: BTreeMap<&str, proto::Parity> = BTreeMap::new();
    for run in &runs {
        let record = judged(&client, run.id()).await;
        assert_eq!((record.primary_backend.as_str(), record.shadow_backend.as_str()), ("dind", "cluster"));
        match record.verdict() {
            Verdict::Agrees => assert!(record.log_compared && kinds[run.id()].is_empty(), "{record:#?}"),
            Verdict::Differs => {
                assert!(!kinds[run.id()].is_empty(), "{record:#?}");
                found.insert(&kinds[run.id()], record);
            }
            Verdict::Unspecified | Verdict::Open | Verdict::Skipped => panic!("{record:#?}"),
        }
    }
    assert_eq!(found.len(), 3, "{found:#?}");
    assert_eq!(differences(&found["environment"]), [("KIND_OUTPUT", "/outputs/d/host")]);
    let timeout = &found["timeout"];
    assert!(differences(timeout).contains(&("KIND_CAUSE", "")), "{timeout:#?}");
    assert_eq!(
        timeout
            .differences
            .iter()
            .find(|found| found.kind() == proto::parity_difference::Kind::Cause)
            .map(|found| (found.primary.as_str(), found.shadow.as_str())),
        Some(("TIMED_OUT", "EXITED"))
    );
    let tool = &found["tool"];
    assert_eq!(
        (tool.differences[0].primary.as_str(), tool.differences[0].shadow.as_str()),
        ("exit code 127", "exit code 0")
    );
    assert!(differences(tool).contains(&("KIND_OUTPUT", "/outputs/d/made")), "{tool:#?}");

    // What callers see is what they asked for.
    let listed =
        client.list_page(proto::ListRequest { page_size: 1000, ..Default::default() }).await.expect("list");
    assert_eq!(listed.runs.len(), runs.len());
    assert!(listed.runs.iter().all(|run| run.backend == "dind"));
    let hidden = client.get(tool.shadow_id.as_str()).await.expect_err("a shadow is nobody's");
    assert_eq!(hidden.kind(), ErrorKind::NotFound);

    let text = ok(&service, &["parity", "report"]);
    let total = format!("all        {}     {PAIRS}     3       0", PAIRS + 3);
    assert!(text.contains(&total), "{total:?} is not in\n{text}");
    for record in found.values() {
        assert!(text.contains(&record.run_id) && text.contains(&record.shadow_id), "{text}");
    }
    let document = json(&service, &["parity", "report", "--differing", "--primary", "dind", "-o", "json"]);
    assert_eq!((&document["total"]["differing"], &document["total"]["agreeing"]), (&3.into(), &0.into()));
    assert_eq!(
        json(&service, &["parity", "report", "--primary", "cluster", "-o", "json"])["total"]["pairs"],
        0
    );
    let shown = ok(&service, &["parity", "show", &tool.run_id]);
    for part in ["exit 127", "exit 0", "dind", "cluster", "output /outputs/d/made"] {
        assert!(shown.contains(part), "{part:?} is not in\n{shown}");
    }
    let metrics = service.ops("/metrics").await.expect("the metrics");
    for line in [
        format!(
            r#"runner_shadows_compared_total{{primary="dind",shadow="cluster",result="agrees"}} {PAIRS}"#
        ),
        r#"runner_shadows_compared_total{primary="dind",shadow="cluster",result="differs"} 3"#.to_owned(),
        format!(r#"runner_placed_runs_total{{backend="dind",version="1"}} {}"#, PAIRS + 3),
    ] {
        assert!(metrics.contains(&line), "{line} is not in\n{metrics}");
    }
    let ids: Vec<_> = runs.iter().map(|run| run.id()).collect();
    service.assert_clean(&ids).await;
}

/// Files below a directory whose path names the run.
fn files_of(dir: &Path, run: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok) {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files_of(&path, run));
        } else if path.display().to_string().contains(run) {
            found.push(path.display().to_string());
        }
    }
    found
}

async fn dies(service: &mut Service, point: &str) {
    let status = within("the death of the service", service.ended()).await;
    assert_eq!(status.signal(), Some(SIGKILL), "the service was to die at {point}: {status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_killed_at_any_step_of_a_shadow_makes_one_and_leaves_nothing() {
    let name = "a_service_that_is_killed_at_any_step_of_a_shadow_makes_one_and_leaves_nothing";
    let Some(engine) = docker::shared_or_skip(name) else { return };
    let mut service = two::start(engine).await;
    shadow_everything(&service.client(), 2).await;
    let objects = service.data_dir().join("objects");
    let mut pairs = 0;
    for point in SHADOW_POINTS {
        let is_orphan = point.starts_with("shadow.orphan");
        service.kill();
        service.restart(&[("RUNNER_CRASH_AT", point)]).await;
        let client = service.patient_client();
        // Where its primary is to go first, the shadow is one that only a cancel ends.
        let wait = if is_orphan { format!("[ ! -e {ONLY_HERE} ] || sleep 600;") } else { String::new() };
        let spec = script(&format!("mkdir /outputs/d; echo x | tee /outputs/d/f; {wait} exit 0"));
        let run = client.run(spec).await.expect("accepted");
        let id = run.id().to_owned();
        if is_orphan {
            within("its end", run.wait()).await.expect("the run ends");
            let shadow = judging(&client, &id).await;
            // The service may die before it answers.
            let _ = client.delete(id.as_str()).await;
            dies(&mut service, point).await;
            service.restart(&[]).await;
            let client = service.client();
            eventually("the primary and its shadow to be gone", async || {
                let gone = |error: worker_client::ClientError| error.kind() == ErrorKind::NotFound;
                let pair = client.parity(id.as_str()).await.err().is_some_and(gone);
                let run = client.get(id.as_str()).await.err().is_some_and(gone);
                (pair && run && files_of(&objects, &id).is_empty() && files_of(&objects, &shadow).is_empty())
                    .then_some(())
            })
            .await;
            service.assert_clean(&[&id, &shadow]).await;
            continue;
        }
        pairs += 1;
        dies(&mut service, point).await;
        service.restart(&[]).await;
        let client = service.client();
        assert_eq!(
            client.get(id.as_str()).await.expect("the run").state(),
            proto::RunState::Succeeded,
            "{point}"
        );
        let record = judged(&client, &id).await;
        assert_eq!(record.verdict(), Verdict::Agrees, "{point}: {record:#?}");
        let shadow = record.shadow.clone().expect("its shadow");
        assert_eq!(shadow.log.map(|log| log.bytes), Some(2), "its program ran once");
        let all = client.parity_page(proto::ListParityRequest::default()).await.expect("the pairs");
        assert_eq!(all.len(), pairs, "{point}");
        service.assert_clean(&[&id, &record.shadow_id]).await;
        // It goes with its primary.
        if pairs == 1 {
            client.delete(id.as_str()).await.expect("deleted");
            pairs = 0;
            assert_eq!(files_of(&objects, &record.shadow_id), [""; 0]);
        }
    }
}

/// The shadow's id, once its program runs.
async fn judging(client: &Client, id: &str) -> String {
    let shadow =
        eventually("its shadow", async || client.parity(id).await.ok().map(|record| record.shadow_id)).await;
    eventually("its shadow to run", async || {
        let backends = client.backends().await.ok()?;
        backends.iter().any(|backend| backend.name == "cluster" && backend.active_attempts > 0).then_some(())
    })
    .await;
    shadow
}
