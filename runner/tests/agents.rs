//! The channel of agents: the real roles of `runner-agent` in temporary directories, the real surface on loopback.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use runner::{
    agents::{self, Agents, LiveAttempts},
    config::Config,
    metrics::Metrics,
    server::{Server, bind_for_agents},
};
use runner_agent::{
    exec::protocol::{ExecSpec, ExitReason, ExitRecord, Namespaces, Root, StartedRecord, name},
    pod::{self, LastWord, Pod, PodError, Token, order::Order},
    staging::{StagingLimits, read_manifest},
};
use runner_core::{
    agent::{AgentAnswer, AgentAsk, AgentHub, AgentKey, AgentOrder, AgentState, AskError},
    artifact::{ArtifactErrorKind, ArtifactKey, ArtifactStore as _, ArtifactUri},
    backend::{AttemptContext, NoProgress},
    clock::{IdGen as _, SystemIds, Timestamp},
    fake::artifact::{ArtifactOp, MemoryArtifacts},
    id::AttemptId,
    log::{Frame, FrameBody, LogStream, codec},
    outcome::{ExitStatus, Usage},
    spec::{Input, InputSource, Output, RunSpec, User},
    task::{TaskKind, spawn},
};
use runner_proto::agent::{HeadObjectRequest, agent_client::AgentClient};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::{Code, transport::Endpoint};

const DEADLINE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what} took longer than {DEADLINE:?}"),
    }
}

#[derive(Debug)]
struct Switch(AtomicBool);

#[async_trait]
impl LiveAttempts for Switch {
    async fn is_live(&self, _: AttemptId) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.0.load(Ordering::Acquire))
    }
}

/// A surface that is served.
struct Served {
    hub: Arc<AgentHub>,
    address: SocketAddr,
    abort: CancellationToken,
    draining: CancellationToken,
    task: JoinHandle<Option<()>>,
}

impl Served {
    async fn begin(address: SocketAddr, live: &Arc<Switch>) -> Self {
        // Right after another one ended its address may be taken for a moment.
        let listener = within("listen", async {
            loop {
                match bind_for_agents("agent_listen", "--agent-listen", address).await {
                    Ok(listener) => return listener,
                    Err(_) => tokio::time::sleep(POLL).await,
                }
            }
        })
        .await;
        let hub = AgentHub::new(AgentKey::new([7; 32]));
        let (draining, abort) = (CancellationToken::new(), CancellationToken::new());
        let server = Server {
            name: "agents",
            config: Config::default().server,
            metrics: Arc::new(Metrics::new()),
            draining: draining.clone(),
            abort: abort.clone(),
        };
        let surface = Agents {
            hub: Arc::clone(&hub),
            live: Arc::clone(live) as _,
            direct: None,
            metrics: Arc::new(Metrics::new()),
            draining: draining.clone(),
        };
        let address = listener.local_addr().unwrap();
        let task = spawn(TaskKind::Loop, "agents", server.serve(listener, agents::router(surface)));
        Self { hub, address, abort, draining, task }
    }

    async fn end(self) {
        self.draining.cancel();
        self.abort.cancel();
        within("end the surface", self.task).await.unwrap();
    }
}

/// A service, and a pod that is a few directories.
struct Rig {
    served: Served,
    live: Arc<Switch>,
    artifacts: Arc<MemoryArtifacts>,
    attempt: AttemptContext,
    pod: Pod,
    dir: tempfile::TempDir,
}

fn input(path: &str, source: InputSource, sha256: Option<&str>) -> Input {
    Input { path: path.into(), source, sha256: sha256.map(str::to_owned), mode: None, extract: None }
}

fn key(text: &str) -> ArtifactKey {
    text.parse().unwrap()
}

