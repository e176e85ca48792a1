//! The object store as an agent sees it, as far as its attempt's objects go: through the service, and past it where the store
//! permits that and the object is worth it.

use std::{ops::Range, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, stream, stream::BoxStream};
use runner_core::artifact::{
    ArtifactError, ArtifactErrorKind, ArtifactKey, ArtifactMeta, ArtifactStore, ByteStream, KnownObject,
};
use runner_proto::agent::{DeleteObjectRequest, HeadObjectRequest, ReadObjectRequest, WriteObjectRequest};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tonic::{Code, Status};

use super::{client::Service, direct::Direct};

/// Bytes of one message.
const PIECE: usize = 256 * 1024;
/// Messages that may wait to be sent.
const AHEAD: usize = 2;
/// How long a small call may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// A transfer that moves nothing for so long has failed.
const STALL: Duration = Duration::from_secs(120);

/// The store.
#[derive(Debug, Clone)]
pub(super) struct RemoteStore {
    pub(super) service: Service,
    /// The way past the service, where there is one.
    pub(super) direct: Option<Arc<Direct>>,
}

/// What a status means. `runner::agents::objects` makes the codes.
fn failed(what: String, status: Status) -> ArtifactError {
    let kind = match status.code() {
        Code::NotFound => ArtifactErrorKind::NotFound,
        Code::DataLoss => ArtifactErrorKind::Mismatch,
        Code::OutOfRange => ArtifactErrorKind::LimitExceeded,
        Code::PermissionDenied | Code::Unauthenticated => ArtifactErrorKind::Denied,
        Code::ResourceExhausted => ArtifactErrorKind::Full,
        Code::Internal | Code::InvalidArgument | Code::Unimplemented => ArtifactErrorKind::Other,
        // `Aborted` is the store's own, the others the connection's.
        Code::Aborted
        | Code::Unavailable
        | Code::Unknown
        | Code::Cancelled
        | Code::DeadlineExceeded
        | Code::AlreadyExists
        | Code::FailedPrecondition
        | Code::Ok => ArtifactErrorKind::Unavailable,
    };
    ArtifactError::new(kind, format!("{what}: {}", status.message()))
}

fn stalled(what: &str) -> ArtifactError {
    ArtifactError::new(ArtifactErrorKind::Unavailable, format!("{what}: nothing moved for {STALL:?}"))
}

impl RemoteStore {
    async fn send(&self, key: &ArtifactKey, mut bytes: ByteStream) -> Result<u64, ArtifactError> {
        let what = format!("store {key}");
        let (sender, messages) = mpsc::channel(AHEAD);
        let outgoing = stream::unfold(messages, |mut messages| async move {
            messages.recv().await.map(|message| (message, messages))
        });
        let request = self.service.request(outgoing);
        let mut client = self.service.client();
        let calling = client.write_object(request);
        let first = key.to_string();
        let feeding = async move {
            let message = |key: String, bytes, last| WriteObjectRequest { key, bytes, last };
            // Where nobody takes messages any more the call has ended, and says why.
            if sender.send(message(first, Bytes::new(), false)).await.is_err() {
                return Ok(());
            }
            while let Some(chunk) = bytes.next().await {
                let mut chunk = chunk?;
                while !chunk.is_empty() {
                    let piece = chunk.split_to(chunk.len().min(PIECE));
                    match tokio::time::timeout(STALL, sender.send(message(String::new(), piece, false))).await
                    {
                        Ok(Ok(())) => {}
                        Ok(Err(_)) => return Ok(()),
                        Err(_) => return Err(stalled("send")),
                    }
                }
            }
            let _ = sender.send(message(String::new(), Bytes::new(), true)).await;
            Ok(())
        };
        // Both at once; what fails first ends the other, and an unfinished stream stores nothing.
        let calling = async { calling.await.map_err(|status| failed(what, status)) };
        let (reply, ()) = futures::future::try_join(calling, feeding).await?;
        Ok(reply.into_inner().size)
    }
}

#[async_trait]
impl ArtifactStore for RemoteStore {
    async fn put(&self, key: &ArtifactKey, bytes: ByteStream) -> Result<u64, ArtifactError> {
        self.send(key, bytes).await
    }

