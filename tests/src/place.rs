//! A directory for servers of a test: whatever happens to the test's process, its files, mounts, control groups and the
//! processes that name it are gone soon after.
//!
//! Who guarantees that is a keeper, a process of its own (`engine-keeper`) that waits for the end of its standard input, which
//! comes when the place is dropped or its owner dies in any way. A keeper that dies too leaves a place that the next
//! [`Place::make`] sweeps: both hold one lock on it, so a place whose lock is free has no owner.

use std::{
    fs::{self, File, TryLockError},
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use rustix::{
    mount::{UnmountFlags, unmount},
    process::{Pid, Signal},
};

use crate::{binaries, proc};

/// What every place's name begins with.
const PREFIX: &str = "runner-place-";
/// Name of the file that is locked while a place has an owner.
const LOCK: &str = "lock";
/// Where servers of a place write their pid, so that they are asked before they are killed.
const PIDS: &str = "pids";
/// Between two looks at something that cannot say by itself that it changed.
const LOOK: Duration = Duration::from_millis(20);
/// How long a server may take to end when it is asked.
const GRACE: u32 = 500;
/// How often a step that waits for the kernel is tried.
const TRIES: u32 = 250;

/// A directory that cleans up after itself, see the module.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    keeper: Child,
}

impl Place {
    /// Makes one, after sweeping those whose owners are dead.
    ///
    /// # Errors
    /// Where the directory cannot be made, or its keeper not be started.
    pub fn make() -> Result<Self, String> {
        sweep_abandoned();
        let (path, lock) = new_locked_dir()?;
        fs::create_dir(path.join(PIDS)).map_err(|error| format!("make a directory: {error}"))?;
        let mut keeper = Command::new(binaries::keeper()?)
            .stdin(Stdio::piped())
            // Not to be written to: the keeper shares the lock by holding this.
            .stdout(lock)
            .stderr(Stdio::null())
            // An interrupt from the terminal is for the test, not for who cleans up after it.
            .process_group(0)
            .spawn()
            .map_err(|error| format!("start the keeper: {error}"))?;
        let told = keeper.stdin.as_mut().map(|stdin| writeln!(stdin, "{}", path.display()));
        match told {
            Some(Ok(())) => Ok(Self { path, keeper }),
            Some(Err(error)) => Err(format!("tell the keeper: {error}")),
            None => Err("the keeper has no standard input".to_owned()),
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A name that only this place has: of control groups, for example.
    pub fn name(&self) -> String {
        name_of(&self.path)
    }

    /// Where a server named `server` is to write its pid.
    pub fn pid_file(&self, server: &str) -> PathBuf {
        self.path.join(PIDS).join(server)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// A new directory, and its lock, held. The lock is let go of when every copy of the file is closed.
fn new_locked_dir() -> Result<(PathBuf, File), String> {
    loop {
        let dir = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir()
            .map_err(|error| format!("make a temporary directory: {error}"))?;
        let lock = File::create(dir.path().join(LOCK)).map_err(|error| format!("make a lock: {error}"))?;
        match lock.try_lock() {
            Ok(()) => return Ok((dir.keep(), lock)),
            // Who sweeps took it for an abandoned one in the meantime.
            Err(TryLockError::WouldBlock) => drop(dir.keep()),
            Err(TryLockError::Error(error)) => return Err(format!("lock a directory: {error}")),
        }
    }
}

/// Sweeps every place that has no owner any more.
pub fn sweep_abandoned() {
    for entry in fs::read_dir(std::env::temp_dir()).into_iter().flatten().filter_map(Result::ok) {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        // One without a lock is being made.
        let Ok(lock) = File::options().read(true).write(true).open(entry.path().join(LOCK)) else { continue };
        if lock.try_lock().is_ok() {
            sweep(&entry.path());
        }
    }
}

/// Ends every process of a place and removes everything of it. What is gone already is fine.
pub fn sweep(place: &Path) {
    let name = name_of(place);
    // The workloads first: a server that is asked to end waits for them.
    let workloads = || {
        proc::pids_in_control_groups_named(&name).into_iter().for_each(proc::kill);
    };
    workloads();
    ask_servers(place);
    for _ in 0..TRIES {
        proc::kill_with_argument_below(place);
        workloads();
        if proc::with_argument_below(place).is_empty() && proc::pids_in_control_groups_named(&name).is_empty()
        {
            break;
        }
        thread::sleep(LOOK);
    }
    remove_shim_sockets(place);
    for _ in 0..TRIES {
        for mount in proc::mount_points_below(place).iter().rev() {
            let _ = unmount(mount, UnmountFlags::DETACH);
        }
        proc::remove_control_groups_named(&name);
        let removed = fs::remove_dir_all(place);
        if (removed.is_ok() || !place.exists()) && proc::control_groups_named(&name).is_empty() {
            return;
        }
        thread::sleep(LOOK);
    }
}

/// Asks the servers of a place to end, and waits until they have, or do not want to.
fn ask_servers(place: &Path) {
    let known = proc::pids_naming(place);
    let servers: Vec<i32> = fs::read_dir(place.join(PIDS))
        .into_iter()
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok()?.trim().parse().ok())
        // A pid may be somebody else's by now.
        .filter(|pid| known.contains(pid))
        .collect();
    for pid in servers.iter().filter_map(|pid| Pid::from_raw(*pid)) {
        let _ = rustix::process::kill_process(pid, Signal::CONT);
        let _ = rustix::process::kill_process(pid, Signal::TERM);
    }
    for _ in 0..GRACE {
        let alive = proc::pids_naming(place);
        if !servers.iter().any(|pid| alive.contains(pid)) {
            return;
        }
        thread::sleep(LOOK);
    }
}

/// A shim of containerd listens outside of every directory that an engine is given; where it listens is in a file.
fn remove_shim_sockets(place: &Path) {
    let tasks = place.join("exec/containerd/daemon/io.containerd.runtime.v2.task/moby");
    for task in fs::read_dir(tasks).into_iter().flatten().filter_map(Result::ok) {
        let Ok(address) = fs::read_to_string(task.path().join("address")) else { continue };
        if let Some(socket) = address.trim().strip_prefix("unix://") {
            let _ = fs::remove_file(socket);
        }
    }
}
