//! The operators' port: `/healthz`, `/readyz`, `/metrics`.

use std::{sync::Arc, time::Duration};

use axum::{Router, extract::State, response::IntoResponse, routing::get};
use http::{StatusCode, header};
use runner_core::{
    clock::Clock,
    service::{Readiness, RunService},
};
use serde_json::json;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;

/// An answer about readiness is used again for so long: asking costs writes.
const FRESH: Duration = Duration::from_secs(1);

/// Asks the service whether it is ready, not more often than once a second however many ask.
#[derive(Debug)]
pub struct ReadyProbe {
    service: Arc<RunService>,
    clock: Arc<dyn Clock>,
    draining: CancellationToken,
    last: Mutex<Option<(Duration, Readiness)>>,
}

impl ReadyProbe {
    /// A probe of `service`. Not ready once `draining` is cancelled.
    pub fn new(service: Arc<RunService>, clock: Arc<dyn Clock>, draining: CancellationToken) -> Self {
        Self { service, clock, draining, last: Mutex::new(None) }
    }

    /// Whether the service can do its work, and what was asked.
    pub async fn check(&self) -> Readiness {
        let mut last = self.last.lock().await;
        let mut answer = match &*last {
            Some((time, answer)) if self.clock.monotonic().saturating_sub(*time) < FRESH => answer.clone(),
            _ => {
                let answer = self.service.ready().await;
                *last = Some((self.clock.monotonic(), answer.clone()));
                answer
            }
        };
        if self.draining.is_cancelled() {
            answer.ready = false;
            answer.checks.push(("draining".to_owned(), Err("the service is shutting down".to_owned())));
        }
        answer
    }
}

#[derive(Debug, Clone)]
struct Ops {
    ready: Arc<ReadyProbe>,
    metrics: Arc<Metrics>,
}

/// The routes of the operators' port.
pub fn router(ready: Arc<ReadyProbe>, metrics: Arc<Metrics>) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(show_metrics))
        .with_state(Ops { ready, metrics })
}

fn json_answer(status: StatusCode, body: &serde_json::Value) -> impl IntoResponse + use<> {
    (status, [(header::CONTENT_TYPE, "application/json")], format!("{body}\n"))
}

/// The process lives. Says nothing of what it depends on: a restart would not mend that.
async fn healthz() -> impl IntoResponse {
    json_answer(StatusCode::OK, &json!({ "status": "ok", "version": env!("CARGO_PKG_VERSION") }))
}

async fn readyz(State(ops): State<Ops>) -> impl IntoResponse {
    let Readiness { ready, checks } = ops.ready.check().await;
    let checks: serde_json::Map<String, serde_json::Value> = checks
        .into_iter()
        .map(|(name, answer)| {
            let answer = match answer {
                Ok(()) => json!({ "ok": true }),
                Err(error) => json!({ "ok": false, "error": error }),
            };
            (name, answer)
        })
        .collect();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    json_answer(status, &json!({ "ready": ready, "checks": checks }))
}

async fn show_metrics(State(ops): State<Ops>) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], ops.metrics.render())
}
