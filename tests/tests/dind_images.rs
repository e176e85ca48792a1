//! Images of the Docker backend: a real engine, real registries on the loopback.

use std::{
    fs,
    sync::{Arc, Mutex},
};

use backend_dind::{
    DindConfig, Engine as EngineClient, ImageError, ImageErrorKind, ImageId, Images, ImagesConfig,
    PullPolicy, RegistryLogin,
};
use bollard::{
    Docker,
    models::ContainerCreateBody,
    query_parameters::{CreateContainerOptions, EventsOptionsBuilder, RemoveContainerOptionsBuilder},
};
use futures::{StreamExt as _, future::join_all};
use runner_core::{
    backend::{AttemptContext, BackendError, BackendErrorKind, Direction, Progress, ProgressSink},
    clock::{IdGen as _, SystemClock, SystemIds},
    id::AttemptId,
    spec::RunSpec,
};
use runner_tests::{
    backend::store::GatedStore,
    docker::{self, Account, Engine, Registry, TestImage},
};
use serde_json::json;
use tempfile::TempDir;

/// What a test works with.
struct World {
    engine: &'static Engine,
    registry: Registry,
    docker: Docker,
    files: TempDir,
}

#[derive(Default)]
struct Seen(Mutex<Vec<Progress>>);

impl ProgressSink for Seen {
    fn progress(&self, progress: Progress) {
        self.0.lock().unwrap().push(progress);
    }
}

impl World {
    fn make(test: &str, accounts: bool) -> Option<Self> {
        let engine = docker::shared_or_skip(test)?;
        let registry = Registry::start(accounts).map_err(|missing| missing.skip("dind", test)).ok()?;
        let files = tempfile::tempdir().expect("a temporary directory");
        Some(Self { engine, registry, docker: engine.connect(), files })
    }

    fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.registry.host())
    }

    fn login(&self, account: Account, tenants: &[&str]) -> RegistryLogin {
        let path = self.files.path().join(account.user);
        fs::write(&path, format!("{}\n", account.password)).expect("write a password");
        RegistryLogin {
            registry: self.registry.host(),
            username: account.user.to_owned(),
            password_file: Some(path),
            password_env: None,
            tenants: tenants.iter().map(|&tenant| tenant.to_owned()).collect(),
        }
    }

    fn images(&self, config: ImagesConfig) -> Images {
        let dind = DindConfig { host: self.engine.host(), ..DindConfig::default() };
        Images::new(EngineClient::new(&dind), config, None, Arc::new(SystemClock::new()))
    }

    async fn has(&self, name: &str) -> bool {
        self.docker.inspect_image(name).await.is_ok()
    }

    /// How often the engine pulled it.
    async fn pulls(&self, name: &str) -> usize {
        let now = std::time::UNIX_EPOCH.elapsed().expect("a clock").as_secs() + 1;
        let filters = [("type", vec!["image"]), ("event", vec!["pull"]), ("image", vec![name])].into();
        let options =
            EventsOptionsBuilder::default().since("0").until(&now.to_string()).filters(&filters).build();
        self.docker.events(Some(options)).filter_map(|event| async { event.ok() }).count().await
    }
}

fn image(mark: &str) -> TestImage {
    TestImage::scratch(&[("mark", mark.as_bytes())]).with("Labels", json!({ "mark": mark }))
}

fn attempt_of(tenant: &str, image: &str, progress: Arc<dyn ProgressSink>) -> AttemptContext {
    AttemptContext {
        attempt: AttemptId { run: SystemIds.run_id(), number: 1 },
        tenant: tenant.parse().expect("a tenant"),
        spec: Arc::new(RunSpec { image: Some(image.to_owned()), ..RunSpec::default() }),
        log_limit_bytes: 1,
        artifacts: Arc::new(GatedStore::default()),
        progress,
    }
}

async fn ensure(images: &Images, tenant: &str, image: &str) -> Result<ImageId, BackendError> {
    images.ensure(&attempt_of(tenant, image, Arc::new(Seen::default()))).await
}

