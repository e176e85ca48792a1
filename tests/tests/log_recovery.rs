//! What a crash, a failing store and damaged objects do to a log: nothing that is silent.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt as _, StreamExt as _};
use runner_artifacts::log::{Options, SegmentedLogs};
use runner_core::{
    artifact::ArtifactErrorKind,
    clock::SystemClock,
    id::AttemptId,
    log::{LogError, LogStore, LogSummary},
};
use runner_tests::log::{attempt, check_pattern, collect, data, soon, store::FaultyStore, stretch, tenant};

/// No timer: what is stored is stored because the test made it so.
fn options() -> Options {
    Options {
        segment_bytes: 100_000,
        flush_after: Duration::from_secs(3600),
        index_stride: 10_000,
        ..Options::default()
    }
}

fn logs_over(store: &Arc<FaultyStore>) -> Arc<dyn LogStore> {
    Arc::new(SegmentedLogs::new(store.clone(), Arc::new(SystemClock::new()), options()))
}

/// A log of some segments that are too large to be merged, and something that is not stored.
async fn segmented(store: &Arc<FaultyStore>, id: AttemptId, end: u64) -> Arc<dyn LogStore> {
    let logs = logs_over(store);
    logs.open(&tenant("t"), id, true).await.unwrap();
    for frames in stretch(0, end, 10_000).chunks(20) {
        logs.append(id, frames.to_vec()).await.unwrap();
        soon(logs.flush(id)).await.unwrap();
    }
    logs
}

fn objects(store: &FaultyStore) -> Vec<String> {
    store.names().iter().filter_map(|name| name.rsplit('/').next().map(str::to_owned)).collect()
}

#[tokio::test]
async fn a_crash_between_any_two_steps_of_the_seal_loses_nothing() {
    const END: u64 = 900_000;
    let mut steps = 0;
    for after in 0..40 {
        let (store, id) = (FaultyStore::new(), attempt());
        let logs = segmented(&store, id, END).await;
        store.die_after(after);
        let outcome = soon(logs.seal(&tenant("t"), id)).await;
        let died = store.is_dead();
        drop(logs);
        store.revive();

        // Somebody reads before anybody recovers it.
        let logs = logs_over(&store);
        let frames = collect(&logs, &tenant("t"), id, 12_345, false).await.unwrap();
        check_pattern(&frames, 12_345, END);
        drop(logs);

        let logs = logs_over(&store);
        assert_eq!(soon(logs.open(&tenant("t"), id, false)).await.unwrap(), END, "after {after} steps");
        let summary = soon(logs.seal(&tenant("t"), id)).await.unwrap();
        assert_eq!(summary, LogSummary { end: END, dropped: 0 });
        check_pattern(&collect(&logs, &tenant("t"), id, 0, true).await.unwrap(), 0, END);
        assert_eq!(objects(&store), ["full.log", "seal"], "after {after} steps");
        if !died {
            assert_eq!(outcome.unwrap(), summary);
            break;
        }
        steps += 1;
    }
    // The joined object, the seal, and the segments that go.
    assert!(steps >= 6, "{steps}");
}

#[tokio::test]
async fn a_crash_between_any_two_steps_of_a_merge_loses_nothing_that_was_durable() {
    for after in 0..12 {
        let (store, id) = (FaultyStore::new(), attempt());
        let logs = logs_over(&store);
        logs.open(&tenant("t"), id, true).await.unwrap();
        store.die_after(after);
        let mut durable = 0;
        for round in 0..5 {
            logs.append(id, vec![data(round * 100, 100)]).await.unwrap();
            match soon(logs.flush(id)).await {
                Ok(offset) => durable = offset,
                Err(_) => break,
            }
        }
        drop(logs);
        store.revive();
        let logs = logs_over(&store);
        let found = logs.open(&tenant("t"), id, false).await.unwrap();
        assert!(found >= durable, "after {after} steps: {durable} was durable, {found} was found");
        check_pattern(&collect(&logs, &tenant("t"), id, 0, false).await.unwrap(), 0, found);
        logs.append(id, stretch(found, 1000, 30)).await.unwrap();
        assert_eq!(soon(logs.seal(&tenant("t"), id)).await.unwrap().end, 1000);
        check_pattern(&collect(&logs, &tenant("t"), id, 0, true).await.unwrap(), 0, 1000);
        assert_eq!(objects(&store), ["seal"], "after {after} steps");
    }
}

