//! The cases. Each names the rule of [`LogStore`] that it checks.
#![allow(missing_docs, reason = "the names say it")]

use std::sync::Arc;

use futures::{FutureExt as _, StreamExt as _};
use runner_core::{
    clock::Timestamp,
    id::{AttemptId, RunId},
    log::{Frame, FrameBody, LogError, LogStore, LogStream, LogSummary},
};

use super::{
    Harness, attempt, check_pattern, collect, data, frame, pattern, soon, stretch, tenant, truncated,
};

async fn filled(harness: &dyn Harness, end: u64) -> (Arc<dyn LogStore>, AttemptId) {
    let (logs, id) = (harness.logs(), attempt());
    assert_eq!(soon(logs.open(&tenant("t"), id, true)).await.unwrap(), 0);
    soon(logs.append(id, stretch(0, end, 700))).await.unwrap();
    (logs, id)
}

/// Rules 1 and 5.
pub async fn frames_come_back_as_they_were_appended(harness: &mut dyn Harness) {
    let (logs, id) = (harness.logs(), attempt());
    logs.open(&tenant("t"), id, true).await.unwrap();
    let source = vec![data(0, 10), data(10, 1), data(11, 5000)];
    logs.append(id, source.clone()).await.unwrap();
    assert_eq!(collect(&logs, &tenant("t"), id, 0, false).await.unwrap(), source);
    logs.seal(&tenant("t"), id).await.unwrap();
    assert_eq!(collect(&logs, &tenant("t"), id, 0, true).await.unwrap(), source);
    logs.append(id, Vec::new()).await.unwrap_err();
}

/// Rule 1.
pub async fn what_is_there_already_is_ignored(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 2000).await;
    for _ in 0..3 {
        logs.append(id, stretch(0, 2000, 700)).await.unwrap();
    }
    assert_eq!(logs.seal(&tenant("t"), id).await.unwrap().end, 2000);
    check_pattern(&collect(&logs, &tenant("t"), id, 0, true).await.unwrap(), 0, 2000);
}

/// Rule 1.
pub async fn a_resend_in_other_frames_adds_only_what_is_new(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 2000).await;
    // One frame over the end, then frames that start within it.
    logs.append(id, vec![data(1500, 1000), data(2400, 300)]).await.unwrap();
    logs.append(id, stretch(0, 3000, 13)).await.unwrap();
    check_pattern(&collect(&logs, &tenant("t"), id, 0, false).await.unwrap(), 0, 3000);
    assert_eq!(logs.seal(&tenant("t"), id).await.unwrap().end, 3000);
}

/// Rule 1.
pub async fn a_gap_is_refused_and_what_came_before_it_kept(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 100).await;
    let error = logs.append(id, vec![data(100, 50), data(151, 1)]).await.unwrap_err();
    assert!(matches!(error, LogError::Gap { expected: 150, got: 151, .. }), "{error:?}");
    check_pattern(&collect(&logs, &tenant("t"), id, 0, false).await.unwrap(), 0, 150);
    logs.append(id, vec![data(150, 50)]).await.unwrap();
    assert_eq!(logs.seal(&tenant("t"), id).await.unwrap().end, 200);
}

/// Rule 1: offsets do not wrap around.
pub async fn a_frame_past_the_last_offset_is_refused(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 100).await;
    let error = logs.append(id, vec![truncated(100, u64::MAX - 50)]).await.unwrap_err();
    assert!(matches!(error, LogError::Corrupt { .. }), "{error:?}");
    logs.append(id, vec![data(100, 1)]).await.unwrap();
    assert_eq!(logs.seal(&tenant("t"), id).await.unwrap(), LogSummary { end: 101, dropped: 0 });
}

/// Rule 2.
pub async fn flush_makes_everything_durable(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 5000).await;
    assert_eq!(soon(logs.flush(id)).await.unwrap(), 5000);
    assert_eq!(soon(logs.flush(id)).await.unwrap(), 5000);
    assert_eq!(logs.append(id, vec![]).await.unwrap(), 5000);
    let durable = logs.append(id, vec![data(5000, 1)]).await.unwrap();
    assert!((5000..=5001).contains(&durable), "{durable}");
}

