//! A long log on a real disk. Alone in its program, because it looks at the memory of the whole process.

use std::sync::Arc;

use futures::StreamExt as _;
use runner_artifacts::{
    directory::DirectoryArtifacts,
    log::{Options, SegmentedLogs},
};
use runner_core::{clock::SystemClock, log::LogStore};
use runner_tests::log::{attempt, check_pattern, soon, stretch, tenant};

/// A figure of `/proc/self/status`, in bytes.
fn memory(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("the process's status");
    let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a figure");
    line.trim_matches(|c: char| !c.is_ascii_digit()).parse::<u64>().expect("a number") * 1024
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_megabytes_pass_through_little_memory_and_resume_in_the_middle() {
    const END: u64 = 200_000_000;
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(DirectoryArtifacts::open(directory.path()).unwrap());
    let logs = Arc::new(SegmentedLogs::new(store, Arc::new(SystemClock::new()), Options::default()));
    let (t, id) = (tenant("t"), attempt());
    let before = memory("VmRSS:");

    logs.open(&t, id, true).await.unwrap();
    // One that reads along, and one that reads once and then never again.
    let mut stalled = logs.read(&t, id, 0, true);
    let mut live = logs.read(&t, id, 0, true);
    let reading = async {
        let mut next = 0;
        while let Some(batch) = soon(live.next()).await {
            let batch = batch.unwrap();
            let end = batch.last().unwrap().end();
            check_pattern(&batch, next, end);
            next = end;
        }
        assert_eq!(next, END);
    };
    let writing = async {
        let mut offset = 0;
        while offset < END {
            let end = (offset + 1_000_000).min(END);
            soon(logs.append(id, stretch(offset, end, 64 * 1024))).await.unwrap();
            if offset == 0 {
                soon(stalled.next()).await.unwrap().unwrap();
            }
            offset = end;
        }
        assert_eq!(soon(logs.seal(&t, id)).await.unwrap().end, END);
    };
    futures::future::join(reading, writing).await;

    for from in [0, 100_000_001, END - 1] {
        let mut stream = logs.read(&t, id, from, true);
        let mut next = from;
        while let Some(batch) = soon(stream.next()).await {
            let batch = batch.unwrap();
            let end = batch.last().unwrap().end();
            check_pattern(&batch, next, end);
            next = end;
        }
        assert_eq!(next, END);
    }

    let grown = memory("VmHWM:").saturating_sub(before);
    assert!(grown < 80_000_000, "memory grew by {grown} bytes");
}
