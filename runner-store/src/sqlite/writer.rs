//! The one writer: a thread that executes what callers ask for and commits it in groups.
//!
//! A commit costs a sync, whatever is in it. So everything that waits, up to [`MAX_GROUP`], goes into one transaction, and
//! nobody is answered before its commit. Where one verb of a group fails, the group is rolled back and executed again with a
//! savepoint around each verb, so that one failure fails only itself; a group without a failure, which is nearly every one,
//! does not pay for savepoints. Where there is no room, each verb gets a transaction of its own.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use runner_core::store::StoreError;
use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use super::{
    error::{Fault, store_error},
    write::{Context, Verb},
};
use crate::live::LiveCounts;

/// Most verbs in one commit.
pub(crate) const MAX_GROUP: usize = 256;

/// Counts what is stored.
pub(crate) fn live_counts(conn: &Connection) -> rusqlite::Result<LiveCounts> {
    let mut counts = LiveCounts::default();
    let mut statement = conn.prepare(
        "SELECT tenant, count(*) FROM runs INDEXED BY runs_live \
         WHERE ended IS NULL AND substr(id, 7, 3) <> x'85adb5' GROUP BY tenant",
    )?;
    let mut rows = statement.query(())?;
    while let Some(row) = rows.next()? {
        counts.stored(row.get(0)?, row.get(1)?);
    }
    Ok(counts)
}

/// A verb on its way, whatever its type.
pub(crate) trait Job: Send {
    /// Executes it and holds the answer. An error says that nothing of it may stay.
    fn execute(&mut self, cx: &mut Context<'_>) -> Result<(), StoreError>;
    /// Holds a failure in the answer's place.
    fn fail(&mut self, error: StoreError);
    /// Tells the caller: what was held, or that the group failed.
    fn answer(self: Box<Self>, group: Result<(), StoreError>);
}

struct Typed<V: Verb> {
    verb: V,
    held: Option<Result<V::Answer, StoreError>>,
    reply: oneshot::Sender<Result<V::Answer, StoreError>>,
}

impl<V: Verb> Job for Typed<V> {
    fn execute(&mut self, cx: &mut Context<'_>) -> Result<(), StoreError> {
        // A panic is a fault of this program; it must not stop the verbs of others.
        let result = catch_unwind(AssertUnwindSafe(|| self.verb.execute(cx)))
            .unwrap_or_else(|_| Err(Fault::Answer(StoreError::Other("a verb panicked".to_owned()))))
            .map_err(StoreError::from);
        let status = result.as_ref().map(|_| ()).map_err(Clone::clone);
        self.held = Some(result);
        status
    }

    fn fail(&mut self, error: StoreError) {
        self.held = Some(Err(error));
    }

    fn answer(self: Box<Self>, group: Result<(), StoreError>) {
        let answer = match (group, self.held) {
            (Err(error), _) => Err(error),
            (Ok(()), Some(answer)) => answer,
            (Ok(()), None) => Err(StoreError::Other("a verb was not executed".to_owned())),
        };
        // A caller that has gone is not told; what was stored stays, and its verbs can be repeated.
        let _ = self.reply.send(answer);
    }
}

/// The way to the writer. Callers wait while [`MAX_GROUP`] others wait already.
#[derive(Debug, Clone)]
pub(crate) struct Submit(mpsc::Sender<Box<dyn Job>>);

impl Submit {
    pub(crate) fn channel() -> (Self, mpsc::Receiver<Box<dyn Job>>) {
        let (sender, receiver) = mpsc::channel(MAX_GROUP);
        (Self(sender), receiver)
    }

    /// Has a verb executed and committed.
    pub(crate) async fn run<V: Verb>(&self, verb: V) -> Result<V::Answer, StoreError> {
        let stopped = || StoreError::Unavailable("its writer has stopped".to_owned());
        let (reply, answer) = oneshot::channel();
        self.0.send(Box::new(Typed { verb, held: None, reply })).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?
    }
}

/// The thread's state.
#[derive(Debug)]
pub(crate) struct Writer {
    pub(crate) conn: Connection,
    pub(crate) live: LiveCounts,
    /// For whoever wants the number without asking the writer.
    pub(crate) live_total: Arc<AtomicU64>,
}

impl Writer {
    /// Runs until every [`Submit`] is gone. What was submitted before is executed.
    pub(crate) fn run(mut self, mut jobs: mpsc::Receiver<Box<dyn Job>>) {
        let mut group: Vec<Box<dyn Job>> = Vec::with_capacity(MAX_GROUP);
        while let Some(first) = jobs.blocking_recv() {
            group.push(first);
            while group.len() < MAX_GROUP
                && let Ok(next) = jobs.try_recv()
            {
                group.push(next);
            }
            let result = self.commit(&mut group);
            self.live_total.store(self.live.total(), Ordering::Release);
            for job in group.drain(..) {
                job.answer(result.clone());
            }
        }
    }

    /// Executes and commits a group. `Ok`: each job holds its own answer. `Err`: nothing of the group is stored.
    fn commit(&mut self, group: &mut [Box<dyn Job>]) -> Result<(), StoreError> {
        match self.attempt(group, false) {
            // Alone there is nobody to be kept apart from: the answer is its own.
            Err(_) if group.len() > 1 => {}
            result => return result,
        }
        match self.attempt(group, true) {
            Err(StoreError::Full(_)) => {}
            result => return result,
        }
        // Without room SQLite gives up the whole transaction, savepoints or not. What needs little may fit still.
        for job in group {
            if let Err(error) = self.attempt(std::slice::from_mut(job), false) {
                job.fail(error);
            }
        }
        Ok(())
    }

    fn attempt(&mut self, group: &mut [Box<dyn Job>], isolated: bool) -> Result<(), StoreError> {
        let result = self
            .begin()
            .and_then(|()| self.execute_all(group, isolated))
            .and_then(|()| self.statement("COMMIT"));
        match result {
            Ok(()) => self.live.keep(),
            Err(_) => {
                self.live.take_back(0);
                if !self.conn.is_autocommit()
                    && let Err(error) = self.statement("ROLLBACK")
                {
                    tracing::error!(%error, "could not roll back a group");
                }
            }
        }
        result
    }

    /// Takes the write lock at once, so that no verb waits for it in the middle.
    fn begin(&self) -> Result<(), StoreError> {
        // A rollback that failed has left a transaction open.
        if !self.conn.is_autocommit() {
            self.statement("ROLLBACK")?;
        }
        self.statement("BEGIN IMMEDIATE")
    }

    fn execute_all(&mut self, group: &mut [Box<dyn Job>], isolated: bool) -> Result<(), StoreError> {
        for job in group {
            if !isolated {
                job.execute(&mut Context { conn: &self.conn, live: &mut self.live })?;
                continue;
            }
            let mark = self.live.mark();
            self.statement("SAVEPOINT verb")?;
            if let Err(error) = job.execute(&mut Context { conn: &self.conn, live: &mut self.live }) {
                self.live.take_back(mark);
                // A full disk may have ended the whole transaction: then none of the group is stored.
                if self.conn.is_autocommit() {
                    return Err(error);
                }
                self.statement("ROLLBACK TO verb")?;
            }
            self.statement("RELEASE verb")?;
        }
        Ok(())
    }

    fn statement(&self, sql: &str) -> Result<(), StoreError> {
        let run = || self.conn.prepare_cached(sql)?.execute(());
        run().map(|_| ()).map_err(|error| store_error(&error))
    }
}
