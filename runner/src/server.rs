//! Listening, and what a connection may cost: how many there are, how many calls each has, how slow each may be.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{Router, body::Body};
use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use runner_core::task::{self, TaskKind};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Sleep,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;

use crate::{
    auth::{BeyondLoopback, reachable},
    config::{ServerConfig, UnauthenticatedCallers},
    metrics::Metrics,
};

/// HTTP/2's connection preface. Whoever has not said so much says nothing.
const PREFACE_BYTES: usize = 24;
/// What a client may send ahead on one call, and on one connection.
const STREAM_WINDOW: u32 = 128 * 1024;
const CONNECTION_WINDOW: u32 = 256 * 1024;

/// Why there is no listener.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Others could reach it.
    #[error(transparent)]
    BeyondLoopback(#[from] BeyondLoopback),
    /// Somebody listens there.
    #[error(
        "{address} ({key}) is in use: another service listens there, perhaps another `runner serve`; choose another address with {flag}"
    )]
    InUse {
        /// The configuration's key.
        key: &'static str,
        /// The flag.
        flag: &'static str,
        /// The address.
        address: SocketAddr,
    },
    /// Anything else.
    #[error("listen on {address} ({key})")]
    Failed {
        /// The configuration's key.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
}

/// Listens for callers: on loopback, or where the operator says that whoever reaches the port is trusted.
///
/// # Errors
/// See [`BindError`].
pub async fn bind(
    key: &'static str,
    flag: &'static str,
    address: SocketAddr,
    callers: Option<UnauthenticatedCallers>,
) -> Result<TcpListener, BindError> {
    reachable(key, address, callers)?;
    listen(key, flag, address).await
}

/// Listens for operators, on any address: whoever is served there learns whether the service is well and what it counts. They change
/// nothing, read nothing of a run, and cost no more than the table `server` allows.
///
/// # Errors
/// See [`BindError`].
pub async fn bind_for_operators(
    key: &'static str,
    flag: &'static str,
    address: SocketAddr,
) -> Result<TcpListener, BindError> {
    listen(key, flag, address).await
}

/// Listens on any address: whoever is served there must prove who they are on every call.
///
/// # Errors
/// See [`BindError`].
pub async fn bind_for_agents(
    key: &'static str,
    flag: &'static str,
    address: SocketAddr,
) -> Result<TcpListener, BindError> {
    listen(key, flag, address).await
}

async fn listen(
    key: &'static str,
    flag: &'static str,
    address: SocketAddr,
) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => BindError::InUse { key, flag, address },
        _ => BindError::Failed { key, address, source },
    })
}

/// Serves HTTP/1.1 and HTTP/2 with prior knowledge on one listener.
#[derive(Debug, Clone)]
pub struct Server {
    /// For logs and metrics.
    pub name: &'static str,
    /// What a client may cost.
    pub config: ServerConfig,
    /// Where connections are counted.
    pub metrics: Arc<Metrics>,
    /// Cancelled: no new connection, no new call; calls under way go on.
    pub draining: CancellationToken,
    /// Cancelled: every connection is dropped.
    pub abort: CancellationToken,
}

