//! The programs of the fake: a tiny language, so that a test says what a workload does without a machine to do it.
//!
//! `command` and `args` together are statements with `;` between them:
//!
//! | statement | what it does |
//! |---|---|
//! | `print STREAM TEXT` | writes TEXT to `out` or `err` |
//! | `flood STREAM BYTES FORM` | writes BYTES bytes of [`Flood`], FORM is `text` or `binary` |
//! | `exit CODE`, `signal NUMBER` | ends; after the last statement the code is 0 |
//! | `sleep MILLIS`, `sleep-until-stopped` | waits |
//! | `on-term ignore`, `on-term exit CODE LAST-WORDS` | what SIGTERM does from now on; otherwise it ends the program |
//! | `daemonize` | leaves a process behind that no SIGTERM reaches |
//! | `write PATH TEXT`, `write-zeros PATH BYTES`, `mkdir PATH` | writes below an output or `/tmp`; elsewhere it exits 1 |
//! | `try-write PATH` | prints `written` or `refused` |
//! | `cat PATH` | prints a file; exits 1 where there is none |
//! | `allocate BYTES` | is killed where that is above the memory limit |
//! | `fork COUNT` | prints `forked`, or `refused` where that is above the limit on processes |
//! | `env`, `whoami`, `pwd`, `interfaces` | prints `NAME=VALUE` lines; `UID GID`; the directory; the network interfaces |
//! | `echo-stdin` | prints what it reads, until the end of input |
//! | `terminal-size` | prints `ROWS COLUMNS`, waits for another size, prints that |
//!
//! Anything else exits 127, as from a shell; `not-executable` exits 126.

use crate::{log::LogStream, spec::RunSpec};

/// A statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Statement {
    Print { err: bool, text: String },
    Flood { err: bool, bytes: u64, binary: bool },
    Exit(i32),
    Signal(i32),
    Sleep(u64),
    SleepUntilStopped,
    OnTerm(OnTerm),
    Daemonize,
    Write { path: String, text: String },
    WriteZeros { path: String, bytes: u64 },
    MakeDir { path: String },
    TryWrite { path: String },
    Cat { path: String },
    Allocate(u64),
    Fork(u32),
    Env,
    WhoAmI,
    WorkingDir,
    Interfaces,
    EchoStdin,
    TerminalSize,
}

/// What SIGTERM does.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) enum OnTerm {
    #[default]
    Die,
    Ignore,
    Exit {
        code: i32,
        words: String,
    },
}

/// Reads the program of a spec. `Err` is the exit code of a program that cannot be executed.
pub(super) fn parse(spec: &RunSpec) -> Result<Vec<Statement>, i32> {
    let words: Vec<&str> = spec.command.iter().chain(&spec.args).map(String::as_str).collect();
    words.split(|word| *word == ";").filter(|words| !words.is_empty()).map(statement).collect()
}

fn statement(words: &[&str]) -> Result<Statement, i32> {
    const NOT_FOUND: i32 = 127;
    fn number<T: std::str::FromStr>(text: &str) -> Result<T, i32> {
        text.parse().map_err(|_| NOT_FOUND)
    }
    let stream = |text: &str| match text {
        "out" => Ok(false),
        "err" => Ok(true),
        _ => Err(NOT_FOUND),
    };
    let path = |text: &str| text.to_owned();
    Ok(match *words {
        ["print", to, text] => Statement::Print { err: stream(to)?, text: text.to_owned() },
        ["flood", to, bytes, form] => {
            Statement::Flood { err: stream(to)?, bytes: number(bytes)?, binary: form == "binary" }
        }
        ["exit", code] => Statement::Exit(number(code)?),
        ["signal", signal] => Statement::Signal(number(signal)?),
        ["sleep", millis] => Statement::Sleep(number(millis)?),
        ["sleep-until-stopped"] => Statement::SleepUntilStopped,
        ["on-term", "ignore"] => Statement::OnTerm(OnTerm::Ignore),
        ["on-term", "exit", code, words] => {
            Statement::OnTerm(OnTerm::Exit { code: number(code)?, words: words.to_owned() })
        }
        ["daemonize"] => Statement::Daemonize,
        ["write", at, text] => Statement::Write { path: path(at), text: text.to_owned() },
        ["write-zeros", at, bytes] => Statement::WriteZeros { path: path(at), bytes: number(bytes)? },
        ["mkdir", at] => Statement::MakeDir { path: path(at) },
        ["try-write", at] => Statement::TryWrite { path: path(at) },
        ["cat", at] => Statement::Cat { path: path(at) },
        ["allocate", bytes] => Statement::Allocate(number(bytes)?),
        ["fork", count] => Statement::Fork(number(count)?),
        ["env"] => Statement::Env,
        ["whoami"] => Statement::WhoAmI,
        ["pwd"] => Statement::WorkingDir,
        ["interfaces"] => Statement::Interfaces,
        ["echo-stdin"] => Statement::EchoStdin,
        ["terminal-size"] => Statement::TerminalSize,
        ["not-executable"] => return Err(126),
        _ => return Err(NOT_FOUND),
    })
}

