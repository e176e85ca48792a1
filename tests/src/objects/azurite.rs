//! Azurite, the emulator of Azure Blob Storage, as `cargo xtask` installs it.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak, mpsc},
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use runner_artifacts::object::{StoreOptions, Tuning};
use sha2::Sha256;

/// The account of every Azurite. Its key is public, and printed in its manual.
const ACCOUNT: &str = "devstoreaccount1";
const KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
/// Name of the container.
const CONTAINER: &str = "runner-test";
/// The time that it may take to listen.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running Azurite with one container, in memory. Shared by the tests of a process; ends with the last of them.
#[derive(Debug)]
pub struct Azurite {
    child: Mutex<Child>,
    endpoint: String,
    dir: tempfile::TempDir,
}

/// Where `cargo xtask` puts what tests need and no package manager of the system has.
pub fn tools() -> Option<PathBuf> {
    let exe = std::env::current_exe().ok()?;
    exe.ancestors().map(|dir| dir.join("test-tools")).find(|dir| dir.is_dir())
}

impl Azurite {
    /// The one of this process; started where there is none. `None`: it is not installed.
    ///
    /// # Panics
    /// Where it is installed and does not start, or where it is missing and `RUNNER_REQUIRE_STORES` names `azure`.
    pub fn shared() -> Option<Arc<Self>> {
        static ONE: OnceLock<Mutex<Weak<Azurite>>> = OnceLock::new();
        let mut one = ONE.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = one.upgrade() {
            return Some(running);
        }
        let program = tools().map(|dir| dir.join("azurite/node_modules/.bin/azurite-blob"));
        let Some(program) = program.filter(|program| program.exists()) else {
            assert!(!super::required("azure"), "Azurite is not installed: run `cargo xtask test` once");
            return None;
        };
        let started = Arc::new(Self::start(&program));
        *one = Arc::downgrade(&started);
        Some(started)
    }

    fn start(program: &std::path::Path) -> Self {
        let dir = tempfile::tempdir().expect("a directory for Azurite");
        std::fs::write(dir.path().join("key"), KEY).expect("the key is written");
        let mut child = Command::new("node")
            .arg(program)
            .args(["--blobHost", "127.0.0.1", "--blobPort", "0", "--inMemoryPersistence", "--silent"])
            .args(["--skipApiVersionCheck", "--disableTelemetry"])
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("node starts");
        let lines = BufReader::new(child.stdout.take().expect("its output is piped")).lines();
        let (found, endpoint) = mpsc::channel();
        // Reads to the end, so that it never waits for a reader.
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Some(at) = line.find("http://127.0.0.1:") {
                    let _ = found.send(line[at..].trim().to_owned());
                }
            }
        });
        let endpoint = endpoint.recv_timeout(PATIENCE).expect("Azurite says where it listens");
        let azurite = Self { child: Mutex::new(child), endpoint, dir };
        azurite.create_container();
        azurite
    }

    /// Names the container, with a prefix in it.
    pub fn url(&self, prefix: &str) -> String {
        format!("az://{CONTAINER}/{prefix}")
    }

    /// How a store is opened on it.
    pub fn options(&self) -> StoreOptions {
        StoreOptions {
            endpoint: Some(format!("{}/{ACCOUNT}", self.endpoint)),
            allow_http: true,
            credentials_file: Some(self.dir.path().join("key")),
            settings: [("account_name".to_owned(), ACCOUNT.to_owned())].into(),
            tuning: Tuning {
                backoff: Duration::from_millis(5),
                max_backoff: Duration::from_millis(50),
                ..Tuning::default()
            },
        }
    }

    /// By the store's own HTTP: `object_store` makes no containers.
    fn create_container(&self) {
        let date = "Sat, 01 Jan 2028 00:00:00 GMT";
        let signed = format!(
            "PUT\n\n\n\n\n\n\n\n\n\n\n\nx-ms-date:{date}\nx-ms-version:2021-12-02\n/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
        );
        let key = BASE64_STANDARD.decode(KEY).expect("the key is base64");
        let mut mac = Hmac::<Sha256>::new_from_slice(&key).expect("HMAC takes any key");
        mac.update(signed.as_bytes());
        let signature = BASE64_STANDARD.encode(mac.finalize().into_bytes());
        let host = self.endpoint.trim_start_matches("http://");
        let request = format!(
            "PUT /{ACCOUNT}/{CONTAINER}?restype=container HTTP/1.1\r\nHost: {host}\r\nx-ms-date: {date}\r\n\
             x-ms-version: 2021-12-02\r\nAuthorization: SharedKey {ACCOUNT}:{signature}\r\nContent-Length: 0\r\n\
             Connection: close\r\n\r\n"
        );
        let mut stream = TcpStream::connect(host).expect("Azurite listens");
        stream.write_all(request.as_bytes()).expect("the request is sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("the request is answered");
        assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    }
}

impl Drop for Azurite {
    fn drop(&mut self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = child.kill();
        let _ = child.wait();
    }
}
