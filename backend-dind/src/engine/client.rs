//! The requests.

use std::{
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bollard::{
    API_DEFAULT_VERSION, BollardRequest, Docker,
    container::LogOutput,
    models::{
        ContainerCreateBody, ContainerInspectResponse, ContainerSummary, ImageInspect, SystemInfo, Volume,
    },
    query_parameters::{
        AttachContainerOptionsBuilder, CreateContainerOptionsBuilder, DownloadFromContainerOptionsBuilder,
        InspectContainerOptions, KillContainerOptionsBuilder, ListContainersOptionsBuilder,
        ListVolumesOptionsBuilder, RemoveContainerOptionsBuilder, RemoveVolumeOptionsBuilder,
        StartContainerOptions, UploadToContainerOptionsBuilder, WaitContainerOptionsBuilder,
    },
};
use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream::BoxStream};
use tokio::io::AsyncWrite;

use super::{EngineError, EngineErrorKind, transport::Route};
use crate::config::{DindConfig, TlsFiles};

/// How long a request that moves bytes may take as a whole. Its pauses are limited by the request's time limit.
const TRANSFER: Duration = Duration::from_secs(24 * 3600);

/// A connection to a container's standard streams.
pub(crate) struct Attached {
    /// What it writes to its standard output.
    pub(crate) output: BoxStream<'static, Result<Bytes, EngineError>>,
    /// Its standard input. Dropping it leaves the input open.
    pub(crate) input: Pin<Box<dyn AsyncWrite + Send>>,
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Attached")
    }
}

/// One engine. Cheap to clone. Nothing is connected before the first request; each request has a connection of its own.
#[derive(Clone)]
pub struct Engine {
    host: Arc<str>,
    tls: Option<Arc<TlsFiles>>,
    timeout: Duration,
    /// Made by the first request that reaches the engine, which also agrees on a version of its API.
    docker: Arc<Mutex<Option<Docker>>>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("host", &self.host).finish_non_exhaustive()
    }
}

impl Engine {
    /// The engine of a valid configuration.
    pub fn new(config: &DindConfig) -> Self {
        Self {
            host: config.host.as_str().into(),
            tls: config.tls.clone().map(Arc::new),
            timeout: Duration::from_secs(config.request_timeout_seconds),
            docker: Arc::default(),
        }
    }

    /// How long a request may stay without an answer.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// The client, connected and with an agreed version of the API. For requests that are not made here.
    ///
    /// # Errors
    /// `Unreachable`, mostly.
    pub async fn docker(&self) -> Result<Docker, EngineError> {
        let known = self.docker.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(docker) = known {
            return Ok(docker);
        }
        let docker = connect(Route::new(&self.host, self.tls.as_deref())?, self.timeout.as_secs())?;
        let docker = self.answered(docker.negotiate_version()).await?;
        *self.docker.lock().unwrap_or_else(PoisonError::into_inner) = Some(docker.clone());
        Ok(docker)
    }

