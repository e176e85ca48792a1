//! The state store on SQLite: what a single machine needs, with nothing to install.
//!
//! - One writer thread; it commits what waits for it together, so that 64 callers share one `fsync`. See [`SqliteStore`].
//! - A few readers, which never wait for the writer (WAL) and never make it wait.
//! - The schema carries its version and migrates itself; see `migrations/sqlite/`.
//!
//! Where to start reading: `migrations/sqlite/0001-runs.sql` for what is stored, `write.rs` for what changes it.

mod columns;
mod connection;
mod error;
mod migrate;
mod pairs;
#[cfg(test)]
mod plan_tests;
mod read;
mod store;
mod write;
mod writer;

pub use self::{
    error::OpenError,
    store::{SqliteOptions, SqliteStore},
};
