//! The floor of rows 5 and 7: a bare tonic server that streams the same message type, with nothing behind it.

use std::{
    pin::Pin,
    process::{Child, Command, ExitCode, Stdio},
    time::Duration,
};

use futures::{Stream, StreamExt as _, stream};
use runner_proto::v1 as proto;
use tonic::{Request, Response, Status};

use proto::{
    runner_server::{Runner, RunnerServer},
    stream_response::Event,
};

use super::service::{Fault, connect, free_address, usage};

/// Size of a chunk, in bytes.
const CHUNK: usize = 64 * 1024;

struct Floor;

type Streaming<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn only_stream<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("the floor only streams"))
}

#[tonic::async_trait]
impl Runner for Floor {
    type StreamStream = Streaming<proto::StreamResponse>;
    type AttachStream = Streaming<proto::AttachResponse>;

    async fn run(&self, _: Request<proto::RunRequest>) -> Result<Response<proto::RunResponse>, Status> {
        only_stream()
    }

    /// Streams as many chunks as `cursor` says, then is silent for ever where `no_logs` is set, else ends.
    async fn stream(
        &self,
        request: Request<proto::StreamRequest>,
    ) -> Result<Response<Self::StreamStream>, Status> {
        let request = request.into_inner();
        let chunks: u64 = request.cursor.parse().map_err(|_| Status::invalid_argument("cursor"))?;
        let data = bytes::Bytes::from(vec![b'x'; CHUNK]);
        let frames = stream::iter(0..chunks).map(move |i| {
            let frame = proto::LogFrame {
                attempt: 1,
                offset: i * CHUNK as u64,
                stream: proto::LogStream::Stdout.into(),
                time: None,
                data: data.clone(),
            };
            Ok(proto::StreamResponse { cursor: i.to_string(), time: None, event: Some(Event::Log(frame)) })
        });
        let silence = if request.no_logs { stream::pending().boxed() } else { stream::empty().boxed() };
        Ok(Response::new(frames.chain(silence).boxed()))
    }

    async fn cancel(
        &self,
        _: Request<proto::CancelRequest>,
    ) -> Result<Response<proto::CancelResponse>, Status> {
        only_stream()
    }

    async fn delete(
        &self,
        _: Request<proto::DeleteRequest>,
    ) -> Result<Response<proto::DeleteResponse>, Status> {
        only_stream()
    }

    async fn get(&self, _: Request<proto::GetRequest>) -> Result<Response<proto::GetResponse>, Status> {
        only_stream()
    }

    async fn list(&self, _: Request<proto::ListRequest>) -> Result<Response<proto::ListResponse>, Status> {
        Ok(Response::new(proto::ListResponse::default()))
    }

    async fn attach(
        &self,
        _: Request<tonic::Streaming<proto::AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        only_stream()
    }
}

/// Serves until it is killed.
pub(crate) async fn serve(address: &str) -> ExitCode {
    let Ok(address) = address.parse() else { return ExitCode::from(2) };
    match tonic::transport::Server::builder().add_service(RunnerServer::new(Floor)).serve(address).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// The floor in a process of its own.
pub(crate) struct FloorServer {
    child: Child,
    /// Where it listens.
    pub(crate) address: String,
}

impl FloorServer {
    /// Starts it and waits until it answers.
    pub(crate) async fn start() -> Result<Self, Fault> {
        let address = free_address()?;
        let child = Command::new(std::env::current_exe()?)
            .args(["floor-server", &address])
            .stdin(Stdio::null())
            .spawn()?;
        let server = Self { child, address };
        for _ in 0..200 {
            if let Ok(mut client) = connect(&server.address).await
                && client.list(proto::ListRequest::default()).await.is_ok()
            {
                return Ok(server);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err("the floor did not answer within 10 s".into())
    }

    /// Processor seconds and resident bytes.
    pub(crate) fn usage(&self) -> Result<(f64, f64), Fault> {
        usage(self.child.id())
    }

    /// Streams about `bytes` bytes to one reader. Returns how many came.
    pub(crate) async fn stream(&self, bytes: u64) -> Result<u64, Fault> {
        let mut client = connect(&self.address).await?;
        let request = proto::StreamRequest {
            cursor: (bytes / CHUNK as u64).to_string(),
            ..proto::StreamRequest::default()
        };
        let mut stream = client.stream(request).await?.into_inner();
        let mut came = 0;
        while let Some(message) = stream.message().await? {
            if let Some(Event::Log(frame)) = message.event {
                came += frame.data.len() as u64;
            }
        }
        Ok(came)
    }
}

impl Drop for FloorServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
