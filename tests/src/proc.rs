//! What is seen of processes, mounts and control groups from outside, through `/proc` and `/sys`. Independent of the code
//! under test, so that a leak cannot hide behind the bookkeeping that made it.

use std::{
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use runner_core::clock::{Clock as _, SystemClock};
use rustix::process::{Pid, Signal};

/// Every process that can be seen, as its pid.
fn pids() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

/// Field 3 of `/proc/PID/stat`, and field 4: state and parent.
fn state_and_parent(pid: i32) -> Option<(char, i32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may contain anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// A process as a line for people.
pub fn describe(pid: i32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&line).replace('\0', " ");
    let (state, parent) = state_and_parent(pid).unwrap_or(('?', 0));
    format!("pid {pid} (state {state}, parent {parent}): {}", line.chars().take(120).collect::<String>())
}

fn alive(pid: i32) -> bool {
    state_and_parent(pid).is_some_and(|(state, _)| !matches!(state, 'Z' | 'X'))
}

/// For how long a process is looked at again that is between two programs.
const EXEC: Duration = Duration::from_secs(5);

/// A process in the middle of `execve` has new memory already, but no environment and no arguments in it yet: whoever
/// looks then would take it for one that has none, and miss it. Fields 48 and 51 of `/proc/PID/stat` tell the two apart:
/// where the arguments and the environment lie is set when they are there.
fn between_programs(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let Some((_, fields)) = stat.rsplit_once(')') else { return false };
    let fields: Vec<_> = fields.split_whitespace().collect();
    // The first one after the name is field 3.
    let field = |number: usize| fields.get(number - 3).and_then(|field| field.parse::<u64>().ok());
    // Kernel threads have no memory at all.
    field(23).is_some_and(|bytes| bytes > 0) && field(51) == Some(0)
}

/// A file of a process that the kernel reads out of the process' memory. Empty where there is none, or no process.
fn memory_file(pid: i32, name: &str) -> Vec<u8> {
    let clock = SystemClock::new();
    let deadline = clock.monotonic() + EXEC;
    // Of a process that is not ours to look at nothing is told, fields of its `stat` neither.
    while let Ok(read) = fs::read(format!("/proc/{pid}/{name}")) {
        if !read.is_empty() || !between_programs(pid) || clock.monotonic() > deadline {
            return read;
        }
        std::thread::yield_now();
    }
    Vec::new()
}

fn pids_with_environment(name: &str, value: &str) -> Vec<i32> {
    let entry = format!("{name}={value}");
    let has = |pid: &i32| {
        let environment = memory_file(*pid, "environ");
        environment.split(|byte| *byte == 0).any(|found| found == entry.as_bytes()) && alive(*pid)
    };
    pids().filter(has).collect()
}

fn pids_with_argument_below(path: &Path) -> Vec<i32> {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let has = |pid: &i32| {
        let line = memory_file(*pid, "cmdline");
        *pid != own && contains(&line, path.as_os_str().as_bytes()) && alive(*pid)
    };
    pids().filter(has).collect()
}

/// Live processes with this variable in their environment, each as a line for people.
pub fn with_environment(name: &str, value: &str) -> Vec<String> {
    pids_with_environment(name, value).into_iter().map(describe).collect()
}

/// Live processes whose command line names something below `path`, but for this one.
pub fn with_argument_below(path: &Path) -> Vec<String> {
    pids_with_argument_below(path).into_iter().map(describe).collect()
}

/// Dead children of `parent` that it has not waited for.
pub fn zombies_of(parent: u32) -> Vec<String> {
    let is = |pid: &i32| {
        state_and_parent(*pid).is_some_and(|(state, of)| state == 'Z' && u32::try_from(of) == Ok(parent))
    };
    pids().filter(is).map(describe).collect()
}

/// Kills processes by a variable of their environment.
pub fn kill_with_environment(name: &str, value: &str) {
    pids_with_environment(name, value).into_iter().for_each(kill);
}

/// Kills processes whose command line names something below `path`, but not this one.
pub fn kill_with_argument_below(path: &Path) {
    pids_with_argument_below(path).into_iter().for_each(kill);
}

/// Pids of the processes whose command line names something below `path`.
pub fn pids_naming(path: &Path) -> Vec<i32> {
    pids_with_argument_below(path)
}

/// Kills a process as nothing else can. One that is gone already is fine.
pub fn kill(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    }
}

