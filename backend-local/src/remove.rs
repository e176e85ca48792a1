//! Removing a directory tree that an enemy filled.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{self, AtFlags, CWD, Dir, FileType, Mode, OFlags},
    io::Errno,
};

/// Directories that are open at once. What lies deeper is moved up first, so that neither the stack nor the table of open
/// files grows with the tree.
const MAX_DEPTH: usize = 32;

/// How often a directory that does not stay empty is gone through again. A staging thread whose task was dropped may
/// still be finishing one file.
const MAX_PASSES: usize = 1000;

/// Removes `path` and everything below it. Nothing there: success. Blocking.
///
/// Never follows a symbolic link, and copes with directories without permissions, any depth and any number of entries. The
/// tree MUST have no living writer that goes on for ever.
///
/// # Errors
/// The first failure; what was removed until then is gone.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    let root = match open_dir(CWD, path) {
        Ok(root) => root,
        Err(Errno::NOENT) => return Ok(()),
        // Not a directory: one file, or a link that is not followed.
        Err(Errno::NOTDIR | Errno::LOOP) => return Ok(fs::unlinkat(CWD, path, AtFlags::empty())?),
        Err(error) => return Err(error.into()),
    };
    let mut moved = 0_u64;
    for _ in 0..MAX_PASSES {
        empty(root.as_fd(), root.as_fd(), 1, &mut moved)?;
        match fs::unlinkat(CWD, path, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            // Something was moved up here, or came in meanwhile.
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::new(
        io::ErrorKind::DirectoryNotEmpty,
        "files keep appearing in a directory that is being removed",
    ))
}

/// Opens a directory for reading, if need be after giving ourselves the right to.
fn open_dir<P: rustix::path::Arg + Copy>(at: BorrowedFd<'_>, name: P) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match fs::openat(at, name, flags, Mode::empty()) {
        Err(Errno::ACCESS) => {
            permit(at, name)?;
            fs::openat(at, name, flags, Mode::empty())
        }
        other => other,
    }
}

/// Gives the owner every right to a directory.
fn permit<P: rustix::path::Arg + Copy>(at: BorrowedFd<'_>, name: P) -> Result<(), Errno> {
    // A descriptor of the directory itself: a change of mode by name could be led astray by a link.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let itself = fs::openat(at, name, flags, Mode::empty())?;
    fs::chmod(format!("/proc/self/fd/{}", itself.as_raw_fd()), Mode::RWXU)
}

/// Removes what is in `dir`, or moves it up to `root`.
fn empty(root: BorrowedFd<'_>, dir: BorrowedFd<'_>, depth: usize, moved: &mut u64) -> io::Result<()> {
    let mut entries = Dir::read_from(dir)?;
    let mut permitted = false;
    while let Some(entry) = entries.read() {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let is_dir = match entry.file_type() {
            FileType::Directory => true,
            FileType::Unknown => {
                let stat = fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
                FileType::from_raw_mode(stat.st_mode) == FileType::Directory
            }
            _ => false,
        };
        let mut go = || -> io::Result<()> {
            if !is_dir {
                return ignore_missing(fs::unlinkat(dir, name, AtFlags::empty()));
            }
            if depth >= MAX_DEPTH {
                return move_up(root, dir, name, moved);
            }
            let below = match open_dir(dir, name) {
                Ok(below) => below,
                Err(Errno::NOENT) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            empty(root, below.as_fd(), depth + 1, moved)?;
            drop(below);
            match fs::unlinkat(dir, name, AtFlags::REMOVEDIR) {
                // Refilled; the next pass over the root finds it again.
                Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST) => Ok(()),
                Err(error) => Err(error.into()),
            }
        };
        match go() {
            // The directory that holds it may not be written to.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !permitted => {
                permitted = true;
                fs::chmod(format!("/proc/self/fd/{}", dir.as_raw_fd()), Mode::RWXU)?;
                go()?;
            }
            other => other?,
        }
    }
    Ok(())
}

fn move_up(
    root: BorrowedFd<'_>,
    dir: BorrowedFd<'_>,
    name: &std::ffi::CStr,
    moved: &mut u64,
) -> io::Result<()> {
    loop {
        *moved += 1;
        let target = CString::new(format!(".deep-{moved}"))?;
        // A directory's own `..` changes, so the right to write to it is needed.
        match fs::renameat_with(dir, name, root, &target, fs::RenameFlags::NOREPLACE) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::EXIST) => {}
            Err(Errno::ACCESS) => {
                permit(dir, name)?;
                return Ok(fs::renameat(dir, name, root, &target)?);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn ignore_missing(result: Result<(), Errno>) -> io::Result<()> {
    match result {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs as std_fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[test]
    fn a_missing_tree_is_removed_already() {
        let temp = tempfile::tempdir().unwrap();
        remove_tree(&temp.path().join("none")).unwrap();
    }

    #[test]
    fn links_are_removed_and_not_followed() {
        let temp = tempfile::tempdir().unwrap();
        let (tree, outside) = (temp.path().join("tree"), temp.path().join("outside"));
        std_fs::create_dir_all(outside.join("keep")).unwrap();
        std_fs::create_dir(&tree).unwrap();
        std::os::unix::fs::symlink(&outside, tree.join("dir-link")).unwrap();
        std::os::unix::fs::symlink("loop", tree.join("loop")).unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
        assert!(outside.join("keep").is_dir());
        let link = temp.path().join("link");
        std::os::unix::fs::symlink(&outside, &link).unwrap();
        remove_tree(&link).unwrap();
        assert!(link.symlink_metadata().is_err(), "the link is gone");
        assert!(outside.join("keep").is_dir(), "its target is not");
    }

    #[test]
    fn directories_without_permissions_and_strange_names_are_removed() {
        let temp = tempfile::tempdir().unwrap();
        let tree = temp.path().join("tree");
        let closed = tree.join("closed/inner\n\u{1b}");
        std_fs::create_dir_all(&closed).unwrap();
        std_fs::write(closed.join("file"), "x").unwrap();
        std_fs::write(tree.join(".deep-1"), "x").unwrap();
        rustix::fs::mknodat(CWD, tree.join("fifo"), FileType::Fifo, Mode::empty(), 0).unwrap();
        for dir in [&closed, &tree.join("closed"), &tree] {
            std_fs::set_permissions(dir, std_fs::Permissions::from_mode(0o000)).unwrap();
        }
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
    }

    #[test]
    fn a_tree_deeper_than_any_path_is_removed() {
        let temp = tempfile::tempdir().unwrap();
        let tree = temp.path().join("tree");
        std_fs::create_dir(&tree).unwrap();
        let mut at = open_dir(CWD, &tree).unwrap();
        for _ in 0..5000 {
            fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
            at = open_dir(at.as_fd(), "d").unwrap();
        }
        drop(at);
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
    }

    #[test]
    fn many_entries_are_removed() {
        let temp = tempfile::tempdir().unwrap();
        let tree = temp.path().join("tree");
        std_fs::create_dir(&tree).unwrap();
        for i in 0..3000 {
            std_fs::write(tree.join(i.to_string()), "").unwrap();
        }
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
    }
}
