//! The role beside the program: holds the channel to the service, and answers.

use std::sync::Arc;

use futures::stream;
use runner_core::task::{TaskKind, spawn};
use runner_proto::agent::{Answer, ask};
use tokio::{
    sync::{Semaphore, mpsc},
    task::AbortHandle,
};

use super::{
    Pod, PodError,
    client::{Backoff, Service, check},
    serve::Answerer,
};

/// Asks that are worked on at once.
const AT_ONCE: usize = 64;
/// Answers that may wait to be sent.
const WAITING: usize = 4;
/// How long the last answer may take to be gone.
const LAST_WORDS: std::time::Duration = std::time::Duration::from_secs(1);

/// Serves until the service says that nothing more will be asked. Dials again for as long as the service is away. SIGTERM
/// is not listened to: what is not stored yet may still be, until the pod's grace is over.
///
/// # Errors
/// See [`PodError`].
pub async fn publish(pod: &Pod) -> Result<(), PodError> {
    let service = Service::new(pod)?;
    let answerer = Answerer::new(service.clone(), pod);
    let mut backoff = Backoff::new();
    loop {
        match channel(&service, &answerer).await? {
            Ended::Finished => return Ok(()),
            // A service that was there is dialled at once.
            Ended::CutOff => backoff = Backoff::new(),
            Ended::Away => {}
        }
        backoff.pause().await;
    }
}

enum Ended {
    Finished,
    CutOff,
    Away,
}

struct Working(Vec<AbortHandle>);

impl Working {
    fn add(&mut self, task: AbortHandle) {
        self.0.retain(|task| !task.is_finished());
        self.0.push(task);
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        // Nobody takes their answers any more.
        for task in &self.0 {
            task.abort();
        }
    }
}

/// One connection, from the first ask to its end.
async fn channel(service: &Service, answerer: &Arc<Answerer>) -> Result<Ended, PodError> {
    let (answers, outgoing) = mpsc::channel::<Answer>(WAITING);
    let outgoing = stream::unfold(outgoing, |mut outgoing| async move {
        outgoing.recv().await.map(|answer| (answer, outgoing))
    });
    let mut asks = match service.client().serve(service.request(outgoing)).await {
        Ok(asks) => asks.into_inner(),
        Err(status) => {
            check(&status)?;
            return Ok(Ended::Away);
        }
    };
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    let mut working = Working(Vec::new());
    loop {
        let asked = match asks.message().await {
            Ok(Some(asked)) => asked,
            Ok(None) => return Ok(Ended::CutOff),
            Err(status) => {
                check(&status)?;
                return Ok(Ended::CutOff);
            }
        };
        // One that this release does not know has no answer; the service gives up on it.
        let Some(body) = asked.body else { continue };
        let finish = matches!(body, ask::Body::Finish(_));
        let Ok(turn) = Arc::clone(&turns).acquire_owned().await else { return Ok(Ended::CutOff) };
        let (answerer, answers_to) = (Arc::clone(answerer), answers.clone());
        let task = spawn(TaskKind::Helper, "answer", async move {
            let _turn = turn;
            let answer = Answer { id: asked.id, body: Some(answerer.answer(body).await) };
            let _ = answers_to.send(answer).await;
        });
        working.add(task.abort_handle());
        if finish {
            let _ = task.await;
            drop(answers);
            // The service ends the channel when it has the answer; where it does not, it does not matter.
            let rest = async { while let Ok(Some(_)) = asks.message().await {} };
            let _ = tokio::time::timeout(LAST_WORDS, rest).await;
            return Ok(Ended::Finished);
        }
    }
}
