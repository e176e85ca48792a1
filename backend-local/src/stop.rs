//! The end of an attempt's workload: asked for, forced, proven; then the removal of what it left.

use std::{fs, io, sync::Arc, time::Duration};

use runner_agent::exec::{
    client::{self, ControlError},
    protocol::{ControlReply, ControlRequest, ShimRecord},
};
use runner_core::{
    backend::{BackendError, WorkloadRef},
    clock::Timestamp,
};

use crate::{
    backend::{Shared, blocking},
    error,
    shim::Shim,
    workload::{ShimState, Workload},
};

/// Beyond the grace: how long a shim may take to end its tree and write down how it ended.
pub(crate) const BOUND: Duration = Duration::from_secs(5);
/// How long a shim that was just started may take to serve its control socket.
const CONTROL_DEADLINE: Duration = Duration::from_secs(5);
const CONTROL_RETRY: Duration = Duration::from_millis(10);
/// The pid of a claim that is no process.
const NOBODY: i32 = 0;

/// What there is to stop.
enum Found {
    /// Nothing was ever started, and nothing will be.
    Nothing,
    /// A shim that has ended; what it left is to be looked for.
    Dead,
    /// A shim that lives.
    Alive(Shim),
}

impl Shared {
    /// Ends the workload, and returns when it is proven dead.
    pub(crate) async fn stop(
        self: &Arc<Self>,
        workload: &WorkloadRef,
        grace: Duration,
    ) -> Result<(), BackendError> {
        let workload = self.workloads.get(workload.attempt);
        workload.staging.abort();
        let verbs = Arc::clone(&workload.verbs).lock_owned().await;
        let time = self.clock.now();
        let step = {
            let workload = Arc::clone(&workload);
            move || {
                let found = find(&workload, Some(time));
                // Not held while the program takes its time: a second call may shorten the grace.
                drop(verbs);
                found
            }
        };
        let result = match blocking("look what there is to stop", step).await? {
            Ok(Found::Nothing) => Ok(()),
            Ok(Found::Dead) => prove_dead(&workload).await,
            Ok(Found::Alive(shim)) => self.end(&workload, &shim, grace).await,
            Err(error) => Err(error),
        };
        workload.signal.send_replace(());
        self.workloads.forget(&workload);
        result
    }

    /// Removes everything that the attempt left. One that is alive is stopped first.
    pub(crate) async fn remove(self: &Arc<Self>, workload: &WorkloadRef) -> Result<(), BackendError> {
        let workload = self.workloads.get(workload.attempt);
        workload.staging.abort();
        let verbs = Arc::clone(&workload.verbs).lock_owned().await;
        let (found, verbs) = {
            let workload = Arc::clone(&workload);
            let step = move || ((find(&workload, None), workload.dir.exit().exists()), verbs);
            blocking("look what there is to remove", step).await?
        };
        match found {
            (Err(error), _) => return Err(error),
            (Ok(Found::Nothing), _) => {}
            // The shim proved the death of all before it wrote how it ended.
            (Ok(Found::Dead), true) => {}
            (Ok(Found::Dead), false) => prove_dead(&workload).await?,
            // It has written its last word and is about to end.
            (Ok(Found::Alive(shim)), true) if shim.wait(BOUND).await => {}
            (Ok(Found::Alive(shim)), _) => self.end(&workload, &shim, Duration::ZERO).await?,
        }
        let step = {
            let workload = Arc::clone(&workload);
            move || {
                let removed = workload.dir.remove();
                drop(verbs);
                removed.map_err(|source| error::file("remove", workload.dir.path(), source))
            }
        };
        blocking("remove the attempt", step).await??;
        workload.signal.send_replace(());
        self.workloads.forget(&workload);
        Ok(())
    }

