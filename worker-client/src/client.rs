//! The connection, and the calls that are one request and one answer.

use std::{sync::Arc, time::Duration};

use runner_proto::v1::{
    self as proto, admin_client::AdminClient, artifacts_client::ArtifactsClient, runner_client::RunnerClient,
};
use tonic::{
    Request,
    transport::{Channel, Endpoint, Uri},
};

use crate::{
    attach::{self, Attachment},
    clock,
    error::{ClientError, ErrorKind},
    http_client::HttpClient,
    outcome::Finished,
    retry::{self, RetryPolicy},
    stream::{Event, EventStream, StreamOptions},
};

/// Largest message that is accepted. A manifest of many files is one message.
const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// Bytes that the service may send ahead of a watcher that does not read: per stream, and per connection.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;

/// Settings of a [`Client`].
#[derive(Debug, Clone)]
pub struct Builder {
    endpoint: String,
    connect_timeout: Duration,
    call_timeout: Duration,
    stall_timeout: Duration,
    keep_alive_interval: Duration,
    keep_alive_timeout: Duration,
    retry: RetryPolicy,
    stream_retry: RetryPolicy,
    user_agent: String,
}

impl Builder {
    fn new(endpoint: String) -> Self {
        Self {
            endpoint,
            connect_timeout: Duration::from_secs(5),
            call_timeout: Duration::from_secs(30),
            stall_timeout: Duration::from_secs(60),
            keep_alive_interval: Duration::from_secs(20),
            keep_alive_timeout: Duration::from_secs(10),
            retry: RetryPolicy::default(),
            // A run may take hours; its watcher outlasts a restart of the service.
            stream_retry: RetryPolicy { max_attempts: 20, ..RetryPolicy::default() },
            user_agent: concat!("worker-client/", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }

    /// Time to make a connection. Default: 5 seconds.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// Time for one try of one call; streams are not limited. Default: 30 seconds.
    #[must_use]
    pub fn call_timeout(mut self, timeout: Duration) -> Self {
        self.call_timeout = timeout;
        self
    }

    /// Time without a byte after which a transfer counts as broken. Default: 60 seconds.
    #[must_use]
    pub fn stall_timeout(mut self, timeout: Duration) -> Self {
        self.stall_timeout = timeout;
        self
    }

    /// How often the connection is probed while a call is open, and how long the answer may take before the
    /// connection counts as broken. Default: 20 and 10 seconds.
    #[must_use]
    pub fn keep_alive(mut self, interval: Duration, timeout: Duration) -> Self {
        self.keep_alive_interval = interval;
        self.keep_alive_timeout = timeout;
        self
    }

    /// How calls and transfers are tried again.
    #[must_use]
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = policy;
        self
    }

    /// How streams are resumed. Tries are counted from the last progress. Default: 20 in a row, more than a minute.
    #[must_use]
    pub fn stream_retry(mut self, policy: RetryPolicy) -> Self {
        self.stream_retry = policy;
        self
    }

    /// What the client calls itself.
    #[must_use]
    pub fn user_agent(mut self, name: impl Into<String>) -> Self {
        self.user_agent = name.into();
        self
    }

    fn endpoint(&self) -> Result<Endpoint, ClientError> {
        let doing = || format!("read the endpoint {:?}", self.endpoint);
        let uri: Uri = self
            .endpoint
            .parse()
            .map_err(|e| ClientError::new(ErrorKind::Invalid, doing(), "is not a URL").with_source(e))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => {
                let message = "TLS is not supported yet; use an http:// endpoint";
                return Err(ClientError::new(ErrorKind::Unsupported, doing(), message));
            }
            _ => {
                let message = "must be http://HOST:PORT";
                return Err(ClientError::new(ErrorKind::Invalid, doing(), message));
            }
        }
        let endpoint = Endpoint::from(uri)
            .user_agent(self.user_agent.as_str())
            .map_err(|e| ClientError::new(ErrorKind::Invalid, "set the user agent", e.to_string()))?;
        Ok(endpoint
            .connect_timeout(self.connect_timeout)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(self.keep_alive_interval)
            .keep_alive_timeout(self.keep_alive_timeout)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES))
    }

    /// Connects. A connection that breaks later is made anew by itself.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] or [`ErrorKind::Unsupported`] for the endpoint's form, [`ErrorKind::Unreachable`] where
    /// nothing answers.
    pub async fn connect(self) -> Result<Client, ClientError> {
        let endpoint = self.endpoint()?;
        let doing = format!("connect to {}", self.endpoint);
        let connecting = tokio::time::timeout(self.connect_timeout, endpoint.connect());
        match connecting.await {
            Ok(Ok(channel)) => self.client(channel, &endpoint),
            Ok(Err(error)) => Err(ClientError::connect(doing, error)),
            Err(_) => {
                let message = format!("no answer within {:?}", self.connect_timeout);
                Err(ClientError::new(ErrorKind::Unreachable, doing, message))
            }
        }
    }

    /// Makes a client that connects with its first call.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] or [`ErrorKind::Unsupported`] for the endpoint's form.
    pub fn connect_lazy(self) -> Result<Client, ClientError> {
        let endpoint = self.endpoint()?;
        let channel = endpoint.connect_lazy();
        self.client(channel, &endpoint)
    }

    fn client(self, channel: Channel, endpoint: &Endpoint) -> Result<Client, ClientError> {
        let http = HttpClient::new(endpoint.uri(), self.connect_timeout, self.stall_timeout)?;
        Ok(Client { shared: Arc::new(Shared { channel, http, settings: self }) })
    }
}

