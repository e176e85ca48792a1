//! The conformance suite of [`Store`]: one case for each rule of its contract and each answer of its verbs.
//!
//! An implementation brings a [`StoreFactory`] and one line, [`store_conformance!`](crate::store_conformance), which makes
//! a named test of every case. [`model`] compares two implementations under random verbs.

pub mod accept;
pub mod cancel;
pub mod durable;
pub mod events;
pub mod kit;
pub mod list;
pub mod model;
pub mod pairs;
pub mod quarantine;
pub mod retention;
pub mod traffic;
pub mod transition;

use std::{future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use runner_core::{id::RunId, store::Store};

/// Makes stores of one implementation.
#[async_trait]
pub trait StoreFactory: Send + Sync + 'static {
    /// Why this machine cannot have such a store, where it cannot.
    fn missing() -> Option<String> {
        None
    }
    /// A place for a store, empty, shared with no other test.
    fn new() -> Self;
    /// Opens the store of this place. Every handle from before has been dropped.
    async fn open(&self) -> Arc<dyn Store>;
    /// Makes the run's row one that does not decode: its state is not one that is known. The store may be open.
    async fn corrupt(&self, id: RunId);
}

/// Runs a case on a runtime of its own. A case that hangs fails.
///
/// # Panics
/// Where the case does, and after two minutes.
pub fn block_on<F: Future<Output = ()>>(case: F) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime is made");
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(120), case).await.expect("the case ends in time");
    });
}

/// Runs a case, or says that it is skipped.
///
/// # Panics
/// As [`block_on`].
#[allow(clippy::print_stdout, reason = "a skip must be visible in the test's output")]
pub fn conform<F: StoreFactory>(name: &str, case: impl AsyncFnOnce(&F)) {
    match F::missing() {
        Some(why) => println!("SKIP store case={name} missing={why}"),
        None => block_on(async { case(&F::new()).await }),
    }
}

