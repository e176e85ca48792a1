//! The running surfaces: both ports, the health that they report, and how they end.

use std::{collections::HashSet, sync::Arc, time::Duration};

use runner_artifacts::blob::BlobSigner;
use runner_core::{
    agent::AgentHub,
    artifact::ArtifactStore,
    clock::{Clock, IdGen},
    service::RunService,
    task::{self, TaskKind},
};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{
    agents::{self, Agents, Direct},
    auth::Authenticator,
    blob,
    config::Config,
    grpc::{self, Health},
    metrics::Metrics,
    ops::{self, ReadyProbe},
    server::Server,
};

/// How often the standard health service is brought up to date.
const HEALTH_INTERVAL: Duration = Duration::from_secs(5);

/// How often uploads are looked for that nobody resumed.
const SPOOL_INTERVAL: Duration = Duration::from_secs(600);

/// What the surfaces are made of.
#[derive(Debug)]
pub struct SurfaceParts {
    /// The service behind them.
    pub service: Arc<RunService>,
    /// The object store.
    pub artifacts: Arc<dyn ArtifactStore>,
    /// Mints and checks URLs.
    pub signer: Arc<BlobSigner>,
    /// What has come of uploads that may be resumed.
    pub spool: Arc<blob::Spool>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Names of uploads.
    pub ids: Arc<dyn IdGen>,
    /// What is measured.
    pub metrics: Arc<Metrics>,
    /// gRPC and blobs.
    pub listener: TcpListener,
    /// Health and metrics.
    pub ops_listener: TcpListener,
    /// Agents, where there is a backend that has some.
    pub agents: Option<AgentParts>,
}

/// What the agents' surface is made of.
#[derive(Debug)]
pub struct AgentParts {
    /// Where they dial.
    pub listener: TcpListener,
    /// Where they meet their backends.
    pub hub: Arc<AgentHub>,
    /// Where they may move objects past the service.
    pub direct: Option<Direct>,
}

/// Both ports, being served.
#[derive(Debug)]
pub struct Surfaces {
    service: Arc<RunService>,
    clock: Arc<dyn Clock>,
    health: Health,
    draining: CancellationToken,
    abort: CancellationToken,
    stop_ops: CancellationToken,
    abort_ops: CancellationToken,
    api: JoinHandle<Option<()>>,
    ops: JoinHandle<Option<()>>,
    agents: Option<JoinHandle<Option<()>>>,
}

impl Surfaces {
    /// Serves on both listeners.
    ///
    /// # Errors
    /// Where the contract's descriptors do not decode, which the tests of `runner-proto` exclude.
    pub async fn start(
        config: &Config,
        parts: SurfaceParts,
    ) -> Result<Self, tonic_reflection::server::Error> {
        let SurfaceParts {
            service,
            artifacts,
            signer,
            spool,
            clock,
            ids,
            metrics,
            listener,
            ops_listener,
            agents,
        } = parts;
        let draining = CancellationToken::new();
        let abort = CancellationToken::new();
        let stop_ops = CancellationToken::new();
        let abort_ops = CancellationToken::new();
        let api = grpc::Api {
            service: Arc::clone(&service),
            artifacts: Arc::clone(&artifacts),
            signer: Arc::clone(&signer),
            clock: Arc::clone(&clock),
            ids,
            auth: Authenticator::unauthenticated(config.unauthenticated_roles.clone()),
            limits: Arc::new(config.run_limits()),
            config: Arc::new(config.server.clone()),
            direct_urls: config.object_store.direct_urls,
            draining: draining.clone(),
        };
        let (routes, health) = grpc::routes(api).await?;
        let blobs = blob::Blobs {
            store: artifacts,
            signer,
            metrics: Arc::clone(&metrics),
            read_timeout: config.server.read_timeout.0,
            max_upload_bytes: config.server.max_upload_bytes.0,
            draining: draining.clone(),
            spool: Arc::clone(&spool),
            writing: Arc::new(std::sync::Mutex::new(HashSet::new())),
        };
        let router =
            routes.into_axum_router().merge(blob::router(blobs)).fallback(nothing_here).with_state(());
        let probe = Arc::new(ReadyProbe::new(Arc::clone(&service), Arc::clone(&clock), draining.clone()));
        let server = Server {
            name: "api",
            config: config.server.clone(),
            metrics: Arc::clone(&metrics),
            draining: draining.clone(),
            abort: abort.clone(),
        };
        let agents = agents.map(|AgentParts { listener, hub, direct }| {
            let surface = Agents {
                hub,
                live: Arc::clone(&service) as _,
                direct,
                metrics: Arc::clone(&metrics),
                draining: draining.clone(),
            };
            let server = Server { name: "agents", ..server.clone() };
            task::spawn(TaskKind::Loop, "agents", server.serve(listener, agents::router(surface)))
        });
        let ops_server =
            Server { name: "ops", draining: stop_ops.clone(), abort: abort_ops.clone(), ..server.clone() };
        task::spawn(
            TaskKind::Loop,
            "health",
            report_health(health.clone(), Arc::clone(&probe), draining.clone()),
        );
        let idle = config.server.resumable_idle.0;
        task::spawn(TaskKind::Loop, "spool", sweep_spool(spool, idle, draining.clone()));
        let api = task::spawn(TaskKind::Loop, "api", server.serve(listener, router));
        let ops =
            task::spawn(TaskKind::Loop, "ops", ops_server.serve(ops_listener, ops::router(probe, metrics)));
        Ok(Self { service, clock, health, draining, abort, stop_ops, abort_ops, api, ops, agents })
    }

