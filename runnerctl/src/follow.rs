//! A run's events on the caller's screen.

use worker_client::{
    Event, Finished, StreamEvent,
    proto::{Cause, LogStream},
};

use crate::{
    failure::Failure,
    human, json,
    output::{self, Streams},
    value::Format,
};

/// Shows events as they come.
#[derive(Debug)]
pub(crate) struct Screen {
    streams: Streams,
    format: Format,
    /// Tells of states, too, on standard error.
    verbose: bool,
}

impl Screen {
    pub(crate) fn new(format: Format, verbose: bool) -> Self {
        Self { streams: Streams::new(), format, verbose: verbose && format == Format::Table }
    }

    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// Tells something that is not data, where that is wanted.
    pub(crate) fn tell(&self, text: &str) {
        if self.verbose {
            output::note(text);
        }
    }

    /// Writes a line of JSON where the format is that.
    pub(crate) async fn json(&mut self, value: &serde_json::Value) -> Result<(), Failure> {
        match self.format {
            Format::Json => self.streams.line(value).await,
            Format::Table => Ok(()),
        }
    }

    /// Shows one event. Log bytes go where the program wrote them, as they are.
    pub(crate) async fn show(&mut self, event: &StreamEvent) -> Result<(), Failure> {
        if self.format == Format::Json {
            return self.streams.line(&json::event(event)).await;
        }
        match &event.event {
            Event::Log(frame) => match frame.stream() {
                LogStream::Stderr => self.streams.stderr(&frame.data).await,
                LogStream::Stdout | LogStream::Terminal | LogStream::Unspecified => {
                    self.streams.stdout(&frame.data).await
                }
            },
            Event::LogTruncated(mark) => {
                // Never silent: what is on the screen is not all that was written.
                let reason = human::visible(&mark.reason);
                output::note(&format!(
                    "{} of output were dropped here: {reason}",
                    human::bytes(mark.dropped_bytes)
                ));
                Ok(())
            }
            Event::StateChanged(change) => {
                let reason = human::visible(&change.reason);
                let state = human::state(change.state());
                self.tell(&if reason.is_empty() { state.to_owned() } else { format!("{state}: {reason}") });
                Ok(())
            }
            Event::Notice(notice) => {
                self.tell(&human::visible(&notice.text));
                Ok(())
            }
            Event::Outputs(manifest) => {
                self.tell(&format!(
                    "{} of outputs in {} files and directories",
                    human::bytes(manifest.total_bytes),
                    manifest.entries.len()
                ));
                Ok(())
            }
            Event::Staging(_) | Event::Terminated(_) => Ok(()),
        }
    }
}

/// Why a run ended, where that is not just that its program ended. Empty otherwise.
pub(crate) fn explain(end: &Finished) -> String {
    if end.cause() == Cause::Exited && end.signal().is_none() {
        return String::new();
    }
    let mut text = format!("run {}: {}", end.run_id, human::outcome(&end.outcome));
    if !end.outcome.message.is_empty() {
        text.push_str(": ");
        text.push_str(&human::visible(&end.outcome.message));
    }
    for evidence in &end.outcome.evidence {
        let (source, detail) = (human::visible(&evidence.source), human::visible(&evidence.detail));
        text.push_str(&format!("\n  {source}: {detail}"));
    }
    text
}
