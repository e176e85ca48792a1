//! What logs cost: memory, object-store operations, objects.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt as _, StreamExt as _};
use runner_artifacts::log::{LogUsage, Options, SegmentedLogs};
use runner_core::{
    clock::SystemClock,
    log::{LogStore, LogSummary},
};
use runner_tests::log::{
    attempt, check_pattern, collect, data, soon,
    store::{Counts, FaultyStore},
    stretch, tenant, until,
};

const QUIET: Duration = Duration::from_secs(3600);
const NOTHING: LogUsage = LogUsage { logs: 0, pending_bytes: 0, recent_bytes: 0 };

fn logs_over(store: &Arc<FaultyStore>, options: Options) -> Arc<SegmentedLogs> {
    Arc::new(SegmentedLogs::new(store.clone(), Arc::new(SystemClock::new()), options))
}

fn dynamic(logs: &Arc<SegmentedLogs>) -> Arc<dyn LogStore> {
    logs.clone()
}

#[tokio::test]
async fn a_small_fresh_log_costs_one_write_and_one_read() {
    let store = FaultyStore::new();
    let logs = logs_over(&store, Options { flush_after: QUIET, ..Options::default() });
    for end in [0, 1, 40_000] {
        let id = attempt();
        store.reset_counts();
        logs.open(&tenant("t"), id, true).await.unwrap();
        logs.append(id, stretch(0, end, 1000)).await.unwrap();
        logs.seal(&tenant("t"), id).await.unwrap();
        assert_eq!(store.counts(), Counts { puts: 1, ..Counts::default() }, "{end} bytes");
        check_pattern(&collect(&dynamic(&logs), &tenant("t"), id, 0, true).await.unwrap(), 0, end);
        let counts = store.counts();
        assert_eq!((counts.puts, counts.gets, counts.lists, counts.heads), (1, 1, 0, 0), "{end} bytes");
    }
    assert_eq!(logs.usage(), NOTHING);
}

#[tokio::test]
async fn an_empty_log_costs_nothing_where_it_may() {
    let store = FaultyStore::new();
    let logs = logs_over(&store, Options { store_empty: false, ..Options::default() });
    let id = attempt();
    logs.open(&tenant("t"), id, true).await.unwrap();
    assert_eq!(logs.seal(&tenant("t"), id).await.unwrap(), LogSummary::default());
    assert_eq!(store.counts(), Counts::default());
    assert_eq!(collect(&dynamic(&logs), &tenant("t"), id, 0, true).await.unwrap(), []);
    assert_eq!(logs.open(&tenant("t"), id, false).await.unwrap(), 0);
    logs.append(id, vec![data(0, 1)]).await.unwrap_err();
    assert_eq!(store.counts(), Counts::default());
    // In the next process, the caller must know that the run has ended.
    let logs = logs_over(&store, Options { store_empty: false, ..Options::default() });
    assert_eq!(collect(&dynamic(&logs), &tenant("t"), id, 0, false).await.unwrap(), []);
    assert_eq!(logs.seal(&tenant("t"), id).await.unwrap(), LogSummary::default());
    assert_eq!(logs.usage(), NOTHING);
}

#[tokio::test]
async fn frames_become_durable_by_age_alone() {
    let store = FaultyStore::new();
    let logs = logs_over(&store, Options { flush_after: Duration::from_millis(20), ..Options::default() });
    let id = attempt();
    logs.open(&tenant("t"), id, true).await.unwrap();
    for round in 0..3 {
        logs.append(id, vec![data(round * 100, 100)]).await.unwrap();
        until("the frame is stored", || {
            store.names().iter().any(|name| name.ends_with(&format!("{:020}.seg", (round + 1) * 100)))
        })
        .await;
    }
    assert_eq!(logs.append(id, Vec::new()).await.unwrap(), 300);
}

