//! The cases. Each is an `async fn` of its own name; the table below says what capability each needs.

pub mod confinement;
pub mod ensuring;
pub mod housekeeping;
pub mod inputs;
pub mod logs;
pub mod outcome;
pub mod outputs;
pub mod reopening;
pub mod stopping;
pub mod talking;

use runner_core::{
    artifact::{ArtifactKey, ArtifactUri, EntryKind, Manifest},
    backend::AttemptContext,
    clock::{IdGen as _, SystemIds},
    spec::{Input, InputSource, Output},
};
use sha2::{Digest as _, Sha256};

use super::{
    bench::{Bench, within},
    program::Program,
};

/// Every case: module, name, and the capabilities without which it has no meaning.
#[doc(hidden)]
#[macro_export]
macro_rules! backend_cases {
    ($kind:literal, $make:path) => {
        $crate::backend_cases! { @each $kind, $make,
            outcome: exit_codes_are_told_verbatim [];
            outcome: a_signal_is_told_as_a_signal [];
            outcome: a_program_that_does_not_exist_exits_127 [];
            outcome: a_program_that_is_not_executable_exits_126 [];
            outcome: a_timeout_ends_the_program_and_is_told_as_such [];
            outcome: a_timeout_kills_what_ignores_sigterm [];
            outcome: an_oom_kill_is_told_from_an_exit_with_137 [memory_limit];
            outcome: memory_below_the_limit_may_be_used [memory_limit];
            outcome: a_workload_that_never_was_is_lost [];
            stopping: stop_ends_a_program_with_sigterm [];
            stopping: stop_lets_a_program_end_by_itself_within_the_grace [];
            stopping: stop_kills_what_ignores_sigterm_after_the_grace [];
            stopping: stop_kills_a_double_forked_daemon [];
            stopping: a_daemon_does_not_outlive_its_program [];
            stopping: stop_before_ensure_returns_at_once [];
            stopping: stop_after_the_end_changes_nothing [];
            stopping: stop_twice_is_the_same_as_once [];
            stopping: concurrent_stops_all_return_when_it_is_dead [];
            stopping: a_second_stop_may_shorten_the_grace [];
            stopping: a_stop_that_was_dropped_can_be_repeated [];
            stopping: an_observer_sees_the_stop [];
            stopping: outputs_written_before_a_stop_are_stored [inputs_outputs];
            ensuring: ensure_twice_makes_one_workload [];
            ensuring: concurrent_ensures_make_one_workload [];
            ensuring: ensure_after_the_end_starts_nothing [];
            ensuring: the_name_is_derived_from_the_attempt [];
            ensuring: attempts_of_one_run_are_separate [];
            ensuring: a_dropped_ensure_is_found_and_removed [inputs_outputs];
            ensuring: a_dropped_ensure_can_be_repeated [inputs_outputs];
            ensuring: ensure_may_be_dropped_at_any_moment [inputs_outputs];
            ensuring: no_workload_waits_for_another [inputs_outputs];
            logs: both_streams_are_exact_and_apart [];
            logs: a_program_that_prints_nothing_has_an_empty_log [];
            logs: an_observation_may_begin_at_every_offset [];
            logs: two_observers_see_the_same [];
            logs: frames_come_while_the_program_runs [];
            logs: an_observer_that_goes_away_disturbs_nobody [];
            logs: a_binary_log_of_64_mib_is_exact [];
            logs: a_line_of_64_mib_on_stderr_is_exact [];
            logs: two_streams_at_once_are_each_exact [];
            logs: beyond_the_limit_bytes_are_dropped_and_counted [];
            logs: a_limit_of_nothing_drops_all_and_counts_it [];
            logs: what_was_not_released_is_kept [];
            inputs: an_object_appears_at_its_path [inputs_outputs];
            inputs: inline_bytes_appear_at_their_path [inputs_outputs];
            inputs: a_tree_appears_below_its_path [inputs_outputs];
            inputs: a_large_object_is_exact [inputs_outputs];
            inputs: a_digest_that_matches_is_accepted [inputs_outputs];
            inputs: a_digest_that_does_not_match_fails_the_attempt [inputs_outputs];
            inputs: an_object_that_is_missing_fails_the_attempt [inputs_outputs];
            inputs: a_store_that_is_away_fails_the_attempt_for_now [inputs_outputs];
            inputs: the_program_cannot_change_its_inputs [inputs_outputs];
            outputs: files_and_directories_are_stored_with_size_and_digest [inputs_outputs];
            outputs: the_manifest_is_written_last [inputs_outputs];
            outputs: an_optional_output_may_be_absent [inputs_outputs];
            outputs: a_required_output_that_is_absent_fails_the_run [inputs_outputs];
            outputs: a_failed_program_publishes_what_it_wrote [inputs_outputs];
            outputs: a_destination_is_honoured [inputs_outputs];
            outputs: an_output_above_its_limit_is_not_stored [inputs_outputs];
            outputs: publishing_again_changes_nothing [inputs_outputs];
            outputs: a_store_that_is_away_loses_nothing [inputs_outputs];
            confinement: the_environment_is_the_specs_and_nothing_else [];
            confinement: the_default_user_is_not_root [user];
            confinement: the_program_runs_as_its_user [user];
            confinement: the_working_directory_is_the_specs [];
            confinement: a_read_only_root_cannot_be_written [read_only_root];
            confinement: a_read_only_root_leaves_tmp_and_outputs_writable [read_only_root, inputs_outputs];
            confinement: without_network_there_is_only_loopback [network_none];
            confinement: processes_beyond_the_limit_are_refused [pids_limit];
            confinement: a_file_beyond_the_limit_ends_the_program [file_size_limit, inputs_outputs];
            talking: standard_input_is_empty_unless_asked_for [];
            talking: standard_input_arrives_in_order_until_its_end [stdin];
            talking: input_is_refused_where_nobody_takes_it [stdin];
            talking: a_terminal_is_one_stream_with_a_size_that_changes [terminal];
            reopening: reopen_while_preparing [inputs_outputs];
            reopening: reopen_while_running [];
            reopening: reopen_in_the_middle_of_a_log [];
            reopening: reopen_after_the_exit [];
            reopening: reopen_before_remove [];
            reopening: reopen_before_publishing [inputs_outputs];
            reopening: reopen_then_stop [];
            reopening: reopen_then_stop_a_daemon [];
            reopening: reopen_then_send_input [stdin];
            reopening: reopen_then_remove_what_runs [];
            housekeeping: remove_leaves_nothing [];
            housekeeping: remove_twice_is_the_same_as_once [];
            housekeeping: remove_of_what_never_was_succeeds [];
            housekeeping: remove_stops_what_is_alive [];
            housekeeping: list_names_what_is_there_and_nothing_else [];
            housekeeping: what_is_not_ours_is_left_alone [];
            housekeeping: the_backend_is_healthy_and_says_what_it_is [];
        }
    };
    (@each $kind:literal, $make:path, $($module:ident : $case:ident [$($need:ident),*];)*) => {
        $($crate::backend_case!($kind, $make, $module, $case, [$($need),*]);)*
    };
}

