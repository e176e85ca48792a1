//! The HTTP server in front of a bucket.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{body::Frame, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use runner_artifacts::object::{StoreOptions, Tuning};
use runner_core::task::{TaskKind, spawn};
use s3s::{
    S3Result,
    auth::{S3Auth, SecretKey},
    s3_error,
    service::{S3Service, S3ServiceBuilder},
};

use super::{
    bucket::Bucket,
    fault::{Action, Fault, Faults, Seen},
};

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Body = UnsyncBoxBody<Bytes, BoxError>;

/// How a server is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// S3, with SigV4.
    S3,
    /// Google's XML API, which has a bearer token in place of the signature. It is not checked.
    Google,
}

/// Name of the bucket.
pub const BUCKET: &str = "runner-test";
/// The key id that is valid at first.
pub const KEY_ID: &str = "AKIDTEST";
/// Its secret.
pub const SECRET: &str = "test-secret-0123456789";

/// A server of this process, on a runtime of its own, with data in a directory of its own. Ends when dropped.
#[derive(Debug)]
pub struct StoreServer {
    dialect: Dialect,
    address: SocketAddr,
    shared: Arc<Shared>,
    dir: tempfile::TempDir,
    runtime: Option<tokio::runtime::Runtime>,
}

#[derive(Debug)]
struct Shared {
    dialect: Dialect,
    bucket: Arc<Bucket>,
    faults: Faults,
    keys: Arc<Keys>,
}

/// The keys that are valid.
#[derive(Debug, Default)]
struct Keys(RwLock<HashMap<String, String>>);

#[async_trait::async_trait]
impl S3Auth for Keys {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        let keys = self.0.read().unwrap_or_else(PoisonError::into_inner);
        keys.get(access_key).map(|secret| secret.as_str().into()).ok_or_else(|| s3_error!(InvalidAccessKeyId))
    }
}

/// The bucket as a value that a service can own.
struct Shelf(Arc<Bucket>);

macro_rules! forwarded {
    ($($method:ident: $input:ident => $output:ident;)*) => {
        #[async_trait::async_trait]
        impl s3s::S3 for Shelf {
            $(async fn $method(
                &self,
                req: s3s::S3Request<s3s::dto::$input>,
            ) -> S3Result<s3s::S3Response<s3s::dto::$output>> {
                self.0.$method(req).await
            })*
        }
    };
}

forwarded! {
    head_bucket: HeadBucketInput => HeadBucketOutput;
    put_object: PutObjectInput => PutObjectOutput;
    get_object: GetObjectInput => GetObjectOutput;
    head_object: HeadObjectInput => HeadObjectOutput;
    delete_object: DeleteObjectInput => DeleteObjectOutput;
    list_objects_v2: ListObjectsV2Input => ListObjectsV2Output;
    create_multipart_upload: CreateMultipartUploadInput => CreateMultipartUploadOutput;
    upload_part: UploadPartInput => UploadPartOutput;
    complete_multipart_upload: CompleteMultipartUploadInput => CompleteMultipartUploadOutput;
    abort_multipart_upload: AbortMultipartUploadInput => AbortMultipartUploadOutput;
    list_multipart_uploads: ListMultipartUploadsInput => ListMultipartUploadsOutput;
}

impl StoreServer {
    /// Starts one, on a free port of loopback.
    ///
    /// # Panics
    /// Where that fails.
    pub fn start(dialect: Dialect) -> Self {
        Self::start_at(dialect, Ipv4Addr::LOCALHOST.into())
    }

