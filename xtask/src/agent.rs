//! The agent as it goes into containers: linked statically, so that it needs nothing of an image.

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
    let profile = if release { "release" } else { "debug" };
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    // A folder of its own: other flags would build everything else anew.
    let target = process::target()?.join("static");
    let mut cargo = process::cargo()?;
    cargo.args(["build", "--package", "runner-agent", "--bin", "runner-agent"]).args(roles.features());
    cargo.args(["--target", &triple, "--target-dir"]).arg(&target);
    if release {
        cargo.arg("--release");
    }
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols -C opt-level=s");
    process::run(&mut cargo)?;
    let built = target.join(triple).join(profile).join("runner-agent");
    let folder = folder(release)?;
    fs::create_dir_all(&folder)?;
    let place = folder.join(roles.name());
    // Over one that runs: a name of its own first, and of this process's own, since tests of two packages may be here at once.
    let aside = folder.join(format!(".{}.{}", roles.name(), std::process::id()));
    fs::copy(&built, &aside).with_context(|| format!("copy {}", built.display()))?;
    fs::rename(&aside, &place)?;
    process::say(&format!("{}", place.display()));
    Ok(place)
}