/// An output with no limit of its own and no destination.
fn output(path: &str, required: bool) -> Output {
    Output { path: path.to_owned(), glob: false, destination: None, required, max_bytes: None }
}

/// An input from anywhere, with nothing special about it.
fn input(path: &str, source: InputSource) -> Input {
    Input { path: path.to_owned(), source, sha256: None, mode: None, extract: None }
}

/// A key of the tenant that nobody else uses.
fn upload_key(bench: &Bench, name: &str) -> ArtifactKey {
    let upload = SystemIds.run_id();
    ArtifactKey::upload_prefix(&bench.tenant, upload.as_uuid()).join(name).expect("a valid key")
}

/// Stores an object, and answers a source that names it.
fn object(bench: &Bench, bytes: &[u8]) -> InputSource {
    let key = upload_key(bench, "object");
    bench.store.seed(&key, bytes.to_vec());
    InputSource::Artifact(ArtifactUri::object(key))
}

/// An attempt with one object input at `/inputs/x`.
fn with_object_input(bench: &Bench, program: &Program, bytes: &[u8]) -> AttemptContext {
    let source = object(bench, bytes);
    bench.attempt_with(program, |spec| spec.inputs.push(input("/inputs/x", source)))
}

/// Begins to make a workload, and drops that while its input is read. Leaves the store's gate closed.
async fn drop_ensure_while_staging(bench: &Bench, attempt: &AttemptContext) {
    bench.store.close_gate();
    let backend = bench.backend();
    tokio::select! {
        made = backend.ensure(attempt) => panic!("ensure passed a closed gate: {made:?}"),
        () = within("reach the gate", bench.store.wait_for_waiting(1)) => {}
    }
}

fn hex_digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The files of a manifest as (output, path, bytes), each verified against its size and digest.
fn contents(bench: &Bench, manifest: &Manifest) -> Vec<(String, String, Vec<u8>)> {
    let mut total = 0;
    let mut files = Vec::new();
    for entry in &manifest.entries {
        match entry.kind {
            EntryKind::Directory => assert!(entry.key.is_none() && entry.size == 0, "{entry:?}"),
            EntryKind::File => {
                let key = entry.key.as_ref().expect("a file has a key");
                let bytes = bench.store.peek(key).expect("what a manifest names is stored");
                assert_eq!(entry.size, bytes.len() as u64, "{entry:?}");
                assert_eq!(entry.sha256, hex_digest(&bytes), "{entry:?}");
                total += entry.size;
                files.push((entry.output.clone(), entry.path.clone(), bytes.to_vec()));
            }
        }
    }
    assert_eq!(manifest.total_bytes, total);
    files
}
