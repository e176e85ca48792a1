//! The surface that agents dial: gRPC `runner.agent.v1`, on a port of its own.
//!
//! Unlike the callers' port it may be reached from elsewhere, because every call on it is authenticated: by the token of one
//! attempt, which is worth nothing once that attempt is over, and permits that attempt's own objects only ([`scope`]).

pub mod key;
mod objects;
pub mod scope;
mod talk;

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use axum::Router;
use futures::{StreamExt as _, stream::BoxStream};
use runner_core::{
    agent::{AgentHub, AgentOrder, StagingReport},
    artifact::ArtifactStore,
    id::AttemptId,
    service::RunService,
    task::{TaskKind, spawn},
};
use runner_proto::agent::{
    self as wire,
    agent_server::{Agent, AgentServer},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, service::Routes};

use crate::metrics::Metrics;

/// Largest message of an agent. One of a log's stretches has half a mebibyte.
const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Longest text of a report that is kept.
const MAX_REPORT_BYTES: usize = 4096;

/// Which attempts are not over.
#[async_trait]
pub trait LiveAttempts: fmt::Debug + Send + Sync + 'static {
    /// Whether this one is the last of its run, and the run is not over.
    ///
    /// # Errors
    /// Where it cannot be told now.
    async fn is_live(&self, attempt: AttemptId) -> Result<bool, Box<dyn std::error::Error + Send + Sync>>;
}

#[async_trait]
impl LiveAttempts for RunService {
    async fn is_live(&self, attempt: AttemptId) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.is_live_attempt(attempt).await?)
    }
}

/// The surface.
#[derive(Debug)]
pub struct Agents {
    /// Where agents and backends meet.
    pub hub: Arc<AgentHub>,
    /// Whose token is still worth something.
    pub live: Arc<dyn LiveAttempts>,
    /// Where agents may move objects past the service. `None`: nowhere.
    pub direct: Option<Direct>,
    /// What is measured.
    pub metrics: Arc<Metrics>,
    /// Cancelled: channels end, and agents dial again.
    pub draining: CancellationToken,
}

/// How agents move objects past the service.
#[derive(Debug)]
pub struct Direct {
    /// Signs requests to the store that are good where agents are.
    pub store: Arc<dyn ArtifactStore>,
    /// How long a request may be begun.
    pub lifetime: Duration,
    /// Certificates to trust there beside the public authorities, as PEM. Empty: none.
    pub ca_pem: String,
}

/// The routes of the surface.
pub fn router(agents: Agents) -> Router {
    let server = AgentServer::new(agents)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    Routes::new(server).into_axum_router().with_state(())
}

impl Agents {
    /// Whose call it is.
    async fn who<T>(&self, request: &Request<T>) -> Result<AttemptId, Status> {
        let refused = || Status::unauthenticated("no token of a live attempt");
        if self.draining.is_cancelled() {
            return Err(Status::unavailable("the service is shutting down"));
        }
        let token = request
            .metadata()
            .get("authorization")
            .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "))
            .ok_or_else(refused)?;
        let attempt = self.hub.verify(token).ok_or_else(refused)?;
        match self.live.is_live(attempt).await {
            Ok(true) => Ok(attempt),
            Ok(false) => Err(refused()),
            Err(error) => {
                tracing::warn!(%attempt, %error, "could not tell whether an agent's attempt is live");
                Err(Status::unavailable("whether the attempt is live cannot be told now"))
            }
        }
    }

    /// The order of whose call it is.
    async fn order<T>(&self, request: &Request<T>) -> Result<AgentOrder, Status> {
        let attempt = self.who(request).await?;
        self.hub.order(attempt).ok_or_else(|| Status::unavailable("the attempt is not taken up yet"))
    }
}

#[tonic::async_trait]
impl Agent for Agents {
    type ServeStream = BoxStream<'static, Result<wire::Ask, Status>>;
    type ReadObjectStream = objects::Reading;

    async fn describe(
        &self,
        request: Request<wire::DescribeRequest>,
    ) -> Result<Response<wire::DescribeReply>, Status> {
        let AgentOrder { attempt, order } = self.order(&request).await?;
        let pod = &request.get_ref().pod;
        if !self.hub.claim(attempt.attempt, pod) {
            tracing::warn!(attempt = %attempt.attempt, pod, "a second pod would execute an attempt");
            return Err(Status::failed_precondition("another pod executes this attempt"));
        }
        let (direct, direct_ca) = match &self.direct {
            Some(direct) => (true, direct.ca_pem.clone()),
            None => (false, String::new()),
        };
        Ok(Response::new(wire::DescribeReply { order, direct, direct_ca }))
    }

