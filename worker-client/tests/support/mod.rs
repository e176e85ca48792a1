//! A service that misbehaves on demand, in the test's own process.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test binary uses a part of it")]

pub mod blobs;
pub mod proxy;

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use futures::{Stream, StreamExt as _, stream};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};
use worker_client::{
    Client, RetryPolicy,
    proto::{
        self,
        artifacts_server::{Artifacts, ArtifactsServer},
        runner_server::{Runner, RunnerServer},
        stream_response::Event as Wire,
    },
};

use blobs::Blobs;

#[allow(clippy::disallowed_methods, reason = "a test's helper tasks end with its runtime")]
pub fn spawn(future: impl Future<Output = ()> + Send + 'static) {
    tokio::spawn(future);
}

/// What happens to one `Stream` call after some messages.
#[derive(Debug, Clone)]
pub enum Cut {
    /// It fails.
    Fail(usize, tonic::Code),
    /// It ends as if all were well.
    End(usize),
    /// It begins this many messages too early.
    Repeat(usize),
    /// It leaves this many messages out.
    Skip(usize),
}

/// What happens to one call of another method.
#[derive(Debug, Clone)]
pub enum Answer {
    /// Refused before anything was done.
    Refuse(Status),
    /// Done, but the answer is lost.
    Lose,
}

#[derive(Debug, Default)]
pub struct State {
    pub events: Vec<proto::StreamResponse>,
    pub cuts: VecDeque<Cut>,
    pub answers: VecDeque<Answer>,
    pub runs: HashMap<String, proto::RunSpec>,
    /// Names of the calls that came, in order.
    pub calls: Vec<&'static str>,
    /// Cursors that `Stream` was called with.
    pub cursors: Vec<String>,
    pub pages: Vec<Vec<String>>,
    pub uploads: Vec<proto::CreateUploadRequest>,
    pub sealed: Vec<proto::SealTreeRequest>,
    /// What `Attach` was sent.
    pub stdin: Vec<u8>,
    pub state: proto::RunState,
}

#[derive(Debug, Clone)]
pub struct Fake {
    state: Arc<Mutex<State>>,
    pub blobs: Blobs,
    pub address: SocketAddr,
}

