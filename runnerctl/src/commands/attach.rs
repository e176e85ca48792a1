//! `attach`.

use worker_client::{Event, StreamOptions};

use super::{Service, is_watched};
use crate::{
    args::AttachArgs,
    exit::Exit,
    failure::Failure,
    follow::{self, Screen},
    output,
    stdin::{self, InputEnd, InputOptions},
    terminal::RawMode,
    value::Format,
};

/// Shows what the run has written and writes, and sends it what is typed. The exit status is the run's own.
pub(super) async fn execute(service: &Service, args: AttachArgs, format: Format) -> Result<Exit, Failure> {
    let run = service.client.get(args.run.as_str()).await.map_err(|e| service.failure(&e))?;
    let spec = run.spec.unwrap_or_default();
    if spec.terminal.is_none() && !spec.stdin {
        return Err(Failure::usage(format!(
            "run {} was not started with --tty or --stdin, so it takes no input\n  \
             To see what it writes: runnerctl logs -f {}",
            args.run, args.run
        )));
    }
    let terminal = spec.terminal.is_some();
    let raw = if terminal { RawMode::enter()? } else { None };
    let mut screen = Screen::new(format, is_watched() && raw.is_none());
    let mut events = service.client.stream(args.run.as_str(), StreamOptions::default());
    let options = InputOptions { terminal, detach_keys: args.detach_keys };
    let pump = stdin::pump(&service.client, &args.run, options);
    tokio::pin!(pump);
    let mut pumping = true;
    let mut end = None;
    loop {
        tokio::select! {
            event = events.next() => {
                let Some(event) = event else { break };
                let event = event.map_err(|e| service.failure(&e))?;
                screen.show(&event).await?;
                if let Event::Terminated(terminated) = event.event {
                    end = Some(terminated);
                }
            }
            input = &mut pump, if pumping => {
                pumping = false;
                match input? {
                    InputEnd::Detached => {
                        drop(raw);
                        output::note(&format!("detached; the run goes on: runnerctl attach {}", args.run));
                        return Ok(Exit::OK);
                    }
                    InputEnd::Closed => {}
                    InputEnd::Broken(error) => {
                        return Err(service.failure(&error));
                    }
                }
            }
        }
    }
    drop(raw);
    let Some(end) = end else { return Ok(Exit::OK) };
    let end = worker_client::Finished {
        run_id: args.run.clone(),
        state: end.state(),
        outcome: end.outcome.unwrap_or_default(),
    };
    let why = follow::explain(&end);
    if !why.is_empty() && format == Format::Table {
        output::note(&why);
    }
    Ok(Exit::of_run(&end))
}
