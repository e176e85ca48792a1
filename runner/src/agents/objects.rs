//! Objects, between an agent and the store. Bytes stream through; memory does not grow with an object's size.

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt as _, stream, stream::BoxStream};
use runner_core::{
    artifact::{
        ArtifactError, ArtifactErrorKind, ArtifactKey, ByteStream, DirectAccess, DirectRequest, MANIFEST_NAME,
    },
    backend::AttemptContext,
    crash,
};
use runner_proto::agent as wire;
use tonic::{Code, Status, Streaming};

use super::{
    Direct,
    scope::{self, Readable},
};
use crate::metrics::Metrics;

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
pub(super) fn reading(size: u64, bytes: ByteStream, metrics: Arc<Metrics>) -> Reading {
    let first = wire::ReadObjectReply { size: Some(size), bytes: Bytes::new() };
    let rest = bytes.flat_map(move |chunk| {
        let pieces: Vec<_> = match chunk {
            Ok(mut chunk) => {
                metrics.agent_bytes("out", chunk.len() as u64);
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

/// A request to the store itself. Without a URL where the store permits none such.
pub(super) async fn sign(
    attempt: &AttemptContext,
    direct: &Direct,
    wire::SignObjectRequest { key, upload }: &wire::SignObjectRequest,
) -> Result<wire::SignObjectReply, Status> {
    let (key, access) = match upload {
        None => (readable(attempt, key).await?, DirectAccess::Read),
        Some(wire::Upload { size, sha256 }) => {
            if sha256.len() != 64 || !sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
                return Err(Status::invalid_argument("not a SHA-256 in lower-case hex"));
            }
            let sha256 = Some(sha256.clone());
            // What an interrupted publishing left is replaced.
            (writable(attempt, key)?, DirectAccess::Store { size: *size, sha256, only_new: false })
        }
    };
    let signed = direct.store.direct(&key, &access, direct.lifetime).await.map_err(failed)?;
    Ok(signed.map_or_else(wire::SignObjectReply::default, |DirectRequest { url, headers }| {
        wire::SignObjectReply { url, headers: headers.into_iter().collect() }
    }))
}

/// Stores an object. Nothing is stored where the stream ends before it says that it is whole.
pub(super) async fn write(
    attempt: &AttemptContext,
    mut pieces: Streaming<wire::WriteObjectRequest>,
    metrics: Arc<Metrics>,
) -> Result<u64, Status> {
    let first = pieces.message().await?.ok_or_else(|| Status::invalid_argument("nothing was sent"))?;
    let key = writable(attempt, &first.key)?;
    let state = (Some(first), pieces, false, metrics);
    let bytes = stream::unfold(state, |(ahead, mut pieces, over, metrics)| async move {
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
            Ok(Some(wire::WriteObjectRequest { bytes, last, .. })) => {
                metrics.agent_bytes("in", bytes.len() as u64);
                (Ok(bytes), (None, pieces, last, metrics))
            }
            Ok(None) => (cut_off("the object is not whole".to_owned()), (None, pieces, true, metrics)),
            Err(status) => (cut_off(status.message().to_owned()), (None, pieces, true, metrics)),
        })
    });
    let size = attempt.artifacts.put(&key, bytes.boxed()).await.map_err(failed)?;
    let prefix = ArtifactKey::attempt_prefix(&attempt.tenant, attempt.attempt);
    // Where the service may die: the same as beneath backends that stage in its process.
    let is_manifest = key.to_string() == format!("{prefix}/{MANIFEST_NAME}");
    crash::point(if is_manifest { "outputs.manifest-stored" } else { "outputs.file-stored" });
    Ok(size)
}
