//! The gRPC surface: `Runner`, `Artifacts`, `Admin`, health and reflection.

mod admin;
mod artifact_space;
mod artifacts;
mod attach;
mod runner;
mod watch;

use std::sync::Arc;

use runner_artifacts::blob::BlobSigner;
use runner_core::{
    artifact::ArtifactStore,
    clock::{Clock, IdGen},
    limits::Limits,
    service::RunService,
};
use runner_proto::v1::{
    admin_server::AdminServer, artifacts_server::ArtifactsServer, runner_server::RunnerServer,
};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{auth::Authenticator, config::ServerConfig};

/// What the calls share.
#[derive(Debug, Clone)]
pub struct Api {
    /// The service behind the surface.
    pub service: Arc<RunService>,
    /// Where uploads are.
    pub artifacts: Arc<dyn ArtifactStore>,
    /// Mints URLs.
    pub signer: Arc<BlobSigner>,
    /// For the expiry of URLs.
    pub clock: Arc<dyn Clock>,
    /// For the names of uploads.
    pub ids: Arc<dyn IdGen>,
    /// Who calls.
    pub auth: Authenticator,
    /// What a spec may ask for.
    pub limits: Arc<Limits>,
    /// What a call may cost.
    pub config: Arc<ServerConfig>,
    /// Whether callers get URLs of the object store itself.
    pub direct_urls: bool,
    /// Cancelled: streams end with a status that says so.
    pub draining: CancellationToken,
}

const SERVICES: [&str; 4] = ["", "runner.v1.Runner", "runner.v1.Artifacts", "runner.v1.Admin"];

/// Says what is healthy, in the standard way.
#[derive(Debug, Clone)]
pub struct Health(HealthReporter);

impl Health {
    /// Sets the status of every service.
    pub async fn set(&self, serving: bool) {
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        for name in SERVICES {
            self.0.set_service_status(name, status).await;
        }
    }
}

/// The routes of the gRPC surface, and the switch of its health. Not serving at first.
///
/// # Errors
/// Where the descriptors of the contract do not decode, which the tests of `runner-proto` exclude.
pub async fn routes(api: Api) -> Result<(Routes, Health), tonic_reflection::server::Error> {
    let max = usize::try_from(api.config.max_request_bytes.0).unwrap_or(usize::MAX);
    let (reporter, health_server) = tonic_health::server::health_reporter();
    let health = Health(reporter);
    health.set(false).await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(runner_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let api = Arc::new(api);
    let routes = Routes::new(RunnerServer::from_arc(Arc::clone(&api)).max_decoding_message_size(max))
        .add_service(ArtifactsServer::from_arc(Arc::clone(&api)).max_decoding_message_size(max))
        .add_service(AdminServer::from_arc(api).max_decoding_message_size(max))
        .add_service(health_server)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?);
    Ok((routes, health))
}
