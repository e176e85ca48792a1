//! What operators ask for: backends, traffic, parity, the audit log.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::{FormatArgs, RunArgs};
use crate::value::{self, StepArg};

#[derive(Debug, Subcommand)]
pub(crate) enum BackendCommand {
    /// Lists the backends with their health and capabilities.
    #[command(visible_alias = "ls")]
    List(BackendListArgs),
    /// Asks whether backends take work. Ends with 1 where one that was asked does not.
    Health(HealthArgs),
    /// Lets a backend take no new runs. Those that it has finish there.
    Drain(DrainArgs),
    /// Lets it take runs again.
    Undrain(UndrainArgs),
}

#[derive(Debug, Args)]
pub(crate) struct HealthArgs {
    /// The backends' names. Default: all.
    #[arg(value_name = "NAME")]
    pub(crate) backend: Vec<String>,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ParityCommand {
    /// Shows how many runs agree with their shadows, by image, and everything that differs.
    Report(ReportArgs),
    /// Shows all that is known of one run and its shadow.
    Show(ShowParityArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// Runs with exactly this image.
    #[arg(long, value_name = "IMAGE")]
    pub(crate) image: Option<String>,
    /// Runs that were on this backend.
    #[arg(long, value_name = "NAME")]
    pub(crate) primary: Option<String>,
    /// Runs whose shadows were to be on this backend.
    #[arg(long, value_name = "NAME")]
    pub(crate) shadow: Option<String>,
    /// Runs that ended at most so long ago, for example 1d.
    #[arg(long, value_name = "DURATION", value_parser = value::duration)]
    pub(crate) since: Option<Duration>,
    /// Only runs that differ from their shadows.
    #[arg(long)]
    pub(crate) differing: bool,
    /// Largest number of differing runs that are shown. The others are counted.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 100)]
    pub(crate) limit: usize,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ShowParityArgs {
    /// The id of the run, or of its shadow.
    pub(crate) run: String,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    /// The backend's name.
    #[arg(value_name = "NAME")]
    pub(crate) backend: String,
    /// Returns when it has no runs left. Where it is drained already, it only waits.
    #[arg(long)]
    pub(crate) wait: bool,
    #[command(flatten)]
    pub(crate) change: ChangeArgs,
}

#[derive(Debug, Args)]
pub(crate) struct UndrainArgs {
    /// The backend's name.
    #[arg(value_name = "NAME")]
    pub(crate) backend: String,
    #[command(flatten)]
    pub(crate) change: ChangeArgs,
}

/// What every change has.
#[derive(Debug, Args)]
pub(crate) struct ChangeArgs {
    /// Why, for those who read the audit log.
    #[arg(long, short = 'r', value_name = "TEXT", required = true)]
    pub(crate) reason: String,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TrafficCommand {
    /// Shows the policy, what is drained, and the ramp.
    Get(GetTrafficArgs),
    /// Replaces the policy. Counts for the next run that is admitted.
    Set(SetTrafficArgs),
    /// Lets a canary's share grow step by step.
    Ramp(RampArgs),
    /// Keeps the ramp at its step.
    Pause(ChangeArgs),
    /// Lets a paused ramp go on.
    Resume(ChangeArgs),
    /// Ends the ramp. The canary gets the share that it had before.
    Abort(ChangeArgs),
    /// Takes all new runs from the canaries, and ends a ramp.
    Rollback(RollbackArgs),
    /// Says where a run with these flags would go, and why, without running it.
    Explain(Box<ExplainArgs>),
}

#[derive(Debug, Args)]
pub(crate) struct GetTrafficArgs {
    /// Writes the policy alone, as `traffic set` takes it.
    #[arg(long)]
    pub(crate) policy: bool,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct SetTrafficArgs {
    /// The policy, in YAML or JSON. `-`: from standard input.
    #[arg(value_name = "FILE")]
    pub(crate) file: std::path::PathBuf,
    /// Changes nothing where the traffic is at another version than this.
    #[arg(long, value_name = "N")]
    pub(crate) expected_version: Option<u64>,
    #[command(flatten)]
    pub(crate) change: ChangeArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RampArgs {
    /// The canary.
    #[arg(value_name = "BACKEND")]
    pub(crate) backend: String,
    /// A share and how long it is held, as `5%:10m`. May be repeated: in this order.
    #[arg(long, value_name = "PERCENT:DURATION", required = true)]
    pub(crate) step: Vec<StepArg>,
    /// The rule whose split it changes. Default: the policy's default.
    #[arg(long, value_name = "NAME")]
    pub(crate) rule: Option<String>,
    #[command(flatten)]
    pub(crate) change: ChangeArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RollbackArgs {
    /// Takes new runs from this canary only.
    #[arg(long, short = 'b', value_name = "NAME")]
    pub(crate) backend: Option<String>,
    #[command(flatten)]
    pub(crate) change: ChangeArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// The id that the run would have.
    #[arg(long, value_name = "RUN")]
    pub(crate) run_id: Option<String>,
    /// The key that keeps runs on one side of a split.
    #[arg(long, value_name = "KEY")]
    pub(crate) sticky_key: Option<String>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Debug, Args)]
pub(crate) struct AuditArgs {
    /// Entries before this number.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) before: Option<u64>,
    /// Largest number of entries that are shown, up to 1000.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) limit: u32,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct BackendListArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}