/// Rule 2.
pub async fn what_was_flushed_survives_a_restart(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 5000).await;
    logs.flush(id).await.unwrap();
    drop(logs);
    harness.reopen().await;
    let logs = harness.logs();
    check_pattern(&collect(&logs, &tenant("t"), id, 0, false).await.unwrap(), 0, 5000);
    assert_eq!(logs.open(&tenant("t"), id, false).await.unwrap(), 5000);
    check_pattern(&collect(&logs, &tenant("t"), id, 1234, false).await.unwrap(), 1234, 5000);
}

/// Rules 1 and 2.
pub async fn a_restarted_source_goes_on_from_the_durable_offset(harness: &mut dyn Harness) {
    let id = attempt();
    let mut durable = harness.logs().open(&tenant("t"), id, true).await.unwrap();
    for round in 1..=5usize {
        let logs = harness.logs();
        // The source sends again from some earlier offset, in other frames.
        let from = durable.saturating_sub(100 * round as u64);
        let end = durable + 1000;
        logs.append(id, stretch(from, end, 300 + 7 * round)).await.unwrap();
        assert_eq!(logs.flush(id).await.unwrap(), end);
        // Perhaps not durable: the source has it still.
        logs.append(id, vec![data(end, 50)]).await.unwrap();
        drop(logs);
        harness.reopen().await;
        durable = harness.logs().open(&tenant("t"), id, false).await.unwrap();
        assert!((end..=end + 50).contains(&durable), "{durable}");
        check_pattern(&collect(&harness.logs(), &tenant("t"), id, 0, false).await.unwrap(), 0, durable);
    }
    let logs = harness.logs();
    assert_eq!(logs.seal(&tenant("t"), id).await.unwrap().end, durable);
    check_pattern(&collect(&logs, &tenant("t"), id, 0, true).await.unwrap(), 0, durable);
}

/// Rule 5.
pub async fn every_offset_can_be_read_from(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 3000).await;
    logs.flush(id).await.unwrap();
    logs.append(id, vec![truncated(3000, 500), data(3500, 100)]).await.unwrap();
    for offset in (0..3600).step_by(37) {
        check_pattern(&collect(&logs, &tenant("t"), id, offset, false).await.unwrap(), offset, 3600);
    }
    logs.seal(&tenant("t"), id).await.unwrap();
    for offset in (0..3600).step_by(41) {
        check_pattern(&collect(&logs, &tenant("t"), id, offset, true).await.unwrap(), offset, 3600);
    }
}

/// Rule 5.
pub async fn an_offset_past_the_end_reads_as_nothing(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 100).await;
    let mut waiting = logs.read(&tenant("t"), id, 150, true);
    assert!(waiting.next().now_or_never().is_none());
    assert_eq!(collect(&logs, &tenant("t"), id, 150, false).await.unwrap(), []);
    logs.append(id, vec![data(100, 100)]).await.unwrap();
    check_pattern(&soon(waiting.next()).await.unwrap().unwrap(), 150, 200);
    logs.seal(&tenant("t"), id).await.unwrap();
    assert_eq!(collect(&logs, &tenant("t"), id, 200, true).await.unwrap(), []);
    assert_eq!(collect(&logs, &tenant("t"), id, u64::MAX, true).await.unwrap(), []);
}

/// Rule 5.
pub async fn a_reader_that_follows_wakes_up(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 100).await;
    let mut stream = logs.read(&tenant("t"), id, 0, true);
    check_pattern(&soon(stream.next()).await.unwrap().unwrap(), 0, 100);
    for round in 1..50u64 {
        // It waits already, or not yet: both must work.
        if round % 2 == 0 {
            assert!(stream.next().now_or_never().is_none());
        }
        logs.append(id, vec![data(round * 100, 100)]).await.unwrap();
        check_pattern(&soon(stream.next()).await.unwrap().unwrap(), round * 100, round * 100 + 100);
    }
}

