//! A directory beneath which every path is resolved.

use std::{
    ffi::{CStr, OsStr},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use runner_core::spec::User;
use rustix::{
    fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Uid},
    io::Errno,
};

/// A directory handle. Every path given to it is relative and resolved beneath it by the kernel (`openat2` with
/// `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS`): no `..`, no absolute path and no link of any kind leads
/// out of it, also while others change the tree. Cheap to clone.
///
/// Needs Linux 5.6 or later. All methods block; call them from a blocking thread where that matters.
#[derive(Debug, Clone)]
pub struct Root {
    fd: Arc<OwnedFd>,
    path: PathBuf,
}

const RESOLVE: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);
/// With `RESOLVE_NO_SYMLINKS` a link is `ELOOP`; `O_NOFOLLOW` beside it would make it `ENOTDIR`, as a file is.
const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl Root {
    /// Opens the directory at `path`. The path itself is trusted; only what is below it is confined.
    ///
    /// # Errors
    /// Where there is no such directory.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())?;
        Ok(Self { fd: Arc::new(fd), path: path.to_owned() })
    }

    /// The path that it was opened at, for messages and for mounting.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory at `relative`, as a root of its own.
    ///
    /// # Errors
    /// Where there is no such directory, or a link is on the way.
    pub fn directory(&self, relative: &Path) -> io::Result<Self> {
        let fd = self.open_beneath(relative, DIRECTORY, Mode::empty())?;
        Ok(Self { fd: Arc::new(fd), path: self.path.join(relative) })
    }

    /// Makes the directory at `relative` and those above it, with `mode` whatever the umask. One that exists is left as it
    /// is.
    ///
    /// # Errors
    /// `NotADirectory` where something else is in the way.
    pub fn create_dir_all(&self, relative: &Path, mode: u32) -> io::Result<()> {
        let mut at = PathBuf::new();
        for component in relative.components() {
            let Component::Normal(name) = component else { return Err(not_normal()) };
            let above = self.dir_fd(&at)?;
            match rustix::fs::mkdirat(above.as_fd(), name, Mode::RWXU) {
                Ok(()) => {
                    let made = open_dir_at(above.as_fd(), name)?;
                    rustix::fs::fchmod(made, permissions(mode))?;
                }
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            at.push(name);
        }
        self.directory_at(&at).map(drop)
    }

    /// Makes a new file, readable and writable, with `mode` whatever the umask.
    ///
    /// # Errors
    /// `AlreadyExists` where anything is at `relative`, also a dangling link.
    pub fn create_file(&self, relative: &Path, mode: u32) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = self.open_beneath(relative, flags, Mode::RUSR | Mode::WUSR)?;
        rustix::fs::fchmod(&fd, permissions(mode))?;
        Ok(File::from(fd))
    }

    /// Opens a regular file to read. Never blocks on a FIFO.
    ///
    /// # Errors
    /// `InvalidInput` where it is not a regular file; `ELOOP` where it is, or is reached through, a link.
    pub fn open_file(&self, relative: &Path) -> io::Result<File> {
        let (above, name) = self.above(relative)?;
        open_regular_at(above.as_fd(), name)
    }

    /// Moves a file over another, or to where nothing is. Atomic.
    ///
    /// # Errors
    /// `IsADirectory` where a directory is at `to`; else what the kernel says.
    pub fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let (from_above, from_name) = self.above(from)?;
        let (to_above, to_name) = self.above(to)?;
        Ok(rustix::fs::renameat(from_above, from_name, to_above, to_name)?)
    }

    /// The kind of what is at `relative`, itself and not what a link points to. `None` where nothing is.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn file_type(&self, relative: &Path) -> io::Result<Option<FileType>> {
        let (above, name) = match self.above(relative) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        match rustix::fs::statat(above, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Sets the permission bits and, where given, the owner of the directory at `relative`.
    ///
    /// # Errors
    /// What the kernel says; `PermissionDenied` where this process may not give directories away.
    pub fn set_directory(&self, relative: &Path, owner: Option<User>, mode: u32) -> io::Result<()> {
        set_owner_and_mode(self.directory_at(relative)?.as_fd(), owner, mode)
    }

    /// Removes a file. One that is not there is fine.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove_file(&self, relative: &Path) -> io::Result<()> {
        let (above, name) = match self.above(relative) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        match rustix::fs::unlinkat(above, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes whatever is at `relative`, with everything below it. What is not there is fine. Links are removed, not
    /// followed. Takes a handful of descriptors and no stack whatever the depth: a directory in a directory is first moved
    /// to right below the root, as `.remove-N`. One that a killed process left there is removed by [`Root::sweep`].
    ///
    /// # Errors
    /// What the kernel says, for example `ResourceBusy` for a mount point.
    pub fn remove_tree(&self, relative: &Path) -> io::Result<()> {
        match self.file_type(relative)? {
            None => return Ok(()),
            Some(FileType::Directory) => {}
            Some(_) => return self.remove_file(relative),
        }
        let (above, name) = self.above(relative)?;
        let mut names = TrashNames { root: self.fd.as_fd(), next: 0 };
        let mut heap = vec![names.take_in(above.as_fd(), name)?];
        while let Some(trash) = heap.pop() {
            let dir = open_dir_for_removal(self.fd.as_fd(), OsStr::from_bytes(trash.to_bytes()))?;
            let mut entries = Dir::read_from(&dir)?;
            while let Some(entry) = entries.read() {
                let entry = entry?;
                if is_dot(entry.file_name()) {
                    continue;
                }
                match rustix::fs::unlinkat(&dir, entry.file_name(), AtFlags::empty()) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    Err(Errno::ISDIR | Errno::PERM) => {
                        match rustix::fs::unlinkat(&dir, entry.file_name(), AtFlags::REMOVEDIR) {
                            Ok(()) | Err(Errno::NOENT) => {}
                            Err(Errno::NOTEMPTY | Errno::EXIST) => {
                                heap.push(
                                    names.take_in(
                                        dir.as_fd(),
                                        OsStr::from_bytes(entry.file_name().to_bytes()),
                                    )?,
                                );
                            }
                            Err(error) => return Err(error.into()),
                        }
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            drop(entries);
            drop(dir);
            rustix::fs::unlinkat(&self.fd, trash.as_c_str(), AtFlags::REMOVEDIR)?;
        }
        Ok(())
    }

    /// Removes what interrupted removals left right below the root.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn sweep(&self) -> io::Result<()> {
        let mut left = Vec::new();
        let mut entries = Dir::read_from(self.directory_at(Path::new(""))?)?;
        while let Some(entry) = entries.read() {
            let name = OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned();
            if name.as_bytes().starts_with(TRASH.as_bytes()) {
                left.push(PathBuf::from(name));
            }
        }
        left.iter().try_for_each(|name| self.remove_tree(name))
    }

    /// Its descriptor, for what is not here.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn open_beneath(&self, relative: &Path, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        loop {
            match rustix::fs::openat2(&self.fd, relative, flags, mode, RESOLVE) {
                // A rename raced with the resolution: the kernel asks to try again.
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }

    fn dir_fd(&self, relative: &Path) -> io::Result<Arc<OwnedFd>> {
        if relative.as_os_str().is_empty() {
            Ok(Arc::clone(&self.fd))
        } else {
            self.directory_at(relative).map(Arc::new)
        }
    }

    fn directory_at(&self, relative: &Path) -> io::Result<OwnedFd> {
        let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
        self.open_beneath(relative, DIRECTORY, Mode::empty())
    }

    /// The directory that contains `relative`, and the name in it.
    fn above<'a>(&self, relative: &'a Path) -> io::Result<(Arc<OwnedFd>, &'a OsStr)> {
        if !relative.components().all(|component| matches!(component, Component::Normal(_))) {
            return Err(not_normal());
        }
        let name = relative.file_name().ok_or_else(not_normal)?;
        Ok((self.dir_fd(relative.parent().unwrap_or(Path::new("")))?, name))
    }
}

/// Opens a directory by its name. Never follows a link.
pub(super) fn open_dir_at(above: BorrowedFd<'_>, name: &OsStr) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(above, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?)
}

/// Opens a regular file by its name, to read. Never follows a link, never waits for a FIFO's other end, and does not open
/// a device that was there when it looked.
pub(super) fn open_regular_at(above: BorrowedFd<'_>, name: &OsStr) -> io::Result<File> {
    let not_regular = || io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
    let seen = rustix::fs::statat(above, name, AtFlags::SYMLINK_NOFOLLOW)?;
    match FileType::from_raw_mode(seen.st_mode) {
        FileType::RegularFile => {}
        FileType::Symlink => return Err(Errno::LOOP.into()),
        _ => return Err(not_regular()),
    }
    // NONBLOCK: something else may have taken the name since. It says nothing to a regular file.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(above, name, flags, Mode::empty())?;
    match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
        FileType::RegularFile => Ok(File::from(fd)),
        _ => Err(not_regular()),
    }
}

