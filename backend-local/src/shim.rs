//! The shim of an attempt, as a process: its death is noticed, and it never stays a zombie.

use std::{
    io,
    os::{fd::OwnedFd, unix::process::ExitStatusExt as _},
    process::{Child, ExitStatus},
    sync::Arc,
    time::Duration,
};

use runner_agent::exec::{client, protocol::ShimRecord};
use runner_core::task::{TaskKind, spawn};
use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, Signal},
};
use tokio::{io::unix::AsyncFd, sync::watch};

use crate::watch::Signal as Wake;

/// A shim that was alive when it was found. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Shim {
    /// Names the process for ever, unlike its pid.
    process: Arc<AsyncFd<OwnedFd>>,
    death: watch::Receiver<Option<Death>>,
}

/// What is known of a shim's death.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Death {
    /// How it ended. Only the parent is told, so that of an adopted one it is not known.
    status: Option<ExitStatus>,
}

impl Death {
    /// How it ended, for people. `None`: not known.
    pub(crate) fn describe(&self) -> Option<String> {
        let status = self.status?;
        Some(match (status.code(), status.signal()) {
            (Some(code), _) => format!("the shim exited with {code}"),
            (None, Some(signal)) => format!("the shim was killed by signal {signal}"),
            (None, None) => format!("the shim ended: {status}"),
        })
    }
}

impl Shim {
    /// Takes charge of a child: waits for its death, reaps it and gives the signal. Needs a tokio runtime.
    pub(crate) fn of_child(child: Child, wake: Wake) -> io::Result<Self> {
        // Its pid cannot be given to another process before it was reaped, which only happens below.
        match open(Pid::from_child(&child)) {
            Ok(process) => Ok(Self::follow(process, Some(child), wake)),
            Err(error) => {
                // No descriptor left. The shim runs; it must still be reaped.
                let mut child = child;
                drop(tokio::task::spawn_blocking(move || {
                    let _ = child.wait();
                    wake.send_replace(());
                }));
                Err(error)
            }
        }
    }

    /// Takes charge of a shim that another process, or an earlier backend of this one, started. `None`: it is dead.
    pub(crate) fn adopt(record: &ShimRecord, wake: Wake) -> io::Result<Option<Self>> {
        let Some(pid) = Pid::from_raw(record.pid) else { return Ok(None) };
        let process = match open(pid) {
            Ok(process) => process,
            Err(error) if Errno::from_io_error(&error) == Some(Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error),
        };
        // The descriptor names one process; now it is known whether it is the recorded one.
        if !client::is_alive(record)? {
            return Ok(None);
        }
        Ok(Some(Self::follow(process, None, wake)))
    }

    fn follow(process: AsyncFd<OwnedFd>, child: Option<Child>, wake: Wake) -> Self {
        let process = Arc::new(process);
        let (tell, death) = watch::channel(None);
        let watched = Arc::clone(&process);
        drop(spawn(TaskKind::Helper, "local-shim", async move {
            // An error means that the runtime goes down, and this task with it.
            let _ = watched.readable().await;
            // It is dead, so this returns at once.
            let status = child.and_then(|mut child| child.wait().ok());
            tell.send_replace(Some(Death { status }));
            wake.send_replace(());
        }));
        Self { process, death }
    }

    /// Its death, where it has ended.
    pub(crate) fn death(&self) -> Option<Death> {
        self.death.borrow().clone()
    }

    /// Waits for its death. `false`: it was still alive at the deadline.
    pub(crate) async fn wait(&self, deadline: Duration) -> bool {
        let mut death = self.death.clone();
        let waited = tokio::time::timeout(deadline, death.wait_for(Option::is_some)).await;
        // A lost sender means that the task was ended with its runtime, not that the shim is dead.
        matches!(waited, Ok(Ok(_)))
    }

    /// SIGKILL. Dead already: fine.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(self.process.get_ref(), Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn open(pid: Pid) -> io::Result<AsyncFd<OwnedFd>> {
    register(rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)?)
}

/// Makes a descriptor something that a task can wait for to be readable.
#[allow(unsafe_code, reason = "tokio asks its callers to promise what the type cannot say")]
pub(crate) fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` owns a valid descriptor, and it is neither replaced nor closed while `AsyncFd` owns it: nobody
    // is given `get_mut` or `into_inner`.
    Ok(unsafe { AsyncFd::register_with_interest(fd, tokio::io::Interest::READABLE) }?)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn a_dead_child_is_noticed_and_reaped() {
        let child = Command::new("true").spawn().unwrap();
        let pid = child.id();
        let wake = Wake::default();
        let shim = Shim::of_child(child, Arc::clone(&wake)).unwrap();
        assert!(shim.wait(DEADLINE).await);
        let death = shim.death().unwrap();
        assert_eq!(death.describe().as_deref(), Some("the shim exited with 0"));
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "no zombie stays");
    }

    #[tokio::test]
    async fn an_adopted_process_can_be_killed_and_another_with_its_pid_is_not_adopted() {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let owner = Shim::of_child(child, Wake::default()).unwrap();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let start_ticks =
            stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap();
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().to_owned();
        let record = ShimRecord { pid, start_ticks, boot_id };
        let other = ShimRecord { start_ticks: start_ticks + 1, ..record.clone() };
        assert!(Shim::adopt(&other, Wake::default()).unwrap().is_none());
        let earlier = ShimRecord { boot_id: "another".to_owned(), ..record.clone() };
        assert!(Shim::adopt(&earlier, Wake::default()).unwrap().is_none());
        let adopted = Shim::adopt(&record, Wake::default()).unwrap().unwrap();
        assert_eq!(adopted.death(), None);
        adopted.kill().unwrap();
        assert!(adopted.wait(DEADLINE).await && owner.wait(DEADLINE).await);
        assert_eq!(owner.death().unwrap().describe().as_deref(), Some("the shim was killed by signal 9"));
        assert_eq!(adopted.death().unwrap().describe(), None);
        adopted.kill().unwrap();
        assert!(Shim::adopt(&record, Wake::default()).unwrap().is_none());
    }
}
