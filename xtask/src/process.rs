//! Running other programs, and saying what happens.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

/// Says something to the person, on standard error.
pub(crate) fn say(text: &str) {
    // A closed standard error is no reason to fail.
    let _ = writeln!(std::io::stderr().lock(), "{}", text.trim_end());
}

/// The workspace's root.
pub(crate) fn root() -> Result<PathBuf> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    Ok(manifest.parent().context("xtask lies in the workspace")?.to_owned())
}

/// Where cargo puts what it builds.
pub(crate) fn target() -> Result<PathBuf> {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => Ok(root()?.join(dir)),
        None => Ok(root()?.join("target")),
    }
}

/// The cargo that runs us, in the workspace's root, as if a person had called it.
///
/// Without what cargo tells a program that it runs of its package: build scripts that look at it (that of `ring`) would be run
/// again, and everything above them be compiled anew, each time a person's cargo and ours take turns.
pub(crate) fn cargo() -> Result<Command> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        let of_the_package =
            |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
        if name.to_str().is_some_and(of_the_package) {
            command.env_remove(name);
        }
    }
    command.current_dir(root()?);
    Ok(command)
}

/// Does something; answers what came of it, and the seconds that it took.
pub(crate) fn timed<T>(something: impl FnOnce() -> T) -> (T, u64) {
    #[allow(clippy::disallowed_methods, reason = "xtask is above the core that has the clock")]
    let begin = std::time::Instant::now();
    let came = something();
    (came, begin.elapsed().as_secs())
}

/// Runs a command to its end and says how long that took; its failure is an error that names it.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    say(&format!("$ {}", line(command)));
    let (status, seconds) = timed(|| command.status());
    let status = status.with_context(|| format!("start {}", line(command)))?;
    // Where the time of a long check goes has to be seen in its log.
    say(&format!("  {seconds} s"));
    if !status.success() {
        bail!("{} failed: {status}", line(command));
    }
    Ok(())
}

/// Runs a command and answers its standard output.
pub(crate) fn output(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("start {}", line(command)))?;
    if !output.status.success() {
        bail!(
            "{} failed: {}: {}",
            line(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(output.stdout)
}

/// Whether a program of this name is in `PATH`.
pub(crate) fn in_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
}

fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
