//! The one writer: a task that executes what callers ask for and commits it in groups.
//!
//! A commit costs a sync, whatever is in it. So everything that waits, up to [`MAX_GROUP`], goes into one transaction, and nobody is
//! answered before its commit. Where one verb of a group fails, the group is rolled back and executed again with a savepoint around each
//! verb, so that one failure fails only itself.
//!
//! Where the connection breaks, the group is executed again on a new one, for [`PATIENCE`]; then it is answered as unavailable, and
//! until the server is there again every further group at once. A commit that was not answered may have happened: each group stores
//! its number, so the next connection reads whether it did. The number belongs to this service: one that another has replaced in between
//! changes nothing any more.

use std::{
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures::{FutureExt as _, future::try_join};
use runner_core::{
    clock::{Clock as _, IdGen as _, SystemClock, SystemIds},
    store::StoreError,
};
use tokio::sync::{mpsc, oneshot};

use super::{
    connect::{Conn, Connector, LOCK, Role, schema_key},
    error::{Fault, Kind, PostgresError},
    migrate,
    write::{Context, Verb},
};
use crate::live::LiveCounts;

/// Most verbs in one commit.
const MAX_GROUP: usize = 128;
/// Longest time that a group is tried, its first time not counted.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest time of a group's statements together, and of its commit.
const GROUP_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two tries: at first, and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));
/// How often it is looked whether another session has let go of the lock.
const LOCK_POLL: Duration = Duration::from_millis(50);
/// How long a session of this very service, which the server was told to end, is waited for.
const OWN_SESSION: Duration = Duration::from_secs(2);

const FENCE: &str = "UPDATE writer SET number = $1 WHERE holder = $2";
const HOLDER: &str = "SELECT holder, number FROM writer";
const TAKE: &str = "UPDATE writer SET holder = gen_random_uuid()::text, number = 0 RETURNING holder";
const TRY_LOCK: &str = "SELECT pg_try_advisory_lock($1, $2)";
const WHO: &str = "SELECT format('%s, from %s, since %s', application_name, coalesce(host(client_addr), 'this machine'), backend_start) \
     FROM pg_locks JOIN pg_stat_activity USING (pid) \
     WHERE locktype = 'advisory' AND granted AND classid::bigint = $1 AND objid::bigint = $2 \
     AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) LIMIT 1";
const MYSELF: &str = "SELECT pid, backend_start::text FROM pg_stat_activity WHERE pid = pg_backend_pid()";
const END_SESSION: &str =
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = $1 AND backend_start::text = $2";
/// A server may be set to answer commits before they are durable; this service's are not.
const DURABLE: &str = "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'";
const LIVE: &str = "SELECT tenant, count(*) FROM runs WHERE ended IS NULL AND substr(id, 7, 3) <> '\\x85adb5' GROUP BY tenant";

