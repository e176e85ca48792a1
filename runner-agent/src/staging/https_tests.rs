use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::TryStreamExt as _;
use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

use super::*;

/// An authority that nobody but these tests trusts, and a server's certificate of it with its key, all as PEM.
struct Certificates {
    authority: String,
    server: String,
    key: String,
}

/// Made once for each test process, and nowhere kept: no key belongs into a repository.
fn certificates() -> &'static Certificates {
    static MADE: std::sync::LazyLock<Certificates> = std::sync::LazyLock::new(|| {
        let dir = tempfile::tempdir().unwrap();
        let names = "subjectAltName=DNS:files.test,DNS:other.test,DNS:localhost,IP:127.0.0.1";
        let new_key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
        let authority = "-subj /CN=authority -keyout ca-key.pem -out ca.pem \
                         -addext basicConstraints=critical,CA:true -addext keyUsage=critical,keyCertSign";
        let server = "-subj /CN=files.test -keyout key.pem -out server.pem -CA ca.pem -CAkey ca-key.pem \
                      -addext basicConstraints=critical,CA:false -addext";
        for words in
            [format!("req -x509 {new_key} {authority}"), format!("req -x509 {new_key} {server} {names}")]
        {
            let mut openssl = std::process::Command::new("openssl");
            let output = openssl.current_dir(dir.path()).args(words.split_whitespace()).output();
            let output = output.expect("openssl is needed: it makes the certificates of the test servers");
            assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
        }
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        Certificates { authority: read("ca.pem"), server: read("server.pem"), key: read("key.pem") }
    });
    &MADE
}

type Tls = StreamOwned<ServerConnection, TcpStream>;
type Answer = Arc<dyn Fn(&str, &mut Tls) -> io::Result<()> + Send + Sync>;

