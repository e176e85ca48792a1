//! The state store on SQLite: what a single machine needs, with nothing to install.
//!
//! - One writer thread; it commits what waits for it together, so that 64 callers share one `fsync`. See [`SqliteStore`].
//! - A few readers, which never wait for the writer (WAL) and never make it wait.
//! - The schema carries its version and migrates itself; see `migrations/`.
//! - A row that does not decode fails verbs about that row, and nothing else.
//!
//! Where to start reading: `migrations/0001-runs.sql` for what is stored, `write.rs` for what changes it.

mod connection;
mod error;
mod lock;
mod migrate;
mod pairs;
#[cfg(test)]
mod plan_tests;
mod read;
mod row;
mod store;
mod write;
mod writer;

pub use self::{
    error::OpenError,
    lock::{DataDirLock, LockError},
    store::{SqliteOptions, SqliteStore},
};
