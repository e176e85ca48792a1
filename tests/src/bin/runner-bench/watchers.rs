//! Rows 6 and 7: many watchers of one run, stalled ones, silent ones.

use futures::{StreamExt as _, TryStreamExt as _, stream};
use runner_core::clock::SystemClock;
use runner_proto::v1 as proto;
use tonic::{Streaming, transport::Channel};

use proto::{runner_client::RunnerClient, stream_response::Event};

use super::{
    Outcome,
    floor::FloorServer,
    service::{Fault, Service, accept, connect, follow, spec, until},
    stats::{Row, median, millis, quantile, seconds, sorted},
};

const MANY: usize = 1000;
// The service allows 1,024 streams on a connection; 10,000 watchers and some must fit.
const CONNECTIONS: usize = 16;
const PAIRS: usize = 5;

async fn connections(
    address: impl AsyncFn() -> Result<RunnerClient<Channel>, Fault>,
) -> Result<Vec<RunnerClient<Channel>>, Fault> {
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS {
        clients.push(address().await?);
    }
    Ok(clients)
}

/// Processor seconds of the service for each byte that it delivers, to `watchers` watchers of one run.
async fn cost(
    service: &Service,
    clients: &[RunnerClient<Channel>],
    watchers: usize,
    bytes: u64,
) -> Result<f64, Fault> {
    let mut client = clients[0].clone();
    // The program waits for its input, so that every watcher is there before the first byte.
    let mut gated = spec(&["sh", "-c", &format!("read go; head -c {bytes} /dev/zero")]);
    gated.stdin = true;
    let id = accept(&mut client, gated).await?;
    until(&mut client, &id, proto::RunState::Running).await?;
    let begin = service.usage()?.0;
    let watching = clients.iter().cycle().take(watchers).cloned().map(|mut client| {
        let id = id.clone();
        async move { follow(&mut client, id).await.map(|(bytes, _)| bytes) }
    });
    let all = stream::iter(watching)
        .buffer_unordered(watchers)
        .try_fold(0u64, |sum, came| async move { Ok(sum + came) });
    let go = async {
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        let messages = [
            proto::attach_request::Message::Open(proto::AttachOpen { run_id: id.clone() }),
            proto::attach_request::Message::Stdin("go\n".into()),
        ];
        let messages = messages.map(|message| proto::AttachRequest { message: Some(message) });
        let mut answers = client.attach(stream::iter(messages).chain(stream::pending())).await?.into_inner();
        while let Some(answer) = answers.message().await? {
            if answer.stdin_bytes_taken > 0 {
                break;
            }
        }
        Ok::<_, Fault>(())
    };
    let (came, went) = tokio::join!(all, go);
    went?;
    let came = came?;
    let expected = bytes * watchers as u64;
    if came != expected {
        return Err(format!("{came} of {expected} bytes came").into());
    }
    Ok((service.usage()?.0 - begin) / came as f64)
}

/// Row 6.
pub(crate) async fn many_and_stalled() -> Outcome {
    let service = Service::start().await?;
    let clients = connections(async || service.connect().await).await?;
    let (mut ratios, mut ones, mut manies) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        let one = cost(&service, &clients, 1, 256 << 20).await?;
        let many = cost(&service, &clients, MANY, 2 << 20).await?;
        ones.push(one * 1e9);
        manies.push(many * 1e9);
        ratios.push(many / one);
    }
    let note = format!("{:.2} ns/B, {:.2} ns/B", median(&manies), median(&ones));
    let what = "processor time for each delivered byte, 1,000 watchers of a run ÷ one".to_owned();
    let mut rows = vec![Row { number: 6, what, ratios, target: "≤ 1.2", note }];

    let (mut ratios, mut with, mut without) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        let alone = latency(&service, &clients, 0).await?;
        let crowded = latency(&service, &clients, 100).await?;
        without.push(alone);
        with.push(crowded);
        ratios.push(crowded / alone);
    }
    let note = format!("{}, {}", millis(median(&with)), millis(median(&without)));
    let what = "a fast watcher's p99 from write to arrival, with 100 stalled watchers ÷ without".to_owned();
    rows.push(Row { number: 6, what, ratios, target: "≤ 1.2", note });
    Ok(rows)
}

