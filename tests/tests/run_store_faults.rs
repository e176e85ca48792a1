//! The object store fails while a run needs it, as seen from the run. Beneath pods: `store_k8sjob.rs`.

use runner_tests::{
    ill_store::{self, LARGE, World, said, sh},
    objects::{Action, Fault},
    scene::On,
};
use worker_client::proto::{Cause, RunState};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_answers_503_for_a_while_delays_a_run_and_fails_nothing() {
    ill_store::busy(On::Local).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_does_not_answer_for_a_while_delays_a_run_and_fails_nothing() {
    ill_store::silent(On::Local).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_input_that_the_store_does_not_give_ends_the_run_as_input_before_its_program() {
    ill_store::input_refused(On::Local).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_output_that_the_store_refuses_ends_the_run_as_output_and_is_not_visible() {
    ill_store::output_refused(On::Local).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_input_that_is_gone_ends_the_run_as_input() {
    let Some(world) = World::start(On::Local, &[], "an input that is gone").await else { return };
    let uri = world.upload().await;
    assert_eq!(world.client().delete_artifacts(uri.as_str()).await.expect("it is deleted"), 1);
    let (id, states, end) = world.run(sh("echo never").input("/inputs/a", uri)).await;
    assert_eq!((end.cause(), end.outcome.retryable), (Cause::Input, false), "{end:?}");
    assert!(said(&end).contains("files/a"), "{end:?}");
    assert!(!states.contains(&RunState::Running), "{states:?}");
    world.assert_nothing_half(&id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_stays_full_ends_the_run_as_output_and_one_that_has_room_again_does_not() {
    let patience = [("RUNNER_OBJECT_STORE__TRIES", "2"), ("RUNNER_OBJECT_STORE__PUBLISH_PATIENCE", "2s")];
    let Some(world) = World::start(On::Local, &patience, "a full store").await else { return };
    let spec = || sh(&format!("head -c {LARGE} /dev/zero > /outputs/b")).output("/outputs/b");
    // For outputs only: a log that cannot be stored is waited for.
    let full = Fault::on("PUT", "partNumber=", Action::Status(507, "XMinioStorageFull")).at("/outputs/");
    world.bucket.fault(full.times(u32::MAX));
    let (id, _, end) = world.run(spec()).await;
    assert_eq!((end.state, end.cause()), (RunState::Failed, Cause::Output), "{end:?}");
    assert!(end.outcome.retryable && said(&end).contains("507"), "{end:?}");
    world.assert_nothing_half(&id).await;
    world.bucket.faults().clear();
    let full = Fault::on("PUT", "partNumber=", Action::Status(507, "XMinioStorageFull")).at("/outputs/");
    world.bucket.fault(full.times(3));
    let (id, _, end) = world.run(spec()).await;
    assert!(end.succeeded() && world.bucket.faults().all_struck(), "{end:?}");
    assert_eq!(world.bucket.bucket().uploads(), [""; 0]);
    world.scene.assert_clean(&[&id]).await;
}
