//! Paths inside a workload: absolute, normal, text.

/// Longest path that a spec may name, in bytes. Linux's PATH_MAX less room for the backend's own prefix.
pub const MAX_BYTES: usize = 3072;
/// Longest single name, in bytes: NAME_MAX.
pub const MAX_NAME_BYTES: usize = 255;

/// Says why `path` is not an absolute, normal path, or `None` where it is one.
///
/// Normal means: starts with `/`, names between single slashes, no `.`, no `..`, no NUL, no trailing slash. `/` itself is
/// not a place for a file, so it is refused too.
pub fn fault(path: &str) -> Option<&'static str> {
    if path.len() > MAX_BYTES {
        return Some("is longer than 3072 bytes");
    }
    let Some(rest) = path.strip_prefix('/') else { return Some("must be absolute") };
    if rest.is_empty() {
        return Some("must not be the root");
    }
    relative_fault(rest)
}

/// Says why `path` is not a relative, normal path, or `None` where it is one.
pub fn relative_fault(path: &str) -> Option<&'static str> {
    if path.is_empty() {
        return Some("must not be empty");
    }
    if path.contains('\0') {
        return Some("must not contain NUL");
    }
    for name in path.split('/') {
        match name {
            "" => return Some("must not contain an empty name (`//`, or `/` at an end)"),
            "." | ".." => return Some("must not contain `.` or `..`"),
            name if name.len() > MAX_NAME_BYTES => return Some("contains a name longer than 255 bytes"),
            _ => {}
        }
    }
    None
}

/// Whether one of two normal paths is the other, or is inside of it.
pub fn overlap(a: &str, b: &str) -> bool {
    let (short, long) = if a.len() <= b.len() { (a, b) } else { (b, a) };
    long.strip_prefix(short).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_absolute_normal_paths_pass() {
        for good in ["/a", "/a/b c", "/a/...", "/ü/\n"] {
            assert_eq!(fault(good), None, "{good}");
        }
        for bad in [
            "",
            "/",
            "a",
            "/a/",
            "//a",
            "/a//b",
            "/a/../b",
            "/..",
            "/a/.",
            "/a\0b",
            &format!("/{}", "a".repeat(256)),
        ] {
            assert!(fault(bad).is_some(), "{bad}");
        }
    }

    #[test]
    fn overlap_is_by_whole_names() {
        assert!(overlap("/a", "/a"));
        assert!(overlap("/a/b", "/a"));
        assert!(!overlap("/ab", "/a"));
    }
}
