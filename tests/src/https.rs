//! A server of files over TLS, on the loopback.

use std::{
    collections::HashMap,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

use crate::docker::tls;

/// A client that does nothing for so long is given up.
const PATIENCE: Duration = Duration::from_secs(30);

/// Serves a few files, and remembers what it was asked. Ends when dropped.
#[derive(Debug)]
pub struct HttpsServer {
    address: SocketAddr,
    authority: PathBuf,
    asked: Arc<Mutex<Vec<String>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl HttpsServer {
    /// Starts one that has these files: path and content.
    ///
    /// # Panics
    /// Where that fails.
    pub fn start(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().expect("a directory for the certificates");
        let made = tls::make(&dir.path().join("tls")).expect("certificates");
        let config = Arc::new(config(&dir.path().join("tls")));
        let files: HashMap<String, String> =
            files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect();
        let files = Arc::new(files);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = listener.local_addr().expect("its address");
        let (asked, stop) = (Arc::<Mutex<Vec<String>>>::default(), Arc::<AtomicBool>::default());
        let thread = {
            let (asked, stop) = (Arc::clone(&asked), Arc::clone(&stop));
            std::thread::spawn(move || {
                while let Ok((stream, _)) = listener.accept() {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let (config, asked, files) =
                        (Arc::clone(&config), Arc::clone(&asked), Arc::clone(&files));
                    // A client that goes away, or does not trust us, is no failure of the server.
                    std::thread::spawn(move || drop(serve(config, stream, &asked, &files)));
                }
            })
        };
        Self { address, authority: made.ca, asked, stop, thread: Some(thread), _dir: dir }
    }

    /// Host and port, as a URL has them.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// The certificate of the authority that signed the server's.
    pub fn authority(&self) -> &Path {
        &self.authority
    }

    /// The paths that were asked for.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for HttpsServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the listener.
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn config(dir: &Path) -> ServerConfig {
    let chain = CertificateDer::pem_file_iter(dir.join("server.pem")).expect("a certificate");
    let chain = chain.collect::<Result<_, _>>().expect("a certificate");
    let key = PrivateKeyDer::from_pem_file(dir.join("server-key.pem")).expect("a key");
    ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("a certificate and its key")
}

fn serve(
    config: Arc<ServerConfig>,
    stream: TcpStream,
    asked: &Mutex<Vec<String>>,
    files: &HashMap<String, String>,
) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let connection = ServerConnection::new(config).map_err(io::Error::other)?;
    let mut reader = BufReader::new(StreamOwned::new(connection, stream)).take(64 << 10);
    let mut request = String::new();
    while !request.ends_with("\r\n\r\n") {
        if reader.read_line(&mut request)? == 0 {
            return Ok(());
        }
    }
    let path = request.split(' ').nth(1).unwrap_or_default();
    asked.lock().unwrap_or_else(PoisonError::into_inner).push(path.to_owned());
    let (status, text) = files.get(path).map_or(("404 Not Found", ""), |text| ("200 OK", text.as_str()));
    let mut tls = reader.into_inner().into_inner();
    write!(tls, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}", text.len())?;
    tls.conn.send_close_notify();
    tls.flush()
}
