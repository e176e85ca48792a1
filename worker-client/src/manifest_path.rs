//! Names in a manifest as local paths. A manifest is made of what a workload wrote, so it is hostile until shown otherwise.

use std::{ffi::OsString, os::unix::ffi::OsStringExt as _};

use percent_encoding::percent_decode_str;
use runner_proto::v1 as proto;

use crate::error::ClientError;

/// The names of an entry, from the top: those of the declared output, then those of the path within it.
///
/// # Errors
/// [`ErrorKind::UnsafePath`](crate::ErrorKind::UnsafePath) where a name is empty, `.`, `..`, holds a `/` or NUL, or where
/// a path within an output is absolute.
pub fn manifest_path(entry: &proto::ManifestEntry) -> Result<Vec<OsString>, ClientError> {
    // What a glob matched lies below its base. A declared output is absolute; only its names count.
    let output = if entry.base.is_empty() { &entry.output } else { &entry.base };
    let output = output.strip_prefix('/').unwrap_or(output);
    let mut names = Vec::new();
    if !output.is_empty() {
        split(output, false, &mut names)?;
    }
    names.extend(path_in_output(entry)?);
    if names.is_empty() {
        return Err(ClientError::unsafe_path("", "the manifest names no path"));
    }
    Ok(names)
}

/// The names of an entry below its declared output. None where the output is one file.
pub(crate) fn path_in_output(entry: &proto::ManifestEntry) -> Result<Vec<OsString>, ClientError> {
    let mut names = Vec::new();
    if !entry.path.is_empty() {
        split(&entry.path, entry.path_encoded, &mut names)?;
    }
    Ok(names)
}

fn split(path: &str, encoded: bool, names: &mut Vec<OsString>) -> Result<(), ClientError> {
    for name in path.split('/') {
        // Decoded name by name, so that an encoded separator is seen as what it is.
        let bytes = if encoded { percent_decode_str(name).collect() } else { name.as_bytes().to_vec() };
        let fault = match bytes.as_slice() {
            b"" => Some("the path is absolute or has an empty name"),
            b"." | b".." => Some("the path has a `.` or `..` name"),
            name if name.contains(&b'/') => Some("a name holds an encoded `/`"),
            name if name.contains(&0) => Some("a name holds NUL"),
            _ => None,
        };
        if let Some(fault) = fault {
            return Err(ClientError::unsafe_path(path, fault));
        }
        names.push(OsString::from_vec(bytes));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn what_a_glob_matched_lies_below_its_base() {
        let glob = proto::ManifestEntry {
            base: "/outputs/logs".into(),
            ..entry("/outputs/logs/**/*.log", "a/b.log", false)
        };
        assert_eq!(manifest_path(&glob).expect("valid"), ["outputs", "logs", "a", "b.log"]);
    }

    fn entry(output: &str, path: &str, path_encoded: bool) -> proto::ManifestEntry {
        let (output, path) = (output.to_owned(), path.to_owned());
        proto::ManifestEntry { output, path, path_encoded, ..proto::ManifestEntry::default() }
    }

    #[test]
    fn hostile_paths_are_refused() {
        for (output, path, encoded) in [
            ("/out", "../x", false),
            ("/out", "/etc/passwd", false),
            ("/out", "a/../../x", false),
            ("/out", "a//b", false),
            ("/out", "./a", false),
            ("/out", "a/", false),
            ("/../x", "", false),
            ("//x", "", false),
            ("/out", "%2E%2E/x", true),
            ("/out", "..%2Fx", true),
            ("/out", "a%00b", true),
            ("/out", "a\0b", false),
            ("", "", false),
            ("/", "", false),
        ] {
            let error = manifest_path(&entry(output, path, encoded)).expect_err(path);
            assert_eq!(error.kind(), ErrorKind::UnsafePath, "{output} {path}");
        }
    }

    #[test]
    fn encoded_bytes_are_decoded_only_where_the_entry_says_so() {
        let names = manifest_path(&entry("/out", "a%FFb/50%25", true)).expect("safe");
        assert_eq!(names[1], OsString::from_vec(vec![b'a', 0xff, b'b']));
        assert_eq!(names[2], "50%");
        let names = manifest_path(&entry("/out", "%2E%2E", false)).expect("safe");
        assert_eq!(names[1], "%2E%2E");
    }
}
