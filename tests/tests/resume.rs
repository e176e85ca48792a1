//! Uploads that break off: by a connection that is cut, by a service that is killed, by a command that is.

mod support;

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use runner_core::task::{TaskKind, spawn};
use runner_tests::{
    binaries,
    service::{Service, eventually, within},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use worker_client::{Client, TransferOptions};

/// Of a file that is sent in pieces, in bytes.
const SIZE: usize = 48 << 20;

/// What stands between a client and the service: counts what is sent, holds it up or cuts it.
#[derive(Debug, Clone, Default)]
struct Wire {
    sent: Arc<AtomicU64>,
    /// Every connection is cut after so many bytes, as long as there are cuts left.
    cut_after: u64,
    cuts: Arc<AtomicU64>,
    /// Nothing passes any more after so many bytes of all connections, while this is set.
    hold_after: u64,
    held: Arc<AtomicBool>,
}

impl Wire {
    /// Listens, and forwards to the service.
    async fn listen(self, service: &Service) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("its address");
        let upstream = service.endpoint().trim_start_matches("http://").to_owned();
        drop(spawn(TaskKind::Helper, "wire", async move {
            while let Ok((caller, _)) = listener.accept().await {
                let (wire, upstream) = (self.clone(), upstream.clone());
                drop(spawn(TaskKind::Helper, "wire", async move { wire.forward(caller, &upstream).await }));
            }
        }));
        address
    }

    async fn forward(&self, caller: TcpStream, upstream: &str) -> Option<()> {
        let service = TcpStream::connect(upstream).await.ok()?;
        let (mut from, mut back) = caller.into_split();
        let (mut answers, mut to) = service.into_split();
        let answering = async move {
            let _ = tokio::io::copy(&mut answers, &mut back).await;
        };
        let sending = async move {
            let (mut here, mut chunk) = (0u64, vec![0; 64 << 10]);
            loop {
                let read = from.read(&mut chunk).await.ok().filter(|read| *read > 0)?;
                here += read as u64;
                let all = self.sent.fetch_add(read as u64, Ordering::SeqCst) + read as u64;
                while self.held.load(Ordering::SeqCst) && all > self.hold_after {
                    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                }
                to.write_all(&chunk[..read]).await.ok()?;
                let cuts = self.cuts.load(Ordering::SeqCst);
                if cuts > 0 && here > self.cut_after {
                    self.cuts.store(cuts - 1, Ordering::SeqCst);
                    return Some(());
                }
            }
        };
        // Who is first ends both.
        tokio::select! {
            () = answering => {}
            _ = sending => {}
        }
        Some(())
    }
}

