//! The workload runner service.
fn main() {}
