//! The shim as it goes into containers: linked statically, so that it needs nothing of an image.

use std::fs;

use anyhow::{Context as _, Result};

use crate::process;

/// Builds `runner-agent-static` into the target's folder, beside the service's program.
///
/// # Errors
/// Where it cannot be built. A C library for static linking (`libc6-dev`) is needed.
pub(crate) fn run(release: bool) -> Result<()> {
    let profile = if release { "release" } else { "debug" };
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    // A folder of its own: other flags would build everything else anew.
    let target = process::target()?.join("static");
    let mut cargo = process::cargo()?;
    cargo.args(["build", "--package", "runner-agent", "--bin", "runner-agent", "--no-default-features"]);
    cargo.args(["--target", &triple, "--target-dir"]).arg(&target);
    if release {
        cargo.arg("--release");
    }
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols -C opt-level=s");
    process::run(&mut cargo)?;
    let built = target.join(triple).join(profile).join("runner-agent");
    let folder = process::target()?.join(profile);
    fs::create_dir_all(&folder)?;
    let place = folder.join("runner-agent-static");
    // Over one that runs: a name of its own first, and of this process's own, since tests of two packages may be here at once.
    let aside = folder.join(format!(".runner-agent-static.{}", std::process::id()));
    fs::copy(&built, &aside).with_context(|| format!("copy {}", built.display()))?;
    fs::rename(&aside, &place)?;
    process::say(&format!("{}", place.display()));
    Ok(())
}
