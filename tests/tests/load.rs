//! Many runs at once: none lost, none stuck, memory flat. `RUNNER_LOAD_RUNS` says how many; the default fits a test.

use std::time::Duration;

use futures::{StreamExt as _, stream};
use runner_tests::{
    proc,
    service::{Service, eventually},
};
use worker_client::{Client, RunSpec, proto};

const CONCURRENCY: usize = 64;
const DEFAULT_RUNS: usize = 2_000;
/// What the service may grow by between the first quarter of the runs and the last: rows of the store are cached, and the
/// allocator keeps some, but nothing may grow with each run.
const GROWTH: u64 = 48 * 1024 * 1024;

async fn one(client: Client) -> Result<i32, String> {
    let handle = client.run(RunSpec::command(["true"])).await.map_err(|error| error.to_string())?;
    let waiting = tokio::time::timeout(Duration::from_secs(300), handle.wait());
    let end =
        waiting.await.map_err(|_| format!("{} is stuck", handle.id()))?.map_err(|error| error.to_string())?;
    end.exit_code().filter(|_| end.succeeded()).ok_or_else(|| format!("{end:?}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[allow(clippy::print_stdout, reason = "the measured numbers are what the test is also for")]
async fn many_runs_at_once_all_succeed_in_flat_memory() {
    let runs: usize =
        std::env::var("RUNNER_LOAD_RUNS").ok().map_or(DEFAULT_RUNS, |text| text.parse().expect("a number"));
    let service = Service::start().await;
    let pid = service.pid();
    let client = service.patient_client();
    let clock = runner_core::clock::SystemClock::new();
    let begun = runner_core::clock::Clock::monotonic(&clock);
    let mut samples = Vec::new();
    let mut done = stream::iter(0..runs).map(|_| one(client.clone())).buffer_unordered(CONCURRENCY);
    let mut finished = 0;
    while let Some(result) = done.next().await {
        assert_eq!(result, Ok(0), "run {finished}");
        finished += 1;
        if finished % 50 == 0 {
            samples.push(proc::resident_bytes(pid).expect("the service lives"));
        }
    }
    drop(done);
    let took = runner_core::clock::Clock::monotonic(&clock).saturating_sub(begun);
    assert_eq!(finished, runs);
    let listed = client.list(worker_client::ListFilter::default().state(proto::RunState::Succeeded));
    let listed = listed.map(|run| run.expect("list").run_id).collect::<std::collections::BTreeSet<_>>().await;
    assert_eq!(listed.len(), runs, "none is lost");
    let quarter = samples.len().div_ceil(4).max(1);
    let most = |samples: &[u64]| samples.iter().copied().max().unwrap_or_default();
    let (first, last) = (most(&samples[..quarter]), most(&samples[samples.len() - quarter..]));
    println!(
        "{runs} runs at concurrency {CONCURRENCY} in {took:?}: {:.1} runs/s; resident {} MiB in the first quarter, {} MiB in the last",
        runs as f64 / took.as_secs_f64(),
        first >> 20,
        last >> 20,
    );
    assert!(last <= first + GROWTH, "memory grew from {first} to {last} bytes");
    service.assert_clean(&[]).await;
    let files = async || proc::open_files(pid).filter(|count| *count < 300);
    eventually("open files to be few again", files).await;
}