/// Rule 5: "SHOULD show it at once".
pub async fn a_reader_sees_a_frame_before_it_is_durable(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 100).await;
    let frames = logs.read(&tenant("t"), id, 0, true).next().now_or_never();
    check_pattern(&frames.expect("at once").unwrap().unwrap(), 0, 100);
}

/// Rule 5.
pub async fn a_reader_that_follows_ends_at_the_seal(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 5000).await;
    let t = tenant("t");
    let early = collect(&logs, &t, id, 0, true);
    let late = async {
        logs.append(id, stretch(5000, 6000, 10)).await.unwrap();
        logs.seal(&tenant("t"), id).await.unwrap();
    };
    let (frames, ()) = soon(futures::future::join(early, late)).await;
    check_pattern(&frames.unwrap(), 0, 6000);
}

/// Rule 5.
pub async fn a_reader_that_does_not_follow_ends(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 5000).await;
    check_pattern(&collect(&logs, &tenant("t"), id, 0, false).await.unwrap(), 0, 5000);
    assert_eq!(collect(&logs, &tenant("t"), attempt(), 0, false).await.unwrap(), []);
}

/// Rules 5 and 9.
pub async fn a_reader_may_come_before_the_log_is_opened(harness: &mut dyn Harness) {
    let (logs, id) = (harness.logs(), attempt());
    let mut stream = logs.read(&tenant("t"), id, 0, true);
    assert!(stream.next().now_or_never().is_none());
    logs.open(&tenant("t"), id, true).await.unwrap();
    assert!(stream.next().now_or_never().is_none());
    logs.append(id, vec![data(0, 10)]).await.unwrap();
    check_pattern(&soon(stream.next()).await.unwrap().unwrap(), 0, 10);
    logs.flush(id).await.unwrap();
    drop((stream, logs));
    harness.reopen().await;
    let logs = harness.logs();
    let mut stream = logs.read(&tenant("t"), id, 0, true);
    check_pattern(&soon(stream.next()).await.unwrap().unwrap(), 0, 10);
    logs.open(&tenant("t"), id, false).await.unwrap();
    logs.append(id, vec![data(10, 10)]).await.unwrap();
    check_pattern(&soon(stream.next()).await.unwrap().unwrap(), 10, 20);
    logs.seal(&tenant("t"), id).await.unwrap();
    assert!(soon(stream.next()).await.is_none());
}

/// Rules 5, 7 and 9.
pub async fn a_reader_may_come_before_a_log_that_is_only_sealed(harness: &mut dyn Harness) {
    let (logs, id) = (harness.logs(), attempt());
    let mut stream = logs.read(&tenant("t"), id, 0, true);
    assert!(stream.next().now_or_never().is_none());
    logs.seal(&tenant("t"), id).await.unwrap();
    assert!(soon(stream.next()).await.is_none());
}

/// Rule 4.
pub async fn many_readers_get_the_same(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 1000).await;
    let end = 200_000;
    let readers = (0..50u64).map(|number| {
        let logs = logs.clone();
        async move {
            let offset = number * 199;
            check_pattern(&collect(&logs, &tenant("t"), id, offset, true).await.unwrap(), offset, end);
        }
    });
    let writer = async {
        for frames in stretch(1000, end, 997).chunks(7) {
            logs.append(id, frames.to_vec()).await.unwrap();
            tokio::task::yield_now().await;
        }
        logs.seal(&tenant("t"), id).await.unwrap();
    };
    soon(futures::future::join(futures::future::join_all(readers), writer)).await;
}

/// Rule 4.
pub async fn a_stalled_reader_does_not_slow_append(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 1000).await;
    let mut stalled: Vec<_> = (0..20).map(|_| logs.read(&tenant("t"), id, 0, true)).collect();
    for stream in &mut stalled {
        check_pattern(&soon(stream.next()).await.unwrap().unwrap()[..1], 0, 700);
    }
    let end = 4_000_000;
    for frames in stretch(1000, end, 60_000).chunks(4) {
        soon(logs.append(id, frames.to_vec())).await.unwrap();
    }
    soon(logs.seal(&tenant("t"), id)).await.unwrap();
    // And what they come back to is all there.
    let mut last = stalled.pop().unwrap();
    let mut next = 0;
    while let Some(batch) = soon(last.next()).await {
        let batch = batch.unwrap();
        let first = batch[0].offset;
        assert!(next == 0 || first == next, "{first} came where {next} was expected");
        next = batch.last().unwrap().end();
        check_pattern(&batch, first, next);
    }
    assert_eq!(next, end);
}