    /// Agrees on a version anew at the next request: the engine may have been replaced.
    pub fn forget_version(&self) {
        *self.docker.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Waits for a whole answer. The client's own time limit ends with an answer's first line; an engine may hang behind it.
    pub(crate) async fn answered<T>(
        &self,
        answer: impl Future<Output = Result<T, bollard::errors::Error>>,
    ) -> Result<T, EngineError> {
        match tokio::time::timeout(self.timeout, answer).await {
            Ok(answer) => Ok(answer?),
            Err(elapsed) => Err(EngineError::unreachable(elapsed)),
        }
    }

    async fn patient(&self) -> Result<Docker, EngineError> {
        Ok(self.docker().await?.with_timeout(TRANSFER))
    }

    /// What the engine says of itself.
    pub(crate) async fn info(&self) -> Result<SystemInfo, EngineError> {
        let docker = self.docker().await?;
        self.answered(docker.info()).await
    }

    /// An image that it has, by reference or content id.
    pub(crate) async fn image(&self, name: &str) -> Result<ImageInspect, EngineError> {
        let docker = self.docker().await?;
        self.answered(docker.inspect_image(name)).await
    }

    /// Makes a container. `Conflict`: the name is taken.
    pub(crate) async fn create(
        &self,
        name: &str,
        body: ContainerCreateBody,
    ) -> Result<Vec<String>, EngineError> {
        let options = CreateContainerOptionsBuilder::default().name(name).build();
        let docker = self.docker().await?;
        let made = self.answered(docker.create_container(Some(options), body)).await?;
        Ok(made.warnings)
    }

    /// Starts it. One that runs already is fine.
    pub(crate) async fn start(&self, name: &str) -> Result<(), EngineError> {
        let docker = self.docker().await?;
        self.answered(docker.start_container(name, None::<StartContainerOptions>)).await
    }

    /// Looks at a container. `None`: there is none.
    pub(crate) async fn inspect(&self, name: &str) -> Result<Option<ContainerInspectResponse>, EngineError> {
        let docker = self.docker().await?;
        let seen = self.answered(docker.inspect_container(name, None::<InspectContainerOptions>)).await;
        none_if_missing(seen)
    }

    /// Sends a signal. One that does not run, or is not there, is fine.
    pub(crate) async fn kill(&self, name: &str, signal: &str) -> Result<(), EngineError> {
        let options = KillContainerOptionsBuilder::default().signal(signal).build();
        let docker = self.docker().await?;
        match self.answered(docker.kill_container(name, Some(options))).await {
            Err(error) if matches!(error.kind, EngineErrorKind::NotFound | EngineErrorKind::Conflict) => {
                Ok(())
            }
            other => other,
        }
    }

    /// Waits until it does not run, or does not exist, or the engine says anything else. Look at it then.
    pub(crate) async fn wait(&self, name: &str) -> Result<(), EngineError> {
        let options = WaitContainerOptionsBuilder::default().condition("not-running").build();
        let mut answers = Box::pin(self.patient().await?.wait_container(name, Some(options)));
        match answers.next().await {
            // An exit code that is not zero is an error to bollard.
            None | Some(Ok(_) | Err(bollard::errors::Error::DockerContainerWaitError { .. })) => Ok(()),
            Some(Err(error)) => match EngineError::from(error) {
                error if error.kind == EngineErrorKind::NotFound => Ok(()),
                error => Err(error),
            },
        }
    }

    /// Removes a container and its anonymous volumes. One that is not there is fine. `Conflict`: it runs and `force` is
    /// not set, or it is being removed by somebody else.
    pub(crate) async fn remove(&self, name: &str, force: bool) -> Result<(), EngineError> {
        let options = RemoveContainerOptionsBuilder::default().force(force).v(true).build();
        let docker = self.docker().await?;
        none_if_missing(self.answered(docker.remove_container(name, Some(options))).await).map(drop)
    }

    /// Every container with these labels, in whatever state.
    pub(crate) async fn containers(&self, labels: &[String]) -> Result<Vec<ContainerSummary>, EngineError> {
        let filters = std::collections::HashMap::from([("label", labels.to_vec())]);
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        let docker = self.docker().await?;
        self.answered(docker.list_containers(Some(options))).await
    }

    /// Every volume with these labels.
    pub(crate) async fn volumes(&self, labels: &[String]) -> Result<Vec<Volume>, EngineError> {
        let filters = std::collections::HashMap::from([("label", labels.to_vec())]);
        let options = ListVolumesOptionsBuilder::default().filters(&filters).build();
        let docker = self.docker().await?;
        Ok(self.answered(docker.list_volumes(Some(options))).await?.volumes.unwrap_or_default())
    }

    /// Removes a volume. One that is not there is fine. `Conflict`: a container has it.
    pub(crate) async fn remove_volume(&self, name: &str) -> Result<(), EngineError> {
        let options = RemoveVolumeOptionsBuilder::default().build();
        let docker = self.docker().await?;
        none_if_missing(self.answered(docker.remove_volume(name, Some(options))).await).map(drop)
    }

    /// Attaches to the standard streams, from now on.
    pub(crate) async fn attach(&self, name: &str, stdin: bool) -> Result<Attached, EngineError> {
        let options = AttachContainerOptionsBuilder::default()
            .stream(true)
            .stdout(true)
            .stdin(stdin)
            .logs(false)
            .build();
        let docker = self.docker().await?;
        let attached = self.answered(docker.attach_container(name, Some(options))).await?;
        let output = attached.output.map(|part| match part {
            Ok(LogOutput::StdOut { message } | LogOutput::Console { message }) => Ok(message),
            Ok(LogOutput::StdErr { .. } | LogOutput::StdIn { .. }) => Ok(Bytes::new()),
            Err(error) => Err(EngineError::from(error)),
        });
        Ok(Attached { output: output.boxed(), input: attached.input })
    }

    /// Unpacks a tar beneath `path` of a container, which need not run. Its entries keep their owners and modes.
    pub(crate) async fn put(
        &self,
        name: &str,
        path: &str,
        tar: impl Stream<Item = Result<Bytes, std::io::Error>> + Send + 'static,
    ) -> Result<(), EngineError> {
        let options = UploadToContainerOptionsBuilder::default().path(path).build();
        let body = bollard::body_try_stream(tar);
        Ok(self.patient().await?.upload_to_container(name, Some(options), body).await?)
    }

    /// The same with a tar in memory.
    pub(crate) async fn put_bytes(&self, name: &str, path: &str, tar: Bytes) -> Result<(), EngineError> {
        let options = UploadToContainerOptionsBuilder::default().path(path).build();
        let body = bollard::body_full(tar);
        let docker = self.docker().await?;
        self.answered(docker.upload_to_container(name, Some(options), body)).await
    }

    /// What is at `path` of a container, running or not, as a tar. The first item is `NotFound` where there is no such
    /// container or path. The engine holds the container locked until the stream ends or is dropped: read it swiftly.
    pub(crate) fn get(&self, name: &str, path: &str) -> BoxStream<'static, Result<Bytes, EngineError>> {
        let (engine, name) = (self.clone(), name.to_owned());
        let options = DownloadFromContainerOptionsBuilder::default().path(path).build();
        let pause = self.timeout;
        futures::stream::once(async move {
            match engine.docker().await {
                Ok(docker) => docker
                    .download_from_container(&name, Some(options))
                    .map(|part| part.map_err(EngineError::from))
                    .boxed(),
                Err(error) => futures::stream::iter([Err(error)]).boxed(),
            }
        })
        .flatten()
        .boxed()
        .pipe_timeout(pause)
    }
}