    async fn report(
        &self,
        request: Request<wire::ReportRequest>,
    ) -> Result<Response<wire::ReportReply>, Status> {
        let attempt = self.who(&request).await?;
        let wire::ReportRequest { mut message, retryable, local } = request.into_inner();
        message.truncate(message.floor_char_boundary(MAX_REPORT_BYTES));
        tracing::info!(%attempt, message, retryable, "an agent could not stage its inputs");
        self.hub.report(attempt, StagingReport { message, retryable, local });
        Ok(Response::new(wire::ReportReply {}))
    }

    async fn serve(
        &self,
        request: Request<Streaming<wire::Answer>>,
    ) -> Result<Response<Self::ServeStream>, Status> {
        let attempt = self.who(&request).await?;
        let session = self.hub.connect(attempt);
        let answers = session.answers();
        let mut incoming = request.into_inner();
        let gone = CancellationToken::new();
        let reader_gone = gone.clone();
        tracing::debug!(%attempt, "an agent is connected");
        let reader = spawn(TaskKind::Call, "agent.answers", async move {
            // Ends the asking when the agent says no more, however that comes.
            let _gone = reader_gone.drop_guard();
            while let Ok(Some(answer)) = incoming.message().await {
                match talk::answer(answer) {
                    Ok((id, answer)) => answers.take(id, answer),
                    Err(fault) => {
                        tracing::warn!(%attempt, fault, "an agent's answer is malformed");
                        return;
                    }
                }
            }
        });
        let state = (session, EndReader(reader.abort_handle()), gone, self.draining.clone());
        let asks = futures::stream::unfold(state, |(mut session, reader, gone, draining)| async move {
            let asking = tokio::select! {
                asking = session.next() => asking?,
                () = gone.cancelled() => return None,
                () = draining.cancelled() => return None,
            };
            Some((Ok(talk::ask(asking)), (session, reader, gone, draining)))
        });
        Ok(Response::new(asks.boxed()))
    }

    async fn head_object(
        &self,
        request: Request<wire::HeadObjectRequest>,
    ) -> Result<Response<wire::HeadObjectReply>, Status> {
        let order = self.order(&request).await?;
        let key = objects::readable(&order.attempt, &request.get_ref().key).await?;
        let meta = order.attempt.artifacts.head(&key).await.map_err(objects::failed)?;
        Ok(Response::new(wire::HeadObjectReply { size: meta.size }))
    }

    async fn read_object(
        &self,
        request: Request<wire::ReadObjectRequest>,
    ) -> Result<Response<Self::ReadObjectStream>, Status> {
        let order = self.order(&request).await?;
        let wire::ReadObjectRequest { key, from, to } = request.into_inner();
        let key = objects::readable(&order.attempt, &key).await?;
        let (meta, bytes) = order.attempt.artifacts.get(&key, from..to).await.map_err(objects::failed)?;
        Ok(Response::new(objects::reading(meta.size, bytes, Arc::clone(&self.metrics))))
    }

    async fn write_object(
        &self,
        request: Request<Streaming<wire::WriteObjectRequest>>,
    ) -> Result<Response<wire::WriteObjectReply>, Status> {
        let order = self.order(&request).await?;
        let size = objects::write(&order.attempt, request.into_inner(), Arc::clone(&self.metrics)).await?;
        Ok(Response::new(wire::WriteObjectReply { size }))
    }

    async fn delete_object(
        &self,
        request: Request<wire::DeleteObjectRequest>,
    ) -> Result<Response<wire::DeleteObjectReply>, Status> {
        let order = self.order(&request).await?;
        let key = objects::writable(&order.attempt, &request.get_ref().key)?;
        order.attempt.artifacts.delete(&key).await.map_err(objects::failed)?;
        Ok(Response::new(wire::DeleteObjectReply {}))
    }

    async fn sign_object(
        &self,
        request: Request<wire::SignObjectRequest>,
    ) -> Result<Response<wire::SignObjectReply>, Status> {
        let order = self.order(&request).await?;
        let Some(direct) = &self.direct else { return Ok(Response::new(wire::SignObjectReply::default())) };
        let reply = objects::sign(&order.attempt, direct, request.get_ref()).await?;
        if !reply.url.is_empty() {
            self.metrics.agent_url(if request.get_ref().upload.is_some() { "PUT" } else { "GET" });
        }
        Ok(Response::new(reply))
    }
}

struct EndReader(tokio::task::AbortHandle);

impl Drop for EndReader {
    fn drop(&mut self) {
        self.0.abort();
    }
}
