//! From SQLite's errors to the contract's.

use std::{io, path::PathBuf};

use runner_core::store::{Inconsistency, StoreError};
use rusqlite::{Error, ErrorCode, ffi};

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A newer version of this program wrote it. Nothing was changed.
    #[error(
        "{} has schema version {found}; this program knows versions up to {known}: use the newer program, or another data directory",
        path.display()
    )]
    NewerSchema {
        /// The database.
        path: PathBuf,
        /// Its version.
        found: i64,
        /// The newest that this program knows.
        known: i64,
    },
    /// The file is not a database of this program. Nothing was changed.
    #[error("{} is not a state store of this program", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// Migrating from one version to the next failed. The database has still the version before.
    #[error("{} could not be migrated to schema version {to}", path.display())]
    Migration {
        /// The database.
        path: PathBuf,
        /// The version that it could not be brought to.
        to: i64,
        /// Why.
        source: Error,
    },
    /// SQLite cannot open, read or write it.
    #[error("{} could not be opened", path.display())]
    Sqlite {
        /// The database.
        path: PathBuf,
        /// Why.
        source: Error,
    },
    /// The operating system refuses something beside the database itself.
    #[error("{} could not be opened", path.display())]
    Io {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A failure inside of a verb, before it is known what it means for the verb.
#[derive(Debug)]
pub(crate) enum Fault {
    /// SQLite said so.
    Sqlite(Error),
    /// The answer to the caller.
    Answer(StoreError),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Sqlite(error)
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
        match fault {
            Fault::Answer(error) => error,
            Fault::Sqlite(error) => store_error(&error),
        }
    }
}

/// The contract's error for SQLite's. SQLite's messages name tables and columns, never values.
pub(crate) fn store_error(error: &Error) -> StoreError {
    let text = error.to_string();
    let Error::SqliteFailure(failure, _) = error else { return StoreError::Other(text) };
    match failure.code {
        ErrorCode::DiskFull => StoreError::Full(text),
        // The shared-memory file could not grow: the same full disk, seen elsewhere.
        ErrorCode::SystemIoFailure if failure.extended_code == ffi::SQLITE_IOERR_SHMSIZE => {
            StoreError::Full(text)
        }
        ErrorCode::SystemIoFailure
        | ErrorCode::DatabaseBusy
        | ErrorCode::DatabaseLocked
        | ErrorCode::CannotOpen
        | ErrorCode::FileLockingProtocolFailed
        | ErrorCode::OperationAborted
        | ErrorCode::OperationInterrupted
        | ErrorCode::OutOfMemory
        | ErrorCode::PermissionDenied
        | ErrorCode::ReadOnly => StoreError::Unavailable(text),
        // What is left are faults of this program or of the file; trying again does not help. The enum is open: SQLite may
        // get codes that this program does not know.
        _ => StoreError::Other(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_become_kinds() {
        let of = |code| store_error(&Error::SqliteFailure(ffi::Error::new(code), None));
        assert!(matches!(of(ffi::SQLITE_FULL), StoreError::Full(_)));
        assert!(matches!(of(ffi::SQLITE_IOERR_SHMSIZE), StoreError::Full(_)));
        for code in
            [ffi::SQLITE_IOERR_FSYNC, ffi::SQLITE_BUSY, ffi::SQLITE_READONLY_DIRECTORY, ffi::SQLITE_CANTOPEN]
        {
            assert!(matches!(of(code), StoreError::Unavailable(_)), "{code}");
        }
        for code in [ffi::SQLITE_CORRUPT, ffi::SQLITE_NOTADB, ffi::SQLITE_CONSTRAINT_UNIQUE] {
            assert!(matches!(of(code), StoreError::Other(_)), "{code}");
        }
    }
}
