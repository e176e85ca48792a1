//! What the engine's word of a container adds to how its attempt ended. Pure.

use bollard::models::ContainerState;
use runner_agent::{
    backend::{Ending, Seen},
    exec::protocol::ExitRecord,
};
use runner_core::clock::Timestamp;

/// Its shim wrote how it ended.
pub(crate) fn recorded(record: ExitRecord, state: &ContainerState) -> Ending {
    Ending::Recorded {
        record: Box::new(record),
        out_of_memory: state.oom_killed == Some(true),
        seen: vec![("container", describe(state))],
    }
}

/// It was started, does not run, and its shim did not say why. The shim is the container's first process: where it is
/// killed, the kernel kills all others with it.
pub(crate) fn died(state: &ContainerState, said: String, time: Timestamp) -> Ending {
    let mut seen: Seen = vec![("container", describe(state))];
    if !said.is_empty() {
        seen.push(("shim", said));
    }
    Ending::Died { out_of_memory: state.oom_killed == Some(true), seen, time }
}

/// What the engine says, in a line.
fn describe(state: &ContainerState) -> String {
    let status = state.status.map_or_else(|| "unknown".to_owned(), |status| status.to_string());
    let mut text = format!(
        "{status}, exit code {}, out of memory {}, started {}, finished {}",
        state.exit_code.map_or_else(|| "unknown".to_owned(), |code| code.to_string()),
        state.oom_killed.unwrap_or_default(),
        state.started_at.as_deref().unwrap_or("never"),
        state.finished_at.as_deref().unwrap_or("never"),
    );
    if let Some(error) = state.error.as_deref().filter(|error| !error.is_empty()) {
        text.push_str(": ");
        text.push_str(error);
    }
    text
}

#[cfg(test)]
mod tests {
    use runner_agent::{backend::judge, exec::protocol::ExitReason};
    use runner_core::outcome::{Cause, ExitStatus, Usage};

    use super::*;

    fn killed(out_of_memory: bool) -> ContainerState {
        ContainerState {
            oom_killed: Some(out_of_memory),
            exit_code: Some(137),
            error: Some("as the engine says".to_owned()),
            ..ContainerState::default()
        }
    }

    #[test]
    fn the_engines_word_counts_where_the_shim_could_not_see_the_memory_limit() {
        let record = ExitRecord {
            reason: ExitReason::Exited,
            status: Some(ExitStatus::Signal(9)),
            time: Timestamp::from_micros(5),
            usage: Usage::default(),
            evidence: Vec::new(),
        };
        for (out_of_memory, cause) in [(false, Cause::Exited), (true, Cause::OomKilled)] {
            let ending = recorded(record.clone(), &killed(out_of_memory));
            let ended = judge(ending, runner_agent::backend::Counted::default(), None);
            assert_eq!(ended.cause, cause);
            let last = ended.evidence.last().expect("evidence");
            assert!(last.source == "container" && last.detail.contains("137"), "{last:?}");
        }
    }

    #[test]
    fn a_container_that_died_tells_all_that_is_known() {
        for (out_of_memory, said, pieces) in [(false, "", 1), (true, "no room", 2)] {
            let ending = died(&killed(out_of_memory), said.to_owned(), Timestamp::from_micros(5));
            let Ending::Died { out_of_memory: seen_so, seen, .. } = ending else { panic!("{ending:?}") };
            assert_eq!((seen_so, seen.len()), (out_of_memory, pieces));
            assert!(seen[0].1.ends_with(": as the engine says"), "{seen:?}");
        }
    }
}
