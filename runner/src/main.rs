//! The workload runner service: `runner serve`.
//!
//! Data goes to standard output, everything else to standard error. Exit status: 0 after a clean end, 1 where the service
//! failed or was told twice to stop, 2 where the command line or the configuration is wrong.

use std::{fs, net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use runner::{
    config::{ConfigError, Layers, Loaded, layers},
    serve, telemetry,
};
use runner_store::postgres::Migrated;
use tokio::signal::unix::{SignalKind, signal};

#[derive(Debug, Parser)]
#[command(
    name = "runner",
    version,
    about = "Runs workloads: accepts, executes, streams, answers for the outcome"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves until it is told to stop. Needs no configuration.
    Serve(ConfigArgs),
    /// Makes the schema of a state store on PostgreSQL, or brings it to this version. Safe to repeat, and beside others.
    Migrate(ConfigArgs),
    /// Shows the configuration.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Prints the effective configuration, without credentials.
    Dump {
        #[command(flatten)]
        args: ConfigArgs,
        /// The form.
        #[arg(long, value_enum, default_value_t = Output::Toml)]
        output: Output,
    },
    /// Prints the JSON schema of the configuration.
    Schema,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Toml,
    Json,
}

#[derive(Debug, Args)]
struct ConfigArgs {
    /// A configuration file: JSON where its name ends in .json, else TOML. Every key is also a variable: `limits.log_bytes` is RUNNER_LIMITS__LOG_BYTES.
    #[arg(long, value_name = "FILE", env = "RUNNER_CONFIG")]
    config: Option<PathBuf>,
    /// Where state, logs and artifacts are kept.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<String>,
    /// Address of gRPC and of the blob endpoint [default: 127.0.0.1:7600].
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Address of /healthz, /readyz and /metrics [default: 127.0.0.1:7601].
    #[arg(long, value_name = "ADDR")]
    ops_listen: Option<SocketAddr>,
}

impl ConfigArgs {
    fn load(self) -> Result<Loaded, ConfigError> {
        let file = match self.config {
            None => None,
            Some(path) => match fs::read_to_string(&path) {
                Ok(text) => Some((path, text)),
                Err(source) => return Err(ConfigError::Unreadable { path, source }),
            },
        };
        let mut flags = Vec::new();
        if let Some(dir) = self.data_dir {
            flags.push(("--data-dir", "data_dir", dir));
        }
        if let Some(address) = self.listen {
            flags.push(("--listen", "listen", address.to_string()));
        }
        if let Some(address) = self.ops_listen {
            flags.push(("--ops-listen", "ops_listen", address.to_string()));
        }
        // A variable that is not text cannot be one of ours.
        let env = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        Layers { file, env, flags }.load()
    }
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Serve(args) => match args.load() {
            Ok(loaded) => serve_until_told(&loaded),
            Err(error) => usage_error(&error),
        },
        Command::Migrate(args) => match args.load() {
            Ok(loaded) => migrate(&loaded),
            Err(error) => usage_error(&error),
        },
        Command::Config { command: ConfigCommand::Schema } => print(&pretty(&layers::schema())),
        Command::Config { command: ConfigCommand::Dump { args, output } } => match args.load() {
            Ok(loaded) => {
                let mut config = loaded.config.redacted();
                config.data_dir = Some(config.data_dir());
                match output {
                    Output::Json => print(&pretty(&config)),
                    Output::Toml => match toml::to_string_pretty(&config) {
                        Ok(text) => print(&text),
                        Err(error) => failure(&error),
                    },
                }
            }
            Err(error) => usage_error(&error),
        },
    }
}

fn pretty(value: &impl serde::Serialize) -> String {
    serde_json::to_string_pretty(value).map(|text| text + "\n").unwrap_or_default()
}

/// Writes data. A reader that goes away, as `head` does, is no error.
fn print(text: &str) -> ExitCode {
    use std::io::Write as _;
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => failure(&error),
        _ => ExitCode::SUCCESS,
    }
}

#[allow(clippy::print_stderr, reason = "the place where errors are shown; the log may not be there yet")]
fn failure(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("error: {}", serve::chain(error));
    ExitCode::from(1)
}

#[allow(clippy::print_stderr, reason = "the place where errors are shown; the log is not there yet")]
fn usage_error(error: &ConfigError) -> ExitCode {
    eprintln!("error: {}", serve::chain(error));
    ExitCode::from(2)
}

fn serve_until_told(loaded: &Loaded) -> ExitCode {
    if let Err(error) = telemetry::init(&loaded.config.log) {
        return failure(&std::io::Error::other(error));
    }
    serve::raise_file_limit();
    // Blocking work is file work; more threads than this only wait for the same disk.
    let runtime =
        match tokio::runtime::Builder::new_multi_thread().max_blocking_threads(128).enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return failure(&error),
        };
    let code = runtime.block_on(run(loaded));
    // What still blocks, for example on a disk that does not answer, is not waited for.
    runtime.shutdown_timeout(Duration::from_millis(100));
    code
}

fn migrate(loaded: &Loaded) -> ExitCode {
    if let Err(error) = telemetry::init(&loaded.config.log) {
        return failure(&std::io::Error::other(error));
    }
    let Some(options) = loaded.config.store.postgres() else {
        return print(
            "nothing to migrate: without store.url the state is in SQLite, which `runner serve` looks after\n",
        );
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failure(&error),
    };
    match runtime.block_on(runner_store::postgres::migrate(&options)) {
        Ok(Migrated { from, to }) if from == to => {
            print(&format!("the state store has schema version {to}\n"))
        }
        Ok(Migrated { from, to }) => {
            print(&format!("migrated the state store from schema version {from} to {to}\n"))
        }
        Err(error) => failure(&error),
    }
}

async fn run(loaded: &Loaded) -> ExitCode {
    let config = &loaded.config;
    let (mut terminate, mut interrupt) =
        match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
            (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
            (Err(error), _) | (_, Err(error)) => return failure(&error),
        };
    let running = tokio::select! {
        started = serve::start(config) => match started {
            Ok(running) => running,
            Err(error) => return failure(&error),
        },
        _ = terminate.recv() => return ExitCode::SUCCESS,
        _ = interrupt.recv() => return ExitCode::SUCCESS,
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let drain = config.shutdown.drain.0;
    tracing::info!(
        drain_secs = drain.as_secs(),
        "stopping; workloads live on; a second signal ends the service at once"
    );
    tokio::select! {
        () = running.stop(drain) => {
            tracing::info!("stopped");
            ExitCode::SUCCESS
        }
        _ = terminate.recv() => aborted(),
        _ = interrupt.recv() => aborted(),
    }
}

fn aborted() -> ExitCode {
    tracing::warn!("stopped at once, by a second signal; the next start takes up what was under way");
    ExitCode::from(1)
}
