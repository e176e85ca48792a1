//! The harness of the Docker backend: real containers of a real engine.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use backend_dind::{DindBackend, DindConfig, DindParts};
use bollard::{
    models::{ContainerCreateBody, VolumeCreateRequest},
    query_parameters::{
        CreateContainerOptionsBuilder, ListContainersOptionsBuilder, ListVolumesOptionsBuilder,
        RemoveContainerOptionsBuilder, RemoveVolumeOptionsBuilder,
    },
};
use runner_agent::staging::StagingLimits;
use runner_core::{backend::Backend, clock::SystemClock, id::AttemptId, spec::RunSpec};
use tempfile::TempDir;
use tokio::sync::OnceCell;

use super::{Harness, Missing, bench::MARK, local::command, program::Program};
use crate::{
    binaries,
    docker::{self, Engine, TestImage},
    proc,
};

/// The image of every program here.
pub const IMAGE: &str = "runner-test/busybox:1";

/// The harness of the Docker backend.
#[derive(Debug)]
pub struct DindHarness {
    dir: TempDir,
    instance: String,
    engine: &'static Engine,
    backend: Option<Arc<DindBackend>>,
    foreign: Mutex<Option<Foreign>>,
}

/// What is not the backend's: a container and a volume of another service, and a container without any label.
#[derive(Debug)]
struct Foreign {
    containers: Vec<String>,
    volume: String,
}

/// The settings of a backend on a test's engine.
///
/// # Panics
/// Where the agent cannot be built.
pub fn config(engine: &Engine) -> DindConfig {
    DindConfig {
        host: engine.host(),
        agent: Some(binaries::static_agent().expect("build the static agent")),
        default_image: Some(IMAGE.to_owned()),
        ..DindConfig::default()
    }
}

/// The configuration of a service whose only backend is on this engine. `more` goes into the backend's table as it is.
///
/// # Panics
/// Where the agent cannot be built.
pub fn settings(engine: &Engine, host: &str, more: &str) -> Vec<(&'static str, String)> {
    let agent = config(engine).agent.expect("the configuration names the agent");
    let backend = format!(
        "[{{ kind = 'dind', name = 'dind', host = '{host}', agent = '{}', default_image = '{IMAGE}'{more} }}]",
        agent.display()
    );
    vec![("RUNNER_BACKENDS", backend), ("RUNNER_DEFAULT_BACKEND", "dind".to_owned())]
}

/// What an engine has with these labels: containers and volumes.
///
/// # Panics
/// Where the engine does not answer.
pub async fn labelled(engine: &Engine, label: &str) -> Vec<String> {
    let docker = engine.connect();
    let filter = HashMap::from([("label", vec![label.to_owned()])]);
    let options = ListContainersOptionsBuilder::default().all(true).filters(&filter).build();
    let containers = docker.list_containers(Some(options)).await.expect("list the containers");
    let options = ListVolumesOptionsBuilder::default().filters(&filter).build();
    let volumes = docker.list_volumes(Some(options)).await.expect("list the volumes");
    let containers = containers.into_iter().flat_map(|container| container.names.unwrap_or_default());
    let volumes = volumes.volumes.into_iter().flatten().map(|volume| format!("volume {}", volume.name));
    containers.chain(volumes).collect()
}

/// Opens a backend.
///
/// # Panics
/// Where it cannot be opened.
pub async fn open(config: DindConfig, data_dir: &Path, instance: &str) -> DindBackend {
    let parts = DindParts {
        config,
        data_dir: data_dir.to_owned(),
        instance: instance.to_owned(),
        clock: Arc::new(SystemClock::new()),
        staging: StagingLimits::default(),
    };
    DindBackend::open(parts).await.expect("open the Docker backend")
}

/// The engine that all cases share, with the image in it.
///
/// # Errors
/// Where this machine cannot have one.
pub async fn shared_engine() -> Result<&'static Engine, Missing> {
    static LOADED: OnceCell<()> = OnceCell::const_new();
    let engine =
        tokio::task::spawn_blocking(docker::shared).await.expect("starting an engine does not panic")?;
    LOADED
        .get_or_init(|| async {
            TestImage::busybox().load(&engine.connect(), IMAGE).await;
        })
        .await;
    Ok(engine)
}

/// A Docker backend of its own service on the shared engine.
///
/// # Errors
/// Where this machine cannot have an engine.
///
/// # Panics
/// Where it has one and the backend cannot use it: that is a failure, not a missing backend.
pub async fn make() -> Result<Box<dyn Harness>, Missing> {
    let engine = shared_engine().await?;
    let dir =
        tempfile::Builder::new().prefix("runner-conformance-").tempdir().expect("a temporary directory");
    let instance = format!("conformance-{}", uuid::Uuid::from_u128(rand_u128()));
    let backend = open(config(engine), dir.path(), &instance).await;
    let health = backend.health().await.expect("health");
    assert!(health.healthy, "the engine is there and the backend cannot use it: {}", health.detail);
    let backend = Some(Arc::new(backend));
    Ok(Box::new(DindHarness { dir, instance, engine, backend, foreign: Mutex::default() }))
}

fn rand_u128() -> u128 {
    use runner_core::clock::{IdGen as _, SystemIds};
    u128::from(SystemIds.random()) << 64 | u128::from(SystemIds.random())
}