    /// Starts one, on a free port of this address of the machine; unspecified: of all.
    ///
    /// # Panics
    /// Where that fails.
    pub fn start_at(dialect: Dialect, at: IpAddr) -> Self {
        let dir = tempfile::tempdir().expect("a directory for the server");
        std::fs::create_dir(dir.path().join("data")).expect("a directory for the data");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("test-store")
            .enable_all()
            .build()
            .expect("a runtime for the server");
        let keys = Keys::default();
        keys.0.write().unwrap_or_else(PoisonError::into_inner).insert(KEY_ID.to_owned(), SECRET.to_owned());
        let shared = Arc::new(Shared {
            dialect,
            bucket: Arc::new(Bucket::new(&dir.path().join("data"), BUCKET)),
            faults: Faults::default(),
            keys: Arc::new(keys),
        });
        let mut service = S3ServiceBuilder::new(Shelf(Arc::clone(&shared.bucket)));
        if dialect == Dialect::S3 {
            service.set_auth(KeysOf(Arc::clone(&shared.keys)));
        }
        let service = service.build();
        // Without waiting on the runtime: the caller may be on one of its own.
        let listener = std::net::TcpListener::bind((at, 0)).expect("a port for the server");
        let mut address = listener.local_addr().expect("the server's address");
        if at.is_unspecified() {
            address.set_ip(Ipv4Addr::LOCALHOST.into());
        }
        listener.set_nonblocking(true).expect("a listener that does not block");
        let listener = {
            let _on = runtime.enter();
            tokio::net::TcpListener::from_std(listener).expect("a listener on the runtime")
        };
        let accepting = accept(listener, service, Arc::clone(&shared));
        runtime.spawn(accepting);
        let server = Self { dialect, address, shared, dir, runtime: Some(runtime) };
        server.write_credentials(KEY_ID, SECRET);
        server
    }

    /// Names the bucket, with a prefix in it; empty: the whole of it.
    pub fn url(&self, prefix: &str) -> String {
        let scheme = match self.dialect {
            Dialect::S3 => "s3",
            Dialect::Google => "gs",
        };
        format!("{scheme}://{BUCKET}/{prefix}")
    }

    /// Where it listens.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The port of it.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// How a store is opened on it. Waits are short; the numbers of tries are the real ones.
    pub fn options(&self) -> StoreOptions {
        StoreOptions {
            endpoint: Some(self.endpoint()),
            allow_http: true,
            credentials_file: Some(self.credentials_file()),
            tuning: Tuning {
                backoff: Duration::from_millis(5),
                max_backoff: Duration::from_millis(50),
                stall_timeout: Duration::from_secs(5),
                ..Tuning::default()
            },
            ..StoreOptions::default()
        }
    }

    /// The file with the client's credentials.
    pub fn credentials_file(&self) -> std::path::PathBuf {
        self.dir.path().join("credentials")
    }

    /// Has the client use these credentials from its next request on.
    ///
    /// # Panics
    /// Where the file cannot be written.
    pub fn write_credentials(&self, key_id: &str, secret: &str) {
        let text = match self.dialect {
            Dialect::S3 => {
                format!("[default]\naws_access_key_id = {key_id}\naws_secret_access_key = {secret}\n")
            }
            // What `object_store` takes for an emulator: it signs nothing, and sends an empty token.
            Dialect::Google => serde_json::json!({
                "gcs_base_url": self.endpoint(), "disable_oauth": true, "client_email": "", "private_key": "",
                "private_key_id": "",
            })
            .to_string(),
        };
        let (path, aside) = (self.credentials_file(), self.dir.path().join("credentials.new"));
        std::fs::write(&aside, text).expect("the credentials are written");
        std::fs::rename(&aside, &path).expect("the credentials are put into place");
    }

    /// From now on only this key is valid.
    pub fn only_key(&self, key_id: &str, secret: &str) {
        let mut keys = self.shared.keys.0.write().unwrap_or_else(PoisonError::into_inner);
        keys.clear();
        keys.insert(key_id.to_owned(), secret.to_owned());
    }

    /// The settings of a service whose objects are in the bucket, below a prefix.
    pub fn settings(&self, prefix: &str) -> Vec<(&'static str, String)> {
        vec![
            ("RUNNER_OBJECT_STORE__URL", self.url(prefix)),
            ("RUNNER_OBJECT_STORE__ENDPOINT", self.endpoint()),
            ("RUNNER_OBJECT_STORE__ALLOW_HTTP", "true".to_owned()),
            ("RUNNER_OBJECT_STORE__CREDENTIALS_FILE", self.credentials_file().display().to_string()),
        ]
    }

    /// The bucket, seen from inside.
    pub fn bucket(&self) -> &Arc<Bucket> {
        &self.shared.bucket
    }

    /// Sets a fault.
    pub fn fault(&self, fault: Fault) {
        self.shared.faults.set(fault);
    }

    /// Its faults, and what it was asked.
    pub fn faults(&self) -> &Faults {
        &self.shared.faults
    }
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // A runtime must not be waited for where the dropper may be one of another.
            runtime.shutdown_background();
        }
    }
}

