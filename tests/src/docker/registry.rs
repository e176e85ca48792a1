//! A registry on the loopback, Debian's `docker-registry`, with accounts or without.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use bollard::{
    Docker,
    auth::DockerCredentials,
    query_parameters::{PushImageOptionsBuilder, RemoveImageOptionsBuilder},
};
use futures::StreamExt as _;

use super::TestImage;
use crate::{backend::Missing, place::Place};

const LOOKS: u32 = 600;
const LOOK: Duration = Duration::from_millis(50);

/// Somebody whom a registry with accounts knows.
#[derive(Debug, Clone, Copy)]
pub struct Account {
    /// The name.
    pub user: &'static str,
    /// The password.
    pub password: &'static str,
    /// Its bcrypt form, as registries want it.
    hash: &'static str,
}

impl Account {
    /// Has a password whose base64 is different in the two alphabets, wherever it begins.
    pub const ALICE: Self = Self {
        user: "alice",
        password: "??>>~~??>>~~",
        hash: "$2y$05$abcdefghijklmnopqrstuu2H8asn6Xnmx8AUsZPL2GIBiat42Fjh2",
    };
    /// Another one.
    pub const BOB: Self = Self {
        user: "bob",
        password: "builder",
        hash: "$2y$05$abcdefghijklmnopqrstuu3wiKDIdUrAhSFkvcAcWHGTjN7vc525q",
    };
}

/// A registry. Dropping it ends it and removes what it stored.
#[derive(Debug)]
pub struct Registry {
    /// The first to go: it ends the process.
    place: Place,
    process: Process,
    address: SocketAddr,
    accounts: bool,
}

/// Waited for when it is dropped.
#[derive(Debug)]
struct Process(Option<Child>);

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.wait();
        }
    }
}

impl Registry {
    /// Starts one. With `accounts`, it gives nothing to who is neither [`Account::ALICE`] nor [`Account::BOB`].
    ///
    /// # Errors
    /// Where there is none here.
    ///
    /// # Panics
    /// Where there is one, and it does not come up.
    pub fn start(accounts: bool) -> Result<Self, Missing> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        if !std::env::split_paths(&path).any(|dir| dir.join("docker-registry").is_file()) {
            return Err(Missing("no docker-registry here".to_owned()));
        }
        let place = Place::make().expect("a place for a registry");
        let accounts_file = place.path().join("htpasswd");
        let lines =
            [Account::ALICE, Account::BOB].map(|account| format!("{}:{}\n", account.user, account.hash));
        fs::write(&accounts_file, lines.concat()).expect("write the accounts");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = listener.local_addr().expect("its address");
        drop(listener);
        let mut config = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\n",
            place.path().join("registry").display()
        );
        if accounts {
            config +=
                &format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", accounts_file.display());
        }
        fs::write(place.path().join("config.yml"), config).expect("write the configuration");
        let mut registry = Self { place, process: Process(None), address, accounts };
        registry.resurrect();
        Ok(registry)
    }

    /// Starts it again, and waits until it answers.
    ///
    /// # Panics
    /// Where it does not come up.
    pub fn resurrect(&mut self) {
        let log = File::create(self.place.path().join("registry.log")).expect("the registry's log");
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(self.place.path().join("config.yml"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = self.process.0.insert(command.spawn().expect("start docker-registry"));
        for _ in 0..LOOKS {
            if answers(self.address) {
                return;
            }
            let ended = child.try_wait().expect("look at the registry");
            assert!(ended.is_none(), "the registry ended: {ended:?}\n{}", self.log());
            thread::sleep(LOOK);
        }
        panic!("the registry does not answer\n{}", self.log());
    }

    /// Ends it. What it stored stays.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.process.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// What it said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.place.path().join("registry.log")).unwrap_or_default()
    }

    /// Its name in image references: `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Stores an image as `repository:tag`, by way of an engine, which forgets it again. Returns the manifest's digest.
    ///
    /// # Panics
    /// Where that fails.
    pub async fn push(&self, docker: &Docker, image: &TestImage, name: &str) -> String {
        let full = format!("{}/{name}", self.address);
        image.load(docker, &full).await;
        let (repository, tag) = full.rsplit_once(':').expect("a tag");
        let credentials = self.accounts.then(|| DockerCredentials {
            // A password that needs no care: the client writes it in the wrong alphabet.
            username: Some(Account::BOB.user.to_owned()),
            password: Some(Account::BOB.password.to_owned()),
            serveraddress: Some(self.host()),
            ..DockerCredentials::default()
        });
        let options = PushImageOptionsBuilder::default().tag(tag).build();
        let mut pushing = std::pin::pin!(docker.push_image(repository, Some(options), credentials));
        while let Some(step) = pushing.next().await {
            step.expect("the registry takes the image");
        }
        let digests = docker.inspect_image(&full).await.expect("the image").repo_digests.unwrap_or_default();
        let prefix = format!("{repository}@");
        let digest =
            digests.iter().find_map(|digest| digest.strip_prefix(&prefix)).expect("a digest").to_owned();
        let force = RemoveImageOptionsBuilder::default().force(true).build();
        docker.remove_image(&full, Some(force), None).await.expect("the engine forgets it");
        digest
    }
}

fn answers(address: SocketAddr) -> bool {
    let ask = || {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /v2/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.take(4096).read_to_end(&mut answer)?;
        Ok::<_, std::io::Error>(answer.starts_with(b"HTTP/1.1 200") || answer.starts_with(b"HTTP/1.1 401"))
    };
    ask().unwrap_or(false)
}
