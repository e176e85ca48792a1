//! The end of an attempt's workload: asked for, forced, proven; then the removal of what it left.
//!
//! The agent ends the program and says so when nothing of it is alive; the pod stays, with the log and the outputs in it. Where
//! there is no agent, the pod is what is ended: the Job is marked, the pod deleted, and the Job told to have none, so
//! that whatever comes in its place goes, too.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions, PropagationPolicy},
};
use runner_core::{
    agent::{AgentAnswer, AgentAsk, AskError},
    backend::BackendError,
    id::AttemptId,
};
use serde_json::json;

use crate::{
    backend::{REQUEST_TIMEOUT, Shared, bounded},
    error::{self, Answer},
    names::{STOPPED, STOPPED_SEEN},
    seen::{JobSeen, PodSeen},
};

/// How long an agent that runs and is not connected may take to dial.
const DIAL: Duration = Duration::from_secs(15);
/// Beyond the grace: how long a node may take to end a pod.
const POD_DEATH: Duration = Duration::from_secs(90);
/// How long everything of an attempt may take to be removed.
const REMOVAL: Duration = Duration::from_secs(90);
/// Longest text about it that a Job that is stopped keeps, in bytes.
const MAX_SEEN: usize = 1024;
const POLL: Duration = Duration::from_millis(250);
/// How often the server is asked for a pod that takes long to end, and of which the watch has no news.
const SLOW_POLL: Duration = Duration::from_secs(2);