/// Whether it is `.` or `..`.
pub(super) fn is_dot(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}

fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o777)
}

fn not_normal() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "a path beneath a root has only plain names")
}

/// Sets the permission bits, never more than those, and the owner.
pub(super) fn set_owner_and_mode(fd: BorrowedFd<'_>, owner: Option<User>, mode: u32) -> io::Result<()> {
    if let Some(User { uid, gid }) = owner {
        rustix::fs::fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    }
    // After the owner: a change of owner may clear bits.
    Ok(rustix::fs::fchmod(fd, permissions(mode))?)
}

/// Opens a directory that may have been left without permissions, to keep it from being removed.
fn open_dir_for_removal(above: BorrowedFd<'_>, name: &OsStr) -> io::Result<OwnedFd> {
    make_removable(above, name)?;
    open_dir_at(above, name)
}

/// Gives the owner of a directory all permissions. Never follows a link.
fn make_removable(above: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(above, name, flags, Mode::empty())?;
    if rustix::fs::fstat(&fd)?.st_mode & 0o700 != 0o700 {
        // The one way to change the mode of what only a path handle is had of.
        rustix::fs::chmod(format!("/proc/self/fd/{}", fd.as_raw_fd()), Mode::RWXU)?;
    }
    Ok(())
}

const TRASH: &str = ".remove-";

/// Makes names for directories on their way out, right below the root.
struct TrashNames<'a> {
    root: BorrowedFd<'a>,
    next: u64,
}

impl TrashNames<'_> {
    /// Moves a directory to a fresh name right below the root.
    fn take_in(&mut self, above: BorrowedFd<'_>, name: &OsStr) -> io::Result<std::ffi::CString> {
        loop {
            let fresh = std::ffi::CString::new(format!("{TRASH}{}", self.next))?;
            self.next += 1;
            let flags = rustix::fs::RenameFlags::NOREPLACE;
            match rustix::fs::renameat_with(above, name, self.root, fresh.as_c_str(), flags) {
                Ok(()) => return Ok(fresh),
                // Left behind by a removal that was interrupted, or of one that goes on now.
                Err(Errno::EXIST) => {}
                // The kernel writes `..` of a directory that moves, so it must be ours to write.
                Err(Errno::ACCESS) => {
                    make_removable(above, name)?;
                    rustix::fs::renameat_with(above, name, self.root, fresh.as_c_str(), flags)?;
                    return Ok(fresh);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}
