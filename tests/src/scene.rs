//! A service with one backend, for tests that are the same on every backend.

use crate::{
    backend::dind,
    docker::Engine,
    service::{Service, eventually},
    witness::Witness,
};

/// The backend of a scene.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    /// `local`, with its defaults.
    Local,
    /// `dind`, on the engine that the tests of the process share.
    Dind,
}

/// A service, not started yet, and who counts the starts of its runs' programs.
#[derive(Debug)]
pub struct Scene {
    /// The service.
    pub service: Service,
    /// Who counts.
    pub witness: Witness,
    engine: Option<&'static Engine>,
}

impl Scene {
    /// Prepares one, or skips `test` visibly.
    ///
    /// # Panics
    /// Where the backend is missing and `RUNNER_REQUIRE_BACKENDS` names it.
    pub async fn prepare(on: On, test: &str) -> Option<Self> {
        match on {
            On::Local => {
                Some(Self { service: Service::prepare(&[]), witness: Witness::listen().await, engine: None })
            }
            On::Dind => {
                let engine =
                    dind::shared_engine().await.map_err(|missing| missing.skip("dind", test)).ok()?;
                let settings = dind::settings(engine, &engine.host(), "");
                let settings: Vec<(&str, &str)> =
                    settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
                let service = Service::prepare(&settings);
                Some(Self { service, witness: Witness::of_engine(engine), engine: Some(engine) })
            }
        }
    }

    /// As [`Self::prepare`], with the service started.
    ///
    /// # Panics
    /// As [`Self::prepare`].
    pub async fn start(on: On, test: &str) -> Option<Self> {
        let mut scene = Self::prepare(on, test).await?;
        scene.service.restart(&[]).await;
        Some(scene)
    }

    /// Waits until nothing of these runs is left on the machine or the engine.
    ///
    /// # Panics
    /// Where something stays.
    pub async fn assert_clean(&self, runs: &[&str]) {
        self.service.assert_clean(runs).await;
        let Some(engine) = self.engine else { return };
        for run in runs {
            let label = format!("runner.attempt={run}.1");
            eventually("nothing of the run on the engine", async || {
                dind::labelled(engine, &label).await.is_empty().then_some(())
            })
            .await;
        }
    }
}
