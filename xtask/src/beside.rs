//! Work that goes on while tests wait: they do that most of the time.

use std::{
    process::{Command, Stdio},
    thread::JoinHandle,
};

use anyhow::{Context as _, Result, bail};

use crate::process;

/// Commands of this program, one after the other, each at the lowest priority. What they say is shown where they fail.
#[derive(Debug)]
pub(crate) struct Beside(JoinHandle<Result<()>>);

impl Beside {
    /// Starts the first. This program has to be in the target's folder, under its own name.
    ///
    /// # Errors
    /// Where there is no such folder.
    pub(crate) fn start(commands: Vec<Vec<&'static str>>) -> Result<Self> {
        // By its place: the one that runs may have been built anew, and be no file any more.
        let program = process::target()?.join("debug/xtask");
        let all = move || {
            for words in commands {
                let mut command = Command::new("nice");
                command.args(["-n", "19"]).arg(&program).args(&words).stdin(Stdio::null());
                command.current_dir(process::root()?);
                let what = format!("cargo xtask {}", words.join(" "));
                let (output, seconds) = process::timed(|| command.output());
                let output = output.with_context(|| format!("start {what}"))?;
                process::say(&format!("  {seconds} s beside the tests: {what}"));
                if !output.status.success() {
                    process::say(&String::from_utf8_lossy(&output.stdout));
                    process::say(&String::from_utf8_lossy(&output.stderr));
                    bail!("{what} failed: {}", output.status);
                }
            }
            Ok(())
        };
        Ok(Self(std::thread::spawn(all)))
    }

    /// Waits for the last.
    ///
    /// # Errors
    /// What the first that failed says; those after it were not started.
    pub(crate) fn wait(self) -> Result<()> {
        self.0.join().unwrap_or_else(|_| bail!("the work beside the tests panicked"))
    }
}