/// Resident memory of a process, in bytes.
pub fn resident_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// Most resident memory that a process had since [`forget_peak`], or since it began, in bytes.
pub fn peak_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// Begins the count of [`peak_bytes`] anew.
///
/// # Errors
/// Where the kernel does not let us.
pub fn forget_peak(pid: u32) -> std::io::Result<()> {
    fs::write(format!("/proc/{pid}/clear_refs"), "5")
}

/// Number of open files of a process.
pub fn open_files(pid: u32) -> Option<usize> {
    Some(fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count())
}

/// Mounts of this process' namespace below `path`, not at it, in the order in which they were made.
pub fn mount_points_below(path: &Path) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let below = |at: &PathBuf| at.starts_with(path) && at != path;
    mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from).filter(below).collect()
}

/// The same, each as a line for people.
pub fn mounts_below(path: &Path) -> Vec<String> {
    mount_points_below(path).into_iter().map(|at| format!("mount {}", at.display())).collect()
}

fn groups_named(name: &str, dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok) {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if entry.file_name().to_string_lossy().contains(name) {
                found.push(entry.path());
            }
            groups_named(name, &entry.path(), found);
        }
    }
}

/// Live processes whose program lies in a file of this name.
pub fn pids_of_program(name: &str) -> Vec<i32> {
    let is = |pid: &i32| {
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        program.file_name() == Some(OsStr::new(name)) && alive(*pid)
    };
    pids().filter(is).collect()
}

/// Control groups of every hierarchy with `name` in their own name.
pub fn control_groups_named(name: &str) -> Vec<String> {
    let mut found = Vec::new();
    groups_named(name, Path::new("/sys/fs/cgroup"), &mut found);
    found.into_iter().map(|path| format!("control group {}", path.display())).collect()
}

/// Live processes in control groups of every hierarchy with `name` in their own name, and in the groups below these.
pub fn pids_in_control_groups_named(name: &str) -> Vec<i32> {
    let mut groups = Vec::new();
    groups_named(name, Path::new("/sys/fs/cgroup"), &mut groups);
    let mut pids = Vec::new();
    while let Some(group) = groups.pop() {
        let procs = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        pids.extend(procs.lines().filter_map(|line| line.parse::<i32>().ok()));
        let below = fs::read_dir(&group).into_iter().flatten().filter_map(Result::ok);
        groups.extend(
            below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()),
        );
    }
    pids.sort_unstable();
    pids.dedup();
    pids.retain(|pid| alive(*pid));
    pids
}

/// The control group that limits the memory of a process, in whichever version of control groups it is.
pub fn memory_group(pid: i32) -> Option<PathBuf> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let of = |line: &str| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let root = match controllers {
            "" => Path::new("/sys/fs/cgroup").to_owned(),
            all if all.split(',').any(|one| one == "memory") => Path::new("/sys/fs/cgroup/memory").to_owned(),
            _ => return None,
        };
        Some(root.join(path.trim_start_matches('/')))
    };
    let limits = |group: &PathBuf| {
        ["memory.max", "memory.limit_in_bytes"].iter().any(|limit| group.join(limit).exists())
    };
    groups.lines().filter_map(of).find(limits)
}

/// Removes control groups that a failed test left behind.
pub fn remove_control_groups_named(name: &str) {
    let mut found = Vec::new();
    groups_named(name, Path::new("/sys/fs/cgroup"), &mut found);
    found.into_iter().rev().for_each(|path| remove_group(&path));
}

/// A group with groups below it cannot be removed before these.
fn remove_group(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().filter_map(Result::ok) {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_group(&entry.path());
        }
    }
    let _ = fs::remove_dir(path);
}
