//! `runnerctl`: the command line of the workload runner.
//!
//! Data goes to standard output, everything else to standard error. The exit status of `runnerctl run` is the run's own.

mod args;
mod commands;
mod exit;
mod failure;
mod follow;
mod human;
mod interrupt;
mod json;
mod output;
mod progress;
mod stdin;
mod table;
mod terminal;
mod value;

use std::process::ExitCode;

use clap::Parser as _;

use crate::{args::Cli, exit::Exit, failure::Failure};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are data and go to standard output; that nobody reads them is no failure.
            let _ = error.print();
            return Exit::from_clap(&error).into();
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            return Failure::local("start the event loop", &error).report();
        }
    };
    let outcome = runtime.block_on(commands::execute(cli));
    // A read of the terminal that is still under way must not hold the process.
    runtime.shutdown_background();
    match outcome {
        Ok(exit) => exit.into(),
        Err(failure) => failure.report(),
    }
}
