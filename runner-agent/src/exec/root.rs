//! What the program sees as `/`. Runs in the first process of the workload, in its own mount namespace.
//!
//! Mounts are made as detached objects, get their attributes, and are put in their place by descriptor, so that nothing is
//! visible half made and no path is resolved twice. Places are found by `openat2` beneath the new root: a symbolic link in
//! it leads to another place in it, never out. Needs Linux 5.12.

use std::{
    collections::HashSet,
    ffi::{CString, OsStr},
    fmt::Display,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, StatxFlags},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
        UnmountFlags,
    },
    process::{Gid, Uid},
};

use super::{
    protocol::{ExecSpec, FRESH_TMP_BYTES, Root},
    sys,
};

/// Entries of the root that are never taken from the machine or the image.
const REPLACED: [&str; 5] = ["proc", "dev", "sys", "tmp", "run"];
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
/// Parts of `/proc` through which uid 0, even without capabilities, changes the machine.
const PROC_READ_ONLY: [&str; 5] = ["bus", "fs", "irq", "sys", "sysrq-trigger"];
/// Parts of `/proc` that tell of the machine what a workload need not know.
const PROC_HIDDEN: [&str; 9] =
    ["acpi", "asound", "kcore", "keys", "latency_stats", "sched_debug", "scsi", "timer_list", "timer_stats"];

const SAFE: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NODEV);
const DIRECTORY: OFlags =
    OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// What failed, for people.
type Fault = String;

trait Step<T> {
    /// Says what was being done.
    fn step(self, what: impl Display) -> Result<T, Fault>;
}

impl<T> Step<T> for Result<T, Errno> {
    fn step(self, what: impl Display) -> Result<T, Fault> {
        self.map_err(|error| format!("{what}: {error}"))
    }
}

/// Makes the root that the specification demands and enters it. `dir` is the attempt's directory, absolute: a mount is put
/// over it, in this namespace only.
///
/// # Errors
/// What could not be done. The process is then in no state to go on.
pub(crate) fn enter(spec: &ExecSpec, dir: &Path) -> Result<(), Fault> {
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .step("making the mounts private")?;
    // Sources may lie in the attempt's directory, which the stage covers.
    let mounts = open_sources(spec)?;
    let base = Base::open(spec)?;
    // Opened here: a descriptor from before would lead to the mounts of the machine's namespace.
    let place = rustix::fs::open(dir, DIRECTORY, Mode::empty()).step(dir.display())?;
    let stage = Stage::make(place.as_fd())?;
    let root = base.make(&stage)?;
    let mut builder = Builder { root, ours: HashSet::new(), spec };
    let id = mount_id(builder.root.as_fd())?;
    builder.ours.insert(id);

    for top in REPLACED {
        make_directory(builder.root.as_fd(), OsStr::new(top), 0o755)?;
    }
    // On a root that is about to become read-only these can be made now only. Whether they could is seen below.
    for (mount, source) in spec.mounts.iter().zip(&mounts) {
        let _ = builder.place(&mount.target, source.is_directory, false);
    }
    let _ = builder.place(&spec.working_dir, true, true);
    if spec.read_only_root {
        sys::add_mount_attributes(builder.root.as_fd(), MountAttrFlags::MOUNT_ATTR_RDONLY, true)
            .step("making the root read-only")?;
        builder.ours.remove(&id);
    }

    builder.attach_fresh(&stage)?;
    builder.attach_dev(&stage)?;
    builder.attach_proc(&stage)?;
    builder.attach_sys()?;
    if let Root::Host { hidden } = &spec.root {
        for path in hidden.iter().map(|path| path.as_path()).chain([dir]) {
            builder.hide(&stage, path)?;
        }
    }
    for (mount, source) in spec.mounts.iter().zip(mounts) {
        let place = builder.place(&mount.target, source.is_directory, false)?;
        attach(source.tree.as_fd(), place.as_fd()).step(&mount.target)?;
        if !mount.read_only {
            builder.ours.insert(mount_id(source.tree.as_fd())?);
        }
    }
    builder.place(&spec.working_dir, true, true)?;
    builder.pivot()
}

struct Source {
    tree: OwnedFd,
    is_directory: bool,
}

