//! Bytes past the service: the real roles of `runner-agent` in temporary directories, the real surface, and a real S3 server
//! that fails on demand, or one of files over TLS. What the service itself moves is counted by the service.

use std::{collections::BTreeMap, fs, net::SocketAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use runner::{
    agents::{self, Agents, Direct, LiveAttempts},
    config::Config,
    metrics::Metrics,
    server::{Server, bind_for_agents},
};
use runner_agent::{
    exec::protocol::{ExecSpec, ExitReason, ExitRecord, Namespaces, Root, StartedRecord, name},
    pod::{self, Pod, PodError, Token, order::Order},
    staging::{StagingLimits, read_manifest},
};
use runner_artifacts::object::{StoreOptions, open_url};
use runner_core::{
    agent::{AgentAnswer, AgentAsk, AgentHub, AgentKey, AgentOrder},
    artifact::{ArtifactKey, ArtifactStore, ArtifactUri},
    backend::{AttemptContext, NoProgress},
    clock::{self, IdGen as _, SystemIds, Timestamp},
    https::HttpsPolicy,
    id::AttemptId,
    outcome::{ExitStatus, Usage},
    spec::{Input, InputSource, Output, RunSpec, User},
    task::{TaskKind, spawn},
};
use runner_proto::agent::{SignObjectRequest, Upload, agent_client::AgentClient};
use runner_tests::{
    artifact::{key, pattern, read},
    https::HttpsServer,
    objects::{Action, Dialect, Fault, StoreServer},
    port::free_address,
    service::within,
};
use sha2::{Digest as _, Sha256};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::{Code, transport::Endpoint};

/// What a request that was signed by its URL has in it, and no other one.
const SIGNED: &str = "X-Amz-Signature";
const INPUT: &str = "uploads/t/u/object";
/// Large enough to be cut off in the middle.
const LARGE: usize = 3 << 20;

#[derive(Debug)]
struct AllLive;

#[async_trait]
impl LiveAttempts for AllLive {
    async fn is_live(&self, _: AttemptId) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
        Ok(true)
    }
}

/// A store that a test can make ill, a surface before it, and a pod that is a few directories.
struct Rig {
    bucket: StoreServer,
    store: Arc<dyn ArtifactStore>,
    hub: Arc<AgentHub>,
    metrics: Arc<Metrics>,
    stops: [CancellationToken; 2],
    task: JoinHandle<Option<()>>,
    address: SocketAddr,
    attempt: AttemptContext,
    pod: Pod,
    _dir: tempfile::TempDir,
}

impl Rig {
    /// With the store where it is, for agents, too.
    async fn new() -> Self {
        Self::with(InputSource::Artifact(ArtifactUri::object(key(INPUT))), None, HttpsPolicy::default()).await
    }

