//! The state store on PostgreSQL, 13 or newer.
//!
//! - One connection writes, and holds an advisory lock: one service for a schema. It commits what waits for it together.
//! - Each commit names the service and a number. So a service that was replaced commits nothing, and where the answer to a commit was
//!   lost, the next connection reads whether it happened.
//! - A few connections read.
//! - The schema is made by [`migrate()`], not by whoever opens the store.
//!
//! Where to start reading: `migrations/postgres/0001-start.sql` for what is stored, `write.rs` for what changes it, `writer.rs` for
//! what happens when the server goes away.

mod columns;
mod connect;
mod error;
mod migrate;
mod options;
mod pairs;
mod read;
mod readers;
mod store;
mod tls;
mod write;
mod writer;

pub use self::{
    error::PostgresError,
    migrate::{Migrated, migrate},
    options::{PostgresOptions, check_url},
    store::PostgresStore,
};
