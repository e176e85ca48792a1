//! Who answers: backends, and what else the service depends on.

use std::time::Duration;

use super::RunService;
use crate::{
    backend::{Backend, Health},
    capability::Capabilities,
    id::BackendName,
    traffic::Drained,
};

/// A backend, as an operator sees it.
#[derive(Debug, Clone)]
pub struct BackendStatus {
    /// Its configured name.
    pub name: BackendName,
    /// Its kind.
    pub kind: &'static str,
    /// Whether it takes work.
    pub health: Health,
    /// What it can honour.
    pub capabilities: Capabilities,
    /// Attempts that hold a slot.
    pub active: usize,
    /// Most attempts at once.
    pub slots: usize,
    /// Runs that were accepted for it and have not ended.
    pub live_runs: usize,
    /// Why it takes no new runs, where an operator said so.
    pub drained: Option<Drained>,
}

/// Whether the service can do its work.
#[derive(Debug, Clone)]
pub struct Readiness {
    /// Whether every dependency, and at least one backend, answered.
    pub ready: bool,
    /// What was asked, and what was wrong.
    pub checks: Vec<(String, Result<(), String>)>,
}

impl RunService {
    /// Every backend, with its health.
    pub async fn backends(&self) -> Vec<BackendStatus> {
        let ask = self.core.backends.iter().map(|(name, entry)| async move {
            BackendStatus {
                name: name.clone(),
                kind: entry.backend.kind(),
                health: health(entry.backend.as_ref()).await,
                capabilities: entry.backend.capabilities(),
                active: entry.size.saturating_sub(entry.slots.available_permits()),
                slots: entry.size,
                live_runs: self.core.live.of(name),
                drained: self.core.traffic.current().traffic.drained.get(name).cloned(),
            }
        });
        futures::future::join_all(ask).await
    }

    /// Asks the store, the object store and the backends whether they really answer.
    pub async fn ready(&self) -> Readiness {
        const PATIENCE: Duration = Duration::from_secs(5);
        async fn within<T, E: std::fmt::Display>(
            ask: impl Future<Output = Result<T, E>>,
        ) -> Result<(), String> {
            match tokio::time::timeout(PATIENCE, ask).await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("no answer within {PATIENCE:?}")),
            }
        }
        let parts = &self.core.parts;
        let (store, artifacts, backends) =
            tokio::join!(within(parts.store.probe()), within(parts.artifacts.probe()), self.backends());
        let mut checks = vec![("store".to_owned(), store), ("object_store".to_owned(), artifacts)];
        let dependencies = checks.iter().all(|(_, answer)| answer.is_ok());
        let backend = backends.iter().any(|backend| backend.health.healthy);
        checks.extend(backends.into_iter().map(|backend| {
            let answer = if backend.health.healthy { Ok(()) } else { Err(backend.health.detail) };
            (format!("backend/{}", backend.name), answer)
        }));
        let accepting = !self.core.stopping.is_cancelled();
        checks
            .push(("accepting".to_owned(), if accepting { Ok(()) } else { Err("shutting down".to_owned()) }));
        Readiness { ready: dependencies && backend && accepting, checks }
    }
}

/// Asks one backend. No answer in time is none.
pub(super) async fn health(backend: &dyn Backend) -> Health {
    const PATIENCE: Duration = Duration::from_secs(5);
    match tokio::time::timeout(PATIENCE, backend.health()).await {
        Ok(Ok(health)) => health,
        Ok(Err(error)) => Health { healthy: false, detail: error.chain() },
        Err(_) => Health { healthy: false, detail: format!("no answer within {PATIENCE:?}") },
    }
}
