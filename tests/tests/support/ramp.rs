//! Traffic that moves from one backend to another under load.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use runner_tests::service::{Service, eventually};
use worker_client::{RunSpec, proto};

use super::{
    ctl::{ok_in, words},
    two::{Other, Two, start},
};

/// Callers that run one no-op after the other, and remember how each was accepted.
struct Load {
    stop: Arc<AtomicBool>,
    accepted: Arc<Mutex<Vec<proto::Run>>>,
    callers: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    fn start(service: &Service, callers: usize) -> Self {
        let (stop, accepted) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let caller = || {
            let (client, stop, accepted) =
                (service.patient_client(), Arc::clone(&stop), Arc::clone(&accepted));
            #[allow(clippy::disallowed_methods, reason = "a test's own tasks")]
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let run = client.run(RunSpec::command(["true"])).await.expect("accepted");
                    accepted.lock().expect("no caller panicked").push(run.run().clone());
                    run.wait().await.expect("its end");
                }
            })
        };
        Self { callers: (0..callers).map(|_| caller()).collect(), stop, accepted }
    }

    /// Waits until each of these backends has got another run.
    async fn reaches(&self, backends: &[&str]) {
        let count = |backend: &str| {
            let accepted = self.accepted.lock().expect("no caller panicked");
            accepted.iter().filter(|run| run.backend == backend).count()
        };
        let before: Vec<_> = backends.iter().map(|backend| count(backend)).collect();
        eventually("runs on the backends", async || {
            backends.iter().zip(&before).all(|(backend, before)| count(backend) > *before).then_some(())
        })
        .await;
    }

    /// Waits for the end of every run that was begun.
    async fn stop(self) -> Vec<proto::Run> {
        self.stop.store(true, Ordering::Relaxed);
        for caller in self.callers {
            caller.await.expect("a caller that was never refused");
        }
        std::mem::take(&mut self.accepted.lock().expect("no caller panicked"))
    }
}

/// A ramp up to the end and back under load, with the service killed in the middle: no run changes backends, none is lost, and what
/// is stored of each adds up.
///
/// # Panics
/// Where that does not hold.
pub async fn ramps_up_and_down(other: Other) {
    let Some(Two { mut service, kubeconfig: _kept, .. }) = start(other, "a ramp").await else { return };
    let client = service.patient_client();
    let change = |change| {
        let request = proto::ChangeTrafficRequest {
            reason: "a test".to_owned(),
            expected_version: None,
            change: Some(change),
        };
        client.change_traffic(request)
    };
    let policy =
        r#"{"default":{"split":{"baseline":"dind","canaries":[{"backend":"cluster","percent":0}]}}}"#;
    change(proto::change_traffic_request::Change::SetPolicy(policy.to_owned()))
        .await
        .expect("set the policy");
    let load = Load::start(&service, 4);
    load.reaches(&["dind"]).await;
    let step = |percent: u32, millis: u64| proto::RampStep {
        share: percent * 100,
        hold: Some(worker_client::convert::duration_to_proto(Duration::from_millis(millis))),
    };
    let steps = vec![step(10, 1000), step(50, 3000), step(100, 1000)];
    let ramp = proto::StartRamp { rule: String::new(), backend: "cluster".to_owned(), steps };
    change(proto::change_traffic_request::Change::StartRamp(ramp)).await.expect("start the ramp");
    let at = async |step: u32| {
        eventually("the ramp's step", async || {
            let ramp = client.traffic().await.ok()?.ramp?;
            (ramp.step >= step).then_some(())
        })
        .await;
    };
    at(2).await;
    service.kill();
    service.restart(&[]).await;
    at(3).await;
    load.reaches(&["cluster"]).await;
    change(proto::change_traffic_request::Change::Rollback(proto::Rollback::default()))
        .await
        .expect("roll back");
    load.reaches(&["dind"]).await;
    let accepted = load.stop().await;
    let ids: BTreeSet<&str> = accepted.iter().map(|run| run.run_id.as_str()).collect();
    assert_eq!(ids.len(), accepted.len(), "no run is two");
    // What each version said, from the audit log.
    let versions: BTreeMap<u64, String> = client
        .audit(0, 1000)
        .await
        .expect("the audit log")
        .into_iter()
        .map(|entry| (entry.version, entry.what))
        .collect();
    let mut by_backend: BTreeMap<String, u32> = BTreeMap::new();
    for before in &accepted {
        let run = client.get(before.run_id.as_str()).await.expect("the run is there");
        assert_eq!(
            (&run.backend, &run.decision),
            (&before.backend, &before.decision),
            "no run changes backends"
        );
        assert_eq!(run.state(), proto::RunState::Succeeded, "{run:?}");
        let decision = run.decision.expect("what decided");
        let bucket = decision.bucket.expect("its bucket");
        let said = &versions[&decision.version];
        let share = if said.contains("running") || said.contains("finished") {
            let percent = said.split(", ").nth(1).and_then(|part| part.strip_suffix(" %")).expect("a share");
            percent.parse::<u32>().expect("a number") * 100
        } else {
            0
        };
        let (first, other) = if bucket < share { ("cluster", "dind") } else { ("dind", "cluster") };
        // On a machine that is busy enough an engine may not answer for a while.
        let expected =
            if decision.passed_over.iter().any(|backend| backend == first) { other } else { first };
        assert_eq!(run.backend, expected, "bucket {bucket}, version {}: {said}", decision.version);
        *by_backend.entry(run.backend).or_default() += 1;
    }
    assert_eq!(by_backend.len(), 2, "{by_backend:?}");
    super::say(&format!("{by_backend:?}"));
    service.assert_clean(&ids.into_iter().collect::<Vec<_>>()).await;
}

/// A drain of `dind` under load: it answers when that is empty, and no run is refused.
///
/// # Panics
/// Where that does not hold.
pub async fn drains(other: Other) {
    let Some(Two { service, kubeconfig: _kept, .. }) = start(other, "a drain").await else { return };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let policy = "default: { split: { baseline: dind, canaries: [ { backend: cluster, percent: 50 } ] } }\n";
    fs::write(dir.path().join("p.yaml"), policy).expect("write the policy");
    ok_in(&service, dir.path(), &words("traffic set p.yaml --reason test"));
    let load = Load::start(&service, 4);
    load.reaches(&["dind", "cluster"]).await;
    let client = service.client();
    ok_in(&service, dir.path(), &words("backend drain dind --wait --reason test"));
    let backends = client.backends().await.expect("the backends");
    let dind = backends.iter().find(|backend| backend.name == "dind").expect("dind");
    assert_eq!((dind.live_runs, dind.drained.is_some()), (0, true), "it is empty, under load");
    // The callers go on meanwhile, and each of their runs is accepted.
    load.reaches(&["cluster"]).await;
    load.stop().await;
}
