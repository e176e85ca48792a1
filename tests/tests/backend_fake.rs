//! The backend in memory passes the conformance suite of the `Backend` trait.

runner_tests::backend_conformance!("fake", runner_tests::backend::fake::make);
