//! The agent in a pod: `fetch` before the program, `publish` beside it. Both dial the service; nothing dials them.
//!
//! ```text
//! init  fetch    copies this program to where main finds it, stages the inputs, writes what is to be executed
//! main  contain  the shim around the program (`super::exec`); it finds all of that on volumes, and has no token
//! side  publish  answers what the service asks: the log from the shim's spool, requests to the shim, the outputs
//! ```
//!
//! The shim's directory is the truth, as on every backend: `publish` may die, the service may be away for long, and nothing
//! is lost as long as the pod is there. What is durable in the service is deleted from the spool when the service says so.

pub mod order;

mod client;
mod direct;
mod fetch;
mod publish;
mod serve;
mod store;

use std::{
    fs,
    path::{Path, PathBuf},
};

pub use self::{
    fetch::{LastWord, fetch},
    publish::publish,
};

/// Where things are in the pod's containers. The volumes of [`path::BIN`] and [`path::RUN`] are mounted in all three, the
/// first read-only in main; those of [`path::STAGE`] and [`path::TOKEN`] in the agent's own.
pub mod path {
    /// Of this program, for main: [`AGENT`].
    pub const BIN: &str = "/.runner/bin";
    /// This program's copy.
    pub const AGENT: &str = "/.runner/bin/runner-agent";
    /// The shim's directory is [`SHIM`] in it.
    pub const RUN: &str = "/.runner/run";
    /// The shim's directory.
    pub const SHIM: &str = "/.runner/run/shim";
    /// Inputs and outputs, as a `MountPlan` lays them out.
    pub const STAGE: &str = "/.runner/stage";
    /// Has the file [`TOKEN_FILE`].
    pub const TOKEN: &str = "/.runner/token";
    /// Where the kubelet takes a container's last word from.
    pub const LAST_WORD: &str = "/dev/termination-log";
    /// The token's name in its directory.
    pub const TOKEN_FILE: &str = "token";
}

/// Name of the environment variable with the URL that agents dial: `http://HOST:PORT`.
pub const URL_VARIABLE: &str = "RUNNER_AGENT_URL";

/// Name of the environment variable with the pod's uid.
pub const POD_VARIABLE: &str = "RUNNER_AGENT_POD";

/// What a role knows of its pod: where things are, and who is dialled.
#[derive(Debug, Clone)]
pub struct Pod {
    /// [`path::BIN`].
    pub bin: PathBuf,
    /// [`path::SHIM`].
    pub shim: PathBuf,
    /// [`path::STAGE`].
    pub stage: PathBuf,
    /// The file that `fetch` leaves its last word in, for whoever reads the container's status.
    pub last_word: PathBuf,
    /// [`URL_VARIABLE`].
    pub url: String,
    /// [`POD_VARIABLE`].
    pub uid: String,
    /// The token of the attempt's agent. Secret, so it is not shown.
    pub token: Token,
}

/// A token. Its `Debug` tells nothing.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// Takes what [`path::TOKEN_FILE`] has.
    pub fn new(text: &str) -> Self {
        Self(text.trim_end().to_owned())
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

impl Pod {
    /// This one: the volumes are at their places, the rest is in the environment and in the token's file.
    ///
    /// # Errors
    /// Where something is missing.
    pub fn this() -> Result<Self, PodError> {
        let variable = |name: &str| std::env::var(name).map_err(|error| PodError::pod(name, error));
        let file = Path::new(path::TOKEN).join(path::TOKEN_FILE);
        let token =
            fs::read_to_string(&file).map_err(|error| PodError::pod(file.display().to_string(), error))?;
        Ok(Self {
            bin: path::BIN.into(),
            shim: path::SHIM.into(),
            stage: path::STAGE.into(),
            last_word: path::LAST_WORD.into(),
            url: variable(URL_VARIABLE)?,
            uid: variable(POD_VARIABLE)?,
            token: Token::new(&token),
        })
    }
}

/// Why a role ended without having done its part.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// The pod is not as it should be: a variable, a file, a volume.
    #[error("{what}: {why}")]
    Pod {
        /// What was being done.
        what: String,
        /// What was seen.
        why: String,
    },
    /// The attempt is over, or the token was never one.
    #[error("the service does not know this attempt (any more)")]
    Over,
    /// The inputs cannot be had, and trying again would not help.
    #[error("{0}")]
    Inputs(String),
    /// It was told to end.
    #[error("told to end")]
    Ended,
}

impl PodError {
    fn pod(what: impl Into<String>, why: impl std::fmt::Display) -> Self {
        Self::Pod { what: what.into(), why: why.to_string() }
    }

    /// The process's exit code: told apart by whoever reads the container's status.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Pod { .. } => 70,
            Self::Over => 77,
            Self::Inputs(_) => 66,
            Self::Ended => 143,
        }
    }
}