    /// With this input, and the store where agents are told that it is.
    async fn with(source: InputSource, elsewhere: Option<String>, https: HttpsPolicy) -> Self {
        let bucket = StoreServer::start(Dialect::S3);
        let clock = clock::system().0;
        let open = |options: &StoreOptions| open_url(&bucket.url("p"), options, &clock).unwrap();
        let store = open(&bucket.options());
        let direct = Direct {
            store: match elsewhere {
                Some(endpoint) => open(&StoreOptions { endpoint: Some(endpoint), ..bucket.options() }),
                None => open(&bucket.options()),
            },
            lifetime: Duration::from_secs(60),
            ca_pem: String::new(),
        };
        let listener =
            bind_for_agents("agent_listen", "--agent-listen", "127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let hub = AgentHub::new(AgentKey::new([7; 32]));
        let metrics = Arc::new(Metrics::new());
        let (draining, abort) = (CancellationToken::new(), CancellationToken::new());
        let server = Server {
            name: "agents",
            config: Config::default().server,
            metrics: Arc::clone(&metrics),
            draining: draining.clone(),
            abort: abort.clone(),
        };
        let surface = Agents {
            hub: Arc::clone(&hub),
            live: Arc::new(AllLive),
            direct: Some(direct),
            metrics: Arc::clone(&metrics),
            draining: draining.clone(),
        };
        let task = spawn(TaskKind::Loop, "agents", server.serve(listener, agents::router(surface)));
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["bin", "run", "stage"] {
            fs::create_dir(path(name)).unwrap();
        }
        let attempt = attempt(&store, source);
        let pod = Pod {
            bin: path("bin"),
            shim: path("run").join("shim"),
            stage: path("stage"),
            last_word: path("last-word"),
            url: format!("http://{address}"),
            uid: "pod-1".into(),
            token: Token::new(&hub.token(attempt.attempt)),
        };
        hub.take_up(AgentOrder {
            attempt: attempt.clone(),
            order: serde_json::to_vec(&order(&attempt, https)).unwrap().into(),
        });
        store.put_bytes(&key(INPUT), pattern(LARGE)).await.unwrap();
        Self { bucket, store, hub, metrics, stops: [draining, abort], task, address, attempt, pod, _dir: dir }
    }

    async fn fetch(&self) -> Result<(), PodError> {
        within("fetch", pod::fetch(&self.pod)).await
    }

    /// The input came whole and right.
    fn assert_staged(&self) {
        assert!(fs::read(self.pod.stage.join("in/0/x")).unwrap() == pattern(LARGE), "the bytes differ");
    }

    /// The program has written a large file and a small one; both are stored.
    async fn publish(&self) {
        fs::create_dir_all(&self.pod.shim).unwrap();
        let time = Timestamp::from_micros(5);
        let record = |name: &str, json: Vec<u8>| fs::write(self.pod.shim.join(name), json).unwrap();
        record(name::STARTED, serde_json::to_vec(&StartedRecord { time, pid: 1 }).unwrap());
        let exit = ExitRecord {
            reason: ExitReason::Exited,
            status: Some(ExitStatus::Code(0)),
            time,
            usage: Usage::default(),
            evidence: Vec::new(),
        };
        record(name::EXIT, serde_json::to_vec(&exit).unwrap());
        let out = self.pod.stage.join("out/0/x");
        fs::create_dir_all(&out).unwrap();
        fs::write(out.join("large"), pattern(LARGE)).unwrap();
        fs::write(out.join("medium"), pattern(300_000)).unwrap();
        fs::write(out.join("small"), "small").unwrap();
        let pod = self.pod.clone();
        let role = spawn(TaskKind::Helper, "publish", async move { pod::publish(&pod).await });
        let mut presence = self.hub.presence(self.attempt.attempt);
        within("connect", presence.wait_for(|presence| presence.connected)).await.unwrap();
        let ask = self.hub.ask(self.attempt.attempt, AgentAsk::Publish { partial: false });
        let published = within("publish", ask).await;
        assert_eq!(published, Ok(AgentAnswer::Published { stored: true, failure: None, notes: Vec::new() }));
        role.abort();
        let prefix = ArtifactKey::attempt_prefix(&self.attempt.tenant, self.attempt.attempt);
        let manifest = read_manifest(&*self.store, &prefix, &StagingLimits::default()).await;
        let manifest = manifest.unwrap().expect("a manifest");
        for (name, bytes) in
            [("large", pattern(LARGE)), ("medium", pattern(300_000)), ("small", "small".into())]
        {
            let entry = manifest.entries.iter().find(|entry| entry.path == name).expect(name);
            assert_eq!(
                (entry.size, &entry.sha256),
                (bytes.len() as u64, &hex::encode(Sha256::digest(&bytes)))
            );
            let at = entry.key.as_ref().expect("a file has bytes");
            let (_, found) = read(&*self.store, at, 0..u64::MAX).await.unwrap();
            assert!(found == bytes, "{name} is stored as it was written");
        }
        assert_eq!(self.bucket.bucket().uploads(), [""; 0], "abandoned uploads");
    }

    /// What the service has counted under this name and label.
    fn counted(&self, line: &str) -> u64 {
        let text = self.metrics.render();
        let value =
            text.lines().find_map(|at| at.strip_prefix(line)).map(|value| value.trim().parse().unwrap());
        value.unwrap_or(0)
    }

    fn sent(&self) -> u64 {
        self.counted(r#"runner_agent_objects_bytes_total{direction="out"}"#)
    }

    fn taken(&self) -> u64 {
        self.counted(r#"runner_agent_objects_bytes_total{direction="in"}"#)
    }

    /// Every fault has struck.
    async fn end(self) {
        assert!(self.bucket.faults().all_struck(), "{:?}", self.bucket.faults());
        self.stops.iter().for_each(CancellationToken::cancel);
        within("end the surface", self.task).await.unwrap();
    }
}

fn attempt(store: &Arc<dyn ArtifactStore>, source: InputSource) -> AttemptContext {
    let output =
        Output { path: "/outputs/x".into(), glob: false, destination: None, required: true, max_bytes: None };
    // Without a digest: what comes wrong would not be seen by it.
    let input = Input { path: "/inputs/x".into(), source, sha256: None, mode: None, extract: None };
    AttemptContext {
        attempt: AttemptId { run: SystemIds.run_id(), number: 1 },
        tenant: "t".parse().unwrap(),
        spec: Arc::new(RunSpec {
            command: vec!["/bin/true".into()],
            inputs: vec![input],
            outputs: vec![output],
            ..RunSpec::default()
        }),
        log_limit_bytes: 1 << 20,
        artifacts: Arc::clone(store),
        progress: Arc::new(NoProgress),
    }
}

fn order(attempt: &AttemptContext, https: HttpsPolicy) -> Order {
    Order {
        attempt: attempt.attempt,
        tenant: attempt.tenant.clone(),
        spec: attempt.spec.as_ref().clone(),
        exec: ExecSpec {
            attempt: attempt.attempt,
            argv: attempt.spec.command.clone(),
            env: BTreeMap::new(),
            working_dir: "/".into(),
            root: Root::Host { hidden: Vec::new() },
            read_only_root: false,
            mounts: Vec::new(),
            user: User { uid: 65532, gid: 65532 },
            namespaces: Namespaces::default(),
            cgroup: None,
            file_size_bytes: None,
            address_space_bytes: None,
            nproc: None,
            timeout: Duration::from_secs(60),
            stop_grace: Duration::from_secs(1),
            terminal: None,
            stdin: false,
            log_limit_bytes: attempt.log_limit_bytes,
        },
        limits: StagingLimits { https, ..StagingLimits::default() },
    }
}

/// Less than this is what passes the service anyway: small files and the manifest.
const LITTLE: u64 = 64 * 1024;

#[tokio::test]
async fn inputs_and_outputs_do_not_pass_the_service() {
    let rig = Rig::new().await;
    rig.fetch().await.unwrap();
    rig.assert_staged();
    rig.publish().await;
    assert_eq!(rig.sent(), 0);
    assert!(rig.taken() < LITTLE, "{}", rig.metrics.render());
    assert_eq!(rig.counted(r#"runner_agent_urls_total{method="GET"}"#), 1);
    assert_eq!(rig.counted(r#"runner_agent_urls_total{method="PUT"}"#), 2);
    rig.end().await;
}

#[tokio::test]
async fn a_read_that_fails_goes_on_with_a_fresh_url_where_it_was() {
    for fault in [
        Fault::on("GET", SIGNED, Action::Status(503, "SlowDown")).times(2),
        Fault::on("GET", SIGNED, Action::Status(403, "AccessDenied")),
        Fault::on("GET", SIGNED, Action::LoseAnswer),
        Fault::on("GET", SIGNED, Action::CutAnswer(0)),
        Fault::on("GET", SIGNED, Action::CutAnswer(1_000_001)).times(2),
    ] {
        let rig = Rig::new().await;
        let what = format!("{fault:?}");
        rig.bucket.fault(fault);
        rig.fetch().await.expect(&what);
        rig.assert_staged();
        assert_eq!(rig.sent(), 0, "{what}");
        assert_eq!(rig.hub.presence(rig.attempt.attempt).borrow().reports, 0, "{what}");
        rig.end().await;
    }
}

#[tokio::test]
async fn an_object_that_is_replaced_while_it_is_read_is_never_mixed() {
    let rig = Rig::new().await;
    rig.bucket.fault(Fault::on("GET", SIGNED, Action::CutAnswer(1_000_001)));
    let bucket = Arc::clone(rig.bucket.bucket());
    let replace = move || bucket.replace(&format!("p/{INPUT}"), &vec![7; LARGE]);
    rig.bucket.fault(Fault::on("GET", SIGNED, Action::First(Arc::new(replace))));
    match rig.fetch().await {
        Err(PodError::Inputs(why)) => assert!(why.contains("replaced") && !why.contains("Amz"), "{why}"),
        other => panic!("{other:?}"),
    }
    assert!(!rig.pod.stage.join("in/0/x").exists());
    rig.end().await;
}

#[tokio::test]
async fn a_store_that_does_not_take_what_was_signed_is_reached_by_the_service() {
    let rig = Rig::new().await;
    rig.bucket.fault(Fault::on("GET", SIGNED, Action::Status(403, "AccessDenied")).times(4));
    rig.fetch().await.unwrap();
    rig.assert_staged();
    assert_eq!(rig.sent(), LARGE as u64);
    rig.bucket.fault(Fault::on("PUT", SIGNED, Action::Status(403, "AccessDenied")).times(8));
    rig.publish().await;
    assert!(rig.taken() > LARGE as u64 + 300_000, "{}", rig.metrics.render());
    rig.end().await;
}

#[tokio::test]
async fn a_store_that_pods_do_not_reach_is_reached_by_the_service() {
    let nobody = format!("http://{}", free_address());
    let source = InputSource::Artifact(ArtifactUri::object(key(INPUT)));
    let rig = Rig::with(source, Some(nobody), HttpsPolicy::default()).await;
    rig.fetch().await.unwrap();
    rig.assert_staged();
    assert_eq!(rig.sent(), LARGE as u64);
    rig.publish().await;
    assert!(rig.taken() > LARGE as u64 + 300_000, "{}", rig.metrics.render());
    assert_eq!(rig.bucket.faults().count("GET", SIGNED) + rig.bucket.faults().count("PUT", SIGNED), 0);
    rig.end().await;
}

#[tokio::test]
async fn a_write_that_fails_is_made_again_with_a_fresh_url() {
    for fault in [
        Fault::on("PUT", SIGNED, Action::Status(503, "SlowDown")).times(2),
        Fault::on("PUT", SIGNED, Action::Status(403, "AccessDenied")),
        Fault::on("PUT", SIGNED, Action::CutRequest(100_000)).times(2),
        Fault::on("PUT", SIGNED, Action::LoseAnswer),
    ] {
        let rig = Rig::new().await;
        let what = format!("{fault:?}");
        rig.bucket.fault(fault);
        rig.publish().await;
        assert!(rig.taken() < LITTLE, "{what}: {}", rig.metrics.render());
        rig.end().await;
    }
}

/// What a read that is given up leaves to be read names the object, and never the request that permits it.
#[tokio::test]
async fn no_url_is_told_to_anybody() {
    let rig = Rig::new().await;
    let presence = rig.hub.presence(rig.attempt.attempt);
    // An answer is cut off, and all that would go on with it is refused; then staging begins anew.
    rig.bucket.fault(Fault::on("GET", SIGNED, Action::CutAnswer(1_000_001)));
    rig.bucket.fault(Fault::on("GET", SIGNED, Action::Status(503, "SlowDown")).times(4));
    rig.fetch().await.unwrap();
    rig.assert_staged();
    let report = presence.borrow().report.clone().expect("the failure is told");
    assert!(report.retryable && report.message.contains(INPUT), "{report:?}");
    let told = format!("{report:?}");
    assert!(!told.contains("Amz") && !told.contains("http"), "{told}");
    rig.end().await;
}

#[tokio::test]
async fn nothing_is_signed_but_what_the_attempt_may_read_or_store() {
    let rig = Rig::new().await;
    rig.store.put_bytes(&key("uploads/t/u/other"), Bytes::from_static(b"bytes")).await.unwrap();
    let endpoint = Endpoint::from_shared(format!("http://{}", rig.address)).unwrap();
    let mut client = AgentClient::new(endpoint.connect_lazy());
    let token = rig.hub.token(rig.attempt.attempt);
    let own = ArtifactKey::attempt_prefix(&rig.attempt.tenant, rig.attempt.attempt);
    let output = format!("{own}/outputs/0/x");
    let upload = |sha256: &str| Some(Upload { size: 5, sha256: sha256.to_owned() });
    let digest = "0".repeat(64);
    for (name, upload, token, code) in [
        (INPUT, None, Some(&token), None),
        (&*output, upload(&digest), Some(&token), None),
        (INPUT, None, None, Some(Code::Unauthenticated)),
        ("uploads/t/u/other", None, Some(&token), Some(Code::PermissionDenied)),
        (INPUT, upload(&digest), Some(&token), Some(Code::PermissionDenied)),
        (&format!("{own}/log/0"), upload(&digest), Some(&token), Some(Code::PermissionDenied)),
        (&*output, upload("0"), Some(&token), Some(Code::InvalidArgument)),
        ("../x", None, Some(&token), Some(Code::InvalidArgument)),
    ] {
        let mut request = tonic::Request::new(SignObjectRequest { key: name.to_owned(), upload });
        if let Some(token) = token {
            request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        let answer = within("sign", client.sign_object(request)).await;
        assert_eq!(answer.as_ref().err().map(tonic::Status::code), code, "{name}");
        if let Ok(answer) = answer {
            let url = &answer.get_ref().url;
            let path = url.split('?').next().unwrap();
            assert!(path.ends_with(&format!("/p/{name}")) && url.contains(SIGNED), "{path}");
        }
    }
    rig.end().await;
}

/// What a policy allows is fetched in the pod, with the policy's authority and nothing of the machine's; what it does not is not
/// asked.
#[tokio::test]
async fn an_input_by_https_is_fetched_as_its_policy_allows() {
    let text = "from far away\n";
    let server = HttpsServer::start(&[("/a", text)]);
    let source = InputSource::Https(format!("https://{}/a", server.host()).parse().unwrap());
    let trusting = HttpsPolicy {
        hosts: vec![server.host().parse().unwrap()],
        allow_addresses: vec!["127.0.0.1".parse().unwrap()],
        ca_pem: Some(fs::read_to_string(server.authority()).unwrap().into()),
        ..HttpsPolicy::default()
    };
    for refusing in [
        HttpsPolicy { hosts: Vec::new(), ..trusting.clone() },
        HttpsPolicy { allow_addresses: Vec::new(), ..trusting.clone() },
        HttpsPolicy { ca_pem: None, ..trusting.clone() },
    ] {
        let rig = Rig::with(source.clone(), None, refusing).await;
        let refused = rig.fetch().await;
        assert!(matches!(refused, Err(PodError::Inputs(_))), "{refused:?}");
        rig.end().await;
    }
    assert_eq!(server.asked(), [""; 0]);
    let rig = Rig::with(source, None, trusting).await;
    rig.fetch().await.unwrap();
    assert_eq!(fs::read_to_string(rig.pod.stage.join("in/0/x")).unwrap(), text);
    assert_eq!(rig.sent(), 0);
    rig.end().await;
    assert_eq!(server.asked(), ["/a"]);
}