impl Fake {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let fake = Self { state: Arc::default(), blobs: Blobs::start().await, address };
        let server = Server::builder()
            .add_service(RunnerServer::new(fake.clone()))
            .add_service(ArtifactsServer::new(fake.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        spawn(async move { server.await.expect("serve") });
        fake
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("not poisoned")
    }

    pub async fn client(&self) -> Client {
        client(self.address).await
    }

    /// Does `work` under the next scripted answer.
    fn answer<T>(
        &self,
        call: &'static str,
        work: impl FnOnce(&mut State) -> T,
    ) -> Result<Response<T>, Status> {
        let mut state = self.state();
        state.calls.push(call);
        match state.answers.pop_front() {
            Some(Answer::Refuse(status)) => Err(status),
            Some(Answer::Lose) => {
                work(&mut state);
                Err(Status::unavailable("the answer is lost"))
            }
            None => Ok(Response::new(work(&mut state))),
        }
    }
}

/// A client that does not wait long.
pub async fn client(address: SocketAddr) -> Client {
    let quick = RetryPolicy {
        max_attempts: 5,
        initial_backoff: Duration::from_millis(2),
        max_backoff: Duration::from_millis(10),
        ..RetryPolicy::default()
    };
    let builder = Client::builder(format!("http://{address}")).retry(quick).stream_retry(quick);
    builder.connect().await.expect("connect")
}

/// A run's events: states, then `frames` log frames that alternate between the streams, then the end.
pub fn run_events(frames: usize) -> Vec<proto::StreamResponse> {
    let mut events = vec![Wire::StateChanged(proto::StateChanged {
        state: proto::RunState::Running.into(),
        attempt: 1,
        reason: String::new(),
    })];
    let mut offset = 0;
    for i in 0..frames {
        let data = format!("frame {i} \u{0}\n").into_bytes();
        let len = data.len() as u64;
        let stream = if i % 2 == 0 { proto::LogStream::Stdout } else { proto::LogStream::Stderr };
        let data = data.into();
        events.push(Wire::Log(proto::LogFrame {
            attempt: 1,
            offset,
            stream: stream.into(),
            time: None,
            data,
        }));
        offset += len;
    }
    events.push(Wire::Terminated(proto::Terminated {
        state: proto::RunState::Succeeded.into(),
        outcome: Some(proto::Outcome {
            status: Some(proto::outcome::Status::ExitCode(0)),
            cause: proto::Cause::Exited.into(),
            ..proto::Outcome::default()
        }),
    }));
    let numbered = events.into_iter().enumerate();
    numbered
        .map(|(i, event)| proto::StreamResponse { cursor: format!("c{i}"), time: None, event: Some(event) })
        .collect()
}

type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Runner for Fake {
    type StreamStream = BoxStream<proto::StreamResponse>;
    type AttachStream = BoxStream<proto::AttachResponse>;

    async fn run(&self, request: Request<proto::RunRequest>) -> Result<Response<proto::RunResponse>, Status> {
        let request = request.into_inner();
        self.answer("run", |state| {
            let id = if request.run_id.is_empty() {
                format!("key-{}", request.idempotency_key)
            } else {
                request.run_id.clone()
            };
            let created = state.runs.insert(id.clone(), request.spec.clone().unwrap_or_default()).is_none();
            let run = proto::Run { run_id: id, ..proto::Run::default() };
            proto::RunResponse { run: Some(run), created }
        })
    }

    async fn stream(
        &self,
        request: Request<proto::StreamRequest>,
    ) -> Result<Response<Self::StreamStream>, Status> {
        let request = request.into_inner();
        let mut state = self.state();
        state.calls.push("stream");
        state.cursors.push(request.cursor.clone());
        let after = |event: &proto::StreamResponse| event.cursor == request.cursor;
        let mut start = state.events.iter().position(after).map_or(0, |at| at + 1);
        let mut end = None;
        match state.cuts.pop_front() {
            None => {}
            Some(Cut::Fail(0, code)) => return Err(Status::new(code, "cut")),
            Some(Cut::Fail(count, code)) => end = Some((count, Some(Status::new(code, "cut")))),
            Some(Cut::End(count)) => end = Some((count, None)),
            Some(Cut::Repeat(count)) => start = start.saturating_sub(count),
            Some(Cut::Skip(count)) => start += count,
        }
        let events = state.events.iter().skip(start).cloned().map(Ok);
        let events: Vec<Result<_, Status>> = match end {
            None => events.collect(),
            Some((count, status)) => events.take(count).chain(status.map(Err)).collect(),
        };
        Ok(Response::new(stream::iter(events).boxed()))
    }

    async fn cancel(
        &self,
        request: Request<proto::CancelRequest>,
    ) -> Result<Response<proto::CancelResponse>, Status> {
        let run_id = request.into_inner().run_id;
        self.answer("cancel", |_| proto::CancelResponse {
            run: Some(proto::Run { run_id, cancel_requested: true, ..proto::Run::default() }),
        })
    }

    async fn delete(
        &self,
        _: Request<proto::DeleteRequest>,
    ) -> Result<Response<proto::DeleteResponse>, Status> {
        self.answer("delete", |_| proto::DeleteResponse {})
    }

    async fn get(&self, request: Request<proto::GetRequest>) -> Result<Response<proto::GetResponse>, Status> {
        let run_id = request.into_inner().run_id;
        self.answer("get", |state| proto::GetResponse {
            run: Some(proto::Run { run_id, state: state.state.into(), ..proto::Run::default() }),
        })
    }

    async fn list(
        &self,
        request: Request<proto::ListRequest>,
    ) -> Result<Response<proto::ListResponse>, Status> {
        let page: usize = request.into_inner().page_token.parse().unwrap_or(0);
        self.answer("list", |state| {
            let ids = state.pages.get(page).cloned().unwrap_or_default();
            let runs = ids.into_iter().map(|run_id| proto::Run { run_id, ..proto::Run::default() }).collect();
            let more = page + 1 < state.pages.len();
            let next_page_token = if more { (page + 1).to_string() } else { String::new() };
            proto::ListResponse { runs, next_page_token }
        })
    }

    async fn attach(
        &self,
        request: Request<tonic::Streaming<proto::AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        self.answer("attach", |_| ())?;
        let mut requests = request.into_inner();
        let open = requests.message().await?;
        match open.and_then(|open| open.message) {
            Some(proto::attach_request::Message::Open(_)) => {}
            other => return Err(Status::invalid_argument(format!("{other:?} is not an opening"))),
        }
        let ready = proto::AttachResponse { stdin_bytes_taken: 0, ready: true };
        let fake = self.clone();
        let acks = stream::unfold((requests, 0u64), move |(mut requests, taken)| {
            let fake = fake.clone();
            async move {
                let message = requests.message().await.ok()??.message?;
                let taken = match message {
                    proto::attach_request::Message::Stdin(bytes) => {
                        fake.state().stdin.extend_from_slice(&bytes);
                        taken + bytes.len() as u64
                    }
                    proto::attach_request::Message::Eof(_) => return None,
                    _ => taken,
                };
                let ack = proto::AttachResponse { stdin_bytes_taken: taken, ready: true };
                Some((Ok(ack), (requests, taken)))
            }
        });
        Ok(Response::new(stream::iter([Ok(ready)]).chain(acks).boxed()))
    }
}

#[tonic::async_trait]
impl Artifacts for Fake {
    async fn create_upload(
        &self,
        request: Request<proto::CreateUploadRequest>,
    ) -> Result<Response<proto::CreateUploadResponse>, Status> {
        let request = request.into_inner();
        self.answer("create_upload", |state| {
            let upload_id = if request.upload_id.is_empty() {
                format!("upload{}", state.uploads.len())
            } else {
                request.upload_id.clone()
            };
            let uri = format!("artifact:{upload_id}/{}", request.path);
            let url = Some(self.blobs.signed("PUT", &uri));
            state.uploads.push(request);
            proto::CreateUploadResponse { upload_id, uri, url }
        })
    }

