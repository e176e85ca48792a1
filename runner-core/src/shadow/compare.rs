//! How two executions of one spec compare. Pure.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::LogDigest;
use crate::{
    artifact::{EntryKind, ManifestEntry},
    outcome::{Cause, ExitStatus, Outcome},
    state::RunState,
    store::{RunEvent, StoredEvent},
};

/// Most differences that a record lists; it counts the others.
pub const MAX_DIFFERENCES: usize = 64;
/// Most bytes of a path in a difference.
const MAX_TEXT: usize = 512;

/// Time that the last attempt spent in each state, as far as it came. By the wall clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named after the states")]
pub struct Phases {
    pub queued: Option<Duration>,
    pub preparing: Option<Duration>,
    pub running: Option<Duration>,
    pub publishing: Option<Duration>,
}

impl Phases {
    /// From a run's events, oldest first.
    pub fn of(events: &[StoredEvent]) -> Self {
        let mut phases = Self::default();
        let mut at = None;
        for event in events {
            let position = match &event.event {
                RunEvent::StateChanged { position, .. } | RunEvent::Terminated { position, .. } => position,
                RunEvent::Outputs(_) | RunEvent::Notice(_) => continue,
            };
            if let Some((state, since)) = at.replace((position.state, event.time)) {
                phases.set(state, event.time.since(since));
            }
        }
        phases
    }

    fn set(&mut self, state: RunState, spent: Duration) {
        match state {
            // Another attempt begins: what is known is of one before.
            RunState::Queued => *self = Self { queued: Some(spent), ..Self::default() },
            RunState::Preparing => self.preparing = Some(spent),
            RunState::Running => self.running = Some(spent),
            RunState::Publishing => self.publishing = Some(spent),
            RunState::Succeeded | RunState::Failed | RunState::Cancelled => {}
        }
    }
}

/// What is known of one execution when it is compared.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// How it ended.
    pub outcome: &'a Outcome,
    /// What its log comes to. `None`: the log is gone.
    pub log: Option<&'a LogDigest>,
    /// Time in each state.
    pub phases: Phases,
}

/// One of the two, as far as a person wants to see it beside the other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Side {
    /// How the program ended, where it ran and it is known.
    pub status: Option<ExitStatus>,
    /// Why it ended.
    pub cause: Cause,
    /// Files that it stored.
    pub files: u64,
    /// Their bytes.
    pub output_bytes: u64,
    /// `None`: the log is gone.
    pub log: Option<LogDigest>,
    /// Reported, and never a difference by itself: two backends are not equally fast.
    pub phases: Phases,
}

/// What kind of thing differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DifferenceKind {
    /// The exit code, or the signal.
    Exit,
    /// Why it ended.
    Cause,
    /// A file or directory among the outputs: there or not, its size, its SHA-256.
    Output,
    /// The bytes of a stream.
    Log,
}

impl DifferenceKind {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::Exit, Self::Cause, Self::Output, Self::Log];

    /// Its name in metrics and documents.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Exit => "exit",
            Self::Cause => "cause",
            Self::Output => "output",
            Self::Log => "log",
        }
    }
}

/// One thing that differs, for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// What kind of thing.
    pub kind: DifferenceKind,
    /// Which: the path of an output, the name of a stream; else empty.
    pub what: String,
    /// What it was with the primary.
    pub primary: String,
    /// What it was with the shadow.
    pub shadow: String,
}

/// How a run and its shadow compare.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Parity {
    /// The first [`MAX_DIFFERENCES`], by kind, then by path or stream.
    pub differences: Vec<Difference>,
    /// How many more there are.
    pub more: u64,
    /// Whether the logs could be compared: both are there whole.
    pub log_compared: bool,
    /// The run.
    pub primary: Side,
    /// Its shadow.
    pub shadow: Side,
}

impl Parity {
    /// Whether nothing differs.
    pub const fn agrees(&self) -> bool {
        self.differences.is_empty()
    }

    /// The kinds of differences, each once, in their order.
    pub fn kinds(&self) -> Vec<DifferenceKind> {
        let mut kinds: Vec<_> = self.differences.iter().map(|difference| difference.kind).collect();
        kinds.dedup();
        kinds
    }
}

#[derive(Default)]
struct Found {
    differences: Vec<Difference>,
    more: u64,
}

