//! The commands and their flags.

mod operator;

use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use worker_client::proto::RunState;

pub(crate) use self::operator::{
    AuditArgs, BackendCommand, ChangeArgs, DrainArgs, ExplainArgs, HealthArgs, ParityCommand, RampArgs,
    ReportArgs, RollbackArgs, SetTrafficArgs, ShowParityArgs, TrafficCommand, UndrainArgs,
};
use crate::value::{self, DetachKeys, EnvVar, ExtractArg, Format, InputArg, KeyValue, NetworkArg, OutputArg};

/// Runs workloads, follows them, and takes their results.
#[derive(Debug, Parser)]
#[command(name = "runnerctl", version, max_term_width = 110)]
pub(crate) struct Cli {
    /// The service to talk to.
    #[arg(
        long,
        global = true,
        env = "RUNNER_ENDPOINT",
        value_name = "URL",
        default_value = "http://127.0.0.1:7600"
    )]
    pub(crate) endpoint: String,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct FormatArgs {
    /// How results are shown: `table` for people, `json` for programs.
    #[arg(id = "format", long = "output", short = 'o', value_name = "table|json", value_enum)]
    pub(crate) format: Option<Format>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Runs a program and follows it. The exit status is the program's own.
    Run(Box<RunArgs>),
    /// Shows a run with its attempts and outcome.
    Get(GetArgs),
    /// Lists runs, newest first.
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Shows what a run's program wrote.
    Logs(LogsArgs),
    /// Asks for the end of a run, or of all runs that match.
    Cancel(CancelArgs),
    /// Removes runs that have ended, with their logs and everything that they stored.
    #[command(visible_alias = "rm")]
    Delete(DeleteArgs),
    /// Connects this terminal, or standard input, to a run that was started with --tty or --stdin.
    Attach(AttachArgs),
    /// Uploads, downloads, lists and deletes files that runs take and store.
    #[command(subcommand)]
    Artifact(ArtifactCommand),
    /// Shows the service's backends, and drains them.
    #[command(subcommand)]
    Backend(BackendCommand),
    /// Shows and changes where new runs go. For operators.
    #[command(subcommand)]
    Traffic(TrafficCommand),
    /// Shows who changed where new runs go, newest first.
    Audit(AuditArgs),
    /// Shows how runs and their shadows compare. For operators.
    #[command(subcommand)]
    Parity(ParityCommand),
    /// Writes a completion script for a shell.
    Completion(CompletionArgs),
}

#[derive(Debug, Subcommand)]
pub(crate) enum ArtifactCommand {
    /// Uploads files and directories, and writes a URI for each. What was interrupted goes on when it is asked for again.
    Put(PutArtifactArgs),
    /// Downloads an artifact, a tree, or what a run stored.
    Get(GetArtifactArgs),
    /// Lists what is stored, by key.
    Ls(ListArtifactsArgs),
    /// Deletes uploads.
    Rm(RemoveArtifactArgs),
}

