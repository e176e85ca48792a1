//! Signed URLs of the service's own blob endpoint: one object, one method, minutes.
//!
//! A URL is `/blob/v1/KEY?method=M&expires=SECONDS[&size=BYTES][&sha256=HEX]&sig=HEX`, below whatever base the service is
//! reached at. The signature is HMAC-SHA-256 over all of the others, so holding a URL permits exactly what it says.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use hmac::{Hmac, KeyInit as _, Mac as _};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use runner_core::{
    artifact::ArtifactKey,
    clock::{Clock, Timestamp},
};
use sha2::Sha256;

/// What every URL's path begins with.
pub const BLOB_PREFIX: &str = "/blob/v1/";
/// The longest that a URL can be valid. A longer wish is cut to it.
pub const MAX_LIFETIME: Duration = Duration::from_secs(3600);
/// Name of the key file in the data directory.
pub const KEY_FILE: &str = "blob.key";

/// The method that a URL is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlobMethod {
    /// Reads the object, whole or in ranges. Answers `HEAD` too.
    Get,
    /// Stores the object whole.
    Put,
}

impl BlobMethod {
    /// The HTTP method's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
        }
    }
}

impl FromStr for BlobMethod {
    type Err = BlobError;

    fn from_str(s: &str) -> Result<Self, BlobError> {
        match s {
            "GET" => Ok(Self::Get),
            "PUT" => Ok(Self::Put),
            _ => Err(BlobError::Malformed("method")),
        }
    }
}

/// What a URL permits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobGrant {
    /// The one object.
    pub key: ArtifactKey,
    /// The one method.
    pub method: BlobMethod,
    /// Of a `PUT`: the size that the body must have, in bytes. `None`: any.
    pub size: Option<u64>,
    /// Of a `PUT`: the SHA-256 that the body must have, lower-case hex. `None`: any.
    pub sha256: Option<String>,
    /// Until when; whole seconds.
    pub expires: Timestamp,
}

/// Why a URL permits nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BlobError {
    /// It does not have the form of a blob URL. Names the part that is wrong.
    #[error("the URL is not a signed blob URL: its {0} is wrong")]
    Malformed(&'static str),
    /// Its signature is not ours, or is of something else.
    #[error("the URL's signature does not match")]
    BadSignature,
    /// It was ours, and its time is over.
    #[error("the URL has expired")]
    Expired,
    /// It is ours and permits another method.
    #[error("the URL is for another method")]
    WrongMethod,
}

/// Why the keys could not be had.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file could not be read or written.
    #[error("{context}")]
    Io {
        /// What was being done.
        context: String,
        /// What was seen.
        #[source]
        source: io::Error,
    },
    /// Others than its owner can read the file, so the keys in it are no secret.
    #[error(
        "{path} has the mode {mode:o}, so others can read the signing key: make it 0600, or remove it to have a new one"
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The file does not hold one or two keys.
    #[error("{path} does not hold one or two keys of 64 hexadecimal digits: remove it to have a new one")]
    Malformed {
        /// The file.
        path: PathBuf,
    },
    /// The operating system has no randomness.
    #[error("get random bytes from the operating system: {0}")]
    Random(String),
}

/// 256 random bits. Has no `Debug`, so that it cannot be logged.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key([u8; 32]);

#[derive(Clone, Copy)]
struct Keys {
    current: Key,
    previous: Option<Key>,
}

/// Mints and verifies URLs.
///
/// The keys lie in a file of mode 0600 that holds the current one and, after a rotation, the previous one: URLs of the
/// previous key stay valid until they expire or the next rotation.
pub struct BlobSigner {
    path: PathBuf,
    keys: RwLock<Keys>,
    clock: Arc<dyn Clock>,
}

impl std::fmt::Debug for BlobSigner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlobSigner").field("path", &self.path).finish_non_exhaustive()
    }
}

