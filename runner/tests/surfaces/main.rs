//! The surfaces over the fakes of the core, in one process, and the program where only a process will do.

mod artifacts;
mod calls;
mod harness;
mod http;
mod ops;
mod process;
mod resume;
mod traffic;
