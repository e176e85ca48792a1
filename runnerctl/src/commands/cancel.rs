//! `cancel`.

use worker_client::{Event, StreamOptions, proto};

use super::{Service, is_table};
use crate::{args::CancelArgs, exit::Exit, failure::Failure, human, json, output, value::Format};

pub(super) async fn execute(service: &Service, args: CancelArgs, format: Format) -> Result<Exit, Failure> {
    let mut run =
        service.client.cancel(args.run.as_str(), args.reason).await.map_err(|e| service.failure(&e))?;
    if args.wait {
        let mut events = service.client.stream(args.run.as_str(), StreamOptions::default().without_logs());
        while let Some(event) = events.next().await {
            if let Event::Terminated(_) = event.map_err(|e| service.failure(&e))?.event {
                break;
            }
        }
        run = service.client.get(args.run).await.map_err(|e| service.failure(&e))?;
    }
    if is_table(format) {
        output::data(&describe(&run))?;
    } else {
        output::document(&json::run(&run))?;
    }
    Ok(Exit::OK)
}

fn describe(run: &proto::Run) -> String {
    let state = human::state(run.state());
    match &run.outcome {
        Some(outcome) => format!("{}  {state} ({})\n", run.run_id, human::outcome(outcome)),
        None => format!("{}  {state}, cancel requested\n", run.run_id),
    }
}
