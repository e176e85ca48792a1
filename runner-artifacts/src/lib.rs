//! Objects, signed URLs and logs over an object store.

pub mod blob;
pub mod directory;
pub mod log;
pub mod object;
