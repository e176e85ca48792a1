//! Rows 1 and 2: what a no-op run on `dind` costs, against the bare sequence of requests to the same engine.

use std::{sync::Arc, time::Duration};

use bollard::{
    Docker,
    models::{ContainerCreateBody, HostConfig},
    query_parameters::{
        CreateContainerOptions, RemoveContainerOptionsBuilder, StartContainerOptions, WaitContainerOptions,
    },
};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use runner_core::clock::{Clock as _, SystemClock};
use runner_proto::v1::runner_client::RunnerClient;
use runner_tests::{
    backend::{Missing, dind::IMAGE},
    binaries,
    docker::{Engine, EngineOptions, TestImage},
};
use tonic::transport::Channel;

use super::{
    Outcome,
    service::{Fault, Service, accept, follow, spec},
    stats::{Row, median, millis, quantile, sorted, timed},
};

/// Pairs of row 1: one run, one raw sequence.
const PAIRS: usize = 30;
/// Pairs of row 2, of which each takes half a minute.
const BATCHES: usize = 5;
const AT_ONCE: usize = 64;
const NO_OP: &str = "/bin/true";

/// An engine with the image in it, and a service whose backend it is.
pub(crate) struct World {
    pub(crate) engine: Engine,
    pub(crate) service: Service,
}

impl World {
    /// Starts both. `Err`: why there is no engine here.
    pub(crate) async fn start() -> Result<Result<Self, String>, Fault> {
        let engine = match tokio::task::spawn_blocking(|| Engine::start(EngineOptions::default())).await? {
            Ok(engine) => engine,
            Err(Missing(why)) => return Ok(Err(why)),
        };
        TestImage::busybox().load(&engine.connect(), IMAGE).await;
        let agent = binaries::static_agent()?;
        let backend = format!(
            "default_backend = 'dind'\n[[backends]]\nkind = 'dind'\nhost = '{}'\nagent = '{}'\n\
             default_image = '{IMAGE}'\nslots = {AT_ONCE}\n",
            engine.host(),
            agent.display()
        );
        let service = Service::start_with(&backend).await?;
        Ok(Ok(Self { engine, service }))
    }
}

/// Create, start, wait. Answers how long that took; removing is not counted on either side.
async fn raw(docker: &Docker) -> Result<f64, Fault> {
    let (seconds, made) = timed(async {
        let body = ContainerCreateBody {
            image: Some(IMAGE.to_owned()),
            cmd: Some(vec![NO_OP.to_owned()]),
            host_config: Some(HostConfig { network_mode: Some("none".to_owned()), ..HostConfig::default() }),
            ..ContainerCreateBody::default()
        };
        let id = docker.create_container(None::<CreateContainerOptions>, body).await?.id;
        // Asked before the start, as who wants to miss nothing does.
        let mut end = docker.wait_container(&id, None::<WaitContainerOptions>);
        docker.start_container(&id, None::<StartContainerOptions>).await?;
        match end.next().await {
            Some(Ok(answer)) if answer.status_code == 0 => Ok::<_, Fault>(id),
            other => Err(format!("a raw no-op failed: {other:?}").into()),
        }
    })
    .await;
    let options = RemoveContainerOptionsBuilder::default().force(true).build();
    docker.remove_container(&made?, Some(options)).await?;
    Ok(seconds)
}

/// `Run` to the terminal event.
async fn ours(client: &RunnerClient<Channel>) -> Result<f64, Fault> {
    let mut client = client.clone();
    let (seconds, ended) = timed(async {
        let id = accept(&mut client, spec(&[NO_OP])).await?;
        follow(&mut client, id).await
    })
    .await;
    match ended? {
        (_, true) => Ok(seconds),
        (_, false) => Err("a no-op failed".into()),
    }
}

/// Waits until no container is left: what one side leaves to be removed must not cost the other.
async fn quiet(docker: &Docker) -> Result<(), Fault> {
    let all = bollard::query_parameters::ListContainersOptionsBuilder::default().all(true).build();
    for _ in 0..1200 {
        if docker.list_containers(Some(all.clone())).await?.is_empty() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Err("containers are left after a minute".into())
}

/// Row 1.
pub(crate) async fn one() -> Outcome {
    let what = "`dind`: no-op, Run → terminal event ÷ Engine API create + start + wait";
    let world = match World::start().await? {
        Ok(world) => world,
        Err(why) => return Ok(vec![Row::absent(1, what, "≤ 1.05", why)]),
    };
    let (docker, client) = (world.engine.connect(), world.service.connect().await?);
    // Once each, so that nobody pays for a first time.
    ours(&client).await?;
    raw(&docker).await?;
    let (mut our_times, mut raw_times) = (Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        quiet(&docker).await?;
        our_times.push(ours(&client).await?);
        quiet(&docker).await?;
        raw_times.push(raw(&docker).await?);
    }
    let ratios = our_times.iter().zip(&raw_times).map(|(ours, raw)| ours / raw).collect();
    let note = format!("{}, {}", millis(median(&our_times)), millis(median(&raw_times)));
    Ok(vec![Row { number: 1, what: what.to_owned(), ratios, target: "≤ 1.05", note }])
}

/// A batch at once: its 99th percentile, and how long all of it took.
async fn batch<F: Future<Output = Result<f64, Fault>>>(each: impl Fn() -> F) -> Result<(f64, f64), Fault> {
    let clock = Arc::new(SystemClock::new());
    let begun = clock.monotonic();
    let runs = (0..AT_ONCE).map(|_| each());
    let times: Vec<f64> = stream::iter(runs).buffer_unordered(AT_ONCE).try_collect().await?;
    let seconds = clock.monotonic().saturating_sub(begun).as_secs_f64();
    Ok((quantile(&sorted(&times), 0.99), seconds))
}

/// Row 2.
pub(crate) async fn many() -> Outcome {
    let slow = "`dind`: 64 at once, p99 ÷ 64 raw sequences at once";
    let rate = "`dind`: 64 at once, runs/s ÷ 64 raw sequences at once";
    let world = match World::start().await? {
        Ok(world) => world,
        Err(why) => {
            return Ok(vec![Row::absent(2, slow, "≤ 0.6", why.clone()), Row::absent(2, rate, "≥ 1.0", why)]);
        }
    };
    let (docker, client) = (world.engine.connect(), world.service.connect().await?);
    let (mut slowest, mut rates) = (Vec::new(), Vec::new());
    let (mut notes, mut speeds) = ((Vec::new(), Vec::new()), (Vec::new(), Vec::new()));
    for _ in 0..BATCHES {
        quiet(&docker).await?;
        let (our_p99, our_seconds) = batch(|| ours(&client)).await?;
        quiet(&docker).await?;
        let (raw_p99, raw_seconds) = batch(|| raw(&docker)).await?;
        slowest.push(our_p99 / raw_p99);
        rates.push(raw_seconds / our_seconds);
        notes.0.push(our_p99);
        notes.1.push(raw_p99);
        #[allow(clippy::cast_precision_loss, reason = "64")]
        let count = AT_ONCE as f64;
        speeds.0.push(count / our_seconds);
        speeds.1.push(count / raw_seconds);
    }
    let note = format!("{}, {}", millis(median(&notes.0)), millis(median(&notes.1)));
    let speed = format!("{:.1}/s, {:.1}/s", median(&speeds.0), median(&speeds.1));
    Ok(vec![
        Row { number: 2, what: slow.to_owned(), ratios: slowest, target: "≤ 0.6", note },
        Row { number: 2, what: rate.to_owned(), ratios: rates, target: "≥ 1.0", note: speed },
    ])
}
