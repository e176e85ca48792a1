//! A service over fakes, on ports of its own.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use runner::{
    blob::Spool,
    config::Config,
    metrics::Metrics,
    server::{bind, bind_for_operators},
    surfaces::{SurfaceParts, Surfaces},
};
use runner_artifacts::blob::BlobSigner;
use runner_core::{
    clock::{Clock, IdGen, SystemClock, SystemIds, Timestamp},
    fake::{
        artifact::MemoryArtifacts,
        backend::{FakeBackend, FakeSubstrate},
        log::MemoryLogs,
        store::MemoryStore,
    },
    limits::Limits,
    service::{Options, Parts, RunService},
};
use runner_proto::v1::{
    self, admin_client::AdminClient, artifacts_client::ArtifactsClient, runner_client::RunnerClient,
};
use tonic::transport::Channel;

/// A clock that a test can move.
#[derive(Debug)]
pub(crate) struct MovedClock {
    real: SystemClock,
    ahead_secs: AtomicU64,
}

impl MovedClock {
    pub(crate) fn advance(&self, by: Duration) {
        self.ahead_secs.fetch_add(by.as_secs(), Ordering::SeqCst);
    }
}

impl Clock for MovedClock {
    fn now(&self) -> Timestamp {
        self.real.now() + Duration::from_secs(self.ahead_secs.load(Ordering::SeqCst))
    }

    fn monotonic(&self) -> Duration {
        self.real.monotonic() + Duration::from_secs(self.ahead_secs.load(Ordering::SeqCst))
    }
}

pub(crate) struct Harness {
    pub(crate) listen: SocketAddr,
    pub(crate) ops_listen: SocketAddr,
    pub(crate) store: Arc<MemoryStore>,
    pub(crate) artifacts: Arc<MemoryArtifacts>,
    pub(crate) clock: Arc<MovedClock>,
    pub(crate) spool: Arc<Spool>,
    pub(crate) surfaces: Surfaces,
    _dir: tempfile::TempDir,
}

impl Harness {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub(crate) async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        change(&mut config);
        let any_port = "127.0.0.1:0".parse().unwrap();
        let listener = bind("listen", "--listen", any_port, None).await.unwrap();
        let ops_listener = bind_for_operators("ops_listen", "--ops-listen", any_port).await.unwrap();
        let clock = Arc::new(MovedClock { real: SystemClock::new(), ahead_secs: AtomicU64::new(0) });
        let as_clock: Arc<dyn Clock> = clock.clone();
        let ids: Arc<dyn IdGen> = Arc::new(SystemIds);
        let store = Arc::new(MemoryStore::new());
        let artifacts = Arc::new(MemoryArtifacts::new());
        let metrics = Arc::new(Metrics::new());
        let name = config.default_backend.clone();
        let service = RunService::start(Parts {
            store: store.clone(),
            logs: Arc::new(MemoryLogs::new()),
            artifacts: artifacts.clone(),
            backends: vec![Arc::new(FakeBackend::over(name.clone(), FakeSubstrate::new()))],
            default_backend: name,
            traffic: None,
            clock: as_clock.clone(),
            ids: ids.clone(),
            limits: Limits::from(&config.limits),
            options: Options::default(),
            meter: metrics.clone(),
        })
        .await
        .unwrap();
        let (listen, ops_listen) = (listener.local_addr().unwrap(), ops_listener.local_addr().unwrap());
        let signer = Arc::new(BlobSigner::open(dir.path(), as_clock.clone()).unwrap());
        let incoming = dir.path().join("incoming");
        let most = config.server.resumable_bytes.0;
        let spool = Arc::new(Spool::open(&incoming, most, as_clock.clone()).unwrap());
        let parts = SurfaceParts {
            service,
            artifacts: artifacts.clone(),
            signer,
            spool: spool.clone(),
            clock: as_clock,
            ids,
            metrics,
            listener,
            ops_listener,
            agents: None,
        };
        let surfaces = Surfaces::start(&config, parts).await.unwrap();
        Self { listen, ops_listen, store, artifacts, clock, spool, surfaces, _dir: dir }
    }

    pub(crate) async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.listen)).unwrap().connect().await.unwrap()
    }

    pub(crate) async fn runner(&self) -> RunnerClient<Channel> {
        RunnerClient::new(self.channel().await)
    }

    pub(crate) async fn artifacts_client(&self) -> ArtifactsClient<Channel> {
        ArtifactsClient::new(self.channel().await)
    }

    pub(crate) async fn admin(&self) -> AdminClient<Channel> {
        AdminClient::new(self.channel().await)
    }
}

/// A spec of the fake's language.
pub(crate) fn spec(program: &[&str]) -> v1::RunSpec {
    v1::RunSpec {
        image: "fake".to_owned(),
        command: program.iter().map(|word| (*word).to_owned()).collect(),
        ..Default::default()
    }
}

pub(crate) fn run_request(spec: v1::RunSpec) -> v1::RunRequest {
    v1::RunRequest { spec: Some(spec), ..Default::default() }
}

/// Fails a test that waits for what does not come.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("in time")
}