#[derive(Debug, Args)]
pub(crate) struct PutArtifactArgs {
    /// Files and directories.
    #[arg(value_name = "LOCAL", required = true)]
    pub(crate) local: Vec<std::path::PathBuf>,
    /// Leaves symbolic links and other special files out of directories, instead of refusing them.
    #[arg(long)]
    pub(crate) skip_special: bool,
    /// Files that move at once.
    #[arg(long, short = 'j', value_name = "N", default_value = "8")]
    pub(crate) parallel: usize,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct GetArtifactArgs {
    /// `artifact:KEY`, `artifact:KEY/` (a tree), `run:RUN` (all that a run stored), or `run:RUN/PATH` (one output).
    #[arg(value_name = "URI")]
    pub(crate) uri: String,
    /// Where it goes. Default: this directory, and the artifact's own name.
    #[arg(value_name = "LOCAL")]
    pub(crate) local: Option<std::path::PathBuf>,
    /// Files that move at once.
    #[arg(long, short = 'j', value_name = "N", default_value = "8")]
    pub(crate) parallel: usize,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ListArtifactsArgs {
    /// `artifact:KEY/`: what lies below it. Default: the caller's uploads.
    #[arg(value_name = "PREFIX")]
    pub(crate) prefix: Option<String>,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RemoveArtifactArgs {
    /// `artifact:KEY`, or `artifact:KEY/` with all that is below it.
    #[arg(value_name = "URI", required = true)]
    pub(crate) uri: Vec<String>,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Where to run it. Default: the service chooses.
    #[arg(long, short = 'b', value_name = "NAME")]
    pub(crate) backend: Option<String>,
    /// The image. Default: the backend's.
    #[arg(long, value_name = "IMAGE")]
    pub(crate) image: Option<String>,
    /// An environment variable; without a value, the caller's. May be repeated.
    #[arg(long, short = 'e', value_name = "K=V|K")]
    pub(crate) env: Vec<EnvVar>,
    /// Wall time that the program may take, for example 30s.
    #[arg(long, value_name = "DURATION", value_parser = value::duration)]
    pub(crate) timeout: Option<Duration>,
    /// Time between SIGTERM and SIGKILL when the run is ended.
    #[arg(long, value_name = "DURATION", value_parser = value::duration)]
    pub(crate) stop_grace: Option<Duration>,
    /// A label, for selection by `list`. May be repeated.
    #[arg(long, short = 'l', value_name = "K=V")]
    pub(crate) label: Vec<KeyValue>,
    /// Does not wait: writes the run's id and ends.
    #[arg(long, short = 'd', conflicts_with_all = ["tty", "stdin"])]
    pub(crate) detach: bool,
    /// Uploads a local file, directory or what matches a pattern, which lies at PATH when the program starts. LOCAL may be `artifact:KEY`,
    /// `run:RUN/PATH` (what another run stored), or `https://HOST/FILE#sha256=HEX`. May be repeated.
    #[arg(long, value_name = "LOCAL:PATH")]
    pub(crate) input: Vec<InputArg>,
    /// Like --input, for an archive (.tar, .tar.gz, .tar.zst, .zip) that is unpacked at PATH. May be repeated.
    #[arg(long, value_name = "ARCHIVE:PATH")]
    pub(crate) extract: Vec<ExtractArg>,
    /// Leaves symbolic links and other special files out of uploaded directories, instead of refusing them.
    #[arg(long)]
    pub(crate) skip_special: bool,
    /// Downloads what the program wrote to PATH (a file, directory or glob). May be repeated.
    /// `table` or `json` choose how results are shown.
    #[arg(long, short = 'o', value_name = "PATH:LOCAL|table|json")]
    pub(crate) output: Vec<OutputArg>,
    /// What the program can reach: `none` (the default), `egress`, or a policy of the service's configuration.
    #[arg(long, value_name = "none|egress|NAME")]
    pub(crate) network: Option<NetworkArg>,
    /// Memory limit, for example 512MiB.
    #[arg(long, short = 'm', value_name = "SIZE", value_parser = value::size)]
    pub(crate) memory: Option<u64>,
    /// Cores, for example 1.5.
    #[arg(long, value_name = "CORES", value_parser = value::cpu_millis)]
    pub(crate) cpu: Option<u32>,
    /// Largest number of processes and threads.
    #[arg(long, value_name = "N")]
    pub(crate) pids: Option<u32>,
    /// Largest size of any one file that the program writes.
    #[arg(long, value_name = "SIZE", value_parser = value::size)]
    pub(crate) file_size: Option<u64>,
    /// The user to run as.
    #[arg(long, short = 'u', value_name = "UID[:GID]")]
    pub(crate) user: Option<String>,
    /// The program's working directory.
    #[arg(long, short = 'w', value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// The program cannot write to its root file system.
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Gives the program a terminal, and connects this one to it.
    #[arg(long, short = 't')]
    pub(crate) tty: bool,
    /// Connects standard input to the program.
    #[arg(long, short = 'i')]
    pub(crate) stdin: bool,
    /// The keys that leave the terminal while the run goes on.
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    pub(crate) detach_keys: DetachKeys,
    /// An idempotency key: the same key and spec give the same run.
    #[arg(long, value_name = "KEY")]
    pub(crate) key: Option<String>,
    /// How often it is tried again after a failure that is not the program's.
    #[arg(long, value_name = "N")]
    pub(crate) retries: Option<u32>,
    /// Declares that running it twice is harmless, so that it is tried again even after it was lost.
    #[arg(long)]
    pub(crate) idempotent: bool,
    /// Tells what happens on standard error even where that is not a terminal.
    #[arg(long, short = 'v')]
    pub(crate) verbose: bool,
    /// The program and its arguments. Without it: what the image starts.
    #[arg(value_name = "CMD", trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    /// The run's id.
    pub(crate) run: String,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

/// A state, as it is written on a command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum StateArg {
    /// Waits for a slot.
    Queued,
    /// Its inputs are being staged.
    Preparing,
    /// Its program runs.
    Running,
    /// Its outputs are being stored.
    Publishing,
    /// Exit code 0, outputs stored.
    Succeeded,
    /// Any other end.
    Failed,
    /// Ended by a caller.
    Cancelled,
}

impl From<StateArg> for RunState {
    fn from(state: StateArg) -> Self {
        match state {
            StateArg::Queued => Self::Queued,
            StateArg::Preparing => Self::Preparing,
            StateArg::Running => Self::Running,
            StateArg::Publishing => Self::Publishing,
            StateArg::Succeeded => Self::Succeeded,
            StateArg::Failed => Self::Failed,
            StateArg::Cancelled => Self::Cancelled,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Runs in this state. May be repeated: any of them.
    #[arg(long, short = 's', value_enum)]
    pub(crate) state: Vec<StateArg>,
    /// Runs on this backend.
    #[arg(long, short = 'b', value_name = "NAME")]
    pub(crate) backend: Option<String>,
    /// Runs with this label. May be repeated: all of them.
    #[arg(long, short = 'l', value_name = "K=V")]
    pub(crate) label: Vec<KeyValue>,
    /// Runs that were created at most so long ago, for example 1h.
    #[arg(long, value_name = "DURATION", value_parser = value::duration)]
    pub(crate) since: Option<Duration>,
    /// Runs that were created at least so long ago.
    #[arg(long, value_name = "DURATION", value_parser = value::duration)]
    pub(crate) until: Option<Duration>,
    /// Largest number of runs that are shown. 0: all.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 50)]
    pub(crate) limit: usize,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// The run's id.
    pub(crate) run: String,
    /// Goes on until the run ends.
    #[arg(long, short = 'f')]
    pub(crate) follow: bool,
    /// This attempt only. Default: all, one after the other.
    #[arg(long, value_name = "N")]
    pub(crate) attempt: Option<u32>,
    /// Goes on behind the event that has this cursor; `--output json` shows cursors.
    #[arg(long, value_name = "CURSOR")]
    pub(crate) cursor: Option<String>,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CancelArgs {
    /// The run's id.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub(crate) run: Option<String>,
    /// Every run that has not ended and that all of --backend, --label, --image and --state agree to. Shows them and asks first.
    #[arg(long)]
    pub(crate) all: bool,
    /// With --all: runs on this backend.
    #[arg(long, short = 'b', value_name = "NAME", requires = "all", conflicts_with = "run")]
    pub(crate) backend: Option<String>,
    /// With --all: runs with this label. May be repeated: all of them.
    #[arg(long, short = 'l', value_name = "K=V", requires = "all", conflicts_with = "run")]
    pub(crate) label: Vec<KeyValue>,
    /// With --all: runs with exactly this image.
    #[arg(long, value_name = "IMAGE", requires = "all", conflicts_with = "run")]
    pub(crate) image: Option<String>,
    /// With --all: runs in this state. May be repeated: any of them.
    #[arg(long, short = 's', value_enum, requires = "all", conflicts_with = "run")]
    pub(crate) state: Vec<StateArg>,
    /// With --all: does not ask.
    #[arg(long, short = 'y', requires = "all", conflicts_with = "run")]
    pub(crate) yes: bool,
    /// With --all: calls at once.
    #[arg(long, short = 'j', value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) parallel: u8,
    /// Waits until it has ended.
    #[arg(long)]
    pub(crate) wait: bool,
    /// Shown to people who ask why.
    #[arg(long, value_name = "TEXT", default_value = "cancelled with runnerctl")]
    pub(crate) reason: String,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// The runs' ids.
    #[arg(value_name = "RUN", required = true)]
    pub(crate) run: Vec<String>,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// The run's id.
    pub(crate) run: String,
    /// The keys that leave the run while it goes on.
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    pub(crate) detach_keys: DetachKeys,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CompletionArgs {
    /// The shell.
    #[arg(value_enum)]
    pub(crate) shell: clap_complete::Shell,
}

impl RunArgs {
    /// The format that was asked for among the outputs.
    pub(crate) fn format(&self) -> Option<Format> {
        self.output.iter().rev().find_map(|output| match output {
            OutputArg::Format(format) => Some(*format),
            OutputArg::Declared { .. } => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from([&["runnerctl"], line].concat())
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn everything_behind_the_program_is_its_own() {
        let cli = parse(&["run", "--env", "A=1", "--", "sh", "-c", "echo --env"]).expect("valid");
        let Command::Run(run) = cli.command else { panic!("run") };
        assert_eq!(run.command, ["sh", "-c", "echo --env"]);
        let cli = parse(&["run", "ls", "-l", "--output", "x"]).expect("valid");
        let Command::Run(run) = cli.command else { panic!("run") };
        assert_eq!(run.command, ["ls", "-l", "--output", "x"]);
    }

    #[test]
    fn an_output_of_a_run_is_a_format_or_a_declaration() {
        let cli =
            parse(&["run", "--output", "/outputs/a:b", "--output", "json", "--", "true"]).expect("valid");
        let Command::Run(run) = &cli.command else { panic!("run") };
        assert_eq!(run.format(), Some(Format::Json));
        assert_eq!(run.output.len(), 2);
        assert!(parse(&["run", "--output", "yaml", "--", "true"]).is_err());
        assert_eq!(
            parse(&["--output", "json", "run", "x"]).expect("valid").format.format,
            Some(Format::Json)
        );
        let cli = parse(&["get", "--output", "json", "x"]).expect("valid");
        let Command::Get(get) = cli.command else { panic!("get") };
        assert_eq!(get.format.format, Some(Format::Json));
    }

    #[test]
    fn a_cancel_is_of_one_run_or_of_all_that_match() {
        assert!(parse(&["cancel"]).is_err());
        assert!(parse(&["cancel", "x", "--all"]).is_err());
        assert!(parse(&["cancel", "x", "--backend", "b"]).is_err());
        assert!(parse(&["cancel", "--all", "--backend", "b", "--label", "a=b", "--yes"]).is_ok());
        assert!(parse(&["cancel", "x"]).is_ok());
    }

    #[test]
    fn a_detached_run_has_no_terminal() {
        assert!(parse(&["run", "--detach", "--tty", "--", "sh"]).is_err());
        assert!(parse(&["run", "-it", "--", "sh"]).is_ok());
    }
}
