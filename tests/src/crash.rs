//! `kill -9` of the service at every named crash point of a run's life, and at other bad moments: the suite, for each backend.
//!
//! After a restart: no accepted run is lost, it has one terminal state and had one workload, its log is exact to the byte,
//! its outputs are right, and nothing is left behind.

use std::{fs, os::unix::process::ExitStatusExt as _, time::Duration};

use runner_core::fake::backend::Flood;
use worker_client::{Client, RunHandle, RunOptions, RunSpec, TransferOptions, proto};

use crate::{
    proc,
    scene::{On, Scene},
    service::{Watched, eventually, watch, watch_for, within},
    witness::Witness,
};

const SIGKILL: i32 = 9;
/// More than one segment of the stored log.
const FLOOD_BYTES: usize = 9 * 1024 * 1024;
const INPUT: &[u8] = b"what the input says\n";

/// A run with an input, an output and both streams.
fn busy(witness: &Witness, input: &str) -> RunSpec {
    let script = format!(
        "cat /inputs/data > /outputs/copy
        echo begin; echo problems >&2
        seq 1 999999999 2>/dev/null | head -c {FLOOD_BYTES}
        sleep 0.3
        echo end"
    );
    witness.script(&script).input("/inputs/data", input).output("/outputs/copy")
}

/// A run that only a cancel ends.
fn endless(witness: &Witness) -> RunSpec {
    witness.script("echo ready; exec sleep 100000").stop_grace(Duration::from_secs(2))
}

fn expected_out() -> Vec<u8> {
    [b"begin\n".to_vec(), Flood::new(false).take(FLOOD_BYTES), b"end\n".to_vec()].concat()
}

async fn upload(client: &Client) -> String {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(file.path(), INPUT).expect("write the input");
    client.upload_file(file.path(), TransferOptions::default()).await.expect("upload the input").uri
}

async fn run_with_key(client: &Client, spec: &RunSpec) -> Result<RunHandle, worker_client::ClientError> {
    let options = RunOptions { run_id: None, idempotency_key: Some("the one run".into()) };
    client.run_with(spec.clone(), options).await
}

fn assert_killed(status: std::process::ExitStatus, point: &str) {
    assert_eq!(status.signal(), Some(SIGKILL), "the service was to die at {point}: {status}");
}

/// States never go back, and each is told once.
fn assert_one_life(watched: &Watched, end: proto::RunState) {
    let numbers: Vec<i32> = watched.states.iter().map(|(state, _)| *state as i32).collect();
    assert!(numbers.is_sorted_by(|a, b| a < b), "{:?}", watched.states);
    assert_eq!(watched.end().state, end, "{:?}", watched.end());
    assert_eq!(watched.end().outcome.attempt, 1);
    assert!(watched.states.iter().all(|(_, attempt)| *attempt <= 1), "{:?}", watched.states);
}

async fn assert_the_only_run(client: &Client, id: &str) {
    let listed = client.list_page(proto::ListRequest::default()).await.expect("list");
    let ids: Vec<&str> = listed.runs.iter().map(|run| run.run_id.as_str()).collect();
    assert_eq!(ids, [id]);
}

async fn assert_outputs(client: &Client, watched: &Watched) {
    let manifest = watched.end().outputs().expect("outputs");
    assert!(!manifest.partial);
    let dir = tempfile::tempdir().expect("a temporary directory");
    let taken = client.download_outputs(manifest, dir.path(), TransferOptions::default()).await;
    assert_eq!(taken.expect("download the outputs").len(), 1);
    assert_eq!(fs::read(dir.path().join("outputs/copy")).expect("the output"), INPUT);
}