/// A verb on its way, whatever its type.
#[async_trait]
pub(crate) trait Job: Send {
    /// Executes it and holds the answer. An error says that nothing of it may stay.
    async fn execute(&mut self, cx: &mut Context<'_>) -> Result<(), Fault>;
    /// Tells the caller: what was held, or that the group failed.
    fn answer(self: Box<Self>, group: Result<(), StoreError>);
}

struct Typed<V: Verb> {
    verb: V,
    held: Option<Result<V::Answer, StoreError>>,
    reply: oneshot::Sender<Result<V::Answer, StoreError>>,
}

#[async_trait]
impl<V: Verb> Job for Typed<V> {
    async fn execute(&mut self, cx: &mut Context<'_>) -> Result<(), Fault> {
        // A panic is a fault of this program; it must not stop the verbs of others.
        let result = AssertUnwindSafe(self.verb.execute(cx))
            .catch_unwind()
            .await
            .unwrap_or_else(|_| Err(Fault::Answer(StoreError::Other("a verb panicked".to_owned()))));
        match result {
            Ok(answer) => {
                self.held = Some(Ok(answer));
                Ok(())
            }
            Err(fault) => {
                self.held = Some(Err(fault.store_error()));
                Err(fault)
            }
        }
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

/// A session of the server, as it is named to end it.
#[derive(Debug)]
struct Session {
    pid: i32,
    start: String,
}

/// The time until which a server that was away is not asked again, and why.
#[derive(Debug)]
struct Away {
    until: Duration,
    pause: Duration,
    error: StoreError,
}

/// The task's state.
#[derive(Debug)]
pub(crate) struct Writer {
    connector: Arc<Connector>,
    clock: SystemClock,
    /// `None`: it broke.
    conn: Option<Conn>,
    session: Session,
    /// The schema's half of the lock's name.
    key: i32,
    /// What the row of `writer` says while it is this service's.
    holder: String,
    /// Of the last group that was begun.
    number: i64,
    /// The number of this group, where its commit was not answered.
    doubt: Option<i64>,
    /// Another service has the schema: there is no way back.
    replaced: bool,
    away: Option<Away>,
    live: LiveCounts,
    /// For whoever wants the number without asking the writer.
    live_total: Arc<AtomicU64>,
}

impl Writer {
    /// Takes the schema over, having waited at most so long for whoever has it.
    pub(crate) async fn open(
        connector: Arc<Connector>,
        wait: Duration,
        live_total: Arc<AtomicU64>,
    ) -> Result<Self, PostgresError> {
        let server = |fault: Fault| PostgresError::Server(fault.into());
        let conn = connector.connect(Role::Writer).await?;
        let key = schema_key(&conn).await.map_err(server)?;
        migrate::check(&conn).await?;
        let clock = SystemClock::new();
        while !try_lock(&conn, key).await.map_err(server)? {
            if clock.monotonic() >= wait {
                let who = conn.row(WHO, &[&i64::from(LOCK), &i64::from(key.cast_unsigned())]).await;
                let who = who.ok().flatten().and_then(|row| row.try_get::<_, String>(0).ok());
                return Err(PostgresError::Held { who: who.unwrap_or_else(|| "unknown".to_owned()) });
            }
            tokio::time::sleep(LOCK_POLL).await;
        }
        let taken = async {
            conn.client.query_opt(DURABLE, &[]).await?;
            let holder = conn.client.query_one(TAKE, &[]).await?.try_get(0)?;
            Ok::<String, Fault>(holder)
        };
        let holder = taken.await.map_err(server)?;
        let session = myself(&conn).await.map_err(server)?;
        let live = live_counts(&conn).await.map_err(server)?;
        live_total.store(live.total(), Ordering::Release);
        Ok(Self {
            connector,
            clock,
            conn: Some(conn),
            session,
            key,
            holder,
            number: 0,
            doubt: None,
            replaced: false,
            away: None,
            live,
            live_total,
        })
    }

    /// Runs until every [`Submit`] is gone. What was submitted before is executed.
    pub(crate) async fn run(mut self, mut jobs: mpsc::Receiver<Box<dyn Job>>) {
        let mut group: Vec<Box<dyn Job>> = Vec::with_capacity(MAX_GROUP);
        while let Some(first) = jobs.recv().await {
            group.push(first);
            while group.len() < MAX_GROUP
                && let Ok(next) = jobs.try_recv()
            {
                group.push(next);
            }
            let result = self.commit(&mut group).await;
            self.live_total.store(self.live.total(), Ordering::Release);
            for job in group.drain(..) {
                job.answer(result.clone());
            }
        }
    }

    /// Executes and commits a group. `Ok`: each job holds its own answer. `Err`: nothing of the group is stored, as far as is known.
    async fn commit(&mut self, group: &mut [Box<dyn Job>]) -> Result<(), StoreError> {
        let began = self.clock.monotonic();
        if let Some(away) = &self.away
            && began < away.until
        {
            return Err(away.error.clone());
        }
        self.doubt = None;
        let mut pause = PAUSES.0;
        loop {
            let fault = match self.once(group).await {
                Ok(()) => {
                    if self.away.take().is_some() {
                        tracing::info!("the state store's server is back");
                    }
                    return Ok(());
                }
                Err(fault) => fault,
            };
            let late = self.away.is_some() || self.clock.monotonic() + pause > began + PATIENCE;
            match fault.kind() {
                Kind::Final => return Err(fault.into()),
                Kind::Contended if late => return Err(fault.into()),
                Kind::Lost if late => return Err(self.is_away(fault.into())),
                Kind::Contended | Kind::Lost => {}
            }
            tokio::time::sleep(jittered(pause)).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// Notes that the server is away, so that whoever comes next need not wait for it again.
    fn is_away(&mut self, error: StoreError) -> StoreError {
        if self.away.is_none() {
            tracing::warn!(%error, "the state store's server is away");
        }
        let pause = self.away.as_ref().map_or(PAUSES.0, |away| (away.pause * 2).min(PAUSES.1));
        let until = self.clock.monotonic() + jittered(pause);
        self.away = Some(Away { until, pause, error: error.clone() });
        error
    }

    async fn once(&mut self, group: &mut [Box<dyn Job>]) -> Result<(), Fault> {
        if self.replaced {
            return Err(replaced());
        }
        if self.conn.as_ref().is_none_or(|conn| conn.client.is_closed()) {
            let committed = self.reconnect().await?;
            if self.doubt.take() == Some(committed) {
                return Ok(());
            }
        }
        match self.attempt(group, false).await {
            // Alone there is nobody to be kept apart from: the answer is its own.
            Err(fault) if fault.kind() == Kind::Final && group.len() > 1 && !self.replaced => {
                self.attempt(group, true).await
            }
            // The answer is what the job holds.
            Err(Fault::Answer(_)) if !self.replaced => Ok(()),
            result => result,
        }
    }

    /// Connects again, takes the lock, and answers the number of the last group that was committed.
    async fn reconnect(&mut self) -> Result<i64, Fault> {
        self.conn = None;
        let conn = match self.connector.connect(Role::Writer).await {
            Ok(conn) => conn,
            Err(error) => return Err(away(error)),
        };
        migrate::check(&conn).await.map_err(away)?;
        let began = self.clock.monotonic();
        // The session before may not know yet that nobody listens any more. As long as it lives, its commit may still happen.
        while !try_lock(&conn, self.key).await? {
            conn.row(END_SESSION, &[&self.session.pid, &self.session.start]).await?;
            if self.clock.monotonic() >= began + OWN_SESSION {
                return Err(Fault::Slow);
            }
            tokio::time::sleep(LOCK_POLL).await;
        }
        conn.client.query_opt(DURABLE, &[]).await?;
        let row = conn.client.query_one(HOLDER, &[]).await?;
        if row.try_get::<_, &str>(0)? != self.holder {
            return Err(self.is_replaced());
        }
        let committed = row.try_get(1)?;
        self.session = myself(&conn).await?;
        self.live = live_counts(&conn).await?;
        self.conn = Some(conn);
        Ok(committed)
    }

    fn is_replaced(&mut self) -> Fault {
        tracing::error!("another service has taken the state store over; this one stores nothing any more");
        (self.replaced, self.conn) = (true, None);
        replaced()
    }

    async fn attempt(&mut self, group: &mut [Box<dyn Job>], isolated: bool) -> Result<(), Fault> {
        let Some(conn) = self.conn.take() else { return Err(Fault::Slow) };
        self.number += 1;
        let executed = tokio::time::timeout(
            GROUP_TIMEOUT,
            execute_all(&conn, &mut self.live, group, isolated, (self.number, &self.holder)),
        );
        let fault = match executed.await {
            Ok(Ok(true)) => {
                match tokio::time::timeout(GROUP_TIMEOUT, conn.client.batch_execute("COMMIT")).await {
                    Ok(Ok(())) => {
                        self.live.keep();
                        self.conn = Some(conn);
                        return Ok(());
                    }
                    Ok(Err(error)) => {
                        let fault = Fault::from(error);
                        self.doubt = (fault.kind() == Kind::Lost).then_some(self.number);
                        fault
                    }
                    Err(_) => {
                        self.doubt = Some(self.number);
                        Fault::Slow
                    }
                }
            }
            Ok(Ok(false)) => self.is_replaced(),
            Ok(Err(fault)) => fault,
            Err(_) => Fault::Slow,
        };
        self.live.take_back(0);
        if fault.kind() == Kind::Lost {
            conn.abandon();
            return Err(fault);
        }
        if !self.replaced && conn.client.batch_execute("ROLLBACK").await.is_ok() {
            self.conn = Some(conn);
        }
        Err(fault)
    }
}

/// What happens of a group before its commit. False: the schema is another service's now.
async fn execute_all(
    conn: &Conn,
    live: &mut LiveCounts,
    group: &mut [Box<dyn Job>],
    isolated: bool,
    (number, holder): (i64, &str),
) -> Result<bool, Fault> {
    let begin =
        async { Ok::<_, Fault>(conn.client.batch_execute("BEGIN ISOLATION LEVEL READ COMMITTED").await?) };
    // Sent together, in this order.
    let ((), ours) = try_join(begin, conn.execute(FENCE, &[&number, &holder])).await?;
    if ours != 1 {
        return Ok(false);
    }
    for job in group {
        if !isolated {
            job.execute(&mut Context { conn, live }).await?;
            continue;
        }
        let mark = live.mark();
        conn.client.batch_execute("SAVEPOINT verb").await?;
        if let Err(fault) = job.execute(&mut Context { conn, live }).await {
            live.take_back(mark);
            if fault.kind() != Kind::Final {
                return Err(fault);
            }
            conn.client.batch_execute("ROLLBACK TO verb").await?;
        }
        conn.client.batch_execute("RELEASE verb").await?;
    }
    Ok(true)
}

async fn try_lock(conn: &Conn, key: i32) -> Result<bool, Fault> {
    match conn.row(TRY_LOCK, &[&LOCK, &key]).await? {
        Some(row) => Ok(row.try_get(0)?),
        None => Ok(false),
    }
}

async fn myself(conn: &Conn) -> Result<Session, Fault> {
    let row = conn.client.query_one(MYSELF, &[]).await?;
    Ok(Session { pid: row.try_get(0)?, start: row.try_get(1)? })
}

/// Counts what is stored.
async fn live_counts(conn: &Conn) -> Result<LiveCounts, Fault> {
    let mut counts = LiveCounts::default();
    for row in conn.rows(LIVE, &[]).await? {
        counts.stored(row.try_get(0)?, row.try_get(1)?);
    }
    Ok(counts)
}

/// Why there is no connection, as something that passes.
fn away(error: PostgresError) -> Fault {
    match error {
        PostgresError::Server(StoreError::Unavailable(why)) => Fault::Away(why),
        other => Fault::Away(other.to_string()),
    }
}

fn replaced() -> Fault {
    StoreError::Unavailable("another service has taken it over; this one has to end".to_owned()).into()
}

/// Between half of a pause and the whole.
fn jittered(pause: Duration) -> Duration {
    let half = pause / 2;
    let spread = u64::try_from(half.as_micros()).unwrap_or(u64::MAX).max(1);
    half + Duration::from_micros(SystemIds.random() % spread)
}
