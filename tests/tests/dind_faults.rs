//! What happens to engines, done to real ones: an attempt becomes late by it, or ends for what it is, never for something
//! else; its log stays exact.

use std::time::Duration;

use backend_dind::{DindConfig, TlsFiles};
use runner_core::{
    backend::Backend as _,
    outcome::{Cause, ExitStatus},
    spec::{Network, Output},
};
use runner_tests::{
    backend::{
        bench::within,
        dind_world::World,
        program::{Program, READY},
    },
    docker::{self, Engine, EngineOptions, Front, Mood},
};

const EXITED_0: (Cause, Option<ExitStatus>) = (Cause::Exited, Some(ExitStatus::Code(0)));

fn numbers(count: u32) -> String {
    (0..count).map(|number| format!("{number}\n")).collect()
}

async fn world(test: &'static str, options: EngineOptions) -> Option<World> {
    // A suspended engine is to be noticed.
    World::make(test, options, |_, config| config.request_timeout_seconds = 5).await
}

/// Kills the engine or asks it to end, and starts it again.
async fn restart(world: &World, kill: bool, live_restore: bool) {
    world
        .on_engine(|engine| {
            if kill {
                engine.kill();
            } else {
                engine.stop();
            }
            engine.resurrect(live_restore);
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_the_engine_ends_attempts_for_what_it_is_and_keeps_their_logs() {
    let Some(world) = world("restart", EngineOptions::default()).await else { return };
    for kill in [false, true] {
        let attempt = world.attempt(&Program::SleepForever, |_| {});
        world.ensure(&attempt).await;
        let mut followed = world.follow(&attempt);
        followed.until(READY).await;
        restart(&world, kill, false).await;
        let end = followed.until_end().await;
        assert_eq!((end.cause, end.retryable), (Cause::Backend, true), "{end:?}");
        assert_eq!(followed.text(), READY);
        assert!(!end.evidence.is_empty());
        world.remove(&attempt).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_live_restore_programs_live_on_and_their_logs_are_exact() {
    let options = EngineOptions { live_restore: true, ..EngineOptions::default() };
    let Some(world) = world("live restore", options).await else { return };
    for kill in [false, true] {
        let attempt = world.attempt(&Program::Count { count: 300, pause: 20 }, |_| {});
        world.ensure(&attempt).await;
        let mut followed = world.follow(&attempt);
        followed.until("30\n").await;
        restart(&world, kill, true).await;
        let end = followed.until_end().await;
        assert_eq!((end.cause, end.status), EXITED_0, "{end:?}");
        assert_eq!(followed.text(), numbers(300));
        world.remove(&attempt).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_hangs_makes_attempts_late_and_not_wrong() {
    let Some(world) = world("hang", EngineOptions::default()).await else { return };
    let running = world.attempt(&Program::Count { count: 100, pause: 20 }, |_| {});
    world.ensure(&running).await;
    let mut followed = world.follow(&running);
    followed.until("5\n").await;
    world.engine.suspend();
    let health = within("health", world.backend.health()).await.expect("health");
    assert!(!health.healthy, "{health:?}");
    let late = world.attempt(&Program::Print { out: "late".into(), err: String::new(), exit: 3 }, |_| {});
    let making = world.backend.ensure(&late);
    let resuming = async {
        // Longer than a request may take.
        tokio::time::sleep(Duration::from_secs(7)).await;
        world.engine.resume();
    };
    let (made, ()) = within("ensure", futures::future::join(making, resuming)).await;
    made.expect("it was late and not wrong");
    let end = followed.until_end().await;
    assert_eq!((end.cause, end.status), EXITED_0, "{end:?}");
    assert_eq!(followed.text(), numbers(100));
    let mut followed = world.follow(&late);
    let end = followed.until_end().await;
    assert_eq!((end.cause, end.status), (Cause::Exited, Some(ExitStatus::Code(3))), "{end:?}");
    assert_eq!(followed.out, b"late");
    for attempt in [running, late] {
        world.remove(&attempt).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_remote_engine_by_tls_gets_inputs_and_gives_outputs() {
    const BYTES: u64 = 64 * 1024 * 1024;
    let options = EngineOptions { tls: true, ..EngineOptions::default() };
    let by_tls = |engine: &Engine, config: &mut DindConfig| {
        config.host = tls_host(engine);
        config.tls = Some(tls_files(engine));
    };
    let Some(world) = World::make("tls", options, by_tls).await else { return };
    let program = Program::WriteZeros { path: "/outputs/big".into(), bytes: BYTES };
    let attempt = world.attempt(&program, |spec| {
        spec.outputs.push(Output {
            path: "/outputs/big".into(),
            destination: None,
            required: true,
            max_bytes: None,
            glob: false,
        });
    });
    world.ensure(&attempt).await;
    let mut followed = world.follow(&attempt);
    let end = followed.until_end().await;
    assert_eq!((end.cause, end.status), EXITED_0, "{end:?}");
    assert_eq!(followed.manifest.expect("outputs").total_bytes, BYTES);
    world.remove(&attempt).await;
}

fn tls_host(engine: &Engine) -> String {
    format!("tcp://{}", engine.tls().0)
}

fn tls_files(engine: &Engine) -> TlsFiles {
    let (_, files) = engine.tls();
    TlsFiles { ca: files.ca.clone(), cert: files.cert.clone(), key: files.key.clone() }
}

/// A backend whose way to the engine has trouble.
async fn behind_a_front(test: &'static str) -> Option<(World, Front)> {
    let mut front = None;
    let change = |engine: &Engine, config: &mut DindConfig| {
        let before = front.insert(Front::of(engine.socket()));
        config.host = before.host();
        config.request_timeout_seconds = 3;
    };
    let world = World::make(test, EngineOptions::default(), change).await?;
    Some((world, front.expect("the settings were changed")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_answers_with_errors_makes_attempts_late_and_not_wrong() {
    let Some((world, front)) = behind_a_front("errors").await else { return };
    for mood in [Mood::Status(500), Mood::Status(503), Mood::HalfAnAnswer] {
        let running = world.attempt(&Program::Count { count: 100, pause: 20 }, |_| {});
        world.ensure(&running).await;
        let mut followed = world.follow(&running);
        followed.until("5\n").await;
        front.set(mood);
        let before = front.refused();
        let health = within("health", world.backend.health()).await.expect("health");
        assert!(!health.healthy, "{mood:?}: {health:?}");
        let program = Program::Print { out: "late".into(), err: String::new(), exit: 3 };
        let late = world.attempt(&program, |_| {});
        let making = world.backend.ensure(&late);
        let mending = async {
            // Several requests meet the trouble before it is over.
            within("the trouble", async {
                while front.refused() < before + 4 {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            })
            .await;
            front.set(Mood::Through);
        };
        let (made, ()) = within("ensure", futures::future::join(making, mending)).await;
        made.unwrap_or_else(|error| panic!("{mood:?}: it was late and not wrong: {}", error.chain()));
        let end = followed.until_end().await;
        assert_eq!((end.cause, end.status), EXITED_0, "{mood:?}: {end:?}");
        assert_eq!(followed.text(), numbers(100), "{mood:?}");
        let mut followed = world.follow(&late);
        let end = followed.until_end().await;
        assert_eq!((end.cause, end.status), (Cause::Exited, Some(ExitStatus::Code(3))), "{mood:?}: {end:?}");
        assert_eq!(followed.out, b"late");
        for attempt in [running, late] {
            world.remove(&attempt).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_not_signed_by_the_configured_authority_is_not_the_engine() {
    let options = EngineOptions { tls: true, ..EngineOptions::default() };
    let starting = || docker::start_or_skip("another authority", options);
    let Some(other) = tokio::task::spawn_blocking(starting).await.expect("start an engine") else { return };
    let options = EngineOptions { tls: true, ..EngineOptions::default() };
    // The other engine's authority, and then our own with the other one's certificate.
    for wrong in ["authority", "certificate"] {
        let change = |engine: &Engine, config: &mut DindConfig| {
            let (own, others) = (tls_files(engine), tls_files(&other));
            config.host = tls_host(engine);
            config.tls = Some(match wrong {
                "authority" => TlsFiles { ca: others.ca, ..own },
                _ => TlsFiles { ca: own.ca, ..others },
            });
            config.engine_patience_seconds = 1;
        };
        let Some(world) = World::make("another authority", options.clone(), change).await else { return };
        let health = within("health", world.backend.health()).await.expect("health");
        assert!(!health.healthy, "{wrong}: {health:?}");
        let attempt = world.attempt(&Program::exit(0), |_| {});
        let error = within("ensure", world.backend.ensure(&attempt)).await.expect_err("nobody is trusted");
        assert!(error.retryable, "{wrong}: {}", error.chain());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn egress_is_the_configured_network_and_nothing_else_has_one() {
    let options = EngineOptions { bridge: true, ..EngineOptions::default() };
    let change = |_: &Engine, config: &mut DindConfig| {
        config.egress_network = Some("bridge".to_owned());
        config.networks.insert("lab".to_owned(), "bridge".to_owned());
    };
    let Some(world) = World::make("egress", options, change).await else { return };
    let networks = [(Network::None, "0"), (Network::Egress, "1"), (Network::Named("lab".to_owned()), "1")];
    for (network, interfaces) in networks {
        let attempt = world.attempt(&Program::exit(0), |spec| {
            spec.command = ["sh", "-c", "grep -c eth0: /proc/net/dev; true"].map(str::to_owned).to_vec();
            spec.network = network.clone();
        });
        world.ensure(&attempt).await;
        let mut followed = world.follow(&attempt);
        let end = followed.until_end().await;
        assert_eq!((end.cause, end.status), EXITED_0, "{network:?}: {end:?}");
        assert_eq!(followed.text().trim(), interfaces, "{network:?}");
        world.remove(&attempt).await;
    }
}
