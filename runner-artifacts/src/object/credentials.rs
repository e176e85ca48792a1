//! Credentials from files, read again when they change: a rotation reaches transfers that are under way.
//!
//! `object_store` itself knows the environment, web identity, container and instance credentials; what it lacks are files.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use async_trait::async_trait;
use object_store::{
    CredentialProvider, Error,
    aws::AwsCredential,
    azure::{AzureAccessKey, AzureCredential},
};

/// A file's credentials. `Debug` shows the path only.
pub(super) struct FromFile<T> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    path: PathBuf,
    parse: Parse<T>,
    /// What was read, and of which state of the file.
    read: Mutex<Option<(State, Arc<T>)>>,
}

type Parse<T> = Box<dyn Fn(&str) -> Result<T, &'static str> + Send + Sync>;

/// Tells one state of a file from the next.
#[derive(Clone, Copy, PartialEq, Eq)]
struct State {
    modified: Option<SystemTime>,
    size: u64,
    inode: u64,
}

/// A file of credentials is small, in bytes.
const MAX_FILE: u64 = 64 * 1024;

impl<T> fmt::Debug for FromFile<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FromFile").field("path", &self.shared.path).finish_non_exhaustive()
    }
}

impl<T: Send + Sync + 'static> FromFile<T> {
    fn new(path: &Path, parse: impl Fn(&str) -> Result<T, &'static str> + Send + Sync + 'static) -> Self {
        let shared = Shared { path: path.to_owned(), parse: Box::new(parse), read: Mutex::new(None) };
        Self { shared: Arc::new(shared) }
    }
}

impl FromFile<AwsCredential> {
    /// The section `profile` of a file as `~/.aws/credentials`.
    pub(super) fn aws(path: &Path, profile: String) -> Self {
        Self::new(path, move |text| {
            parse_profile(text, &profile).ok_or("it has no complete section of the profile")
        })
    }
}

impl FromFile<AzureCredential> {
    /// A file that holds an account's key and nothing else.
    pub(super) fn azure(path: &Path) -> Self {
        Self::new(path, |text| {
            AzureAccessKey::try_new(text.trim())
                .map(AzureCredential::AccessKey)
                .map_err(|_| "it is no account key in base64")
        })
    }
}

impl<T> Shared<T> {
    /// What the file holds now. Blocks. Errors never hold what was read.
    fn current(&self) -> io::Result<Arc<T>> {
        use std::os::unix::fs::MetadataExt as _;
        let meta = fs::metadata(&self.path)?;
        let state = State { modified: meta.modified().ok(), size: meta.len(), inode: meta.ino() };
        if let Some((read, credential)) = &*self.read.lock().unwrap_or_else(PoisonError::into_inner)
            && *read == state
        {
            return Ok(Arc::clone(credential));
        }
        if meta.len() > MAX_FILE {
            return Err(io::Error::other("it is too large for credentials"));
        }
        let text = fs::read_to_string(&self.path)?;
        let credential = Arc::new((self.parse)(&text).map_err(io::Error::other)?);
        *self.read.lock().unwrap_or_else(PoisonError::into_inner) = Some((state, Arc::clone(&credential)));
        Ok(credential)
    }
}

#[async_trait]
impl<T: Send + Sync + 'static> CredentialProvider for FromFile<T> {
    type Credential = T;

    async fn get_credential(&self) -> object_store::Result<Arc<T>> {
        let shared = Arc::clone(&self.shared);
        let read = tokio::task::spawn_blocking(move || {
            shared.current().map_err(|error| {
                // Replaced under our eyes, or not there for a moment: the next try may see it.
                let text = format!("read the credentials in {}: {error}", shared.path.display());
                Error::Unauthenticated { path: shared.path.display().to_string(), source: text.into() }
            })
        });
        read.await?
    }
}

/// Reads `aws_access_key_id`, `aws_secret_access_key` and `aws_session_token` of a section.
fn parse_profile(text: &str, profile: &str) -> Option<AwsCredential> {
    let (mut key_id, mut secret_key, mut token) = (None, None, None);
    let mut here = false;
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(section) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            here = section.trim().strip_prefix("profile ").unwrap_or(section).trim() == profile;
        } else if here && let Some((name, value)) = line.split_once('=') {
            let value = value.trim().to_owned();
            match name.trim() {
                "aws_access_key_id" => key_id = Some(value),
                "aws_secret_access_key" => secret_key = Some(value),
                "aws_session_token" => token = Some(value),
                _ => {}
            }
        }
    }
    Some(AwsCredential { key_id: key_id?, secret_key: secret_key?, token })
}

/// The shared credentials file of the AWS tools, where it exists: `$AWS_SHARED_CREDENTIALS_FILE`, else
/// `~/.aws/credentials`. Blocks.
pub(super) fn aws_shared_file() -> Option<PathBuf> {
    let named = std::env::var_os("AWS_SHARED_CREDENTIALS_FILE").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".aws/credentials"));
    named.or_else(home).filter(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# comment\n[default]\naws_access_key_id = A1\naws_secret_access_key=s=1\n\n[other]\n\
                        aws_access_key_id=A2\naws_secret_access_key = s2\naws_session_token = t2\nregion = x\n[half]\n\
                        aws_access_key_id = A3\n";

    #[test]
    fn a_profile_is_read_by_its_name() {
        let read = parse_profile(FILE, "default").unwrap();
        assert_eq!((read.key_id.as_str(), read.secret_key.as_str(), read.token), ("A1", "s=1", None));
        let read = parse_profile(FILE, "other").unwrap();
        assert_eq!((read.key_id.as_str(), read.token.as_deref()), ("A2", Some("t2")));
        assert!(parse_profile(FILE, "half").is_none());
        assert!(parse_profile(FILE, "none").is_none());
    }

    #[tokio::test]
    async fn a_rotation_is_seen_at_the_next_request_and_no_secret_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials");
        fs::write(&path, FILE).unwrap();
        let provider = FromFile::aws(&path, "default".to_owned());
        assert_eq!(provider.get_credential().await.unwrap().key_id, "A1");
        let aside = dir.path().join("new");
        fs::write(&aside, FILE.replace("A1", "B1")).unwrap();
        fs::rename(&aside, &path).unwrap();
        let credential = provider.get_credential().await.unwrap();
        assert_eq!(credential.key_id, "B1");
        for shown in [format!("{provider:?}"), format!("{credential:?}")] {
            assert!(!shown.contains("s=1"), "{shown}");
        }
        fs::write(&path, "secret-that-is-no-file-of-ours").unwrap();
        let error = provider.get_credential().await.unwrap_err();
        assert!(!format!("{error:?}").contains("secret-that"), "{error:?}");
    }
}
