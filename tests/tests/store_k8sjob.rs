//! The object store fails while a run on a cluster needs it. The pods have no way to the store: what passes by delays the run all the
//! same, and what does not ends it as `INPUT` with the store's own words.

use runner_tests::{ill_store, scene::On};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_answers_503_for_a_while_delays_a_run_and_fails_nothing() {
    ill_store::busy(On::K8sJob).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_does_not_answer_for_a_while_delays_a_run_and_fails_nothing() {
    ill_store::silent(On::K8sJob).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_input_that_the_store_does_not_give_ends_the_run_as_input_before_its_program() {
    ill_store::input_refused(On::K8sJob).await;
}
