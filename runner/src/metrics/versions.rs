//! What is measured by backend and by the traffic's version that placed a run.
//!
//! Versions grow without end, so only the newest [`KEPT`] have series of their own; runs of the others count as `older`. When a version
//! falls out, its counters are added to those of `older`, so that no sum falls, and its histograms go.

use std::{
    collections::BTreeSet,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::family::Family,
    registry::{Registry, Unit},
};
use runner_core::{id::BackendName, outcome::Cause};

use super::{CountBy, HistogramBy, name, seconds};

/// So many versions have series of their own.
const KEPT: u64 = 8;
/// What the others are.
const OLDER: &str = "older";

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
struct ByVersion {
    backend: String,
    version: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByVersionAndCause {
    backend: String,
    version: String,
    cause: &'static str,
}

/// Which versions have series.
#[derive(Debug, Default)]
struct Known {
    newest: u64,
    /// (version, backend).
    series: BTreeSet<(u64, String)>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Versions {
    /// Held while anything is measured, so that no series of a version that has fallen out comes back.
    known: Mutex<Known>,
    accepted: CountBy<ByVersion>,
    ended: CountBy<ByVersionAndCause>,
    queue: HistogramBy<ByVersion>,
    start: HistogramBy<ByVersion>,
    duration: HistogramBy<ByVersion>,
}

impl Versions {
    pub(super) fn new() -> Self {
        Self {
            known: Mutex::default(),
            accepted: Family::default(),
            ended: Family::default(),
            queue: Family::new_with_constructor(seconds),
            start: Family::new_with_constructor(seconds),
            duration: Family::new_with_constructor(seconds),
        }
    }

    pub(super) fn register(&self, to: &mut Registry) {
        to.register(name::PLACED_RUNS.0, name::PLACED_RUNS.1, self.accepted.clone());
        to.register(name::PLACED_ENDED.0, name::PLACED_ENDED.1, self.ended.clone());
        let (name, help) = name::PLACED_QUEUE;
        to.register_with_unit(name, help, Unit::Seconds, self.queue.clone());
        let (name, help) = name::PLACED_START;
        to.register_with_unit(name, help, Unit::Seconds, self.start.clone());
        let (name, help) = name::PLACED_DURATION;
        to.register_with_unit(name, help, Unit::Seconds, self.duration.clone());
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The labels of a run, and the guard under which it is measured.
    fn labels(&self, backend: &BackendName, version: u64) -> (MutexGuard<'_, Known>, ByVersion) {
        let mut known = self.known();
        let backend = backend.to_string();
        let version = if version.saturating_add(KEPT) > known.newest {
            known.series.insert((version, backend.clone()));
            version.to_string()
        } else {
            OLDER.to_owned()
        };
        (known, ByVersion { backend, version })
    }

    pub(super) fn accepted(&self, backend: &BackendName, version: u64) {
        let (_guard, labels) = self.labels(backend, version);
        self.accepted.get_or_create(&labels).inc();
    }

    pub(super) fn begun(&self, backend: &BackendName, version: u64, duration: Duration) {
        let (_guard, labels) = self.labels(backend, version);
        self.queue.get_or_create(&labels).observe(duration.as_secs_f64());
    }

    pub(super) fn started(&self, backend: &BackendName, version: u64, duration: Duration) {
        let (_guard, labels) = self.labels(backend, version);
        self.start.get_or_create(&labels).observe(duration.as_secs_f64());
    }

    pub(super) fn ended(&self, backend: &BackendName, version: u64, cause: Cause, duration: Duration) {
        let (_guard, labels) = self.labels(backend, version);
        self.duration.get_or_create(&labels).observe(duration.as_secs_f64());
        let ByVersion { backend, version } = labels;
        self.ended.get_or_create(&ByVersionAndCause { backend, version, cause: cause.as_str() }).inc();
    }

    /// The traffic has this version now.
    pub(super) fn newest(&self, version: u64) {
        let mut known = self.known();
        known.newest = known.newest.max(version);
        let first = (known.newest + 1).saturating_sub(KEPT);
        let kept = known.series.split_off(&(first, String::new()));
        let fallen = std::mem::replace(&mut known.series, kept);
        for (version, backend) in fallen {
            let labels = ByVersion { backend: backend.clone(), version: version.to_string() };
            let older = ByVersion { version: OLDER.to_owned(), ..labels.clone() };
            let runs = self.accepted.get_or_create(&labels).get();
            self.accepted.get_or_create(&older).inc_by(runs);
            self.accepted.remove(&labels);
            for cause in Cause::ALL.map(Cause::as_str) {
                let by = |version: &str| ByVersionAndCause {
                    backend: backend.clone(),
                    version: version.to_owned(),
                    cause,
                };
                let labels = by(&labels.version);
                let runs = self.ended.get_or_create(&labels).get();
                self.ended.remove(&labels);
                if runs > 0 {
                    self.ended.get_or_create(&by(OLDER)).inc_by(runs);
                }
            }
            for histogram in [&self.queue, &self.start, &self.duration] {
                histogram.remove(&labels);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_newest_versions_have_series_and_no_run_is_forgotten() {
        let versions = Versions::new();
        let mut registry = Registry::default();
        versions.register(&mut registry);
        let backends: [BackendName; 2] = ["a".parse().unwrap(), "b".parse().unwrap()];
        for version in 0..100 {
            versions.newest(version);
            for backend in &backends {
                versions.accepted(backend, version);
                versions.begun(backend, version, Duration::from_millis(1));
                versions.started(backend, version, Duration::from_millis(1));
                // One that was placed long ago.
                versions.ended(backend, version.saturating_sub(20), Cause::Exited, Duration::from_millis(1));
            }
        }
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for (metric, of) in [("runner_placed_runs_total{", 100), ("runner_placed_ended_total{", 100)] {
            let lines: Vec<_> = text.lines().filter(|line| line.starts_with(metric)).collect();
            assert!(lines.len() <= 2 * (8 + 1), "{lines:#?}");
            let sum: u64 = lines.iter().filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum();
            assert_eq!(sum, 2 * of, "{lines:#?}");
        }
        assert!(text.contains(r#"runner_placed_runs_total{backend="a",version="99"} 1"#), "{text}");
        assert!(text.contains(r#"runner_placed_runs_total{backend="a",version="older"} 92"#), "{text}");
        assert!(!text.contains(r#"version="91""#), "{text}");
        let histograms = text.lines().filter(|line| line.starts_with("runner_placed_queue_seconds_count{"));
        assert!(histograms.count() <= 2 * (8 + 1));
    }
}
