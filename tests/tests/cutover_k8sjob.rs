//! Moving runs from an engine to a real cluster, and back, and the proof before it.

mod support;

use support::{pairs, ramp, two::Other};

#[tokio::test(flavor = "multi_thread")]
async fn of_more_than_fifty_pairs_the_report_finds_the_three_that_differ_and_no_others() {
    pairs::the_report_finds_what_differs(Other::K8sJob).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ramp_up_and_down_under_load_loses_nothing_though_the_service_is_killed() {
    ramp::ramps_up_and_down(Other::K8sJob).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_is_drained_under_load_and_no_run_is_refused() {
    ramp::drains(Other::K8sJob).await;
}