/// The kind of failure, which says whether it is worth trying again.
async fn failure(images: &Images, tenant: &str, image: &str) -> ImageErrorKind {
    let error = ensure(images, tenant, image).await.expect_err("this image is not to be had");
    assert_eq!(error.kind, BackendErrorKind::Image, "{}", error.chain());
    let source =
        error.source.as_ref().expect("a source").downcast_ref::<ImageError>().expect("an image error");
    assert_eq!(error.retryable, source.kind.retryable());
    let text = format!("{} {error:?}", error.chain());
    for account in [Account::ALICE, Account::BOB] {
        assert!(!text.contains(account.password), "{text}");
    }
    source.kind
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_is_pulled_once_with_progress_however_many_ask_for_it() {
    let Some(world) = World::make("an_image_is_pulled_once", false) else { return };
    let image = image(&"x".repeat(3_000_000));
    world.registry.push(&world.docker, &image, "team/tool:1").await;
    let name = world.name("team/tool:1");
    let images = world.images(ImagesConfig::default());
    let seen: Vec<Arc<Seen>> = (0..8).map(|_| Arc::default()).collect();
    let attempts: Vec<AttemptContext> =
        seen.iter().map(|seen| attempt_of("t", &name, Arc::clone(seen) as Arc<dyn ProgressSink>)).collect();
    for found in join_all(attempts.iter().map(|attempt| images.ensure(attempt))).await {
        assert_eq!(found.expect("the image").as_str(), image.id());
    }
    assert_eq!(world.pulls(&name).await, 1);
    let progress: Vec<Progress> = seen.iter().flat_map(|seen| seen.0.lock().unwrap().clone()).collect();
    let last = progress.last().expect("the pull says how far it is");
    assert!(progress.iter().all(|progress| progress.direction == Direction::Image));
    assert!(last.bytes_total > 0 && last.bytes_done == last.bytes_total, "{last:?}");
    // It is there now: nobody pulls it again, and not after a restart of the service either.
    ensure(&images, "t", &name).await.expect("the image");
    ensure(&world.images(ImagesConfig::default()), "t", &name).await.expect("the image");
    assert_eq!(world.pulls(&name).await, 1);
}

#[tokio::test]
async fn each_way_to_fail_is_told_apart_and_only_trouble_is_worth_another_try() {
    let Some(mut world) = World::make("each_way_to_fail", false) else { return };
    let foreign = image("foreign").architecture("riscv64");
    world.registry.push(&world.docker, &foreign, "foreign:1").await;
    world.registry.push(&world.docker, &image("policy"), "policy:1").await;
    let images = world.images(ImagesConfig::default());
    assert_eq!(failure(&images, "t", &world.name("nothing:1")).await, ImageErrorKind::Missing);
    assert_eq!(failure(&images, "t", &world.name("policy:2")).await, ImageErrorKind::Missing);
    let digest = format!("sha256:{}", "0".repeat(64));
    assert_eq!(
        failure(&images, "t", &world.name(&format!("policy@{digest}"))).await,
        ImageErrorKind::Missing
    );
    assert_eq!(failure(&images, "t", &world.name("foreign:1")).await, ImageErrorKind::WrongPlatform);
    assert!(!world.has(&world.name("foreign:1")).await, "what cannot run is not pulled");
    let strict = |change: fn(&mut ImagesConfig)| {
        let mut config = ImagesConfig::default();
        change(&mut config);
        world.images(config)
    };
    let elsewhere = strict(|config| config.allowed = vec!["registry.example.com".into()]);
    assert_eq!(failure(&elsewhere, "t", &world.name("policy:1")).await, ImageErrorKind::Policy);
    let pinned = strict(|config| config.require_digest = true);
    assert_eq!(failure(&pinned, "t", &world.name("policy:1")).await, ImageErrorKind::Policy);
    let never = strict(|config| config.pull = PullPolicy::Never);
    assert_eq!(failure(&never, "t", &world.name("policy:1")).await, ImageErrorKind::Missing);
    assert_eq!(failure(&images, "t", "Not A Reference").await, ImageErrorKind::Policy);

    world.registry.stop();
    assert_eq!(failure(&images, "t", &world.name("policy:1")).await, ImageErrorKind::Network);
    world.registry.resurrect();
    ensure(&images, "t", &world.name("policy:1")).await.expect("the image, now that the registry is back");
}

#[tokio::test]
async fn a_pin_is_exactly_its_content_and_a_tag_is_what_it_means_when_it_is_asked_for() {
    let Some(world) = World::make("a_pin_is_exactly_its_content", false) else { return };
    let (old, new) = (image("old"), image("new"));
    let digest = world.registry.push(&world.docker, &old, "moving:1").await;
    let (tag, pin) = (world.name("moving:1"), world.name(&format!("moving@{digest}")));
    let config = |pull| ImagesConfig { pull, ..ImagesConfig::default() };
    let (lazy, eager) =
        (world.images(config(PullPolicy::IfNotPresent)), world.images(config(PullPolicy::Always)));
    assert_eq!(ensure(&lazy, "t", &tag).await.unwrap().as_str(), old.id());

    // The tag moves. The engine that pushes it is another one, or it would know.
    let Some(other) = docker::start_or_skip("a_pin_is_exactly_its_content", Default::default()) else {
        return;
    };
    world.registry.push(&other.connect(), &new, "moving:1").await;
    assert_eq!(ensure(&lazy, "t", &tag).await.unwrap().as_str(), old.id());
    assert_eq!(ensure(&eager, "t", &tag).await.unwrap().as_str(), new.id());
    assert_eq!(ensure(&lazy, "t", &pin).await.unwrap().as_str(), old.id());
    let strict =
        world.images(ImagesConfig { require_digest: true, pull: PullPolicy::Always, ..Default::default() });
    assert_eq!(ensure(&strict, "t", &pin).await.unwrap().as_str(), old.id());
}

#[tokio::test]
async fn a_private_image_in_the_cache_is_not_for_who_could_not_pull_it() {
    let Some(world) = World::make("a_private_image_in_the_cache", true) else { return };
    let image = image("private");
    let digest = world.registry.push(&world.docker, &image, "private/tool:1").await;
    let (name, pin) = (world.name("private/tool:1"), world.name(&format!("private/tool@{digest}")));
    let config = || ImagesConfig {
        logins: vec![world.login(Account::ALICE, &["team-a"]), world.login(Account::BOB, &["team-b"])],
        ..ImagesConfig::default()
    };
    let images = world.images(config());
    assert_eq!(failure(&images, "stranger", &name).await, ImageErrorKind::Unauthorised);
    assert_eq!(ensure(&images, "team-a", &name).await.expect("the image").as_str(), image.id());
    assert!(world.has(&name).await, "it is in the cache now");
    for name in [&name, &pin] {
        assert_eq!(failure(&images, "stranger", name).await, ImageErrorKind::Unauthorised);
        assert_eq!(failure(&world.images(config()), "stranger", name).await, ImageErrorKind::Unauthorised);
    }
    assert_eq!(failure(&images, "stranger", &image.id()).await, ImageErrorKind::Policy);
    // Another one with credentials gets it, and from the cache.
    assert_eq!(ensure(&images, "team-b", &name).await.expect("the image").as_str(), image.id());
    assert_eq!(world.pulls(&name).await, 1);

    let mut wrong = world.login(Account::BOB, &[]);
    wrong.password_file = Some(world.files.path().join("wrong"));
    fs::write(world.files.path().join("wrong"), "not the password").unwrap();
    let wrong = world.images(ImagesConfig { logins: vec![wrong], ..ImagesConfig::default() });
    assert_eq!(failure(&wrong, "team-b", &name).await, ImageErrorKind::Unauthorised);
    let mut gone = world.login(Account::BOB, &[]);
    gone.password_file = Some(world.files.path().join("gone"));
    let gone = world.images(ImagesConfig { logins: vec![gone], ..ImagesConfig::default() });
    assert_eq!(failure(&gone, "team-b", &name).await, ImageErrorKind::Credentials);
}

#[tokio::test]
async fn what_was_proven_counts_for_a_while_and_without_the_registry() {
    let Some(mut world) = World::make("what_was_proven", true) else { return };
    world.registry.push(&world.docker, &image("proven"), "proven:1").await;
    let name = world.name("proven:1");
    let logins = vec![world.login(Account::ALICE, &["team-a"]), world.login(Account::BOB, &["team-b"])];
    let images = world.images(ImagesConfig { logins: logins.clone(), ..ImagesConfig::default() });
    let forgetful =
        world.images(ImagesConfig { logins, authorisation_seconds: 0, ..ImagesConfig::default() });
    ensure(&images, "team-a", &name).await.expect("the image");
    ensure(&forgetful, "team-a", &name).await.expect("the image");
    world.registry.stop();
    ensure(&images, "team-a", &name).await.expect("the image, though the registry is down");
    assert_eq!(failure(&images, "team-b", &name).await, ImageErrorKind::Network, "nothing was proven for it");
    assert_eq!(failure(&forgetful, "team-a", &name).await, ImageErrorKind::Network);
}

#[tokio::test]
async fn credentials_come_from_a_docker_config_file_too() {
    let Some(world) = World::make("credentials_come_from_a_docker_config_file", true) else { return };
    let image = image("docker config");
    world.registry.push(&world.docker, &image, "configured:1").await;
    let path = world.files.path().join("config.json");
    // alice:??>>~~??>>~~
    let auth = "YWxpY2U6Pz8+Pn5+Pz8+Pn5+";
    fs::write(&path, json!({ "auths": { world.registry.host(): { "auth": auth } } }).to_string()).unwrap();
    let images = world.images(ImagesConfig { docker_config: Some(path), ..ImagesConfig::default() });
    let found = ensure(&images, "anybody", &world.name("configured:1")).await;
    assert_eq!(found.expect("the image").as_str(), image.id());
}

#[tokio::test]
async fn an_image_that_no_registry_gave_is_for_everybody() {
    let Some(world) = World::make("an_image_that_no_registry_gave", true) else { return };
    let image = image("loaded");
    let name = world.name("loaded:1");
    image.load(&world.docker, &name).await;
    let never = ImagesConfig { pull: PullPolicy::Never, ..ImagesConfig::default() };
    for images in [world.images(ImagesConfig::default()), world.images(never)] {
        assert_eq!(ensure(&images, "anybody", &name).await.expect("the image").as_str(), image.id());
    }
}

#[tokio::test]
async fn beyond_the_high_water_mark_unused_images_go_and_others_stay() {
    const TEST: &str = "beyond_the_high_water_mark";
    // Its own engine: the images of other tests would be in the way, and in danger.
    let Some(engine) = docker::start_or_skip(TEST, Default::default()) else { return };
    let Ok(registry) = Registry::start(false).map_err(|missing| missing.skip("dind", TEST)) else { return };
    let docker = engine.connect();
    let big = |mark: &str| image(&mark.repeat(1_000_000));
    for name in ["unused:1", "used:1", "wanted:1"] {
        registry.push(&docker, &big(&name[..4]), name).await;
    }
    let name = |name: &str| format!("{}/{name}", registry.host());
    big("load").load(&docker, "operators:1").await;
    let dind = DindConfig { host: engine.host(), ..DindConfig::default() };
    let images = |high_water: Option<u64>| {
        let config = ImagesConfig { high_water_bytes: high_water, ..ImagesConfig::default() };
        Images::new(EngineClient::new(&dind), config, None, Arc::new(SystemClock::new()))
    };
    // As an earlier process of the service left them.
    let before = images(None);
    ensure(&before, "t", &name("unused:1")).await.expect("an image");
    let used = ensure(&before, "t", &name("used:1")).await.expect("an image");
    let body = ContainerCreateBody {
        image: Some(used.to_string()),
        cmd: Some(vec!["/mark".to_owned()]),
        ..ContainerCreateBody::default()
    };
    let container =
        docker.create_container(None::<CreateContainerOptions>, body).await.expect("a container").id;

    // Three of 4 MB are there: one has to go.
    ensure(&images(Some(11_000_000)), "t", &name("wanted:1")).await.expect("an image");
    let has = async |name: &str| docker.inspect_image(name).await.is_ok();
    assert!(!has(&name("unused:1")).await, "nobody used it");
    assert!(has(&name("used:1")).await && has("operators:1").await && has(&name("wanted:1")).await);
    // Nothing that is left may go.
    let error = ensure(&images(Some(1_000_000)), "t", &name("unused:1")).await;
    let error = match error {
        Err(error) => error,
        Ok(_) => panic!("there was no room"),
    };
    assert_eq!((error.kind, error.retryable), (BackendErrorKind::Unschedulable, true), "{}", error.chain());
    let force = RemoveContainerOptionsBuilder::default().force(true).build();
    docker.remove_container(&container, Some(force)).await.expect("remove the container");
}
