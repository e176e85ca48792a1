//! `logs`.

use worker_client::{Event, StreamOptions};

use super::Service;
use crate::{args::LogsArgs, exit::Exit, failure::Failure, follow::Screen, value::Format};

pub(super) async fn execute(service: &Service, args: LogsArgs, format: Format) -> Result<Exit, Failure> {
    let mut options = StreamOptions::default();
    if let Some(cursor) = args.cursor {
        options = options.from_cursor(cursor);
    }
    if !args.follow {
        options = options.without_following();
    }
    let mut screen = Screen::new(format, false);
    let mut events = service.client.stream(args.run, options);
    while let Some(event) = events.next().await {
        let event = event.map_err(|e| service.failure(&e))?;
        let attempt = match &event.event {
            Event::Log(frame) => frame.attempt,
            Event::LogTruncated(mark) => mark.attempt,
            Event::StateChanged(_)
            | Event::Staging(_)
            | Event::Outputs(_)
            | Event::Notice(_)
            | Event::Terminated(_) => continue,
        };
        if args.attempt.is_none_or(|wanted| wanted == attempt) {
            screen.show(&event).await?;
        }
    }
    Ok(Exit::OK)
}
