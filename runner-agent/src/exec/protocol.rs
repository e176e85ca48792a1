//! What the shim and its backend say to one another: files in the attempt's directory and a control socket.
//!
//! The directory outlives both sides, so that a backend that was restarted finds everything that it needs. Names:
//!
//! | name | written by | what |
//! |---|---|---|
//! | `exec.json` | backend | [`ExecSpec`]; complete before the shim starts |
//! | `shim.json` | shim, first thing | [`ShimRecord`]: who the shim is. Written once: a second shim finds it and ends |
//! | `init.json` | shim | [`ShimRecord`] of the first process of the workload, before that does anything. Its death is, in a pid namespace, the death of all |
//! | `started.json` | shim | [`StartedRecord`]: the program runs. Also where it could not be executed, which reads as a program that ended with 126 or 127; not where the set-up failed or a stop came before |
//! | `log/OFFSET.seg` | shim | the spool: frames of `runner_core::log::codec`, a file per stretch, named after the offset of its first frame in 20 digits; the last one grows |
//! | `ctl` | shim | the control socket |
//! | `exit.json` | shim, last thing | [`ExitRecord`]; before it the spool is complete, every process of the workload is dead, and the control group is removed |
//! | `shim.err` | shim | what it has to say to people; mostly empty |
//!
//! What a backend may rely on: a shim that is given a directory a second time changes nothing in it. The program gets fresh
//! `/tmp`, `/var/tmp`, `/run`, `/dev` and, with a pid namespace, `/proc`; `/sys` is read-only. A place for a mount is made
//! where it does not exist, but never on the machine's own file systems. A mount namespace needs Linux 5.12. In a user
//! namespace the caller's supplementary groups stay: the kernel lets nobody drop them there.
//!
//! Records appear whole: they are written aside and renamed. A dead shim without an exit record means that nobody knows
//! how the program ended.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use bytes::Bytes;
use runner_core::{
    clock::Timestamp,
    id::AttemptId,
    outcome::{ExitStatus, Usage},
    spec::{TerminalSize, User},
};
use serde::{Deserialize, Serialize};

/// File names in the attempt's directory.
#[allow(missing_docs, reason = "see the table above")]
pub mod name {
    pub const EXEC: &str = "exec.json";
    pub const SHIM: &str = "shim.json";
    pub const INIT: &str = "init.json";
    pub const STARTED: &str = "started.json";
    pub const LOG: &str = "log";
    pub const CONTROL: &str = "ctl";
    pub const EXIT: &str = "exit.json";
    pub const ERRORS: &str = "shim.err";
}

/// A spool file is closed and a new one begun once it has this many bytes.
pub const SPOOL_FILE_BYTES: u64 = 8 * 1024 * 1024;

/// What fits together into the fresh `/tmp`, `/var/tmp`, `/run` and `/dev/shm`, which are in memory. A backend that wants
/// room on a disk puts a mount over them.
pub const FRESH_TMP_BYTES: u64 = 256 * 1024 * 1024;

/// What the shim is to execute, and how confined. Everything is decided by the backend; the shim either does all of it or
/// ends with an [`ExitRecord`] that says what it could not do. It never does less.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecSpec {
    /// Which attempt this is, for messages and names.
    pub attempt: AttemptId,
    /// The program and its arguments. The program is looked up in `PATH` of `env`, inside of the root.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: BTreeMap<String, String>,
    /// Inside of the root. Created where it does not exist and lies on a writable mount.
    pub working_dir: String,
    /// What `/` is.
    pub root: Root,
    /// `/` and everything of the image below it is read-only.
    pub read_only_root: bool,
    /// Put over the root, in this order.
    pub mounts: Vec<Mount>,
    /// Who the program runs as. All capabilities are dropped and `no_new_privs` is set in any case.
    pub user: User,
    /// Which namespaces the program gets.
    pub namespaces: Namespaces,
    /// Limits by control group. `None`: no control group is made.
    pub cgroup: Option<CgroupPlan>,
    /// RLIMIT_FSIZE.
    pub file_size_bytes: Option<u64>,
    /// RLIMIT_AS, where no control group can limit memory.
    pub address_space_bytes: Option<u64>,
    /// RLIMIT_NPROC, where no control group can limit processes.
    pub nproc: Option<u64>,
    /// Wall time that the program may run.
    pub timeout: Duration,
    /// From SIGTERM to SIGKILL when the time is up.
    pub stop_grace: Duration,
    /// A pseudo-terminal of this size; then there is one stream, `terminal`.
    pub terminal: Option<TerminalSize>,
    /// Standard input is fed by the control socket; else it is empty.
    pub stdin: bool,
    /// Log bytes beyond this are dropped and counted.
    pub log_limit_bytes: u64,
}

