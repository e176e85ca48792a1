//! The harness of the Docker tests holds what it promises: a failed test must leave no engine behind.

use std::{
    fs,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use bollard::{
    models::{ContainerCreateBody, HostConfig, NetworkSettings},
    query_parameters::{CreateContainerOptions, InspectContainerOptions, StartContainerOptions},
};
use runner_tests::{
    docker::{self, Engine, EngineOptions, TestImage},
    place::Place,
    proc,
};

const IMAGE: &str = "runner-test/busybox:1";

/// A container that sleeps.
async fn sleeper(engine: &Engine, network: &str) -> String {
    let docker = engine.connect();
    TestImage::busybox().load(&docker, IMAGE).await;
    let body = ContainerCreateBody {
        image: Some(IMAGE.to_owned()),
        cmd: Some(vec!["sleep".to_owned(), "100000".to_owned()]),
        host_config: Some(HostConfig { network_mode: Some(network.to_owned()), ..HostConfig::default() }),
        ..ContainerCreateBody::default()
    };
    let id =
        docker.create_container(None::<CreateContainerOptions>, body).await.expect("create a container").id;
    docker.start_container(&id, None::<StartContainerOptions>).await.expect("start a container");
    id
}

async fn running(engine: &Engine, id: &str) -> bool {
    let docker = engine.connect();
    let seen =
        docker.inspect_container(id, None::<InspectContainerOptions>).await.expect("look at a container");
    seen.state.and_then(|state| state.running).expect("a state")
}

fn left_behind(dir: &std::path::Path, name: &str) -> Vec<String> {
    let mut left = proc::with_argument_below(dir);
    left.extend(proc::control_groups_named(name));
    left.extend(proc::mounts_below(dir));
    left.extend(dir.exists().then(|| dir.display().to_string()));
    left
}

#[tokio::test]
async fn an_engine_that_is_dropped_leaves_nothing_behind() {
    let Some(engine) = docker::start_or_skip("harness", EngineOptions::default()) else { return };
    sleeper(&engine, "none").await;
    assert_eq!(engine.processes().len(), 1);
    let (dir, name) = (engine.dir().to_owned(), engine.cgroup());
    assert!(!left_behind(&dir, &name).is_empty(), "an engine that runs can be seen");
    engine.suspend();
    drop(engine);
    assert_eq!(left_behind(&dir, &name), [""; 0]);
}

#[tokio::test]
async fn containers_live_through_a_restart_exactly_with_live_restore() {
    let options = EngineOptions { live_restore: true, ..EngineOptions::default() };
    let Some(engine) = docker::start_or_skip("harness", options) else { return };
    let id = sleeper(&engine, "none").await;
    let before = engine.processes();
    engine.restart(true);
    assert!(running(&engine, &id).await);
    engine.kill();
    assert_eq!(engine.processes(), before, "a killed engine leaves its containers alone");
    engine.resurrect(true);
    assert!(running(&engine, &id).await);
    assert_eq!(engine.processes(), before);
    // What an engine without live-restore finds running, it ends.
    engine.restart(false);
    assert!(!running(&engine, &id).await);
    assert!(engine.processes().is_empty());
}

#[tokio::test]
async fn a_suspended_engine_answers_when_it_is_resumed() {
    let Some(engine) = docker::start_or_skip("harness", EngineOptions::default()) else { return };
    let docker = engine.connect();
    engine.suspend();
    let ping = tokio::time::timeout(Duration::from_millis(300), docker.ping()).await;
    assert!(ping.is_err(), "{ping:?}");
    engine.resume();
    docker.ping().await.expect("an answer");
}

#[tokio::test]
async fn an_engine_with_tls_wants_to_see_a_certificate() {
    let options = EngineOptions { tls: true, ..EngineOptions::default() };
    let Some(engine) = docker::start_or_skip("harness", options) else { return };
    let (address, certificate) = engine.tls();
    let connect = |extra: &[&str]| {
        let mut curl = Command::new("openssl");
        curl.args([
            "s_client",
            "-connect",
            &address.to_string(),
            "-quiet",
            "-verify_return_error",
            "-CAfile",
        ]);
        curl.arg(&certificate.ca)
            .args(extra)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = curl.spawn().expect("start openssl");
        use std::io::Write as _;
        let request = b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n";
        let _ = child.stdin.as_mut().expect("its standard input").write_all(request);
        let output = child.wait_with_output().expect("openssl ends");
        output.stdout.starts_with(b"HTTP/1.1 200")
    };
    let (cert, key) = (certificate.cert.display().to_string(), certificate.key.display().to_string());
    assert!(connect(&["-cert", &cert, "-key", &key]));
    assert!(!connect(&[]));
}

#[tokio::test]
async fn an_engine_with_a_bridge_gives_containers_a_network() {
    let options = EngineOptions { bridge: true, ..EngineOptions::default() };
    let Some(engine) = docker::start_or_skip("harness", options) else { return };
    let id = sleeper(&engine, "bridge").await;
    let seen = engine.connect().inspect_container(&id, None::<InspectContainerOptions>).await.expect("look");
    let NetworkSettings { networks, .. } = seen.network_settings.expect("networks");
    let gateway = networks.expect("networks")["bridge"].gateway.clone().expect("a gateway");
    assert!(!gateway.is_empty());
    drop(engine);
}

/// The owner of a place dies as nothing can prepare for.
#[test]
fn a_place_whose_owner_is_killed_is_swept() {
    let this = std::env::current_exe().expect("this program");
    let mut owner = Command::new(this)
        .args(["--exact", "holds_a_place_until_it_is_killed", "--nocapture", "--include-ignored"])
        .env("RUNNER_HOLD_A_PLACE", "1")
        .stdout(Stdio::piped())
        .spawn()
        .expect("start another test process");
    use std::io::BufRead as _;
    let lines = std::io::BufReader::new(owner.stdout.take().expect("its standard output")).lines();
    let path = lines
        .map_while(Result::ok)
        .find_map(|line| line.split_once("place=").map(|(_, path)| path.to_owned()));
    let path = std::path::PathBuf::from(path.expect("the place"));
    let name = path.file_name().expect("a name").to_string_lossy().into_owned();
    // Between a fork and the execution of the program, the child still has its parent's arguments.
    let lives = (0..600).any(|_| {
        let lives = !proc::with_argument_below(&path).is_empty();
        if !lives {
            thread::sleep(Duration::from_millis(50));
        }
        lives
    });
    assert!(lives, "no process of the place lives");
    owner.kill().expect("kill it");
    owner.wait().expect("wait for it");
    for _ in 0..600 {
        if left_behind(&path, &name).is_empty() {
            return;
        }
        thread::sleep(Duration::from_millis(50));
    }
    panic!("left behind: {:?}", left_behind(&path, &name));
}

/// Not a test of its own: what `a_place_whose_owner_is_killed_is_swept` kills.
#[test]
#[allow(clippy::print_stdout, reason = "who started it reads it")]
fn holds_a_place_until_it_is_killed() {
    if std::env::var_os("RUNNER_HOLD_A_PLACE").is_none() {
        return;
    }
    let place = Place::make().expect("a place");
    let file = place.path().join("file");
    fs::write(&file, "").expect("write a file");
    let mut child =
        Command::new("tail").arg("-f").arg(&file).stdout(Stdio::null()).spawn().expect("start a process");
    println!("place={}", place.path().display());
    child.wait().expect("wait");
}

#[test]
fn a_place_whose_keeper_was_killed_too_is_swept_by_the_next_one() {
    let place = Place::make().expect("a place");
    let path = place.path().to_owned();
    // As if owner and keeper had died: the directory is there, its lock is free.
    let abandoned = path.with_file_name(format!("{}-abandoned", place.name()));
    fs::create_dir(&abandoned).expect("make a directory");
    fs::write(abandoned.join("lock"), "").expect("make a lock");
    let next = Place::make().expect("another place");
    assert!(!abandoned.exists());
    assert!(path.exists(), "a place with an owner is left alone");
    drop(next);
}
