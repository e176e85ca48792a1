//! The link to a container's shim: live copies of its log, and requests to it.
//!
//! Whoever attaches to a container and does not read holds up everybody else's copy, in the engine. So a task of its own
//! reads what comes, always; what an observer does not take in time is left out, which the offsets show.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::StreamExt as _;
use runner_agent::exec::{
    link::{LinkDecoder, LinkPacket, LinkReply, LinkRequest, encode_request},
    protocol::{ControlReply, ControlRequest, ExitRecord, StartedRecord},
};
use runner_core::{
    log::Frame,
    task::{TaskKind, spawn},
};
use tokio::{
    io::AsyncWriteExt as _,
    sync::{Notify, mpsc},
    task::AbortHandle,
};

use crate::engine::{Attached, Engine, EngineError};

/// Log bytes that wait for an observer. Beyond it copies are left out.
const MAX_WAITING: usize = 8 * 1024 * 1024;
/// A shim that takes longer to answer may be dead.
const SUSPICIOUS: Duration = Duration::from_millis(200);
/// Replies that may wait for who asked.
const REPLIES: usize = 16;

/// What has come and was not taken.
#[derive(Debug, Default)]
struct Waiting {
    frames: VecDeque<Frame>,
    bytes: usize,
    started: Option<StartedRecord>,
    ended: Option<ExitRecord>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    changed: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection to a container's streams. Ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Live {
    shared: Arc<Shared>,
    reader: AbortHandle,
    /// Attached before the container was started: nothing came before.
    pub(crate) from_the_start: bool,
}

impl Drop for Live {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Live {
    /// Listens to a container.
    ///
    /// # Errors
    /// The engine's.
    pub(crate) async fn attach(
        engine: &Engine,
        name: &str,
        from_the_start: bool,
    ) -> Result<Self, EngineError> {
        let attached = engine.attach(name, false).await?;
        let shared = Arc::<Shared>::default();
        let reader = spawn(TaskKind::Helper, "dind.live", read(attached, Arc::clone(&shared), None));
        Ok(Self { shared, reader: reader.abort_handle(), from_the_start })
    }

    /// When the program was started, where that was heard.
    pub(crate) fn started(&self) -> Option<StartedRecord> {
        self.shared.lock().started.clone()
    }

    /// How it ended, where that was heard.
    pub(crate) fn ended(&self) -> Option<ExitRecord> {
        self.shared.lock().ended.clone()
    }

    /// Whether nothing more will come.
    pub(crate) fn is_closed(&self) -> bool {
        self.shared.lock().closed
    }

    /// Offset of the next frame that waits.
    pub(crate) fn next_offset(&self) -> Option<u64> {
        self.shared.lock().frames.front().map(|frame| frame.offset)
    }

    /// Takes the frames that go on from `position`, up to about `max_bytes`. What is before it is dropped; what comes after a
    /// gap stays.
    pub(crate) fn take(&self, mut position: u64, max_bytes: usize) -> Vec<Frame> {
        let mut waiting = self.shared.lock();
        let mut taken = Vec::new();
        let mut bytes = 0;
        while let Some(frame) = waiting.frames.front()
            && frame.offset <= position
            && bytes < max_bytes
        {
            let Some(frame) = waiting.frames.pop_front() else { break };
            let size = size(&frame);
            waiting.bytes -= size;
            if let Some(frame) = frame.from_offset(position) {
                position = frame.end();
                bytes += size;
                taken.push(frame);
            }
        }
        taken
    }

    /// Waits for anything to come, for at most `patience`.
    pub(crate) async fn changed(&self, patience: Duration) {
        // A permit is kept where nobody waits, so nothing that came since the last look is missed.
        let _ = tokio::time::timeout(patience, self.shared.changed.notified()).await;
    }
}

/// What a frame takes of memory, about.
fn size(frame: &Frame) -> usize {
    match &frame.body {
        runner_core::log::FrameBody::Data { bytes, .. } => bytes.len() + 64,
        runner_core::log::FrameBody::Truncated { reason, .. } => reason.len() + 64,
    }
}

async fn read(attached: Attached, shared: Arc<Shared>, replies: Option<mpsc::Sender<LinkReply>>) {
    let Attached { mut output, input } = attached;
    let mut decoder = LinkDecoder::default();
    while let Some(Ok(bytes)) = output.next().await {
        decoder.push(&bytes);
        let mut news = false;
        while let Some(packet) = decoder.next_packet() {
            match packet {
                LinkPacket::Reply(reply) => {
                    if let Some(replies) = &replies {
                        // One that nobody waits for is dropped.
                        let _ = replies.try_send(reply);
                    }
                }
                _ if replies.is_some() => {}
                LinkPacket::Frame(frame) => {
                    let mut waiting = shared.lock();
                    let size = size(&frame);
                    if waiting.bytes + size <= MAX_WAITING {
                        waiting.bytes += size;
                        waiting.frames.push_back(frame);
                    }
                    news = true;
                }
                LinkPacket::Started(started) => {
                    shared.lock().started = Some(started);
                    news = true;
                }
                LinkPacket::Ended(ended) => {
                    shared.lock().ended = Some(ended);
                    news = true;
                }
            }
        }
        if news {
            shared.changed.notify_one();
        }
    }
    drop(input);
    shared.lock().closed = true;
    shared.changed.notify_one();
}

/// Why a request got no answer from the shim.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    /// The engine did not let it through.
    #[error("{0}")]
    Engine(#[from] EngineError),
    /// The container's streams are closed: its shim is gone.
    #[error("the shim is gone")]
    Gone,
    /// No answer came in time. Whether the request took effect is not known.
    #[error("no answer in {0:?}")]
    Deadline(Duration),
}

/// Makes one request of a container's shim and waits for its answer. The connection lives no longer than that.
///
/// # Errors
/// See [`RequestError`].
pub(crate) async fn request(
    engine: &Engine,
    name: &str,
    request: ControlRequest,
    patience: Duration,
) -> Result<ControlReply, RequestError> {
    // Unique within the process; a reply of another process's request would need the same number at the same moment.
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let id = NEXT.fetch_add(1, Ordering::Relaxed) ^ u64::from(std::process::id()) << 40;
    let line = encode_request(&LinkRequest { id, request }).map_err(EngineError::malformed)?;
    let exchange = async {
        let Attached { output, mut input } = engine.attach(name, true).await?;
        let (sender, mut replies) = mpsc::channel(REPLIES);
        let silent: std::pin::Pin<Box<dyn tokio::io::AsyncWrite + Send>> = Box::pin(tokio::io::sink());
        let reading = read(Attached { output, input: silent }, Arc::default(), Some(sender));
        // Read from the beginning: a reply must find its reader.
        let reader = spawn(TaskKind::Helper, "dind.request", reading);
        let _ended = AbortOnDrop(reader.abort_handle());
        if input.write_all(&line).await.is_err() || input.flush().await.is_err() {
            return Err(RequestError::Gone);
        }
        while let Some(reply) = replies.recv().await {
            if reply.id == id {
                return Ok(reply.reply);
            }
        }
        Err(RequestError::Gone)
    };
    // An engine lets one attach to a container that has ended, and then says nothing.
    let death = async {
        tokio::time::sleep(SUSPICIOUS).await;
        engine.wait(name).await
    };
    let answered = async {
        tokio::select! {
            biased;
            reply = exchange => reply,
            ended = death => Err(ended.map_or_else(RequestError::Engine, |()| RequestError::Gone)),
        }
    };
    tokio::time::timeout(patience, answered).await.unwrap_or(Err(RequestError::Deadline(patience)))
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
