//! The Docker backend passes the conformance suite of the `Backend` trait on a real engine.

runner_tests::backend_conformance!("dind", runner_tests::backend::dind::make);
