//! What the service counts and measures, as `/metrics` shows it. Every name is here, with what it means.

mod versions;

use std::{
    sync::atomic::{AtomicI64, AtomicU64},
    time::Duration,
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use runner_core::{
    id::BackendName,
    outcome::Cause,
    service::Meter,
    shadow::{DifferenceKind, Pair},
    state::RunState,
    store::StoredTraffic,
    traffic::{NoShadow, Target},
};

use self::versions::Versions;

/// (name without its suffix, what it means). The library adds `_total` to counters and the unit to the rest.
#[allow(missing_docs, reason = "each says what it means")]
pub mod name {
    pub const RUNS_ACCEPTED: (&str, &str) = ("runner_runs_accepted", "Runs that were accepted, by backend");
    pub const RUNS_REFUSED: (&str, &str) = ("runner_runs_refused", "Runs that were refused, by reason");
    pub const RUNS_ENDED: (&str, &str) = ("runner_runs_ended", "Runs that reached a terminal state");
    pub const RUN_DURATION: (&str, &str) = ("runner_run_duration", "From acceptance to the terminal state");
    pub const PHASE_DURATION: (&str, &str) =
        ("runner_phase_duration", "Time that an attempt spent in a state");
    pub const ATTEMPTS_RETRIED: (&str, &str) = ("runner_attempts_retried", "Attempts that are tried again");
    pub const LOG_BYTES: (&str, &str) = ("runner_log", "Log bytes that were taken over from workloads");
    pub const WATCHERS: (&str, &str) = ("runner_watchers", "Open streams");
    pub const LIVE_RUNS: (&str, &str) = ("runner_live_runs", "Runs that are not in a terminal state");
    pub const ORPHANS: (&str, &str) =
        ("runner_orphans_removed", "Workloads that no live run claimed and that were removed");
    pub const BACKEND_CALLS: (&str, &str) = (
        "runner_backend_calls",
        "Requests that a backend sent to its cluster's API server, by verb and resource",
    );
    pub const TRAFFIC_VERSION: (&str, &str) =
        ("runner_traffic_version", "Version of the state that decides where new runs go");
    pub const TRAFFIC_SHARE: (&str, &str) =
        ("runner_traffic_share", "Share of each backend in the policy's default, from 0 to 1");
    pub const TRAFFIC_DRAINED: (&str, &str) =
        ("runner_traffic_drained", "1 for each backend that takes no new runs");
    pub const TRAFFIC_CHANGES: (&str, &str) =
        ("runner_traffic_changes", "Changes of where new runs go, by action");
    pub const PLACED_RUNS: (&str, &str) = (
        "runner_placed_runs",
        "Runs that were accepted, by backend and the traffic's version that placed them",
    );
    pub const PLACED_ENDED: (&str, &str) = (
        "runner_placed_ended",
        "Runs that ended, by backend, the traffic's version that placed them, and cause",
    );
    pub const PLACED_QUEUE: (&str, &str) =
        ("runner_placed_queue", "From acceptance to the begin of the first attempt, by backend and version");
    pub const PLACED_START: (&str, &str) = (
        "runner_placed_start",
        "From acceptance to the first attempt's program running, by backend and version",
    );
    pub const PLACED_DURATION: (&str, &str) =
        ("runner_placed_duration", "From acceptance to the terminal state, by backend and version");
    pub const SHADOWS_ACCEPTED: (&str, &str) = ("runner_shadows_accepted", "Shadows that were accepted");
    pub const SHADOWS_COMPARED: (&str, &str) =
        ("runner_shadows_compared", "Runs that were compared with their shadows, by backends and result");
    pub const SHADOW_DIFFERENCES: (&str, &str) =
        ("runner_shadow_differences", "Runs that differ from their shadows, by what differs");
    pub const SHADOWS_SKIPPED: (&str, &str) =
        ("runner_shadows_skipped", "Runs that were sampled and have no shadow, by reason");
    pub const QUARANTINED: (&str, &str) = ("runner_quarantined_rows", "Stored rows that do not decode");
    pub const CONNECTIONS: (&str, &str) = ("runner_connections", "Open connections, by listener");
    pub const BLOB_REQUESTS: (&str, &str) = ("runner_blob_requests", "Requests of the blob endpoint");
    pub const BLOB_BYTES: (&str, &str) = ("runner_blob", "Bytes that went through the blob endpoint");
    pub const AGENT_BYTES: (&str, &str) =
        ("runner_agent_objects", "Bytes of objects that agents read or stored by way of this service");
    pub const AGENT_URLS: (&str, &str) =
        ("runner_agent_urls", "Requests to the object store that were signed for agents, by method");
    pub const BUILD_INFO: (&str, &str) = ("runner_build", "Which version this is; always 1");
}

/// From a millisecond, which a no-op takes, to a day.
const SECONDS: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 300.0, 3600.0, 14_400.0,
    86_400.0,
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByBackend {
    backend: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByReason {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByEnd {
    backend: String,
    state: &'static str,
    cause: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByCall {
    backend: String,
    verb: &'static str,
    resource: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByPhase {
    backend: String,
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByCause {
    backend: String,
    cause: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByListener {
    listener: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByRequest {
    method: &'static str,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByDirection {
    direction: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByMethod {
    method: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByAction {
    action: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByPair {
    primary: String,
    shadow: String,
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByKind {
    kind: &'static str,
}

type CountBy<L> = Family<L, Counter<u64, AtomicU64>>;
type HistogramBy<L> = Family<L, Histogram, fn() -> Histogram>;

fn seconds() -> Histogram {
    Histogram::new(SECONDS)
}

/// All metrics of the process. Label values come from configuration and from fixed sets, never from a caller.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    accepted: CountBy<ByBackend>,
    refused: CountBy<ByReason>,
    ended: CountBy<ByEnd>,
    run_duration: HistogramBy<ByBackend>,
    phase_duration: HistogramBy<ByPhase>,
    retried: CountBy<ByCause>,
    log_bytes: Counter<u64, AtomicU64>,
    watchers: Gauge<i64, AtomicI64>,
    live_runs: Gauge<i64, AtomicI64>,
    orphans: CountBy<ByBackend>,
    backend_calls: CountBy<ByCall>,
    traffic_version: Gauge<i64, AtomicI64>,
    traffic_share: Family<ByBackend, Gauge<f64, AtomicU64>>,
    traffic_drained: Family<ByBackend, Gauge<i64, AtomicI64>>,
    traffic_changes: CountBy<ByAction>,
    versions: Versions,
    shadows_accepted: CountBy<ByBackend>,
    shadows_compared: CountBy<ByPair>,
    shadow_differences: CountBy<ByKind>,
    shadows_skipped: CountBy<ByReason>,
    quarantined: Gauge<i64, AtomicI64>,
    connections: Family<ByListener, Gauge<i64, AtomicI64>>,
    blob_requests: CountBy<ByRequest>,
    blob_bytes: CountBy<ByDirection>,
    agent_bytes: CountBy<ByDirection>,
    agent_urls: CountBy<ByMethod>,
}

impl Metrics {
    /// All at zero.
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::default(),
            accepted: Family::default(),
            refused: Family::default(),
            ended: Family::default(),
            run_duration: Family::new_with_constructor(seconds),
            phase_duration: Family::new_with_constructor(seconds),
            retried: Family::default(),
            log_bytes: Counter::default(),
            watchers: Gauge::default(),
            live_runs: Gauge::default(),
            orphans: Family::default(),
            backend_calls: Family::default(),
            traffic_version: Gauge::default(),
            traffic_share: Family::default(),
            traffic_drained: Family::default(),
            traffic_changes: Family::default(),
            versions: Versions::new(),
            shadows_accepted: Family::default(),
            shadows_compared: Family::default(),
            shadow_differences: Family::default(),
            shadows_skipped: Family::default(),
            quarantined: Gauge::default(),
            connections: Family::default(),
            blob_requests: Family::default(),
            blob_bytes: Family::default(),
            agent_bytes: Family::default(),
            agent_urls: Family::default(),
        };
        let to = &mut metrics.registry;
        to.register(name::RUNS_ACCEPTED.0, name::RUNS_ACCEPTED.1, metrics.accepted.clone());
        to.register(name::RUNS_REFUSED.0, name::RUNS_REFUSED.1, metrics.refused.clone());
        to.register(name::RUNS_ENDED.0, name::RUNS_ENDED.1, metrics.ended.clone());
        to.register(name::ATTEMPTS_RETRIED.0, name::ATTEMPTS_RETRIED.1, metrics.retried.clone());
        to.register(name::WATCHERS.0, name::WATCHERS.1, metrics.watchers.clone());
        to.register(name::LIVE_RUNS.0, name::LIVE_RUNS.1, metrics.live_runs.clone());
        to.register(name::ORPHANS.0, name::ORPHANS.1, metrics.orphans.clone());
        to.register(name::BACKEND_CALLS.0, name::BACKEND_CALLS.1, metrics.backend_calls.clone());
        to.register(name::TRAFFIC_VERSION.0, name::TRAFFIC_VERSION.1, metrics.traffic_version.clone());
        to.register(name::TRAFFIC_SHARE.0, name::TRAFFIC_SHARE.1, metrics.traffic_share.clone());
        to.register(name::TRAFFIC_DRAINED.0, name::TRAFFIC_DRAINED.1, metrics.traffic_drained.clone());
        to.register(name::TRAFFIC_CHANGES.0, name::TRAFFIC_CHANGES.1, metrics.traffic_changes.clone());
        metrics.versions.register(to);
        to.register(name::SHADOWS_ACCEPTED.0, name::SHADOWS_ACCEPTED.1, metrics.shadows_accepted.clone());
        to.register(name::SHADOWS_COMPARED.0, name::SHADOWS_COMPARED.1, metrics.shadows_compared.clone());
        to.register(
            name::SHADOW_DIFFERENCES.0,
            name::SHADOW_DIFFERENCES.1,
            metrics.shadow_differences.clone(),
        );
        to.register(name::SHADOWS_SKIPPED.0, name::SHADOWS_SKIPPED.1, metrics.shadows_skipped.clone());
        to.register(name::QUARANTINED.0, name::QUARANTINED.1, metrics.quarantined.clone());
        to.register(name::CONNECTIONS.0, name::CONNECTIONS.1, metrics.connections.clone());
        to.register(name::BLOB_REQUESTS.0, name::BLOB_REQUESTS.1, metrics.blob_requests.clone());
        to.register(name::AGENT_URLS.0, name::AGENT_URLS.1, metrics.agent_urls.clone());
        let (name, help) = name::AGENT_BYTES;
        to.register_with_unit(name, help, Unit::Bytes, metrics.agent_bytes.clone());
        let (name, help) = name::RUN_DURATION;
        to.register_with_unit(name, help, Unit::Seconds, metrics.run_duration.clone());
        let (name, help) = name::PHASE_DURATION;
        to.register_with_unit(name, help, Unit::Seconds, metrics.phase_duration.clone());
        let (name, help) = name::LOG_BYTES;
        to.register_with_unit(name, help, Unit::Bytes, metrics.log_bytes.clone());
        let (name, help) = name::BLOB_BYTES;
        to.register_with_unit(name, help, Unit::Bytes, metrics.blob_bytes.clone());
        let version =
            prometheus_client::metrics::info::Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        to.register(name::BUILD_INFO.0, name::BUILD_INFO.1, version);
        metrics
    }

    /// The text that a Prometheus server reads (OpenMetrics 1.0).
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail; the library's signature is a writer's.
        if let Err(error) = text::encode(&mut text, &self.registry) {
            tracing::error!(%error, "could not write the metrics");
        }
        text
    }

    /// A connection of a listener was opened (+1) or closed (-1).
    pub fn connections(&self, listener: &'static str, change: i64) {
        self.connections.get_or_create(&ByListener { listener }).inc_by(change);
    }

    /// The blob endpoint answered.
    pub fn blob_request(&self, method: &'static str, status: u16) {
        self.blob_requests.get_or_create(&ByRequest { method, status }).inc();
    }

    /// Bytes came (`in`) or went (`out`) through the blob endpoint.
    pub fn blob_bytes(&self, direction: &'static str, bytes: u64) {
        self.blob_bytes.get_or_create(&ByDirection { direction }).inc_by(bytes);
    }

    /// Bytes of objects came (`in`) from agents or went (`out`) to them.
    pub fn agent_bytes(&self, direction: &'static str, bytes: u64) {
        self.agent_bytes.get_or_create(&ByDirection { direction }).inc_by(bytes);
    }

    /// A request to the object store was signed for an agent.
    pub fn agent_url(&self, method: &'static str) {
        self.agent_urls.get_or_create(&ByMethod { method }).inc();
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

impl Meter for Metrics {
    fn accepted(&self, backend: &BackendName, version: u64) {
        self.accepted.get_or_create(&ByBackend { backend: backend.to_string() }).inc();
        self.versions.accepted(backend, version);
    }

    fn begun(&self, backend: &BackendName, version: u64, duration: Duration) {
        self.versions.begun(backend, version, duration);
    }

    fn started(&self, backend: &BackendName, version: u64, duration: Duration) {
        self.versions.started(backend, version, duration);
    }

    fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&ByReason { reason }).inc();
    }

    fn phase(&self, backend: &BackendName, state: RunState, duration: Duration) {
        let labels = ByPhase { backend: backend.to_string(), state: state.as_str() };
        self.phase_duration.get_or_create(&labels).observe(duration.as_secs_f64());
    }

    fn ended(&self, backend: &BackendName, version: u64, state: RunState, cause: Cause, duration: Duration) {
        self.versions.ended(backend, version, cause, duration);
        let labels = ByEnd { backend: backend.to_string(), state: state.as_str(), cause: cause.as_str() };
        self.ended.get_or_create(&labels).inc();
        let labels = ByBackend { backend: backend.to_string() };
        self.run_duration.get_or_create(&labels).observe(duration.as_secs_f64());
    }

    fn retried(&self, backend: &BackendName, cause: Cause) {
        self.retried.get_or_create(&ByCause { backend: backend.to_string(), cause: cause.as_str() }).inc();
    }

    fn log_bytes(&self, bytes: u64) {
        self.log_bytes.inc_by(bytes);
    }

    fn watchers(&self, change: i64) {
        self.watchers.inc_by(change);
    }

    fn live_runs(&self, count: usize) {
        self.live_runs.set(gauge(count));
    }

    fn orphan_removed(&self, backend: &BackendName) {
        self.orphans.get_or_create(&ByBackend { backend: backend.to_string() }).inc();
    }

    fn backend_call(&self, backend: &BackendName, verb: &'static str, resource: &'static str) {
        let by = ByCall { backend: backend.to_string(), verb, resource };
        self.backend_calls.get_or_create(&by).inc();
    }

    fn traffic(&self, stored: &StoredTraffic) {
        let by = |backend: &BackendName| ByBackend { backend: backend.to_string() };
        self.versions.newest(stored.version);
        self.traffic_version.set(i64::try_from(stored.version).unwrap_or(i64::MAX));
        self.traffic_share.clear();
        match &stored.traffic.policy.default {
            None => {}
            Some(Target::Backend(backend)) => {
                self.traffic_share.get_or_create(&by(backend)).set(1.0);
            }
            Some(Target::Split(split)) => {
                for backend in split.backends() {
                    let share = split.share(backend).unwrap_or_default().percent() / 100.0;
                    self.traffic_share.get_or_create(&by(backend)).set(share);
                }
            }
        }
        self.traffic_drained.clear();
        for backend in stored.traffic.drained.keys() {
            self.traffic_drained.get_or_create(&by(backend)).set(1);
        }
    }

    fn traffic_changed(&self, action: &'static str) {
        self.traffic_changes.get_or_create(&ByAction { action }).inc();
    }

    fn shadow_skipped(&self, why: NoShadow) {
        self.shadows_skipped.get_or_create(&ByReason { reason: why.as_str() }).inc();
    }

    fn shadow_accepted(&self, backend: &BackendName) {
        self.shadows_accepted.get_or_create(&ByBackend { backend: backend.to_string() }).inc();
    }

    fn shadow_compared(&self, pair: &Pair, kinds: &[DifferenceKind]) {
        let labels = ByPair {
            primary: pair.primary_backend.to_string(),
            shadow: pair.shadow_backend.to_string(),
            result: if kinds.is_empty() { "agrees" } else { "differs" },
        };
        self.shadows_compared.get_or_create(&labels).inc();
        for kind in kinds {
            self.shadow_differences.get_or_create(&ByKind { kind: kind.as_str() }).inc();
        }
    }

    fn quarantined(&self, rows: usize) {
        self.quarantined.set(gauge(rows));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_measured_is_shown() {
        let metrics = Metrics::new();
        let backend: BackendName = "local".parse().unwrap();
        metrics.accepted(&backend, 7);
        metrics.begun(&backend, 7, Duration::from_millis(1));
        metrics.started(&backend, 7, Duration::from_millis(2));
        metrics.shadow_accepted(&backend);
        metrics.shadow_skipped(NoShadow::Late);
        let pair = Pair {
            primary: "01930000-0000-7000-8000-000000000001".parse().unwrap(),
            tenant: "t".parse().unwrap(),
            image: None,
            primary_backend: backend.clone(),
            shadow_backend: "k8s".parse().unwrap(),
        };
        metrics.shadow_compared(&pair, &[]);
        metrics.shadow_compared(&pair, &[DifferenceKind::Exit, DifferenceKind::Log]);
        metrics.refused("invalid");
        metrics.phase(&backend, RunState::Running, Duration::from_millis(3));
        metrics.ended(&backend, 7, RunState::Succeeded, Cause::Exited, Duration::from_secs(2));
        metrics.retried(&backend, Cause::Evicted);
        metrics.log_bytes(17);
        metrics.watchers(2);
        metrics.watchers(-1);
        metrics.live_runs(5);
        metrics.orphan_removed(&backend);
        metrics.backend_call(&backend, "create", "jobs");
        metrics.quarantined(1);
        metrics.traffic_changed("backend.drain");
        let split = r#"{"policy":{"default":{"split":{"baseline":"local","canaries":[{"backend":"k8s","percent":25}]}}},
            "drained":{"local":{"since":0,"by":"x","reason":"y"}}}"#;
        metrics.traffic(&StoredTraffic { version: 7, traffic: serde_json::from_str(split).unwrap() });
        metrics.connections("api", 1);
        metrics.blob_request("GET", 200);
        metrics.blob_bytes("out", 9);
        metrics.agent_bytes("in", 3);
        metrics.agent_url("PUT");
        let text = metrics.render();
        for line in [
            r#"runner_runs_accepted_total{backend="local"} 1"#,
            r#"runner_runs_refused_total{reason="invalid"} 1"#,
            r#"runner_runs_ended_total{backend="local",state="SUCCEEDED",cause="EXITED"} 1"#,
            r#"runner_run_duration_seconds_count{backend="local"} 1"#,
            r#"runner_phase_duration_seconds_bucket{le="0.005",backend="local",state="RUNNING"} 1"#,
            r#"runner_attempts_retried_total{backend="local",cause="EVICTED"} 1"#,
            "runner_log_bytes_total 17",
            "runner_watchers 1",
            "runner_live_runs 5",
            r#"runner_orphans_removed_total{backend="local"} 1"#,
            r#"runner_backend_calls_total{backend="local",verb="create",resource="jobs"} 1"#,
            "runner_quarantined_rows 1",
            r#"runner_placed_runs_total{backend="local",version="7"} 1"#,
            r#"runner_placed_ended_total{backend="local",version="7",cause="EXITED"} 1"#,
            r#"runner_placed_queue_seconds_count{backend="local",version="7"} 1"#,
            r#"runner_placed_start_seconds_count{backend="local",version="7"} 1"#,
            r#"runner_placed_duration_seconds_count{backend="local",version="7"} 1"#,
            r#"runner_shadows_accepted_total{backend="local"} 1"#,
            r#"runner_shadows_skipped_total{reason="late"} 1"#,
            r#"runner_shadows_compared_total{primary="local",shadow="k8s",result="agrees"} 1"#,
            r#"runner_shadows_compared_total{primary="local",shadow="k8s",result="differs"} 1"#,
            r#"runner_shadow_differences_total{kind="log"} 1"#,
            "runner_traffic_version 7",
            r#"runner_traffic_share{backend="local"} 0.75"#,
            r#"runner_traffic_share{backend="k8s"} 0.25"#,
            r#"runner_traffic_drained{backend="local"} 1"#,
            r#"runner_traffic_changes_total{action="backend.drain"} 1"#,
            r#"runner_connections{listener="api"} 1"#,
            r#"runner_blob_requests_total{method="GET",status="200"} 1"#,
            r#"runner_blob_bytes_total{direction="out"} 9"#,
            r#"runner_agent_objects_bytes_total{direction="in"} 3"#,
            r#"runner_agent_urls_total{method="PUT"} 1"#,
            "runner_build_info{version=",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
