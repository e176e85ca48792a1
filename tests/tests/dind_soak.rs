//! The service with the Docker backend on a real engine, through what happens to services and engines.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bollard::query_parameters::{ListContainersOptionsBuilder, ListNetworksOptions, ListVolumesOptions};
use futures::{StreamExt as _, stream};
use runner_tests::{
    backend::dind::{self, IMAGE},
    docker::{self, Engine, EngineOptions, TestImage},
    proc,
    service::{Service, Watched, eventually, watch},
};
use sha2::{Digest as _, Sha256};
use worker_client::{Client, RunOptions, RunSpec, StreamOptions, proto};

const RUNS: usize = 200;
const CONCURRENCY: usize = 16;
/// Between two events of one run. A run that is queued behind others has none, and engines are slow on busy machines.
const PATIENCE: Duration = Duration::from_secs(900);

/// The configuration of a service whose only backend is this engine.
fn settings(engine: &Engine, host: &str, more: &str) -> Vec<(&'static str, String)> {
    let agent = dind::config(engine).agent.expect("the harness names the agent");
    let backend = format!(
        "[{{ kind = 'dind', name = 'dind', host = '{host}', agent = '{}', default_image = '{IMAGE}', \
         slots = {CONCURRENCY}{more} }}]",
        agent.display()
    );
    vec![("RUNNER_BACKENDS", backend), ("RUNNER_DEFAULT_BACKEND", "dind".to_owned())]
}

