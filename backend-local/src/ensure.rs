//! Making an attempt's workload: directory, inputs, specification, shim.

use std::{fs, os::unix::fs::DirBuilderExt as _, sync::Arc};

use runner_agent::{
    exec::client,
    staging::{InputStaging, MountPlan, Root, StagedInputs, stage_inputs},
};
use runner_core::backend::{AttemptContext, BackendError, BackendErrorKind};
use tokio::sync::OwnedMutexGuard;

use crate::{
    attempt_dir::give,
    backend::{Shared, blocking},
    convert::{self, Conversion},
    error,
    shim::Shim,
    workload::{ShimState, Workload},
};

/// What is to be done next.
enum Next {
    /// Nothing: the workload runs, has ended, or was stopped.
    Settled,
    /// The inputs are to be staged; then the shim is to be started.
    Stage(MountPlan),
}

impl Shared {
    /// Makes the attempt's workload exist and run. Whatever an earlier call, or an earlier process, got done is not done
    /// again.
    pub(crate) async fn ensure(self: &Arc<Self>, attempt: &AttemptContext) -> Result<(), BackendError> {
        let workload = self.workloads.get(attempt.attempt);
        // The guard goes into each blocking step: where this future is dropped, the step ends before another verb begins.
        let verbs = Arc::clone(&workload.verbs).lock_owned().await;
        let staging = workload.staging.begin();
        let result = self.make(&workload, attempt, verbs, staging.token()).await;
        drop(staging);
        // Whoever observed an attempt in the making looks again.
        workload.signal.send_replace(());
        result
    }

    async fn make(
        self: &Arc<Self>,
        workload: &Arc<Workload>,
        attempt: &AttemptContext,
        verbs: OwnedMutexGuard<()>,
        stopped: &tokio_util::sync::CancellationToken,
    ) -> Result<(), BackendError> {
        let (plan, verbs) = {
            let _start = self.start_permit().await?;
            let (shared, workload, attempt) = (Arc::clone(self), Arc::clone(workload), attempt.clone());
            let step = move || (shared.prepare(&workload, &attempt), verbs);
            match blocking("prepare the attempt", step).await? {
                (Ok(Next::Settled), _) => return Ok(()),
                (Ok(Next::Stage(plan)), verbs) => (plan, verbs),
                (Err(error), _) => return Err(error),
            }
        };
        let staged = tokio::select! {
            biased;
            () = stopped.cancelled() => None,
            staged = self.stage(workload, attempt, &plan) => Some(staged?),
        };
        let Some(staged) = staged else {
            let (time, workload) = (self.clock.now(), Arc::clone(workload));
            let step = move || {
                let marked = workload.dir.mark_stopped(time);
                drop(verbs);
                marked.map_err(|source| error::file("mark as stopped", workload.dir.path(), source))
            };
            return blocking("mark the attempt as stopped", step).await?;
        };
        let _start = self.start_permit().await?;
        let (shared, workload, attempt) = (Arc::clone(self), Arc::clone(workload), attempt.clone());
        let step = move || {
            let dir = &workload.dir;
            let result = dir
                .write(&dir.staged(), &staged)
                .map_err(|source| error::file("record what was staged in", dir.path(), source))
                .and_then(|()| shared.specify(&workload, &attempt, &plan))
                .and_then(|()| shared.start(&workload));
            drop(verbs);
            result
        };
        blocking("start the attempt", step).await?
    }

