//! The Docker backend: attempts as containers of a Docker Engine.
//!
//! An attempt becomes a container whose first process is our shim (`runner-agent contain`), and volumes that outlive the
//! container's end: one for the shim's directory, one for each mount of inputs or outputs. What the shim writes to its
//! directory is the truth: the log, when the program was started, how it ended. The container's standard streams carry
//! live copies of it and our requests, and are never relied upon. So a restart of this service, a restart of the engine and
//! the engine's own logging change nothing of what is seen.
//!
//! Nothing of the service ever enters a container: no credential, no host directory, no socket. Bytes go in and out through
//! the engine's archive endpoints.
//!
//! Where to start reading: [`DindBackend`]; then `ensure` (how a container comes to be), `convert` (what of a spec becomes
//! what of a container), `observe` and `logs` (how it is followed), `judge` (how it ended), `stop`.

mod agent;
mod archive;
mod backend;
mod capability;
mod config;
mod convert;
mod engine;
mod ensure;
mod error;
mod images;
mod judge;
mod live;
mod logs;
mod names;
mod observe;
mod publish;
mod stage;
mod stop;
mod versions;
mod workload;

pub use self::{
    backend::{DindBackend, DindParts},
    config::{DindConfig, TlsFiles},
    engine::{Engine, EngineError, EngineErrorKind},
    error::OpenError,
    images::{ImageError, ImageErrorKind, ImageId, Images, ImagesConfig, PullPolicy, RegistryLogin},
};
pub use runner_agent::backend::{DefaultUser, InvalidConfig};