/// Rule 6.
pub async fn seal_is_idempotent(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 5000).await;
    logs.append(id, vec![truncated(5000, 77)]).await.unwrap();
    let expected = LogSummary { end: 5077, dropped: 77 };
    for _ in 0..3 {
        assert_eq!(soon(logs.seal(&tenant("t"), id)).await.unwrap(), expected);
    }
    let tenant = tenant("t");
    let both = futures::future::join(logs.seal(&tenant, id), logs.seal(&tenant, id));
    let (one, other) = soon(both).await;
    assert_eq!((one.unwrap(), other.unwrap()), (expected, expected));
}

/// Rule 6.
pub async fn a_seal_survives_a_restart(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 5000).await;
    let summary = logs.seal(&tenant("t"), id).await.unwrap();
    drop(logs);
    harness.reopen().await;
    let logs = harness.logs();
    check_pattern(&collect(&logs, &tenant("t"), id, 0, true).await.unwrap(), 0, 5000);
    assert_eq!(logs.seal(&tenant("t"), id).await.unwrap(), summary);
    check_pattern(&collect(&logs, &tenant("t"), id, 4999, true).await.unwrap(), 4999, 5000);
}

/// Rules 2 and 6.
pub async fn a_log_can_be_sealed_by_the_next_process(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 5000).await;
    logs.append(id, vec![truncated(5000, 10)]).await.unwrap();
    logs.flush(id).await.unwrap();
    drop(logs);
    harness.reopen().await;
    let logs = harness.logs();
    // Not opened: the source may be gone.
    assert_eq!(logs.seal(&tenant("t"), id).await.unwrap(), LogSummary { end: 5010, dropped: 10 });
    check_pattern(&collect(&logs, &tenant("t"), id, 0, true).await.unwrap(), 0, 5010);
}

/// Rule 6.
pub async fn a_sealed_log_takes_no_more_frames(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 100).await;
    logs.seal(&tenant("t"), id).await.unwrap();
    let error = logs.append(id, vec![data(100, 1)]).await.unwrap_err();
    assert!(matches!(error, LogError::Sealed { attempt } if attempt == id), "{error:?}");
    assert!(matches!(logs.flush(id).await, Err(LogError::Sealed { .. })));
    check_pattern(&collect(&logs, &tenant("t"), id, 0, true).await.unwrap(), 0, 100);
}

/// Rule 8.
pub async fn a_log_that_is_not_open_takes_no_frames(harness: &mut dyn Harness) {
    let (logs, id) = (harness.logs(), attempt());
    assert!(matches!(logs.append(id, vec![data(0, 1)]).await, Err(LogError::Sealed { .. })));
    assert!(matches!(logs.flush(id).await, Err(LogError::Sealed { .. })));
    // Nor does a reader make it open.
    let mut stream = logs.read(&tenant("t"), id, 0, true);
    assert!(stream.next().now_or_never().is_none());
    assert!(matches!(logs.append(id, vec![data(0, 1)]).await, Err(LogError::Sealed { .. })));
    assert!(matches!(logs.flush(id).await, Err(LogError::Sealed { .. })));
}

/// Rule 6.
pub async fn opening_a_sealed_log_answers_its_end(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 100).await;
    logs.seal(&tenant("t"), id).await.unwrap();
    assert_eq!(logs.open(&tenant("t"), id, false).await.unwrap(), 100);
    assert!(matches!(logs.append(id, vec![data(100, 1)]).await, Err(LogError::Sealed { .. })));
    drop(logs);
    harness.reopen().await;
    assert_eq!(harness.logs().open(&tenant("t"), id, false).await.unwrap(), 100);
    assert!(matches!(harness.logs().append(id, vec![data(100, 1)]).await, Err(LogError::Sealed { .. })));
}

