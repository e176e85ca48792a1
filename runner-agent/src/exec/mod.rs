//! The shim around a program: exact exit record, ordered log frames, timeout, grace, death of the whole tree.

pub mod protocol;
