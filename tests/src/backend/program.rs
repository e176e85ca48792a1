//! What a case wants a workload to do. Each harness says it in its backend's own terms.

use runner_core::log::LogStream;

/// The word that a program prints, with a newline, once it is where a case wants it.
pub const READY: &str = "ready\n";

/// What a workload does.
#[derive(Debug, Clone)]
pub enum Program {
    /// Prints both texts, then exits.
    Print {
        /// On standard output.
        out: String,
        /// On standard error.
        err: String,
        /// The exit code.
        exit: i32,
    },
    /// Kills itself.
    Signal(i32),
    /// A program that does not exist.
    NotFound,
    /// A file that may not be executed.
    NotExecutable,
    /// Prints [`READY`], then sleeps for ever; SIGTERM ends it.
    SleepForever,
    /// Prints [`READY`], then sleeps; on SIGTERM prints `bye\n` and exits with the code.
    HandleTerm(i32),
    /// Prints [`READY`], then sleeps for ever; SIGTERM does nothing.
    IgnoreTerm,
    /// Leaves a process in a session of its own that no SIGTERM reaches, prints [`READY`], then sleeps for ever.
    Daemonize,
    /// The same, but then it exits with the code.
    DaemonizeAndExit(i32),
    /// Prints the numbers from 0 to below `count`, each with a newline, with a pause before each; exits 0.
    Count {
        /// How many.
        count: u32,
        /// In milliseconds.
        pause: u32,
    },
    /// Writes the files, `/` at the end of a path meaning an empty directory; prints [`READY`]; then as `then` says.
    Write {
        /// Absolute path and contents.
        files: Vec<(String, String)>,
        /// What comes then.
        then: Then,
    },
    /// Prints a file; exits 1 where there is none.
    Cat(String),
    /// Writes a file of that many zeros. What it exits with where it cannot is its own.
    WriteZeros {
        /// Where.
        path: String,
        /// How many.
        bytes: u64,
    },
    /// Prints `written\n` or `refused\n`.
    TryWrite(String),
    /// [`Flood`](runner_core::fake::backend::Flood) on a stream, then exits 0.
    Flood {
        /// Which stream.
        stream: LogStream,
        /// How much.
        bytes: u64,
        /// In which form.
        binary: bool,
    },
    /// Text floods on standard output and standard error at the same time where the backend can, then exits 0.
    FloodBoth {
        /// How much on each.
        bytes: u64,
    },
    /// Takes that much memory and uses it.
    TakeMemory(u64),
    /// Starts that many processes that live at the same time; prints `forked\n` or `refused\n`.
    Fork(u32),
    /// Prints its environment, a `NAME=VALUE` line each.
    Environment,
    /// Prints `UID GID\n`.
    WhoAmI,
    /// Prints its working directory and a newline.
    WorkingDir,
    /// Prints the names of the network interfaces that it sees, a line each.
    Interfaces,
    /// Prints what it reads from standard input until it ends; exits 0.
    EchoStdin,
    /// Prints `ROWS COLUMNS\n` of its terminal, waits for another size, prints that; exits 0.
    TerminalSize,
}

/// What a program does in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// Exits with the code.
    Exit(i32),
    /// Sleeps for ever; SIGTERM ends it.
    Sleep,
}

impl Program {
    /// Exits with the code and prints nothing.
    pub fn exit(code: i32) -> Self {
        Self::Print { out: String::new(), err: String::new(), exit: code }
    }
}
