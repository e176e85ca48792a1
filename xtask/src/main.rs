//! The project's own commands. `cargo xtask` without a command lists them.

mod agent;
mod bench;
mod beside;
mod check_deps;
mod demo;
mod image;
mod process;
mod setup;
mod test;

use std::process::ExitCode;

use anyhow::Result;

use self::agent::Roles;

const USAGE: &str = "\
cargo xtask COMMAND

  demo          build, start the service on loopback, run a real workload on real input, show its log and outputs, stop
  test [FILTER] set up what the tests need, then format, dependency directions, clippy, all tests (FILTER: only tests
                whose name contains it, and nothing else)
  lint          clippy over everything, as `test` does it while the tests run
  bench [ROW…]  measure the rows of docs/benchmarks.md and print one table of ratios
  agent [--release]
                build the shim as the Docker backend puts it into containers: linked statically
  image [agent|service] [--release]
                build the images of the agents in pods and of the service, as archives that `docker load` takes;
                `image for-tests`: both as tests on a cluster use them, with the service that is built already
  check-deps    check that the crates depend on one another in the directions that docs/ARCHITECTURE.md allows
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (command, rest) = match args.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => ("", &[][..]),
    };
    let outcome: Result<()> = match (command, rest) {
        ("demo", []) => demo::run(),
        ("test", rest) => test::run(rest),
        ("bench", rest) => bench::run(rest),
        ("agent", []) => agent::run(false, Roles::Shim).map(drop),
        ("agent", [flag]) if flag == "--release" => agent::run(true, Roles::Shim).map(drop),
        ("lint", []) => test::lint(),
        ("image", [word]) if word == "for-tests" => image::run_for_tests(),
        ("image", rest) => match image::Wanted::parse(rest) {
            Some(wanted) => image::run(wanted),
            None => return usage(),
        },
        ("check-deps", []) => check_deps::run(),
        _ => return usage(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            process::say(&format!("xtask {command}: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    process::say(USAGE);
    ExitCode::from(2)
}
