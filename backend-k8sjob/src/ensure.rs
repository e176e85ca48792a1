//! Making an attempt's workload.
//!
//! The order of things, each found again after a crash at any place: the Job; the Secret with its agent's token, owned by the
//! Job, so that whatever removes the one removes the other. A pod that starts before its Secret is there waits for it. Then the
//! inputs and the start are waited for; the pod goes on with them whether somebody waits or not.

use std::time::Duration;

use bytes::Bytes;
use kube::api::PostParams;
use runner_agent::pod::{LastWord, order::Order};
use runner_core::{
    agent::{AgentOrder, AgentPresence},
    backend::{AttemptContext, BackendError, BackendErrorKind, WorkloadRef},
};

use crate::{
    backend::{REQUEST_TIMEOUT, Shared},
    convert::{self, Conversion},
    error::{self, Answer},
    seen::{Doing, JobSeen, Seen},
};

/// The slow poll behind the watch, for what no event tells.
const POLL: Duration = Duration::from_secs(5);
/// How long a container that cannot be made, or whose image cannot be had, is given: registries and nodes stumble.
const TROUBLE_PATIENCE: Duration = Duration::from_secs(20);

impl Shared {
    /// What the attempt's agent is told to do. From now on it may ask for it.
    ///
    /// # Errors
    /// `Unsupported`, where the spec cannot be honoured.
    pub(crate) fn take_up(&self, attempt: &AttemptContext) -> Result<(), BackendError> {
        let exec = convert::exec_spec(&self.conversion(attempt))?;
        let order = Order {
            attempt: attempt.attempt,
            tenant: attempt.tenant.clone(),
            spec: attempt.spec.as_ref().clone(),
            exec,
            limits: self.staging.clone(),
        };
        let order = serde_json::to_vec(&order)
            .map(Bytes::from)
            .map_err(|source| error::unsupported(format!("write the order: {source}")))?;
        self.hub.take_up(AgentOrder { attempt: attempt.clone(), order });
        Ok(())
    }

    fn conversion<'a>(&'a self, attempt: &'a AttemptContext) -> Conversion<'a> {
        Conversion {
            attempt: attempt.attempt,
            spec: &attempt.spec,
            log_limit_bytes: attempt.log_limit_bytes,
            config: &self.config,
            names: &self.names,
        }
    }

    pub(crate) async fn ensure(&self, attempt: &AttemptContext) -> Result<WorkloadRef, BackendError> {
        let id = attempt.attempt;
        self.take_up(attempt)?;
        let workload = self.workload(id);
        let presence = self.hub.presence(id);
        // What was reported before is somebody else's failure: the agent has gone on trying since.
        let reports = presence.borrow().reports;
        {
            let _verbs = workload.verbs.lock().await;
            let job = self.make_job(attempt).await?;
            if job.stopped.is_none() {
                self.make_secret(attempt, &job).await?;
            }
        }
        self.wait_for_start(attempt, presence, reports).await?;
        Ok(self.workload_ref(id))
    }

    async fn make_job(&self, attempt: &AttemptContext) -> Result<JobSeen, BackendError> {
        // A Job that the watch has shown need not be made.
        if let Some(known) = self.watch.seen(attempt.attempt).job.filter(|job| !job.deleting) {
            return Ok(known);
        }
        let job = convert::job(&self.conversion(attempt))?;
        let made = {
            let _turn =
                self.creates.acquire().await.map_err(|_| error::substrate("wait for a turn to create"))?;
            tokio::time::timeout(REQUEST_TIMEOUT, self.jobs.create(&PostParams::default(), &job)).await
        };
        match made {
            Ok(Ok(made)) => Ok(JobSeen::new(&made)),
            // It exists: made before, by us or by whom we follow.
            Ok(Err(error)) if error::answer(&error) == Answer::Conflict => {
                let found = self.job(attempt.attempt).await?;
                found.filter(|job| !job.deleting).ok_or_else(|| {
                    error::substrate(format!(
                        "adopt the Job of {}: it is being deleted, or not ours",
                        attempt.attempt
                    ))
                })
            }
            Ok(Err(error)) => Err(error::api(format!("create the Job of {}", attempt.attempt), error)),
            Err(_) => Err(error::substrate(format!("create the Job of {}: no answer", attempt.attempt))),
        }
    }

    async fn make_secret(&self, attempt: &AttemptContext, job: &JobSeen) -> Result<(), BackendError> {
        let id = attempt.attempt;
        // A pod with a container that has begun has its volumes.
        if self.watch.seen(id).pod().is_some_and(|pod| pod.fetch.has_begun()) {
            return Ok(());
        }
        let secret = convert::secret(&self.names, id, &job.uid, &self.hub.token(id));
        let parameters = PostParams::default();
        let made = tokio::time::timeout(REQUEST_TIMEOUT, self.secrets.create(&parameters, &secret));
        match made.await {
            Ok(Ok(_)) => Ok(()),
            // The token is always the same, so what is there is right.
            Ok(Err(error)) if error::answer(&error) == Answer::Conflict => Ok(()),
            Ok(Err(error)) => Err(error::api(format!("create the Secret of {id}"), error)),
            Err(_) => Err(error::substrate(format!("create the Secret of {id}: no answer"))),
        }
    }

