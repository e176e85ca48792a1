//! `backend list`.

use serde_json::json;

use super::{Service, is_table};
use crate::{exit::Exit, failure::Failure, human, json as as_json, output, table, value::Format};

pub(super) async fn execute(service: &Service, format: Format) -> Result<Exit, Failure> {
    let backends = service.client.backends().await.map_err(|e| service.failure(&e))?;
    if !is_table(format) {
        let backends: Vec<_> = backends.iter().map(as_json::backend).collect();
        output::document(&json!({ "backends": backends }))?;
        return Ok(Exit::OK);
    }
    let rows: Vec<_> = backends
        .iter()
        .map(|backend| {
            let has = backend.capabilities.clone().unwrap_or_default();
            let has: Vec<_> =
                human::capabilities(&has).filter(|(_, has)| *has).map(|(name, _)| name).collect();
            vec![
                backend.name.clone(),
                backend.kind.clone(),
                if backend.healthy { "healthy" } else { "UNHEALTHY" }.to_owned(),
                if backend.drained.is_some() { "drained" } else { "yes" }.to_owned(),
                backend.live_runs.to_string(),
                format!("{}/{}", backend.active_attempts, backend.max_attempts),
                human::visible(&backend.detail),
                has.join(" "),
            ]
        })
        .collect();
    output::data(&table::render(
        &["NAME", "KIND", "HEALTH", "TAKES RUNS", "RUNS", "ACTIVE", "DETAIL", "CAPABILITIES"],
        &rows,
    ))?;
    Ok(Exit::OK)
}