impl DindHarness {
    fn block<T: Send>(&self, work: impl Future<Output = T> + Send) -> T {
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(work))
    }

    fn depots(&self) -> PathBuf {
        self.dir.path().join("dind/dind")
    }
}

#[async_trait]
impl Harness for DindHarness {
    fn backend(&self) -> Arc<dyn Backend> {
        let backend = self.backend.as_ref().expect("the backend is open");
        Arc::clone(backend) as Arc<dyn Backend>
    }

    async fn reopen(&mut self) {
        let before = self.backend.take().map(|backend| Arc::downgrade(&backend));
        if let Some(before) = before {
            assert!(before.upgrade().is_none(), "the case holds the backend that is to be dropped");
        }
        self.backend = Some(Arc::new(open(config(self.engine), self.dir.path(), &self.instance).await));
    }

    fn spec(&self, program: &Program) -> RunSpec {
        RunSpec { image: Some(IMAGE.to_owned()), command: command(program), ..RunSpec::default() }
    }

    fn processes(&self, attempt: AttemptId) -> Vec<String> {
        proc::with_environment(MARK, &attempt.to_string())
    }

    fn starts(&self, _: AttemptId) -> Option<u32> {
        None
    }

    fn added_environment(&self) -> Vec<(&'static str, Option<&'static str>)> {
        vec![
            ("PATH", Some("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")),
            ("HOME", Some("/home/runner")),
            ("TMPDIR", Some("/tmp")),
            ("USER", Some("runner")),
            ("RUNNER_RUN_ID", None),
            ("RUNNER_ATTEMPT", Some("1")),
        ]
    }

    fn plant_foreign(&self) {
        let docker = self.engine.connect();
        let tag = format!("{:x}", rand_u128());
        let labels = |instance: &str| -> HashMap<String, String> {
            [
                ("runner.instance", instance),
                ("runner.backend", "dind"),
                ("runner.attempt", "0199aaaa-0000-7000-8000-00000000000a.1"),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into()
        };
        let made = self.block(async {
            let volume = format!("foreign-{tag}");
            let request = VolumeCreateRequest {
                name: Some(volume.clone()),
                labels: Some(labels("another")),
                ..VolumeCreateRequest::default()
            };
            docker.create_volume(request).await.expect("plant a volume");
            let mut containers = Vec::new();
            for (name, labels) in [("labelled", Some(labels("another"))), ("plain", None)] {
                let name = format!("foreign-{name}-{tag}");
                let options = CreateContainerOptionsBuilder::default().name(&name).build();
                let body = ContainerCreateBody {
                    image: Some(IMAGE.to_owned()),
                    cmd: Some(vec!["sleep".to_owned(), "100000".to_owned()]),
                    network_disabled: Some(true),
                    labels,
                    ..ContainerCreateBody::default()
                };
                docker.create_container(Some(options), body).await.expect("plant a container");
                docker.start_container(&name, None).await.expect("start what was planted");
                containers.push(name);
            }
            Foreign { containers, volume }
        });
        *self.foreign.lock().expect("no case panicked") = Some(made);
    }

    fn foreign_is_intact(&self) -> bool {
        let foreign = self.foreign.lock().expect("no case panicked");
        let Some(foreign) = foreign.as_ref() else { return true };
        let docker = self.engine.connect();
        self.block(async {
            for name in &foreign.containers {
                let seen = docker.inspect_container(name, None).await;
                let runs = seen.ok().and_then(|container| container.state?.running);
                if runs != Some(true) {
                    return false;
                }
            }
            docker.inspect_volume(&foreign.volume).await.is_ok()
        })
    }

    fn leaks(&self) -> Vec<String> {
        let label = format!("runner.instance={}", self.instance);
        let mut leaks = self.block(labelled(self.engine, &label));
        // Files on their way are removed by a thread of their own.
        let left = || -> Vec<String> {
            let entries = fs::read_dir(self.depots()).into_iter().flatten().filter_map(Result::ok);
            entries.map(|entry| entry.path().display().to_string()).collect()
        };
        let mut on_the_way = left();
        for _ in 0..200 {
            if on_the_way.is_empty() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
            on_the_way = left();
        }
        leaks.extend(on_the_way);
        leaks
    }
}

impl Drop for DindHarness {
    /// Removes what was planted, and what a failed case left.
    fn drop(&mut self) {
        let docker = self.engine.connect();
        let foreign = self.foreign.get_mut().ok().and_then(Option::take);
        let filter = HashMap::from([("label", vec![format!("runner.instance={}", self.instance)])]);
        let clean = async {
            let options = ListContainersOptionsBuilder::default().all(true).filters(&filter).build();
            let listed = docker.list_containers(Some(options)).await.unwrap_or_default();
            let mut containers: Vec<String> =
                listed.into_iter().filter_map(|container| container.id).collect();
            let options = ListVolumesOptionsBuilder::default().filters(&filter).build();
            let listed = docker.list_volumes(Some(options)).await.ok().and_then(|listed| listed.volumes);
            let mut volumes: Vec<String> = listed.into_iter().flatten().map(|volume| volume.name).collect();
            if let Some(foreign) = foreign {
                containers.extend(foreign.containers);
                volumes.push(foreign.volume);
            }
            for container in containers {
                let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
                let _ = docker.remove_container(&container, Some(options)).await;
            }
            for volume in volumes {
                let _ =
                    docker.remove_volume(&volume, Some(RemoveVolumeOptionsBuilder::default().build())).await;
            }
        };
        self.block(clean);
    }
}
