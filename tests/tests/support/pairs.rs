//! Shadows, and what a report finds of them.

use std::{collections::BTreeMap, time::Duration};

use runner_tests::service::{eventually, within};
use worker_client::{Client, ErrorKind, RunSpec, proto, proto::parity::Verdict};

use super::{
    ctl::{json, ok},
    two::{Other, Two, start},
};

/// Pairs that agree.
const PAIRS: usize = 50;

/// Every idempotent run of `dind` gets a shadow on `cluster`.
pub async fn shadow_everything(client: &Client, at_once: u32) {
    let policy = format!(r#"{{"shadow":{{"backend":"cluster","percent":100,"at_once":{at_once}}}}}"#);
    let change = Some(proto::change_traffic_request::Change::SetPolicy(policy));
    let request = proto::ChangeTrafficRequest { reason: "a test".to_owned(), expected_version: None, change };
    client.change_traffic(request).await.expect("set the policy");
}

pub fn script(script: &str) -> RunSpec {
    RunSpec::command(["sh", "-c", script]).idempotent().output("/outputs/d")
}

/// A run's parity, once it has a verdict.
pub async fn judged(client: &Client, id: &str) -> proto::Parity {
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

/// Of more than fifty pairs, the report finds the three that differ, and no others.
///
/// # Panics
/// Where it does not.
pub async fn the_report_finds_what_differs(other: Other) {
    let Some(Two { service, kubeconfig: _kept, .. }) = start(other, "the report").await else { return };
    let shell = other.shell();
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
            script(&format!("mkdir /outputs/d; [ -e {shell} ] || sleep 600")).timeout(Duration::from_secs(3)),
        ),
        ("tool", script(&format!("mkdir /outputs/d; {shell} -c 'echo here > /outputs/d/made'"))),
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
