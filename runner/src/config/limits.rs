//! The part `limits`: every limit of the service, with its default and, where a spec can name it, its ceiling.

use std::time::Duration;

use runner_core::{
    https::HttpsPolicy,
    limits::{Bound, Limits},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::value::{ByteSize, OrNone, Span};

/// A limit that a spec can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BoundConfig<T> {
    /// Where the spec says nothing. `none`: no limit is set.
    pub default: OrNone<T>,
    /// The most that a spec may ask for.
    pub ceiling: T,
}

impl<T: Copy> BoundConfig<T> {
    fn from_domain<D: Copy>(bound: Bound<D>, wrap: impl Fn(D) -> T) -> Self {
        Self {
            default: bound.default.map_or(OrNone::None, |value| OrNone::Some(wrap(value))),
            ceiling: wrap(bound.ceiling),
        }
    }

    fn to_domain<D>(self, unwrap: impl Fn(T) -> D) -> Bound<D> {
        Bound { default: self.default.map(&unwrap), ceiling: unwrap(self.ceiling) }
    }
}

/// Limits that always hold. Sizes are bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitsConfig {
    /// Live runs of all tenants together. Beyond: `RESOURCE_EXHAUSTED`.
    pub live_runs: u64,
    /// Live runs of one tenant.
    pub live_runs_per_tenant: u64,
    /// Wall time that a program may run.
    pub timeout: BoundConfig<Span>,
    /// Time between SIGTERM and SIGKILL.
    pub stop_grace: BoundConfig<Span>,
    /// Time that an attempt may take to be running.
    pub pending_timeout: Span,
    /// Thousandths of a core.
    pub cpu_millis: BoundConfig<u32>,
    /// Memory of a workload.
    pub memory_bytes: BoundConfig<ByteSize>,
    /// Scratch space of a workload.
    pub ephemeral_storage_bytes: BoundConfig<ByteSize>,
    /// Processes and threads of a workload.
    pub pids: BoundConfig<u32>,
    /// GPUs of a workload.
    pub gpus: BoundConfig<u32>,
    /// Any one file that a program writes.
    pub file_size_bytes: BoundConfig<ByteSize>,
    /// One output, all its files together.
    pub output_bytes: BoundConfig<ByteSize>,
    /// Attempts of a run.
    pub attempts: BoundConfig<u32>,
    /// Wait before the second attempt.
    pub backoff: BoundConfig<Span>,
    /// Largest wait between attempts.
    pub max_backoff: BoundConfig<Span>,
    /// One attempt's log. What is beyond is dropped, and marked in the log.
    pub log_bytes: ByteSize,
    /// Command and arguments together.
    pub argv_bytes: ByteSize,
    /// The environment, names and values.
    pub env_bytes: ByteSize,
    /// Number of inputs of a spec.
    pub inputs: usize,
    /// Number of outputs of a spec.
    pub outputs: usize,
    /// Number of secrets of a spec.
    pub secrets: usize,
    /// One inline input.
    pub inline_input_bytes: ByteSize,
    /// All inline inputs of a spec together.
    pub inline_total_bytes: ByteSize,
    /// Number of labels of a run.
    pub labels: usize,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self::from(Limits::default())
    }
}

fn size(bytes: usize) -> ByteSize {
    ByteSize(bytes as u64)
}

fn count(bytes: ByteSize) -> usize {
    usize::try_from(bytes.0).unwrap_or(usize::MAX)
}

impl From<Limits> for LimitsConfig {
    fn from(limits: Limits) -> Self {
        // Destructured without `..`: a limit that is added to the core does not compile until it is configurable.
        let Limits {
            live_runs,
            live_runs_per_tenant,
            timeout,
            stop_grace,
            pending_timeout,
            cpu_millis,
            memory_bytes,
            ephemeral_storage_bytes,
            pids,
            gpus,
            file_size_bytes,
            output_bytes,
            attempts,
            backoff,
            max_backoff,
            log_bytes,
            argv_bytes,
            env_bytes,
            inputs,
            outputs,
            secrets,
            inline_input_bytes,
            inline_total_bytes,
            labels,
            // A part of its own: `inputs.https`.
            https: _,
        } = limits;
        let span = |bound| BoundConfig::from_domain(bound, Span);
        let bytes = |bound| BoundConfig::from_domain(bound, ByteSize);
        let number = |bound| BoundConfig::from_domain(bound, |number: u32| number);
        Self {
            live_runs,
            live_runs_per_tenant,
            timeout: span(timeout),
            stop_grace: span(stop_grace),
            pending_timeout: Span(pending_timeout),
            cpu_millis: number(cpu_millis),
            memory_bytes: bytes(memory_bytes),
            ephemeral_storage_bytes: bytes(ephemeral_storage_bytes),
            pids: number(pids),
            gpus: number(gpus),
            file_size_bytes: bytes(file_size_bytes),
            output_bytes: bytes(output_bytes),
            attempts: number(attempts),
            backoff: span(backoff),
            max_backoff: span(max_backoff),
            log_bytes: ByteSize(log_bytes),
            argv_bytes: size(argv_bytes),
            env_bytes: size(env_bytes),
            inputs,
            outputs,
            secrets,
            inline_input_bytes: size(inline_input_bytes),
            inline_total_bytes: size(inline_total_bytes),
            labels,
        }
    }
}

