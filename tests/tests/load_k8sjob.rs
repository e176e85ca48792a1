//! Many runs at once on a real cluster: all end, and what each costs the API server is counted by the service itself.
//! `RUNNER_LOAD_RUNS` says how many; the default fits a test. 200 are more than the node's 110 pods: the rest waits until there is room.

use std::{collections::BTreeMap, time::Duration};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use runner_tests::{
    backend::k8sjob,
    scene::{On, Scene},
    service::{Service, eventually_within},
};
use worker_client::{RunHandle, RunSpec};

const DEFAULT_RUNS: usize = 24;
/// A Job, the Secret with its agent's token, a deletion; and one for what goes wrong.
const CALLS: f64 = 4.0;
/// How long all of them may take.
const PATIENCE: Duration = Duration::from_secs(900);

/// How often each of (verb, resource) was asked for.
type Calls = BTreeMap<(String, String), u64>;

async fn calls(service: &Service) -> Calls {
    let text = service.ops("/metrics").await.expect("the operators' port answers");
    let label = |line: &str, name: &str| {
        let (_, rest) = line.split_once(&format!("{name}=\"")).expect("the label");
        rest.split('"').next().unwrap_or_default().to_owned()
    };
    let counted = text.lines().filter(|line| line.starts_with("runner_backend_calls_total{"));
    counted
        .map(|line| {
            let count = line.rsplit(' ').next().expect("a count").parse().expect("a number");
            ((label(line, "verb"), label(line, "resource")), count)
        })
        .collect()
}

async fn end(run: &RunHandle) -> Result<(), String> {
    let end = run.wait().await.map_err(|error| error.to_string())?;
    if end.succeeded() { Ok(()) } else { Err(format!("{end:?}")) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[allow(clippy::print_stdout, reason = "the measured numbers are what the test is also for")]
async fn many_runs_at_once_all_end_for_four_calls_each() {
    let runs: usize =
        std::env::var("RUNNER_LOAD_RUNS").ok().map_or(DEFAULT_RUNS, |text| text.parse().expect("a number"));
    // Those that find no room on the node wait for it longer than they may by default.
    let settings = [("RUNNER_LIMITS__PENDING_TIMEOUT", "15m")];
    let prepared = Scene::prepare_with(On::K8sJob, "", &settings, "many runs at once").await;
    let Some(mut scene) = prepared else { return };
    scene.service.restart(&[]).await;
    let client = scene.service.patient_client();
    // Whether it is ready was asked for with calls, too.
    let before = calls(&scene.service).await;
    let clock = runner_core::clock::SystemClock::new();
    let begun = runner_core::clock::Clock::monotonic(&clock);
    let accepted = stream::iter(0..runs).map(|_| client.run(RunSpec::command(["true"]))).buffer_unordered(32);
    let accepted: Vec<_> = accepted.try_collect().await.expect("all are accepted");
    let ends = futures::future::join_all(accepted.iter().map(end));
    let ends = tokio::time::timeout(PATIENCE, ends).await.expect("none is stuck");
    let failed: Vec<_> = ends.into_iter().filter_map(Result::err).collect();
    assert!(failed.is_empty(), "{} of {runs}: {failed:#?}", failed.len());
    let took = runner_core::clock::Clock::monotonic(&clock).saturating_sub(begun);
    let admin = scene.cluster().client().await;
    let ours = format!("runner.instance={}", scene.service.instance());
    eventually_within(PATIENCE, "nothing left on the cluster", async || {
        k8sjob::labelled(&admin, &ours).await.is_empty().then_some(())
    })
    .await;
    let after = calls(&scene.service).await;
    let spent: Calls = after
        .iter()
        .map(|(call, count)| (call.clone(), count - before.get(call).copied().unwrap_or_default()))
        .filter(|(_, count)| *count > 0)
        .collect();
    // The watch, and what is asked for by the clock: health, and the reconciler's lists.
    let by_the_clock = |verb: &str, resource: &str| {
        verb == "watch" || [("get", "version"), ("list", "jobs")].contains(&(verb, resource))
    };
    let of_runs = spent.iter().filter(|((verb, resource), _)| !by_the_clock(verb, resource));
    let of_runs: u64 = of_runs.map(|(_, count)| count).sum();
    let each = of_runs as f64 / runs as f64;
    println!("{runs} runs in {took:?}; {each:.2} calls each; all calls: {spent:?}");
    assert!(each <= CALLS, "{each} calls for a run: {spent:?}");
    // What is counted is what was done.
    for made in [("create", "jobs"), ("create", "secrets"), ("delete", "jobs")] {
        let made = (made.0.to_owned(), made.1.to_owned());
        assert!(spent.get(&made).copied().unwrap_or_default() >= runs as u64, "{made:?}: {spent:?}");
    }
}