#[derive(Debug)]
struct Shared {
    channel: Channel,
    http: HttpClient,
    settings: Builder,
}

/// A connection to the service. Cheap to clone; clones share the connection.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

/// How a run is named.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RunOptions {
    /// A UUID. `None`: the client chooses one, unless there is a key.
    pub run_id: Option<String>,
    /// Any text of up to 255 bytes. A run that has it already and the same spec is answered instead of a new one.
    pub idempotency_key: Option<String>,
}

impl Client {
    /// Connects with default settings.
    ///
    /// # Errors
    /// See [`Builder::connect`].
    pub async fn connect(endpoint: impl Into<String>) -> Result<Self, ClientError> {
        Self::builder(endpoint).connect().await
    }

    /// Settings for an endpoint `http://HOST:PORT`.
    pub fn builder(endpoint: impl Into<String>) -> Builder {
        Builder::new(endpoint.into())
    }

    /// The endpoint that the client talks to.
    pub fn endpoint(&self) -> &str {
        &self.shared.settings.endpoint
    }

    pub(crate) fn runner(&self) -> RunnerClient<Channel> {
        RunnerClient::new(self.shared.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    pub(crate) fn admin(&self) -> AdminClient<Channel> {
        AdminClient::new(self.shared.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    pub(crate) fn artifacts(&self) -> ArtifactsClient<Channel> {
        ArtifactsClient::new(self.shared.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    pub(crate) fn http(&self) -> &HttpClient {
        &self.shared.http
    }

    pub(crate) fn retry_policy(&self) -> RetryPolicy {
        self.shared.settings.retry
    }

    pub(crate) fn stream_retry_policy(&self) -> RetryPolicy {
        self.shared.settings.stream_retry
    }

    pub(crate) fn call_timeout(&self) -> Duration {
        self.shared.settings.call_timeout
    }

    /// A request with the time-out of one try.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.shared.settings.call_timeout);
        request
    }

    /// Starts a run. When it answers, the run is durable.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with a violation per bad field; [`ErrorKind::Exhausted`] above a limit.
    pub async fn run(&self, spec: impl Into<proto::RunSpec>) -> Result<RunHandle, ClientError> {
        self.run_with(spec, RunOptions::default()).await
    }

    /// Starts a run under an id or a key of the caller.
    ///
    /// # Errors
    /// As [`Client::run`], and [`ErrorKind::AlreadyExists`] where the id or key has a run with another spec.
    pub async fn run_with(
        &self,
        spec: impl Into<proto::RunSpec>,
        options: RunOptions,
    ) -> Result<RunHandle, ClientError> {
        let key = options.idempotency_key.unwrap_or_default();
        // Without a key, an id of our own makes the repeat after a lost answer find the first try's run.
        let fresh = options.run_id.is_none() && key.is_empty();
        let run_id = match options.run_id {
            Some(id) => id,
            None if fresh => clock::run_id(),
            None => String::new(),
        };
        let message = proto::RunRequest { spec: Some(spec.into()), run_id, idempotency_key: key };
        let response = retry::idempotent(self.retry_policy(), || {
            let (mut grpc, request) = (self.runner(), self.request(message.clone()));
            async move { grpc.run(request).await.map_err(|e| ClientError::status("start the run", e)) }
        })
        .await?
        .into_inner();
        let run = response.run.ok_or_else(|| no_run("start the run"))?;
        // Nobody else knows a fresh id: where it exists already, an earlier try of this call made it.
        Ok(RunHandle { client: self.clone(), created: response.created || fresh, run })
    }

    /// Runs to the end, and hands every event to `on_event` as it comes.
    ///
    /// A run that fails is not an error: see [`Finished`].
    ///
    /// # Errors
    /// Those of [`Client::run`] and [`Client::stream`]. In the latter case the run goes on.
    pub async fn run_to_end(
        &self,
        spec: impl Into<proto::RunSpec>,
        mut on_event: impl FnMut(&Event),
    ) -> Result<Finished, ClientError> {
        let handle = self.run(spec).await?;
        let mut events = handle.stream();
        while let Some(event) = events.next().await {
            let event = event?.event;
            on_event(&event);
            if let Event::Terminated(terminated) = event {
                return Ok(Finished::new(handle.id(), terminated));
            }
        }
        Err(ClientError::new(ErrorKind::Protocol, "follow the run", "the stream ended before the run did"))
    }

    /// Follows a run: first what has happened since the cursor, then what happens, to the terminal event.
    ///
    /// Nothing is sent before the stream is polled.
    pub fn stream(&self, run_id: impl Into<String>, options: StreamOptions) -> EventStream {
        EventStream::new(self.clone(), run_id.into(), options)
    }

    /// Asks for the end of a run. Idempotent. Returns once the intent is durable; the end itself is the terminal event.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]. A run that has ended already is no error: it is answered as it is.
    pub async fn cancel(
        &self,
        run_id: impl Into<String>,
        reason: impl Into<String>,
    ) -> Result<proto::Run, ClientError> {
        const DOING: &str = "cancel the run";
        let message = proto::CancelRequest { run_id: run_id.into(), reason: reason.into() };
        let response = retry::idempotent(self.retry_policy(), || {
            let (mut grpc, request) = (self.runner(), self.request(message.clone()));
            async move { grpc.cancel(request).await.map_err(|e| ClientError::status(DOING, e)) }
        });
        response.await?.into_inner().run.ok_or_else(|| no_run(DOING))
    }

    /// A run with its spec, attempts and outcome.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub async fn get(&self, run_id: impl Into<String>) -> Result<proto::Run, ClientError> {
        const DOING: &str = "get the run";
        let message = proto::GetRequest { run_id: run_id.into() };
        let response = retry::idempotent(self.retry_policy(), || {
            let (mut grpc, request) = (self.runner(), self.request(message.clone()));
            async move { grpc.get(request).await.map_err(|e| ClientError::status(DOING, e)) }
        });
        response.await?.into_inner().run.ok_or_else(|| no_run(DOING))
    }

    /// Removes a run that has ended, with its log and everything that it stored. When it answers, nothing of it is left.
    ///
    /// # Errors
    /// [`ErrorKind::FailedPrecondition`] where it has not ended; [`ErrorKind::NotFound`], also where it was removed before.
    pub async fn delete(&self, run_id: impl Into<String>) -> Result<(), ClientError> {
        const DOING: &str = "delete the run";
        let message = proto::DeleteRequest { run_id: run_id.into() };
        let mut tries = 0;
        let response = retry::idempotent(self.retry_policy(), || {
            tries += 1;
            let (mut grpc, request) = (self.runner(), self.request(message.clone()));
            async move { grpc.delete(request).await.map_err(|e| ClientError::status(DOING, e)) }
        });
        match response.await {
            Ok(_) => Ok(()),
            // The try before did it; its answer was lost.
            Err(error) if error.kind() == ErrorKind::NotFound && tries > 1 => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Opens the input side of a run whose spec asked for `stdin` or `terminal`. Its output comes from
    /// [`Client::stream`]. Returns when the run takes input; a run that waits in the queue is waited for.
    ///
    /// The one call that is never repeated: input that was sent twice would be read twice.
    ///
    /// # Errors
    /// [`ErrorKind::FailedPrecondition`] where the run takes no input, or none any more.
    pub async fn attach(&self, run_id: impl Into<String>) -> Result<Attachment, ClientError> {
        attach::open(self, run_id.into()).await
    }
}

fn no_run(doing: &str) -> ClientError {
    ClientError::new(ErrorKind::Protocol, doing, "the answer holds no run")
}

/// A run that was started.
#[derive(Debug, Clone)]
pub struct RunHandle {
    client: Client,
    run: proto::Run,
    created: bool,
}

impl RunHandle {
    /// The run's id.
    pub fn id(&self) -> &str {
        &self.run.run_id
    }

    /// The run as it was when it was accepted.
    pub fn run(&self) -> &proto::Run {
        &self.run
    }

    /// Whether this call made it. False where the id or key had it already.
    pub fn created(&self) -> bool {
        self.created
    }

    /// Follows it from the beginning.
    pub fn stream(&self) -> EventStream {
        self.client.stream(self.id(), StreamOptions::default())
    }

    /// Waits for its end, without its log.
    ///
    /// # Errors
    /// Those of [`Client::stream`].
    pub async fn wait(&self) -> Result<Finished, ClientError> {
        let mut events = self.client.stream(self.id(), StreamOptions::default().without_logs());
        while let Some(event) = events.next().await {
            if let Event::Terminated(terminated) = event?.event {
                return Ok(Finished::new(self.id(), terminated));
            }
        }
        Err(ClientError::new(ErrorKind::Protocol, "wait for the run", "the stream ended before the run did"))
    }

    /// Asks for its end. See [`Client::cancel`].
    ///
    /// # Errors
    /// Those of [`Client::cancel`].
    pub async fn cancel(&self, reason: impl Into<String>) -> Result<proto::Run, ClientError> {
        self.client.cancel(self.id(), reason).await
    }

    /// The run as it is now. See [`Client::get`].
    ///
    /// # Errors
    /// Those of [`Client::get`].
    pub async fn get(&self) -> Result<proto::Run, ClientError> {
        self.client.get(self.id()).await
    }

    /// Opens its input side. See [`Client::attach`].
    ///
    /// # Errors
    /// Those of [`Client::attach`].
    pub async fn attach(&self) -> Result<Attachment, ClientError> {
        self.client.attach(self.id()).await
    }
}
