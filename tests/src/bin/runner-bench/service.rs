//! A real service process, and the calls that the measurements make.

use std::{
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use runner_proto::v1 as proto;
use tonic::transport::{Channel, Endpoint};

use proto::{runner_client::RunnerClient, stream_response::Event};

/// Any failure.
pub(crate) type Fault = Box<dyn std::error::Error + Send + Sync>;

/// A service of the same build as this program. Stopped and removed when dropped.
pub(crate) struct Service {
    child: Child,
    listen: String,
    data: tempfile::TempDir,
}

/// The folder of this program.
fn programs() -> Result<PathBuf, Fault> {
    Ok(std::env::current_exe()?.parent().ok_or("this program lies nowhere")?.to_owned())
}

/// An address of loopback that was free a moment ago.
pub(crate) fn free_address() -> Result<String, Fault> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}

impl Service {
    /// Starts one with the local backend, and waits until it answers.
    pub(crate) async fn start() -> Result<Self, Fault> {
        // As many attempts at once as the measurements ask for; the default suits programs that use a core each.
        Self::start_with("[[backends]]\nkind = \"local\"\nslots = 64\n").await
    }

    /// Starts one with this configuration, and waits until it answers.
    pub(crate) async fn start_with(settings: &str) -> Result<Self, Fault> {
        let data = tempfile::tempdir()?;
        let (listen, ops) = (free_address()?, free_address()?);
        let config = data.path().join("bench.toml");
        std::fs::write(&config, settings)?;
        let child = Command::new(programs()?.join("runner"))
            .arg("serve")
            .arg("--config")
            .arg(&config)
            .arg("--data-dir")
            .arg(data.path())
            .args(["--listen", &listen, "--ops-listen", &ops])
            .env("RUNNER_LOG__FILTER", "error")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let mut service = Self { child, listen, data };
        for _ in 0..600 {
            if let Some(status) = service.child.try_wait()? {
                return Err(format!("the service ended at once: {status}").into());
            }
            if let Ok(mut client) = service.connect().await
                && client.list(proto::ListRequest::default()).await.is_ok()
            {
                return Ok(service);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err("the service did not answer within 30 s".into())
    }

    /// A client on a connection of its own.
    pub(crate) async fn connect(&self) -> Result<RunnerClient<Channel>, Fault> {
        connect(&self.listen).await
    }

    /// Where it listens, as a URL.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.listen)
    }

    /// Its data directory.
    pub(crate) fn data_dir(&self) -> &std::path::Path {
        self.data.path()
    }

    /// Processor time that it has used, user and system, in seconds; and its resident memory in bytes.
    pub(crate) fn usage(&self) -> Result<(f64, f64), Fault> {
        usage(self.child.id())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

/// A client of whatever listens there.
pub(crate) async fn connect(address: &str) -> Result<RunnerClient<Channel>, Fault> {
    let channel = Endpoint::from_shared(format!("http://{address}"))?
        .initial_stream_window_size(1024 * 1024)
        .initial_connection_window_size(4 * 1024 * 1024)
        .tcp_nodelay(true)
        .connect()
        .await?;
    Ok(RunnerClient::new(channel).max_decoding_message_size(16 * 1024 * 1024))
}

/// Processor seconds and resident bytes of a process.
pub(crate) fn usage(pid: u32) -> Result<(f64, f64), Fault> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> =
        stat.rsplit_once(')').ok_or("a stat without a name")?.1.split_whitespace().collect();
    // Fields 14, 15 and 24 of proc(5), counted from 1; the first two are cut off with the name.
    let number = |field: usize| -> Result<f64, Fault> {
        Ok(fields.get(field - 3).ok_or("a short stat")?.parse::<f64>()?)
    };
    // USER_HZ is 100 on every Linux that runs this; pages are 4 KiB on x86-64.
    Ok(((number(14)? + number(15)?) / 100.0, number(24)? * 4096.0))
}

/// A spec that executes `argv`.
pub(crate) fn spec(argv: &[&str]) -> proto::RunSpec {
    proto::RunSpec {
        command: argv.iter().map(|word| (*word).to_owned()).collect(),
        ..proto::RunSpec::default()
    }
}

/// Accepts a run. Returns its id.
pub(crate) async fn accept(
    client: &mut RunnerClient<Channel>,
    spec: proto::RunSpec,
) -> Result<String, Fault> {
    let request = proto::RunRequest { spec: Some(spec), ..proto::RunRequest::default() };
    Ok(client.run(request).await?.into_inner().run.ok_or("an answer without a run")?.run_id)
}

/// Follows a run to its terminal event. Returns the log bytes that came, and whether it succeeded.
pub(crate) async fn follow(client: &mut RunnerClient<Channel>, run_id: String) -> Result<(u64, bool), Fault> {
    let request = proto::StreamRequest { run_id, ..proto::StreamRequest::default() };
    let mut stream = client.stream(request).await?.into_inner();
    let mut bytes = 0;
    while let Some(message) = stream.message().await? {
        match message.event {
            Some(Event::Log(frame)) => bytes += frame.data.len() as u64,
            Some(Event::Terminated(end)) => return Ok((bytes, end.state() == proto::RunState::Succeeded)),
            _ => {}
        }
    }
    Err("the stream ended without a terminal event".into())
}

/// Waits until a run is in a state.
pub(crate) async fn until(
    client: &mut RunnerClient<Channel>,
    run_id: &str,
    state: proto::RunState,
) -> Result<(), Fault> {
    for _ in 0..6000 {
        let answer = client.get(proto::GetRequest { run_id: run_id.to_owned() }).await?.into_inner();
        if answer.run.is_some_and(|run| run.state() == state) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Err(format!("the run was not {state:?} within 30 s").into())
}