/// What `/` is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Root {
    /// The machine's own root, without its `/tmp`, `/run`, `/proc`, `/dev` and without `hidden`.
    Host {
        /// Directories of the host that appear empty, for example the service's data directory.
        hidden: Vec<PathBuf>,
    },
    /// An unpacked root file system, never written to: writes go to `upper` where the root is not read-only.
    Directory {
        /// The root file system.
        lower: PathBuf,
        /// An empty directory for what the program changes, with a sibling `work` for overlayfs.
        upper: Option<PathBuf>,
    },
}

/// A directory or file of the host that appears inside of the root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// On the host.
    pub source: PathBuf,
    /// Inside of the root; absolute, normal.
    pub target: String,
    /// Not writable, whatever its permissions.
    pub read_only: bool,
}

/// Which namespaces the program gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[allow(clippy::struct_excessive_bools, reason = "a set of independent facts")]
pub struct Namespaces {
    /// A user namespace around the others; needed where the service is not root.
    pub user: bool,
    /// Mounts: the root and the mounts above.
    pub mount: bool,
    /// Processes: the death of the first is the death of all.
    pub pid: bool,
    /// Network: nothing but loopback.
    pub network: bool,
    /// System V IPC and POSIX queues.
    pub ipc: bool,
    /// Host name.
    pub uts: bool,
}

/// The control group that the shim makes, fills and removes. The workload's first process, which is the shim's, is in it:
/// a limit of processes must have room for one more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupPlan {
    /// The directories to create, one for each hierarchy (v1) or one (v2). All end in the attempt's name.
    pub directories: Vec<PathBuf>,
    /// Files to write, in order, before the program is put in.
    pub settings: Vec<(PathBuf, String)>,
    /// Version 2: `memory.events`, `cgroup.kill`, `cpu.stat`; version 1: `memory.oom_control` and so on.
    pub version: u8,
}

/// Who the shim is. A pid alone is not enough: it may have been given to another process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimRecord {
    /// Its pid, as the host sees it.
    pub pid: i32,
    /// Field 22 of `/proc/PID/stat`: clock ticks after boot at which it started.
    pub start_ticks: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

/// The program runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartedRecord {
    /// When it was started.
    pub time: Timestamp,
    /// Pid of the program, as the host sees it.
    pub pid: i32,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Why.
    pub reason: ExitReason,
    /// How the program itself ended; `None` where it never ran.
    pub status: Option<ExitStatus>,
    /// When.
    pub time: Timestamp,
    /// What it used: wall, cpu, memory, log bytes.
    pub usage: Usage,
    /// What was seen, oldest first: (source, detail).
    pub evidence: Vec<(String, String)>,
}

/// Why the program ended, as the shim saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// By itself; also by a signal that the shim did not send. A program that could not be found or executed ends so too,
    /// with 127 or 126, as from a shell.
    Exited,
    /// The kernel killed it, or a process of it, at the memory limit, and the program itself died of it, or passed on the 137
    /// of a shell whose last command did.
    OomKilled,
    /// The shim ended it: the time was up.
    TimedOut,
    /// The shim ended it: it was asked to, before the program had ended.
    Stopped,
    /// The shim of a container ended it: somebody else than the backend sent SIGTERM to the container, before the program
    /// had ended. Its engine does so when it is shut down.
    Terminated,
    /// The shim could not set up what the spec demands; the program never ran.
    SetupFailed,
}

/// A request on the control socket: one JSON object a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlRequest {
    /// SIGTERM to the program's group now, SIGKILL to everything after the grace. A second one may shorten the grace, never
    /// lengthen it.
    Stop {
        /// In milliseconds.
        grace_ms: u64,
    },
    /// Bytes for standard input. Answered when they are in the pipe or the terminal.
    Stdin(#[serde(with = "runner_core::base64_bytes")] Bytes),
    /// End of standard input.
    Eof,
    /// The terminal's new size.
    Resize(TerminalSize),
    /// Deletes the spool's files whose every frame is before the offset.
    Release {
        /// Log bytes that are durable elsewhere.
        offset: u64,
    },
}

/// Why input is refused that comes before the program is there: it may be sent again.
pub const NOT_YET: &str = "the program does not run yet";

/// The answer: one JSON object a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlReply {
    /// Done.
    Ok,
    /// Not done, and why.
    Refused(String),
}

/// What confinement this machine allows, as found out by trying (`runner-agent probe [DIR]`, JSON on standard output; `DIR`, by
/// default the temporary directory, is where overlays are tried).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct ProbeReport {
    /// The namespaces that can be had, `user` included where it is needed for the others.
    pub namespaces: Namespaces,
    /// An overlay can be mounted: a root file system that is written to.
    pub overlay: bool,
    /// Why something cannot be had, for people.
    pub notes: Vec<String>,
}
