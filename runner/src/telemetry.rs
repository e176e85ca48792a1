//! The service's own log: to standard error, for people or as JSON. Never holds an environment value or a token.

use tracing_subscriber::{EnvFilter, util::SubscriberInitExt as _};

use crate::config::{LogConfig, LogFormat};

/// Sends what the process logs to standard error, for as long as it lives.
///
/// # Errors
/// Where the filter does not parse, or something else takes the log already.
pub fn init(config: &LogConfig) -> Result<(), String> {
    let filter: EnvFilter = config.filter.parse().map_err(|error| format!("log.filter: {error}"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match config.format {
        LogFormat::Human => {
            let colour = std::io::IsTerminal::is_terminal(&std::io::stderr())
                && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
            builder.with_ansi(colour).finish().try_init()
        }
        LogFormat::Json => builder
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .finish()
            .try_init(),
    }
    .map_err(|error| error.to_string())
}
