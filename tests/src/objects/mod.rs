//! Real servers that object stores are tried against: S3 and the dialect of it that Google speaks, in this process; Azurite.
//!
//! The S3 server is ours above the protocol: `s3s` reads requests, checks SigV4 and writes XML; [`bucket`] keeps the objects.
//! It is strict where stores are: signatures, `If-Match`, parts of at least 5 MiB, keys without folders. Google's XML API is
//! the same dialect with a bearer token instead of a signature; the emulators that could be had speak JSON only, which
//! `object_store` does not.

pub mod azurite;
pub mod bucket;
pub mod fault;
pub mod server;

use sha2::{Digest as _, Sha256};

pub use self::{
    fault::{Action, Fault},
    server::{Dialect, StoreServer},
};

/// Whether a server that is missing fails the tests that need it: `RUNNER_REQUIRE_STORES`, a comma-separated list.
pub fn required(name: &str) -> bool {
    std::env::var("RUNNER_REQUIRE_STORES").is_ok_and(|list| list.split(',').any(|one| one.trim() == name))
}

/// The SHA-256, in hex, of so many zero bytes: whole MiB.
pub fn sha256_of_zeros(size: u64) -> String {
    let (zeros, mut hash) = (vec![0; 1 << 20], Sha256::new());
    for _ in 0..size >> 20 {
        hash.update(&zeros);
    }
    hex::encode(hash.finalize())
}
