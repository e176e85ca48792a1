//! What a caller, or the clock, removes.

use std::{sync::Arc, time::Duration};

use super::{Caller, RunService, ServiceError, SweepReport, precondition, sweep};
use crate::{
    id::RunId,
    store::{EndedRun, Removed},
};

impl RunService {
    /// Removes a finished run: its rows, logs and artifacts. When this returns, nothing of it is stored.
    ///
    /// That it is being removed is durable first, so a sweep finishes what a crash interrupts.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` where the run is not terminal yet, its workload is still being removed, or a live run
    /// has its outputs as an input; else the stores' failure: the call may be repeated, and the next sweep goes on by itself.
    pub async fn delete(&self, caller: &Caller, id: RunId) -> Result<(), ServiceError> {
        let record = self.find(caller, id).await?;
        let Some(ended) = record.ended else {
            return Err(precondition("RUN_NOT_ENDED", "the run has not ended; cancel it first".to_owned()));
        };
        // Its end is told before its workload is removed, which takes moments.
        for _ in 0..100 {
            if self.core.live.get(id).is_none() || !self.core.pause(Duration::from_millis(50)).await {
                break;
            }
        }
        if self.core.live.get(id).is_some() {
            let message = "the run has ended, and what it ran is still being removed; try again".to_owned();
            return Err(precondition("RUN_NOT_ENDED", message));
        }
        if sweep::is_input(&self.core, id).await? {
            let message = "a run that has not ended has its outputs as an input".to_owned();
            return Err(precondition("RUN_IN_USE", message));
        }
        let core = Arc::clone(&self.core);
        let run = EndedRun { id, tenant: record.tenant, ended };
        let removing = async move {
            match sweep::remove(&core, &run).await {
                // Another call, or the sweep, was faster.
                Ok(Removed::Gone | Removed::Unknown) => Ok(()),
                Ok(Removed::Live) => Err(precondition("RUN_NOT_ENDED", "the run has not ended".to_owned())),
                Err(error) => Err(error.into()),
            }
        };
        self.core.whole("delete", removing).await
    }

    /// Removes what is older than it is kept, now instead of at the next interval.
    pub async fn sweep(&self) -> SweepReport {
        sweep::pass(&self.core).await
    }
}
