//! The service's side of agents: who they are, what is asked of them, what they answer.
//!
//! A backend whose workloads are out of reach (a pod) has an agent beside each program that dials the service. The surface
//! that agents dial feeds an [`AgentHub`]; the backend asks through it. Neither knows the other, and both can come and go:
//! an ask to an agent that is not connected fails, and is made again when it is.

mod token;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};

pub use self::token::AgentKey;
use crate::{backend::AttemptContext, clock::Timestamp, id::AttemptId, log::FrameBatch};

/// Asks of one agent that may wait for it to take them.
const WAITING: usize = 64;
/// Beyond its own patience, how long an ask is waited for: the way there and back.
const SLACK: Duration = Duration::from_secs(15);

/// What is asked of an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentAsk {
    /// How far the program is. Answered at once, or when it has ended, or after the patience.
    State {
        /// Zero: at once.
        patience: Duration,
    },
    /// The log from an offset on. Answered as soon as there is something, or the program has ended, or after the patience.
    Log {
        /// Offset of the first wanted byte.
        offset: u64,
        /// How long to wait for it.
        patience: Duration,
    },
    /// A request to the shim, as its own JSON.
    Control {
        /// `runner_agent::exec::protocol::ControlRequest`.
        request: Bytes,
        /// How long the shim may take.
        patience: Duration,
    },
    /// Ends the program, or keeps one from being started that was not. Answered when nothing of it is alive.
    Stop {
        /// Between SIGTERM and SIGKILL.
        grace: Duration,
    },
    /// Stores the outputs, or finds them stored.
    Publish {
        /// The program failed or was stopped.
        partial: bool,
    },
    /// Nothing more will be asked: the agent ends.
    Finish,
}

impl AgentAsk {
    /// How long the answer may take. `None`: as long as it takes (storing outputs, as long as the agent is connected).
    fn patience(&self) -> Option<Duration> {
        match self {
            Self::State { patience } | Self::Log { patience, .. } | Self::Control { patience, .. } => {
                Some(patience.saturating_add(SLACK))
            }
            Self::Stop { grace } => Some(grace.saturating_add(SLACK)),
            Self::Publish { .. } => None,
            Self::Finish => Some(SLACK),
        }
    }
}

/// How far a program is, as its agent sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AgentState {
    /// When it was started. `None`: it was not (yet).
    pub started: Option<Timestamp>,
    /// `runner_agent::exec::protocol::ExitRecord` as JSON. `None`: it has not ended, or nobody knows how.
    pub exit_record: Option<Bytes>,
    /// The shim's last words. Mostly empty.
    pub shim_errors: String,
    /// Bytes of the inputs.
    pub input_bytes: u64,
    /// When it was stopped without its shim: before it was started.
    pub stopped: Option<Timestamp>,
}

/// What an agent answers.
#[derive(Debug, Clone, PartialEq)]
pub enum AgentAnswer {
    /// To [`AgentAsk::State`].
    State(AgentState),
    /// To [`AgentAsk::Log`]. The state is from before the frames were read: with an end and without frames, the log is
    /// complete.
    Log {
        /// How far it was.
        state: AgentState,
        /// Contiguous from the offset that was asked for.
        frames: FrameBatch,
    },
    /// To [`AgentAsk::Control`]: the shim's reply as JSON. `None`: no shim takes requests now.
    Control(Option<Bytes>),
    /// To [`AgentAsk::Stop`].
    Stopped {
        /// Nothing of the program is alive, and nothing will be.
        dead: bool,
    },
    /// To [`AgentAsk::Publish`]. The manifest is in the object store.
    Published {
        /// Whether there is a manifest.
        stored: bool,
        /// What went wrong, and whether it may go right another time.
        failure: Option<(String, bool)>,
        /// What was left out and why.
        notes: Vec<String>,
    },
    /// To [`AgentAsk::Finish`].
    Finished,
    /// It could not be done.
    Failed {
        /// Why.
        message: String,
        /// Whether it may be possible another time.
        retryable: bool,
    },
}

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// The agent is not connected, or was cut off before it answered. Whether the ask took effect is not known.
    #[error("the agent is not connected")]
    Away,
    /// It is connected and does not answer.
    #[error("the agent does not answer")]
    Silent,
}

