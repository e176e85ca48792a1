//! How a request reaches the engine: over a connection of its own, by a Unix socket, TCP or TLS.
//!
//! With TLS, only who is signed by the configured authority is the engine; what this machine trusts on the web has no say.
//! A machine that vanished without a word is noticed by keep-alives, on connections that wait for an answer as well as on
//! those that follow a log for hours.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bollard::{BollardRequest, errors::Error};
use hyper::{
    Response, Uri,
    body::Incoming,
    client::conn::http1,
    header::{HOST, HeaderValue},
};
use hyper_util::rt::TokioIo;
use runner_core::task::{TaskKind, spawn};
use rustix::net::sockopt;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::TlsConnector;

use super::EngineError;
use crate::config::TlsFiles;

/// How long a connection may take to come to be, TLS included.
const CONNECT: Duration = Duration::from_secs(20);
/// Silence after which the other machine is asked whether it is there, and between two such questions.
const KEEPALIVE: Duration = Duration::from_secs(15);
const KEEPALIVE_PAUSE: Duration = Duration::from_secs(5);
const KEEPALIVE_TRIES: u32 = 3;
/// How long what was sent may stay unacknowledged by the other machine's kernel, in milliseconds.
const UNACKNOWLEDGED_MILLIS: u32 = 30_000;

/// The way to one engine.
#[derive(Clone)]
pub(super) struct Route {
    to: Arc<To>,
    /// What requests name as their host.
    host: HeaderValue,
}

enum To {
    Unix(PathBuf),
    Tcp(String),
    Tls { address: String, name: ServerName<'static>, connector: TlsConnector },
}

impl Route {
    /// The way to `host`, as the configuration has it.
    ///
    /// # Errors
    /// Where the files of TLS cannot be read, or are not what they should be.
    pub(super) fn new(host: &str, tls: Option<&TlsFiles>) -> Result<Self, EngineError> {
        if let Some(path) = host.strip_prefix("unix://") {
            let to = Arc::new(To::Unix(path.into()));
            return Ok(Self { to, host: HeaderValue::from_static("docker") });
        }
        let address = host.strip_prefix("tcp://").unwrap_or(host).to_owned();
        let header = HeaderValue::from_str(&address).map_err(EngineError::unreachable)?;
        let to = match tls {
            None => To::Tcp(address),
            Some(files) => {
                let name = address.rsplit_once(':').map_or(address.as_str(), |(name, _)| name);
                let name = name.trim_start_matches('[').trim_end_matches(']').to_owned();
                let name = ServerName::try_from(name).map_err(EngineError::unreachable)?;
                let connector = TlsConnector::from(Arc::new(client_config(files)?));
                To::Tls { address, name, connector }
            }
        };
        Ok(Self { to: Arc::new(to), host: header })
    }

    /// Makes one request, over a connection of its own.
    pub(super) async fn request(self, request: BollardRequest) -> Result<Response<Incoming>, Error> {
        let (mut parts, body) = request.into_parts();
        // As a server wants it: the path alone, and the host beside it.
        let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
        parts.uri = path.parse::<Uri>().map_err(|error| io::Error::other(error.to_string()))?;
        parts.headers.entry(HOST).or_insert(self.host);
        let request = BollardRequest::from_parts(parts, body);
        match &*self.to {
            To::Unix(path) => exchange(in_time(UnixStream::connect(path)).await?, request).await,
            To::Tcp(address) => exchange(in_time(connect(address)).await?, request).await,
            To::Tls { address, name, connector } => {
                let stream = in_time(async {
                    let stream = connect(address).await?;
                    connector.connect(name.clone(), stream).await
                });
                exchange(stream.await?, request).await
            }
        }
    }
}

async fn in_time<T>(connecting: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(CONNECT, connecting).await.unwrap_or_else(|elapsed| Err(elapsed.into()))
}

async fn connect(address: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    sockopt::set_tcp_nodelay(&stream, true)?;
    sockopt::set_socket_keepalive(&stream, true)?;
    sockopt::set_tcp_keepidle(&stream, KEEPALIVE)?;
    sockopt::set_tcp_keepintvl(&stream, KEEPALIVE_PAUSE)?;
    sockopt::set_tcp_keepcnt(&stream, KEEPALIVE_TRIES)?;
    sockopt::set_tcp_user_timeout(&stream, UNACKNOWLEDGED_MILLIS)?;
    Ok(stream)
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: BollardRequest,
) -> Result<Response<Incoming>, Error> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the answer's body, or when nobody waits for either. What it ends with, the body says too.
    drop(spawn(TaskKind::Helper, "dind.connection", async move {
        let _ = connection.with_upgrades().await;
    }));
    Ok(sender.send_request(request).await?)
}

/// Trusts the authority of `files` and nobody else.
fn client_config(files: &TlsFiles) -> Result<ClientConfig, EngineError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&files.ca)? {
        roots.add(certificate).map_err(|error| unusable(&files.ca, &error))?;
    }
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| unusable(&files.key, &error))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(EngineError::unreachable)?
        .with_root_certificates(roots)
        .with_client_auth_cert(certificates(&files.cert)?, key)
        .map_err(|error| unusable(&files.cert, &error))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, EngineError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| unusable(path, &error));
    let all = all?;
    if all.is_empty() {
        return Err(unusable(path, &"it has no certificate"));
    }
    Ok(all)
}

/// Files may be put right while the service runs, so this passes as any outage does.
fn unusable(path: &Path, why: &dyn std::fmt::Display) -> EngineError {
    EngineError::unreachable(format!("{}: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    #[tokio::test]
    async fn a_request_names_its_path_and_its_host_and_has_a_connection_of_its_own() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = async {
            let mut heads = Vec::new();
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK").await.unwrap();
                heads.push(String::from_utf8(head).unwrap());
            }
            heads
        };
        let route = Route::new(&format!("tcp://{address}"), None).unwrap();
        let asking = async {
            let docker = docker(&route);
            for _ in 0..2 {
                assert_eq!(docker.ping().await.unwrap(), "OK");
            }
        };
        let (heads, ()) = tokio::join!(serving, asking);
        for head in heads {
            assert!(head.starts_with("GET /") && head.contains("_ping HTTP/1.1\r\n"), "{head}");
            assert!(head.to_lowercase().contains(&format!("host: {address}\r\n")), "{head}");
        }
    }

    fn docker(route: &Route) -> bollard::Docker {
        super::super::client::connect(route.clone(), 5).unwrap()
    }

    #[tokio::test]
    async fn nobody_who_listens_is_an_outage() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        for host in [format!("tcp://{address}"), "unix:///nowhere/docker.sock".to_owned()] {
            let route = Route::new(&host, None).unwrap();
            let error = EngineError::from(docker(&route).ping().await.unwrap_err());
            assert!(error.is_outage(), "{error}");
        }
    }

    #[test]
    fn files_that_are_not_what_they_should_be_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty.pem");
        std::fs::write(&empty, "").unwrap();
        let files = |ca: PathBuf| TlsFiles { ca, cert: empty.clone(), key: empty.clone() };
        for ca in [empty.clone(), dir.path().join("absent.pem")] {
            let name = ca.display().to_string();
            let error = Route::new("tcp://[::1]:2376", Some(&files(ca))).err().expect("no authority");
            assert!(error.is_outage() && error.to_string().starts_with(&name), "{error}");
        }
    }
}