struct KeysOf(Arc<Keys>);

#[async_trait::async_trait]
impl S3Auth for KeysOf {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        self.0.get_secret_key(access_key).await
    }
}

async fn accept(listener: tokio::net::TcpListener, service: S3Service, shared: Arc<Shared>) {
    while let Ok((socket, _)) = listener.accept().await {
        let _ = socket.set_nodelay(true);
        let (service, shared) = (service.clone(), Arc::clone(&shared));
        spawn(TaskKind::Call, "test-store", async move {
            let answering = service_fn(move |request| answer(service.clone(), Arc::clone(&shared), request));
            // A connection that a fault ends is no failure of the server.
            let _ = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(socket), answering)
                .await;
        });
    }
}

async fn answer(
    service: S3Service,
    shared: Arc<Shared>,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, BoxError> {
    let seen = Seen {
        method: request.method().to_string(),
        path: request.uri().path().to_owned(),
        query: request.uri().query().unwrap_or_default().to_owned(),
    };
    let action = shared.faults.strike(seen);
    match &action {
        Some(Action::Status(status, code)) => {
            let status = StatusCode::from_u16(*status)?;
            // Read first: a client that is still sending would not see the answer.
            drain(request.into_body(), usize::MAX).await;
            return Ok(document(status, code));
        }
        Some(Action::OkWithError(code)) => {
            drain(request.into_body(), usize::MAX).await;
            return Ok(document(StatusCode::OK, code));
        }
        Some(Action::Hang) => {
            std::future::pending::<()>().await;
        }
        Some(Action::CutRequest(bytes)) => {
            drain(request.into_body(), *bytes).await;
            return Err("the test cuts the request".into());
        }
        Some(Action::First(first)) => first(),
        Some(Action::Trickle | Action::CutAnswer(_) | Action::LoseAnswer) | None => {}
    }
    if shared.dialect == Dialect::Google {
        // The token is empty, as with every emulator, and then not sent with all requests.
        request.headers_mut().remove(http::header::AUTHORIZATION);
    }
    let response = service.call(request.map(s3s::Body::from)).await.map_err(|error| format!("{error:?}"))?;
    Ok(match action {
        Some(Action::LoseAnswer) => return Err("the test loses the answer".into()),
        Some(Action::CutAnswer(bytes)) => response.map(|body| cut(body, bytes)),
        Some(Action::Trickle) => response.map(trickle),
        _ => response.map(|body| body.map_err(BoxError::from).boxed_unsync()),
    })
}

fn document(status: StatusCode, code: &str) -> Response<Body> {
    let text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>a fault of the test</Message></Error>"
    );
    let mut response = Response::new(Full::from(text).map_err(|never| match never {}).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/xml"));
    response
}

/// Reads at least so much of a body, where there is so much.
async fn drain(mut body: Incoming, bytes: usize) {
    let mut read = 0;
    while read < bytes
        && let Some(Ok(frame)) = body.frame().await
    {
        read += frame.data_ref().map_or(0, Bytes::len);
    }
}

/// The first bytes of a body, then a broken connection.
fn cut(body: s3s::Body, bytes: usize) -> Body {
    let state = (body, bytes);
    let frames = stream::unfold(state, |(mut body, left)| async move {
        if left == 0 {
            return Some((Err(BoxError::from("the test cuts the answer")), (body, left)));
        }
        let data = match body.frame().await? {
            Ok(frame) => frame.into_data().unwrap_or_default(),
            Err(error) => return Some((Err(error), (body, 0))),
        };
        let data = data.slice(..data.len().min(left));
        let left = left - data.len();
        Some((Ok(Frame::data(data)), (body, left)))
    });
    BodyExt::boxed_unsync(StreamBody::new(frames))
}

/// A body, one byte a second.
fn trickle(body: s3s::Body) -> Body {
    let bytes = body.into_data_stream().map(|chunk| chunk.unwrap_or_default());
    let single = bytes.flat_map(|chunk| stream::iter((0..chunk.len()).map(move |at| chunk.slice(at..=at))));
    let frames = single.then(|byte| async move {
        tokio::time::sleep(Duration::from_secs(1)).await;
        Ok::<_, BoxError>(Frame::data(byte))
    });
    BodyExt::boxed_unsync(StreamBody::new(frames))
}
