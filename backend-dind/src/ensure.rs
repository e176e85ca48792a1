//! Making an attempt's workload.
//!
//! The order of things, each found again after a crash at any place:
//!
//! 1. Where there are inputs or outputs: the *door*, a container that is never started and has the attempt's volumes, all
//!    writable; then the inputs, the shim and its specification through it into the volumes. The engine lets nobody write
//!    into a volume that a container has read-only, so the workload itself cannot be the way.
//! 2. The workload's container. Without a door, the shim and its specification go in here.
//! 3. An ear on its standard output, so that nothing of its log must be looked for.
//! 4. The start.
//!
//! A workload that was made and never started is made anew: it may lack anything. Whether it was started is the engine's
//! word; that the program is not started twice is also the shim's, which finds its own mark in the volume.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bollard::models::{ContainerInspectResponse, ContainerState, ImageConfig};
use runner_agent::staging::MountPlan;
use runner_core::{
    backend::{AttemptContext, BackendError, BackendErrorKind},
    task::{TaskKind, spawn},
};
use tokio::sync::OwnedMutexGuard;

use crate::{
    archive::{pack, pack_small},
    backend::Shared,
    convert::{self, Conversion},
    engine::EngineErrorKind,
    error::{self, FAILURE_PATIENCE},
    images::ImageId,
    live::Live,
    names::{OWN_DIR, STOPPED},
    stage::{self, Depot},
    workload::Workload,
};

/// Between two looks at an engine that does not answer: at first, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often the making begins anew because what was found changed under our hands.
const TRIES: u32 = 5;

/// Whether the container was ever started.
pub(crate) fn was_started(state: &ContainerState) -> bool {
    state.running == Some(true)
        || state.started_at.as_deref().is_some_and(|time| !time.is_empty() && !time.starts_with("0001-"))
}

/// What is to be made, decided before anything is made.
struct Plan {
    mounts: MountPlan,
    image: ImageId,
    image_config: Arc<ImageConfig>,
}

type Verbs = OwnedMutexGuard<()>;

/// Does the work in a task of its own that holds the guard: where the caller goes away, the work ends before another verb
/// begins.
async fn held<T: Send + 'static>(
    verbs: Verbs,
    work: impl Future<Output = Result<T, BackendError>> + Send + 'static,
) -> Result<(T, Verbs), BackendError> {
    let task = spawn(TaskKind::Helper, "dind.make", async move { (work.await, verbs) });
    match task.await {
        Ok(Some((result, verbs))) => Ok((result?, verbs)),
        Ok(None) => {
            Err(BackendError::new(BackendErrorKind::Substrate, true, "make the workload: the task panicked"))
        }
        Err(stopped) => Err(error::substrate("make the workload", stopped)),
    }
}

