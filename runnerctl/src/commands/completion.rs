//! `completion`.

use clap::CommandFactory as _;

use crate::{args::Cli, exit::Exit, failure::Failure, output};

pub(super) fn execute(shell: clap_complete::Shell) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "runnerctl", &mut script);
    output::data(&String::from_utf8_lossy(&script))?;
    Ok(Exit::OK)
}
