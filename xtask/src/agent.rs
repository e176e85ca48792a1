//! Programs as they go into containers: linked statically, so that they need nothing of an image.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};

use crate::process;

/// Which of the agent's roles are in the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Roles {
    /// The shim alone: what the Docker backend puts into containers.
    Shim,
    /// The shim and the roles beside it: what the image for pods has.
    Pod,
}

impl Roles {
    const fn name(self) -> &'static str {
        match self {
            Self::Shim => "runner-agent-static",
            Self::Pod => "runner-agent-pod",
        }
    }

    const fn features(self) -> &'static [&'static str] {
        match self {
            Self::Shim => &["--no-default-features"],
            Self::Pod => &["--no-default-features", "--features", "pod"],
        }
    }
}

/// The folder of the programs of a profile.
///
/// # Errors
/// Where the workspace is not found.
pub(crate) fn folder(release: bool) -> Result<PathBuf> {
    Ok(process::target()?.join(if release { "release" } else { "debug" }))
}

/// Builds the program into the target's folder, beside the service's, and answers where it is.
///
/// # Errors
/// Where it cannot be built. A C library for static linking (`libc6-dev`) is needed.
pub(crate) fn run(release: bool, roles: Roles) -> Result<PathBuf> {
    let flags = [&["--package", "runner-agent", "--bin", "runner-agent"], roles.features()].concat();
    linked_statically(release, &flags, "runner-agent", roles.name())
}

/// The service, as [`run`] builds the agent.
///
/// # Errors
/// As [`run`].
pub(crate) fn service(release: bool) -> Result<PathBuf> {
    linked_statically(release, &["--package", "runner", "--bin", "runner"], "runner", "runner-static")
}

/// Builds `program` and puts it under `name` beside the service's.
fn linked_statically(release: bool, flags: &[&str], program: &str, name: &str) -> Result<PathBuf> {
    let profile = if release { "release" } else { "debug" };
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    // A folder of its own: other flags would build everything else anew.
    let target = process::target()?.join("static");
    let mut cargo = process::cargo()?;
    cargo.arg("build").args(flags);
    cargo.args(["--target", &triple, "--target-dir"]).arg(&target);
    if release {
        cargo.arg("--release");
    }
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols -C opt-level=s");
    process::run(&mut cargo)?;
    let built = target.join(triple).join(profile).join(program);
    let folder = folder(release)?;
    fs::create_dir_all(&folder)?;
    let place = folder.join(name);
    // Over one that runs: a name of its own first, and of this process's own, since tests of two packages may be here at once.
    let aside = folder.join(format!(".{name}.{}", std::process::id()));
    fs::copy(&built, &aside).with_context(|| format!("copy {}", built.display()))?;
    fs::rename(&aside, &place)?;
    process::say(&format!("{}", place.display()));
    Ok(place)
}