/// A TLS server on a free port of the loopback, and what it was asked.
struct Server {
    port: u16,
    asked: Arc<Mutex<Vec<String>>>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    fn new(answer: impl Fn(&str, &mut Tls) -> io::Result<()> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let chain =
            CertificateDer::pem_slice_iter(certificates().server.as_bytes()).map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_slice(certificates().key.as_bytes()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let (config, answer): (_, Answer) = (Arc::new(config), Arc::new(answer));
        let (asked, stop) = (Arc::<Mutex<Vec<String>>>::default(), Arc::<AtomicBool>::default());
        let thread = std::thread::spawn({
            let (asked, stop) = (Arc::clone(&asked), Arc::clone(&stop));
            move || {
                while let Ok((stream, _)) = listener.accept() {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let (config, answer, asked) =
                        (Arc::clone(&config), Arc::clone(&answer), Arc::clone(&asked));
                    // A client that goes away is no failure of the server.
                    std::thread::spawn(move || serve(config, stream, &asked, &answer));
                }
            }
        });
        Self { port, asked, stop, thread: Some(thread) }
    }

    /// Answers every path with its bytes.
    fn files(files: &[(&str, &str)]) -> Self {
        let files: HashMap<String, String> =
            files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect();
        Self::new(move |path, tls| match files.get(path) {
            Some(text) => write!(tls, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}", text.len()),
            None => write!(tls, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"),
        })
    }

    fn url(&self, host: &str, path: &str) -> HttpsUrl {
        format!("https://{host}:{}{path}", self.port).parse().unwrap()
    }

    fn policy(&self) -> HttpsPolicy {
        let hosts = ["files.test", "127.0.0.1"].map(|host| format!("{host}:{}", self.port).parse().unwrap());
        HttpsPolicy {
            hosts: hosts.into(),
            allow_addresses: vec!["127.0.0.1".parse().unwrap()],
            ca_pem: Some(certificates().authority.as_str().into()),
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(10),
            timeout: Duration::from_secs(30),
            ..HttpsPolicy::default()
        }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn serve(
    config: Arc<ServerConfig>,
    stream: TcpStream,
    asked: &Mutex<Vec<String>>,
    answer: &Answer,
) -> Option<()> {
    let tls = StreamOwned::new(ServerConnection::new(config).ok()?, stream);
    let mut reader = BufReader::new(tls);
    let mut request = String::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if line == "\r\n" {
            break;
        }
        request.push_str(&line);
    }
    let path = request.split(' ').nth(1)?.to_owned();
    asked.lock().unwrap().push(request);
    let mut tls = reader.into_inner();
    answer(&path, &mut tls).ok()?;
    tls.conn.send_close_notify();
    tls.flush().ok()?;
    // Until the client has it all.
    let _ = tls.read(&mut [0]);
    Some(())
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread up.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

/// Answers each look-up with the next of a list, and the last for ever.
struct Names(Vec<Vec<&'static str>>, AtomicUsize);

impl Names {
    fn always(addresses: &[&'static str]) -> Self {
        Self(vec![addresses.to_vec()], AtomicUsize::new(0))
    }
}

#[async_trait]
impl Resolver for Names {
    async fn resolve(&self, _: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        let nth = self.1.fetch_add(1, Ordering::SeqCst).min(self.0.len() - 1);
        Ok(self.0[nth].iter().map(|address| SocketAddr::new(address.parse().unwrap(), port)).collect())
    }
}

fn about() -> About {
    About::input(0)
}

async fn read(policy: &HttpsPolicy, url: &HttpsUrl, names: &Names) -> Result<String, StagingError> {
    let opened = fetch(policy, url, &about(), names).await?;
    let chunks: Vec<bytes::Bytes> = opened.bytes.try_collect().await?;
    Ok(String::from_utf8(chunks.concat()).unwrap())
}

async fn refused(policy: &HttpsPolicy, url: &HttpsUrl, names: &Names) -> StagingErrorKind {
    read(policy, url, names).await.unwrap_err().kind
}

const LOOPBACK: &[&str] = &["127.0.0.1"];

#[tokio::test]
async fn a_file_arrives_and_the_request_says_nothing_of_the_service() {
    let server = Server::files(&[("/a?q=1", "contents")]);
    // A name that no resolver of this machine knows: the checked address is the one that is connected to.
    let url = server.url("files.test", "/a?q=1");
    assert_eq!(read(&server.policy(), &url, &Names::always(LOOPBACK)).await.unwrap(), "contents");
    let asked = server.asked().remove(0).to_ascii_lowercase();
    let names: Vec<&str> = asked.lines().skip(1).filter_map(|line| line.split(':').next()).collect();
    assert!(names.iter().all(|name| ["host", "accept", "user-agent"].contains(name)), "{asked}");
    assert!(asked.contains(&format!("host: files.test:{}\r\n", server.port)), "{asked}");
}

#[tokio::test]
async fn an_address_that_is_not_of_the_internet_is_not_asked_unless_it_is_allowed() {
    let server = Server::files(&[("/a", "secret")]);
    let closed = HttpsPolicy { allow_addresses: vec![], ..server.policy() };
    for address in
        ["127.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.169.254", "10.0.0.1", "100.64.0.1", "fd00::1"]
    {
        let names = Names::always(&[address]);
        assert_eq!(refused(&closed, &server.url("files.test", "/a"), &names).await, StagingErrorKind::Denied);
    }
    let literal = server.url("127.0.0.1", "/a");
    assert_eq!(refused(&closed, &literal, &Names::always(&[])).await, StagingErrorKind::Denied);
    assert_eq!(server.asked(), [""; 0]);
    assert_eq!(read(&server.policy(), &literal, &Names::always(&[])).await.unwrap(), "secret");
}

#[tokio::test]
async fn what_a_name_resolves_to_is_not_told_to_the_caller() {
    let server = Server::files(&[]);
    let closed = HttpsPolicy { allow_addresses: vec![], ..server.policy() };
    let names = Names::always(&["10.20.30.40"]);
    let error = read(&closed, &server.url("files.test", "/a?token=x"), &names).await.unwrap_err();
    let told = format!("{error} {:?}", error.source);
    assert!(!told.contains("10.20.30.40") && !told.contains("token"), "{told}");
}

#[tokio::test]
async fn a_name_that_changes_its_address_is_asked_where_it_was_checked() {
    let server = Server::files(&[("/a", "contents")]);
    // The second look-up would lead elsewhere; there is none.
    let names = Names(vec![vec!["127.0.0.1"], vec!["192.0.2.1"]], AtomicUsize::new(0));
    assert_eq!(read(&server.policy(), &server.url("files.test", "/a"), &names).await.unwrap(), "contents");
    assert_eq!(names.1.load(Ordering::SeqCst), 1);
    // Of several addresses, only those that are allowed are tried.
    let names = Names::always(&["10.0.0.1", "127.0.0.1", "::1"]);
    assert_eq!(read(&server.policy(), &server.url("files.test", "/a"), &names).await.unwrap(), "contents");
}

fn redirecting(to: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> Server {
    Server::new(move |path, tls| match to(path) {
        Some(to) => write!(tls, "HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n"),
        None => write!(tls, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nend"),
    })
}

#[tokio::test]
async fn a_redirect_is_followed_to_an_allowed_host_alone() {
    let server = redirecting(|path| match path {
        "/relative" => Some("../end#x".to_owned()),
        "/evil" => Some("https://evil.test/".to_owned()),
        "/plain" => Some("http://files.test/".to_owned()),
        "/file" => Some("file:///etc/passwd".to_owned()),
        "/user" => Some("https://user:pw@files.test/".to_owned()),
        "/port" => Some("https://files.test:1/".to_owned()),
        "/nowhere" => Some(String::new()),
        _ => None,
    });
    let (policy, names) = (server.policy(), Names::always(LOOPBACK));
    assert_eq!(read(&policy, &server.url("files.test", "/relative"), &names).await.unwrap(), "end");
    for path in ["/evil", "/plain", "/file", "/user", "/port"] {
        let kind = refused(&policy, &server.url("files.test", path), &names).await;
        assert_eq!(kind, StagingErrorKind::Denied, "{path}");
    }
    let absolute = server.port;
    let server = redirecting(move |path| (path == "/a").then(|| format!("https://files.test:{absolute}/b")));
    assert_eq!(
        refused(&server.policy(), &server.url("files.test", "/a"), &names).await,
        StagingErrorKind::Denied
    );
}

#[tokio::test]
async fn the_address_of_a_redirect_is_checked_again() {
    let server = redirecting(|path| (path == "/a").then(|| "/b".to_owned()));
    let names = Names(vec![vec!["127.0.0.1"], vec!["169.254.169.254"]], AtomicUsize::new(0));
    let kind = refused(&server.policy(), &server.url("files.test", "/a"), &names).await;
    assert_eq!(kind, StagingErrorKind::Denied);
    assert_eq!(server.asked().len(), 1, "the second request was not sent");
}

#[tokio::test]
async fn redirects_without_end_are_given_up() {
    let server = redirecting(|path| Some(format!("{path}x")));
    let kind = refused(&server.policy(), &server.url("files.test", "/a"), &Names::always(LOOPBACK)).await;
    assert_eq!(kind, StagingErrorKind::LimitExceeded);
    assert_eq!(server.asked().len(), 6, "the first and five redirects");
}

#[tokio::test]
async fn more_bytes_than_the_limit_are_not_read() {
    let server = Server::new(|path, tls| match path {
        "/told" => write!(tls, "HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n"),
        // Without a length, and without an end.
        _ => {
            write!(tls, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
            loop {
                write!(tls, "4\r\nxxxx\r\n")?;
            }
        }
    });
    let policy = HttpsPolicy { max_bytes: 10, ..server.policy() };
    for path in ["/told", "/endless"] {
        let kind = refused(&policy, &server.url("files.test", path), &Names::always(LOOPBACK)).await;
        assert_eq!(kind, StagingErrorKind::LimitExceeded, "{path}");
    }
}

#[tokio::test]
async fn a_server_that_falls_silent_or_breaks_off_is_a_failure_that_may_pass() {
    let server = Server::new(|path, tls| {
        write!(tls, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")?;
        tls.flush()?;
        if path == "/silent" {
            // Until the client has had enough.
            let _ = tls.read(&mut [0]);
        }
        Ok(())
    });
    let policy = HttpsPolicy { stall_timeout: Duration::from_millis(300), ..server.policy() };
    for path in ["/silent", "/broken"] {
        let kind = refused(&policy, &server.url("files.test", path), &Names::always(LOOPBACK)).await;
        assert_eq!(kind, StagingErrorKind::Unavailable, "{path}");
    }
}

#[tokio::test]
async fn an_answer_that_is_no_success_says_whether_it_may_pass() {
    let server =
        Server::new(|path, tls| write!(tls, "HTTP/1.1 {} X\r\nContent-Length: 5\r\n\r\nerror", &path[1..]));
    for (status, kind) in [
        ("503", StagingErrorKind::Unavailable),
        ("429", StagingErrorKind::Unavailable),
        ("404", StagingErrorKind::NotFound),
        ("403", StagingErrorKind::Denied),
        ("206", StagingErrorKind::Store),
        ("304", StagingErrorKind::Store),
    ] {
        let url = server.url("files.test", &format!("/{status}"));
        assert_eq!(refused(&server.policy(), &url, &Names::always(LOOPBACK)).await, kind, "{status}");
    }
}

#[tokio::test]
async fn a_certificate_that_is_not_trusted_or_not_of_the_host_is_refused() {
    let server = Server::files(&[("/a", "contents")]);
    let untrusting = HttpsPolicy { ca_pem: None, ..server.policy() };
    let names = Names::always(LOOPBACK);
    assert_eq!(refused(&untrusting, &server.url("files.test", "/a"), &names).await, StagingErrorKind::Denied);
    let host = format!("not-in-the-certificate.test:{}", server.port);
    let policy = HttpsPolicy { hosts: vec![host.parse().unwrap()], ..server.policy() };
    let url = server.url("not-in-the-certificate.test", "/a");
    assert_eq!(refused(&policy, &url, &names).await, StagingErrorKind::Denied);
    assert_eq!(server.asked(), [""; 0]);
}

#[tokio::test]
async fn nobody_at_the_address_and_a_name_without_one_may_pass() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let policy = HttpsPolicy {
        hosts: vec![format!("files.test:{port}").parse().unwrap()],
        allow_addresses: vec!["127.0.0.1".parse().unwrap()],
        ..HttpsPolicy::default()
    };
    let url: HttpsUrl = format!("https://files.test:{port}/").parse().unwrap();
    assert_eq!(refused(&policy, &url, &Names::always(LOOPBACK)).await, StagingErrorKind::Unavailable);
    struct Nobody;
    #[async_trait]
    impl Resolver for Nobody {
        async fn resolve(&self, _: &str, _: u16) -> io::Result<Vec<SocketAddr>> {
            Err(io::ErrorKind::NotFound.into())
        }
    }
    let error = fetch(&policy, &url, &about(), &Nobody).await.err().unwrap();
    assert_eq!(error.kind, StagingErrorKind::Unavailable);
}
