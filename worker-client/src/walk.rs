//! Which files a local tree has.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use crate::{
    error::{ClientError, ErrorKind},
    transfer::SelectFn,
};

/// What becomes of what is neither a regular file nor a directory, or has a name that is not UTF-8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Irregular {
    /// The upload fails and names it.
    #[default]
    Refuse,
    /// It is left out, and listed in the answer.
    Skip,
}

/// A local tree as it was found.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    pub(crate) files: Vec<TreeFile>,
    pub(crate) directories: Vec<TreeDirectory>,
    pub(crate) skipped: Vec<PathBuf>,
    pub(crate) total_bytes: u64,
}

#[derive(Debug)]
pub(crate) struct TreeFile {
    /// Relative, `/` between names.
    pub(crate) path: String,
    pub(crate) local: PathBuf,
    pub(crate) mode: u32,
}

#[derive(Debug)]
pub(crate) struct TreeDirectory {
    pub(crate) path: String,
    pub(crate) mode: u32,
    pub(crate) empty: bool,
}

/// Walks a tree without following links, in a stable order.
pub(crate) fn walk(
    root: &Path,
    irregular: Irregular,
    max_entries: usize,
    select: Option<&SelectFn>,
) -> Result<Tree, ClientError> {
    let mut tree = Tree::default();
    // A directory, its path, and whether all that is in it is selected.
    let mut open = vec![(root.to_owned(), String::new(), select.is_none())];
    let mut entries = 0usize;
    while let Some((dir, prefix, all)) = open.pop() {
        let doing = || format!("read the directory {}", dir.display());
        let mut found = Vec::new();
        for entry in fs::read_dir(&dir).map_err(|e| ClientError::io(doing(), e))? {
            found.push(entry.map_err(|e| ClientError::io(doing(), e))?);
            entries += 1;
            if entries > max_entries {
                let message = format!("more than {max_entries} files and directories");
                return Err(ClientError::new(
                    ErrorKind::Invalid,
                    format!("walk {}", root.display()),
                    message,
                ));
            }
        }
        found.sort_by_key(fs::DirEntry::file_name);
        let mut kept = 0;
        for entry in &found {
            let local = entry.path();
            let metadata =
                entry.metadata().map_err(|e| ClientError::io(format!("read {}", local.display()), e))?;
            let name = entry.file_name();
            let relative = {
                let name = name.to_string_lossy();
                if prefix.is_empty() { name.into_owned() } else { format!("{prefix}/{name}") }
            };
            let selected = all || select.is_some_and(|select| select(&relative));
            if !selected && !metadata.is_dir() {
                continue;
            }
            let fault = match name.to_str() {
                None => Some("the name is not UTF-8"),
                Some(_) if metadata.is_symlink() => Some("it is a symbolic link"),
                Some(_) if !metadata.is_file() && !metadata.is_dir() => {
                    Some("it is neither a file nor a directory")
                }
                Some(_) => None,
            };
            if let Some(fault) = fault {
                match irregular {
                    Irregular::Refuse => {
                        let message = format!("{} cannot be uploaded: {fault}", local.display());
                        let doing = format!("walk {}", root.display());
                        return Err(ClientError::new(ErrorKind::Unsupported, doing, message));
                    }
                    Irregular::Skip => tree.skipped.push(local),
                }
                continue;
            }
            kept += 1;
            let path = relative;
            if metadata.is_dir() {
                open.push((local, path, selected));
            } else {
                tree.total_bytes += metadata.len();
                let mode = metadata.permissions().mode() & 0o777;
                tree.files.push(TreeFile { path, local, mode });
            }
        }
        if !prefix.is_empty() && all {
            let metadata = fs::metadata(&dir).map_err(|e| ClientError::io(doing(), e))?;
            let mode = metadata.permissions().mode() & 0o777;
            tree.directories.push(TreeDirectory { path: prefix, mode, empty: kept == 0 });
        }
    }
    tree.files.sort_by(|a, b| a.path.cmp(&b.path));
    tree.directories.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_tree_is_found_whole_and_in_order() {
        let dir = tempfile::tempdir().expect("temp dir");
        fs::create_dir_all(dir.path().join("b/empty")).expect("dirs");
        fs::write(dir.path().join("b/two"), "22").expect("file");
        fs::write(dir.path().join("a"), "1").expect("file");
        fs::set_permissions(dir.path().join("a"), fs::Permissions::from_mode(0o755)).expect("mode");
        let tree = walk(dir.path(), Irregular::Refuse, 10, None).expect("walk");
        let files: Vec<_> = tree.files.iter().map(|f| (f.path.as_str(), f.mode)).collect();
        assert_eq!(files[0], ("a", 0o755));
        assert_eq!(files[1].0, "b/two");
        let dirs: Vec<_> = tree.directories.iter().map(|d| (d.path.as_str(), d.empty)).collect();
        assert_eq!(dirs, [("b", false), ("b/empty", true)]);
        assert_eq!(tree.total_bytes, 3);
    }

    #[test]
    fn links_are_refused_by_name_or_skipped_but_never_followed() {
        let dir = tempfile::tempdir().expect("temp dir");
        symlink("/etc", dir.path().join("link")).expect("link");
        let error = walk(dir.path(), Irregular::Refuse, 10, None).expect_err("a link");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.message().contains("link"));
        let tree = walk(dir.path(), Irregular::Skip, 10, None).expect("walk");
        assert!(tree.files.is_empty());
        assert_eq!(tree.skipped, [dir.path().join("link")]);
    }

    #[test]
    fn a_tree_above_the_limit_is_refused() {
        let dir = tempfile::tempdir().expect("temp dir");
        for i in 0..4 {
            fs::write(dir.path().join(i.to_string()), "").expect("file");
        }
        assert_eq!(
            walk(dir.path(), Irregular::Refuse, 3, None).expect_err("too many").kind(),
            ErrorKind::Invalid
        );
    }

    #[test]
    fn only_what_is_selected_is_found_and_a_directory_with_all_that_is_in_it() {
        let dir = tempfile::tempdir().expect("temp dir");
        for path in ["a.txt", "b.log", "x/c.txt", "x/d.log", "whole/e", "whole/deep/f"] {
            let at = dir.path().join(path);
            fs::create_dir_all(at.parent().expect("a parent")).expect("directory");
            fs::write(at, "").expect("file");
        }
        symlink("/etc", dir.path().join("left-out")).expect("link");
        let select: SelectFn = std::sync::Arc::new(|path: &str| path.ends_with(".txt") || path == "whole");
        let tree = walk(dir.path(), Irregular::Refuse, 20, Some(&select)).expect("walk");
        let files: Vec<&str> = tree.files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(files, ["a.txt", "whole/deep/f", "whole/e", "x/c.txt"]);
        let directories: Vec<&str> = tree.directories.iter().map(|dir| dir.path.as_str()).collect();
        assert_eq!(directories, ["whole", "whole/deep"]);
    }
}