/// The stream that a statement's bytes appear on.
pub(super) fn log_stream(spec: &RunSpec, err: bool) -> LogStream {
    match (spec.terminal.is_some(), err) {
        (true, _) => LogStream::Terminal,
        (false, false) => LogStream::Stdout,
        (false, true) => LogStream::Stderr,
    }
}

/// Endless bytes in which every place differs from its neighbours, so that a gap, a repeat or a swap shows: the numbers
/// from 1, each with a newline. As binary, each character is another byte: NUL, bytes that are not UTF-8, no newline.
/// The same as `seq 1 N`, or that through `tr '0-9\n' '\000\377\200\r\033\376\303(\001\302\205'`.
#[derive(Debug, Clone)]
pub struct Flood {
    next: u64,
    rest: Vec<u8>,
    binary: bool,
}

impl Flood {
    /// What the digits 0 to 9, then the newline, are in the binary form.
    pub const BINARY: [u8; 11] = [0x00, 0xff, 0x80, 0x0d, 0x1b, 0xfe, 0xc3, 0x28, 0x01, 0xc2, 0x85];

    /// From the first byte.
    pub fn new(binary: bool) -> Self {
        Self { next: 1, rest: Vec::new(), binary }
    }

    /// The next `count` bytes.
    pub fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = std::mem::take(&mut self.rest);
        while bytes.len() < count {
            let start = bytes.len();
            bytes.extend_from_slice(self.next.to_string().as_bytes());
            bytes.push(b'\n');
            self.next += 1;
            if self.binary {
                for byte in &mut bytes[start..] {
                    *byte = Self::BINARY[if *byte == b'\n' { 10 } else { usize::from(*byte - b'0') }];
                }
            }
        }
        self.rest = bytes.split_off(count);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_are_separated_and_unknown_ones_exit_127() {
        let spec = |words: &[&str]| RunSpec {
            command: words.iter().map(|word| (*word).to_owned()).collect(),
            ..RunSpec::default()
        };
        assert_eq!(
            parse(&spec(&["print", "err", "a;b", ";", "exit", "7"])),
            Ok(vec![Statement::Print { err: true, text: "a;b".into() }, Statement::Exit(7)])
        );
        assert_eq!(parse(&spec(&["no-such-program"])), Err(127));
        assert_eq!(parse(&spec(&["exit", "7", ";", "exit", "seven"])), Err(127));
        assert_eq!(parse(&spec(&["not-executable"])), Err(126));
    }

    #[test]
    fn a_flood_is_the_same_however_it_is_cut() {
        let whole = Flood::new(false).take(1000);
        let mut cut = Flood::new(false);
        let pieces: Vec<u8> = [1, 99, 0, 400, 500].iter().flat_map(|count| cut.take(*count)).collect();
        assert_eq!(whole, pieces);
        assert!(whole.starts_with(b"1\n2\n3\n"));
        assert_eq!(Flood::new(true).take(4), [0xff, 0x85, 0x80, 0x85]);
    }
}