    async fn seal_tree(
        &self,
        request: Request<proto::SealTreeRequest>,
    ) -> Result<Response<proto::SealTreeResponse>, Status> {
        let request = request.into_inner();
        self.answer("seal_tree", |state| {
            let files = request.entries.iter().filter(|entry| !entry.directory).count() as u64;
            let uri = format!("artifact:{}/", request.upload_id);
            state.sealed.push(request);
            proto::SealTreeResponse { uri, files, total_bytes: 0 }
        })
    }

    async fn create_download(
        &self,
        request: Request<proto::CreateDownloadRequest>,
    ) -> Result<Response<proto::CreateDownloadResponse>, Status> {
        let uri = request.into_inner().uri;
        let Some(size) = self.blobs.size(&uri) else { return Err(Status::not_found("no such artifact")) };
        self.answer("create_download", |_| proto::CreateDownloadResponse {
            url: Some(self.blobs.signed("GET", &uri)),
            size,
        })
    }

    async fn list_artifacts(
        &self,
        request: Request<proto::ListArtifactsRequest>,
    ) -> Result<Response<proto::ListArtifactsResponse>, Status> {
        let request = request.into_inner();
        let mut all = self.blobs.below(&request.prefix, &request.page_token);
        self.answer("list_artifacts", |_| {
            // Two to a page, whatever is asked for: a server may do so.
            let more = all.len() > 2;
            all.truncate(2);
            let next = all.last().filter(|_| more).map(|last| last.uri.clone()).unwrap_or_default();
            proto::ListArtifactsResponse { artifacts: all, next_page_token: next }
        })
    }

    async fn delete_artifacts(
        &self,
        request: Request<proto::DeleteArtifactsRequest>,
    ) -> Result<Response<proto::DeleteArtifactsResponse>, Status> {
        let uri = request.into_inner().uri;
        self.answer("delete_artifacts", |_| {
            let deleted = self.blobs.inner().objects.remove(&uri).map_or(0, |_| 1);
            proto::DeleteArtifactsResponse { deleted }
        })
    }
}
