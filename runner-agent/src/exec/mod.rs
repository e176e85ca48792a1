//! The shim around a program: exact exit record, ordered log frames, timeout, grace, death of the whole tree.
//!
//! `runner-agent exec DIR` is a process of its own that outlives the service. Nothing here uses threads or tokio: a run
//! costs what its system calls cost. Where to start reading: [`protocol`] for the files, [`client`] for a backend's side.
//! `runner-agent contain DIR` is the same as the first process of a container: see [`link`].
//! Inside: `shim` is the loop that watches, `child` the processes that it starts, `root` what they see as `/`, `spool`
//! the log, `control` the socket, `cgroup` the limits.

pub mod client;
pub mod link;
pub mod protocol;

mod cgroup;
mod child;
mod control;
mod link_out;
mod probe;
mod reader;
pub(crate) mod record;
mod root;
mod shim;
mod spool;
mod sys;
mod tree;
mod watch;

pub use self::{
    probe::probe,
    shim::{ShimExit, run, run_contained, run_unlinked},
};
