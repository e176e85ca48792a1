//! Names of entries: bytes on a file system, text in a manifest and in a key.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};

use runner_core::artifact::ArtifactKey;
use sha2::{Digest as _, Sha256};

/// A path as a manifest has it, and whether it is encoded. Text stays as it is; where any byte is not UTF-8, such bytes and
/// every `%` become `%XX`.
pub(super) fn manifest_path(path: &OsStr) -> (String, bool) {
    match path.to_str() {
        Some(text) => (text.to_owned(), false),
        None => (encode(path.as_bytes(), |c| c == '%'), true),
    }
}

/// A path for a message: quoted, and cut where it is long.
pub(super) fn shown(path: &str) -> String {
    const LONGEST: usize = 200;
    if path.len() <= LONGEST {
        return format!("{path:?}");
    }
    format!("{:?}…", &path[..path.floor_char_boundary(LONGEST)])
}

/// The path below `prefix` under which a file is stored: its own, with control characters, `%` and bytes that are not UTF-8
/// as `%XX`. A path that is too long for a key becomes `~sha256-HEX`, of its bytes; so does one that begins with `~sha256-`.
/// Two paths never share a key. `None` where the prefix alone is too long.
pub(super) fn key(prefix: &ArtifactKey, path: &OsStr) -> Option<ArtifactKey> {
    const HASHED: &str = "~sha256-";
    let text = encode(path.as_bytes(), |c| c == '%' || c.is_control());
    match prefix.join(&text) {
        Ok(key) if !text.starts_with(HASHED) => Some(key),
        _ => prefix.join(&format!("{HASHED}{}", hex::encode(Sha256::digest(path.as_bytes())))).ok(),
    }
}

fn encode(bytes: &[u8], also: impl Fn(char) -> bool) -> String {
    fn push(out: &mut String, bytes: &[u8]) {
        for byte in bytes {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if also(c) {
                push(&mut out, c.encode_utf8(&mut [0; 4]).as_bytes());
            } else {
                out.push(c);
            }
        }
        push(&mut out, chunk.invalid());
    }
    out
}

#[cfg(test)]
mod tests {
    use std::{ffi::OsString, os::unix::ffi::OsStringExt as _};

    use proptest::prelude::*;
    use runner_core::artifact::{EntryKind, ManifestEntry};

    use super::*;

    fn entry(path: &OsStr) -> ManifestEntry {
        let (path, path_encoded) = manifest_path(path);
        ManifestEntry {
            output: String::new(),
            base: String::new(),
            path,
            path_encoded,
            kind: EntryKind::File,
            size: 0,
            sha256: String::new(),
            mode: 0,
            key: None,
        }
    }

    fn name() -> impl Strategy<Value = OsString> {
        prop::collection::vec(
            any::<u8>().prop_filter("names have no / or NUL", |b| !matches!(b, 0 | b'/')),
            1..300,
        )
        .prop_filter("no dots alone", |name| name != b"." && name != b"..")
        .prop_map(OsString::from_vec)
    }

    proptest! {
        #[test]
        fn a_path_reads_back_what_it_was(path in name()) {
            prop_assert_eq!(entry(&path).path_bytes(), Some(path.into_vec()));
        }

        #[test]
        fn two_paths_never_share_a_key(a in name(), b in name()) {
            let prefix: ArtifactKey = "p".parse().unwrap();
            prop_assert_eq!(key(&prefix, &a) == key(&prefix, &b), a == b);
            prop_assert!(key(&prefix, &a).unwrap().as_str().starts_with("p/"));
        }
    }

    #[test]
    fn plain_names_keep_their_text_in_the_key() {
        let prefix: ArtifactKey = "p/q".parse().unwrap();
        assert_eq!(key(&prefix, OsStr::new("a b/ü.txt")).unwrap().as_str(), "p/q/a b/ü.txt");
        assert_eq!(key(&prefix, OsStr::new("a\nb%")).unwrap().as_str(), "p/q/a%0Ab%25");
        assert_eq!(key(&prefix, OsStr::from_bytes(b"\xff")).unwrap().as_str(), "p/q/%FF");
    }

    #[test]
    fn bad_encodings_are_refused() {
        for bad in ["%", "%1", "%zz", "a%4"] {
            let entry = ManifestEntry { path: bad.to_owned(), path_encoded: true, ..entry(OsStr::new("x")) };
            assert_eq!(entry.path_bytes(), None, "{bad}");
        }
    }
}
