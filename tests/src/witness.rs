//! Counts the starts of programs, from outside of everything that is tested.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex},
};

use bollard::query_parameters::EventsOptionsBuilder;
use futures::StreamExt as _;
use runner_core::{
    clock::{Clock as _, SystemClock},
    task::{TaskKind, spawn},
};
use tokio::{io::AsyncReadExt as _, net::TcpListener};
use worker_client::RunSpec;

use crate::{docker::Engine, service::eventually};

type Seen = Arc<Mutex<BTreeMap<String, u32>>>;

/// Counts the starts of attempts' programs.
#[derive(Debug)]
pub struct Witness {
    seen: Seen,
    told: Told,
}

/// Who tells of a start.
#[derive(Debug, Clone, Copy)]
enum Told {
    /// The program, by bash.
    Bash(SocketAddr),
    /// The program, by busybox.
    Netcat(SocketAddr),
    /// An engine, of its containers.
    Engine,
}

fn count(seen: &Seen, attempt: &str) {
    *seen.lock().expect("nobody panicked").entry(attempt.to_owned()).or_default() += 1;
}

impl Witness {
    /// Programs that start say so on a socket of the loopback. They need bash and the network `egress`.
    pub async fn listen() -> Self {
        let (seen, address) = Self::heard(Ipv4Addr::LOCALHOST.into()).await;
        Self { seen, told: Told::Bash(address) }
    }

    /// Programs that start say so on a socket of this address. They need busybox and the network `egress`.
    pub async fn listen_on(address: IpAddr) -> Self {
        let (seen, address) = Self::heard(address).await;
        Self { seen, told: Told::Netcat(address) }
    }

    async fn heard(address: IpAddr) -> (Seen, SocketAddr) {
        let listener = TcpListener::bind((address, 0)).await.expect("listen");
        let address = listener.local_addr().expect("its address");
        let seen = Seen::default();
        let to = Arc::clone(&seen);
        let listening = async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut name = String::new();
                // A program that is killed in the middle of its name was started all the same.
                let _ = stream.read_to_string(&mut name).await;
                count(&to, name.trim());
            }
        };
        drop(spawn(TaskKind::Helper, "witness", listening));
        (seen, address)
    }

    /// An engine tells when it starts a container that has the label of an attempt.
    pub fn of_engine(engine: &Engine) -> Self {
        const LABEL: &str = "runner.attempt";
        let docker = engine.connect();
        let filters =
            HashMap::from([("type", vec!["container"]), ("event", vec!["start"]), ("label", vec![LABEL])]);
        // What happens before the engine listens to us it tells afterwards.
        let since = (SystemClock::new().now().as_micros() / 1_000_000).to_string();
        let options = EventsOptionsBuilder::default().since(&since).filters(&filters).build();
        let seen = Seen::default();
        let to = Arc::clone(&seen);
        let listening = async move {
            let mut events = std::pin::pin!(docker.events(Some(options)));
            while let Some(Ok(event)) = events.next().await {
                let attributes = event.actor.and_then(|actor| actor.attributes).unwrap_or_default();
                if let Some(attempt) = attributes.get(LABEL) {
                    count(&to, attempt);
                }
            }
        };
        drop(spawn(TaskKind::Helper, "witness", listening));
        Self { seen, told: Told::Engine }
    }

    /// A run of a shell script whose start is witnessed.
    pub fn script(&self, script: &str) -> RunSpec {
        let name = r#"echo "$RUNNER_RUN_ID.$RUNNER_ATTEMPT""#;
        match self.told {
            Told::Engine => RunSpec::command(["sh", "-c", script]),
            Told::Bash(address) => {
                let (ip, port) = (address.ip(), address.port());
                let script = format!("{name} > /dev/tcp/{ip}/{port} || exit 98\n{script}");
                RunSpec::command(["bash", "-c", &script]).network_egress()
            }
            Told::Netcat(address) => {
                let (ip, port) = (address.ip(), address.port());
                let script = format!("{name} | nc {ip} {port} || exit 98\n{script}");
                RunSpec::command(["sh", "-c", &script]).network_egress()
            }
        }
    }

    /// Asserts that this run had one attempt, started once.
    ///
    /// # Panics
    /// Where it had not.
    pub async fn assert_one_start(&self, run: &str) {
        let starts = eventually("the start to be witnessed", async || {
            let seen = self.seen.lock().expect("nobody panicked");
            let starts: BTreeMap<_, _> =
                seen.iter().filter(|(name, _)| name.starts_with(run)).map(|(k, v)| (k.clone(), *v)).collect();
            (!starts.is_empty()).then_some(starts)
        })
        .await;
        assert_eq!(starts, [(format!("{run}.1"), 1)].into(), "one attempt, started once");
    }
}
