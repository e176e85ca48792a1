//! How fast frames go through: source → store → watchers. For `cargo xtask bench`; not a test.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt as _;
use runner_core::{
    clock::{Clock, SystemClock},
    log::{Frame, FrameBody, LogError, LogStore, LogStream},
    task::{TaskKind, spawn},
};

use super::{attempt, frame, tenant};

/// What [`throughput`] measured.
#[derive(Debug, Clone, Copy)]
pub struct Throughput {
    /// Bytes that were appended; each reader got as many.
    pub bytes: u64,
    /// From the first append until the last reader had everything and the log was sealed.
    pub elapsed: Duration,
    /// Of this, until the last append and the flush after it returned.
    pub appended: Duration,
}

impl Throughput {
    /// Bytes per second from the source to the last reader.
    pub fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.elapsed.as_secs_f64()
    }
}

/// Appends `total` bytes in frames of `frame_bytes`, eight at a time, with `readers` live readers, and seals the log.
///
/// # Errors
/// The log store's own.
pub async fn throughput(
    logs: Arc<dyn LogStore>,
    total: u64,
    frame_bytes: usize,
    readers: usize,
) -> Result<Throughput, LogError> {
    let (clock, t, id) = (SystemClock::new(), tenant("bench"), attempt());
    logs.open(&t, id, true).await?;
    let watchers: Vec<_> = (0..readers)
        .map(|_| {
            let mut stream = logs.read(&t, id, 0, true);
            spawn(TaskKind::Helper, "bench-reader", async move {
                let mut seen = 0;
                while let Some(batch) = stream.next().await {
                    seen += batch?.iter().map(Frame::span).sum::<u64>();
                }
                Ok::<_, LogError>(seen)
            })
        })
        .collect();
    let payload = Bytes::from(vec![b'x'; frame_bytes]);
    let start = clock.monotonic();
    let mut offset = 0;
    while offset < total {
        let mut batch = Vec::with_capacity(8);
        for _ in 0..8 {
            let data = FrameBody::Data { stream: LogStream::Stdout, bytes: payload.clone() };
            batch.push(frame(offset, data));
            offset += frame_bytes as u64;
        }
        logs.append(id, batch).await?;
    }
    logs.flush(id).await?;
    let appended = clock.monotonic().saturating_sub(start);
    logs.seal(&t, id).await?;
    for watcher in watchers {
        // A watcher that panicked has seen nothing; the caller sees that by the figure being absurd, and the log says why.
        if let Ok(Some(seen)) = watcher.await {
            assert_eq!(seen?, offset, "a reader got other bytes than were appended");
        }
    }
    Ok(Throughput { bytes: offset, elapsed: clock.monotonic().saturating_sub(start), appended })
}
