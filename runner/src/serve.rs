//! The composition root: from a configuration to a running service, and to its end.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use backend_dind::{DindBackend, DindParts};
use backend_k8sjob::{K8sJobBackend, K8sJobParts};
use backend_local::{LocalBackend, LocalParts};
use runner_artifacts::{
    blob::{BlobSigner, KeyError},
    log::{self, SegmentedLogs},
    object,
};
use runner_core::{
    agent::AgentHub,
    artifact::{ArtifactError, ArtifactErrorKind, ArtifactStore},
    backend::Backend,
    clock::{self, Clock, IdGen},
    service::{Options, Parts, RunService, ServiceError},
    store::Store,
};
use runner_store::{DataDirLock, LockError, PostgresError, PostgresStore, SqliteOptions, SqliteStore};
use serde_json::json;

use crate::{
    agents::{
        Direct,
        key::{self, AgentKeyError},
    },
    blob::Spool,
    config::{BackendConfig, Config, UnauthenticatedCallers, objects::ObjectStoreConfig},
    metrics::Metrics,
    server::{BindError, bind, bind_for_agents, bind_for_operators},
    surfaces::{AgentParts, SurfaceParts, Surfaces},
};

/// Name, in the data directory, of the file that says who the service is.
const INSTANCE_FILE: &str = "instance";
/// Name, in the data directory, of the file that says where the service listens.
pub const ENDPOINT_FILE: &str = "endpoint.json";