/// Calls a macro with every case, by module. The one list of them.
#[doc(hidden)]
#[macro_export]
macro_rules! store_cases {
    ($with:ident $($args:tt)*) => {
        $crate::$with! {
            $($args)*
            accept {
                a_new_run_is_at_the_start_with_one_event,
                the_same_id_with_the_same_spec_is_the_same_run,
                the_same_id_with_another_spec_conflicts,
                an_id_of_another_tenant_conflicts,
                the_same_key_with_the_same_spec_is_the_same_run,
                the_same_key_with_another_spec_conflicts,
                a_key_belongs_to_its_tenant,
                the_id_is_judged_before_the_key,
                concurrent_duplicates_by_key_make_one_run,
                concurrent_duplicates_by_id_make_one_run,
                above_the_total_limit_nothing_is_stored,
                above_the_limit_of_a_tenant_nothing_is_stored,
                a_limit_holds_under_concurrency,
                a_duplicate_is_found_where_a_limit_is_reached,
                a_run_that_ended_makes_room,
                a_spec_of_a_mebibyte_comes_back_whole,
                unusual_text_comes_back_as_it_was,
            }
            transition {
                it_sets_what_it_names_and_nothing_else,
                elsewhere_it_changes_nothing,
                of_an_unknown_run_is_not_found,
                a_malformed_one_is_refused,
                a_terminal_run_never_changes,
                racing_ones_have_one_winner,
                the_first_start_is_kept_until_another_is_named,
                events_are_numbered_in_their_order,
                timers_are_replaced_as_a_set,
                a_terminal_position_leaves_no_timers,
                ended_attempts_are_kept_in_order,
                one_failure_fails_only_itself,
            }
            cancel {
                a_queued_run_is_cancelled_at_once,
                a_run_between_two_attempts_is_cancelled_at_once,
                a_running_run_gets_an_intent,
                only_the_first_intent_is_kept,
                of_a_terminal_run_nothing_changes,
                of_an_unknown_run_is_not_found,
                no_attempt_begins_after_it,
                against_begin_it_has_one_winner,
                against_an_exit_it_has_one_winner,
            }
            events {
                an_appended_event_has_the_next_number,
                concurrent_events_have_consecutive_numbers,
                a_change_of_position_is_not_appended,
                to_a_terminal_run_nothing_is_appended,
                of_an_unknown_run_are_not_found,
                are_read_from_any_number_in_pages,
            }
            list {
                newest_first_and_by_id_where_times_are_equal,
                pages_show_every_run_once,
                pages_are_stable_while_runs_are_added,
                the_last_page_has_no_successor,
                each_filter_selects,
                all_filters_together_select,
                of_nothing_is_empty,
            }
            durable {
                everything_survives_a_reopen,
                limits_count_what_was_there_before,
                live_runs_are_oldest_first_with_their_timers,
                the_count_of_live_runs_is_right,
                a_probe_is_answered,
            }
            quarantine {
                a_row_that_does_not_decode_fails_only_its_own_verbs,
                live_reports_what_does_not_decode_and_goes_on,
                listings_leave_out_what_does_not_decode,
            }
            traffic {
                a_state_is_read_back_as_it_was_stored,
                over_another_version_nothing_is_stored,
                of_several_at_once_one_is_stored,
                the_audit_log_is_read_from_the_newest_in_pages,
                state_and_audit_log_survive_a_reopen,
                what_decided_for_a_run_is_read_back,
            }
            pairs {
                a_pair_is_stored_with_the_end_of_its_primary,
                a_shadow_is_accepted_once_and_only_where_its_pair_waits_for_it,
                concurrent_beginnings_make_one_shadow,
                a_shadow_counts_against_no_limit_and_no_listing_shows_it,
                a_verdict_is_stored_once_and_read_back,
                pairs_are_listed_newest_first_by_every_filter_in_pages,
                a_pair_goes_with_either_of_its_runs,
            }
            retention {
                ended_runs_come_in_the_order_of_their_ends,
                a_removed_run_leaves_nothing_and_frees_its_names,
                a_live_run_is_not_removed,
                how_far_a_sweep_has_come_survives_a_reopen,
                a_run_that_does_not_decode_is_removed_with_the_others,
                a_removal_that_was_begun_is_known_until_it_is_done,
                an_upload_is_known_to_be_named_until_the_last_run_that_named_it_is_gone,
            }
        }
    };
}

/// Makes a named test of every case for one [`StoreFactory`]. To be called once in a file.
#[macro_export]
macro_rules! store_conformance {
    ($factory:ident) => {
        $crate::store_cases! { store_conformance_tests [$factory] }
    };
}

/// See [`store_conformance!`](crate::store_conformance).
#[doc(hidden)]
#[macro_export]
macro_rules! store_conformance_tests {
    ($factory:tt $($module:ident $cases:tt)*) => {
        $($crate::store_conformance_module! { $factory $module $cases })*
    };
}

/// See [`store_conformance!`](crate::store_conformance).
#[doc(hidden)]
#[macro_export]
macro_rules! store_conformance_module {
    ([$factory:ident] $module:ident { $($case:ident,)* }) => {
        mod $module {
            $(
                #[test]
                fn $case() {
                    $crate::store::conform::<super::$factory>(stringify!($case), $crate::store::$module::$case);
                }
            )*
        }
    };
}

/// The list of cases as text, to be compared with the sources.
#[cfg(test)]
#[doc(hidden)]
#[macro_export]
macro_rules! store_case_names {
    ($($module:ident { $($case:ident,)* })*) => {
        [$((include_str!(concat!(stringify!($module), ".rs")), &[$(stringify!($case)),*] as &[&str])),*]
    };
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_case_that_is_written_is_in_the_list() {
        for (source, names) in store_cases! { store_case_names } {
            let written: Vec<&str> = source
                .lines()
                .filter_map(|line| line.strip_prefix("pub async fn ")?.split(['(', '<']).next())
                .collect();
            assert_eq!(written, names);
        }
    }
}