/// Dies at `point` in the life of a run that would succeed; it succeeds nevertheless.
///
/// # Panics
/// Where that does not hold.
pub async fn survives(on: On, point: &str) {
    let Some(mut scene) = Scene::start(on, point).await else { return };
    let Scene { service, witness, .. } = &mut scene;
    let input = upload(&service.client()).await;
    service.kill();
    service.restart(&[("RUNNER_CRASH_AT", point)]).await;
    let spec = busy(witness, &input);
    // The service may die before it answers, or right after.
    let answered = run_with_key(&service.client(), &spec).await.map(|handle| handle.id().to_owned()).ok();
    assert_killed(service.ended().await, point);
    service.restart(&[]).await;
    let client = service.client();
    let handle = run_with_key(&client, &spec).await.expect("repeat the call");
    if let Some(id) = answered {
        assert_eq!((id.as_str(), handle.created()), (handle.id(), false), "an accepted run is not lost");
    }
    let id = handle.id();
    let watched = watch(&client, id, "").await;
    assert_one_life(&watched, proto::RunState::Succeeded);
    assert_eq!(watched.end().exit_code(), Some(0));
    assert!(watched.out == expected_out(), "standard output differs: {} bytes", watched.out.len());
    assert_eq!(String::from_utf8_lossy(&watched.err), "problems\n");
    assert_eq!(watched.dropped, 0);
    assert_outputs(&client, &watched).await;
    witness.assert_one_start(id).await;
    assert_the_only_run(&client, id).await;
    scene.assert_clean(&[id]).await;
    // The same after one more crash.
    scene.service.kill();
    scene.service.restart(&[]).await;
    let again = watch(&scene.service.client(), id, "").await;
    assert_eq!((again.states, again.end), (watched.states, watched.end));
    assert!(again.out == watched.out && again.err == watched.err, "the stored log differs");
    scene.witness.assert_one_start(id).await;
}

/// Dies at `point` in a cancel; the run is cancelled nevertheless. `durable`: without asking again.
///
/// # Panics
/// Where that does not hold.
pub async fn survives_in_cancel(on: On, point: &str, durable: bool) {
    let Some(mut scene) = Scene::prepare(on, point).await else { return };
    let Scene { service, witness, .. } = &mut scene;
    service.restart(&[("RUNNER_CRASH_AT", point)]).await;
    let spec = endless(witness);
    let client = service.client();
    let handle = run_with_key(&client, &spec).await.expect("run");
    let id = handle.id();
    watch_for(&client, id, "ready").await;
    let answered = client.cancel(id, "enough").await.is_ok();
    assert_killed(service.ended().await, point);
    service.restart(&[]).await;
    let client = service.client();
    if !durable {
        assert!(!answered, "cancel answered before its intent was stored");
        let run = client.get(id).await.expect("get");
        assert_eq!((run.state(), run.cancel_requested), (proto::RunState::Running, false));
        client.cancel(id, "enough").await.expect("cancel again");
    }
    let watched = watch(&client, id, "").await;
    assert_one_life(&watched, proto::RunState::Cancelled);
    assert_eq!(watched.end().cause(), proto::Cause::Cancelled);
    assert_eq!(String::from_utf8_lossy(&watched.out), "ready\n", "the log is kept");
    witness.assert_one_start(id).await;
    assert_the_only_run(&client, id).await;
    scene.assert_clean(&[id]).await;
}

/// Kills the service again and again while a program writes 64 MiB.
///
/// # Panics
/// Where that does not hold.
pub async fn crashes_in_the_middle_of_a_long_log_lose_no_byte(on: On) {
    const BYTES: usize = 64 * 1024 * 1024;
    let Some(mut scene) = Scene::start(on, "a long log").await else { return };
    let service = &mut scene.service;
    // In pieces with pauses, so that the program outlives the crashes.
    let script = format!(
        "seq 1 999999999 2>/dev/null | head -c {BYTES} | \
         while head -c 4194304 > /tmp/piece && [ -s /tmp/piece ]; do cat /tmp/piece; sleep 0.2; done"
    );
    let handle = service.client().run(RunSpec::command(["sh", "-c", &script])).await.expect("run");
    let id = handle.id();
    for _ in 0..3 {
        let before = log_bytes(&service.client(), id).await;
        let client = service.client();
        eventually("more of the log", async || {
            (log_bytes(&client, id).await > before + 1_000_000).then_some(())
        })
        .await;
        service.kill();
        service.restart(&[]).await;
    }
    let client = service.client();
    let watched = watch(&client, id, "").await;
    assert_eq!(watched.end().exit_code(), Some(0), "{:?}", watched.end());
    assert!(watched.out == Flood::new(false).take(BYTES), "the log differs: {} bytes", watched.out.len());
    scene.assert_clean(&[id]).await;
}