impl Server {
    /// Serves until it is drained and every connection is closed, or until it is aborted.
    pub async fn serve(self, listener: TcpListener, router: Router) {
        let connections = Arc::new(Semaphore::new(self.config.max_connections as usize));
        // Twice as many calls as connections: HTTP/2 clients need few connections, HTTP/1 clients one for each call.
        let calls = Arc::new(Semaphore::new(self.config.max_connections as usize * 2));
        let tracker = TaskTracker::new();
        let server = Arc::new(self);
        loop {
            let permit = tokio::select! {
                () = server.draining.cancelled() => break,
                permit = Arc::clone(&connections).acquire_owned() => permit,
            };
            // The semaphore is never closed.
            let Ok(permit) = permit else { break };
            let accepted = tokio::select! {
                () = server.draining.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let connection =
                        Arc::clone(&server).connection(stream, router.clone(), Arc::clone(&calls), permit);
                    task::spawn(TaskKind::Call, "connection", tracker.track_future(connection));
                }
                Err(error) => {
                    // Mostly: no file descriptors left. Those that are open go on, and give some back.
                    tracing::warn!(listener = server.name, %error, "could not accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
        drop(listener);
        tracker.close();
        tracker.wait().await;
    }

    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        router: Router,
        calls: Arc<Semaphore>,
        _permit: OwnedSemaphorePermit,
    ) {
        let _counted = Counted::new(self.name, &self.metrics);
        // Small frames go at once; the kernel's delay would double the latency of each call.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(listener = self.name, %error, "could not set TCP_NODELAY");
        }
        let io =
            TokioIo::new(TimedIo::new(stream, self.config.read_timeout.0, self.config.keep_alive_timeout.0));
        let service = hyper::service::service_fn(move |request: Request<Incoming>| {
            let router = router.clone();
            let permit = Arc::clone(&calls).try_acquire_owned();
            async move {
                match permit {
                    Ok(permit) => {
                        let response = match router.oneshot(request.map(Body::new)).await {
                            Ok(response) => response,
                            Err(impossible) => match impossible {},
                        };
                        Ok::<_, Infallible>(response.map(|body| CountedBody { body, _permit: Some(permit) }))
                    }
                    Err(_) => {
                        let refused = |()| CountedBody { body: Body::empty(), _permit: None };
                        Ok(too_many_calls(&request).map(refused))
                    }
                }
            }
        });
        let builder = self.builder();
        let connection = builder.serve_connection(io, service);
        tokio::pin!(connection);
        let ended = tokio::select! {
            () = self.abort.cancelled() => return,
            ended = connection.as_mut() => Some(ended),
            () = self.draining.cancelled() => None,
        };
        let ended = match ended {
            Some(ended) => ended,
            None => {
                connection.as_mut().graceful_shutdown();
                tokio::select! {
                    () = self.abort.cancelled() => return,
                    ended = connection.as_mut() => ended,
                }
            }
        };
        if let Err(error) = ended {
            // Clients go away as they like.
            tracing::debug!(listener = self.name, error = %error, "a connection ended with an error");
        }
    }

    fn builder(&self) -> auto::Builder<TokioExecutor> {
        let config = &self.config;
        let bytes = |size: u64| usize::try_from(size).unwrap_or(usize::MAX);
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(config.read_timeout.0)
            .max_buf_size(bytes(config.max_header_bytes.0).max(64 * 1024));
        builder
            .http2()
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(config.max_streams_per_connection)
            .max_header_list_size(u32::try_from(config.max_header_bytes.0).unwrap_or(u32::MAX))
            .max_send_buf_size(bytes(config.send_buffer_bytes.0))
            .keep_alive_interval(config.keep_alive_interval.0)
            .keep_alive_timeout(config.keep_alive_timeout.0);
        builder
    }
}

/// An answer in the words of whoever asked: gRPC or plain HTTP.
fn too_many_calls<B>(request: &Request<B>) -> Response<()> {
    let grpc = request
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
    if grpc {
        return crate::status::too_many_calls().into_http();
    }
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
    response
}

/// Counts a connection for as long as it lives.
struct Counted {
    name: &'static str,
    metrics: Arc<Metrics>,
}

impl Counted {
    fn new(name: &'static str, metrics: &Arc<Metrics>) -> Self {
        metrics.connections(name, 1);
        Self { name, metrics: Arc::clone(metrics) }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.metrics.connections(self.name, -1);
    }
}

/// A response's body that counts as a call until it is sent or given up.
struct CountedBody {
    body: Body,
    /// `None`: the call was not let in.
    _permit: Option<OwnedSemaphorePermit>,
}

impl http_body::Body for CountedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A connection that is closed where its client says nothing at first, or takes none of what is sent.
struct TimedIo {
    stream: TcpStream,
    /// Until the preface is complete.
    preface: Option<Pin<Box<Sleep>>>,
    read: usize,
    write_timeout: Duration,
    /// Set while a write waits.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl TimedIo {
    fn new(stream: TcpStream, preface_timeout: Duration, write_timeout: Duration) -> Self {
        let preface = Some(Box::pin(tokio::time::sleep(preface_timeout)));
        Self { stream, preface, read: 0, write_timeout, stalled: None }
    }

    fn written<T>(&mut self, cx: &mut Context<'_>, poll: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.stalled = None;
            return poll;
        }
        let timeout = self.write_timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing of what is sent")))
    }
}

impl AsyncRead for TimedIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let poll = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let read = buffer.filled().len() - before;
        if let Some(mut preface) = self.preface.take() {
            self.read += read;
            if self.read < PREFACE_BYTES {
                if poll.is_pending() && preface.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "the client says nothing",
                    )));
                }
                self.preface = Some(preface);
            }
        }
        poll
    }
}

impl AsyncWrite for TimedIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.written(cx, poll)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.written(cx, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.stream).poll_flush(cx);
        self.written(cx, poll)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
