//! The connection to the service.

use std::{sync::Arc, time::Duration};

use runner_core::clock::{IdGen as _, SystemIds};
use runner_proto::agent::{DescribeReply, DescribeRequest, ReportRequest, agent_client::AgentClient};
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};

use super::{Pod, PodError, URL_VARIABLE, direct::Direct, order::Order};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two pings of a connection that is quiet, and how long one may stay unanswered.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// How long a small call may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest message: a specification may have inline inputs.
const MAX_MESSAGE_BYTES: usize = 64 << 20;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Pauses between tries: each up to twice as long as the one before, with jitter, so that a service that comes back is not
/// dialled by all of its agents at once.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
}

impl Backoff {
    pub(super) const fn new() -> Self {
        Self { next: FIRST_PAUSE }
    }

    pub(super) async fn pause(&mut self) {
        let half = self.next / 2;
        let jitter = SystemIds.random() % u64::try_from(half.as_millis()).unwrap_or(u64::MAX).max(1);
        tokio::time::sleep(half + Duration::from_millis(jitter)).await;
        self.next = (self.next * 2).min(LONGEST_PAUSE);
    }
}

/// What a service answers who asks what is to be done.
#[derive(Debug)]
pub(super) struct Described {
    pub(super) order: Order,
    /// Objects may be moved past the service, with these certificates trusted there beside the public authorities, as PEM.
    direct: Option<String>,
}

impl Described {
    /// The way past the service, where there is one.
    pub(super) fn way_past(&self, service: &Service) -> Option<Arc<Direct>> {
        Direct::new(service.clone(), self.direct.as_deref()?)
    }
}

/// The service, with our token on every call. Connects when it is needed, and again after a failure.
#[derive(Debug, Clone)]
pub(super) struct Service {
    client: AgentClient<Channel>,
    bearer: MetadataValue<Ascii>,
    pod: String,
}

impl Service {
    /// The service that this pod dials.
    pub(super) fn new(pod: &Pod) -> Result<Self, PodError> {
        let endpoint = Endpoint::from_shared(pod.url.clone())
            .map_err(|error| PodError::pod(URL_VARIABLE, error))?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true);
        let client = AgentClient::new(endpoint.connect_lazy())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let mut bearer: MetadataValue<Ascii> =
            format!("Bearer {}", pod.token.0).parse().map_err(|error| PodError::pod("the token", error))?;
        bearer.set_sensitive(true);
        Ok(Self { client, bearer, pod: pod.uid.clone() })
    }

    /// A request with the token.
    pub(super) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.bearer.clone());
        request
    }

    pub(super) fn client(&self) -> AgentClient<Channel> {
        self.client.clone()
    }

    /// What is to be done, and how. Waits for a service that is away, or that has not taken the attempt up yet.
    pub(super) async fn describe(&self) -> Result<Described, PodError> {
        let mut backoff = Backoff::new();
        loop {
            let mut request = self.request(DescribeRequest { pod: self.pod.clone() });
            request.set_timeout(CALL_TIMEOUT);
            match self.client().describe(request).await {
                Ok(reply) => {
                    let DescribeReply { order, direct, direct_ca } = reply.into_inner();
                    let order =
                        serde_json::from_slice(&order).map_err(|error| PodError::pod("the order", error))?;
                    return Ok(Described { order, direct: direct.then_some(direct_ca) });
                }
                Err(status) => check(&status)?,
            }
            backoff.pause().await;
        }
    }

    /// Says that staging failed. `false`: nobody heard it.
    pub(super) async fn report(
        &self,
        message: String,
        retryable: bool,
        local: bool,
    ) -> Result<bool, PodError> {
        let mut request = self.request(ReportRequest { message, retryable, local });
        request.set_timeout(CALL_TIMEOUT);
        match self.client().report(request).await {
            Ok(_) => Ok(true),
            Err(status) => check(&status).map(|()| false),
        }
    }
}

/// Whether trying again makes sense.
///
/// # Errors
/// [`PodError::Over`] where it does not.
pub(super) fn check(status: &Status) -> Result<(), PodError> {
    match status.code() {
        // Over; or another pod's.
        Code::Unauthenticated | Code::FailedPrecondition => Err(PodError::Over),
        _ => {
            tracing::debug!(code = ?status.code(), message = status.message(), "the service did not answer");
            Ok(())
        }
    }
}