#[tokio::test]
async fn a_shorter_segment_that_arrives_late_does_no_harm() {
    let (store, id) = (FaultyStore::new(), attempt());
    let logs = segmented(&store, id, 400_000).await;
    let first = store.names()[0].clone();
    let (key, whole) = store.steal(first.rsplit('/').next().unwrap());
    store.plant(key.clone(), whole.clone());
    // The frames of its first 20,000 bytes, as a request of a process that died would store them.
    let (stem, _) = key.as_str().rsplit_once('-').unwrap();
    let late = format!("{stem}-{:020}.seg", 20_000);
    store.plant(late.parse().unwrap(), whole.slice(..2 * (10_000 + 25)));
    drop(logs);
    let logs = logs_over(&store);
    check_pattern(&collect(&logs, &tenant("t"), id, 0, false).await.unwrap(), 0, 400_000);
    assert_eq!(logs.open(&tenant("t"), id, false).await.unwrap(), 400_000);
    logs.seal(&tenant("t"), id).await.unwrap();
    check_pattern(&collect(&logs, &tenant("t"), id, 0, true).await.unwrap(), 0, 400_000);
    assert_eq!(objects(&store), ["full.log", "seal"]);
}

#[tokio::test]
async fn a_missing_segment_is_named_and_not_read_over() {
    let (store, id) = (FaultyStore::new(), attempt());
    let logs = segmented(&store, id, 600_000).await;
    let names = objects(&store);
    assert!(names.len() >= 3, "{names:?}");
    drop(logs);
    store.steal(&names[1]);
    let logs = logs_over(&store);
    assert!(matches!(logs.open(&tenant("t"), id, false).await, Err(LogError::Corrupt { .. })));
    assert!(matches!(logs.seal(&tenant("t"), id).await, Err(LogError::Corrupt { .. })));
    assert!(matches!(collect(&logs, &tenant("t"), id, 0, true).await, Err(LogError::Corrupt { .. })));
}

#[tokio::test]
async fn damage_is_answered_as_such_and_never_as_other_bytes() {
    for at in [0, 5, 30, 15_000, 99_000] {
        let (store, id) = (FaultyStore::new(), attempt());
        let logs = segmented(&store, id, 300_000).await;
        let first = objects(&store)[0].clone();
        store.tamper(&first, |bytes| bytes[at] ^= 1);
        drop(logs);
        let logs = logs_over(&store);
        // Neither read nor sealed as if nothing were wrong.
        let error = collect(&logs, &tenant("t"), id, 0, false).await.unwrap_err();
        assert!(matches!(error, LogError::Corrupt { .. }), "{error:?}");
        let error = soon(logs.seal(&tenant("t"), id)).await.unwrap_err();
        assert!(matches!(error, LogError::Corrupt { .. }), "{error:?}");
        assert!(!objects(&store).contains(&"seal".to_owned()));
    }
}

#[tokio::test]
async fn a_damaged_seal_or_joined_log_is_answered_as_such() {
    for (object, at) in [("seal", 0), ("seal", 9), ("seal", 20), ("full.log", 0), ("full.log", 100_000)] {
        let (store, id) = (FaultyStore::new(), attempt());
        let logs = segmented(&store, id, 600_000).await;
        logs.seal(&tenant("t"), id).await.unwrap();
        store.tamper(object, |bytes| bytes[at] ^= 1);
        let error = collect(&logs, &tenant("t"), id, 0, true).await.unwrap_err();
        assert!(matches!(error, LogError::Corrupt { .. }), "{object} {at}: {error:?}");
        store.tamper(object, |bytes| bytes.truncate(at));
        let error = collect(&logs, &tenant("t"), id, 0, true).await.unwrap_err();
        assert!(matches!(error, LogError::Corrupt { .. }), "{object} cut at {at}: {error:?}");
    }
}