fn open_sources(spec: &ExecSpec) -> Result<Vec<Source>, Fault> {
    let mut sources = Vec::new();
    for mount in &spec.mounts {
        let mut attributes = SAFE;
        if mount.read_only {
            attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
        }
        let tree = clone_tree(CWD, mount.source.as_os_str(), attributes)
            .step(format_args!("mount source {}", mount.source.display()))?;
        let kind = file_type(tree.as_fd())?;
        if !matches!(kind, FileType::Directory | FileType::RegularFile) {
            return Err(format!("mount source {}: neither directory nor file", mount.source.display()));
        }
        sources.push(Source { tree, is_directory: kind == FileType::Directory });
    }
    Ok(sources)
}

/// What the root is made of.
enum Base {
    /// Each entry of a directory, put onto a file system of ours. So places for mounts can be made, and the directory is
    /// never written to.
    Entries(Vec<(CString, Entry)>),
    /// An overlay.
    Overlay(OwnedFd),
}

enum Entry {
    Tree(OwnedFd, bool),
    Link(CString),
}

impl Base {
    fn open(spec: &ExecSpec) -> Result<Self, Fault> {
        match &spec.root {
            Root::Host { .. } => Self::entries(Path::new("/"), SAFE),
            Root::Directory { lower, upper: None } if spec.read_only_root => Self::entries(lower, SAFE),
            Root::Directory { upper: None, .. } => {
                Err("a root file system without a place for changes must be read-only".to_owned())
            }
            Root::Directory { lower, upper: Some(upper) } => {
                Self::overlay(lower, upper, spec.namespaces.user)
            }
        }
    }

    fn entries(of: &Path, attributes: MountAttrFlags) -> Result<Self, Fault> {
        let directory =
            rustix::fs::open(of, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .step(of.display())?;
        let mut entries = Vec::new();
        for entry in Dir::read_from(&directory).step(of.display())? {
            let entry = entry.step(of.display())?;
            let name = entry.file_name();
            if [c".", c".."].contains(&name) || REPLACED.iter().any(|top| top.as_bytes() == name.to_bytes()) {
                continue;
            }
            let what = || format!("{}: {}", of.display(), name.to_string_lossy());
            let kind = rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW).step(what())?.st_mode;
            let found = match FileType::from_raw_mode(kind) {
                kind @ (FileType::Directory | FileType::RegularFile) => {
                    let tree =
                        clone_tree(&directory, OsStr::from_bytes(name.to_bytes()), attributes).step(what())?;
                    Entry::Tree(tree, kind == FileType::Directory)
                }
                FileType::Symlink => {
                    Entry::Link(rustix::fs::readlinkat(&directory, name, Vec::new()).step(what())?)
                }
                // A socket or a device at the top of a root serves nobody inside.
                _ => continue,
            };
            entries.push((name.to_owned(), found));
        }
        Ok(Self::Entries(entries))
    }

    fn overlay(lower: &Path, upper: &Path, unprivileged: bool) -> Result<Self, Fault> {
        let open = |path: &Path| {
            rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .step(path.display())
        };
        let (lower, work, upper) = (open(lower)?, open(&upper.with_file_name("work"))?, open(upper)?);
        // By descriptor: the option's text has its own meaning for `:` and `,` and a limit of length.
        let by_fd = |fd: &OwnedFd| format!("/proc/self/fd/{}", fd.as_raw_fd());
        let mut options =
            vec![("lowerdir", by_fd(&lower)), ("upperdir", by_fd(&upper)), ("workdir", by_fd(&work))];
        if unprivileged {
            // The attributes of overlayfs's own are not for a user namespace to write.
            options.push(("userxattr", String::new()));
        }
        let options: Vec<_> = options.iter().map(|(key, value)| (*key, value.as_str())).collect();
        new_mount("overlay", &options, SAFE).map(Self::Overlay).step("overlay")
    }

