//! The contract, through `worker-client`, against a real service process.

mod cancel;
mod life;
mod list;
mod run;
mod stream;

use futures::StreamExt as _;
use worker_client::{Client, ListFilter, RunSpec};

fn shell(script: &str) -> RunSpec {
    RunSpec::command(["sh", "-c", script])
}

const SOME_ID: &str = "0199aaaa-bbbb-7ccc-8ddd-eeeeeeeeeeee";

async fn run_count(client: &Client) -> usize {
    client.list(ListFilter::default()).map(|run| run.expect("list")).count().await
}