impl BlobSigner {
    /// Reads the keys from [`KEY_FILE`] in `data_dir`, or makes the file with a fresh one. Blocks.
    ///
    /// # Errors
    /// See [`KeyError`]. A file that others can read is refused, not repaired: its key may be known already.
    pub fn open(data_dir: &Path, clock: Arc<dyn Clock>) -> Result<Self, KeyError> {
        let path = data_dir.join(KEY_FILE);
        let keys = match read_keys(&path)? {
            Some(keys) => keys,
            None => {
                let keys = Keys { current: Key::random()?, previous: None };
                write_keys(&path, keys)?;
                keys
            }
        };
        Ok(Self { path, keys: RwLock::new(keys), clock })
    }

    /// Signs with a fresh key from now on. URLs of the key before stay valid; those of the one before that do not. Blocks.
    ///
    /// # Errors
    /// Where the file cannot be written; then nothing has changed.
    pub fn rotate(&self) -> Result<(), KeyError> {
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        let fresh = Keys { current: Key::random()?, previous: Some(keys.current) };
        write_keys(&self.path, fresh)?;
        *keys = fresh;
        Ok(())
    }

    /// The path and query of a URL that permits `method` on `key` for `lifetime`, at most [`MAX_LIFETIME`].
    ///
    /// `size` and `sha256` (lower-case hex) are conditions on the body of a `PUT`.
    pub fn mint(
        &self,
        method: BlobMethod,
        key: &ArtifactKey,
        lifetime: Duration,
        size: Option<u64>,
        sha256: Option<&str>,
    ) -> String {
        let expires = (self.clock.now() + lifetime.min(MAX_LIFETIME)).as_micros().div_euclid(MICROS);
        let claim = Claim { method: method.as_str(), key: key.as_str(), expires, size, sha256 };
        let signature = {
            let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
            hex::encode(keys.current.mac(&claim).finalize().into_bytes())
        };
        let mut url = format!(
            "{BLOB_PREFIX}{}?method={}&expires={expires}",
            utf8_percent_encode(key.as_str(), KEEP_SLASHES),
            method.as_str()
        );
        if let Some(size) = size {
            url.push_str(&format!("&size={size}"));
        }
        if let Some(sha256) = sha256 {
            url.push_str(&format!("&sha256={sha256}"));
        }
        url.push_str("&sig=");
        url.push_str(&signature);
        url
    }

    /// What the path and query of a request permit. `method` is the request's own; `HEAD` counts as `GET`.
    ///
    /// # Errors
    /// `Malformed` and `BadSignature` come before the others, so that only who holds a URL of ours learns that it has
    /// expired or is for another method. Takes the same time wherever a signature differs.
    pub fn verify(&self, method: BlobMethod, path_and_query: &str) -> Result<BlobGrant, BlobError> {
        let parsed = Parsed::new(path_and_query)?;
        let claim = Claim {
            method: parsed.method.as_str(),
            key: parsed.key.as_str(),
            expires: parsed.expires,
            size: parsed.size,
            sha256: parsed.sha256,
        };
        let keys = *self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let known = [Some(keys.current), keys.previous];
        // Compared in constant time, by the MAC's own type.
        let ours = known.iter().flatten().any(|key| key.mac(&claim).verify_slice(&parsed.signature).is_ok());
        if !ours {
            return Err(BlobError::BadSignature);
        }
        let expires = Timestamp::from_micros(parsed.expires.saturating_mul(MICROS));
        if self.clock.now() >= expires {
            return Err(BlobError::Expired);
        }
        if parsed.method != method {
            return Err(BlobError::WrongMethod);
        }
        Ok(BlobGrant {
            key: parsed.key,
            method,
            size: parsed.size,
            sha256: parsed.sha256.map(str::to_owned),
            expires,
        })
    }
}

const MICROS: i64 = 1_000_000;
/// Everything but what RFC 3986 calls unreserved, and the slashes between names.
const KEEP_SLASHES: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');

/// What is signed.
struct Claim<'a> {
    method: &'a str,
    key: &'a str,
    expires: i64,
    size: Option<u64>,
    sha256: Option<&'a str>,
}