/// Why the service does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The data directory cannot be had.
    #[error(transparent)]
    DataDir(#[from] LockError),
    /// A file in the data directory cannot be read or written.
    #[error("{what} {}", path.display())]
    File {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The state store cannot be opened.
    #[error("open the state store")]
    Store(#[source] runner_store::OpenError),
    /// The state store on PostgreSQL cannot be opened.
    #[error("open the state store")]
    Postgres(#[source] PostgresError),
    /// The object store cannot be opened.
    #[error("open the object store")]
    Objects(#[source] ArtifactError),
    /// The keys of signed URLs cannot be had.
    #[error("open the keys of signed URLs")]
    Keys(#[source] KeyError),
    /// The key of agents' tokens cannot be had.
    #[error("open the key of agents' tokens")]
    AgentKey(#[source] AgentKeyError),
    /// A backend cannot be opened.
    #[error("open the backend {name}")]
    Backend {
        /// Which.
        name: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An address cannot be had.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The parts do not fit together.
    #[error("start the service")]
    Service(#[source] ServiceError),
    /// The contract's descriptors do not decode.
    #[error("describe the contract")]
    Descriptors(#[source] tonic_reflection::server::Error),
    /// Something that blocks did not come back.
    #[error("a blocking step of the start failed")]
    Blocking,
}

/// A running service.
#[derive(Debug)]
pub struct Running {
    /// Where gRPC and blobs are served.
    pub listen: std::net::SocketAddr,
    /// Where health and metrics are served.
    pub ops_listen: std::net::SocketAddr,
    surfaces: Surfaces,
    // The last to go: another service may take the directory then.
    _lock: Arc<DataDirLock>,
}

impl Running {
    /// Stops within `drain`.
    pub async fn stop(self, drain: Duration) {
        self.surfaces.stop(drain).await;
    }
}

async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, ServeError>
where
    T: Send + 'static,
    E: Send + 'static,
    ServeError: From<E>,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(ServeError::Blocking),
    }
}

/// Starts the service: takes the data directory, opens the stores and the backends, adopts what lives, and listens.
///
/// # Errors
/// See [`ServeError`]. Nothing is left running then.
pub async fn start(config: &Config) -> Result<Running, ServeError> {
    let data_dir = config.data_dir();
    let lock = {
        let dir = data_dir.clone();
        Arc::new(blocking(move || DataDirLock::acquire(&dir)).await?)
    };
    // Before anything is done: a port that is taken is the most likely mistake.
    let listener = bind("listen", "--listen", config.listen, config.unauthenticated_callers).await?;
    let ops_listener = bind_for_operators("ops_listen", "--ops-listen", config.ops_listen).await?;
    let agent_listener = match config.agent_listen {
        Some(address) => Some(bind_for_agents("agent_listen", "--agent-listen", address).await?),
        None => None,
    };
    let (clock, ids) = clock::system();
    let metrics = Arc::new(Metrics::new());

    let store = open_store(config, &lock).await?;
    let artifacts = {
        let (objects, clock) = (config.object_store.clone(), Arc::clone(&clock));
        let directory = data_dir.join("objects");
        blocking(move || open_objects(&objects, &directory, &clock)).await?
    };
    let direct = {
        let (objects, artifacts, clock) =
            (config.object_store.clone(), Arc::clone(&artifacts), Arc::clone(&clock));
        blocking(move || open_direct(&objects, artifacts, &clock)).await?
    };
    let spool = {
        let (dir, clock) = (data_dir.join("incoming"), Arc::clone(&clock));
        let most = config.server.resumable_bytes.0;
        blocking(move || {
            Spool::open(&dir, most, clock).map_err(|source| ServeError::File {
                what: "open",
                path: dir,
                source,
            })
        })
        .await?
    };
    let (signer, instance, hub) = {
        let (dir, clock, ids) = (data_dir.clone(), Arc::clone(&clock), Arc::clone(&ids));
        blocking(move || {
            let signer = BlobSigner::open(&dir, clock).map_err(ServeError::Keys)?;
            let hub = AgentHub::new(key::open(&dir).map_err(ServeError::AgentKey)?);
            Ok::<_, ServeError>((signer, instance(&dir, ids.as_ref())?, hub))
        })
        .await?
    };
    // A run that prints nothing leaves no object behind: watchers read the logs of ended attempts without following.
    let options = log::Options { store_empty: false, ..log::Options::default() };
    let logs = SegmentedLogs::new(Arc::clone(&artifacts), Arc::clone(&clock), options);
    let backends = open_backends(config, &data_dir, &instance, &hub, &clock, &metrics).await?;
    let parts = Parts {
        store,
        logs: Arc::new(logs),
        artifacts: Arc::clone(&artifacts),
        backends,
        default_backend: config.default_backend.clone(),
        traffic: config.traffic.clone(),
        clock: Arc::clone(&clock),
        ids: Arc::clone(&ids),
        limits: config.run_limits(),
        options: Options {
            retention: config.retention.to_domain(),
            publish_patience: config.object_store.publish_patience.0,
            ..Options::default()
        },
        meter: Arc::clone(&metrics) as _,
    };
    let service = RunService::start(parts).await.map_err(ServeError::Service)?;
    let address = |listener: &tokio::net::TcpListener| {
        listener.local_addr().map_err(|source| ServeError::File {
            what: "ask for the address of",
            path: data_dir.clone(),
            source,
        })
    };
    let (listen, ops_listen) = (address(&listener)?, address(&ops_listener)?);
    let parts = SurfaceParts {
        service,
        artifacts,
        signer: Arc::new(signer),
        spool: Arc::new(spool),
        clock,
        ids,
        metrics,
        listener,
        ops_listener,
        agents: agent_listener.map(|listener| AgentParts { listener, hub, direct }),
    };
    let surfaces = Surfaces::start(config, parts).await.map_err(ServeError::Descriptors)?;
    write_endpoint(&data_dir, listen, ops_listen)?;
    summarise(config, &data_dir, listen, ops_listen);
    Ok(Running { listen, ops_listen, surfaces, _lock: lock })
}

async fn open_store(config: &Config, lock: &Arc<DataDirLock>) -> Result<Arc<dyn Store>, ServeError> {
    if let Some(options) = config.store.postgres() {
        return Ok(Arc::new(PostgresStore::open(&options).await.map_err(ServeError::Postgres)?));
    }
    let lock = Arc::clone(lock);
    let opened =
        blocking(move || SqliteStore::open(lock, &SqliteOptions::default()).map_err(ServeError::Store));
    Ok(Arc::new(opened.await?))
}

fn open_objects(
    config: &ObjectStoreConfig,
    directory: &Path,
    clock: &Arc<dyn Clock>,
) -> Result<Arc<dyn ArtifactStore>, ServeError> {
    let url = match &config.url {
        Some(url) => url.clone(),
        None => directory.to_string_lossy().into_owned(),
    };
    object::open_url(&url, &config.options(), clock).map_err(ServeError::Objects)
}

/// Where agents may move objects past the service.
fn open_direct(
    config: &ObjectStoreConfig,
    artifacts: Arc<dyn ArtifactStore>,
    clock: &Arc<dyn Clock>,
) -> Result<Option<Direct>, ServeError> {
    if !config.agent_urls {
        return Ok(None);
    }
    let store = match (&config.url, config.agent_options()) {
        (Some(url), Some(options)) => object::open_url(url, &options, clock).map_err(ServeError::Objects)?,
        _ => artifacts,
    };
    let ca_pem = config.agent_ca().map_err(|why| {
        ServeError::Objects(ArtifactError::new(ArtifactErrorKind::Other, format!("agent_ca_file: {why}")))
    })?;
    Ok(Some(Direct { store, lifetime: config.agent_url_lifetime.0, ca_pem }))
}

async fn open_backends(
    config: &Config,
    data_dir: &Path,
    instance: &str,
    hub: &Arc<AgentHub>,
    clock: &Arc<dyn Clock>,
    metrics: &Arc<Metrics>,
) -> Result<Vec<Arc<dyn Backend>>, ServeError> {
    let mut backends: Vec<Arc<dyn Backend>> = Vec::new();
    for backend in &config.backends {
        match backend {
            BackendConfig::Local(local) => {
                let parts = LocalParts {
                    config: local.clone(),
                    data_dir: data_dir.to_owned(),
                    instance: instance.to_owned(),
                    clock: Arc::clone(clock),
                    staging: config.inputs.staging_limits(),
                };
                let name = local.name.to_string();
                let opened = LocalBackend::open(parts).await;
                backends.push(Arc::new(
                    opened.map_err(|source| ServeError::Backend { name, source: source.into() })?,
                ));
            }
            BackendConfig::Dind(dind) => {
                let parts = DindParts {
                    config: (**dind).clone(),
                    data_dir: data_dir.to_owned(),
                    instance: instance.to_owned(),
                    clock: Arc::clone(clock),
                    staging: config.inputs.staging_limits(),
                };
                let name = dind.name.to_string();
                let opened = DindBackend::open(parts).await;
                backends.push(Arc::new(
                    opened.map_err(|source| ServeError::Backend { name, source: source.into() })?,
                ));
            }
            BackendConfig::K8sJob(jobs) => {
                let parts = K8sJobParts {
                    config: (**jobs).clone(),
                    instance: instance.to_owned(),
                    hub: Arc::clone(hub),
                    clock: Arc::clone(clock),
                    staging: config.inputs.staging_limits(),
                    meter: Arc::clone(metrics) as _,
                };
                let name = jobs.name.to_string();
                let opened = K8sJobBackend::open(parts).await;
                backends.push(Arc::new(
                    opened.map_err(|source| ServeError::Backend { name, source: source.into() })?,
                ));
            }
        }
    }
    Ok(backends)
}

/// Who the service is: made once for a data directory, and the same after every restart.
fn instance(data_dir: &Path, ids: &dyn IdGen) -> Result<String, ServeError> {
    let path = data_dir.join(INSTANCE_FILE);
    match fs::read_to_string(&path) {
        Ok(text) if text.trim().len() == 36 => return Ok(text.trim().to_owned()),
        // Cut off by a crash while it was written, so nobody has used it.
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(ServeError::File { what: "read", path, source }),
    }
    let id = ids.run_id().to_string();
    write_whole(&path, format!("{id}\n").as_bytes()).map_err(|source| ServeError::File {
        what: "write",
        path,
        source,
    })?;
    Ok(id)
}

/// Writes aside and renames: a reader sees the whole or nothing.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let aside = path.with_extension("new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&aside, path)?;
    match path.parent() {
        Some(parent) => fs::File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// Says where the service listens, for whoever started it with port 0.
fn write_endpoint(
    data_dir: &Path,
    listen: std::net::SocketAddr,
    ops_listen: std::net::SocketAddr,
) -> Result<(), ServeError> {
    let path = data_dir.join(ENDPOINT_FILE);
    let text = json!({ "listen": listen, "ops_listen": ops_listen, "pid": std::process::id() });
    write_whole(&path, format!("{text}\n").as_bytes()).map_err(|source| ServeError::File {
        what: "write",
        path,
        source,
    })
}

/// The effective configuration, redacted, once.
fn summarise(
    config: &Config,
    data_dir: &Path,
    listen: std::net::SocketAddr,
    ops_listen: std::net::SocketAddr,
) {
    let shown = config.redacted();
    let backends: Vec<String> =
        shown.backends.iter().map(|backend| format!("{} ({})", backend.name(), backend.kind())).collect();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        environment = ?shown.environment,
        %listen,
        %ops_listen,
        data_dir = %data_dir.display(),
        store = shown.store.url.as_deref().unwrap_or("state.db in the data directory"),
        object_store = shown.object_store.url.as_deref().unwrap_or("objects in the data directory"),
        backends = backends.join(", "),
        default_backend = %shown.default_backend,
        live_runs_max = shown.limits.live_runs,
        log_bytes_max = shown.limits.log_bytes.0,
        drain_secs = shown.shutdown.drain.0.as_secs(),
        unauthenticated_callers = shown.unauthenticated_callers.map(UnauthenticatedCallers::as_str),
        "the service is ready; callers are not authenticated"
    );
}

/// Lets the process have as many open files as the system permits: each connection and each workload needs some.
pub fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::warn!(%error, "could not raise the limit of open files");
        }
    }
}

/// An error and everything below it, for people.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut below = error.source();
    while let Some(error) = below {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        below = error.source();
    }
    text
}
