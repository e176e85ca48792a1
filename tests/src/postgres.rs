//! A real PostgreSQL, as Debian installs it: a server for the tests of a process, and a schema for each of them.

use std::{
    fs,
    io::{self, Write as _},
    net::SocketAddr,
    os::unix::{
        fs::{PermissionsExt as _, chown},
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use runner_core::task::{TaskKind, spawn};
use runner_store::{PostgresOptions, postgres::migrate};
use rustix::process::{Pid, Signal};
use tokio_postgres::{Client, NoTls};

use crate::{docker::tls, objects::required, place::Place, port::free_address};

/// Owns everything, and logs in without a password.
pub const USER: &str = "runner";
/// Logs in with [`PASSWORD`] only.
pub const CAREFUL_USER: &str = "careful";
/// Of [`CAREFUL_USER`].
pub const PASSWORD: &str = "not to be seen: 'quoted' & \u{fc}nusual";
/// Who runs the server where the tests are root's: it refuses to be.
const SYSTEM_USER: &str = "postgres";
/// How often it is looked whether the server answers: for 60 seconds.
const LOOKS: u32 = 3000;
const LOOK: Duration = Duration::from_millis(20);

/// A server. Dropping it ends it and removes all of it.
#[derive(Debug)]
pub struct Postgres {
    /// The first to go: it ends the server.
    place: Place,
    bin: PathBuf,
    process: Mutex<Option<Child>>,
    address: SocketAddr,
    schemas: AtomicU32,
}

impl Postgres {
    /// The one of this process; started where there is none. `Err`: why it cannot be had.
    ///
    /// # Panics
    /// Where it is installed and does not start, or where it is missing and `RUNNER_REQUIRE_STORES` names `postgres`.
    pub fn shared() -> Result<&'static Self, &'static str> {
        static ONE: OnceLock<Option<Postgres>> = OnceLock::new();
        ONE.get_or_init(Self::start).as_ref().ok_or("PostgreSQL is not installed")
    }

    /// Starts another one. `None`: it is not installed, which is said.
    ///
    /// # Panics
    /// As [`Self::shared`].
    pub fn start() -> Option<Self> {
        let Some(bin) = programs() else {
            assert!(
                !required("postgres"),
                "PostgreSQL is not installed: run `cargo xtask test` once, as root"
            );
            return None;
        };
        let place = Place::make().expect("a place for PostgreSQL");
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o711)).expect("open the place");
        let data = place.path().join("data");
        fs::create_dir(&data).expect("a directory for PostgreSQL");
        if let Some((user, group)) = system_user() {
            chown(&data, Some(user), Some(group)).expect("give the directory away");
        }
        let made = unprivileged(&bin.join("initdb"))
            .args([
                "--no-sync",
                "--encoding=UTF8",
                "--locale=C",
                "--auth=trust",
                "--username",
                USER,
                "--pgdata",
            ])
            .arg(&data)
            .stdin(Stdio::null())
            .output()
            .expect("initdb starts");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let rules =
            format!("host all {CAREFUL_USER} 127.0.0.0/8 scram-sha-256\nhost all all 127.0.0.0/8 trust\n");
        fs::write(data.join("pg_hba.conf"), rules).expect("say who may log in");
        let tls = place.path().join("tls");
        tls::make(&tls).expect("certificates");
        let key = tls.join("server-key.pem");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("hide the key");
        if let Some((user, group)) = system_user() {
            chown(&key, Some(user), Some(group)).expect("give the key away");
        }
        let server = Self {
            place,
            bin,
            process: Mutex::new(None),
            address: free_address(),
            schemas: AtomicU32::new(0),
        };
        server.go();
        Some(server)
    }

    fn process(&self) -> MutexGuard<'_, Option<Child>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the server's process, and waits until it lets in whoever connects.
    ///
    /// # Panics
    /// Where it does not.
    pub fn go(&self) {
        let mut process = self.process();
        for _ in 0..LOOKS {
            // One that was killed leaves memory behind for as long as its last session lives: then this one ends at once.
            let ended = process.as_mut().is_none_or(|child| matches!(child.try_wait(), Ok(Some(_))));
            if ended {
                *process = Some(self.spawn());
            }
            let asked = unprivileged(&self.bin.join("pg_isready"))
                .args(["--quiet", "--host=127.0.0.1", "--port", &self.address.port().to_string()])
                .status();
            if asked.is_ok_and(|status| status.success()) {
                return;
            }
            thread::sleep(LOOK);
        }
        let log = fs::read_to_string(self.place.path().join("log")).unwrap_or_default();
        panic!("PostgreSQL does not answer:\n{log}");
    }

    fn spawn(&self) -> Child {
        let path = self.place.path().join("log");
        let log = fs::File::options().create(true).append(true).open(path).expect("a log file");
        let child = unprivileged(&self.bin.join("postgres"))
            .arg("-D")
            .arg(self.place.path().join("data"))
            .args(["-p", &self.address.port().to_string()])
            .args([
                "-c",
                "listen_addresses=127.0.0.1,127.0.0.2",
                "-c",
                "unix_socket_directories=",
                "-c",
                "ssl=on",
            ])
            .args(["-c", &format!("ssl_cert_file={}", self.place.path().join("tls/server.pem").display())])
            .args(["-c", &format!("ssl_key_file={}", self.place.path().join("tls/server-key.pem").display())])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0)
            .spawn()
            .expect("PostgreSQL starts");
        fs::write(self.place.pid_file("postgres"), child.id().to_string()).expect("note the pid");
        child
    }

    /// Ends the server's process: cleanly, every session at once; or as a crash of the machine would.
    ///
    /// # Panics
    /// Where it does not run.
    pub fn stop(&self, cleanly: bool) {
        let mut child = self.process().take().expect("PostgreSQL runs");
        let pid = Pid::from_child(&child);
        let signal = if cleanly { Signal::INT } else { Signal::KILL };
        rustix::process::kill_process(pid, signal).expect("PostgreSQL is told to end");
        child.wait().expect("PostgreSQL ends");
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The authority of its certificate, which is for 127.0.0.1 and `localhost`, and not for 127.0.0.2, where it listens too.
    pub fn authority(&self) -> PathBuf {
        self.place.path().join("tls/ca.pem")
    }

    /// A schema of its own, not migrated.
    pub async fn schema(&self) -> String {
        let schema = format!("t{}", self.schemas.fetch_add(1, Ordering::Relaxed));
        self.admin().await.batch_execute(&format!("CREATE SCHEMA {schema}")).await.expect("make a schema");
        schema
    }

    /// The settings of a service whose state is in a schema of its own, which is made and migrated. Blocks; needs no runtime.
    ///
    /// # Panics
    /// Where that fails.
    pub fn settings(&self) -> [(&'static str, String); 1] {
        let schema = thread::scope(|scope| {
            let made = scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                runtime.expect("a runtime").block_on(async {
                    let schema = self.schema().await;
                    migrate(&self.options(&schema)).await.expect("the schema is migrated");
                    schema
                })
            });
            made.join().expect("a schema")
        });
        [("RUNNER_STORE__URL", url(USER, self.address, &schema))]
    }

    /// How a store is opened in a schema, by way of `address`.
    pub fn options_at(&self, address: SocketAddr, schema: &str) -> PostgresOptions {
        PostgresOptions {
            wait_for_other: Duration::from_secs(30),
            ..PostgresOptions::new(url(USER, address, schema))
        }
    }

    /// How a store is opened in a schema.
    pub fn options(&self, schema: &str) -> PostgresOptions {
        self.options_at(self.address, schema)
    }

    /// A session of whoever may do everything.
    pub async fn admin(&self) -> Client {
        let (address, port) = (self.address.ip(), self.address.port());
        let config = format!("host={address} port={port} user={USER} dbname=postgres");
        let (client, connection) = tokio_postgres::connect(&config, NoTls).await.expect("PostgreSQL lets in");
        spawn(TaskKind::Helper, "postgres-admin", async move { drop(connection.await) });
        client
    }
}