impl Key {
    fn random() -> Result<Self, KeyError> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).map_err(|error| KeyError::Random(error.to_string()))?;
        Ok(Self(bytes))
    }

    fn mac(&self, claim: &Claim<'_>) -> Hmac<Sha256> {
        #[allow(clippy::expect_used, reason = "HMAC takes a key of any length")]
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes a key of any length");
        // A key has no control character and the other parts no newline, so no two claims have the same text.
        let size = claim.size.map_or_else(|| "-".to_owned(), |size| size.to_string());
        let text = format!(
            "runner-blob-v1\n{}\n{}\n{}\n{size}\n{}\n",
            claim.method,
            claim.key,
            claim.expires,
            claim.sha256.unwrap_or("-")
        );
        mac.update(text.as_bytes());
        mac
    }
}

/// A URL taken apart. Every part has one spelling only.
struct Parsed<'a> {
    key: ArtifactKey,
    method: BlobMethod,
    expires: i64,
    size: Option<u64>,
    sha256: Option<&'a str>,
    signature: Vec<u8>,
}

impl<'a> Parsed<'a> {
    fn new(path_and_query: &'a str) -> Result<Self, BlobError> {
        use BlobError::Malformed;
        let (path, query) = path_and_query.split_once('?').ok_or(Malformed("query"))?;
        let key = path.strip_prefix(BLOB_PREFIX).ok_or(Malformed("path"))?;
        let key = percent_decode_str(key).decode_utf8().map_err(|_| Malformed("key"))?;
        let key = key.parse().map_err(|_| Malformed("key"))?;
        let (mut method, mut expires, mut size, mut sha256, mut signature) = (None, None, None, None, None);
        for pair in query.split('&') {
            let (name, value) = pair.split_once('=').ok_or(Malformed("query"))?;
            let slot = match name {
                "method" => &mut method,
                "expires" => &mut expires,
                "size" => &mut size,
                "sha256" => &mut sha256,
                "sig" => &mut signature,
                _ => return Err(Malformed("query")),
            };
            if slot.replace(value).is_some() {
                return Err(Malformed("query"));
            }
        }
        let is_hex =
            |text: &&str| text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let signature = signature.filter(is_hex).ok_or(Malformed("signature"))?;
        Ok(Self {
            key,
            method: method.ok_or(Malformed("method"))?.parse()?,
            expires: number(expires.ok_or(Malformed("expiry"))?).ok_or(Malformed("expiry"))?,
            size: size.map(|text| number(text).ok_or(Malformed("size"))).transpose()?,
            sha256: sha256.map(|text| Some(text).filter(is_hex).ok_or(Malformed("sha256"))).transpose()?,
            signature: hex::decode(signature).map_err(|_| Malformed("signature"))?,
        })
    }
}

/// A number in its one spelling: no sign, no leading zero.
fn number<T: FromStr + ToString>(text: &str) -> Option<T> {
    text.parse().ok().filter(|number: &T| number.to_string() == text)
}

fn read_keys(path: &Path) -> Result<Option<Keys>, KeyError> {
    let io = |source| KeyError::Io { context: format!("read {}", path.display()), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    let mode = file.metadata().map_err(io)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(KeyError::Exposed { path: path.to_owned(), mode });
    }
    let mut text = String::new();
    file.take(4096).read_to_string(&mut text).map_err(io)?;
    let malformed = || KeyError::Malformed { path: path.to_owned() };
    let mut keys = Vec::new();
    for line in text.lines() {
        let mut key = [0; 32];
        hex::decode_to_slice(line, &mut key).map_err(|_| malformed())?;
        keys.push(Key(key));
    }
    match keys[..] {
        [current] => Ok(Some(Keys { current, previous: None })),
        [current, previous] => Ok(Some(Keys { current, previous: Some(previous) })),
        _ => Err(malformed()),
    }
}

/// Replaces the file whole and durably.
fn write_keys(path: &Path, keys: Keys) -> Result<(), KeyError> {
    let io = |source| KeyError::Io { context: format!("write {}", path.display()), source };
    let aside = path.with_extension("key.new");
    match fs::remove_file(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(error)),
        _ => {}
    }
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&aside).map_err(io)?;
    for key in [Some(keys.current), keys.previous].iter().flatten() {
        writeln!(file, "{}", hex::encode(key.0)).map_err(io)?;
    }
    file.sync_all().map_err(io)?;
    fs::rename(&aside, path).map_err(io)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(io)
}

#[cfg(test)]
#[path = "blob_tests.rs"]
mod tests;
