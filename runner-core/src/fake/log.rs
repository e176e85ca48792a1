//! [`LogStore`] in memory. It keeps everything, so a test bounds what it appends.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use tokio::sync::Notify;

use crate::{
    id::{AttemptId, RunId, TenantId},
    log::{Frame, FrameBatch, FrameBody, LogError, LogStore, LogSummary},
};

/// Logs that live as long as the value. Everything is durable at once: "the object store" is this value, and a clone of it
/// is another process over the same store.
#[derive(Debug, Clone, Default)]
pub struct MemoryLogs {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    logs: Mutex<BTreeMap<AttemptId, Log>>,
    changed: Notify,
}

#[derive(Debug)]
struct Log {
    tenant: TenantId,
    frames: Vec<Frame>,
    dropped: u64,
    sealed: bool,
}

impl Log {
    fn new(tenant: TenantId) -> Self {
        Self { tenant, frames: Vec::new(), dropped: 0, sealed: false }
    }

    fn end(&self) -> u64 {
        self.frames.last().map_or(0, Frame::end)
    }
}

impl MemoryLogs {
    /// No logs.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the attempt's log is sealed.
    pub fn is_sealed(&self, attempt: AttemptId) -> bool {
        self.lock().get(&attempt).is_some_and(|log| log.sealed)
    }

    /// Every delivered byte of a log so far, of all streams; dropped bytes are left out.
    pub fn contents(&self, attempt: AttemptId) -> Vec<u8> {
        let logs = self.lock();
        let frames = logs.get(&attempt).map(|log| log.frames.as_slice()).unwrap_or_default();
        let data = frames.iter().filter_map(|frame| match &frame.body {
            FrameBody::Data { bytes, .. } => Some(bytes.to_vec()),
            FrameBody::Truncated { .. } => None,
        });
        data.collect::<Vec<_>>().concat()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<AttemptId, Log>> {
        self.shared.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Most frames that a reader gets at once.
const BATCH: usize = 64;

struct Reader {
    shared: Arc<Shared>,
    tenant: TenantId,
    attempt: AttemptId,
    next: u64,
    follow: bool,
    /// It saw the log; where that vanishes, it was removed.
    seen: bool,
}

impl Reader {
    async fn next(&mut self) -> Option<FrameBatch> {
        let shared = self.shared.clone();
        loop {
            let changed = shared.changed.notified();
            {
                let logs = shared.logs.lock().unwrap_or_else(PoisonError::into_inner);
                match logs.get(&self.attempt).filter(|log| log.tenant == self.tenant) {
                    Some(log) => {
                        self.seen = true;
                        let start = log.frames.partition_point(|frame| frame.end() <= self.next);
                        let rest = log.frames[start..].iter().take(BATCH).cloned();
                        let batch: Vec<_> = rest.filter_map(|frame| frame.from_offset(self.next)).collect();
                        if let Some(last) = batch.last() {
                            self.next = last.end();
                            return Some(batch);
                        }
                        if log.sealed {
                            return None;
                        }
                    }
                    None if self.seen => return None,
                    None => {}
                }
            }
            if !self.follow {
                return None;
            }
            changed.await;
        }
    }
}

#[async_trait]
impl LogStore for MemoryLogs {
    async fn open(&self, tenant: &TenantId, attempt: AttemptId, _fresh: bool) -> Result<u64, LogError> {
        let end = self.lock().entry(attempt).or_insert_with(|| Log::new(tenant.clone())).end();
        self.shared.changed.notify_waiters();
        Ok(end)
    }

    async fn append(&self, attempt: AttemptId, frames: FrameBatch) -> Result<u64, LogError> {
        let mut logs = self.lock();
        let log = logs.get_mut(&attempt).filter(|log| !log.sealed).ok_or(LogError::Sealed { attempt })?;
        let mut result = Ok(());
        for frame in frames {
            let end = log.end();
            if frame.offset > end {
                result = Err(LogError::Gap { attempt, expected: end, got: frame.offset });
                break;
            }
            if frame.offset.checked_add(frame.span()).is_none() {
                let detail = format!("a frame at {} reaches past the last offset", frame.offset);
                result = Err(LogError::Corrupt { attempt, detail });
                break;
            }
            if let Some(frame) = frame.from_offset(end).filter(|frame| frame.span() > 0) {
                if let FrameBody::Truncated { dropped, .. } = &frame.body {
                    log.dropped = log.dropped.saturating_add(*dropped);
                }
                log.frames.push(frame);
            }
        }
        let end = log.end();
        drop(logs);
        self.shared.changed.notify_waiters();
        result.map(|()| end)
    }

    async fn flush(&self, attempt: AttemptId) -> Result<u64, LogError> {
        let logs = self.lock();
        logs.get(&attempt).filter(|log| !log.sealed).map(Log::end).ok_or(LogError::Sealed { attempt })
    }

    async fn seal(&self, tenant: &TenantId, attempt: AttemptId) -> Result<LogSummary, LogError> {
        let summary = {
            let mut logs = self.lock();
            let log = logs.entry(attempt).or_insert_with(|| Log::new(tenant.clone()));
            log.sealed = true;
            LogSummary { end: log.end(), dropped: log.dropped }
        };
        self.shared.changed.notify_waiters();
        Ok(summary)
    }

    fn read(
        &self,
        tenant: &TenantId,
        attempt: AttemptId,
        offset: u64,
        follow: bool,
    ) -> BoxStream<'static, Result<FrameBatch, LogError>> {
        let shared = self.shared.clone();
        let reader = Reader { shared, tenant: tenant.clone(), attempt, next: offset, follow, seen: false };
        stream::unfold(
            reader,
            |mut reader| async move { reader.next().await.map(|batch| (Ok(batch), reader)) },
        )
        .boxed()
    }

    async fn delete(&self, tenant: &TenantId, run: RunId) -> Result<(), LogError> {
        self.lock().retain(|attempt, log| attempt.run != run || log.tenant != *tenant);
        self.shared.changed.notify_waiters();
        Ok(())
    }
}
