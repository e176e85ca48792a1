//! From PostgreSQL's errors to the contract's.

use std::{error::Error as _, io, path::PathBuf};

use runner_core::store::{Inconsistency, StoreError};
use tokio_postgres::{Error, error::SqlState};

/// Why a store cannot be opened, or not be migrated. Nothing was changed, unless it says so.
#[derive(Debug, thiserror::Error)]
pub enum PostgresError {
    /// The URL cannot be used. It is not repeated.
    #[error("the state store's URL {0}")]
    Url(String),
    /// The password's file cannot be read.
    #[error("read the password of the state store from {}", path.display())]
    Password {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The authorities for TLS cannot be had.
    #[error("read the authorities for the state store from {}: {why}", path.display())]
    Authorities {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// TLS cannot be used.
    #[error("TLS to the state store: {0}")]
    Tls(String),
    /// The server does not answer, or not as it should. Trying again may help.
    #[error("the state store's server: {0}")]
    Server(StoreError),
    /// Another service has the schema.
    #[error("another service has the state store: {who}")]
    Held {
        /// What the server says of it.
        who: String,
    },
    /// The schema was never made, or by an earlier version of this program.
    #[error(
        "the state store has schema version {found}, this program needs {needed}: run `runner migrate` with the same configuration"
    )]
    OlderSchema {
        /// The version that is there; 0: none.
        found: i64,
        /// The version that this program needs.
        needed: i64,
    },
    /// The schema was made by a later version of this program.
    #[error(
        "the state store has schema version {found}; this program knows versions up to {known}: use the newer program"
    )]
    NewerSchema {
        /// The version that is there.
        found: i64,
        /// The newest that this program knows.
        known: i64,
    },
    /// Migrating from one version to the next failed. The schema has still the version before.
    #[error("the state store could not be migrated to schema version {to}: {source}")]
    Migration {
        /// The version that it could not be brought to.
        to: i64,
        /// Why.
        source: StoreError,
    },
}

/// A failure inside of a verb, before it is known what it means for the verb.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The server or the way to it.
    Postgres(Error),
    /// The connection was given up here: it took too long.
    Slow,
    /// There is no connection, and why.
    Away(String),
    /// The answer to the caller.
    Answer(StoreError),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Postgres(error)
    }
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        Self::Answer(error)
    }
}

impl From<Inconsistency> for Fault {
    fn from(inconsistency: Inconsistency) -> Self {
        Self::Answer(StoreError::Inconsistent(inconsistency))
    }
}

impl From<Fault> for StoreError {
    fn from(fault: Fault) -> Self {
        fault.store_error()
    }
}

/// What a failure means for the connection and for what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The connection is gone. Whether a commit happened is not known.
    Lost,
    /// The server gave up the transaction in favour of another. The same again may succeed.
    Contended,
    /// Nothing that trying again would help, here.
    Final,
}

impl Fault {
    /// What the caller is told.
    pub(crate) fn store_error(&self) -> StoreError {
        match self {
            Self::Answer(error) => error.clone(),
            Self::Slow => StoreError::Unavailable("its server does not answer in time".to_owned()),
            Self::Away(why) => StoreError::Unavailable(why.clone()),
            Self::Postgres(error) => store_error(error),
        }
    }

    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Slow | Self::Away(_) => Kind::Lost,
            Self::Answer(_) => Kind::Final,
            Self::Postgres(error) => kind(error),
        }
    }
}

/// Conditions that end a session, or that say that there is no server to have one with.
fn ends_session(code: &SqlState) -> bool {
    [
        SqlState::ADMIN_SHUTDOWN,
        SqlState::CRASH_SHUTDOWN,
        SqlState::CANNOT_CONNECT_NOW,
        SqlState::DATABASE_DROPPED,
        SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT,
    ]
    .contains(code)
        || code.code().starts_with("08")
}

/// Whether it is the socket's failure, not the server's word.
fn broken(error: &Error) -> bool {
    error.is_closed() || error.source().is_some_and(|source| source.is::<io::Error>())
}

fn kind(error: &Error) -> Kind {
    match error.code() {
        None if broken(error) => Kind::Lost,
        // A value or a message that does not fit: a fault of this program.
        None => Kind::Final,
        Some(code) if ends_session(code) => Kind::Lost,
        Some(code)
            if *code == SqlState::T_R_SERIALIZATION_FAILURE || *code == SqlState::T_R_DEADLOCK_DETECTED =>
        {
            Kind::Contended
        }
        Some(_) => Kind::Final,
    }
}

/// An error that is not the server's, and what is below it.
fn words(error: &Error) -> String {
    let mut text = error.to_string();
    if let Some(source) = error.source() {
        text = format!("{text}: {source}");
    }
    text
}

/// The contract's error for a connection that does not come about. All of it is mended elsewhere.
pub(crate) fn connect_error(error: &Error) -> StoreError {
    match error.as_db_error() {
        Some(_) => store_error(error),
        None => StoreError::Unavailable(words(error)),
    }
}

/// The contract's error. Of the server's words only the primary message and the code: what stands beside them may quote values.
pub(crate) fn store_error(error: &Error) -> StoreError {
    let Some(db) = error.as_db_error() else {
        let text = words(error);
        return if broken(error) { StoreError::Unavailable(text) } else { StoreError::Other(text) };
    };
    let (code, text) = (db.code(), format!("{} ({})", db.message(), db.code().code()));
    if *code == SqlState::DISK_FULL {
        return StoreError::Full(text);
    }
    let passes = [
        SqlState::QUERY_CANCELED,
        SqlState::LOCK_NOT_AVAILABLE,
        SqlState::READ_ONLY_SQL_TRANSACTION,
        SqlState::T_R_SERIALIZATION_FAILURE,
        SqlState::T_R_DEADLOCK_DETECTED,
        SqlState::INVALID_CATALOG_NAME,
        SqlState::IO_ERROR,
    ];
    // 28: who may log in, 53: too few resources. Both are mended at the server.
    if passes.contains(code)
        || ends_session(code)
        || ["28", "53"].iter().any(|class| code.code().starts_with(class))
    {
        return StoreError::Unavailable(text);
    }
    // What is left are faults of this program or of the database; trying again does not help.
    StoreError::Other(text)
}
