//! What a [`LogStore`] promises, as cases that any implementation can be put through.
//!
//! [`log_suite!`](crate::log_suite) makes one named test per case.

pub mod bench;
pub mod cases;
pub mod plans;
pub mod process;
pub mod store;

use std::{future::Future, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{StreamExt as _, future::BoxFuture};
use runner_core::{
    clock::{Clock, IdGen as _, SystemClock, SystemIds, Timestamp},
    id::{AttemptId, TenantId},
    log::{Frame, FrameBatch, FrameBody, LogError, LogStore, LogStream},
};

/// What a case waits at most for anything. A case that passes never waits for it.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// An implementation under test.
pub trait Harness: Send {
    /// The store of this "process".
    fn logs(&self) -> Arc<dyn LogStore>;
    /// The "process" dies, and another starts over the same stored data. Nothing that the first had under way happens after
    /// this has returned.
    fn reopen(&mut self) -> BoxFuture<'_, ()>;
}

/// A new attempt of a new run.
pub fn attempt() -> AttemptId {
    AttemptId { run: SystemIds.run_id(), number: 1 }
}

/// A tenant of this name.
///
/// # Panics
/// Where it is not a tenant's name.
pub fn tenant(name: &str) -> TenantId {
    name.parse().expect("a tenant's name")
}

/// Waits for `future`, at most for [`DEADLINE`].
///
/// # Panics
/// Where it takes longer.
pub async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(DEADLINE, future).await.expect("nothing happened within the deadline")
}

/// Waits until `condition` holds, at most for [`DEADLINE`].
///
/// # Panics
/// Where it does not.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let clock = SystemClock::new();
    while !condition() {
        assert!(clock.monotonic() < DEADLINE, "{what} within the deadline");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// `length` bytes of a sequence that has no short period, from its byte `offset` on.
pub fn pattern(offset: u64, length: usize) -> Bytes {
    (offset..offset + length as u64).map(|at| (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect()
}

/// A frame of `stdout` with the pattern's bytes at its offset.
pub fn data(offset: u64, length: usize) -> Frame {
    frame(offset, FrameBody::Data { stream: LogStream::Stdout, bytes: pattern(offset, length) })
}

/// A frame that stands for dropped bytes.
pub fn truncated(offset: u64, dropped: u64) -> Frame {
    frame(offset, FrameBody::Truncated { dropped, reason: "too much".to_owned() })
}

/// A frame at some moment.
pub fn frame(offset: u64, body: FrameBody) -> Frame {
    Frame { offset, time: Timestamp::from_micros(1_000_000), body }
}

/// Reads to the end of the stream.
///
/// # Errors
/// The stream's own.
pub async fn collect(
    logs: &Arc<dyn LogStore>,
    tenant: &TenantId,
    attempt: AttemptId,
    offset: u64,
    follow: bool,
) -> Result<Vec<Frame>, LogError> {
    let mut stream = logs.read(tenant, attempt, offset, follow);
    let mut all = Vec::new();
    while let Some(batch) = soon(stream.next()).await {
        let batch = batch?;
        assert!(!batch.is_empty(), "a batch holds at least one frame");
        all.extend(batch);
    }
    Ok(all)
}

/// Checks that frames go on without a gap from `offset` to `end`, and that delivered bytes are the pattern's.
///
/// # Panics
/// Where it is not so.
pub fn check_pattern(frames: &[Frame], offset: u64, end: u64) {
    let mut next = offset;
    for frame in frames {
        assert_eq!(frame.offset, next, "frames go on without a gap");
        assert!(frame.span() > 0, "no frame is empty");
        if let FrameBody::Data { bytes, .. } = &frame.body {
            assert!(*bytes == pattern(next, bytes.len()), "other bytes at offset {next}");
        }
        next = frame.end();
    }
    assert_eq!(next, end, "the log ends where it must");
}

/// Frames of the pattern from `offset` to `end`, `size` bytes each.
pub fn stretch(offset: u64, end: u64, size: usize) -> FrameBatch {
    let mut frames = Vec::new();
    let mut next = offset;
    while next < end {
        let length = size.min(usize::try_from(end - next).unwrap_or(size));
        frames.push(data(next, length));
        next += length as u64;
    }
    frames
}

/// Makes a test of every case for the harness that an expression makes.
#[macro_export]
macro_rules! log_suite {
    ($harness:expr) => {
        $crate::log_suite! { @ $harness;
            frames_come_back_as_they_were_appended
            what_is_there_already_is_ignored
            a_resend_in_other_frames_adds_only_what_is_new
            a_gap_is_refused_and_what_came_before_it_kept
            a_frame_past_the_last_offset_is_refused
            flush_makes_everything_durable
            what_was_flushed_survives_a_restart
            a_restarted_source_goes_on_from_the_durable_offset
            every_offset_can_be_read_from
            an_offset_past_the_end_reads_as_nothing
            a_reader_that_follows_wakes_up
            a_reader_sees_a_frame_before_it_is_durable
            a_reader_that_follows_ends_at_the_seal
            a_reader_that_does_not_follow_ends
            a_reader_may_come_before_the_log_is_opened
            a_reader_may_come_before_a_log_that_is_only_sealed
            many_readers_get_the_same
            a_stalled_reader_does_not_slow_append
            seal_is_idempotent
            a_seal_survives_a_restart
            a_log_can_be_sealed_by_the_next_process
            a_sealed_log_takes_no_more_frames
            a_log_that_is_not_open_takes_no_frames
            opening_a_sealed_log_answers_its_end
            opening_twice_finds_it_open
            an_empty_log_reads_as_empty
            a_log_that_was_never_opened_reads_as_empty_once_sealed
            dropped_bytes_are_counted_and_keep_their_offsets
            streams_times_and_reasons_come_back
            many_small_frames_come_back
            deleting_a_run_removes_its_logs_and_no_other
            deleting_a_run_ends_its_readers
            another_tenant_reads_nothing
            attempts_share_nothing
        }
        #[test]
        fn random_plans_keep_every_byte() {
            $crate::log::plans::run(|| Box::new($harness));
        }
    };
    (@ $harness:expr; $($case:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                let mut harness = $harness;
                $crate::log::cases::$case(&mut harness).await;
            }
        )*
    };
}
