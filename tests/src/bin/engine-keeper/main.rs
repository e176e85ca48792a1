//! Cleans up after a test, however it ends: reads a place's path, waits for the end of standard input, sweeps the place.
//! See `runner_tests::place`.

use std::{io::BufRead as _, path::Path, process::ExitCode};

fn main() -> ExitCode {
    let mut lines = std::io::stdin().lock().lines();
    let Some(Ok(place)) = lines.next() else { return ExitCode::FAILURE };
    // Nothing more is ever written: the end comes when the owner drops its side, or is gone.
    while let Some(Ok(_)) = lines.next() {}
    runner_tests::place::sweep(Path::new(&place));
    ExitCode::SUCCESS
}
