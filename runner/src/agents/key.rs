//! The key of agents' tokens: a file in the data directory that only the service reads.

use std::{
    fs, io,
    io::{Read as _, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use runner_core::agent::AgentKey;

/// Name of the key file in the data directory.
pub const KEY_FILE: &str = "agent.key";

/// Why the key could not be had.
#[derive(Debug, thiserror::Error)]
pub enum AgentKeyError {
    /// The file could not be read or written.
    #[error("{what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others than its owner can read the file, so the key in it is no secret.
    #[error("{} has the mode {mode:o}, so others can read the key: make it 0600, or remove it to have a new one", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The file does not hold a key.
    #[error("{} does not hold a key of 64 hexadecimal digits: remove it to have a new one", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
    },
    /// The operating system has no randomness.
    #[error("get random bytes from the operating system: {0}")]
    Random(String),
}

/// Reads the key, or makes one. With a new key, agents of attempts that live already are refused. Blocks.
///
/// # Errors
/// See [`AgentKeyError`]. A file that others can read is refused, not repaired: its key may be known already.
pub fn open(data_dir: &Path) -> Result<AgentKey, AgentKeyError> {
    let path = data_dir.join(KEY_FILE);
    let io = |what| {
        let path = path.clone();
        move |source| AgentKeyError::Io { what, path, source }
    };
    match fs::File::open(&path) {
        Ok(file) => {
            let mode = file.metadata().map_err(io("look at"))?.permissions().mode() & 0o777;
            if mode & 0o077 != 0 {
                return Err(AgentKeyError::Exposed { path, mode });
            }
            let mut text = String::new();
            file.take(4096).read_to_string(&mut text).map_err(io("read"))?;
            let mut bits = [0; 32];
            hex::decode_to_slice(text.trim_end(), &mut bits)
                .map_err(|_| AgentKeyError::Malformed { path })?;
            Ok(AgentKey::new(bits))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut bits = [0; 32];
            getrandom::fill(&mut bits).map_err(|error| AgentKeyError::Random(error.to_string()))?;
            write(&path, &hex::encode(bits)).map_err(io("write"))?;
            Ok(AgentKey::new(bits))
        }
        Err(source) => Err(io("open")(source)),
    }
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    let aside = path.with_extension("key.new");
    match fs::remove_file(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::File::options().write(true).create_new(true).mode(0o600).open(&aside)?;
    writeln!(file, "{text}")?;
    file.sync_all()?;
    fs::rename(&aside, path)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use runner_core::{
        agent::AgentHub,
        id::{AttemptId, RunId},
    };

    use super::*;

    fn token(dir: &Path) -> String {
        let attempt = AttemptId { run: RunId::new(uuid::Uuid::from_u128(7)), number: 1 };
        AgentHub::new(open(dir).unwrap()).token(attempt)
    }

    #[test]
    fn a_key_is_made_once_and_is_another_elsewhere() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let first = token(one.path());
        assert_eq!(token(one.path()), first);
        assert_ne!(token(two.path()), first);
    }

    #[test]
    fn a_file_that_is_exposed_or_malformed_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _ = open(dir.path()).unwrap();
        let path = dir.path().join(KEY_FILE);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(open(dir.path()), Err(AgentKeyError::Exposed { mode: 0o644, .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "0123").unwrap();
        assert!(matches!(open(dir.path()), Err(AgentKeyError::Malformed { .. })));
    }
}