/// Offset of the end of what a watcher sees now.
async fn log_bytes(client: &Client, id: &str) -> u64 {
    let options = worker_client::StreamOptions::default().without_following();
    let mut events = client.stream(id, options);
    let mut end = 0;
    while let Some(event) = within("the next event", events.next()).await {
        if let worker_client::Event::Log(frame) = event.expect("the stream goes on").event {
            end = frame.offset + frame.data.len() as u64;
        }
    }
    end
}

/// A stream that a caller follows goes on over crashes, without a gap or a repeat.
///
/// # Panics
/// Where that does not hold.
pub async fn a_watcher_sees_a_whole_log_over_crashes(on: On) {
    let Some(mut scene) = Scene::start(on, "a watcher").await else { return };
    let service = &mut scene.service;
    let client = service.patient_client();
    let script = "i=0; while [ $i -lt 100 ]; do echo $i; i=$((i+1)); sleep 0.05; done";
    let handle = client.run(RunSpec::command(["sh", "-c", script])).await.expect("run");
    let id = handle.id().to_owned();
    let crashes = async {
        for line in ["10\n", "40\n", "70\n"] {
            watch_for(&service.client(), &id, line).await;
            service.kill();
            service.restart(&[]).await;
        }
    };
    let (watched, ()) = futures::future::join(watch(&client, &id, ""), crashes).await;
    let expected: String = (0..100).map(|number| format!("{number}\n")).collect();
    assert_eq!(String::from_utf8_lossy(&watched.out), expected);
    assert_one_life(&watched, proto::RunState::Succeeded);
    scene.assert_clean(&[&id]).await;
}

/// What ran out while the service was away still ends at its own timeout, told as such.
///
/// # Panics
/// Where that does not hold.
pub async fn a_timeout_counts_while_the_service_is_away(on: On) {
    let Some(mut scene) = Scene::start(on, "a timeout").await else { return };
    let service = &mut scene.service;
    let spec =
        RunSpec::command(["sh", "-c", "echo ready; exec sleep 100000"]).timeout(Duration::from_secs(2));
    let handle = service.client().run(spec).await.expect("run");
    let id = handle.id();
    watch_for(&service.client(), id, "ready").await;
    service.kill();
    eventually("the end of the program", async || {
        proc::with_environment("RUNNER_RUN_ID", id).is_empty().then_some(())
    })
    .await;
    service.restart(&[]).await;
    let watched = watch(&service.client(), id, "").await;
    assert_eq!(
        (watched.end().state, watched.end().cause()),
        (proto::RunState::Failed, proto::Cause::TimedOut)
    );
    scene.assert_clean(&[id]).await;
}

/// Workloads live on over an ordinary restart too, and the shutdown is bounded.
///
/// # Panics
/// Where that does not hold.
pub async fn a_polite_restart_keeps_what_runs(on: On) {
    let Some(mut scene) = Scene::start(on, "a polite restart").await else { return };
    let Scene { service, witness, .. } = &mut scene;
    let spec = witness.script("echo ready; sleep 3; echo done; exit 5");
    let handle = service.client().run(spec).await.expect("run");
    let id = handle.id();
    watch_for(&service.client(), id, "ready").await;
    service.terminate();
    let status = service.ended().await;
    assert_eq!(status.code(), Some(0), "an ordinary end: {status}\n{}", service.log());
    service.restart(&[]).await;
    let watched = watch(&service.client(), id, "").await;
    assert_eq!(watched.end().exit_code(), Some(5), "{:?}", watched.end());
    assert_eq!(String::from_utf8_lossy(&watched.out), "ready\ndone\n");
    witness.assert_one_start(id).await;
    scene.assert_clean(&[id]).await;
}

