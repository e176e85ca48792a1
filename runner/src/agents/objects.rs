//! Objects, between an agent and the store. Bytes stream through; memory does not grow with an object's size.

use bytes::Bytes;
use futures::{StreamExt as _, stream, stream::BoxStream};
use runner_core::{
    artifact::{ArtifactError, ArtifactErrorKind, ArtifactKey, ByteStream, MANIFEST_NAME},
    backend::AttemptContext,
    crash,
};
use runner_proto::agent as wire;
use tonic::{Code, Status, Streaming};

use super::scope::{self, Readable};

/// Bytes of one message.
const PIECE: usize = 256 * 1024;

/// An object on its way to an agent.
pub(super) type Reading = BoxStream<'static, Result<wire::ReadObjectReply, Status>>;

/// A failure of the store. `runner_agent::pod::store` reads the code back.
pub(super) fn failed(error: ArtifactError) -> Status {
    let code = match error.kind {
        ArtifactErrorKind::NotFound => Code::NotFound,
        ArtifactErrorKind::Mismatch => Code::DataLoss,
        ArtifactErrorKind::LimitExceeded => Code::OutOfRange,
        ArtifactErrorKind::Denied => Code::PermissionDenied,
        ArtifactErrorKind::Full => Code::ResourceExhausted,
        ArtifactErrorKind::Unavailable => Code::Aborted,
        ArtifactErrorKind::Other => Code::Internal,
    };
    tracing::debug!(error = %error, "an agent's request of the store failed");
    Status::new(code, error.to_string())
}

fn parse(key: &str) -> Result<ArtifactKey, Status> {
    key.parse().map_err(|_| Status::invalid_argument("not a key"))
}

fn denied() -> Status {
    Status::permission_denied("the object is not of this attempt")
}

/// The key, where the attempt may read it.
pub(super) async fn readable(attempt: &AttemptContext, key: &str) -> Result<ArtifactKey, Status> {
    let key = parse(key)?;
    match scope::may_read(attempt, &key) {
        Readable::Yes => Ok(key),
        Readable::IfNamed if scope::named(attempt).await.map_err(failed)?.contains(&key) => Ok(key),
        Readable::IfNamed | Readable::No => {
            tracing::warn!(attempt = %attempt.attempt, %key, "an agent asked for an object that is not its own");
            Err(denied())
        }
    }
}

/// The key, where the attempt may write it.
pub(super) fn writable(attempt: &AttemptContext, key: &str) -> Result<ArtifactKey, Status> {
    let key = parse(key)?;
    if scope::may_write(attempt, &key) {
        return Ok(key);
    }
    tracing::warn!(attempt = %attempt.attempt, %key, "an agent would write an object that is not its own");
    Err(denied())
}

/// The messages of an object that is read.
pub(super) fn reading(size: u64, bytes: ByteStream) -> Reading {
    let first = wire::ReadObjectReply { size: Some(size), bytes: Bytes::new() };
    let rest = bytes.flat_map(|chunk| {
        let pieces: Vec<_> = match chunk {
            Ok(mut chunk) => {
                let mut pieces = Vec::new();
                while !chunk.is_empty() {
                    let bytes = chunk.split_to(chunk.len().min(PIECE));
                    pieces.push(Ok(wire::ReadObjectReply { size: None, bytes }));
                }
                pieces
            }
            Err(error) => vec![Err(failed(error))],
        };
        stream::iter(pieces)
    });
    stream::iter([Ok(first)]).chain(rest).boxed()
}

/// Stores an object. Nothing is stored where the stream ends before it says that it is whole.
pub(super) async fn write(
    attempt: &AttemptContext,
    mut pieces: Streaming<wire::WriteObjectRequest>,
) -> Result<u64, Status> {
    let first = pieces.message().await?.ok_or_else(|| Status::invalid_argument("nothing was sent"))?;
    let key = writable(attempt, &first.key)?;
    let state = (Some(first), pieces, false);
    let bytes = stream::unfold(state, |(ahead, mut pieces, over)| async move {
        if over {
            return None;
        }
        let piece = match ahead {
            Some(piece) => Ok(Some(piece)),
            None => pieces.message().await,
        };
        let cut_off = |why: String| {
            Err(ArtifactError::new(ArtifactErrorKind::Unavailable, format!("the agent was cut off: {why}")))
        };
        Some(match piece {
            Ok(Some(wire::WriteObjectRequest { bytes, last, .. })) => (Ok(bytes), (None, pieces, last)),
            Ok(None) => (cut_off("the object is not whole".to_owned()), (None, pieces, true)),
            Err(status) => (cut_off(status.message().to_owned()), (None, pieces, true)),
        })
    });
    let size = attempt.artifacts.put(&key, bytes.boxed()).await.map_err(failed)?;
    let prefix = ArtifactKey::attempt_prefix(&attempt.tenant, attempt.attempt);
    // Where the service may die: the same as beneath backends that stage in its process.
    let is_manifest = key.to_string() == format!("{prefix}/{MANIFEST_NAME}");
    crash::point(if is_manifest { "outputs.manifest-stored" } else { "outputs.file-stored" });
    Ok(size)
}
