//! The input side of a run.

use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _, channel::mpsc};
use runner_proto::v1::{self as proto, attach_request::Message};

use crate::{
    client::Client,
    error::{ClientError, ErrorKind},
};

const DOING: &str = "attach to the run";
/// Messages that wait between the caller and the connection.
const QUEUE: usize = 4;
/// Largest piece of input in one message; small enough that a resize never waits long.
const MAX_PIECE_BYTES: usize = 64 << 10;

/// The open input side of a run: acknowledgements come here, input goes through [`Attachment::input`].
///
/// It does not survive a broken connection. What was taken over until then is known by [`Attachment::taken`]; a caller
/// that has the rest may attach again and go on from there.
#[derive(Debug)]
pub struct Attachment {
    input: AttachInput,
    answers: tonic::Streaming<proto::AttachResponse>,
    taken: u64,
}

/// Sends input. Clones share one order.
#[derive(Debug, Clone)]
pub struct AttachInput {
    requests: mpsc::Sender<proto::AttachRequest>,
}

pub(crate) async fn open(client: &Client, run_id: String) -> Result<Attachment, ClientError> {
    let (mut requests, queue) = mpsc::channel(QUEUE);
    let open = proto::AttachRequest { message: Some(Message::Open(proto::AttachOpen { run_id })) };
    requests.send(open).await.map_err(|_| closed())?;
    let mut grpc = client.runner();
    let response = tokio::time::timeout(client.call_timeout(), grpc.attach(queue))
        .await
        .map_err(|_| {
            ClientError::new(ErrorKind::DeadlineExceeded, DOING, "the service did not answer in time")
        })?
        .map_err(|e| ClientError::status(DOING, e))?;
    let mut attachment =
        Attachment { input: AttachInput { requests }, answers: response.into_inner(), taken: 0 };
    // As long as the run waits in the queue: only the caller knows how long that may be.
    match attachment.answer().await? {
        Some(first) if first.ready => Ok(attachment),
        Some(_) => Err(ClientError::new(ErrorKind::Protocol, DOING, "the first answer is not `ready`")),
        None => {
            Err(ClientError::new(ErrorKind::FailedPrecondition, DOING, "the run takes no input any more"))
        }
    }
}

fn closed() -> ClientError {
    ClientError::new(ErrorKind::FailedPrecondition, "send input to the run", "its input side is closed")
}

impl Attachment {
    /// A sender of input.
    pub fn input(&self) -> AttachInput {
        self.input.clone()
    }

    /// Bytes of input that the workload's side has taken over.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Waits for the next acknowledgement: the number of bytes taken over since the call began. `None` when the
    /// service has closed the input side, for example because the run ended. Cancel-safe.
    ///
    /// # Errors
    /// Where the connection broke or the service refused an input.
    pub async fn acknowledged(&mut self) -> Result<Option<u64>, ClientError> {
        Ok(self.answer().await?.map(|answer| answer.stdin_bytes_taken))
    }

    async fn answer(&mut self) -> Result<Option<proto::AttachResponse>, ClientError> {
        let answer = match self.answers.next().await {
            Some(answer) => answer.map_err(|e| ClientError::status(DOING, e))?,
            None => return Ok(None),
        };
        self.taken = self.taken.max(answer.stdin_bytes_taken);
        Ok(Some(answer))
    }
}

impl AttachInput {
    async fn send(&mut self, message: Message) -> Result<(), ClientError> {
        self.requests.send(proto::AttachRequest { message: Some(message) }).await.map_err(|_| closed())
    }

    /// Sends bytes for standard input. Waits while the workload does not read.
    ///
    /// # Errors
    /// [`ErrorKind::FailedPrecondition`] once the input side is closed; [`Attachment::acknowledged`] says why.
    pub async fn stdin(&mut self, bytes: impl Into<Bytes>) -> Result<(), ClientError> {
        let mut bytes = bytes.into();
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(MAX_PIECE_BYTES));
            self.send(Message::Stdin(piece)).await?;
        }
        Ok(())
    }

    /// Ends standard input.
    ///
    /// # Errors
    /// As [`AttachInput::stdin`].
    pub async fn eof(&mut self) -> Result<(), ClientError> {
        self.send(Message::Eof(proto::AttachEof {})).await
    }

    /// Tells the terminal's size.
    ///
    /// # Errors
    /// As [`AttachInput::stdin`].
    pub async fn resize(&mut self, columns: u32, rows: u32) -> Result<(), ClientError> {
        self.send(Message::Resize(proto::Terminal { columns, rows })).await
    }
}
