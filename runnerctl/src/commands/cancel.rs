//! `cancel`.

use worker_client::{ClientError, Event, StreamOptions, proto};

use super::{Service, cancel_all, is_table};
use crate::{args::CancelArgs, exit::Exit, failure::Failure, human, json, output, value::Format};

pub(super) async fn execute(service: &Service, args: CancelArgs, format: Format) -> Result<Exit, Failure> {
    let Some(id) = args.run.as_deref() else { return cancel_all::execute(service, args, format).await };
    let mut run = service.client.cancel(id, args.reason.as_str()).await.map_err(|e| service.failure(&e))?;
    if args.wait {
        until_ended(service, id).await.map_err(|e| service.failure(&e))?;
        run = service.client.get(id).await.map_err(|e| service.failure(&e))?;
    }
    if is_table(format) {
        output::data(&describe(&run))?;
    } else {
        output::document(&json::run(&run))?;
    }
    Ok(Exit::OK)
}

/// Returns when a run has ended.
pub(super) async fn until_ended(service: &Service, id: &str) -> Result<(), ClientError> {
    let mut events = service.client.stream(id, StreamOptions::default().without_logs());
    while let Some(event) = events.next().await {
        if let Event::Terminated(_) = event?.event {
            break;
        }
    }
    Ok(())
}

/// Whether a run has ended.
pub(super) fn is_over(run: &proto::Run) -> bool {
    match run.state() {
        proto::RunState::Succeeded | proto::RunState::Failed | proto::RunState::Cancelled => true,
        proto::RunState::Unspecified
        | proto::RunState::Queued
        | proto::RunState::Preparing
        | proto::RunState::Running
        | proto::RunState::Publishing => false,
    }
}

fn describe(run: &proto::Run) -> String {
    let state = human::state(run.state());
    match &run.outcome {
        Some(outcome) => format!("{}  {state} ({})\n", run.run_id, human::outcome(outcome)),
        None => format!("{}  {state}, cancel requested\n", run.run_id),
    }
}