/// "Or finds it open".
pub async fn opening_twice_finds_it_open(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 100).await;
    assert!(logs.open(&tenant("t"), id, false).await.unwrap() <= 100);
    logs.append(id, vec![data(100, 100)]).await.unwrap();
    logs.flush(id).await.unwrap();
    assert_eq!(logs.open(&tenant("t"), id, true).await.unwrap(), 200);
    check_pattern(&collect(&logs, &tenant("t"), id, 0, false).await.unwrap(), 0, 200);
}

/// Rule 7.
pub async fn an_empty_log_reads_as_empty(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 0).await;
    assert_eq!(collect(&logs, &tenant("t"), id, 0, false).await.unwrap(), []);
    assert_eq!(logs.flush(id).await.unwrap(), 0);
    assert_eq!(logs.seal(&tenant("t"), id).await.unwrap(), LogSummary::default());
    assert_eq!(collect(&logs, &tenant("t"), id, 0, true).await.unwrap(), []);
    drop(logs);
    harness.reopen().await;
    assert_eq!(collect(&harness.logs(), &tenant("t"), id, 0, true).await.unwrap(), []);
}

/// Rule 7.
pub async fn a_log_that_was_never_opened_reads_as_empty_once_sealed(harness: &mut dyn Harness) {
    let (logs, id) = (harness.logs(), attempt());
    assert_eq!(logs.seal(&tenant("t"), id).await.unwrap(), LogSummary::default());
    assert_eq!(collect(&logs, &tenant("t"), id, 0, true).await.unwrap(), []);
    assert_eq!(logs.open(&tenant("t"), id, false).await.unwrap(), 0);
    assert!(matches!(logs.append(id, vec![data(0, 1)]).await, Err(LogError::Sealed { .. })));
}

/// Stream.3 of the service's contract.
pub async fn dropped_bytes_are_counted_and_keep_their_offsets(harness: &mut dyn Harness) {
    let (logs, id) = (harness.logs(), attempt());
    logs.open(&tenant("t"), id, true).await.unwrap();
    let huge = 1 << 60;
    logs.append(id, vec![data(0, 10), truncated(10, huge)]).await.unwrap();
    logs.flush(id).await.unwrap();
    logs.append(id, vec![data(10 + huge, 5), truncated(15 + huge, 3)]).await.unwrap();
    // Sent again from within the dropped stretch.
    logs.append(id, vec![truncated(500, huge - 490), data(10 + huge, 5)]).await.unwrap();
    let summary = LogSummary { end: 18 + huge, dropped: huge + 3 };
    assert_eq!(logs.seal(&tenant("t"), id).await.unwrap(), summary);
    let frames = collect(&logs, &tenant("t"), id, 1 << 59, true).await.unwrap();
    check_pattern(&frames, 1 << 59, 18 + huge);
    assert_eq!(frames[0].span(), 10 + huge - (1 << 59));
}

/// Stream.2 of the service's contract.
pub async fn streams_times_and_reasons_come_back(harness: &mut dyn Harness) {
    let (logs, id) = (harness.logs(), attempt());
    logs.open(&tenant("t"), id, true).await.unwrap();
    let mut source = Vec::new();
    let mut offset = 0;
    for (number, stream) in
        [LogStream::Stdout, LogStream::Stderr, LogStream::Terminal, LogStream::Stderr].into_iter().enumerate()
    {
        let mut data = frame(offset, FrameBody::Data { stream, bytes: pattern(offset, 10 + number) });
        data.time = Timestamp::from_micros(number as i64 - 1);
        offset = data.end();
        source.push(data);
    }
    source.push(frame(offset, FrameBody::Truncated { dropped: 9, reason: "grün".to_owned() }));
    logs.append(id, source.clone()).await.unwrap();
    logs.seal(&tenant("t"), id).await.unwrap();
    drop(logs);
    harness.reopen().await;
    assert_eq!(collect(&harness.logs(), &tenant("t"), id, 0, true).await.unwrap(), source);
}