impl Rig {
    async fn new(inputs: Vec<Input>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let live = Arc::new(Switch(AtomicBool::new(true)));
        let served = Served::begin("127.0.0.1:0".parse().unwrap(), &live).await;
        let artifacts = Arc::new(MemoryArtifacts::new());
        let output = Output {
            path: "/outputs/x".into(),
            glob: false,
            destination: None,
            required: true,
            max_bytes: None,
        };
        let attempt = AttemptContext {
            attempt: AttemptId { run: SystemIds.run_id(), number: 1 },
            tenant: "t".parse().unwrap(),
            spec: Arc::new(RunSpec {
                command: vec!["/bin/true".into()],
                inputs,
                outputs: vec![output],
                ..RunSpec::default()
            }),
            log_limit_bytes: 1 << 20,
            artifacts: Arc::clone(&artifacts) as _,
            progress: Arc::new(NoProgress),
        };
        let path = |name: &str| dir.path().join(name);
        for name in ["bin", "run", "stage"] {
            fs::create_dir(path(name)).unwrap();
        }
        let pod = Pod {
            bin: path("bin"),
            shim: path("run").join("shim"),
            stage: path("stage"),
            last_word: path("last-word"),
            url: format!("http://{}", served.address),
            uid: "pod-1".into(),
            token: Token::new(&served.hub.token(attempt.attempt)),
        };
        let rig = Self { served, live, artifacts, attempt, pod, dir };
        rig.take_up();
        rig
    }

    fn take_up(&self) {
        let order = serde_json::to_vec(&self.order()).unwrap().into();
        self.served.hub.take_up(AgentOrder { attempt: self.attempt.clone(), order });
    }

    fn order(&self) -> Order {
        let AttemptContext { attempt, tenant, spec, log_limit_bytes, .. } = &self.attempt;
        Order {
            attempt: *attempt,
            tenant: tenant.clone(),
            spec: spec.as_ref().clone(),
            exec: ExecSpec {
                attempt: *attempt,
                argv: spec.command.clone(),
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
                log_limit_bytes: *log_limit_bytes,
            },
            limits: StagingLimits::default(),
        }
    }

    async fn fetch(&self) -> Result<(), PodError> {
        within("fetch", pod::fetch(&self.pod)).await
    }

    /// Begins the role beside the program, and waits until it is connected.
    async fn publish(&self) -> JoinHandle<Option<Result<(), PodError>>> {
        let pod = self.pod.clone();
        let role = spawn(TaskKind::Helper, "publish", async move { pod::publish(&pod).await });
        self.connected().await;
        role
    }

    async fn connected(&self) {
        let mut presence = self.served.hub.presence(self.attempt.attempt);
        within("connect", presence.wait_for(|presence| presence.connected)).await.unwrap();
    }

    async fn ask(&self, ask: AgentAsk) -> Result<AgentAnswer, AskError> {
        within("ask", self.served.hub.ask(self.attempt.attempt, ask)).await
    }

    async fn state(&self) -> AgentState {
        match self.ask(AgentAsk::State { patience: Duration::ZERO }).await {
            Ok(AgentAnswer::State(state)) => state,
            other => panic!("{other:?}"),
        }
    }

    async fn log(&self, offset: u64) -> (AgentState, Vec<Frame>) {
        match self.ask(AgentAsk::Log { offset, patience: Duration::ZERO }).await {
            Ok(AgentAnswer::Log { state, frames }) => (state, frames),
            other => panic!("{other:?}"),
        }
    }

    /// What a shim leaves of a program that has printed this and ended well.
    fn has_ended(&self, frames: &[Frame]) {
        let shim = &self.pod.shim;
        let time = Timestamp::from_micros(5);
        let record = |name: &str, json: Vec<u8>| fs::write(shim.join(name), json).unwrap();
        let log = shim.join(name::LOG);
        fs::create_dir_all(&log).unwrap();
        let mut stored = Vec::new();
        frames.iter().for_each(|frame| codec::encode(frame, &mut stored));
        fs::write(log.join(format!("{:020}.seg", 0)), stored).unwrap();
        record(name::STARTED, serde_json::to_vec(&StartedRecord { time, pid: 1 }).unwrap());
        let exit = ExitRecord {
            reason: ExitReason::Exited,
            status: Some(ExitStatus::Code(0)),
            time,
            usage: Usage::default(),
            evidence: Vec::new(),
        };
        record(name::EXIT, serde_json::to_vec(&exit).unwrap());
    }
}

