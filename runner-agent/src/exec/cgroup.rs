//! The workload's control group: made before its first process, removed after its last.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use runner_core::clock::{Clock as _, SystemClock};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::protocol::CgroupPlan;

const POLL: Duration = Duration::from_millis(2);

/// Makes the directories and writes the settings. What was made stays for [`destroy`] where something fails.
///
/// # Errors
/// What could not be made, with the file's name.
pub(crate) fn create(plan: &CgroupPlan) -> Result<(), String> {
    for directory in &plan.directories {
        fs::create_dir(directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    }
    for (file, value) in &plan.settings {
        fs::write(file, value).map_err(|error| format!("{}: {error} (writing {value:?})", file.display()))?;
    }
    Ok(())
}

/// Puts a process in. Its children are born there.
///
/// # Errors
/// What could not be written, with the file's name.
pub(crate) fn join(plan: &CgroupPlan, pid: i32) -> Result<(), String> {
    for directory in &plan.directories {
        let file = directory.join("cgroup.procs");
        fs::write(&file, pid.to_string()).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    Ok(())
}

/// The control groups of a container, as its own processes see them: to be read, never to be changed.
pub(crate) fn of_this_container() -> CgroupPlan {
    of_container(Path::new("/sys/fs/cgroup"))
}

fn of_container(top: &Path) -> CgroupPlan {
    let version = if top.join("cgroup.controllers").exists() { 2 } else { 1 };
    let directories = if version == 2 {
        vec![top.to_owned()]
    } else {
        ["memory", "cpuacct", "pids"].iter().map(|controller| top.join(controller)).collect()
    };
    CgroupPlan { directories, settings: Vec::new(), version }
}

/// What the group has counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    /// Processes that were killed at the memory limit.
    pub(crate) oom_kills: u64,
    /// Forks that were refused at the limit of processes.
    pub(crate) forks_refused: u64,
    /// `None`: no controller counts it.
    pub(crate) cpu: Option<Duration>,
    /// `None`: no controller counts it.
    pub(crate) max_memory_bytes: Option<u64>,
}

/// Reads the counters. What the kernel does not offer is absent.
pub(crate) fn counters(plan: &CgroupPlan) -> Counters {
    let find = |name: &str| {
        plan.directories.iter().find_map(|directory| fs::read_to_string(directory.join(name)).ok())
    };
    let number = |name: &str| find(name).and_then(|text| text.trim().parse::<u64>().ok());
    let field = |name: &str, key: &str| find(name).and_then(|text| field(&text, key));
    let forks_refused = field("pids.events", "max").unwrap_or(0);
    if plan.version == 1 {
        Counters {
            oom_kills: field("memory.oom_control", "oom_kill").unwrap_or(0),
            forks_refused,
            cpu: number("cpuacct.usage").map(Duration::from_nanos),
            max_memory_bytes: number("memory.max_usage_in_bytes"),
        }
    } else {
        Counters {
            oom_kills: field("memory.events", "oom_kill").unwrap_or(0),
            forks_refused,
            cpu: field("cpu.stat", "usage_usec").map(Duration::from_micros),
            max_memory_bytes: number("memory.peak"),
        }
    }
}

/// The number after `key` in lines of `key number`.
fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// Sends SIGKILL to every process in the group. New ones may be born meanwhile: repeat until there are none.
pub(crate) fn kill(plan: &CgroupPlan) {
    for directory in &plan.directories {
        kill_in(directory);
    }
}

fn kill_in(directory: &Path) {
    if fs::write(directory.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    let procs = directory.join("cgroup.procs");
    // Descriptors first, then membership, then the signal: a pid that was given to another process is not hit.
    let processes: Vec<_> = pids(&procs)
        .into_iter()
        .filter_map(|pid| {
            Some((pid, rustix::process::pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?))
        })
        .collect();
    let still = pids(&procs);
    for (pid, process) in &processes {
        if still.contains(pid) {
            // It may have ended in this moment.
            let _ = rustix::process::pidfd_send_signal(process, Signal::KILL);
        }
    }
}

fn pids(procs: &Path) -> Vec<i32> {
    let text = fs::read_to_string(procs).unwrap_or_default();
    // Bounded, so that a bomb does not use up our descriptors; the caller repeats.
    text.lines().filter_map(|line| line.parse().ok()).take(256).collect()
}

/// Kills what is in the group and removes it. Idempotent. Its success proves that no process is left in it.
///
/// # Errors
/// What is left at the deadline.
pub(crate) fn destroy(plan: &CgroupPlan, deadline: Duration) -> Result<(), String> {
    let clock = SystemClock::new();
    for directory in plan.directories.iter().rev() {
        // Groups below ours go first; the deepest come last in the list.
        let mut tree = vec![directory.clone()];
        let mut next = 0;
        while next < tree.len() {
            tree.extend(children(&tree[next]));
            next += 1;
        }
        for directory in tree.iter().rev() {
            loop {
                match fs::remove_dir(directory) {
                    Ok(()) => break,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                    Err(error) if clock.monotonic() >= deadline => {
                        return Err(format!("{}: {error}", directory.display()));
                    }
                    // Busy: something lives in it, or the kernel is not done with what lived.
                    Err(_) => {
                        kill_in(directory);
                        thread::sleep(POLL);
                    }
                }
            }
        }
    }
    Ok(())
}

fn children(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_found_by_its_whole_name() {
        let text = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n";
        assert_eq!(field(text, "oom_kill"), Some(3));
        assert_eq!(field(text, "oom"), None);
    }

    /// The files of a container's groups, as kernels wrote them.
    fn recorded(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    #[test]
    fn counters_of_version_2_are_those_of_the_containers_own_group() {
        let mut files = vec![
            ("cgroup.controllers", "cpuset cpu io memory pids\n"),
            ("memory.events", "low 0\nhigh 0\nmax 41\noom 2\noom_kill 1\noom_group_kill 0\n"),
            ("memory.peak", "16777216\n"),
            ("cpu.stat", "usage_usec 2500000\nuser_usec 2000000\nsystem_usec 500000\nnr_periods 0\n"),
            ("pids.events", "max 3\n"),
        ];
        let dir = recorded(&files);
        let plan = of_container(dir.path());
        assert_eq!((plan.version, plan.directories.as_slice()), (2, [dir.path().to_owned()].as_slice()));
        let seen = Counters {
            oom_kills: 1,
            forks_refused: 3,
            cpu: Some(Duration::from_millis(2500)),
            max_memory_bytes: Some(16_777_216),
        };
        assert_eq!(counters(&plan), seen);
        // Kernels before 5.19 keep no peak.
        files.retain(|(name, _)| *name != "memory.peak");
        let dir = recorded(&files);
        assert_eq!(counters(&of_container(dir.path())), Counters { max_memory_bytes: None, ..seen });
    }

    #[test]
    fn counters_of_version_1_come_from_each_controllers_own_hierarchy() {
        let dir = recorded(&[
            ("memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
            ("memory/memory.max_usage_in_bytes", "16777216\n"),
            ("cpuacct/cpuacct.usage", "2500000000\n"),
            ("pids/pids.events", "max 3\n"),
            // Hybrid machines have it, without controllers.
            ("unified/cgroup.controllers", "\n"),
        ]);
        let plan = of_container(dir.path());
        assert_eq!(plan.version, 1);
        let seen = Counters {
            oom_kills: 2,
            forks_refused: 3,
            cpu: Some(Duration::from_millis(2500)),
            max_memory_bytes: Some(16_777_216),
        };
        assert_eq!(counters(&plan), seen);
    }

    #[test]
    fn what_no_controller_counts_is_absent() {
        let dir = recorded(&[("cgroup.controllers", "\n")]);
        assert_eq!(counters(&of_container(dir.path())), Counters::default());
    }

    #[test]
    fn a_group_that_cannot_be_made_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("no/group");
        let plan = CgroupPlan { directories: vec![missing.clone()], settings: Vec::new(), version: 2 };
        assert!(create(&plan).unwrap_err().contains(missing.to_str().unwrap()));
        destroy(&plan, Duration::ZERO).unwrap();
    }
}