/// Who sits at a terminal goes on where they were.
///
/// # Panics
/// Where that does not hold.
pub async fn a_terminal_takes_input_and_a_new_size_after_a_crash(on: On) {
    let Some(mut scene) = Scene::start(on, "a terminal").await else { return };
    let service = &mut scene.service;
    let script = "stty size; read line; echo got $line; read line; stty size; echo got $line";
    let spec = RunSpec::command(["sh", "-c", script]).terminal(90, 30);
    let handle = service.client().run(spec).await.expect("run");
    let id = handle.id();
    watch_for(&service.client(), id, "30 90").await;
    let attachment = handle.attach().await.expect("attach");
    attachment.input().stdin("before\n").await.expect("input");
    watch_for(&service.client(), id, "got before").await;
    drop(attachment);
    service.kill();
    service.restart(&[]).await;
    let client = service.client();
    // Until the run is adopted nobody takes its input.
    let attachment = eventually("an attachment", async || client.attach(id).await.ok()).await;
    attachment.input().resize(100, 40).await.expect("resize");
    attachment.input().stdin("after\n").await.expect("input");
    let watched = watch(&client, id, "").await;
    let shown = String::from_utf8_lossy(&watched.out).replace('\r', "");
    assert!(shown.contains("40 100\n") && shown.contains("got after\n"), "{shown}");
    assert_one_life(&watched, proto::RunState::Succeeded);
    assert!(watched.err.is_empty());
    scene.assert_clean(&[id]).await;
}

/// The crash suite on a backend: a test for every crash point, and the stories.
#[macro_export]
macro_rules! crash_suite {
    ($on:expr) => {
        $crate::crash_suite! {
            @ $on,
            survives {
                a_crash_before_accepting_loses_nothing = "run.before-accept",
                a_crash_after_accepting_loses_nothing = "run.accepted",
                a_crash_before_preparing_loses_nothing = "attempt.before-preparing",
                a_crash_while_preparing_loses_nothing = "attempt.preparing",
                a_crash_after_the_workload_was_made_loses_nothing = "attempt.ensured",
                a_crash_before_running_is_stored_loses_nothing = "attempt.before-running",
                a_crash_while_running_loses_nothing = "attempt.running",
                a_crash_after_a_piece_of_the_log_loses_nothing = "log.appended",
                a_crash_after_a_stored_segment_loses_nothing = "log.segment-stored",
                a_crash_after_the_exit_loses_nothing = "attempt.exited",
                a_crash_while_publishing_loses_nothing = "attempt.publishing",
                a_crash_after_a_stored_output_loses_nothing = "outputs.file-stored",
                a_crash_after_the_manifest_loses_nothing = "outputs.manifest-stored",
                a_crash_after_publishing_loses_nothing = "attempt.published",
                a_crash_after_the_log_was_sealed_loses_nothing = "log.sealed",
                a_crash_before_the_terminal_state_loses_nothing = "run.before-terminal",
                a_crash_after_the_terminal_state_loses_nothing = "run.terminal",
                a_crash_after_the_removal_loses_nothing = "workload.removed",
            }
            cancels {
                a_crash_before_the_intent_to_cancel_changes_nothing = "cancel.before-intent" false,
                a_crash_after_the_intent_to_cancel_cancels = "cancel.intent" true,
                a_crash_after_the_workload_was_stopped_cancels = "cancel.stopped" true,
            }
            stories {
                crashes_in_the_middle_of_a_long_log_lose_no_byte,
                a_watcher_sees_a_whole_log_over_crashes,
                a_timeout_counts_while_the_service_is_away,
                a_polite_restart_keeps_what_runs,
                a_terminal_takes_input_and_a_new_size_after_a_crash,
            }
        }
    };
    (
        @ $on:expr,
        survives { $($name:ident = $point:literal,)* }
        cancels { $($cancel:ident = $cancel_point:literal $durable:literal,)* }
        stories { $($story:ident,)* }
    ) => {
        #[test]
        fn every_crash_point_has_its_test() {
            assert_eq!(runner_core::crash::POINTS, [$($point,)* $($cancel_point,)*]);
        }
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                $crate::crash::survives($on, $point).await;
            }
        )*
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $cancel() {
                $crate::crash::survives_in_cancel($on, $cancel_point, $durable).await;
            }
        )*
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $story() {
                $crate::crash::$story($on).await;
            }
        )*
    };
}
