//! The backend that executes attempts as confined process trees of this machine.
//!
//! An attempt is a directory and a shim (`runner-agent exec`), which outlives this process: everything that a restarted
//! backend needs is in the directory. [`LocalBackend::open`] makes one, [`LocalConfig`] says how it behaves.

mod attempt_dir;
mod backend;
mod capability;
mod cgroup;
mod config;
mod convert;
mod ensure;
mod error;
mod logs;
mod observe;
mod remove;
mod shim;
mod stop;
mod watch;
mod workload;

pub use self::{
    backend::{LocalBackend, LocalParts},
    config::{HOST_IMAGE, LocalConfig},
    error::OpenError,
};
pub use runner_agent::backend::{DefaultUser, InvalidConfig};