impl Shared {
    /// Makes the attempt's workload exist and run. Whatever an earlier call, or an earlier process, got done is not done
    /// twice. Waits for an engine that does not answer.
    pub(crate) async fn ensure(self: &Arc<Self>, attempt: &AttemptContext) -> Result<(), BackendError> {
        let workload = self.workloads.get(attempt.attempt);
        let begun = self.clock.monotonic();
        let patience = Duration::from_secs(self.config.engine_patience_seconds);
        let mut pause = FIRST_PAUSE;
        let mut failing_since = None;
        let result = loop {
            let verbs = Arc::clone(&workload.verbs).lock_owned().await;
            let staging = workload.staging.begin();
            let stopped = staging.token().clone();
            let result = self.make(&workload, attempt, verbs, &stopped).await;
            drop(staging);
            let Err(error) = result else { break result };
            // An engine that does not answer, or says that it failed, makes an attempt late. What it cannot do at all it
            // also calls a failure, so that is waited for less long.
            let now = self.clock.monotonic();
            let outage = error::is_outage(&error);
            let failing = now.saturating_sub(*failing_since.get_or_insert(now));
            let waits = if outage {
                now.saturating_sub(begun) < patience
            } else {
                error::is_failure(&error) && failing < FAILURE_PATIENCE.min(patience)
            };
            if !waits {
                break Err(error);
            }
            tracing::warn!(attempt = %attempt.attempt, error = error.chain(), "the engine is in trouble; waiting for it");
            if outage {
                failing_since = None;
                self.engine.forget_version();
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        };
        // Whoever observed an attempt in the making looks again.
        workload.signal.send_replace(());
        result
    }

    async fn make(
        self: &Arc<Self>,
        workload: &Arc<Workload>,
        attempt: &AttemptContext,
        mut verbs: Verbs,
        stopped: &tokio_util::sync::CancellationToken,
    ) -> Result<(), BackendError> {
        if workload.stopped.load(Ordering::Acquire) {
            return Ok(());
        }
        // Refused before anything is made.
        let mounts = convert::mount_plan(&attempt.spec)?;
        let has_door = convert::needs_door(&mounts);
        let depot = if has_door {
            // What was started is not staged again.
            let (shared, of) = (Arc::clone(self), Arc::clone(workload));
            let (settled, held_verbs) = held(verbs, async move { shared.settled(&of).await }).await?;
            verbs = held_verbs;
            if settled {
                return Ok(());
            }
            let plan = self.plan(attempt, mounts.clone()).await?;
            let (shared, of, on) = (Arc::clone(self), Arc::clone(workload), attempt.clone());
            let (open, held_verbs) =
                held(verbs, async move { shared.open_door(&of, &on, &plan).await }).await?;
            verbs = held_verbs;
            if !open {
                return Ok(());
            }
            let filled = tokio::select! {
                biased;
                () = stopped.cancelled() => None,
                filled = self.fill(workload, attempt, &mounts) => Some(filled?),
            };
            let Some(depot) = filled else {
                let (shared, of) = (Arc::clone(self), Arc::clone(workload));
                held(verbs, async move { shared.mark_stopped(&of, &of.door).await }).await?;
                return Ok(());
            };
            Some(depot)
        } else {
            None
        };
        let plan = self.plan(attempt, mounts).await?;
        let (shared, of, on) = (Arc::clone(self), Arc::clone(workload), attempt.clone());
        held(verbs, async move { shared.run(&of, &on, &plan, depot).await }).await?;
        Ok(())
    }

    async fn plan(&self, attempt: &AttemptContext, mounts: MountPlan) -> Result<Plan, BackendError> {
        let image = self.images.ensure(attempt).await?;
        let image_config = self.image_config(&image).await?;
        Ok(Plan { mounts, image, image_config })
    }

    /// What the image says of itself. Content never changes, so it is asked for once.
    async fn image_config(&self, image: &ImageId) -> Result<Arc<ImageConfig>, BackendError> {
        if let Some(known) = self.image_configs.get(image) {
            return Ok(known);
        }
        let seen = self
            .engine
            .image(image.as_str())
            .await
            .map_err(|source| error::engine(format!("look at the image {image}"), source))?;
        let config = Arc::new(seen.config.unwrap_or_default());
        self.image_configs.put(image.clone(), Arc::clone(&config));
        Ok(config)
    }

    fn conversion<'a>(&'a self, attempt: &'a AttemptContext, plan: &'a Plan) -> Conversion<'a> {
        Conversion {
            attempt: attempt.attempt,
            spec: &attempt.spec,
            log_limit_bytes: attempt.log_limit_bytes,
            plan: &plan.mounts,
            capabilities: &self.capabilities,
            config: &self.config,
            names: &self.names,
            image: &plan.image,
            image_config: &plan.image_config,
        }
    }

    /// Looks at a container of ours. `None`: there is none.
    ///
    /// # Errors
    /// The engine's; `Substrate` where somebody else's container has the name.
    pub(crate) async fn look(
        &self,
        workload: &Workload,
        name: &str,
    ) -> Result<Option<ContainerInspectResponse>, BackendError> {
        let seen = self
            .engine
            .inspect(name)
            .await
            .map_err(|source| error::engine(format!("look at the container {name}"), source))?;
        let Some(container) = seen else { return Ok(None) };
        let labels = container.config.as_ref().and_then(|config| config.labels.clone()).unwrap_or_default();
        if self.names.owner(&labels) != Some(workload.attempt) {
            let context = format!("look at the container {name}: it carries the name and not our labels");
            return Err(BackendError::new(BackendErrorKind::Substrate, false, context));
        }
        Ok(Some(container))
    }

    /// Whether nothing is to be made: it was started once, or stopped before. What was made and never started is removed.
    async fn settled(&self, workload: &Workload) -> Result<bool, BackendError> {
        for _ in 0..TRIES {
            let Some(container) = self.look(workload, &workload.name).await? else { return Ok(false) };
            if was_started(&container.state.unwrap_or_default())
                || self.was_stopped(workload, &workload.name).await?
            {
                return Ok(true);
            }
            match self.engine.remove(&workload.name, false).await {
                Ok(()) => return Ok(false),
                // It runs now, or somebody removes it.
                Err(error) if error.kind == EngineErrorKind::Conflict => {
                    tokio::time::sleep(FIRST_PAUSE).await
                }
                Err(source) => {
                    return Err(error::engine(format!("remove the unfinished {}", workload.name), source));
                }
            }
        }
        let context = format!("make {}: what is there changes all the time", workload.name);
        Err(BackendError::new(BackendErrorKind::Substrate, true, context))
    }

    /// Makes the door, or finds it. `false`: the attempt was stopped.
    async fn open_door(
        &self,
        workload: &Workload,
        attempt: &AttemptContext,
        plan: &Plan,
    ) -> Result<bool, BackendError> {
        let conversion = self.conversion(attempt, plan);
        // Whatever the spec has that cannot be had is found before anything is made.
        convert::workload(&conversion)?;
        convert::exec_spec(&conversion)?;
        match self.engine.create(&workload.door, convert::door(&conversion)).await {
            Ok(_) => Ok(true),
            Err(error) if error.kind == EngineErrorKind::Conflict => {
                self.look(workload, &workload.door).await?;
                Ok(!self.was_stopped(workload, &workload.door).await?)
            }
            Err(source) => Err(error::engine(format!("make the container {}", workload.door), source)),
        }
    }

    /// Stages the inputs through the door.
    async fn fill(
        &self,
        workload: &Workload,
        attempt: &AttemptContext,
        mounts: &MountPlan,
    ) -> Result<Depot, BackendError> {
        let depot = Depot::make(&self.depots, attempt.attempt, "in")?;
        let staged = self.stage(attempt, mounts, &depot).await?;
        workload.input_bytes.store(staged.bytes, Ordering::Release);
        let plan = self.plan(attempt, mounts.clone()).await?;
        let spec = convert::exec_spec(&self.conversion(attempt, &plan))?;
        let user = spec.user;
        let mut parts = stage::own_parts(&self.agent, &spec, user, true)?;
        parts.push(stage::staged_part(&staged, user)?);
        parts.extend(stage::volume_parts(mounts, &depot, user));
        self.engine
            .put(&workload.door, "/", pack(parts))
            .await
            .map_err(|source| error::engine(format!("fill the volumes of {}", workload.attempt), source))?;
        Ok(depot)
    }

    /// Makes the workload's container and starts it.
    async fn run(
        &self,
        workload: &Workload,
        attempt: &AttemptContext,
        plan: &Plan,
        depot: Option<Depot>,
    ) -> Result<(), BackendError> {
        let conversion = self.conversion(attempt, plan);
        let body = convert::workload(&conversion)?;
        let spec = convert::exec_spec(&conversion)?;
        let name = &workload.name;
        let fail = |what: &str| {
            let context = format!("{what} the container {name}");
            move |source| error::engine(context, source)
        };
        let mut tries = 0;
        loop {
            match self.engine.create(name, body.clone()).await {
                Ok(warnings) => {
                    check_warnings(&warnings, attempt)?;
                    break;
                }
                Err(error) if error.kind == EngineErrorKind::Conflict && tries < TRIES => {
                    tries += 1;
                    if self.settled(workload).await? {
                        return Ok(());
                    }
                }
                Err(source) => return Err(fail("make")(source)),
            }
        }
        match &depot {
            None => {
                let parts = stage::own_parts(&self.agent, &spec, spec.user, false)?;
                let tar = pack_small(parts).map_err(|source| error::substrate("pack the shim", source))?;
                self.engine.put_bytes(name, OWN_DIR, tar).await.map_err(fail("put the shim into"))?;
            }
            Some(depot) => {
                let parts = stage::layer_parts(&plan.mounts, depot, spec.user);
                if !parts.is_empty() {
                    self.engine.put(name, "/", pack(parts)).await.map_err(fail("put files into"))?;
                }
            }
        }
        let live = Live::attach(&self.engine, name, true).await.map_err(fail("attach to"))?;
        workload.set_early(Some(live));
        let _turn = self
            .starts
            .acquire()
            .await
            .map_err(|closed| error::substrate("wait for a turn to start", closed))?;
        self.engine.start(name).await.map_err(|source| {
            let retryable = source.kind != EngineErrorKind::Refused;
            BackendError { retryable, ..fail("start")(source) }
        })
    }

    /// Whether the mark is there that the attempt was stopped before it was started.
    pub(crate) async fn was_stopped(
        &self,
        workload: &Workload,
        container: &str,
    ) -> Result<bool, BackendError> {
        Ok(workload.stopped.load(Ordering::Acquire) || self.read_record(container, STOPPED).await?.is_some())
    }
}

/// An engine that cannot honour a limit says so in a warning, and goes on without it.
fn check_warnings(warnings: &[String], attempt: &AttemptContext) -> Result<(), BackendError> {
    for warning in warnings {
        tracing::warn!(attempt = %attempt.attempt, warning, "the engine warns");
    }
    Ok(())
}