impl Shared {
    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.config.namespace)
    }

    /// The Job, if there is one. What the watch has need not be asked for: where it is gone by now, whatever is done to it finds that.
    async fn known_job(&self, id: AttemptId) -> Result<Option<JobSeen>, BackendError> {
        match self.watch.seen(id).job {
            Some(known) => Ok(Some(known)),
            None => self.job(id).await,
        }
    }

    /// Ends the workload, and returns when it is proven dead.
    pub(crate) async fn stop(&self, id: AttemptId, grace: Duration) -> Result<(), BackendError> {
        let workload = self.workload(id);
        // Nobody makes it meanwhile: what is not there now never was.
        let job = {
            let _verbs = workload.verbs.lock().await;
            self.known_job(id).await?
        };
        let ended = match job {
            None => Ok(()),
            Some(job) => self.end(id, &job, grace).await,
        };
        self.forget(id, &workload);
        ended
    }

    async fn end(&self, id: AttemptId, job: &JobSeen, grace: Duration) -> Result<(), BackendError> {
        let begun = self.clock.monotonic();
        let mut presence = self.hub.presence(id);
        while job.stopped.is_none() {
            presence.borrow_and_update();
            match self.hub.ask(id, AgentAsk::Stop { grace }).await {
                Ok(AgentAnswer::Stopped { dead: true }) => return Ok(()),
                Ok(answer) => {
                    tracing::warn!(attempt = %id, ?answer, "an agent did not end its program; the pod is ended");
                    break;
                }
                Err(AskError::Silent) => {
                    tracing::warn!(attempt = %id, "an agent does not answer; the pod is ended");
                    break;
                }
                Err(AskError::Away) => {}
            }
            let seen = self.watch.seen(id);
            if seen.pods.iter().any(|pod| pod.is_over()) && seen.pods.iter().all(PodSeen::is_over) {
                return Ok(());
            }
            // One that runs is about to dial; one that does not run never will. Right after a start of the service nobody knows yet.
            let runs = !self.watch.is_complete()
                || seen.pod().is_some_and(|pod| pod.publish.has_begun() && !pod.publish.has_ended());
            if !runs || self.clock.monotonic().saturating_sub(begun) > DIAL {
                break;
            }
            let _ = tokio::time::timeout(POLL, presence.changed()).await;
        }
        self.end_pod(id, job, grace).await
    }

    /// Ends the pod, and keeps another from coming.
    async fn end_pod(&self, id: AttemptId, job: &JobSeen, grace: Duration) -> Result<(), BackendError> {
        let name = self.names.workload(id);
        if job.stopped.is_none() {
            let mark = self.clock.now().as_micros().to_string();
            // Before anything dies, so that the end is known for what it is.
            let there = self.what_is_there(id).await;
            let marked = json!({ "metadata": { "annotations": { STOPPED: mark, STOPPED_SEEN: there } } });
            if !self.patch_job(id, &name, marked).await? {
                return Ok(());
            }
        }
        // In this order: of a Job without parallelism the controller deletes the pods itself, with their own long grace, and a
        // kubelet that has begun to wait for one grace does not hear of a shorter one.
        let (alive, _) = self.alive(id).await?;
        for pod in &alive {
            self.delete_pod(pod, grace).await?;
        }
        if !self.patch_job(id, &name, json!({ "spec": { "parallelism": 0 } })).await? {
            return Ok(());
        }
        let begun = self.clock.monotonic();
        let mut changes = self.watch.changes(id);
        let mut pause = POLL;
        let mut told: Vec<String> = alive.into_iter().map(|pod| pod.uid).collect();
        loop {
            changes.borrow_and_update();
            // Asked of the server itself: the watch may not have the newest pod yet.
            let (alive, active) = self.alive(id).await?;
            if alive.is_empty() && active == 0 {
                return Ok(());
            }
            for pod in alive.iter().filter(|pod| !told.contains(&pod.uid)) {
                self.delete_pod(pod, grace).await?;
            }
            told = alive.iter().map(|pod| pod.uid.clone()).collect();
            if self.clock.monotonic().saturating_sub(begun) > grace.saturating_add(POD_DEATH) {
                let seen = alive.first().map(PodSeen::describe).unwrap_or_default();
                return Err(error::substrate(format!("end the pod of {id}: it is alive: {seen}")));
            }
            let _ = tokio::time::timeout(pause, changes.changed()).await;
            pause = pause.saturating_mul(2).min(SLOW_POLL);
        }
    }

    /// What is about to be ended, for people: afterwards nothing tells why it had not begun, for example.
    async fn what_is_there(&self, id: AttemptId) -> String {
        let mut text = match self.watch.seen(id).pod() {
            Some(pod) => pod.describe(),
            None => match self.refusal(&self.names.workload(id)).await {
                Some(why) => format!("there is no pod: {why}"),
                None => "there is no pod".to_owned(),
            },
        };
        text.truncate(text.floor_char_boundary(MAX_SEEN));
        text
    }

    /// Changes the Job. `false`: there is none.
    async fn patch_job(
        &self,
        id: AttemptId,
        name: &str,
        change: serde_json::Value,
    ) -> Result<bool, BackendError> {
        let (parameters, patch) = (PatchParams::default(), Patch::Merge(change));
        match tokio::time::timeout(REQUEST_TIMEOUT, self.jobs.patch(name, &parameters, &patch)).await {
            Ok(Ok(_)) => Ok(true),
            Ok(Err(error)) if error::answer(&error) == Answer::NotFound => Ok(false),
            Ok(Err(error)) => Err(error::api(format!("stop the Job of {id}"), error)),
            Err(_) => Err(error::substrate(format!("stop the Job of {id}: no answer"))),
        }
    }

    /// The pods that are not over, and how many the Job counts.
    async fn alive(&self, id: AttemptId) -> Result<(Vec<PodSeen>, i32), BackendError> {
        let selector: Vec<String> =
            self.names.labels(id).into_iter().map(|(name, value)| format!("{name}={value}")).collect();
        let parameters = ListParams::default().labels(&selector.join(","));
        let pods = bounded("list the pods", self.pods().list(&parameters)).await?;
        let alive = pods.iter().map(PodSeen::new).filter(|pod| !pod.is_over()).collect();
        let job = bounded("look for the Job", self.jobs.get_opt(&self.names.workload(id))).await?;
        let active = job.and_then(|job| job.status?.active).unwrap_or_default();
        Ok((alive, active))
    }

    async fn delete_pod(&self, pod: &PodSeen, grace: Duration) -> Result<(), BackendError> {
        let seconds = u32::try_from(grace.as_secs().max(1)).unwrap_or(u32::MAX);
        let parameters = DeleteParams {
            grace_period_seconds: Some(seconds),
            preconditions: Some(Preconditions { uid: Some(pod.uid.clone()), resource_version: None }),
            ..DeleteParams::default()
        };
        let deleted = tokio::time::timeout(REQUEST_TIMEOUT, self.pods().delete(&pod.name, &parameters)).await;
        match deleted {
            Ok(Ok(_)) => Ok(()),
            // It is gone, or another one has its name.
            Ok(Err(error)) if matches!(error::answer(&error), Answer::NotFound | Answer::Conflict) => Ok(()),
            Ok(Err(error)) => Err(error::api(format!("delete the pod {}", pod.name), error)),
            Err(_) => Err(error::substrate(format!("delete the pod {}: no answer", pod.name))),
        }
    }

    /// Removes everything that the attempt left. One that is alive is stopped first.
    pub(crate) async fn remove(&self, id: AttemptId) -> Result<(), BackendError> {
        let workload = self.workload(id);
        let removed = {
            let _verbs = workload.verbs.lock().await;
            match self.known_job(id).await? {
                None => Ok(()),
                Some(job) => self.remove_job(id, &job).await,
            }
        };
        if removed.is_ok() {
            self.hub.forget(id);
        }
        self.forget(id, &workload);
        removed
    }

    async fn remove_job(&self, id: AttemptId, job: &JobSeen) -> Result<(), BackendError> {
        // Once the watch has had it, its going is proof; before that, nothing there may be news that has not come.
        let mut known = self.watch.seen(id).job.is_some();
        if !job.deleting {
            self.end(id, job, Duration::ZERO).await?;
            // With its agent done the pod is over, and need not be ended with a grace. One that does not hear it is.
            if let Err(error) = self.hub.ask(id, AgentAsk::Finish).await {
                tracing::debug!(attempt = %id, %error, "an agent was not told that it is done");
            }
            let name = self.names.workload(id);
            let parameters = DeleteParams {
                // The Job goes last: as long as something of it is there, it is found.
                propagation_policy: Some(PropagationPolicy::Foreground),
                preconditions: Some(Preconditions { uid: Some(job.uid.clone()), resource_version: None }),
                ..DeleteParams::default()
            };
            match tokio::time::timeout(REQUEST_TIMEOUT, self.jobs.delete(&name, &parameters)).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) if error::answer(&error) == Answer::NotFound => return Ok(()),
                Ok(Err(error)) => return Err(error::api(format!("delete the Job of {id}"), error)),
                Err(_) => return Err(error::substrate(format!("delete the Job of {id}: no answer"))),
            }
        }
        let begun = self.clock.monotonic();
        let mut changes = self.watch.changes(id);
        loop {
            changes.borrow_and_update();
            let seen = self.watch.seen(id);
            known |= seen.job.is_some();
            if seen.job.is_none() && seen.pods.is_empty() && (known || self.job(id).await?.is_none()) {
                return Ok(());
            }
            if self.clock.monotonic().saturating_sub(begun) > REMOVAL {
                let seen = seen.pod().map(PodSeen::describe).unwrap_or_default();
                return Err(error::substrate(format!("remove the Job of {id}: it is still there: {seen}")));
            }
            let _ = tokio::time::timeout(Duration::from_secs(2), changes.changed()).await;
        }
    }
}
