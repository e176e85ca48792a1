//! The local backend passes the conformance suite of the `Backend` trait.

runner_tests::backend_conformance!("local", runner_tests::backend::local::make);