    /// One of the few permits to start at once: starting is work for the machine's cores, and more at once is slower.
    async fn start_permit(&self) -> Result<tokio::sync::SemaphorePermit<'_>, BackendError> {
        self.starts.acquire().await.map_err(|closed| error::substrate("wait for a turn to start", closed))
    }

    /// Looks how far the attempt is, and brings it as far as possible without staging. Blocking.
    fn prepare(&self, workload: &Arc<Workload>, attempt: &AttemptContext) -> Result<Next, BackendError> {
        let dir = &workload.dir;
        if dir.exists() {
            if dir.exit().exists() || dir.stopped().exists() {
                return Ok(Next::Settled);
            }
            match workload.shim()? {
                ShimState::Alive(_) => return Ok(Next::Settled),
                // A dead one that had begun is not replaced: whether the program ran is not known.
                ShimState::Dead if dir.shim().exists() => return Ok(Next::Settled),
                ShimState::Dead | ShimState::None => {}
            }
            if dir.exec().exists() {
                return self.start(workload).map(|()| Next::Settled);
            }
        }
        // Refused before anything is made.
        let spec = &attempt.spec;
        let plan = convert::mount_plan(spec)?;
        self.convert(workload, attempt, &plan)?;
        let image = convert::image(spec, &self.config)?;
        if let Some(root) = image
            && !root.is_dir()
        {
            let context = format!("open the image {:?}: {} is not a directory", spec.image, root.display());
            return Err(BackendError::new(BackendErrorKind::Image, false, context));
        }
        dir.create(&self.instance, self.owner(attempt), image.is_some() && !spec.read_only_root)
            .map_err(|source| error::file("make the directory", dir.path(), source))?;
        if !spec.inputs.is_empty() || !spec.outputs.is_empty() {
            return Ok(Next::Stage(plan));
        }
        // Nothing to move: the mounts are a handful of empty directories, and the shim can start at once.
        self.empty_mounts(workload, attempt, &plan)
            .map_err(|source| error::file("make the mounts of", dir.path(), source))?;
        self.specify(workload, attempt, &plan)?;
        self.start(workload)?;
        Ok(Next::Settled)
    }

    /// Makes the mounts of a plan without inputs and outputs, as staging would.
    fn empty_mounts(
        &self,
        workload: &Workload,
        attempt: &AttemptContext,
        plan: &MountPlan,
    ) -> std::io::Result<()> {
        for mount in &plan.mounts {
            let path = workload.dir.path().join(&mount.host);
            if let Some(side) = path.parent() {
                fs::DirBuilder::new().recursive(true).mode(0o700).create(side)?;
            }
            fs::DirBuilder::new().recursive(true).mode(0o755).create(&path)?;
            give(&path, self.owner(attempt))?;
        }
        Ok(())
    }

    async fn stage(
        &self,
        workload: &Arc<Workload>,
        attempt: &AttemptContext,
        plan: &MountPlan,
    ) -> Result<StagedInputs, BackendError> {
        let path = workload.dir.path();
        let root = Root::open(path).map_err(|source| error::file("open", path, source))?;
        let job = InputStaging {
            spec: &attempt.spec,
            plan,
            root: &root,
            artifacts: attempt.artifacts.as_ref(),
            limits: &self.staging,
            progress: attempt.progress.as_ref(),
            owner: self.owner(attempt),
        };
        stage_inputs(job).await.map_err(BackendError::from)
    }

    /// Writes the specification. Its existence says that everything before it is done.
    fn specify(
        &self,
        workload: &Workload,
        attempt: &AttemptContext,
        plan: &MountPlan,
    ) -> Result<(), BackendError> {
        let spec = self.convert(workload, attempt, plan)?;
        client::write_spec(workload.dir.path(), &spec).map_err(|source| {
            error::substrate(format!("write the specification of {}", attempt.attempt), source)
        })
    }

    fn convert(
        &self,
        workload: &Workload,
        attempt: &AttemptContext,
        plan: &MountPlan,
    ) -> Result<runner_agent::exec::protocol::ExecSpec, BackendError> {
        convert::exec_spec(&Conversion {
            attempt: attempt.attempt,
            spec: &attempt.spec,
            log_limit_bytes: attempt.log_limit_bytes,
            dir: &workload.dir,
            plan,
            machine: &self.machine,
            capabilities: &self.capabilities,
            config: &self.config,
            hidden: &self.hidden,
        })
    }

    /// Starts the shim. A second one for the same directory would end at once by itself.
    fn start(&self, workload: &Arc<Workload>) -> Result<(), BackendError> {
        let child = client::spawn(&self.agent, workload.dir.path())
            .map_err(|source| error::file("execute the agent", &self.agent, source))?;
        match Shim::of_child(child, Arc::clone(&workload.signal)) {
            Ok(shim) => workload.set_shim(shim),
            // It runs all the same, and is found by its record.
            Err(error) => {
                tracing::warn!(attempt = %workload.attempt, %error, "watch the shim for its death");
            }
        }
        Ok(())
    }

    /// Who the program's own directories are given to.
    fn owner(&self, attempt: &AttemptContext) -> Option<runner_core::spec::User> {
        self.machine.privileged.then(|| convert::user(&attempt.spec, &self.config))
    }
}
