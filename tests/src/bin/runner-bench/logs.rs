//! Row 5: log bytes from the program through the store to a watcher, against a bare tonic stream and `docker logs -f`.

use std::process::{Command, Stdio};

use runner_core::clock::{Clock as _, SystemClock};
use runner_proto::v1::runner_client::RunnerClient;
use runner_tests::{backend::dind::IMAGE, docker::Engine};
use tonic::transport::Channel;

use super::{
    Outcome,
    dind::World,
    floor::FloorServer,
    service::{Fault, Service, accept, follow, spec},
    stats::{Row, median, timed},
};

const PAIRS: usize = 7;
const BYTES: u64 = 256 * 1024 * 1024;
const MB: f64 = 1e6;
/// What goes through `docker logs -f`, which needs seconds for it.
const PEER_BYTES: u64 = 64 * 1024 * 1024;
const PEER_PAIRS: usize = 3;

/// Log bytes a second, from `Run` to the terminal event.
async fn ours(client: &mut RunnerClient<Channel>, bytes: u64) -> Result<f64, Fault> {
    let program = format!("head -c {bytes} /dev/zero");
    let (seconds, outcome) = timed(async {
        let id = accept(client, spec(&["sh", "-c", &program])).await?;
        follow(client, id).await
    })
    .await;
    let (came, _) = outcome?;
    if came == bytes {
        Ok(bytes as f64 / seconds)
    } else {
        Err(format!("{came} of {bytes} log bytes came").into())
    }
}

/// Measures it.
pub(crate) async fn measure() -> Outcome {
    let service = Service::start().await?;
    let floor = FloorServer::start().await?;
    let mut client = service.connect().await?;
    let (mut ratios, mut rates, mut floors) = (vec![], vec![], vec![]);
    for _ in 0..PAIRS {
        let our_rate = ours(&mut client, BYTES).await?;
        let (seconds, came) = timed(floor.stream(BYTES)).await;
        let floor_rate = came? as f64 / seconds;
        rates.push(our_rate / MB);
        floors.push(floor_rate / MB);
        ratios.push(our_rate / floor_rate);
    }
    let what = "logs: program → store → watcher ÷ tonic stream of 64 KiB chunks";
    let note = format!("{:.0} MB/s, {:.0} MB/s", median(&rates), median(&floors));
    let mut rows = vec![Row { number: 5, what: what.to_owned(), ratios, target: "≥ 0.3", note }];
    let locally = "logs: `local`, program → store → watcher ÷ `docker logs -f`";
    let contained = "logs: `dind`, program → store → watcher ÷ `docker logs -f`";
    match World::start().await? {
        Ok(world) => {
            let mut inside = world.service.connect().await?;
            let (mut to_local, mut to_dind, mut peers) = (vec![], vec![], vec![]);
            let (mut local_rates, mut dind_rates) = (vec![], vec![]);
            for _ in 0..PEER_PAIRS {
                let local = ours(&mut client, PEER_BYTES).await?;
                let dind = ours(&mut inside, PEER_BYTES).await?;
                let peer = tokio::task::block_in_place(|| docker_logs(&world.engine))?;
                to_local.push(local / peer);
                to_dind.push(dind / peer);
                peers.push(peer / MB);
                local_rates.push(local / MB);
                dind_rates.push(dind / MB);
            }
            for (what, ratios, rates) in [(locally, to_local, local_rates), (contained, to_dind, dind_rates)]
            {
                let note = format!("{:.0} MB/s, {:.0} MB/s", median(&rates), median(&peers));
                rows.push(Row { number: 5, what: what.to_owned(), ratios, target: "≥ 2", note });
            }
        }
        Err(why) => {
            for what in [locally, contained] {
                rows.push(Row::absent(5, what, "≥ 2", format!("no Docker Engine here: {why}")));
            }
        }
    }
    Ok(rows)
}

/// The peer: `docker logs -f` of a container that writes. Engines store logs as JSON, many times slower than anything else
/// here, so it has fewer bytes; a rate does not mind.
fn docker_logs(engine: &Engine) -> Result<f64, Fault> {
    let docker = || {
        let mut docker = Command::new("docker");
        docker.env("DOCKER_HOST", engine.host());
        docker
    };
    let program = format!("head -c {PEER_BYTES} /dev/zero");
    let clock = SystemClock::new();
    let begun = clock.monotonic();
    let id = run(docker().args(["run", "-d", "--network", "none", IMAGE, "sh", "-c", &program]))?;
    let mut follow =
        docker().args(["logs", "-f", &id]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let Some(mut stdout) = follow.stdout.take() else { return Err("docker logs without a pipe".into()) };
    let came = std::io::copy(&mut stdout, &mut std::io::sink())?;
    follow.wait()?;
    let seconds = clock.monotonic().saturating_sub(begun).as_secs_f64();
    run(docker().args(["rm", "-f", &id]))?;
    if came == PEER_BYTES {
        Ok(PEER_BYTES as f64 / seconds)
    } else {
        Err(format!("docker logs gave {came} of {PEER_BYTES} bytes").into())
    }
}

fn run(command: &mut Command) -> Result<String, Fault> {
    let output = command.output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned().into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