    /// Makes the root and attaches it, so that it can be entered.
    fn make(self, stage: &Stage) -> Result<OwnedFd, Fault> {
        let place = stage.open("root")?;
        match self {
            Self::Overlay(root) => {
                attach(root.as_fd(), place.as_fd()).step("attaching the root")?;
                Ok(root)
            }
            Self::Entries(entries) => {
                let root = clone_tree(&place, OsStr::new(""), MountAttrFlags::empty()).step("the root")?;
                attach(root.as_fd(), place.as_fd()).step("attaching the root")?;
                for (name, entry) in entries {
                    let what = name.to_string_lossy().into_owned();
                    match entry {
                        Entry::Link(target) => {
                            rustix::fs::symlinkat(&target, &root, &name).step(&what)?;
                        }
                        Entry::Tree(tree, is_directory) => {
                            let name = OsStr::from_bytes(name.to_bytes());
                            let place = if is_directory {
                                make_directory(root.as_fd(), name, 0o755)?
                            } else {
                                make_file(root.as_fd(), name)?
                            };
                            attach(tree.as_fd(), place.as_fd()).step(&what)?;
                        }
                    }
                }
                Ok(root)
            }
        }
    }
}

/// A file system in memory, from which everything fresh is taken.
struct Stage {
    tree: OwnedFd,
}

impl Stage {
    fn make(dir: BorrowedFd<'_>) -> Result<Self, Fault> {
        let size = FRESH_TMP_BYTES.to_string();
        let options = [("size", size.as_str()), ("mode", "0755")];
        let tree = new_mount("tmpfs", &options, SAFE).step("a tmpfs")?;
        attach(tree.as_fd(), dir).step("attaching the stage")?;
        for (name, mode) in [
            ("root", 0o755),
            ("tmp", 0o1777),
            ("var-tmp", 0o1777),
            ("run", 0o755),
            ("dev", 0o755),
            ("dev/shm", 0o1777),
            ("dev/pts", 0o755),
            ("empty", 0o555),
        ] {
            make_directory(tree.as_fd(), OsStr::new(name), mode)?;
        }
        make_file(tree.as_fd(), OsStr::new("nothing"))?;
        Ok(Self { tree })
    }

    fn open(&self, name: &str) -> Result<OwnedFd, Fault> {
        rustix::fs::openat(&self.tree, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).step(name)
    }

    fn clone(&self, name: &str, attributes: MountAttrFlags) -> Result<OwnedFd, Fault> {
        clone_tree(&self.tree, OsStr::new(name), attributes).step(name)
    }
}

struct Builder<'a> {
    root: OwnedFd,
    /// Mounts in which places may be made: nothing of the machine is changed by it.
    ours: HashSet<u64>,
    spec: &'a ExecSpec,
}

