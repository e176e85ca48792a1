//! Inputs: from the object store, by way of a directory of the service, into volumes of the attempt.
//!
//! What enters a volume has been verified whole before: the shared staging code makes the attempt's tree in a private
//! directory of the service, and its tar is streamed to the engine from there.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use runner_agent::{
    exec::protocol::{ExecSpec, name},
    staging::{InputStaging, MountPlan, Root, StagedInputs, stage_inputs},
};
use runner_core::{
    backend::{AttemptContext, BackendError},
    id::AttemptId,
    spec::User,
};

use crate::{
    agent::Agent,
    archive::{Owner, Part},
    backend::Shared,
    convert::{self, Behind},
    error,
    names::{AGENT_PATH, OWN_DIR, RUN_DIR},
};

/// A directory of the service for one attempt's files on their way. Removed when it is dropped.
#[derive(Debug)]
pub(crate) struct Depot {
    path: PathBuf,
}

impl Depot {
    /// Makes it, empty.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn make(base: &Path, attempt: AttemptId, side: &str) -> Result<Self, BackendError> {
        // No two share one: what an earlier call left may still be on its way out.
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = base.join(format!("{attempt}.{side}.{number}"));
        let depot = Self { path };
        let made = remove(&depot.path).and_then(|()| fs::DirBuilder::new().mode(0o700).create(&depot.path));
        made.map_err(|source| error::substrate(format!("make {}", depot.path.display()), source))?;
        Ok(depot)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn root(&self) -> Result<Root, BackendError> {
        Root::open(&self.path)
            .map_err(|source| error::substrate(format!("open {}", self.path.display()), source))
    }
}

impl Drop for Depot {
    fn drop(&mut self) {
        let path = std::mem::take(&mut self.path);
        let work = move || {
            if let Err(error) = remove(&path) {
                // The next start of the service removes it.
                tracing::warn!(path = %path.display(), %error, "remove a directory of files on their way");
            }
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(work)),
            Err(_) => work(),
        }
    }
}

/// Removes a tree that staging made: its directories may lack the right to be emptied.
fn remove(path: &Path) -> io::Result<()> {
    let work = || {
        let root = Root::open(path)?;
        for entry in fs::read_dir(path)? {
            root.remove_tree(Path::new(&entry?.file_name()))?;
        }
        fs::remove_dir(path)
    };
    match work() {
        // Somebody else has removed it meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Removes what an earlier process left on its way.
pub(crate) fn sweep(base: &Path) -> io::Result<()> {
    for entry in fs::read_dir(base)? {
        remove(&entry?.path())?;
    }
    Ok(())
}

fn relative(path: &str) -> String {
    path.trim_start_matches('/').to_owned()
}

/// The shim and its directory, to be unpacked at `/` or at [`OWN_DIR`].
pub(crate) fn own_parts(
    agent: &Agent,
    spec: &ExecSpec,
    user: User,
    at_root: bool,
) -> Result<Vec<Part>, BackendError> {
    let json = serde_json::to_vec(spec)
        .map_err(|source| error::substrate("write the shim's specification", source))?;
    let place = |path: &str| match (at_root, path.strip_prefix(OWN_DIR)) {
        (false, Some(below)) => relative(below),
        (_, None) | (true, _) => relative(path),
    };
    let owner = Owner::from(user);
    Ok(vec![
        Part::Bytes { path: place(AGENT_PATH), owner: Owner::ROOT, mode: 0o755, bytes: agent.bytes.clone() },
        Part::Directory { path: place(RUN_DIR), owner, mode: 0o700 },
        Part::Bytes {
            path: place(&format!("{RUN_DIR}/{}", name::EXEC)),
            owner,
            mode: 0o600,
            bytes: json.into(),
        },
    ])
}

impl Shared {
    /// Fills a depot with the attempt's inputs.
    pub(crate) async fn stage(
        &self,
        attempt: &AttemptContext,
        plan: &MountPlan,
        depot: &Depot,
    ) -> Result<StagedInputs, BackendError> {
        let root = depot.root()?;
        let job = InputStaging {
            spec: &attempt.spec,
            plan,
            root: &root,
            artifacts: attempt.artifacts.as_ref(),
            limits: &self.staging,
            progress: attempt.progress.as_ref(),
            // The tar says whose they are.
            owner: None,
        };
        stage_inputs(job).await.map_err(BackendError::from)
    }
}

/// What of a filled depot goes into the attempt's volumes, relative to the root.
pub(crate) fn volume_parts(plan: &MountPlan, depot: &Depot, user: User) -> Vec<Part> {
    parts(plan, Behind::Volume)
        .map(|(target, host)| Part::Tree {
            path: relative(target),
            local: depot.path().join(host),
            owner: user.into(),
        })
        .collect()
}

/// What of a filled depot goes into the workload's own layer, relative to the root.
pub(crate) fn layer_parts(plan: &MountPlan, depot: &Depot, user: User) -> Vec<Part> {
    parts(plan, Behind::Layer)
        .map(|(target, host)| Part::Shared {
            path: relative(target),
            local: depot.path().join(host),
            gid: user.gid,
        })
        .collect()
}

fn parts(plan: &MountPlan, wanted: Behind) -> impl Iterator<Item = (&str, &str)> {
    plan.mounts
        .iter()
        .enumerate()
        .filter(move |(number, _)| convert::behind(plan, *number) == wanted)
        .map(|(_, mount)| (mount.target.as_str(), mount.host.as_str()))
}

/// In the shim's directory: what staging the inputs came to.
pub(crate) const STAGED: &str = "staged.json";

/// The record of what was staged, to be unpacked at `/`.
pub(crate) fn staged_part(staged: &StagedInputs, user: User) -> Result<Part, BackendError> {
    let json =
        serde_json::to_vec(staged).map_err(|source| error::substrate("write what was staged", source))?;
    let path = relative(&format!("{RUN_DIR}/{STAGED}"));
    Ok(Part::Bytes { path, owner: user.into(), mode: 0o600, bytes: json.into() })
}
