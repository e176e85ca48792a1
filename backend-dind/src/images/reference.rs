//! Image references, taken apart and written out in full, as the engine's own grammar has it (`distribution/reference`).

use std::{fmt, str::FromStr};

/// The registry of references that name none.
pub(crate) const DEFAULT_REGISTRY: &str = "docker.io";
/// The tag of references that have neither tag nor digest.
const DEFAULT_TAG: &str = "latest";
/// Longest name, with the registry.
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// An image reference in full: `docker.io/library/busybox:latest`. Never an image's id: an id says nothing of where an
/// image came from, so nothing of who may use it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Reference {
    registry: String,
    repository: String,
    version: Version,
}

/// Which image of a repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Version {
    Tag(String),
    /// With `sha256:`. A tag beside it says nothing.
    Digest(String),
}

/// Why a text is no reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadReference {
    #[error("is an image id; name a repository")]
    Id,
    #[error(
        "has a name that is no repository's: lower-case letters and digits, with `.`, `_` and `-` between them"
    )]
    Name,
    #[error("has a registry that is no host name with an optional port")]
    Registry,
    #[error("has a tag that is none: letters, digits, `_`, `.` and `-`, at most 128")]
    Tag,
    #[error("has a digest that is none: `sha256:` and 64 hexadecimal digits")]
    Digest,
}

impl Reference {
    /// The registry, with its port.
    pub(crate) fn registry(&self) -> &str {
        &self.registry
    }

    /// Registry and repository.
    pub(crate) fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// Whether it can mean one content only.
    pub(crate) fn is_pinned(&self) -> bool {
        match self.version {
            Version::Digest(_) => true,
            Version::Tag(_) => false,
        }
    }

    /// The same repository at this digest.
    pub(crate) fn at(&self, digest: &str) -> String {
        format!("{}@{digest}", self.name())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.version {
            Version::Tag(tag) => write!(f, "{}/{}:{tag}", self.registry, self.repository),
            Version::Digest(digest) => write!(f, "{}/{}@{digest}", self.registry, self.repository),
        }
    }
}

/// The text in full, with registry and tag, whichever way a person or an engine wrote it: `busybox@sha256:…`.
pub(crate) fn canonical(text: &str) -> Option<String> {
    text.parse::<Reference>().ok().map(|reference| reference.to_string())
}

impl FromStr for Reference {
    type Err = BadReference;

    fn from_str(text: &str) -> Result<Self, BadReference> {
        let is_hex = |text: &str| text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
        if is_hex(text) || text.strip_prefix("sha256:").is_some_and(is_hex) {
            return Err(BadReference::Id);
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                let hex = digest.strip_prefix("sha256:").ok_or(BadReference::Digest)?;
                let good = is_hex(hex) && !hex.bytes().any(|b| b.is_ascii_uppercase());
                (rest, Some(good.then(|| digest.to_owned()).ok_or(BadReference::Digest)?))
            }
            None => (text, None),
        };
        // A colon after the last slash begins a tag; one before it, a port.
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(BadReference::Tag);
        }
        let (registry, path) = match name.split_once('/') {
            Some((first, path)) if first.contains(['.', ':']) || first == "localhost" => {
                (first, path.to_owned())
            }
            _ => (DEFAULT_REGISTRY, name.to_owned()),
        };
        // Three names for one registry, as the engine has it.
        let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
        if !is_registry(registry) {
            return Err(BadReference::Registry);
        }
        let repository = if registry == DEFAULT_REGISTRY && !path.contains('/') {
            format!("library/{path}")
        } else {
            path
        };
        if registry.len() + 1 + repository.len() > MAX_NAME || !repository.split('/').all(is_component) {
            return Err(BadReference::Name);
        }
        let version = match digest {
            Some(digest) => Version::Digest(digest),
            None => Version::Tag(tag.unwrap_or(DEFAULT_TAG).to_owned()),
        };
        Ok(Self { registry: registry.to_owned(), repository, version })
    }
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= MAX_TAG
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

/// Lower-case words with `.`, `_`, `__` or any number of `-` between them.
fn is_component(part: &str) -> bool {
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = part.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
    if !word(*first) || !word(*last) {
        return false;
    }
    let separators = part.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    separators
        .filter(|separator| !separator.is_empty())
        .all(|separator| matches!(separator, "." | "_" | "__") || separator.bytes().all(|b| b == b'-'))
}

/// A host name or an address, with an optional port.
fn is_registry(registry: &str) -> bool {
    let (host, port) = match registry.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (registry, None),
    };
    if port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return false;
    }
    if let Some(address) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        return address.parse::<std::net::Ipv6Addr>().is_ok();
    }
    host.split('.').all(|label| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn a_reference_is_written_out_in_full() {
        for (text, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("index.docker.io/library/busybox", "docker.io/library/busybox:latest"),
            ("someone/thing", "docker.io/someone/thing:latest"),
            ("localhost/thing", "localhost/thing:latest"),
            ("127.0.0.1:5000/a/b:x", "127.0.0.1:5000/a/b:x"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
            ("registry.example.com/a_b/c__d/e--f.g:V1", "registry.example.com/a_b/c__d/e--f.g:V1"),
        ] {
            assert_eq!(text.parse::<Reference>().map(|r| r.to_string()).as_deref(), Ok(full), "{text}");
        }
        let pinned: Reference = format!("busybox:1.36@{DIGEST}").parse().unwrap();
        assert_eq!(pinned.to_string(), format!("docker.io/library/busybox@{DIGEST}"));
        assert!(pinned.is_pinned() && !"busybox".parse::<Reference>().unwrap().is_pinned());
        assert_eq!(canonical(&format!("busybox@{DIGEST}")), Some(pinned.to_string()));
        assert_eq!(canonical("<none>:<none>"), None);
    }

    #[test]
    fn what_is_no_reference_is_refused_with_the_reason() {
        for (text, why) in [
            (&DIGEST[7..], BadReference::Id),
            (DIGEST, BadReference::Id),
            ("", BadReference::Name),
            ("Busybox", BadReference::Name),
            ("a//b", BadReference::Name),
            ("../a", BadReference::Registry),
            ("a/-b", BadReference::Name),
            ("a/b..c", BadReference::Name),
            ("a/b?x=y", BadReference::Name),
            ("a b", BadReference::Name),
            (&"a/".repeat(200), BadReference::Name),
            ("host:port/a", BadReference::Registry),
            ("bad_host.example/a", BadReference::Registry),
            ("a:", BadReference::Tag),
            ("a:-x", BadReference::Tag),
            ("a:x y", BadReference::Tag),
            ("a@sha256:123", BadReference::Digest),
            ("a@md5:0123", BadReference::Digest),
        ] {
            assert_eq!(text.parse::<Reference>(), Err(why), "{text}");
        }
    }
}
