//! Named crash points: places where a test kills the process as `kill -9` would. Compiled out of release builds.

/// Every crash point of the service, in the order of a run's life. A test goes through them all.
pub const POINTS: &[&str] = &[
    "run.before-accept",
    "run.accepted",
    "attempt.before-preparing",
    "attempt.preparing",
    "attempt.ensured",
    "attempt.before-running",
    "attempt.running",
    "log.appended",
    "log.segment-stored",
    "attempt.exited",
    "attempt.publishing",
    "outputs.file-stored",
    "outputs.manifest-stored",
    "attempt.published",
    "log.sealed",
    "run.before-terminal",
    "run.terminal",
    "workload.removed",
    "cancel.before-intent",
    "cancel.intent",
    "cancel.stopped",
];

/// Every crash point of a removal, in its order.
pub const REMOVAL_POINTS: &[&str] = &[
    "removal.begun",
    "removal.logs-gone",
    "removal.manifests-gone",
    "removal.artifacts-gone",
    "removal.done",
];

/// Every crash point of a shadow, from its primary's end on, in their order.
pub const SHADOW_POINTS: &[&str] = &[
    "shadow.before-accept",
    "shadow.accepted",
    "shadow.before-verdict",
    "shadow.judged",
    "shadow.orphan-cancelled",
    "shadow.orphan-removed",
];

/// Kills the process here when `RUNNER_CRASH_AT` names this point (`NAME` or `NAME:N` for its N-th passage).
#[inline]
pub fn point(name: &'static str) {
    #[cfg(debug_assertions)]
    armed::point(name);
    #[cfg(not(debug_assertions))]
    let _ = name;
}

#[cfg(debug_assertions)]
mod armed {
    use std::sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    };

    struct Armed {
        name: String,
        left: AtomicU64,
    }

    static ARMED: OnceLock<Option<Armed>> = OnceLock::new();

    pub(super) fn point(name: &'static str) {
        let listed = [super::POINTS, super::REMOVAL_POINTS, super::SHADOW_POINTS];
        let listed = listed.into_iter().flatten().any(|listed| *listed == name);
        debug_assert!(listed, "crash point {name} is not listed");
        let armed = ARMED.get_or_init(|| {
            let value = std::env::var("RUNNER_CRASH_AT").ok().filter(|value| !value.is_empty())?;
            let (name, count) = match value.split_once(':') {
                Some((name, count)) => (name.to_owned(), count.parse().unwrap_or(1)),
                None => (value, 1),
            };
            Some(Armed { name, left: AtomicU64::new(count) })
        });
        if let Some(armed) = armed
            && armed.name == name
            && armed.left.fetch_sub(1, Ordering::SeqCst) == 1
        {
            kill();
        }
    }

    fn kill() -> ! {
        // SIGKILL to ourselves is the only faithful crash: no destructor, no buffer flush, no exit handler.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        std::process::abort()
    }
}
