//! Shadows on real backends: what a report finds, and a service that is killed between any two steps of a
//! shadow's life. With a cluster as the other backend: `cutover_k8sjob.rs`.

mod support;

use std::{fs, os::unix::process::ExitStatusExt as _, path::Path};

use runner_core::crash::SHADOW_POINTS;
use runner_tests::service::{Service, eventually, within};
use support::{
    pairs::{self, judged, script, shadow_everything},
    two::{Other, Two, start},
};
use worker_client::{Client, ErrorKind, proto, proto::parity::Verdict};

const SIGKILL: i32 = 9;

#[tokio::test(flavor = "multi_thread")]
async fn of_more_than_fifty_pairs_the_report_finds_the_three_that_differ_and_no_others() {
    pairs::the_report_finds_what_differs(Other::Local).await;
}

/// Files below a directory whose path names the run.
fn files_of(dir: &Path, run: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok) {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files_of(&path, run));
        } else if path.display().to_string().contains(run) {
            found.push(path.display().to_string());
        }
    }
    found
}

async fn dies(service: &mut Service, point: &str) {
    let status = within("the death of the service", service.ended()).await;
    assert_eq!(status.signal(), Some(SIGKILL), "the service was to die at {point}: {status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_killed_at_any_step_of_a_shadow_makes_one_and_leaves_nothing() {
    let name = "a_service_that_is_killed_at_any_step_of_a_shadow_makes_one_and_leaves_nothing";
    let Some(Two { mut service, other, .. }) = start(Other::Local, name).await else { return };
    let only_there = other.shell();
    shadow_everything(&service.client(), 2).await;
    let objects = service.data_dir().join("objects");
    let mut pairs = 0;
    for point in SHADOW_POINTS {
        let is_orphan = point.starts_with("shadow.orphan");
        service.kill();
        service.restart(&[("RUNNER_CRASH_AT", point)]).await;
        let client = service.patient_client();
        // Where its primary is to go first, the shadow is one that only a cancel ends.
        let wait = if is_orphan { format!("[ ! -e {only_there} ] || sleep 600;") } else { String::new() };
        let spec = script(&format!("mkdir /outputs/d; echo x | tee /outputs/d/f; {wait} exit 0"));
        let run = client.run(spec).await.expect("accepted");
        let id = run.id().to_owned();
        if is_orphan {
            within("its end", run.wait()).await.expect("the run ends");
            let shadow = judging(&client, &id).await;
            // The service may die before it answers.
            let _ = client.delete(id.as_str()).await;
            dies(&mut service, point).await;
            service.restart(&[]).await;
            let client = service.client();
            eventually("the primary and its shadow to be gone", async || {
                let gone = |error: worker_client::ClientError| error.kind() == ErrorKind::NotFound;
                let pair = client.parity(id.as_str()).await.err().is_some_and(gone);
                let run = client.get(id.as_str()).await.err().is_some_and(gone);
                (pair && run && files_of(&objects, &id).is_empty() && files_of(&objects, &shadow).is_empty())
                    .then_some(())
            })
            .await;
            service.assert_clean(&[&id, &shadow]).await;
            continue;
        }
        pairs += 1;
        dies(&mut service, point).await;
        service.restart(&[]).await;
        let client = service.client();
        assert_eq!(
            client.get(id.as_str()).await.expect("the run").state(),
            proto::RunState::Succeeded,
            "{point}"
        );
        let record = judged(&client, &id).await;
        assert_eq!(record.verdict(), Verdict::Agrees, "{point}: {record:#?}");
        let shadow = record.shadow.clone().expect("its shadow");
        assert_eq!(shadow.log.map(|log| log.bytes), Some(2), "its program ran once");
        let all = client.parity_page(proto::ListParityRequest::default()).await.expect("the pairs");
        assert_eq!(all.len(), pairs, "{point}");
        service.assert_clean(&[&id, &record.shadow_id]).await;
        // It goes with its primary.
        if pairs == 1 {
            client.delete(id.as_str()).await.expect("deleted");
            pairs = 0;
            assert_eq!(files_of(&objects, &record.shadow_id), [""; 0]);
        }
    }
}

/// The shadow's id, once its program runs.
async fn judging(client: &Client, id: &str) -> String {
    let shadow =
        eventually("its shadow", async || client.parity(id).await.ok().map(|record| record.shadow_id)).await;
    eventually("its shadow to run", async || {
        let backends = client.backends().await.ok()?;
        backends.iter().any(|backend| backend.name == "cluster" && backend.active_attempts > 0).then_some(())
    })
    .await;
    shadow
}