fn frame(offset: u64, bytes: &'static [u8]) -> Frame {
    let body = FrameBody::Data { stream: LogStream::Stdout, bytes: Bytes::from_static(bytes) };
    Frame { offset, time: Timestamp::from_micros(3), body }
}

fn inline(text: &'static str) -> InputSource {
    InputSource::Inline(Bytes::from_static(text.as_bytes()))
}

fn object(text: &str) -> InputSource {
    InputSource::Artifact(ArtifactUri::object(key(text)))
}

#[tokio::test]
async fn fetch_brings_the_inputs_and_what_is_to_be_executed() {
    let large = vec![7; 3 << 20];
    let rig = Rig::new(vec![
        input("/inputs/inline", inline("inline bytes"), None),
        input("/inputs/object", object("uploads/t/u/object"), None),
    ])
    .await;
    rig.artifacts.put_bytes(&key("uploads/t/u/object"), large.clone().into()).await.unwrap();
    rig.fetch().await.unwrap();
    let staged = |name: &str| fs::read(rig.pod.stage.join("in/0").join(name)).unwrap();
    assert_eq!(staged("inline"), b"inline bytes");
    assert!(staged("object") == large, "the bytes differ");
    let exec: ExecSpec = serde_json::from_slice(&fs::read(rig.pod.shim.join(name::EXEC)).unwrap()).unwrap();
    assert_eq!(exec, rig.order().exec);
    let agent = fs::metadata(rig.pod.bin.join("runner-agent")).unwrap();
    assert_eq!(agent.len(), fs::metadata("/proc/self/exe").unwrap().len(), "this very program");
    let role = rig.publish().await;
    assert_eq!(rig.state().await.input_bytes, 12 + (3 << 20));
    role.abort();
    rig.served.end().await;
}

#[tokio::test]
async fn an_input_that_is_not_what_was_promised_is_told_and_is_the_last_word() {
    let digest = "0".repeat(64);
    let rig = Rig::new(vec![input("/inputs/x", inline("bytes"), Some(&digest))]).await;
    let mut presence = rig.served.hub.presence(rig.attempt.attempt);
    let error = rig.fetch().await.unwrap_err();
    assert!(matches!(error, PodError::Inputs(_)), "{error}");
    let told = within("report", presence.wait_for(|presence| presence.reports == 1)).await.unwrap().clone();
    let report = told.report.unwrap();
    assert!(!report.retryable && !report.local && report.message.contains("spec.inputs[0]"), "{report:?}");
    let word: LastWord = serde_json::from_slice(&fs::read(&rig.pod.last_word).unwrap()).unwrap();
    assert_eq!((word.message, word.local), (report.message, false));
    assert!(!rig.pod.shim.join(name::EXEC).exists(), "there is nothing to execute");
    rig.served.end().await;
}

#[tokio::test]
async fn a_store_that_is_away_is_told_and_waited_for() {
    let rig = Rig::new(vec![input("/inputs/x", object("uploads/t/u/object"), None)]).await;
    rig.artifacts.put_bytes(&key("uploads/t/u/object"), Bytes::from_static(b"bytes")).await.unwrap();
    rig.artifacts.fail_next(ArtifactOp::Get, 1, ArtifactErrorKind::Unavailable);
    let presence = rig.served.hub.presence(rig.attempt.attempt);
    rig.fetch().await.unwrap();
    let report = presence.borrow().report.clone().unwrap();
    assert!(report.retryable && !report.local, "{report:?}");
    assert_eq!(fs::read(rig.pod.stage.join("in/0/x")).unwrap(), b"bytes");
    rig.served.end().await;
}

