//! Row 3: what a no-op run on `local` costs at concurrency 64, against spawning and waiting for a process, and against
//! HyperQueue.

use std::process::Command;

use futures::{StreamExt as _, TryStreamExt as _, stream};

use super::{
    Outcome,
    hyperqueue::HyperQueue,
    service::{Fault, Service, accept, follow, spec},
    stats::{Row, median, millis, timed},
};

const PAIRS: usize = 30;
const RUNS: u32 = 64;

/// Measures it.
pub(crate) async fn measure() -> Outcome {
    let service = Service::start().await?;
    let client = service.connect().await?;
    let ours = || async {
        let runs = (0..RUNS).map(|_| {
            let mut client = client.clone();
            async move {
                let id = accept(&mut client, spec(&["/bin/true"])).await?;
                match follow(&mut client, id).await? {
                    (_, true) => Ok::<_, Fault>(()),
                    (_, false) => Err("a no-op failed".into()),
                }
            }
        });
        stream::iter(runs).buffer_unordered(64).try_collect::<()>().await
    };
    let mut peer = HyperQueue::start();
    // Once each, so that nobody pays for a first time.
    ours().await?;
    if let Ok(peer) = &mut peer {
        peer.batch(RUNS)?;
    }
    let (mut to_floor, mut to_peer) = (Vec::new(), Vec::new());
    let (mut our_times, mut floor_times) = (Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        let (our_time, outcome) = timed(ours()).await;
        outcome?;
        let (floor_time, outcome) =
            timed(async { (0..RUNS).try_for_each(|_| Command::new("/bin/true").status().map(|_| ())) }).await;
        outcome?;
        our_times.push(our_time / f64::from(RUNS));
        floor_times.push(floor_time / f64::from(RUNS));
        to_floor.push(our_time / floor_time);
        if let Ok(peer) = &mut peer {
            to_peer.push(our_time / peer.batch(RUNS)?);
        }
    }
    let note = format!("{} a run, {} a spawn", millis(median(&our_times)), millis(median(&floor_times)));
    let mut rows = vec![Row {
        number: 3,
        what: "`local`: no-op run at concurrency 64 ÷ spawn + wait".to_owned(),
        ratios: to_floor,
        target: "≤ 2",
        note,
    }];
    let what = "`local`: no-op run at concurrency 64 ÷ HyperQueue task";
    rows.push(match peer {
        Ok(_) => {
            Row { number: 3, what: what.to_owned(), ratios: to_peer, target: "< 1", note: String::new() }
        }
        Err(why) => Row::absent(3, what, "< 1", format!("no HyperQueue here: {why}")),
    });
    Ok(rows)
}