#[tokio::test]
async fn many_small_flushes_leave_few_objects() {
    let store = FaultyStore::new();
    let logs = logs_over(&store, Options { flush_after: QUIET, ..Options::default() });
    let id = attempt();
    logs.open(&tenant("t"), id, true).await.unwrap();
    for round in 0..1000 {
        logs.append(id, vec![data(round * 200, 200)]).await.unwrap();
        logs.flush(id).await.unwrap();
    }
    assert!(store.names().len() <= 8, "{:?}", store.names());
    check_pattern(&collect(&dynamic(&logs), &tenant("t"), id, 77, false).await.unwrap(), 77, 200_000);
    logs.seal(&tenant("t"), id).await.unwrap();
    assert_eq!(store.names().len(), 1, "{:?}", store.names());
    check_pattern(&collect(&dynamic(&logs), &tenant("t"), id, 77, true).await.unwrap(), 77, 200_000);
}

#[tokio::test]
async fn append_waits_while_two_segments_wait() {
    let store = FaultyStore::new();
    let segment = 100_000;
    let logs =
        logs_over(&store, Options { segment_bytes: segment, flush_after: QUIET, ..Options::default() });
    let id = attempt();
    logs.open(&tenant("t"), id, true).await.unwrap();
    store.hold(true);
    let mut taken = 0;
    let mut frames = stretch(0, 2_000_000, 10_000).into_iter();
    loop {
        let frame = frames.next().expect("append never waited");
        match logs.append(id, vec![frame.clone()]).now_or_never() {
            Some(result) => {
                result.unwrap();
                taken = frame.end();
                tokio::task::yield_now().await;
            }
            None => break,
        }
    }
    assert!((2 * segment as u64..3 * segment as u64).contains(&taken), "{taken}");
    assert!(logs.usage().pending_bytes < 3 * segment, "{:?}", logs.usage());
    // What was dropped while it waited was not added, and is sent again.
    store.hold(false);
    logs.append(id, stretch(taken, 2_000_000, 10_000)).await.unwrap();
    logs.seal(&tenant("t"), id).await.unwrap();
    check_pattern(&collect(&dynamic(&logs), &tenant("t"), id, 0, true).await.unwrap(), 0, 2_000_000);
    until("everything is given back", || logs.usage() == NOTHING).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_logs_together_keep_the_memory_that_they_are_given() {
    let store = FaultyStore::new();
    let memory = 400_000;
    let options = Options { memory_bytes: memory, flush_after: Duration::from_secs(5), ..Options::default() };
    let logs = logs_over(&store, options);
    let ids: Vec<_> = (0..100).map(|_| attempt()).collect();
    let writers = ids.iter().map(|id| {
        let logs = logs.clone();
        async move {
            logs.open(&tenant("t"), *id, true).await.unwrap();
            for frames in stretch(0, 60_000, 3000).chunks(2) {
                logs.append(*id, frames.to_vec()).await.unwrap();
                let usage = logs.usage();
                assert!(usage.pending_bytes <= memory / 2, "{usage:?}");
                // The piece that was just stored is trimmed after it is counted.
                assert!(usage.recent_bytes <= memory, "{usage:?}");
            }
        }
    });
    soon(futures::future::join_all(writers)).await;
    for id in ids {
        check_pattern(&collect(&dynamic(&logs), &tenant("t"), id, 0, false).await.unwrap(), 0, 60_000);
        logs.seal(&tenant("t"), id).await.unwrap();
    }
    until("everything is given back", || logs.usage() == NOTHING).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_stalled_readers_cost_neither_memory_nor_speed() {
    let store = FaultyStore::new();
    let options = Options {
        segment_bytes: 200_000,
        window_bytes: 300_000,
        memory_bytes: 2_000_000,
        ..Options::default()
    };
    let logs = logs_over(&store, options);
    let (t, id) = (tenant("t"), attempt());
    logs.open(&t, id, true).await.unwrap();
    logs.append(id, stretch(0, 1000, 100)).await.unwrap();
    let mut stalled: Vec<_> = (0..100).map(|_| logs.read(&t, id, 0, true)).collect();
    for stream in &mut stalled {
        soon(stream.next()).await.unwrap().unwrap();
    }
    let end = 20_000_000;
    let all = dynamic(&logs);
    let fast = collect(&all, &t, id, 0, true).map(|frames| check_pattern(&frames.unwrap(), 0, end));
    let writer = async {
        for frames in stretch(1000, end, 50_000).chunks(4) {
            logs.append(id, frames.to_vec()).await.unwrap();
            let usage = logs.usage();
            assert!(usage.pending_bytes + usage.recent_bytes <= 2_000_000, "{usage:?}");
        }
        logs.seal(&t, id).await.unwrap();
    };
    soon(futures::future::join(fast, writer)).await;
    drop(all);
    let mut last = stalled.pop().unwrap();
    let mut next = 1000;
    while let Some(batch) = soon(last.next()).await {
        let batch = batch.unwrap();
        assert_eq!(batch[0].offset, next);
        next = batch.last().unwrap().end();
    }
    assert_eq!(next, end);
    drop((stalled, last));
    until("everything is given back", || logs.usage() == NOTHING).await;
}

#[tokio::test]
async fn a_cursor_in_the_middle_of_a_long_log_reads_little() {
    let store = FaultyStore::new();
    let logs = logs_over(&store, Options { flush_after: QUIET, ..Options::default() });
    let (t, id) = (tenant("t"), attempt());
    logs.open(&t, id, true).await.unwrap();
    let end = 60_000_000;
    for frames in stretch(0, end, 60_000).chunks(50) {
        logs.append(id, frames.to_vec()).await.unwrap();
    }
    logs.seal(&t, id).await.unwrap();
    assert_eq!(store.names().len(), 2, "{:?}", store.names());
    store.reset_counts();
    let from = 31_234_567;
    let first = soon(logs.read(&t, id, from, true).next()).await.unwrap().unwrap();
    check_pattern(&first, from, first.last().unwrap().end());
    let counts = store.counts();
    assert!(counts.bytes_read < 1_500_000, "{counts:?}");
    assert_eq!((counts.gets, counts.lists, counts.heads), (2, 0, 0));
    let mut stream = logs.read(&t, id, from, true);
    let mut next = from;
    while let Some(batch) = soon(stream.next()).await {
        let batch = batch.unwrap();
        let stop = batch.last().unwrap().end();
        check_pattern(&batch, next, stop);
        next = stop;
    }
    assert_eq!(next, end);
}

#[tokio::test]
async fn nothing_grows_with_finished_logs_or_readers_that_left() {
    let store = FaultyStore::new();
    let logs = logs_over(&store, Options::default());
    let t = tenant("t");
    for round in 0..300 {
        let id = attempt();
        let waiting = logs.read(&t, id, 0, true).next().now_or_never();
        assert!(waiting.is_none());
        logs.open(&t, id, true).await.unwrap();
        logs.append(id, vec![data(0, 100)]).await.unwrap();
        if round % 3 == 0 {
            logs.flush(id).await.unwrap();
        }
        logs.seal(&t, id).await.unwrap();
        collect(&dynamic(&logs), &t, id, 0, true).await.unwrap();
        assert!(logs.read(&t, attempt(), 0, true).next().now_or_never().is_none());
        assert_eq!(logs.usage().logs, 0, "in round {round}");
    }
    until("everything is given back", || logs.usage() == NOTHING).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_idle_readers_wake_up_and_end() {
    let store = FaultyStore::new();
    let logs = logs_over(&store, Options::default());
    let (t, id) = (tenant("t"), attempt());
    logs.open(&t, id, true).await.unwrap();
    let mut readers: Vec<_> = (0..10_000).map(|_| logs.read(&t, id, 0, true)).collect();
    for reader in &mut readers {
        assert!(reader.next().now_or_never().is_none());
    }
    // One log, whoever waits for it; and nobody asked the object store.
    assert_eq!((logs.usage().logs, store.counts()), (1, Counts::default()));
    logs.append(id, vec![data(0, 1000)]).await.unwrap();
    for reader in &mut readers {
        check_pattern(&soon(reader.next()).await.unwrap().unwrap(), 0, 1000);
    }
    logs.seal(&t, id).await.unwrap();
    for reader in &mut readers {
        assert!(soon(reader.next()).await.is_none());
    }
}