/// The URL of a schema.
pub fn url(user: &str, address: SocketAddr, schema: &str) -> String {
    format!("postgres://{user}@{address}/postgres?sslmode=disable&options=-csearch_path%3D{schema}")
}

/// Says on standard output that `test` does not run, and why.
pub fn skip(test: &str, why: &str) {
    let _ = writeln!(io::stdout(), "SKIP store=postgres case={test} missing={why}");
}

/// Where Debian has the newest of its releases.
fn programs() -> Option<PathBuf> {
    let releases = fs::read_dir("/usr/lib/postgresql").ok()?.filter_map(Result::ok);
    let newest = releases
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|release| bin(*release).join("initdb").exists())
        .max()?;
    Some(bin(newest))
}

fn bin(release: u32) -> PathBuf {
    Path::new("/usr/lib/postgresql").join(release.to_string()).join("bin")
}

/// User and group of [`SYSTEM_USER`], where this process is root's.
fn system_user() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let users = fs::read_to_string("/etc/passwd").expect("the users of this machine");
    let line = users.lines().find_map(|line| line.strip_prefix(SYSTEM_USER)?.strip_prefix(':'));
    let mut fields = line.expect("Debian's package makes the user").split(':').skip(1);
    let mut number = || fields.next()?.parse().ok();
    Some((number()?, number()?))
}

fn unprivileged(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("LC_ALL", "C").current_dir("/");
    if let Some((user, group)) = system_user() {
        command.uid(user).gid(group);
    }
    command
}