impl From<&LimitsConfig> for Limits {
    fn from(config: &LimitsConfig) -> Self {
        let span = |bound: BoundConfig<Span>| -> Bound<Duration> { bound.to_domain(|span| span.0) };
        let bytes = |bound: BoundConfig<ByteSize>| bound.to_domain(|size| size.0);
        let number = |bound: BoundConfig<u32>| bound.to_domain(|number| number);
        Self {
            live_runs: config.live_runs,
            live_runs_per_tenant: config.live_runs_per_tenant,
            timeout: span(config.timeout),
            stop_grace: span(config.stop_grace),
            pending_timeout: config.pending_timeout.0,
            cpu_millis: number(config.cpu_millis),
            memory_bytes: bytes(config.memory_bytes),
            ephemeral_storage_bytes: bytes(config.ephemeral_storage_bytes),
            pids: number(config.pids),
            gpus: number(config.gpus),
            file_size_bytes: bytes(config.file_size_bytes),
            output_bytes: bytes(config.output_bytes),
            attempts: number(config.attempts),
            backoff: span(config.backoff),
            max_backoff: span(config.max_backoff),
            log_bytes: config.log_bytes.0,
            argv_bytes: count(config.argv_bytes),
            env_bytes: count(config.env_bytes),
            inputs: config.inputs,
            outputs: config.outputs,
            secrets: config.secrets,
            inline_input_bytes: count(config.inline_input_bytes),
            inline_total_bytes: count(config.inline_total_bytes),
            labels: config.labels,
            https: HttpsPolicy::default(),
        }
    }
}

impl LimitsConfig {
    /// What does not fit together: (key below `limits`, what is wrong).
    pub(super) fn faults(&self) -> Vec<(&'static str, String)> {
        fn default_above_ceiling<T: PartialOrd + Copy + std::fmt::Debug>(
            key: &'static str,
            bound: BoundConfig<T>,
            faults: &mut Vec<(&'static str, String)>,
        ) {
            if let OrNone::Some(default) = bound.default
                && default > bound.ceiling
            {
                faults
                    .push((key, format!("the default {default:?} is above the ceiling {:?}", bound.ceiling)));
            }
        }
        let mut faults = Vec::new();
        for (key, bound) in [
            ("timeout", self.timeout),
            ("stop_grace", self.stop_grace),
            ("backoff", self.backoff),
            ("max_backoff", self.max_backoff),
        ] {
            default_above_ceiling(key, bound, &mut faults);
        }
        for (key, bound) in [
            ("memory_bytes", self.memory_bytes),
            ("ephemeral_storage_bytes", self.ephemeral_storage_bytes),
            ("file_size_bytes", self.file_size_bytes),
            ("output_bytes", self.output_bytes),
        ] {
            default_above_ceiling(key, bound, &mut faults);
        }
        for (key, bound) in [
            ("cpu_millis", self.cpu_millis),
            ("pids", self.pids),
            ("gpus", self.gpus),
            ("attempts", self.attempts),
        ] {
            default_above_ceiling(key, bound, &mut faults);
        }
        for (key, value) in
            [("live_runs", self.live_runs), ("live_runs_per_tenant", self.live_runs_per_tenant)]
        {
            if value == 0 {
                faults.push((key, "must be larger than zero: nothing could ever run".to_owned()));
            }
        }
        if self.timeout.default == OrNone::None {
            faults.push(("timeout", "must have a default: a run without one could live for ever".to_owned()));
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_go_through_the_configuration_unchanged() {
        let limits = Limits::default();
        assert_eq!(Limits::from(&LimitsConfig::from(limits.clone())), limits);
        let other = Limits { live_runs: 7, pids: Bound { default: None, ceiling: 9 }, inputs: 3, ..limits };
        assert_eq!(Limits::from(&LimitsConfig::from(other.clone())), other);
    }
}
