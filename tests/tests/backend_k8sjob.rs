//! The Kubernetes backend passes the conformance suite of the `Backend` trait on a real cluster.

runner_tests::backend_conformance!("k8sjob", runner_tests::backend::k8sjob::make);
