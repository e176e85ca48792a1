//! The conformance suite of [`ArtifactStore`]: one case for each rule of its contract, and for what stores get wrong.
//!
//! An implementation brings an [`ArtifactPlace`] and one line,
//! [`artifact_conformance!`](crate::artifact_conformance), which makes a named test of every case.

pub mod direct;
pub mod keys;
pub mod read;
pub mod write;

use std::{future::Future, ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use runner_core::artifact::{
    ArtifactError, ArtifactErrorKind, ArtifactKey, ArtifactMeta, ArtifactStore, ByteStream,
};

/// Where the stores of one implementation lie.
pub trait ArtifactPlace: Send + Sync + 'static {
    /// Whether objects outlive the store's value.
    const DURABLE: bool;
    /// Why there can be no such place here. The test is then skipped, and says so.
    fn missing() -> Option<String> {
        None
    }
    /// An empty place, shared with no other test.
    fn new() -> Self;
    /// Opens the store of this place.
    fn open(&self) -> Arc<dyn ArtifactStore>;
    /// The longest key, in bytes: a prefix of the place takes room from it.
    const LONGEST_KEY: usize = 1024;
    /// Whether a backslash in a key stays one. Azure takes it for a slash.
    const BACKSLASH: bool = true;
    /// Whether the store signs URLs of its own for reading.
    const DIRECT_READ: bool = false;
    /// Whether a URL can be signed and tried here.
    const DIRECT_SERVED: bool = true;
    /// Whether the store signs URLs of its own that store exactly what was promised.
    const DIRECT_CREATE: bool = false;
    /// What lies in the place that belongs to no object: abandoned uploads.
    fn leftovers(&self) -> Vec<String>;
}

/// Says that a test is skipped, and why.
#[allow(clippy::print_stderr, reason = "a skip is told")]
pub fn skipped(why: &str) {
    eprintln!("SKIPPED: {why}");
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

/// A key.
///
/// # Panics
/// Where the text is none.
pub fn key(text: &str) -> ArtifactKey {
    text.parse().expect("a valid key")
}

/// `size` bytes that differ from place to place, so that a chunk that is lost, doubled or swapped shows.
pub fn pattern(size: usize) -> Bytes {
    (0..size).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// The bytes as a stream of chunks of this size.
pub fn chunked(bytes: Bytes, chunk: usize) -> ByteStream {
    let chunks: Vec<_> =
        (0..bytes.len()).step_by(chunk).map(|at| Ok(bytes.slice(at..bytes.len().min(at + chunk)))).collect();
    stream::iter(chunks).boxed()
}

/// The bytes in chunks, then a failure of this kind.
pub fn failing(bytes: Bytes, chunk: usize, kind: ArtifactErrorKind) -> ByteStream {
    let end = stream::iter([Err(ArtifactError::new(kind, "the test's stream fails"))]);
    chunked(bytes, chunk).chain(end).boxed()
}

/// Reads a range whole.
///
/// # Errors
/// The store's.
pub async fn read(
    store: &dyn ArtifactStore,
    key: &ArtifactKey,
    range: Range<u64>,
) -> Result<(ArtifactMeta, Vec<u8>), ArtifactError> {
    let (meta, mut bytes) = store.get(key, range).await?;
    let mut all = Vec::new();
    while let Some(chunk) = bytes.try_next().await? {
        all.extend_from_slice(&chunk);
    }
    Ok((meta, all))
}

/// The keys below a prefix, sorted.
///
/// # Panics
/// Where the store fails.
pub async fn listed(store: &dyn ArtifactStore, prefix: &str) -> Vec<String> {
    let mut keys: Vec<String> = store
        .list(&key(prefix))
        .map_ok(|meta| meta.key.to_string())
        .try_collect()
        .await
        .expect("the store lists");
    keys.sort();
    keys
}

/// Calls a macro with every case, by module. The one list of them.
#[doc(hidden)]
#[macro_export]
macro_rules! artifact_cases {
    ($with:ident $($args:tt)*) => {
        $crate::$with! {
            $($args)*
            write {
                every_size_comes_back_exact,
                every_chunking_comes_back_exact,
                an_empty_object_exists,
                a_put_replaces_the_object_whole,
                a_stream_that_fails_leaves_nothing,
                a_stream_that_fails_leaves_the_object_that_was_there,
                a_put_that_is_dropped_leaves_nothing,
                nothing_is_visible_before_the_put_returns,
                an_object_of_many_parts_comes_back_exact,
                a_hundred_puts_at_once_all_arrive,
                racing_puts_of_one_key_leave_one_of_them_whole,
                delete_removes_and_does_so_twice,
                what_was_put_outlives_the_store_s_value,
                probe_answers_and_leaves_nothing,
            }
            read {
                ranges_are_cut_at_the_end,
                a_missing_object_is_not_found,
                a_reader_sees_one_object_while_it_is_replaced,
                a_reader_sees_one_object_while_it_is_deleted,
                chunks_stay_small,
                a_large_object_that_is_replaced_is_never_mixed,
                read_small_refuses_what_is_larger,
            }
            direct {
                a_direct_read_yields_the_object_and_nothing_else,
                a_direct_upload_stores_exactly_what_was_promised_and_once,
                a_direct_upload_may_replace_but_only_with_what_was_promised,
            }
            keys {
                unusual_names_come_back_as_they_were,
                list_goes_by_whole_names,
                list_of_nothing_is_empty,
                list_tells_sizes_and_many_keys,
                a_folder_is_no_object,
                a_name_can_be_an_object_s_again_after_those_below_it_are_gone,
            }
        }
    };
}

/// Makes a test of every case for one implementation.
#[macro_export]
macro_rules! artifact_conformance {
    ($place:ty) => {
        $crate::artifact_cases! { artifact_tests $place; }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! artifact_tests {
    ($place:ty; $($module:ident { $($case:ident,)* })*) => {
        $(mod $module {
            #[allow(unused_imports, reason = "the place may be named by a path of its own")]
            use super::*;
            $(
                #[test]
                fn $case() {
                    if let Some(why) = <$place as $crate::artifact::ArtifactPlace>::missing() {
                        $crate::artifact::skipped(&why);
                        return;
                    }
                    let place = <$place as $crate::artifact::ArtifactPlace>::new();
                    $crate::artifact::block_on($crate::artifact::$module::$case(&place));
                }
            )*
        })*
    };
}