/// What an agent said of inputs that it could not stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagingReport {
    /// One line for a person.
    pub message: String,
    /// The agent goes on trying.
    pub retryable: bool,
    /// The machine failed, not the input.
    pub local: bool,
}

/// What is known of an attempt's agent without asking it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AgentPresence {
    /// Whether it is connected. Grows with every connection, so that a new one is seen.
    pub connections: u64,
    /// Whether it is now.
    pub connected: bool,
    /// How often it said that staging failed.
    pub reports: u64,
    /// The last of them.
    pub report: Option<StagingReport>,
}

/// What an agent is told to do, and for whom.
#[derive(Debug, Clone)]
pub struct AgentOrder {
    /// Whose, and where its objects are.
    pub attempt: AttemptContext,
    /// `runner_agent::pod::order::Order` as JSON.
    pub order: Bytes,
}

/// One ask on its way to an agent.
#[derive(Debug)]
pub struct Asking {
    /// Unique on its connection.
    pub id: u64,
    /// What.
    pub ask: AgentAsk,
}

type Answers = Arc<Mutex<HashMap<u64, oneshot::Sender<AgentAnswer>>>>;

#[derive(Debug, Clone)]
struct Connection {
    number: u64,
    asks: mpsc::Sender<Asking>,
    answers: Answers,
}

#[derive(Debug, Default)]
struct Post {
    order: Option<AgentOrder>,
    /// The one place that executes the attempt, by the agent's own word.
    place: Option<String>,
    connection: Option<Connection>,
    presence: watch::Sender<AgentPresence>,
}

/// One agent's connection, at the surface's end. Dropping it disconnects.
#[derive(Debug)]
pub struct AgentSession {
    hub: Arc<AgentHub>,
    attempt: AttemptId,
    number: u64,
    asks: mpsc::Receiver<Asking>,
    answers: Answers,
}

impl AgentSession {
    /// The next ask. `None`: another connection replaced this one, or the attempt is over.
    pub async fn next(&mut self) -> Option<Asking> {
        self.asks.recv().await
    }

    /// Where answers go.
    pub fn answers(&self) -> AgentAnswers {
        AgentAnswers(Arc::clone(&self.answers))
    }
}

impl Drop for AgentSession {
    fn drop(&mut self) {
        // Who waits for an answer learns that there will be none; nobody begins to wait after that.
        self.asks.close();
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let mut posts = self.hub.lock();
        if let Some(post) = posts.get_mut(&self.attempt)
            && post.connection.as_ref().is_some_and(|connection| connection.number == self.number)
        {
            post.connection = None;
            post.presence.send_modify(|presence| presence.connected = false);
            if post.order.is_none() && post.presence.is_closed() {
                posts.remove(&self.attempt);
            }
        }
    }
}

/// Takes the answers of one connection.
#[derive(Debug, Clone)]
pub struct AgentAnswers(Answers);

impl AgentAnswers {
    /// Passes an answer on to who asked. One that nobody waits for (any more) is dropped.
    pub fn take(&self, id: u64, answer: AgentAnswer) {
        let waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        if let Some(waiting) = waiting {
            let _ = waiting.send(answer);
        }
    }
}

/// Where agents and backends meet. Holds nothing that cannot be rebuilt: orders are given again by the backend, and agents
/// dial again, after a restart.
#[derive(Debug)]
pub struct AgentHub {
    key: AgentKey,
    posts: Mutex<HashMap<AttemptId, Post>>,
}

