//! The state store: on SQLite, with nothing to install, or on PostgreSQL.
//!
//! - Both pass the same suite, and answer the same to the same verbs.
//! - What a verb answered is durable. Writes are committed in groups, so that many callers share one sync.
//! - A row that does not decode fails verbs about that row, and nothing else. See `row.rs`, which both share.

mod live;
mod lock;
pub mod postgres;
mod row;
mod sqlite;

pub use self::{
    lock::{DataDirLock, LockError},
    postgres::{PostgresError, PostgresOptions, PostgresStore},
    sqlite::{OpenError, SqliteOptions, SqliteStore},
};
