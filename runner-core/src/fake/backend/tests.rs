//! The faults that the fake injects, on demand and not otherwise. What it does without faults, the conformance suite shows.

use futures::TryStreamExt as _;
use uuid::Uuid;

use super::*;
use crate::{backend::NoProgress, fake::artifact::MemoryArtifacts, id::RunId, log::Frame, spec::RunSpec};

fn backend() -> FakeBackend {
    FakeBackend::over("fake".parse().unwrap(), FakeSubstrate::new())
}

fn attempt(script: &[&str]) -> AttemptContext {
    let command = script.iter().map(|word| (*word).to_owned()).collect();
    AttemptContext {
        attempt: AttemptId { run: RunId::new(Uuid::from_u128(7)), number: 1 },
        tenant: "tenant".parse().unwrap(),
        spec: Arc::new(RunSpec { command, ..RunSpec::default() }),
        log_limit_bytes: u64::MAX,
        artifacts: Arc::new(MemoryArtifacts::new()),
        progress: Arc::new(NoProgress),
    }
}

async fn observe(backend: &FakeBackend, attempt: &AttemptContext) -> Result<Vec<Observation>, BackendError> {
    backend.observe(attempt, 0).try_collect().await
}

fn cause(seen: &[Observation]) -> Option<Cause> {
    match seen.last() {
        Some(Observation::Ended(ended)) => Some(ended.cause),
        _ => None,
    }
}

#[tokio::test]
async fn ensure_fails_as_often_as_it_was_told_to_and_then_starts_once() {
    let (backend, attempt) = (backend(), attempt(&["exit", "0"]));
    let fault = (BackendErrorKind::Substrate, true);
    backend.substrate().with_faults(|faults| faults.ensure.extend([fault, fault]));
    for _ in 0..2 {
        let error = backend.ensure(&attempt).await.unwrap_err();
        assert_eq!((error.kind, error.retryable), fault);
    }
    assert_eq!(backend.substrate().starts(attempt.attempt), 0);
    backend.ensure(&attempt).await.unwrap();
    assert_eq!(backend.substrate().starts(attempt.attempt), 1);
}

#[tokio::test]
async fn an_ensure_that_fails_after_the_start_is_found_done_by_the_next() {
    let (backend, attempt) = (backend(), attempt(&["exit", "3"]));
    backend.substrate().with_faults(|faults| {
        faults.ensure_after_start.push_back((BackendErrorKind::Substrate, true));
    });
    backend.ensure(&attempt).await.unwrap_err();
    backend.ensure(&attempt).await.unwrap();
    assert_eq!(backend.substrate().starts(attempt.attempt), 1);
    assert_eq!(cause(&observe(&backend, &attempt).await.unwrap()), Some(Cause::Exited));
}

#[tokio::test]
async fn an_observation_breaks_in_the_middle_and_the_next_sees_all() {
    let (backend, attempt) = (backend(), attempt(&["flood", "out", "100000", "text"]));
    backend.ensure(&attempt).await.unwrap();
    backend.substrate().with_faults(|faults| faults.observe.push_back(10));
    let error = observe(&backend, &attempt).await.unwrap_err();
    assert!(error.retryable);
    let seen = observe(&backend, &attempt).await.unwrap();
    let bytes: u64 = seen
        .iter()
        .map(|seen| match seen {
            Observation::Frames(frames) => frames.iter().map(Frame::span).sum(),
            _ => 0,
        })
        .sum();
    assert_eq!((bytes, cause(&seen)), (100_000, Some(Cause::Exited)));
}

#[tokio::test]
async fn a_workload_that_vanishes_is_lost_also_to_whoever_watches_it() {
    let (backend, attempt) = (backend(), attempt(&["print", "out", "x", ";", "sleep-until-stopped"]));
    backend.ensure(&attempt).await.unwrap();
    let mut watching = backend.observe(&attempt, 0);
    while !matches!(watching.try_next().await.unwrap(), Some(Observation::Frames(_))) {}
    backend.substrate().vanish(attempt.attempt);
    let rest: Vec<Observation> = watching.try_collect().await.unwrap();
    assert_eq!(cause(&rest), Some(Cause::Lost));
    assert_eq!(cause(&observe(&backend, &attempt).await.unwrap()), Some(Cause::Lost));
    assert!(backend.list().await.unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn verbs_are_as_slow_as_they_were_told_to_be() {
    let (backend, attempt) = (backend(), attempt(&["on-term", "ignore", ";", "sleep-until-stopped"]));
    let delay = Duration::from_secs(60);
    backend.substrate().with_faults(|faults| {
        faults.ensure_delay = Some(delay);
        faults.stop_delay = Some(delay);
    });
    assert!(tokio::time::timeout(delay / 2, backend.ensure(&attempt)).await.is_err());
    let reference = backend.ensure(&attempt).await.unwrap();
    assert!(tokio::time::timeout(delay / 2, backend.stop(&reference, Duration::ZERO)).await.is_err());
    assert_eq!(backend.substrate().processes(attempt.attempt), 1);
    backend.stop(&reference, Duration::from_secs(5)).await.unwrap();
    assert_eq!(backend.substrate().processes(attempt.attempt), 0);
}

#[tokio::test]
async fn list_remove_stop_and_health_fail_as_often_as_they_were_told_to() {
    let (backend, attempt) = (backend(), attempt(&["exit", "0"]));
    let reference = backend.ensure(&attempt).await.unwrap();
    let fault = (BackendErrorKind::Substrate, true);
    backend.substrate().with_faults(|faults| {
        faults.list.push_back(fault);
        faults.stop.push_back(fault);
        faults.remove.push_back(fault);
        faults.unhealthy = Some("away".to_owned());
    });
    backend.list().await.unwrap_err();
    assert_eq!(backend.list().await.unwrap(), std::slice::from_ref(&reference));
    backend.stop(&reference, Duration::ZERO).await.unwrap_err();
    backend.stop(&reference, Duration::ZERO).await.unwrap();
    backend.remove(&reference).await.unwrap_err();
    backend.remove(&reference).await.unwrap();
    assert!(backend.list().await.unwrap().is_empty());
    assert!(!backend.health().await.unwrap().healthy);
}