impl Builder<'_> {
    /// Finds a place in the root, whatever symbolic links there are, without leaving the root.
    fn find(&self, path: &str) -> Result<OwnedFd, Errno> {
        // A link with `..` in it is refused for the moment in which any mount of the machine changes.
        let mut tries = 0;
        loop {
            let found = rustix::fs::openat2(
                &self.root,
                path,
                OFlags::PATH | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
            );
            tries += 1;
            if tries == 128 || !matches!(found, Err(Errno::AGAIN)) {
                return found;
            }
        }
    }

    /// Finds a place, or makes it where that changes only what is the workload's own.
    fn place(&self, path: &str, is_directory: bool, for_user: bool) -> Result<OwnedFd, Fault> {
        match self.find(path) {
            Err(Errno::NOENT) => {}
            found => return found.step(path),
        }
        let mut at = self.find("/").step("/")?;
        let mut end = 0;
        while end < path.len() {
            let start = end + 1;
            end = path[start..].find('/').map_or(path.len(), |length| start + length);
            at = match self.find(&path[..end]) {
                Err(Errno::NOENT) => {
                    if !self.ours.contains(&mount_id(at.as_fd())?) {
                        return Err(format!(
                            "{path}: {} does not exist and cannot be made there",
                            &path[..end]
                        ));
                    }
                    let name = OsStr::new(&path[start..end]);
                    if is_directory || end < path.len() {
                        let made = make_directory(at.as_fd(), name, 0o755)?;
                        if for_user && end == path.len() {
                            self.give_to_user(made.as_fd()).step(path)?;
                        }
                        made
                    } else {
                        make_file(at.as_fd(), name)?
                    }
                }
                found => found.step(&path[..end])?,
            };
        }
        Ok(at)
    }

    fn give_to_user(&self, file: BorrowedFd<'_>) -> Result<(), Errno> {
        if self.spec.namespaces.user {
            return Ok(());
        }
        let user = self.spec.user;
        let (uid, gid) = (Uid::from_raw_unchecked(user.uid), Gid::from_raw_unchecked(user.gid));
        rustix::fs::chownat(file, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)
    }

    fn attach_fresh(&mut self, stage: &Stage) -> Result<(), Fault> {
        let mut fresh = HashSet::new();
        for (name, path) in [("tmp", "/tmp"), ("run", "/run"), ("var-tmp", "/var/tmp")] {
            let place = match self.find(path) {
                Ok(place) => place,
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(format!("{path}: {error}")),
            };
            // Where `/var/tmp` is a link to `/tmp` it is fresh already.
            if fresh.contains(&mount_id(place.as_fd())?) {
                continue;
            }
            if file_type(place.as_fd())? != FileType::Directory {
                continue;
            }
            let tree = stage.clone(name, MountAttrFlags::empty())?;
            attach(tree.as_fd(), place.as_fd()).step(path)?;
            fresh.insert(mount_id(tree.as_fd())?);
        }
        self.ours.extend(fresh);
        Ok(())
    }

    fn attach_dev(&self, stage: &Stage) -> Result<(), Fault> {
        let dev = stage.clone("dev", MountAttrFlags::empty())?;
        let place = self.open_top("dev")?;
        attach(dev.as_fd(), place.as_fd()).step("/dev")?;
        for device in DEVICES {
            let node = make_file(dev.as_fd(), OsStr::new(device))?;
            let path = format!("/dev/{device}");
            let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
            let tree = clone_tree(CWD, OsStr::new(&path), attributes).step(&path)?;
            attach(tree.as_fd(), node.as_fd()).step(&path)?;
        }
        let terminals = new_mount(
            "devpts",
            &[("mode", "0620"), ("ptmxmode", "0666")],
            MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC,
        )
        .step("devpts")?;
        let place = rustix::fs::openat(&dev, "pts", DIRECTORY, Mode::empty()).step("/dev/pts")?;
        attach(terminals.as_fd(), place.as_fd()).step("/dev/pts")?;
        for (name, target) in [
            ("ptmx", "pts/ptmx"),
            ("fd", "/proc/self/fd"),
            ("stdin", "/proc/self/fd/0"),
            ("stdout", "/proc/self/fd/1"),
            ("stderr", "/proc/self/fd/2"),
        ] {
            rustix::fs::symlinkat(target, &dev, name).step(format_args!("/dev/{name}"))?;
        }
        Ok(())
    }

    fn attach_proc(&self, stage: &Stage) -> Result<(), Fault> {
        let attributes = SAFE | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let proc = if self.spec.namespaces.pid {
            new_mount("proc", &[], attributes)
        } else {
            clone_tree(CWD, OsStr::new("/proc"), attributes)
        }
        .step("/proc")?;
        let place = self.open_top("proc")?;
        attach(proc.as_fd(), place.as_fd()).step("/proc")?;
        for name in PROC_READ_ONLY {
            let tree = match clone_tree(&proc, OsStr::new(name), MountAttrFlags::MOUNT_ATTR_RDONLY) {
                Err(Errno::NOENT) => continue,
                tree => tree.step(format_args!("/proc/{name}"))?,
            };
            let place = self.find(&format!("/proc/{name}")).step(format_args!("/proc/{name}"))?;
            attach(tree.as_fd(), place.as_fd()).step(format_args!("/proc/{name}"))?;
        }
        for name in PROC_HIDDEN {
            self.cover(stage, &format!("/proc/{name}"))?;
        }
        Ok(())
    }

    fn attach_sys(&self) -> Result<(), Fault> {
        let attributes = SAFE | MountAttrFlags::MOUNT_ATTR_NOEXEC | MountAttrFlags::MOUNT_ATTR_RDONLY;
        // A fresh one shows the interfaces of the workload's own network. Without such a network, or where the kernel
        // does not let us, the directory stays empty or shows the machine's.
        let sys = if self.spec.namespaces.network {
            match new_mount("sysfs", &[], attributes) {
                Err(Errno::PERM | Errno::BUSY | Errno::NODEV) => return Ok(()),
                made => made,
            }
        } else {
            match clone_tree(CWD, OsStr::new("/sys"), attributes) {
                Err(Errno::NOENT) => return Ok(()),
                cloned => cloned,
            }
        };
        let place = self.open_top("sys")?;
        attach(sys.step("/sys")?.as_fd(), place.as_fd()).step("/sys")
    }

    fn open_top(&self, name: &str) -> Result<OwnedFd, Fault> {
        rustix::fs::openat(&self.root, name, DIRECTORY, Mode::empty()).step(format_args!("/{name}"))
    }

    fn hide(&self, stage: &Stage, path: &Path) -> Result<(), Fault> {
        let Some(path) = path.to_str() else {
            return Err(format!("{}: a hidden path must be text", path.display()));
        };
        self.cover(stage, path)
    }

    /// Covers a directory or a file by an empty one. What is not there, or not in reach, need not be covered.
    fn cover(&self, stage: &Stage, path: &str) -> Result<(), Fault> {
        let place = match self.find(path) {
            Ok(place) => place,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            // The program has no more rights than this process, which is not root here.
            Err(Errno::ACCESS) if self.spec.namespaces.user => return Ok(()),
            Err(error) => return Err(format!("hiding {path}: {error}")),
        };
        let cover = match file_type(place.as_fd())? {
            FileType::Directory => "empty",
            _ => "nothing",
        };
        let tree = stage.clone(cover, MountAttrFlags::MOUNT_ATTR_RDONLY)?;
        attach(tree.as_fd(), place.as_fd()).step(format_args!("hiding {path}"))
    }

    /// Makes the root the root, and lets go of the old one.
    fn pivot(self) -> Result<(), Fault> {
        rustix::process::fchdir(&self.root).step("entering the root")?;
        // The old root is put over the new one, where it can be detached without a place of its own.
        rustix::process::pivot_root(".", ".").step("pivot_root")?;
        rustix::mount::unmount(".", UnmountFlags::DETACH).step("detaching the old root")?;
        rustix::process::chdir("/").step("/")
    }
}

