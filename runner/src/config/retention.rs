//! The part `retention`: how long what is kept.

use std::time::Duration;

use runner_core::service::Retention;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::value::{OrNone, Span};

/// How long what is kept; `none`: for ever.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RetentionConfig {
    /// Uploads that no stored run names, from the time at which they were begun: never used, or left unfinished.
    pub abandoned: OrNone<Span>,
    /// All uploads, from the time at which they were begun. What a live run names stays.
    pub uploads: OrNone<Span>,
    /// What runs wrote, from their end.
    pub outputs: OrNone<Span>,
    /// Logs, from the end of the run.
    pub logs: OrNone<Span>,
    /// Finished runs, and with them everything else of theirs, from their end.
    pub runs: OrNone<Span>,
    /// Time between two passes.
    pub interval: Span,
}

impl Default for RetentionConfig {
    fn default() -> Self {
        let retention = Retention::default();
        let kept = |kept: Option<Duration>| kept.map_or(OrNone::None, |kept| OrNone::Some(Span(kept)));
        Self {
            abandoned: kept(retention.abandoned),
            uploads: kept(retention.uploads),
            outputs: kept(retention.outputs),
            logs: kept(retention.logs),
            runs: kept(retention.runs),
            interval: Span(retention.interval),
        }
    }
}

impl RetentionConfig {
    /// What the service is told.
    pub fn to_domain(&self) -> Retention {
        Retention {
            abandoned: self.abandoned.map(|kept| kept.0),
            uploads: self.uploads.map(|kept| kept.0),
            outputs: self.outputs.map(|kept| kept.0),
            logs: self.logs.map(|kept| kept.0),
            runs: self.runs.map(|kept| kept.0),
            interval: self.interval.0,
            ..Retention::default()
        }
    }

    /// What does not fit: (key, what is wrong).
    pub(super) fn faults(&self) -> Vec<(String, String)> {
        let fits = self.interval >= Span::secs(1) && self.interval <= Span::secs(24 * 3600);
        if fits { Vec::new() } else { vec![("interval".to_owned(), "must be from 1 s to 24 h".to_owned())] }
    }
}
