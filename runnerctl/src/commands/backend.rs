//! `backend list` and `backend health`.

use serde_json::json;

use super::{Service, is_table};
use crate::{
    args::HealthArgs, exit::Exit, failure::Failure, human, json as as_json, output, table, value::Format,
};

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

/// Whether backends take work. The exit status says whether all that were asked do.
pub(super) async fn health(service: &Service, args: HealthArgs, format: Format) -> Result<Exit, Failure> {
    let mut backends = service.client.backends().await.map_err(|e| service.failure(&e))?;
    if let Some(unknown) =
        args.backend.iter().find(|name| backends.iter().all(|backend| backend.name != **name))
    {
        let text =
            format!("there is no backend {unknown:?}; `runnerctl backend list` shows those that there are");
        return Err(Failure::new(text, Exit::FAILURE));
    }
    backends.retain(|backend| args.backend.is_empty() || args.backend.contains(&backend.name));
    let exit = if backends.iter().all(|backend| backend.healthy) { Exit::OK } else { Exit::FAILURE };
    if !is_table(format) {
        let one = |backend: &worker_client::proto::Backend| json!({ "name": backend.name, "healthy": backend.healthy, "detail": backend.detail });
        output::document(&json!({ "backends": backends.iter().map(one).collect::<Vec<_>>() }))?;
        return Ok(exit);
    }
    let rows: Vec<_> = backends
        .iter()
        .map(|backend| {
            let health = if backend.healthy { "healthy" } else { "UNHEALTHY" };
            vec![backend.name.clone(), health.to_owned(), human::visible(&backend.detail)]
        })
        .collect();
    output::data(&table::render(&["NAME", "HEALTH", "DETAIL"], &rows))?;
    Ok(exit)
}
