//! A service with one backend, for tests that are the same on every backend.

use tempfile::TempDir;

use crate::{
    backend::{dind, k8sjob},
    cluster::{self, Cluster},
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
    /// `k8sjob`, on the cluster that was started for tests.
    K8sJob,
}

/// A service, not started yet, and who counts the starts of its runs' programs.
#[derive(Debug)]
pub struct Scene {
    /// The service.
    pub service: Service,
    /// Who counts.
    pub witness: Witness,
    substrate: Substrate,
}

/// What a scene's workloads are on, where that is more than this machine.
#[derive(Debug)]
enum Substrate {
    Machine,
    Engine(&'static Engine),
    Cluster { cluster: Cluster, _kubeconfig: TempDir },
}

impl Scene {
    /// Prepares one, or skips `test` visibly.
    ///
    /// # Panics
    /// Where the backend is missing and `RUNNER_REQUIRE_BACKENDS` names it.
    pub async fn prepare(on: On, test: &str) -> Option<Self> {
        Self::prepare_with(on, "", &[], test).await
    }

    /// As [`Self::prepare`], with more settings: of the backend (`, scratch_bytes = 1048576`; `local` takes none here), and of the
    /// service, as variables of its environment.
    ///
    /// # Panics
    /// As [`Self::prepare`].
    pub async fn prepare_with(
        on: On,
        of_backend: &str,
        of_service: &[(&str, &str)],
        test: &str,
    ) -> Option<Self> {
        let (settings, witness, substrate) = match on {
            On::Local => (Vec::new(), Witness::listen().await, Substrate::Machine),
            On::Dind => {
                let engine =
                    dind::shared_engine().await.map_err(|missing| missing.skip("dind", test)).ok()?;
                let settings = dind::settings(engine, &engine.host(), of_backend);
                (settings, Witness::of_engine(engine), Substrate::Engine(engine))
            }
            On::K8sJob => {
                let cluster = cluster::shared().await.map_err(|missing| missing.skip("k8sjob", test)).ok()?;
                let dir = tempfile::tempdir().expect("a temporary directory");
                let agents = k8sjob::agents_address();
                let settings = k8sjob::settings(&cluster, dir.path(), agents, of_backend);
                let witness = Witness::listen_on(cluster.address).await;
                (settings, witness, Substrate::Cluster { cluster, _kubeconfig: dir })
            }
        };
        let settings: Vec<(&str, &str)> =
            settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let settings = [&settings[..], of_service].concat();
        Some(Self { service: Service::prepare(&settings), witness, substrate })
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

    /// The cluster that it is on.
    ///
    /// # Panics
    /// Where it is not on one.
    pub fn cluster(&self) -> &Cluster {
        match &self.substrate {
            Substrate::Cluster { cluster, .. } => cluster,
            Substrate::Machine | Substrate::Engine(_) => panic!("the scene is on no cluster"),
        }
    }

    /// Waits until nothing of these runs is left on the machine, the engine or the cluster.
    ///
    /// # Panics
    /// Where something stays.
    pub async fn assert_clean(&self, runs: &[&str]) {
        self.service.assert_clean(runs).await;
        for run in runs {
            let label = format!("runner.attempt={run}.1");
            match &self.substrate {
                Substrate::Machine => {}
                Substrate::Engine(engine) => {
                    eventually("nothing of the run on the engine", async || {
                        dind::labelled(engine, &label).await.is_empty().then_some(())
                    })
                    .await;
                }
                Substrate::Cluster { cluster, .. } => {
                    let client = cluster.client().await;
                    eventually("nothing of the run on the cluster", async || {
                        k8sjob::labelled(&client, &label).await.is_empty().then_some(())
                    })
                    .await;
                }
            }
        }
    }
}
