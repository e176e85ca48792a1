//! `list`.

use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::json;
use worker_client::{ClientError, ErrorKind, ListFilter, convert, proto};

use super::{Service, is_table};
use crate::{
    args::ListArgs, exit::Exit, failure::Failure, human, json as as_json, output, table, value::Format,
};

/// The service lists runs without their specs; so many are asked for at once to show their commands.
const LOOK_UPS: usize = 8;
/// Width of the last column.
const COMMAND_WIDTH: usize = 60;
const PAGE: usize = 200;

pub(super) async fn execute(service: &Service, args: ListArgs, format: Format) -> Result<Exit, Failure> {
    let now = human::now();
    let mut filter = ListFilter::default();
    for state in args.state {
        filter = filter.state(state.into());
    }
    if let Some(backend) = args.backend {
        filter = filter.backend(backend);
    }
    for label in args.label {
        filter = filter.label(label.key, label.value);
    }
    // A moment before 1970 is before every run.
    if let Some(since) = args.since.and_then(|since| now.checked_sub(since)) {
        filter = filter.created_after(since);
    }
    if let Some(until) = args.until.and_then(|until| now.checked_sub(until)) {
        filter = filter.created_before(until);
    }
    let limit = if args.limit == 0 { usize::MAX } else { args.limit };
    filter = filter.page_size(u32::try_from(limit.min(PAGE)).unwrap_or(0));
    let runs: Vec<proto::Run> =
        service.client.list(filter).take(limit).try_collect().await.map_err(|e| service.failure(&e))?;
    if !is_table(format) {
        let runs: Vec<_> = runs.iter().map(as_json::run).collect();
        output::document(&json!({ "runs": runs }))?;
        return Ok(Exit::OK);
    }
    let rows = stream::iter(runs).map(|run| with_spec(service, run)).buffered(LOOK_UPS);
    let rows: Vec<_> = rows.try_collect().await.map_err(|e| service.failure(&e))?;
    let rows: Vec<_> = rows.iter().map(|run| row(run, now)).collect();
    output::data(&table::render(&["ID", "STATE", "CAUSE/EXIT", "BACKEND", "AGE", "COMMAND"], &rows))?;
    Ok(Exit::OK)
}

/// A run with its spec, which lists do not have.
pub(super) async fn with_spec(service: &Service, run: proto::Run) -> Result<proto::Run, ClientError> {
    if run.spec.is_some() {
        return Ok(run);
    }
    match service.client.get(run.run_id.as_str()).await {
        Ok(whole) => Ok(whole),
        // Deleted since it was listed.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(run),
        Err(error) => Err(error),
    }
}

/// A run in a table.
pub(super) fn row(run: &proto::Run, now: std::time::SystemTime) -> Vec<String> {
    let created = run.create_time.as_ref().and_then(convert::time_from_proto);
    let command = run.spec.as_ref().map_or_else(String::new, |spec| {
        let line = human::command(spec.command.iter().chain(&spec.args), COMMAND_WIDTH);
        if line.is_empty() { format!("({})", human::visible(&spec.image)) } else { line }
    });
    vec![
        run.run_id.clone(),
        human::state(run.state()).to_owned(),
        human::ending(run),
        run.backend.clone(),
        created.map_or_else(|| "-".to_owned(), |created| human::age(created, now)),
        command,
    ]
}