#[tokio::test]
async fn the_log_the_end_and_the_outputs_come_over_the_channel() {
    let rig = Rig::new(Vec::new()).await;
    rig.fetch().await.unwrap();
    let role = rig.publish().await;
    assert_eq!(rig.state().await.started, None);
    assert_eq!(rig.log(0).await.1, []);
    let frames = [frame(0, b"hello "), frame(6, b"world\n")];
    rig.has_ended(&frames);
    let (state, read) = rig.log(0).await;
    assert_eq!(read, frames);
    assert_eq!(state.started, Some(Timestamp::from_micros(5)));
    let exit: ExitRecord = serde_json::from_slice(&state.exit_record.unwrap()).unwrap();
    assert_eq!(exit.status, Some(ExitStatus::Code(0)));
    // From within a frame, and at the end.
    assert_eq!(rig.log(8).await.1, [frame(8, b"rld\n")]);
    assert_eq!(rig.log(12).await.1, []);
    fs::write(rig.pod.stage.join("out/0/x"), "an output").unwrap();
    let published = rig.ask(AgentAsk::Publish { partial: false }).await;
    assert_eq!(published, Ok(AgentAnswer::Published { stored: true, failure: None, notes: Vec::new() }));
    let prefix = ArtifactKey::attempt_prefix(&rig.attempt.tenant, rig.attempt.attempt);
    let manifest =
        read_manifest(rig.artifacts.as_ref(), &prefix, &StagingLimits::default()).await.unwrap().unwrap();
    let stored = manifest.entries.iter().filter_map(|entry| entry.key.as_ref()).collect::<Vec<_>>();
    assert_eq!((stored.len(), manifest.partial), (1, false));
    assert_eq!(rig.artifacts.bytes(stored[0]).unwrap(), "an output");
    assert_eq!(rig.ask(AgentAsk::Finish).await, Ok(AgentAnswer::Finished));
    within("end", role).await.unwrap().unwrap().unwrap();
    rig.served.end().await;
}