/// The 99th percentile of the time from a program's write to its arrival at a watcher, in seconds.
async fn latency(service: &Service, clients: &[RunnerClient<Channel>], stalled: usize) -> Result<f64, Fault> {
    let mut client = service.connect().await?;
    let mut echo = spec(&["cat"]);
    echo.stdin = true;
    let id = accept(&mut client, echo).await?;
    until(&mut client, &id, proto::RunState::Running).await?;
    let (sender, receiver) = futures::channel::mpsc::channel(1);
    let mut sender = sender;
    let send = |message| proto::AttachRequest { message: Some(message) };
    sender.try_send(send(proto::attach_request::Message::Open(proto::AttachOpen { run_id: id.clone() })))?;
    let mut attached = client.clone().attach(receiver).await?.into_inner();
    let request = proto::StreamRequest { run_id: id.clone(), ..proto::StreamRequest::default() };
    let mut watching = client.stream(request.clone()).await?.into_inner();
    // Kept, never read: each stops at its flow-control window.
    let mut asleep: Vec<Streaming<proto::StreamResponse>> = Vec::new();
    for i in 0..stalled {
        asleep.push(clients[i % CONNECTIONS].clone().stream(request.clone()).await?.into_inner());
    }
    let clock = SystemClock::new();
    let line = bytes::Bytes::from(vec![b'x'; 16 * 1024]);
    let mut times = Vec::new();
    for _ in 0..400 {
        let begin = seconds(&clock);
        futures::SinkExt::send(&mut sender, send(proto::attach_request::Message::Stdin(line.clone())))
            .await?;
        let mut came = 0;
        while came < line.len() {
            match watching.message().await?.ok_or("the stream ended")?.event {
                Some(Event::Log(frame)) => came += frame.data.len(),
                Some(Event::Terminated(_)) => return Err("the run ended".into()),
                _ => {}
            }
        }
        times.push(seconds(&clock) - begin);
    }
    futures::SinkExt::send(&mut sender, send(proto::attach_request::Message::Eof(proto::AttachEof {})))
        .await?;
    // The call ends when the caller has nothing more to send.
    drop(sender);
    while attached.message().await.is_ok_and(|message| message.is_some()) {}
    drop(asleep);
    until(&mut client, &id, proto::RunState::Succeeded).await?;
    Ok(quantile(&sorted(&times), 0.99))
}

/// Opens streams and reads nothing but the first message of each.
async fn open(
    clients: &[RunnerClient<Channel>],
    request: &proto::StreamRequest,
    count: usize,
) -> Result<Vec<Streaming<proto::StreamResponse>>, Fault> {
    let opening = clients.iter().cycle().take(count).cloned().map(|mut client| {
        let request = request.clone();
        async move { Ok::<_, Fault>(client.stream(request).await?.into_inner()) }
    });
    stream::iter(opening).buffer_unordered(64).try_collect().await
}

/// Cancels a run and waits until it is dead.
async fn end(client: &mut RunnerClient<Channel>, run_id: String) -> Result<(), Fault> {
    client.cancel(proto::CancelRequest { run_id: run_id.clone(), reason: String::new() }).await?;
    until(client, &run_id, proto::RunState::Cancelled).await
}

/// Row 7.
pub(crate) async fn memory() -> Outcome {
    const IDLE: usize = 10_000;
    const STALLED: usize = 200;
    // The first streams pay for what is shared; they are there in both measurements.
    const FIRST: usize = 500;
    let floor = FloorServer::start().await?;
    let clients = connections(async || connect(&floor.address).await).await?;
    let silent =
        proto::StreamRequest { cursor: "0".to_owned(), no_logs: true, ..proto::StreamRequest::default() };
    let first = open(&clients, &silent, FIRST).await?;
    let begin = floor.usage()?.1;
    let streams = open(&clients, &silent, IDLE).await?;
    let floor_bytes = (floor.usage()?.1 - begin) / IDLE as f64;
    drop((first, streams, clients, floor));

    let service = Service::start().await?;
    let clients = connections(async || service.connect().await).await?;
    let mut client = clients[0].clone();
    let id = accept(&mut client, spec(&["sleep", "3600"])).await?;
    until(&mut client, &id, proto::RunState::Running).await?;
    let request = proto::StreamRequest { run_id: id.clone(), ..proto::StreamRequest::default() };
    let first = open(&clients, &request, FIRST).await?;
    let begin = service.usage()?.1;
    let streams = open(&clients, &request, IDLE).await?;
    let our_bytes = (service.usage()?.1 - begin) / IDLE as f64;
    drop((first, streams));
    end(&mut client, id).await?;

    let loud = accept(&mut client, spec(&["sh", "-c", "head -c 64000000 /dev/zero; sleep 3600"])).await?;
    until(&mut client, &loud, proto::RunState::Running).await?;
    // All of it is stored before anybody watches.
    tokio::time::sleep(std::time::Duration::from_secs(5)).await;
    let request = proto::StreamRequest { run_id: loud.clone(), ..proto::StreamRequest::default() };
    let begin = service.usage()?.1;
    let mut asleep = Vec::new();
    for _ in 0..STALLED {
        // A connection each: a stalled reader must not stall those that share its connection.
        let mut client = service.connect().await?;
        asleep.push(client.stream(request.clone()).await?.into_inner());
    }
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    let stalled_bytes = (service.usage()?.1 - begin) / STALLED as f64;
    drop(asleep);
    end(&mut client, loud).await?;

    let kib = |bytes: f64| format!("{:.1} KiB", bytes / 1024.0);
    Ok(vec![
        Row {
            number: 7,
            what: "memory of an idle watcher at 10,000 ÷ a bare tonic stream".to_owned(),
            ratios: vec![our_bytes / floor_bytes],
            target: "≤ 1.3",
            note: format!("{}, {}", kib(our_bytes), kib(floor_bytes)),
        },
        Row {
            number: 7,
            what: "memory of a stalled watcher on a connection of its own ÷ 150 KB".to_owned(),
            ratios: vec![stalled_bytes / 150_000.0],
            target: "≤ 1",
            note: kib(stalled_bytes),
        },
    ])
}