impl AgentHub {
    /// A hub whose tokens are of this key.
    pub fn new(key: AgentKey) -> Arc<Self> {
        Arc::new(Self { key, posts: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<AttemptId, Post>> {
        self.posts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The token of an attempt's agent: always the same, and never stored by the service.
    pub fn token(&self, attempt: AttemptId) -> String {
        self.key.token(attempt)
    }

    /// Whose token it is.
    pub fn verify(&self, token: &str) -> Option<AttemptId> {
        self.key.verify(token)
    }

    /// Takes an attempt up: its agent may ask for its order and its objects from now on. The last order counts.
    pub fn take_up(&self, order: AgentOrder) {
        let attempt = order.attempt.attempt;
        self.lock().entry(attempt).or_default().order = Some(order);
    }

    /// Forgets an attempt: its agent is disconnected, and finds no order any more.
    pub fn forget(&self, attempt: AttemptId) {
        let post = self.lock().remove(&attempt);
        if let Some(Post { connection: Some(connection), .. }) = &post {
            connection.answers.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
    }

    /// The order of an attempt that was taken up.
    pub fn order(&self, attempt: AttemptId) -> Option<AgentOrder> {
        self.lock().get(&attempt)?.order.clone()
    }

    /// Whether the attempt is executed in `place`: the first one that asks is the one. Where a cluster makes a second pod in place
    /// of one that somebody deleted, the program must not be started again. After a restart the first one is whoever asks then.
    pub fn claim(&self, attempt: AttemptId, place: &str) -> bool {
        match self.lock().get_mut(&attempt) {
            Some(post) => post.place.get_or_insert_with(|| place.to_owned()) == place,
            None => false,
        }
    }

    /// Takes a failed staging.
    pub fn report(&self, attempt: AttemptId, report: StagingReport) {
        if let Some(post) = self.lock().get(&attempt) {
            post.presence.send_modify(|presence| {
                presence.reports += 1;
                presence.report = Some(report);
            });
        }
    }

    /// Connects an attempt's agent. One that was connected is disconnected.
    pub fn connect(self: &Arc<Self>, attempt: AttemptId) -> AgentSession {
        let (sender, asks) = mpsc::channel(WAITING);
        let answers = Answers::default();
        let mut posts = self.lock();
        let post = posts.entry(attempt).or_default();
        let mut number = 0;
        post.presence.send_modify(|presence| {
            presence.connections += 1;
            presence.connected = true;
            number = presence.connections;
        });
        let connection = Connection { number, asks: sender, answers: Arc::clone(&answers) };
        post.connection = Some(connection);
        AgentSession { hub: Arc::clone(self), attempt, number, asks, answers }
    }

    /// What is known of an attempt's agent, now and from now on.
    pub fn presence(&self, attempt: AttemptId) -> watch::Receiver<AgentPresence> {
        self.lock().entry(attempt).or_default().presence.subscribe()
    }

    /// Forgets what nobody needs: an attempt without order, connection or watcher.
    pub fn tidy(&self, attempt: AttemptId) {
        let mut posts = self.lock();
        if posts.get(&attempt).is_some_and(|post| {
            post.order.is_none() && post.connection.is_none() && post.presence.is_closed()
        }) {
            posts.remove(&attempt);
        }
    }

    /// Asks an attempt's agent, and waits for its answer.
    ///
    /// # Errors
    /// See [`AskError`].
    pub async fn ask(&self, attempt: AttemptId, ask: AgentAsk) -> Result<AgentAnswer, AskError> {
        let connection = self.lock().get(&attempt).and_then(|post| post.connection.clone());
        let Some(Connection { asks, answers, .. }) = connection else { return Err(AskError::Away) };
        let patience = ask.patience();
        let (sender, answer) = oneshot::channel();
        let waiting = Waiting { id: next_id(), answers };
        waiting.answers.lock().unwrap_or_else(PoisonError::into_inner).insert(waiting.id, sender);
        let asked = async {
            asks.send(Asking { id: waiting.id, ask }).await.map_err(|_| AskError::Away)?;
            // The channel must not be what keeps the connection's end from being seen.
            drop(asks);
            answer.await.map_err(|_| AskError::Away)
        };
        match patience {
            None => asked.await,
            Some(patience) => tokio::time::timeout(patience, asked).await.unwrap_or(Err(AskError::Silent)),
        }
    }
}

/// An ask that has no answer yet. Given up where it is dropped.
struct Waiting {
    id: u64,
    answers: Answers,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

fn next_id() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
