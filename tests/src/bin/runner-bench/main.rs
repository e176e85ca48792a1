//! Measures the rows of `docs/benchmarks.md` that this machine can measure, and prints one table of ratios.
//!
//! Each figure is a ratio of our path to a floor or a peer, measured in the same run, interleaved. Started by
//! `cargo xtask bench [ROW…]`; the service under test is the program `runner` beside this one.

mod dind;
mod floor;
mod growth;
mod hyperqueue;
mod local;
mod logs;
mod service;
mod staging;
mod stats;
mod storing;
mod watchers;

use std::{io::Write as _, process::ExitCode};

use stats::Row;

/// Says how far it is, on standard error.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

type Outcome = Result<Vec<Row>, Box<dyn std::error::Error + Send + Sync>>;

async fn measure(row: &str) -> Outcome {
    match row {
        "1" => dind::one().await,
        "2" => dind::many().await,
        "3" => local::measure().await,
        "4" => storing::measure().await,
        "5" => logs::measure().await,
        "6" => watchers::many_and_stalled().await,
        "7" => watchers::memory().await,
        "8" => staging::measure().await,
        "11" => growth::measure().await,
        other => Err(format!("row {other} is not measured here; there are 1 to 8 and 11").into()),
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            say(&format!("start the runtime: {error}"));
            return ExitCode::FAILURE;
        }
    };
    if let [mode, address] = args.as_slice()
        && mode == "floor-server"
    {
        return runtime.block_on(floor::serve(address));
    }
    let rows: Vec<&str> = if args.is_empty() {
        vec!["1", "2", "3", "4", "5", "6", "7", "8", "11"]
    } else {
        args.iter().map(String::as_str).collect()
    };
    let mut table = Vec::new();
    let mut failed = false;
    for row in rows {
        say(&format!("measuring row {row} …"));
        match runtime.block_on(measure(row)) {
            Ok(measured) => table.extend(measured),
            Err(error) => {
                failed = true;
                say(&format!("row {row} could not be measured: {error}"));
            }
        }
    }
    let printed = stats::print(&table, &mut std::io::stdout().lock());
    if failed || printed.is_err() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