fn clone_tree(at: impl AsFd, path: &OsStr, attributes: MountAttrFlags) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_SYMLINK_NOFOLLOW
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = rustix::mount::open_tree(at, path, flags)?;
    if !attributes.is_empty() {
        sys::add_mount_attributes(tree.as_fd(), attributes, true)?;
    }
    Ok(tree)
}

fn new_mount(kind: &str, options: &[(&str, &str)], attributes: MountAttrFlags) -> Result<OwnedFd, Errno> {
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        if value.is_empty() {
            rustix::mount::fsconfig_set_flag(&context, *key)?;
        } else {
            rustix::mount::fsconfig_set_string(&context, *key, *value)?;
        }
    }
    rustix::mount::fsconfig_create(&context)?;
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

fn attach(tree: BorrowedFd<'_>, place: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(tree, "", place, "", flags)
}

/// Makes a directory, or takes the one that is there. A link in its place is an error.
fn make_directory(at: BorrowedFd<'_>, name: &OsStr, mode: u32) -> Result<OwnedFd, Fault> {
    match rustix::fs::mkdirat(at, name, Mode::from_raw_mode(mode)) {
        // The mask of the process does not count: it is 0 while the root is made.
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(format!("{}: {error}", name.display())),
    }
    rustix::fs::openat(at, name, DIRECTORY, Mode::empty()).step(name.display())
}

fn make_file(at: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, Fault> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::openat(at, name, flags, Mode::from_raw_mode(0o644)).step(name.display())
}

fn file_type(file: BorrowedFd<'_>) -> Result<FileType, Fault> {
    rustix::fs::fstat(file).map(|stat| FileType::from_raw_mode(stat.st_mode)).step("fstat")
}

fn mount_id(file: BorrowedFd<'_>) -> Result<u64, Fault> {
    rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)
        .map(|stat| stat.stx_mnt_id)
        .step("statx")
}
