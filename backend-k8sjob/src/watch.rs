//! The one watch of all of the backend's Jobs and pods, and what it says of each attempt.
//!
//! Two streams, filtered by label on the server: one of Jobs, one of pods. An end of a stream, a version that is too old
//! (410) and an API server that is away all mean the same: list again and compare, with back-off. Whoever waits for a change
//! of an attempt waits on that attempt's own channel.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{
    Api, Resource,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use runner_core::{
    id::AttemptId,
    task::{TaskKind, spawn},
};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    names::Names,
    seen::{JobSeen, PodSeen, Seen},
};

/// What is known of every attempt.
#[derive(Debug, Default)]
struct Board {
    jobs: HashMap<AttemptId, JobSeen>,
    pods: HashMap<AttemptId, BTreeMap<String, PodSeen>>,
    /// Those that somebody waits for.
    watchers: HashMap<AttemptId, watch::Sender<()>>,
    /// Each of the two streams has listed everything once.
    listed: [bool; 2],
}

impl Board {
    fn tell(&mut self, attempt: AttemptId) {
        if let Some(watcher) = self.watchers.get(&attempt) {
            if watcher.is_closed() {
                self.watchers.remove(&attempt);
            } else {
                watcher.send_replace(());
            }
        }
    }
}

/// The watch. Ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Watch {
    board: Arc<Mutex<Board>>,
    _stop: DropGuard,
}

impl Watch {
    /// Begins to watch. Needs a tokio runtime.
    pub(crate) fn begin(names: &Names, jobs: Api<Job>, pods: Api<Pod>) -> Self {
        let board = Arc::<Mutex<Board>>::default();
        let stop = CancellationToken::new();
        let follow_jobs = follow(jobs, names.clone(), Arc::clone(&board), take_job);
        let follow_pods = follow(pods, names.clone(), Arc::clone(&board), take_pod);
        let stopped = stop.clone();
        drop(spawn(TaskKind::Loop, "k8sjob.watch", async move {
            tokio::select! {
                () = stopped.cancelled() => {}
                ((), ()) = futures::future::join(follow_jobs, follow_pods) => {}
            }
        }));
        Self { board, _stop: stop.drop_guard() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of an attempt. Nothing is known of one that was just made.
    pub(crate) fn seen(&self, attempt: AttemptId) -> Seen {
        let board = self.lock();
        let mut pods: Vec<PodSeen> =
            board.pods.get(&attempt).into_iter().flat_map(|pods| pods.values().cloned()).collect();
        pods.sort_by(|a, b| (&a.created, &a.uid).cmp(&(&b.created, &b.uid)));
        Seen { job: board.jobs.get(&attempt).cloned(), pods }
    }

    /// Changes whenever something of the attempt does.
    pub(crate) fn changes(&self, attempt: AttemptId) -> watch::Receiver<()> {
        self.lock().watchers.entry(attempt).or_default().subscribe()
    }

    /// Whether everything was listed once.
    pub(crate) fn is_complete(&self) -> bool {
        self.lock().listed == [true; 2]
    }
}

/// What a stream says.
enum News<K> {
    Is(K),
    Gone(K),
    /// Everything that is, listed anew.
    All(Vec<K>),
}

async fn follow<K>(api: Api<K>, names: Names, board: Arc<Mutex<Board>>, take: fn(&mut Board, &Names, News<K>))
where
    K: Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let config = watcher::Config::default().labels(&names.selector());
    let mut events = watcher(api, config).default_backoff().boxed();
    let mut listing = Vec::new();
    loop {
        let news = match events.try_next().await {
            Ok(Some(Event::Init)) => {
                listing.clear();
                continue;
            }
            Ok(Some(Event::InitApply(one))) => {
                listing.push(one);
                continue;
            }
            Ok(Some(Event::InitDone)) => News::All(std::mem::take(&mut listing)),
            Ok(Some(Event::Apply(one))) => News::Is(one),
            Ok(Some(Event::Delete(one))) => News::Gone(one),
            // It goes on by itself, after a pause.
            Err(error) => {
                tracing::warn!(%error, "the watch of the cluster was interrupted");
                continue;
            }
            Ok(None) => return,
        };
        take(&mut board.lock().unwrap_or_else(PoisonError::into_inner), &names, news);
    }
}

fn take_job(board: &mut Board, names: &Names, news: News<Job>) {
    let owner = |job: &Job| names.owner(job.metadata.labels.as_ref());
    match news {
        News::Is(job) => {
            let Some(attempt) = owner(&job) else { return };
            board.jobs.insert(attempt, JobSeen::new(&job));
            board.tell(attempt);
        }
        News::Gone(job) => {
            let Some(attempt) = owner(&job) else { return };
            board.jobs.remove(&attempt);
            board.tell(attempt);
        }
        News::All(jobs) => {
            let now: HashMap<_, _> =
                jobs.iter().filter_map(|job| Some((owner(job)?, JobSeen::new(job)))).collect();
            let before = std::mem::replace(&mut board.jobs, now);
            board.listed[0] = true;
            let mut touched: Vec<AttemptId> = before.into_keys().collect();
            touched.extend(board.jobs.keys().copied());
            touched.into_iter().for_each(|attempt| board.tell(attempt));
        }
    }
}

fn take_pod(board: &mut Board, names: &Names, news: News<Pod>) {
    let owner = |pod: &Pod| names.owner(pod.metadata.labels.as_ref());
    match news {
        News::Is(pod) => {
            let Some(attempt) = owner(&pod) else { return };
            let seen = PodSeen::new(&pod);
            board.pods.entry(attempt).or_default().insert(seen.uid.clone(), seen);
            board.tell(attempt);
        }
        News::Gone(pod) => {
            let Some(attempt) = owner(&pod) else { return };
            if let Some(pods) = board.pods.get_mut(&attempt) {
                pods.remove(pod.metadata.uid.as_deref().unwrap_or_default());
                if pods.is_empty() {
                    board.pods.remove(&attempt);
                }
            }
            board.tell(attempt);
        }
        News::All(pods) => {
            let mut now: HashMap<AttemptId, BTreeMap<String, PodSeen>> = HashMap::new();
            for pod in &pods {
                if let Some(attempt) = owner(pod) {
                    let seen = PodSeen::new(pod);
                    now.entry(attempt).or_default().insert(seen.uid.clone(), seen);
                }
            }
            let before = std::mem::replace(&mut board.pods, now);
            board.listed[1] = true;
            let mut touched: Vec<AttemptId> = before.into_keys().collect();
            touched.extend(board.pods.keys().copied());
            touched.into_iter().for_each(|attempt| board.tell(attempt));
        }
    }
}