async fn start(settings: &[(&'static str, String)]) -> Service {
    let settings: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    Service::start_with(&settings).await
}

/// Everything on the engine that is not there when nothing runs.
async fn left_on(engine: &Engine) -> Vec<String> {
    let docker = engine.connect();
    let all = ListContainersOptionsBuilder::default().all(true).build();
    let containers = docker.list_containers(Some(all)).await.expect("list the containers");
    let volumes = docker.list_volumes(None::<ListVolumesOptions>).await.expect("list the volumes");
    let networks = docker.list_networks(None::<ListNetworksOptions>).await.expect("list the networks");
    let networks = networks.into_iter().filter_map(|network| network.name);
    let mut left: Vec<String> =
        containers.into_iter().filter_map(|container| container.names).flatten().collect();
    left.extend(volumes.volumes.into_iter().flatten().map(|volume| format!("volume {}", volume.name)));
    left.extend(
        networks
            .filter(|name| !["bridge", "host", "none"].contains(&name.as_str()))
            .map(|name| format!("network {name}")),
    );
    left
}

async fn assert_nothing_left(engine: &Engine) {
    let mut left = Vec::new();
    let clean = async {
        loop {
            left = left_on(engine).await;
            if left.is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    // The service removes what it finds left over once a minute.
    if tokio::time::timeout(Duration::from_secs(150), clean).await.is_err() {
        panic!("left on the engine: {left:?}");
    }
}

/// No process of a container outlives it. The kernel may take a moment.
async fn assert_no_process(engine: &Engine) {
    for _ in 0..300 {
        if engine.processes().is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("processes outlive their containers: {:#?}", engine.process_lines());
}

fn lines(number: usize) -> (String, String) {
    let out = (0..200).map(|line| format!("{number} {line}\n")).collect();
    (out, format!("problem of {number}\n"))
}

/// Copies its input, and writes to both streams for a while.
fn busy(number: usize) -> RunSpec {
    let script = format!(
        "cat /inputs/data > /outputs/copy; i=0; \
         while [ $i -lt 200 ]; do echo \"{number} $i\"; i=$((i+1)); [ $((i % 50)) = 0 ] && sleep 0.1; done; \
         echo 'problem of {number}' >&2; exit $(({number} % 3))"
    );
    RunSpec::command(["sh", "-c", &script])
        .input_bytes("/inputs/data", format!("input of {number}\n"))
        .output("/outputs/copy")
}

/// Submits a run, as often as it takes, and watches it to its end.
async fn conduct(client: &Client, number: usize) -> (String, Watched) {
    let options = RunOptions { run_id: None, idempotency_key: Some(format!("soak {number}")) };
    let handle = client.run_with(busy(number), options).await.expect("the run is accepted");
    let id = handle.id().to_owned();
    let mut watched = Watched::default();
    let mut events = client.stream(&id, StreamOptions::default());
    while let Some(event) = tokio::time::timeout(PATIENCE, events.next()).await.expect("an event in time") {
        let event = event.expect("the stream goes on");
        watched.take(&id, event.cursor, event.event);
    }
    assert_eq!(watched.terminated, 1, "the terminal event is the last: {:?}", watched.states);
    (id, watched)
}

/// What is true of run `number`, whatever happened meanwhile. Answers its cause.
fn judge(number: usize, watched: &Watched) -> proto::Cause {
    let end = watched.end();
    let outcome = &end.outcome;
    let cause = outcome.cause();
    let (out, err) = lines(number);
    let seen = String::from_utf8_lossy(&watched.out);
    assert_eq!(watched.dropped, 0);
    if cause != proto::Cause::Exited {
        // An engine that goes away may take an attempt with it; then that is said, and the log is what was written.
        let lost = [proto::Cause::Backend, proto::Cause::Lost];
        assert!(lost.contains(&cause) && end.state == proto::RunState::Failed, "run {number}: {end:?}");
        assert!(out.starts_with(&*seen), "run {number}: {seen:?}");
        return cause;
    }
    let code = i32::try_from(number % 3).expect("small");
    let state = if code == 0 { proto::RunState::Succeeded } else { proto::RunState::Failed };
    assert_eq!((end.state, end.exit_code()), (state, Some(code)), "run {number}: {end:?}");
    assert!(seen == out, "run {number}: {} of {} bytes of standard output: {end:?}", seen.len(), out.len());
    assert_eq!(String::from_utf8_lossy(&watched.err), err, "run {number}");
    let manifest = end.outputs().expect("outputs of failed runs are published, too");
    assert_eq!(manifest.partial, code != 0, "run {number}");
    let entry = manifest.entries.iter().find(|entry| entry.output == "/outputs/copy").expect("the output");
    let digest = hex::encode(Sha256::digest(format!("input of {number}\n")));
    assert_eq!(entry.sha256, digest, "run {number}");
    cause
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_runs_end_truly_though_engine_and_service_are_ended_twice_each() {
    const TEST: &str = "two_hundred_runs";
    let options = EngineOptions { live_restore: true, ..EngineOptions::default() };
    let Some(engine) = docker::start_or_skip(TEST, options) else { return };
    let engine = Arc::new(engine);
    TestImage::busybox().load(&engine.connect(), IMAGE).await;
    let settings = settings(&engine, &engine.host(), ", concurrent_starts = 3");
    let mut service = start(&settings).await;
    let client = service.patient_client();
    let done = Arc::new(AtomicUsize::new(0));
    let runs = {
        let done = Arc::clone(&done);
        stream::iter(0..RUNS)
            .map(move |number| {
                let (client, done) = (client.clone(), Arc::clone(&done));
                async move {
                    let (id, watched) = conduct(&client, number).await;
                    done.fetch_add(1, Ordering::Relaxed);
                    (number, id, watched)
                }
            })
            // More than run at once, so that some are always queued.
            .buffer_unordered(CONCURRENCY * 2)
            .collect::<Vec<_>>()
    };
    let trouble = async {
        let reached = async |count: usize| {
            // Not `eventually`: this is as long as the runs take.
            while done.load(Ordering::Relaxed) < count {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let on_engine = async |work: fn(&Engine)| {
            let engine = Arc::clone(&engine);
            tokio::task::spawn_blocking(move || work(&engine)).await.expect("the engine comes up again");
        };
        reached(RUNS / 5).await;
        on_engine(|engine| engine.restart(true)).await;
        reached(RUNS * 2 / 5).await;
        service.kill();
        service.restart(&[]).await;
        reached(RUNS * 3 / 5).await;
        on_engine(|engine| {
            engine.kill();
            engine.resurrect(true);
        })
        .await;
        reached(RUNS * 4 / 5).await;
        service.kill();
        service.restart(&[]).await;
    };
    let (runs, ()) = futures::join!(runs, trouble);

    assert_eq!(runs.len(), RUNS);
    let mut causes: BTreeMap<String, usize> = BTreeMap::new();
    let mut taken = Vec::new();
    for (number, _, watched) in &runs {
        let cause = judge(*number, watched);
        *causes.entry(cause.as_str_name().to_owned()).or_default() += 1;
        if cause != proto::Cause::Exited {
            taken.push(format!("run {number}: {}", watched.end().outcome.message));
        }
    }
    // The same again, from the store alone.
    let client = service.client();
    for (number, id, watched) in runs.iter().step_by(10) {
        let again = watch(&client, id, "").await;
        assert!(again.out == watched.out && again.err == watched.err, "run {number}: the stored log differs");
        assert_eq!(again.end, watched.end, "run {number}: its end changed");
    }
    let listed: HashMap<String, i32> = all_runs(&client).await;
    assert_eq!(listed.len(), RUNS, "one run for each that was asked for");
    let exited = causes.get("CAUSE_EXITED").copied().unwrap_or(0);
    #[allow(clippy::print_stdout, reason = "what was seen is worth knowing")]
    {
        println!("causes: {causes:?} {taken:#?}");
    }
    assert!(
        exited * 10 >= RUNS * 9,
        "an engine with live-restore takes few runs with it: {causes:?} {taken:#?}"
    );
    assert_nothing_left(&engine).await;
    assert_no_process(&engine).await;
    let ids: Vec<&str> = runs.iter().map(|(_, id, _)| id.as_str()).collect();
    service.assert_clean(&ids[..20]).await;
}

async fn all_runs(client: &Client) -> HashMap<String, i32> {
    let mut found = HashMap::new();
    let mut page_token = String::new();
    loop {
        let request =
            proto::ListRequest { page_token: page_token.clone(), page_size: 100, ..Default::default() };
        let page = client.list_page(request).await.expect("list");
        found.extend(page.runs.into_iter().map(|run| (run.run_id, run.state)));
        if page.next_page_token.is_empty() {
            return found;
        }
        page_token = page.next_page_token;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_gibibytes_come_through_tls_and_the_service_stays_small() {
    const BYTES: u64 = 2 << 30;
    const MOST: u64 = 150 << 20;
    /// Of as many zeros, by sha256sum.
    const DIGEST: &str = "a7c744c13cc101ed66c29f672f92455547889cc586ce6d44fe76ae824958ea51";
    let options = EngineOptions { tls: true, ..EngineOptions::default() };
    let Some(engine) = docker::start_or_skip("two_gibibytes", options) else { return };
    TestImage::busybox().load(&engine.connect(), IMAGE).await;
    let (address, files) = engine.tls();
    let tls = format!(
        ", tls = {{ ca = '{}', cert = '{}', key = '{}' }}",
        files.ca.display(),
        files.cert.display(),
        files.key.display()
    );
    let mut settings = settings(&engine, &format!("tcp://{address}"), &tls);
    for name in ["RUNNER_LIMITS__OUTPUT_BYTES", "RUNNER_LIMITS__FILE_SIZE_BYTES"] {
        let key = |part: &str| -> &'static str { Box::leak(format!("{name}__{part}").into_boxed_str()) };
        settings.push((key("DEFAULT"), "4GiB".to_owned()));
        settings.push((key("CEILING"), "8GiB".to_owned()));
    }
    let service = start(&settings).await;
    let pid = service.pid();
    let most = Arc::new(AtomicU64::new(0));
    let ended = Arc::new(AtomicBool::new(false));
    let sampler = {
        let (most, ended) = (Arc::clone(&most), Arc::clone(&ended));
        std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                most.fetch_max(proc::resident_bytes(pid).unwrap_or(0), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(50));
            }
        })
    };
    let client = service.patient_client();
    let script = format!("head -c {BYTES} /dev/zero > /outputs/zeros && echo written");
    let spec = RunSpec::command(["sh", "-c", &script]).output("/outputs/zeros");
    let handle = client.run_with(spec, RunOptions::default()).await.expect("the run is accepted");
    let id = handle.id().to_owned();
    // Moving it may take longer than a test waits for one event.
    let run = tokio::time::timeout(Duration::from_secs(900), async {
        loop {
            let run = client.get(&id).await.expect("get");
            if matches!(
                run.state(),
                proto::RunState::Succeeded | proto::RunState::Failed | proto::RunState::Cancelled
            ) {
                return run;
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    })
    .await
    .expect("the run ends");
    ended.store(true, Ordering::Relaxed);
    sampler.join().expect("the sampler ends");
    assert_eq!(run.state(), proto::RunState::Succeeded, "{run:?}");
    let manifest = run.outcome.and_then(|outcome| outcome.outputs).expect("outputs");
    let entry = manifest.entries.first().expect("the output");
    assert_eq!((entry.size, entry.sha256.as_str()), (BYTES, DIGEST));
    let most = most.load(Ordering::Relaxed);
    #[allow(clippy::print_stdout, reason = "what was seen is worth knowing")]
    {
        println!("the service had at most {} MiB", most >> 20);
    }
    assert!(most > 0 && most < MOST, "the service had {} MiB", most >> 20);
    eventually("an empty engine", async || left_on(&engine).await.is_empty().then_some(())).await;
}