#[tokio::test]
async fn a_required_output_that_is_absent_is_told() {
    let rig = Rig::new(Vec::new()).await;
    rig.fetch().await.unwrap();
    let role = rig.publish().await;
    rig.has_ended(&[]);
    match rig.ask(AgentAsk::Publish { partial: false }).await {
        Ok(AgentAnswer::Published { stored: true, failure: Some((message, false)), .. }) => {
            assert!(message.contains("/outputs/x"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    role.abort();
    rig.served.end().await;
}

#[tokio::test]
async fn a_restart_of_the_service_loses_nothing() {
    let mut rig = Rig::new(Vec::new()).await;
    rig.fetch().await.unwrap();
    let role = rig.publish().await;
    let address = rig.served.address;
    let next = Served::begin("127.0.0.1:0".parse().unwrap(), &rig.live).await;
    std::mem::replace(&mut rig.served, next).end().await;
    let unused = std::mem::replace(&mut rig.served, Served::begin(address, &rig.live).await);
    unused.end().await;
    // The program goes on meanwhile.
    let frames = [frame(0, b"written while nobody was there")];
    rig.has_ended(&frames);
    rig.connected().await;
    assert_eq!(rig.log(0).await.1, frames, "connected, though nobody has taken the attempt up");
    let early = rig.ask(AgentAsk::State { patience: Duration::ZERO }).await;
    assert!(matches!(early, Ok(AgentAnswer::State(_))));
    rig.take_up();
    fs::write(rig.pod.stage.join("out/0/x"), "an output").unwrap();
    let published = rig.ask(AgentAsk::Publish { partial: false }).await;
    assert!(
        matches!(published, Ok(AgentAnswer::Published { stored: true, failure: None, .. })),
        "{published:?}"
    );
    role.abort();
    rig.served.end().await;
}

#[tokio::test]
async fn what_is_stopped_before_its_shim_began_never_begins() {
    let rig = Rig::new(Vec::new()).await;
    rig.fetch().await.unwrap();
    let role = rig.publish().await;
    for _ in 0..2 {
        let stopped = rig.ask(AgentAsk::Stop { grace: Duration::from_secs(60) }).await;
        assert_eq!(stopped, Ok(AgentAnswer::Stopped { dead: true }));
    }
    let state = rig.state().await;
    assert!(state.stopped.is_some() && state.started.is_none());
    assert!(rig.pod.shim.join(name::SHIM).exists(), "a shim finds its place taken");
    role.abort();
    rig.served.end().await;
}

#[tokio::test]
async fn a_token_is_worth_nothing_once_its_attempt_is_over() {
    let rig = Rig::new(Vec::new()).await;
    rig.live.0.store(false, Ordering::Release);
    assert!(matches!(rig.fetch().await, Err(PodError::Over)));
    assert!(matches!(within("publish", pod::publish(&rig.pod)).await, Err(PodError::Over)));
    rig.live.0.store(true, Ordering::Release);
    let other = AttemptId { number: 2, ..rig.attempt.attempt };
    let token = rig.served.hub.token(other);
    let forged = token.replacen(&other.to_string(), &rig.attempt.attempt.to_string(), 1);
    for token in ["", "x", &forged] {
        let pod = Pod { token: Token::new(token), ..rig.pod.clone() };
        assert!(matches!(within("fetch", pod::fetch(&pod)).await, Err(PodError::Over)), "{token}");
    }
    rig.served.end().await;
}

#[tokio::test]
async fn a_second_pod_executes_nothing() {
    let rig = Rig::new(Vec::new()).await;
    rig.fetch().await.unwrap();
    let second = Pod { uid: "pod-2".into(), ..rig.pod.clone() };
    assert!(matches!(within("fetch", pod::fetch(&second)).await, Err(PodError::Over)));
    rig.fetch().await.unwrap();
    rig.served.end().await;
}

#[tokio::test]
async fn an_agent_reaches_its_own_objects_and_no_others() {
    let rig = Rig::new(vec![input("/inputs/x", object("uploads/t/u/mine"), None)]).await;
    for name in ["uploads/t/u/mine", "uploads/t/u/other"] {
        rig.artifacts.put_bytes(&key(name), Bytes::from_static(b"bytes")).await.unwrap();
    }
    let endpoint = Endpoint::from_shared(format!("http://{}", rig.served.address)).unwrap();
    let mut client = AgentClient::new(endpoint.connect_lazy());
    let token = rig.served.hub.token(rig.attempt.attempt);
    for (name, token, code) in [
        ("uploads/t/u/mine", Some(&token), None),
        ("uploads/t/u/mine", None, Some(Code::Unauthenticated)),
        ("uploads/t/u/other", Some(&token), Some(Code::PermissionDenied)),
        ("../x", Some(&token), Some(Code::InvalidArgument)),
    ] {
        let mut request = tonic::Request::new(HeadObjectRequest { key: name.into() });
        if let Some(token) = token {
            request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        let answer = within("head", client.head_object(request)).await;
        assert_eq!(answer.as_ref().err().map(tonic::Status::code), code, "{name}: {answer:?}");
    }
    rig.served.end().await;
}

#[tokio::test]
async fn nothing_of_a_pod_is_left_beside_its_volumes() {
    let rig = Rig::new(vec![input("/inputs/x", inline("bytes"), None)]).await;
    rig.fetch().await.unwrap();
    let names = |dir: &Path| -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(rig.dir.path()), ["bin", "run", "stage"]);
    assert_eq!(names(&rig.pod.bin), ["runner-agent", "staged.json"]);
    assert_eq!(names(&rig.pod.shim), [name::EXEC]);
    rig.served.end().await;
}
