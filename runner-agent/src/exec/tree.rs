//! Finds and kills the descendants of this process, where no pid namespace does it.

use std::{collections::HashMap, fs};

use rustix::process::{Pid, PidfdFlags, Signal};

use super::record::{self, Stat};

/// Sends SIGKILL to every descendant. New ones may be born meanwhile: repeat until there is no child left.
pub(crate) fn kill_descendants() {
    let processes = processes();
    let us = rustix::process::getpid().as_raw_pid();
    for (&pid, stat) in &processes {
        if stat.state != b'Z' && descends(pid, us, &processes) {
            kill(pid, stat.start_ticks);
        }
    }
}

fn processes() -> HashMap<i32, Stat> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, record::stat(pid).ok()??)))
        .collect()
}

fn descends(pid: i32, from: i32, processes: &HashMap<i32, Stat>) -> bool {
    let mut at = pid;
    // The snapshot was not taken in one moment, so it may have a circle.
    for _ in 0..processes.len() {
        match processes.get(&at) {
            Some(stat) if stat.parent == from => return true,
            Some(stat) => at = stat.parent,
            None => return false,
        }
    }
    false
}

fn kill(pid: i32, start_ticks: u64) {
    let Some(raw) = Pid::from_raw(pid) else { return };
    let Ok(handle) = rustix::process::pidfd_open(raw, PidfdFlags::empty()) else { return };
    // The handle names one process for ever; the start says that it is the one that was found.
    if record::stat(pid).is_ok_and(|stat| stat.is_some_and(|stat| stat.start_ticks == start_ticks)) {
        let _ = rustix::process::pidfd_send_signal(&handle, Signal::KILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descent_is_found_over_generations_and_a_circle_ends() {
        let stat = |parent| Stat { state: b'S', parent, start_ticks: 1 };
        let processes =
            HashMap::from([(10, stat(1)), (11, stat(10)), (12, stat(11)), (20, stat(21)), (21, stat(20))]);
        assert!(descends(12, 10, &processes));
        assert!(descends(11, 10, &processes));
        assert!(!descends(10, 10, &processes));
        assert!(!descends(20, 10, &processes));
    }
}