/// The client over a route. `seconds`: how long an answer may take to begin.
pub(super) fn connect(route: Route, seconds: u64) -> Result<Docker, EngineError> {
    let transport = move |request: BollardRequest| route.clone().request(request);
    // The route knows where to; the client only wants an address that it can parse.
    Ok(Docker::connect_with_custom_transport(transport, Some("http://docker"), seconds, API_DEFAULT_VERSION)?)
}

/// Ends a stream that pauses for too long.
trait PipeTimeout {
    fn pipe_timeout(self, pause: Duration) -> BoxStream<'static, Result<Bytes, EngineError>>;
}

impl PipeTimeout for BoxStream<'static, Result<Bytes, EngineError>> {
    fn pipe_timeout(self, pause: Duration) -> BoxStream<'static, Result<Bytes, EngineError>> {
        futures::stream::unfold(Some(self), move |stream| async move {
            let mut stream = stream?;
            match tokio::time::timeout(pause, stream.next()).await {
                Ok(Some(item)) => Some((item, Some(stream))),
                Ok(None) => None,
                Err(elapsed) => Some((Err(EngineError::unreachable(elapsed)), None)),
            }
        })
        .boxed()
    }
}

fn none_if_missing<T>(result: Result<T, EngineError>) -> Result<Option<T>, EngineError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind == EngineErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
