//! Defaults and ceilings: every limit that a spec can name, and those that it cannot.

use std::time::Duration;

use crate::{capability::Capabilities, https::HttpsPolicy, spec::RunSpec};

/// A limit's default and its ceiling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound<T> {
    /// Where the spec says nothing. `None`: no limit is set.
    pub default: Option<T>,
    /// The most that a spec may ask for.
    pub ceiling: T,
}

/// The service's limits. All are configuration; these are the embedded defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it, with the unit")]
pub struct Limits {
    /// Live runs, of all tenants and of one. Beyond: `RESOURCE_EXHAUSTED`.
    pub live_runs: u64,
    pub live_runs_per_tenant: u64,
    pub timeout: Bound<Duration>,
    pub stop_grace: Bound<Duration>,
    /// Time that an attempt may take to be running.
    pub pending_timeout: Duration,
    pub cpu_millis: Bound<u32>,
    pub memory_bytes: Bound<u64>,
    pub ephemeral_storage_bytes: Bound<u64>,
    pub pids: Bound<u32>,
    pub gpus: Bound<u32>,
    pub file_size_bytes: Bound<u64>,
    pub output_bytes: Bound<u64>,
    pub attempts: Bound<u32>,
    pub backoff: Bound<Duration>,
    pub max_backoff: Bound<Duration>,
    /// Of one attempt's log; what is beyond is dropped and marked.
    pub log_bytes: u64,
    /// Command and arguments together: below the kernel's ARG_MAX, with room for the environment.
    pub argv_bytes: usize,
    pub env_bytes: usize,
    pub inputs: usize,
    pub outputs: usize,
    pub secrets: usize,
    pub inline_input_bytes: usize,
    /// All inline inputs of a spec together.
    pub inline_total_bytes: usize,
    pub labels: usize,
    /// Inputs by `https`.
    pub https: HttpsPolicy,
}

const MIB: u64 = 1024 * 1024;
const GIB: u64 = 1024 * MIB;

impl Default for Limits {
    fn default() -> Self {
        Self {
            live_runs: 100_000,
            live_runs_per_tenant: 50_000,
            timeout: Bound {
                default: Some(Duration::from_secs(3600)),
                ceiling: Duration::from_secs(7 * 24 * 3600),
            },
            stop_grace: Bound { default: Some(Duration::from_secs(10)), ceiling: Duration::from_secs(600) },
            pending_timeout: Duration::from_secs(600),
            cpu_millis: Bound { default: None, ceiling: 256_000 },
            memory_bytes: Bound { default: None, ceiling: 1024 * GIB },
            ephemeral_storage_bytes: Bound { default: None, ceiling: 1024 * GIB },
            pids: Bound { default: Some(4096), ceiling: 65_536 },
            gpus: Bound { default: None, ceiling: 16 },
            file_size_bytes: Bound { default: Some(64 * GIB), ceiling: 1024 * GIB },
            output_bytes: Bound { default: Some(16 * GIB), ceiling: 1024 * GIB },
            attempts: Bound { default: Some(1), ceiling: 20 },
            backoff: Bound { default: Some(Duration::from_secs(1)), ceiling: Duration::from_secs(3600) },
            max_backoff: Bound {
                default: Some(Duration::from_secs(60)),
                ceiling: Duration::from_secs(24 * 3600),
            },
            log_bytes: GIB * 4,
            argv_bytes: 128 * 1024,
            env_bytes: 128 * 1024,
            inputs: 256,
            outputs: 256,
            secrets: 64,
            inline_input_bytes: 256 * 1024,
            inline_total_bytes: 1024 * 1024,
            labels: 64,
            https: HttpsPolicy::default(),
        }
    }
}

impl Limits {
    /// Fills in every default that the spec leaves open. A default limit on a resource is set only where the backend can
    /// enforce it: the caller did not ask for it, so its absence weakens nothing that was promised.
    #[must_use]
    pub fn apply(&self, mut spec: RunSpec, can: &Capabilities) -> RunSpec {
        fn fill<T: Copy>(field: &mut Option<T>, bound: Bound<T>, supported: bool) {
            if field.is_none() && supported {
                *field = bound.default;
            }
        }
        fill(&mut spec.timeout, self.timeout, true);
        fill(&mut spec.stop_grace, self.stop_grace, true);
        let resources = &mut spec.resources;
        fill(&mut resources.cpu_millis, self.cpu_millis, can.cpu_limit);
        fill(&mut resources.memory_bytes, self.memory_bytes, can.memory_limit);
        fill(
            &mut resources.ephemeral_storage_bytes,
            self.ephemeral_storage_bytes,
            can.ephemeral_storage_limit,
        );
        fill(&mut resources.pids, self.pids, can.pids_limit);
        fill(&mut resources.gpus, self.gpus, can.gpus);
        fill(&mut resources.file_size_bytes, self.file_size_bytes, can.file_size_limit);
        for output in &mut spec.outputs {
            fill(&mut output.max_bytes, self.output_bytes, true);
        }
        fill(&mut spec.retry.max_attempts, self.attempts, true);
        fill(&mut spec.retry.initial_backoff, self.backoff, true);
        fill(&mut spec.retry.max_backoff, self.max_backoff, true);
        spec
    }

    /// A spec that [`apply`](Self::apply) filled in for one backend, as it would have been for another: a limit that has the default's
    /// value and that the other cannot enforce goes, one that only the other can enforce comes.
    ///
    /// Whoever asked for exactly the default's value gets no weaker promise by this where the other backend was found able to
    /// honour what they sent.
    #[must_use]
    pub fn apply_anew(&self, mut spec: RunSpec, can: &Capabilities) -> RunSpec {
        fn drop_default<T: PartialEq>(field: &mut Option<T>, bound: Bound<T>, supported: bool) {
            if !supported && *field == bound.default {
                *field = None;
            }
        }
        let resources = &mut spec.resources;
        drop_default(&mut resources.cpu_millis, self.cpu_millis, can.cpu_limit);
        drop_default(&mut resources.memory_bytes, self.memory_bytes, can.memory_limit);
        drop_default(
            &mut resources.ephemeral_storage_bytes,
            self.ephemeral_storage_bytes,
            can.ephemeral_storage_limit,
        );
        drop_default(&mut resources.pids, self.pids, can.pids_limit);
        drop_default(&mut resources.gpus, self.gpus, can.gpus);
        drop_default(&mut resources.file_size_bytes, self.file_size_bytes, can.file_size_limit);
        self.apply(spec, can)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_that_was_filled_in_for_one_backend_is_filled_in_for_another() {
        let limits =
            Limits { memory_bytes: Bound { default: Some(1 << 20), ceiling: 1 << 30 }, ..Limits::default() };
        let all = Capabilities::all();
        let few = Capabilities { pids_limit: false, memory_limit: false, ..Capabilities::all() };
        for spec in [RunSpec::default(), RunSpec { image: Some("x".to_owned()), ..RunSpec::default() }] {
            for (from, to) in [(&all, &few), (&few, &all), (&all, &all), (&few, &few)] {
                let anew = limits.apply_anew(limits.apply(spec.clone(), from), to);
                assert_eq!(anew, limits.apply(spec.clone(), to));
                assert_eq!(to.lacks(&anew), []);
            }
        }
        // What was asked for stays, and the backend says that it lacks it.
        let mut asked = RunSpec { command: vec!["x".to_owned()], ..RunSpec::default() };
        asked.resources.pids = Some(7);
        let anew = limits.apply_anew(asked, &few);
        assert_eq!((anew.resources.pids, few.lacks(&anew).len()), (Some(7), 1));
    }
}
