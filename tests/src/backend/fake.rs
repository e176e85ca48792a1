//! The harness of the backend in memory.

use std::sync::Arc;

use async_trait::async_trait;
use runner_core::{
    backend::Backend,
    fake::backend::{FakeBackend, FakeSubstrate},
    id::AttemptId,
    log::LogStream,
    spec::RunSpec,
};

use super::{
    Harness, Missing,
    program::{Program, Then},
};

const FOREIGN: &str = "not-ours";

/// The harness of the backend in memory.
#[derive(Debug)]
pub struct FakeHarness {
    substrate: FakeSubstrate,
    backend: Arc<FakeBackend>,
}

fn open(substrate: &FakeSubstrate) -> Arc<FakeBackend> {
    Arc::new(FakeBackend::over("fake".parse().expect("a valid name"), substrate.clone()))
}

/// A fake on a substrate of its own.
///
/// # Errors
/// Never: it needs nothing of the machine.
pub async fn make() -> Result<Box<dyn Harness>, Missing> {
    let substrate = FakeSubstrate::new();
    Ok(Box::new(FakeHarness { backend: open(&substrate), substrate }))
}

#[async_trait]
impl Harness for FakeHarness {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::clone(&self.backend) as Arc<dyn Backend>
    }

    async fn reopen(&mut self) {
        self.backend = open(&self.substrate);
    }

    fn spec(&self, program: &Program) -> RunSpec {
        RunSpec { command: script(program), ..RunSpec::default() }
    }

    fn processes(&self, attempt: AttemptId) -> Vec<String> {
        (0..self.substrate.processes(attempt)).map(|number| format!("{attempt} process {number}")).collect()
    }

    fn starts(&self, attempt: AttemptId) -> Option<u32> {
        Some(self.substrate.starts(attempt))
    }

    fn added_environment(&self) -> Vec<(&'static str, Option<&'static str>)> {
        Vec::new()
    }

    fn plant_foreign(&self) {
        self.substrate.plant_foreign(FOREIGN);
    }

    fn foreign_is_intact(&self) -> bool {
        self.substrate.foreign() == [FOREIGN]
    }

    fn leaks(&self) -> Vec<String> {
        self.substrate.natives()
    }
}

/// The program in the fake's language.
fn script(program: &Program) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    let mut say = |statement: &[&str]| {
        words.extend(statement.iter().map(|word| (*word).to_owned()));
        words.push(";".to_owned());
    };
    let ready = ["print", "out", "ready\n"];
    match program {
        Program::Print { out, err, exit } => {
            if !out.is_empty() {
                say(&["print", "out", out]);
            }
            if !err.is_empty() {
                say(&["print", "err", err]);
            }
            say(&["exit", &exit.to_string()]);
        }
        Program::Signal(signal) => say(&["signal", &signal.to_string()]),
        Program::NotFound => say(&["no-such-program"]),
        Program::NotExecutable => say(&["not-executable"]),
        Program::SleepForever => {
            say(&ready);
            say(&["sleep-until-stopped"]);
        }
        Program::HandleTerm(code) => {
            say(&["on-term", "exit", &code.to_string(), "bye\n"]);
            say(&ready);
            say(&["sleep-until-stopped"]);
        }
        Program::IgnoreTerm => {
            say(&["on-term", "ignore"]);
            say(&ready);
            say(&["sleep-until-stopped"]);
        }
        Program::Daemonize => {
            say(&["daemonize"]);
            say(&ready);
            say(&["sleep-until-stopped"]);
        }
        Program::DaemonizeAndExit(code) => {
            say(&["daemonize"]);
            say(&ready);
            say(&["exit", &code.to_string()]);
        }
        Program::Count { count, pause } => {
            for number in 0..*count {
                say(&["sleep", &pause.to_string()]);
                say(&["print", "out", &format!("{number}\n")]);
            }
        }
        Program::Write { files, then } => {
            for (path, text) in files {
                match path.strip_suffix('/') {
                    Some(directory) => say(&["mkdir", directory]),
                    None => say(&["write", path, text]),
                }
            }
            say(&ready);
            match then {
                Then::Exit(code) => say(&["exit", &code.to_string()]),
                Then::Sleep => say(&["sleep-until-stopped"]),
            }
        }
        Program::Cat(path) => say(&["cat", path]),
        Program::WriteZeros { path, bytes } => say(&["write-zeros", path, &bytes.to_string()]),
        Program::TryWrite(path) => say(&["try-write", path]),
        Program::Flood { stream, bytes, binary } => {
            let stream = if *stream == LogStream::Stderr { "err" } else { "out" };
            say(&["flood", stream, &bytes.to_string(), if *binary { "binary" } else { "text" }]);
        }
        Program::FloodBoth { bytes } => {
            for stream in ["out", "err"] {
                say(&["flood", stream, &bytes.to_string(), "text"]);
            }
        }
        Program::TakeMemory(bytes) => say(&["allocate", &bytes.to_string()]),
        Program::Fork(count) => say(&["fork", &count.to_string()]),
        Program::Environment => say(&["env"]),
        Program::WhoAmI => say(&["whoami"]),
        Program::WorkingDir => say(&["pwd"]),
        Program::Interfaces => say(&["interfaces"]),
        Program::EchoStdin => say(&["echo-stdin"]),
        Program::TerminalSize => say(&["terminal-size"]),
    }
    words
}
