//! `Attach`: input for a running workload. Each chunk is answered when the workload's side has taken it over, so that a
//! caller can send no faster than the program reads.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use runner_core::{
    backend::WorkloadInput,
    id::RunId,
    service::{Caller, RunService, ServiceError, StreamBody, StreamCursor, StreamOptions},
    state::RunState,
    store::{RunEvent, RunRecord},
};
use runner_proto::v1;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use crate::{
    convert::{
        Wire,
        request::{Attachment, STDIN_CHUNK},
    },
    status,
};

/// The answers of one `Attach`.
pub(super) type Answers = BoxStream<'static, Result<v1::AttachResponse, Status>>;

struct Attached {
    service: Arc<RunService>,
    caller: Caller,
    requests: Streaming<v1::AttachRequest>,
    run: Option<RunId>,
    taken: u64,
    waiting: VecDeque<Bytes>,
}

/// Reads requests as answers are asked for.
pub(super) fn open(
    service: Arc<RunService>,
    caller: Caller,
    requests: Streaming<v1::AttachRequest>,
    draining: CancellationToken,
) -> Answers {
    let attached = Attached { service, caller, requests, run: None, taken: 0, waiting: VecDeque::new() };
    stream::unfold(Some(attached), move |attached| {
        let draining = draining.clone();
        async move {
            let mut attached = attached?;
            let answer = tokio::select! {
                answer = attached.answer() => answer,
                () = draining.cancelled() => Err(status::shutting_down()),
            };
            match answer {
                Ok(Some(answer)) => Some((Ok(answer), Some(attached))),
                Ok(None) => None,
                // An error is the end.
                Err(status) => Some((Err(status), None)),
            }
        }
    })
    .boxed()
}

impl Attached {
    /// The next answer; `None` where the caller has sent everything.
    async fn answer(&mut self) -> Result<Option<v1::AttachResponse>, Status> {
        if let Some(chunk) = self.waiting.pop_front() {
            return self.send_stdin(chunk).await.map(Some);
        }
        let Some(request) = self.requests.message().await? else { return Ok(None) };
        let request = Attachment::try_from(Wire(request)).map_err(|e| status::invalid(&e))?;
        let answer = match (request, self.run) {
            (Attachment::Open(id), None) => {
                self.wait_until_running(id).await.map_err(|e| status::service(&e))?;
                self.run = Some(id);
                v1::AttachResponse { stdin_bytes_taken: 0, ready: true }
            }
            (Attachment::Open(_), Some(_)) => {
                return Err(misplaced("open", "only the first message names the run"));
            }
            (Attachment::Input(_), None) => {
                return Err(misplaced("open", "the first message must name the run"));
            }
            (Attachment::Input(WorkloadInput::Stdin(mut bytes)), Some(_)) => {
                let first = bytes.split_to(bytes.len().min(STDIN_CHUNK));
                while !bytes.is_empty() {
                    self.waiting.push_back(bytes.split_to(bytes.len().min(STDIN_CHUNK)));
                }
                self.send_stdin(first).await?
            }
            (Attachment::Input(input @ (WorkloadInput::Eof | WorkloadInput::Resize(_))), Some(run)) => {
                self.service.input(&self.caller, run, input).await.map_err(|e| status::service(&e))?;
                v1::AttachResponse { stdin_bytes_taken: self.taken, ready: false }
            }
        };
        Ok(Some(answer))
    }

    async fn send_stdin(&mut self, chunk: Bytes) -> Result<v1::AttachResponse, Status> {
        let Some(run) = self.run else {
            return Err(misplaced("open", "the first message must name the run"));
        };
        let length = chunk.len() as u64;
        // An empty chunk would be the end of input to some pipes.
        if length > 0 {
            let input = WorkloadInput::Stdin(chunk);
            self.service.input(&self.caller, run, input).await.map_err(|e| status::service(&e))?;
        }
        self.taken += length;
        Ok(v1::AttachResponse { stdin_bytes_taken: self.taken, ready: false })
    }

    /// Returns when the run takes input. A run that waits in the queue is waited for.
    async fn wait_until_running(&self, id: RunId) -> Result<(), ServiceError> {
        let (record, _) = self.service.get(&self.caller, id).await?;
        if !record.spec.stdin && record.spec.terminal.is_none() {
            return Err(ServiceError::FailedPrecondition {
                reason: "NO_STDIN",
                message: "the run's spec asks for neither standard input nor a terminal".to_owned(),
            });
        }
        match record.position.state {
            RunState::Running => return Ok(()),
            RunState::Queued | RunState::Preparing => {}
            RunState::Publishing | RunState::Succeeded | RunState::Failed | RunState::Cancelled => {
                return Err(too_late(&record));
            }
        }
        let from = StreamCursor { event: record.last_event, ..StreamCursor::default() };
        let options = StreamOptions { follow: true, logs: false };
        let mut events = self.service.stream(&self.caller, id, from, options).await?;
        while let Some(item) = events.next().await {
            match item?.body {
                StreamBody::Event(RunEvent::StateChanged { position, .. })
                    if position.state == RunState::Running =>
                {
                    return Ok(());
                }
                StreamBody::Event(RunEvent::Terminated { .. }) => return Err(too_late(&record)),
                StreamBody::Event(
                    RunEvent::StateChanged { .. } | RunEvent::Outputs(_) | RunEvent::Notice(_),
                )
                | StreamBody::Log { .. }
                | StreamBody::Progress(_)
                | StreamBody::KeepAlive => {}
            }
        }
        Err(too_late(&record))
    }
}

fn too_late(record: &RunRecord) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason: "NOT_RUNNING",
        message: format!("the program of run {} has ended; it takes no input any more", record.id),
    }
}

fn misplaced(field: &str, description: &str) -> Status {
    status::service(&ServiceError::field(field, "INVALID", description))
}