    async fn put_bytes(&self, key: &ArtifactKey, bytes: Bytes) -> Result<(), ArtifactError> {
        let size = bytes.len() as u64;
        if self.prefers_known(size) {
            let sha256 = hex::encode(Sha256::digest(&bytes));
            let bytes = bytes.clone();
            let open = Arc::new(move || stream::iter([Ok(bytes.clone())]).boxed());
            if self.put_known(key, &KnownObject { size, sha256, open }).await? {
                return Ok(());
            }
        }
        self.send(key, stream::iter([Ok(bytes)]).boxed()).await.map(drop)
    }

    fn prefers_known(&self, size: u64) -> bool {
        self.direct.as_ref().is_some_and(|direct| direct.stores(size))
    }

    async fn put_known(&self, key: &ArtifactKey, object: &KnownObject) -> Result<bool, ArtifactError> {
        match &self.direct {
            Some(direct) => direct.put(key, object).await,
            None => Ok(false),
        }
    }

    async fn get(
        &self,
        key: &ArtifactKey,
        range: Range<u64>,
    ) -> Result<(ArtifactMeta, ByteStream), ArtifactError> {
        // Who reads no more than so much reads a small document: one trip by the service, not two.
        if let Some(direct) = &self.direct
            && range.end == u64::MAX
            && let Some((size, bytes)) = direct.get(key, range.clone()).await
        {
            return Ok((ArtifactMeta { key: key.clone(), size }, bytes));
        }
        let what = format!("read {key}");
        let request = self.service.request(ReadObjectRequest {
            key: key.to_string(),
            from: range.start,
            to: range.end,
        });
        let opening = async {
            let mut messages = self.service.client().read_object(request).await?.into_inner();
            let first = messages.message().await?;
            Ok::<_, Status>((first, messages))
        };
        let opened = tokio::time::timeout(STALL, opening).await.map_err(|_| stalled(&what))?;
        let (first, messages) = opened.map_err(|status| failed(what.clone(), status))?;
        let size = first.and_then(|first| first.size).ok_or_else(|| {
            ArtifactError::new(ArtifactErrorKind::Other, format!("{what}: the answer does not say its size"))
        })?;
        let bytes = stream::unfold(Some((messages, what)), |state| async move {
            let (mut messages, what) = state?;
            match tokio::time::timeout(STALL, messages.message()).await {
                Ok(Ok(Some(message))) => Some((Ok(message.bytes), Some((messages, what)))),
                Ok(Ok(None)) => None,
                Ok(Err(status)) => Some((Err(failed(what, status)), None)),
                Err(_) => Some((Err(stalled(&what)), None)),
            }
        });
        Ok((ArtifactMeta { key: key.clone(), size }, bytes.boxed()))
    }

    async fn head(&self, key: &ArtifactKey) -> Result<ArtifactMeta, ArtifactError> {
        let mut request = self.service.request(HeadObjectRequest { key: key.to_string() });
        request.set_timeout(CALL_TIMEOUT);
        let reply = self.service.client().head_object(request).await;
        let reply = reply.map_err(|status| failed(format!("look up {key}"), status))?;
        Ok(ArtifactMeta { key: key.clone(), size: reply.get_ref().size })
    }

    /// Nobody stages by listing.
    fn list(&self, prefix: &ArtifactKey) -> BoxStream<'static, Result<ArtifactMeta, ArtifactError>> {
        let context = format!("list {prefix}: an agent reads and writes objects that it knows");
        stream::iter([Err(ArtifactError::new(ArtifactErrorKind::Denied, context))]).boxed()
    }

    async fn delete(&self, key: &ArtifactKey) -> Result<(), ArtifactError> {
        let mut request = self.service.request(DeleteObjectRequest { key: key.to_string() });
        request.set_timeout(CALL_TIMEOUT);
        let reply = self.service.client().delete_object(request).await;
        reply.map(drop).map_err(|status| failed(format!("delete {key}"), status))
    }

    /// The service probes its store itself.
    async fn probe(&self) -> Result<(), ArtifactError> {
        Err(ArtifactError::new(ArtifactErrorKind::Denied, "probe: an agent does not"))
    }
}
