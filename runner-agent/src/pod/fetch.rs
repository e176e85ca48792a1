//! The role before the program: brings everything to where main finds it.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
    sync::OnceLock,
};

use runner_core::backend::{NoProgress, chain};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};

use super::{
    Pod, PodError,
    client::{Backoff, Service},
    order::Order,
    store::RemoteStore,
};
use crate::{
    exec::client,
    staging::{InputStaging, MountPlan, Root, StagedInputs, StagingError, StagingErrorKind, stage_inputs},
};

/// What the last word may have.
const MAX_LAST_WORD: usize = 3000;
/// How often a failure that is final is told to a service that does not listen. The last word says it, too.
const TELLING_TRIES: u32 = 5;

/// Why the inputs could not be staged, as the container's last word (JSON).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastWord {
    /// One line for a person.
    pub message: String,
    /// The machine failed, not the input.
    pub local: bool,
}

/// Stages, and waits for as long as the service or the store are away.
///
/// # Errors
/// See [`PodError`].
pub async fn fetch(pod: &Pod) -> Result<(), PodError> {
    let mut told =
        signal(SignalKind::terminate()).map_err(|error| PodError::pod("listen for SIGTERM", error))?;
    tokio::select! {
        done = bring(pod) => done,
        _ = told.recv() => Err(PodError::Ended),
    }
}

async fn bring(pod: &Pod) -> Result<(), PodError> {
    copy_agent(&pod.bin).map_err(|error| PodError::pod(pod.bin.display().to_string(), error))?;
    let service = Service::new(pod)?;
    let mut backoff = Backoff::new();
    let way_past = OnceLock::new();
    loop {
        let described = service.describe().await?;
        let direct = way_past.get_or_init(|| described.way_past(&service)).clone();
        let store = RemoteStore { service: service.clone(), direct };
        let mut order = described.order;
        // An image with nothing in it has no authorities of its own.
        order.limits.https.bundled_roots = true;
        let error = match stage(pod, &store, &order).await {
            Ok(staged) => {
                let handed = hand_over(pod, &order, staged);
                return handed.map_err(|error| PodError::pod(pod.shim.display().to_string(), error));
            }
            Err(error) => error,
        };
        let (message, local) = (chain(&error), error.kind == StagingErrorKind::Local);
        if !error.kind.retryable() {
            last_word(pod, &LastWord { message: cut(&message), local });
            for _ in 0..TELLING_TRIES {
                match service.report(message.clone(), false, local).await {
                    Ok(true) => break,
                    Ok(false) => backoff.pause().await,
                    Err(_) => break,
                }
            }
            return Err(PodError::Inputs(message));
        }
        let _ = service.report(message, true, local).await?;
        backoff.pause().await;
    }
}

/// Puts this program to where main executes it: main's image need not have anything.
fn copy_agent(bin: &Path) -> io::Result<()> {
    let aside = bin.join(".runner-agent");
    let mut from = fs::File::open("/proc/self/exe")?;
    let mut to = fs::File::options().create(true).truncate(true).write(true).mode(0o755).open(&aside)?;
    io::copy(&mut from, &mut to)?;
    drop(to);
    fs::rename(aside, bin.join("runner-agent"))
}

async fn stage(pod: &Pod, store: &RemoteStore, order: &Order) -> Result<StagedInputs, StagingError> {
    let local = |what: &str, why: String| StagingError {
        kind: StagingErrorKind::Local,
        direction: runner_core::backend::Direction::Input,
        field: String::new(),
        context: format!("{what}: {why}"),
        source: None,
    };
    let plan = MountPlan::new(&order.spec).map_err(|error| StagingError {
        kind: StagingErrorKind::Unsupported,
        ..local("place inputs and outputs", error.to_string())
    })?;
    let root = Root::open(&pod.stage).map_err(|error| local("open the stage", error.to_string()))?;
    stage_inputs(InputStaging {
        spec: &order.spec,
        plan: &plan,
        root: &root,
        artifacts: store,
        limits: &order.limits,
        progress: &NoProgress,
        // All containers of the pod have the same user.
        owner: None,
    })
    .await
}

/// Name of the record of what was staged, beside the agent's copy: main cannot write there.
pub(super) const STAGED: &str = "staged.json";

/// Writes what is to be executed: from now on, main may begin.
fn hand_over(pod: &Pod, order: &Order, staged: StagedInputs) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&pod.shim)?;
    fs::write(pod.bin.join(STAGED), serde_json::to_vec(&staged)?)?;
    client::write_spec(&pod.shim, &order.exec).map_err(io::Error::other)
}

fn last_word(pod: &Pod, word: &LastWord) {
    let json = serde_json::to_vec(word).map_err(io::Error::other);
    let written = json.and_then(|word| fs::write(&pod.last_word, word));
    if let Err(error) = written {
        tracing::warn!(%error, "the last word could not be written");
    }
}

fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_LAST_WORD)].to_owned()
}