    async fn end(&self, workload: &Arc<Workload>, shim: &Shim, grace: Duration) -> Result<(), BackendError> {
        let asked = self.ask(workload, shim, grace).await?;
        let patience = if asked { grace.saturating_add(BOUND) } else { Duration::ZERO };
        if !shim.wait(patience).await {
            tracing::warn!(attempt = %workload.attempt, asked, "a shim does not end its program and is killed");
            let (time, workload, shim) = (self.clock.now(), Arc::clone(workload), shim.clone());
            let step = move || {
                // The mark comes first, so that the end is known for what it is.
                workload.dir.mark_stopped(time)?;
                shim.kill()
            };
            blocking("kill the shim", step)
                .await?
                .map_err(|source| error::substrate("kill a shim that does not answer", source))?;
        }
        prove_dead(workload).await
    }

    /// Asks the shim to end its program. `false`: it does not take the request. Dead meanwhile counts as asked.
    async fn ask(
        &self,
        workload: &Arc<Workload>,
        shim: &Shim,
        grace: Duration,
    ) -> Result<bool, BackendError> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let begun = self.clock.monotonic();
        loop {
            let left = CONTROL_DEADLINE.saturating_sub(self.clock.monotonic().saturating_sub(begun));
            if left.is_zero() {
                return Ok(false);
            }
            let asking = Arc::clone(workload);
            let request = ControlRequest::Stop { grace_ms };
            let step = move || client::control(asking.dir.path(), &request, left);
            match blocking("ask the shim to stop", step).await? {
                Ok(ControlReply::Ok) => return Ok(true),
                Ok(ControlReply::Refused(why)) => {
                    tracing::warn!(attempt = %workload.attempt, why, "a shim refused to stop its program");
                    return Ok(false);
                }
                // Not serving yet, or not any more.
                Err(ControlError::Gone) => {
                    if shim.wait(CONTROL_RETRY).await {
                        return Ok(true);
                    }
                }
                Err(error @ (ControlError::Deadline(_) | ControlError::TooLong(_) | ControlError::Io(_))) => {
                    if shim.death().is_some() {
                        return Ok(true);
                    }
                    tracing::warn!(attempt = %workload.attempt, %error, "ask a shim to stop its program");
                    return Ok(false);
                }
            }
        }
    }
}

/// Looks what there is to stop, and makes sure that nothing starts any more where nothing was started. Blocking.
///
/// `mark`: the time to mark the attempt as stopped with.
fn find(workload: &Workload, mark: Option<Timestamp>) -> Result<Found, BackendError> {
    let dir = &workload.dir;
    if !dir.exists() {
        return Ok(Found::Nothing);
    }
    let mut state = workload.shim()?;
    if matches!(state, ShimState::None) && dir.exec().exists() && !claim(workload)? {
        state = workload.shim()?;
    }
    match state {
        ShimState::Alive(shim) => Ok(Found::Alive(shim)),
        ShimState::Dead => Ok(Found::Dead),
        ShimState::None => {
            if let Some(time) = mark {
                dir.mark_stopped(time)
                    .map_err(|source| error::file("mark as stopped", dir.path(), source))?;
            }
            Ok(Found::Nothing)
        }
    }
}

/// Takes the place of the shim, so that one that an earlier process started, and that has not got so far yet, ends at once.
/// `false`: a shim has it. Blocking.
pub(crate) fn claim(workload: &Workload) -> Result<bool, BackendError> {
    let dir = &workload.dir;
    let nobody = ShimRecord { pid: NOBODY, start_ticks: 0, boot_id: String::new() };
    let claimed = || -> io::Result<bool> {
        let aside = dir.path().join("shim.json.nobody");
        fs::write(&aside, serde_json::to_vec(&nobody)?)?;
        match fs::hard_link(&aside, dir.shim()) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        }
    };
    claimed().map_err(|source| error::file("keep a shim from starting in", dir.path(), source))
}

/// Whether the record is a [`claim`], which keeps every shim away.
pub(crate) fn is_nobody(record: &ShimRecord) -> bool {
    record.pid == NOBODY
}

/// Proves that nothing of the attempt is alive. Its shim has ended.
pub(crate) async fn prove_dead(workload: &Arc<Workload>) -> Result<(), BackendError> {
    let proving = Arc::clone(workload);
    blocking("prove that nothing is alive", move || client::prove_dead(proving.dir.path(), BOUND))
        .await?
        .map_err(|source| {
            error::substrate(format!("prove that nothing of {} is alive", workload.attempt), source)
        })
}