/// Bytes that no two places have in common.
fn file(path: &Path, size: usize) {
    let bytes: Vec<u8> =
        (0..size as u64 / 8).flat_map(|at| (at ^ 0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect();
    fs::write(path, bytes).expect("a local file");
}

/// The bytes under a URI are those of the file.
async fn assert_stored(client: &Client, uri: &str, local: &Path) {
    let back = tempfile::tempdir().expect("temp dir");
    let back = back.path().join("back");
    client.download(uri, &back, None, TransferOptions::default()).await.expect("the download");
    assert!(fs::read(&back).expect("it") == fs::read(local).expect("the file"), "{uri} is the file");
}

/// Nothing of any upload is left where they come in.
fn assert_nothing_on_its_way(service: &Service) {
    let left = fs::read_dir(service.data_dir().join("incoming")).expect("the folder").count();
    assert_eq!(left, 0, "what was stored is kept twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_whose_connection_is_cut_again_and_again_sends_little_twice() {
    let service = Service::start().await;
    let dir = tempfile::tempdir().expect("temp dir");
    let local = dir.path().join("a");
    file(&local, SIZE);
    // gRPC has a connection of its own, and stays far below.
    let wire = Wire { cut_after: 10 << 20, cuts: Arc::new(AtomicU64::new(4)), ..Wire::default() };
    let (sent, cuts) = (Arc::clone(&wire.sent), Arc::clone(&wire.cuts));
    let address = wire.listen(&service).await;
    let client = Client::connect(format!("http://{address}")).await.expect("a client");
    let options = TransferOptions::default();
    let stored = within("the upload", client.upload_file(&local, options)).await.expect("the upload");
    assert_eq!((stored.size, cuts.load(Ordering::SeqCst)), (SIZE as u64, 0));
    let sent = sent.load(Ordering::SeqCst);
    // Each cut loses what was under way: the buffers of two connections.
    assert!(sent < SIZE as u64 + 4 * (9 << 20), "{sent} bytes were sent");
    assert_stored(&service.client(), &stored.uri, &local).await;
    assert_nothing_on_its_way(&service);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_goes_on_after_the_service_was_killed_in_the_middle() {
    let mut service = Service::start().await;
    let dir = tempfile::tempdir().expect("temp dir");
    let local = dir.path().join("a");
    file(&local, SIZE);
    let held = Arc::new(AtomicBool::new(true));
    let wire = Wire { hold_after: 24 << 20, held: Arc::clone(&held), ..Wire::default() };
    let sent = Arc::clone(&wire.sent);
    let address = wire.listen(&service).await;
    let policy = worker_client::RetryPolicy { max_attempts: 100, ..worker_client::RetryPolicy::default() };
    let client =
        Client::builder(format!("http://{address}")).retry(policy).connect().await.expect("a client");
    let uploading = {
        let (client, local) = (client.clone(), local.clone());
        spawn(TaskKind::Helper, "upload", async move {
            client.upload_file(&local, TransferOptions::default()).await
        })
    };
    let incoming = service.data_dir().join("incoming");
    let come = || -> u64 {
        let files = fs::read_dir(&incoming).into_iter().flatten().flatten();
        files.filter_map(|file| file.metadata().ok()).map(|file| file.len()).sum()
    };
    eventually("half of it to come", async || (come() > 16 << 20).then_some(())).await;
    service.kill();
    held.store(false, Ordering::SeqCst);
    service.restart(&[]).await;
    let stored = within("the upload", uploading).await.expect("the task ends").expect("no panic");
    let stored = stored.expect("the upload");
    let sent = sent.load(Ordering::SeqCst);
    assert!(sent < SIZE as u64 + (24 << 20), "{sent} bytes were sent");
    assert_stored(&service.client(), &stored.uri, &local).await;
    assert_nothing_on_its_way(&service);
}

/// A command whose home is a directory of the test.
fn put(endpoint: &str, home: &Path, local: &Path) -> Child {
    let mut command = Command::new(binaries::runnerctl().expect("the command line is built"));
    command.env_remove("RUNNER_ENDPOINT").env_remove("XDG_STATE_HOME").env("HOME", home);
    command.args(["--endpoint", endpoint, "artifact", "put"]).arg(local);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("runnerctl")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_goes_on_where_one_that_was_killed_ended() {
    let service = Service::start().await;
    let dir = tempfile::tempdir().expect("temp dir");
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).expect("a directory");
    // The first two are whole when the command is killed.
    for (name, size) in [("a", 1000), ("b", SIZE / 12), ("c", SIZE)] {
        file(&tree.join(name), size);
    }
    let held = Arc::new(AtomicBool::new(true));
    let wire = Wire { hold_after: 48 << 20, held: Arc::clone(&held), ..Wire::default() };
    let sent = Arc::clone(&wire.sent);
    let endpoint = format!("http://{}", wire.listen(&service).await);
    let mut first = put(&endpoint, dir.path(), &tree);
    eventually("most of it to be sent", async || (sent.load(Ordering::SeqCst) > 48 << 20).then_some(()))
        .await;
    first.kill().expect("kill it");
    first.wait().expect("it is dead");
    let notes = dir.path().join(".local/state/runnerctl/uploads");
    assert_eq!(fs::read_dir(&notes).expect("notes").count(), 1);
    held.store(false, Ordering::SeqCst);
    let before = sent.swap(0, Ordering::SeqCst);
    let second = put(&endpoint, dir.path(), &tree).wait_with_output().expect("runnerctl");
    assert!(second.status.success(), "{}", String::from_utf8_lossy(&second.stderr));
    let again = sent.load(Ordering::SeqCst);
    assert!(again < (SIZE + SIZE / 12) as u64 - (32 << 20), "{before} bytes, and then {again}");
    assert_eq!(fs::read_dir(&notes).expect("notes").count(), 0, "it is done");
    let uri = String::from_utf8(second.stdout).expect("text").trim().to_owned();
    let back = dir.path().join("back");
    service.client().download_tree(&uri, &back, TransferOptions::default()).await.expect("the tree");
    for name in ["a", "b", "c"] {
        assert!(fs::read(back.join(name)).expect("back") == fs::read(tree.join(name)).expect("it"), "{name}");
    }
    assert_nothing_on_its_way(&service);
}