impl Found {
    fn add(&mut self, kind: DifferenceKind, what: &str, primary: String, shadow: String) {
        if self.differences.len() >= MAX_DIFFERENCES {
            self.more += 1;
            return;
        }
        let what = what[..what.floor_char_boundary(MAX_TEXT)].to_owned();
        self.differences.push(Difference { kind, what, primary, shadow });
    }
}

/// Compares what is known of the two.
///
/// Logs are compared stream by stream, and only where both are whole: of one that is gone, or of which bytes were dropped, nothing
/// can be said. The order of bytes of different streams is a matter of scheduling and is no difference.
pub fn compare(primary: Facts<'_>, shadow: Facts<'_>) -> Parity {
    let mut found = Found::default();
    let (one, other) = (primary.outcome, shadow.outcome);
    if one.status != other.status {
        found.add(DifferenceKind::Exit, "", status(one.status), status(other.status));
    }
    if one.cause != other.cause {
        let name = |cause: Cause| cause.as_str().to_owned();
        found.add(DifferenceKind::Cause, "", name(one.cause), name(other.cause));
    }
    outputs(&mut found, one, other);
    let whole = |facts: Facts<'_>| facts.log.is_some_and(|log| log.dropped == 0);
    let log_compared = whole(primary) && whole(shadow);
    if let (true, Some(one), Some(other)) = (log_compared, primary.log, shadow.log) {
        logs(&mut found, one, other);
    }
    Parity {
        differences: found.differences,
        more: found.more,
        log_compared,
        primary: side(primary),
        shadow: side(shadow),
    }
}

fn side(facts: Facts<'_>) -> Side {
    let outputs = facts.outcome.outputs.as_ref();
    let files = outputs
        .map_or(0, |manifest| manifest.entries.iter().filter(|entry| entry.kind == EntryKind::File).count());
    Side {
        status: facts.outcome.status,
        cause: facts.outcome.cause,
        files: files as u64,
        output_bytes: outputs.map_or(0, |manifest| manifest.total_bytes),
        log: facts.log.cloned(),
        phases: facts.phases,
    }
}

fn status(status: Option<ExitStatus>) -> String {
    match status {
        None => "unknown".to_owned(),
        Some(ExitStatus::Code(code)) => format!("exit code {code}"),
        Some(ExitStatus::Signal(signal)) => format!("signal {signal}"),
    }
}

/// By the output that it belongs to and where it lay: two outputs may have the same file.
type Places<'a> = BTreeMap<(&'a str, Vec<u8>), &'a ManifestEntry>;

fn places(outcome: &Outcome) -> Places<'_> {
    let entries = outcome.outputs.iter().flat_map(|manifest| &manifest.entries);
    let place = |entry: &ManifestEntry| entry.place().unwrap_or_else(|| entry.path.clone().into_bytes());
    entries.map(|entry| ((entry.output.as_str(), place(entry)), entry)).collect()
}

fn outputs(found: &mut Found, one: &Outcome, other: &Outcome) {
    let (one, other) = (places(one), places(other));
    let same =
        |a: &ManifestEntry, b: &ManifestEntry| (a.kind, a.size, &a.sha256) == (b.kind, b.size, &b.sha256);
    let all: std::collections::BTreeSet<_> = one.keys().chain(other.keys()).collect();
    for place in all {
        let (a, b) = (one.get(place).copied(), other.get(place).copied());
        if a.zip(b).is_some_and(|(a, b)| same(a, b)) {
            continue;
        }
        let path = format!("/{}", String::from_utf8_lossy(&place.1));
        found.add(DifferenceKind::Output, &path, entry(a), entry(b));
    }
}

fn entry(entry: Option<&ManifestEntry>) -> String {
    match entry {
        None => "absent".to_owned(),
        Some(entry) => match entry.kind {
            EntryKind::Directory => "a directory".to_owned(),
            EntryKind::File => format!("{} bytes, sha256 {}", entry.size, entry.sha256),
        },
    }
}

fn logs(found: &mut Found, one: &LogDigest, other: &LogDigest) {
    let names: std::collections::BTreeSet<_> = one.streams.keys().chain(other.streams.keys()).collect();
    for name in names {
        let (a, b) = (one.streams.get(name), other.streams.get(name));
        if a != b {
            let text = |stream: Option<&super::StreamDigest>| match stream {
                None => "nothing".to_owned(),
                Some(stream) => format!("{} bytes, sha256 {}", stream.bytes, stream.sha256),
            };
            found.add(DifferenceKind::Log, name, text(a), text(b));
        }
    }
}

#[cfg(test)]
#[path = "compare_tests.rs"]
mod tests;