#[tokio::test]
async fn a_store_that_is_down_for_a_while_costs_time_and_no_byte() {
    for kind in [ArtifactErrorKind::Unavailable, ArtifactErrorKind::Full] {
        let (store, id) = (FaultyStore::new(), attempt());
        let logs = segmented(&store, id, 100_000).await;
        store.set_down(Some(kind));
        let end = 2_000_000;
        let (t, appended) = (tenant("t"), stretch(100_000, end, 10_000));
        let mut reader = logs.read(&t, id, 100_000, true);
        let writer = async {
            for frames in appended.chunks(3) {
                logs.append(id, frames.to_vec()).await.unwrap();
            }
            logs.seal(&t, id).await.unwrap()
        };
        let mut writer = std::pin::pin!(writer);
        // It takes what memory allows, shows that to readers, and then waits.
        assert!(tokio::time::timeout(Duration::from_millis(50), &mut writer).await.is_err());
        check_pattern(&soon(reader.next()).await.unwrap().unwrap()[..1], 100_000, 110_000);
        store.set_down(None);
        assert_eq!(soon(writer).await.end, end);
        drop(reader);
        check_pattern(&collect(&logs, &t, id, 0, true).await.unwrap(), 0, end);
    }
}

#[tokio::test]
async fn a_store_that_refuses_is_answered_and_nothing_is_lost() {
    let (store, id) = (FaultyStore::new(), attempt());
    let logs = segmented(&store, id, 100_000).await;
    store.set_down(Some(ArtifactErrorKind::Denied));
    logs.append(id, stretch(100_000, 150_000, 10_000)).await.unwrap();
    for _ in 0..2 {
        let error = soon(logs.flush(id)).await.unwrap_err();
        assert!(
            matches!(&error, LogError::Store { source, .. } if source.kind == ArtifactErrorKind::Denied),
            "{error:?}"
        );
    }
    // An append that must wait for room is told too.
    let mut refused = None;
    for frames in stretch(150_000, 900_000, 10_000).chunks(1) {
        if let Err(error) = soon(logs.append(id, frames.to_vec())).await {
            refused = Some(error);
            break;
        }
    }
    assert!(matches!(refused, Some(LogError::Store { .. })), "{refused:?}");
    store.set_down(None);
    logs.append(id, stretch(100_000, 900_000, 10_000)).await.unwrap();
    assert_eq!(soon(logs.seal(&tenant("t"), id)).await.unwrap().end, 900_000);
    check_pattern(&collect(&logs, &tenant("t"), id, 0, true).await.unwrap(), 0, 900_000);
}

#[tokio::test]
async fn a_seal_that_was_dropped_half_way_goes_on() {
    let (store, id) = (FaultyStore::new(), attempt());
    let logs = segmented(&store, id, 500_000).await;
    store.hold(true);
    let t = tenant("t");
    let mut half = logs.seal(&t, id);
    assert!(half.as_mut().now_or_never().is_none());
    drop(half);
    assert!(matches!(logs.append(id, vec![data(500_000, 1)]).await, Err(LogError::Sealed { .. })));
    store.hold(false);
    assert_eq!(soon(logs.seal(&t, id)).await.unwrap().end, 500_000);
    check_pattern(&collect(&logs, &t, id, 0, true).await.unwrap(), 0, 500_000);
}

#[tokio::test]
async fn a_reader_in_the_middle_of_a_segment_survives_the_join() {
    let (store, id) = (FaultyStore::new(), attempt());
    let logs = segmented(&store, id, 2_000_000).await;
    drop(logs);
    let logs = logs_over(&store);
    let t = tenant("t");
    // One that saw the log open elsewhere, one that came while it was open here.
    let mut early = logs.read(&t, id, 0, true);
    let mut next = soon(early.next()).await.unwrap().unwrap().last().unwrap().end();
    logs.open(&t, id, false).await.unwrap();
    let mut later = logs.read(&t, id, 0, true);
    let mut later_next = soon(later.next()).await.unwrap().unwrap().last().unwrap().end();
    logs.seal(&t, id).await.unwrap();
    for (stream, next) in [(&mut early, &mut next), (&mut later, &mut later_next)] {
        while let Some(batch) = soon(stream.next()).await {
            let batch = batch.unwrap();
            let end = batch.last().unwrap().end();
            check_pattern(&batch, *next, end);
            *next = end;
        }
        assert_eq!(*next, 2_000_000);
    }
}

#[tokio::test]
async fn readers_end_with_an_error_when_the_store_is_dropped() {
    let (store, id) = (FaultyStore::new(), attempt());
    let logs = logs_over(&store);
    logs.open(&tenant("t"), id, true).await.unwrap();
    let mut stream = logs.read(&tenant("t"), id, 0, true);
    assert!(stream.next().now_or_never().is_none());
    drop(logs);
    assert!(matches!(soon(stream.next()).await, Some(Err(LogError::Store { .. }))));
    assert!(soon(stream.next()).await.is_none());
}