    /// Waits until the program's container was started, or cannot be.
    async fn wait_for_start(
        &self,
        attempt: &AttemptContext,
        mut presence: tokio::sync::watch::Receiver<AgentPresence>,
        reports: u64,
    ) -> Result<(), BackendError> {
        let id = attempt.attempt;
        let mut changes = self.watch.changes(id);
        let begun = self.clock.monotonic();
        let mut troubled = None;
        loop {
            changes.borrow_and_update();
            let reported = presence.borrow_and_update().clone();
            if reported.reports > reports
                && let Some(report) = &reported.report
            {
                let kind = if report.local { BackendErrorKind::Substrate } else { BackendErrorKind::Input };
                return Err(BackendError::new(kind, report.retryable, report.message.clone()));
            }
            let seen = self.watch.seen(id);
            let now = self.clock.monotonic();
            let trouble = seen.pod().and_then(|pod| pod.image_trouble().or_else(|| pod.trouble()));
            let since = trouble.is_some().then(|| *troubled.get_or_insert(now));
            troubled = since;
            let patient = since.is_some_and(|since| now.saturating_sub(since) < TROUBLE_PATIENCE);
            match self.judge_start(&seen, now.saturating_sub(begun), patient) {
                Start::Begun => return Ok(()),
                Start::Failed(error) => return Err(error),
                Start::NoPod => {
                    let why = self
                        .refusal(&self.names.workload(id))
                        .await
                        .unwrap_or_else(|| "a quota or an admission controller may refuse it".to_owned());
                    let context = format!("no pod was made in {:?}: {why}", now.saturating_sub(begun));
                    return Err(BackendError::new(BackendErrorKind::Unschedulable, true, context));
                }
                Start::NotYet => {}
            }
            tokio::select! {
                _ = changes.changed() => {}
                _ = presence.changed() => {}
                () = tokio::time::sleep(POLL) => self.look(id, &seen).await?,
            }
        }
    }

    /// What no watch tells: that there is nothing.
    async fn look(&self, id: runner_core::id::AttemptId, seen: &Seen) -> Result<(), BackendError> {
        if seen.job.is_none() && self.job(id).await?.is_none() {
            return Err(error::substrate(format!("the Job of {id} was deleted by somebody else")));
        }
        Ok(())
    }

    fn judge_start(&self, seen: &Seen, waited: Duration, patient: bool) -> Start {
        let failed =
            |kind, retryable, context: String| Start::Failed(BackendError::new(kind, retryable, context));
        if seen.job.as_ref().is_some_and(|job| job.stopped.is_some()) {
            // Whoever observes it learns how it ended.
            return Start::Begun;
        }
        let Some(pod) = seen.pod() else {
            if let Some(why) = seen.job.as_ref().and_then(|job| job.failed.clone()) {
                return failed(BackendErrorKind::Substrate, true, format!("the Job failed: {why}"));
            }
            if waited > Duration::from_secs(self.config.unschedulable_seconds) {
                return Start::NoPod;
            }
            return Start::NotYet;
        };
        if pod.main.has_begun() {
            return Start::Begun;
        }
        if let Doing::Ended { code, message, .. } = &pod.fetch
            && *code != 0
        {
            if let Ok(LastWord { message, local }) = serde_json::from_str(message) {
                let kind = if local { BackendErrorKind::Substrate } else { BackendErrorKind::Input };
                return failed(kind, false, message);
            }
            return failed(
                BackendErrorKind::Substrate,
                true,
                format!("the inputs were not fetched: {}", pod.describe()),
            );
        }
        if pod.is_over() || pod.deleting {
            return failed(
                BackendErrorKind::Substrate,
                true,
                format!("the pod ended before its program: {}", pod.describe()),
            );
        }
        if patient {
            return Start::NotYet;
        }
        if let Some(trouble) = pod.image_trouble() {
            return failed(BackendErrorKind::Image, false, format!("get the image: {trouble}"));
        }
        if let Some(trouble) = pod.trouble() {
            return failed(BackendErrorKind::Substrate, true, format!("make a container: {trouble}"));
        }
        if let Some(why) = &pod.unschedulable
            && waited > Duration::from_secs(self.config.unschedulable_seconds)
        {
            return failed(BackendErrorKind::Unschedulable, true, format!("find a node: {why}"));
        }
        Start::NotYet
    }
}

/// How far a start is.
enum Start {
    NotYet,
    Begun,
    /// For so long that it will not come by itself.
    NoPod,
    Failed(BackendError),
}