    /// Stops within `drain`: no new connection; streams end with `UNAVAILABLE`, so that clients connect again; calls under
    /// way end; then the service stops driving. Workloads live on. What does not end in time is dropped.
    pub async fn stop(self, drain: Duration) {
        let start = self.clock.monotonic();
        self.health.set(false).await;
        self.draining.cancel();
        // A quarter is kept for the service itself.
        if tokio::time::timeout(drain.mul_f64(0.75), self.api).await.is_err() {
            tracing::warn!("connections that did not end in time are dropped");
        }
        self.abort.cancel();
        // Their connections are dropped now; they dial again.
        if let Some(agents) = self.agents
            && agents.await.is_err()
        {
            tracing::error!("the task of the agents' port was lost");
        }
        let left = drain.saturating_sub(self.clock.monotonic().saturating_sub(start));
        if tokio::time::timeout(left, self.service.shutdown()).await.is_err() {
            tracing::warn!("work that did not end in time is given up; the next start takes it up again");
        }
        // The last to go: until here it says that the service is not ready.
        self.stop_ops.cancel();
        self.abort_ops.cancel();
        if self.ops.await.is_err() {
            tracing::error!("the task of the operators' port was lost");
        }
    }
}

/// An answer in the words of whoever asked: gRPC's own, or HTTP's.
async fn nothing_here(headers: http::HeaderMap) -> http::Response<axum::body::Body> {
    let grpc = headers
        .get(http::header::CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
    if grpc {
        return tonic::Status::unimplemented("there is no such method").into_http();
    }
    let mut response = http::Response::new(axum::body::Body::from(
        "there is nothing here; see /healthz on the other port\n",
    ));
    *response.status_mut() = http::StatusCode::NOT_FOUND;
    response
}

/// Forgets uploads that nobody resumed in time.
async fn sweep_spool(spool: Arc<blob::Spool>, idle: Duration, draining: CancellationToken) {
    loop {
        let swept = Arc::clone(&spool);
        match tokio::task::spawn_blocking(move || swept.sweep(idle)).await {
            Ok(Ok(0)) | Err(_) => {}
            Ok(Ok(uploads)) => tracing::info!(uploads, "forgot uploads that nobody resumed"),
            Ok(Err(error)) => tracing::warn!(%error, "uploads that nobody resumed cannot be forgotten"),
        }
        tokio::select! {
            () = tokio::time::sleep(SPOOL_INTERVAL) => {}
            () = draining.cancelled() => return,
        }
    }
}

async fn report_health(health: Health, probe: Arc<ReadyProbe>, draining: CancellationToken) {
    loop {
        let ready = probe.check().await.ready;
        if draining.is_cancelled() {
            return;
        }
        health.set(ready).await;
        tokio::select! {
            () = tokio::time::sleep(HEALTH_INTERVAL) => {}
            () = draining.cancelled() => return,
        }
    }
}
