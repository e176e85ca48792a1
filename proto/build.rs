//! Compiles the proto files with `protox`, so that no `protoc` has to be installed.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

/// Not of the contract: neither reflected nor held to the baseline.
const INTERNAL: [&str; 1] = ["runner/agent/v1/agent.proto"];

const FILES: [&str; 3] = ["runner/v1/runner.proto", "runner/v1/artifacts.proto", "runner/v1/admin.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=runner");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let descriptors = protox::compile(FILES, ["."])?;
    // For server reflection and for the breaking-change check.
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        // Log frames and inline inputs are shared, not copied.
        .bytes(".runner.v1")
        .compile_fds(descriptors)?;
    tonic_prost_build::configure()
        .bytes(".runner.agent.v1")
        .compile_fds(protox::compile(INTERNAL, ["."])?)?;
    Ok(())
}