/// Rules 3 and 5: a program that writes byte by byte.
pub async fn many_small_frames_come_back(harness: &mut dyn Harness) {
    let (logs, id) = (harness.logs(), attempt());
    logs.open(&tenant("t"), id, true).await.unwrap();
    for frames in stretch(0, 20_000, 1).chunks(1000) {
        soon(logs.append(id, frames.to_vec())).await.unwrap();
    }
    check_pattern(&collect(&logs, &tenant("t"), id, 0, false).await.unwrap(), 0, 20_000);
    soon(logs.seal(&tenant("t"), id)).await.unwrap();
    check_pattern(&collect(&logs, &tenant("t"), id, 3, true).await.unwrap(), 3, 20_000);
}

/// "Removes a run's logs."
pub async fn deleting_a_run_removes_its_logs_and_no_other(harness: &mut dyn Harness) {
    let (logs, kept) = filled(harness, 100).await;
    let gone = attempt();
    for number in 1..=3 {
        let id = AttemptId { run: gone.run, number };
        logs.open(&tenant("t"), id, true).await.unwrap();
        logs.append(id, stretch(0, 5000, 100)).await.unwrap();
        if number == 2 {
            logs.flush(id).await.unwrap();
        } else if number == 3 {
            logs.seal(&tenant("t"), id).await.unwrap();
        }
    }
    logs.delete(&tenant("t"), gone.run).await.unwrap();
    logs.delete(&tenant("t"), gone.run).await.unwrap();
    logs.delete(&tenant("t"), RunId::new(*attempt().run.as_uuid())).await.unwrap();
    for number in 1..=3 {
        let id = AttemptId { run: gone.run, number };
        assert_eq!(collect(&logs, &tenant("t"), id, 0, false).await.unwrap(), [], "attempt {number}");
        assert!(matches!(logs.append(id, vec![data(5000, 1)]).await, Err(LogError::Sealed { .. })));
        assert_eq!(logs.open(&tenant("t"), id, false).await.unwrap(), 0);
    }
    logs.append(kept, vec![data(100, 100)]).await.unwrap();
    check_pattern(&collect(&logs, &tenant("t"), kept, 0, false).await.unwrap(), 0, 200);
}

/// A reader of what is removed does not wait for ever.
pub async fn deleting_a_run_ends_its_readers(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 100).await;
    let mut stream = logs.read(&tenant("t"), id, 0, true);
    check_pattern(&soon(stream.next()).await.unwrap().unwrap(), 0, 100);
    assert!(stream.next().now_or_never().is_none());
    logs.delete(&tenant("t"), id.run).await.unwrap();
    assert!(soon(stream.next()).await.is_none());
}

/// Tenants are apart, also where an id is guessed.
pub async fn another_tenant_reads_nothing(harness: &mut dyn Harness) {
    let (logs, id) = filled(harness, 100).await;
    logs.flush(id).await.unwrap();
    assert_eq!(collect(&logs, &tenant("other"), id, 0, false).await.unwrap(), []);
    assert!(logs.read(&tenant("other"), id, 0, true).next().now_or_never().is_none());
    logs.delete(&tenant("other"), id.run).await.unwrap();
    check_pattern(&collect(&logs, &tenant("t"), id, 0, false).await.unwrap(), 0, 100);
    logs.seal(&tenant("t"), id).await.unwrap();
    assert_eq!(collect(&logs, &tenant("other"), id, 0, false).await.unwrap(), []);
}

/// "Each attempt keeps its own log."
pub async fn attempts_share_nothing(harness: &mut dyn Harness) {
    let (logs, first) = filled(harness, 100).await;
    let second = AttemptId { run: first.run, number: 2 };
    let eleventh = AttemptId { run: first.run, number: 11 };
    for (id, end) in [(second, 200), (eleventh, 300)] {
        assert_eq!(logs.open(&tenant("t"), id, true).await.unwrap(), 0);
        logs.append(id, stretch(0, end, 50)).await.unwrap();
    }
    for (id, end) in [(first, 100), (second, 200), (eleventh, 300)] {
        assert_eq!(logs.seal(&tenant("t"), id).await.unwrap().end, end);
        let frames: Vec<Frame> = collect(&logs, &tenant("t"), id, 0, true).await.unwrap();
        check_pattern(&frames, 0, end);
    }
}
