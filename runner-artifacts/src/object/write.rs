//! Writing: small objects in one request, larger ones in parts, several at once.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures::{
    FutureExt as _, StreamExt as _, TryStreamExt as _, future::BoxFuture, stream::FuturesUnordered,
};
use object_store::{
    MultipartId, ObjectStoreExt as _, PutPayload, multipart::PartId, path::Path as ObjectPath,
};
use runner_core::{
    artifact::{ArtifactError, ArtifactErrorKind, ArtifactKey, ByteStream},
    task::{TaskKind, spawn},
};

use super::{
    Inner,
    budget::Memory,
    failure::{Class, class, mapped},
    retry::{Tries, again, within},
};

/// Size of part `number`, from 0, in bytes. Stores take 10,000 parts of at least 5 MiB: these sizes reach 1.3 TiB.
const fn part_bytes(number: usize) -> usize {
    const MIB: usize = 1024 * 1024;
    match number {
        0..1000 => 8 * MIB,
        1000..5000 => 32 * MIB,
        _ => 256 * MIB,
    }
}

/// The longest that an abort is tried for.
const ABORT_TIME: Duration = Duration::from_secs(60);

pub(super) async fn put(
    inner: &Arc<Inner>,
    key: &ArtifactKey,
    bytes: ByteStream,
) -> Result<u64, ArtifactError> {
    let path = inner.path(key)?;
    let doing = format!("store {key}");
    let mut source = Source::new(bytes);
    let _slot = inner.budget.upload().await;
    source.fill(part_bytes(0)).await?;
    if source.ended {
        let whole = source.take();
        let size = whole.len() as u64;
        put_whole(inner, &path, &doing, whole).await?;
        return Ok(size);
    }
    let id = again(&inner.tuning, &doing, inner.tuning.limit(0), || async {
        let _slot = inner.budget.write().await;
        inner.parts.create_multipart(&path).await
    })
    .await?;
    let mut upload = Upload { inner: Arc::clone(inner), path, id, doing, over: false };
    match upload.run(&mut source).await {
        Ok(size) => Ok(size),
        Err(error) => {
            upload.over = true;
            abort(&upload.inner, &upload.path, &upload.id).await;
            Err(error)
        }
    }
}

/// Stores an object in one request.
pub(super) async fn put_whole(
    inner: &Inner,
    path: &ObjectPath,
    doing: &str,
    bytes: Bytes,
) -> Result<(), ArtifactError> {
    let size = bytes.len() as u64;
    inner.budget.sent(size).await;
    again(&inner.tuning, doing, inner.tuning.limit(size), || {
        let payload = PutPayload::from(bytes.clone());
        async move {
            let _slot = inner.budget.write().await;
            inner.store.put(path, payload).await.map(drop)
        }
    })
    .await
}

/// A stream of bytes, gathered into parts.
struct Source {
    bytes: ByteStream,
    part: BytesMut,
    left: Bytes,
    ended: bool,
}

impl Source {
    fn new(bytes: ByteStream) -> Self {
        Self { bytes, part: BytesMut::new(), left: Bytes::new(), ended: false }
    }

    /// Gathers up to `size` bytes; fewer, and `ended`, at the end. Nothing is lost where the future is dropped.
    async fn fill(&mut self, size: usize) -> Result<(), ArtifactError> {
        loop {
            let take = self.left.len().min(size - self.part.len());
            let taken = self.left.split_to(take);
            if self.part.is_empty() && self.part.capacity() < take {
                self.part.reserve(take);
            }
            self.part.extend_from_slice(&taken);
            if self.part.len() == size {
                return Ok(());
            }
            match self.bytes.try_next().await? {
                Some(chunk) => self.left = chunk,
                None => {
                    self.ended = true;
                    return Ok(());
                }
            }
        }
    }

    /// What was gathered.
    fn take(&mut self) -> Bytes {
        std::mem::take(&mut self.part).freeze()
    }
}

/// An upload in parts. Dropping it before it is over aborts it.
struct Upload {
    inner: Arc<Inner>,
    path: ObjectPath,
    id: MultipartId,
    doing: String,
    over: bool,
}

type Sending = BoxFuture<'static, Result<(usize, PartId), ArtifactError>>;

impl Upload {
    /// Sends what was gathered and everything that follows it, and completes. Answers the object's size.
    async fn run(&mut self, source: &mut Source) -> Result<u64, ArtifactError> {
        let mut sent: Vec<Option<PartId>> = Vec::new();
        let mut size = 0;
        let mut under_way: FuturesUnordered<Sending> = FuturesUnordered::new();
        // Memory of the part that is being gathered; the upload's own slot covers one part.
        let mut room: VecDeque<Memory> = VecDeque::new();
        let mut gathered = true;
        loop {
            if gathered {
                let bytes = source.take();
                if !bytes.is_empty() {
                    size += bytes.len() as u64;
                    under_way.push(self.send(sent.len(), bytes, room.pop_front()));
                    sent.push(None);
                }
                gathered = false;
            }
            if source.ended && under_way.is_empty() {
                break;
            }
            let next = part_bytes(sent.len());
            let may_gather = !source.ended
                && (under_way.is_empty()
                    || !room.is_empty()
                    || (under_way.len() < self.inner.tuning.parallel.max(1)
                        && self
                            .inner
                            .budget
                            .memory(next as u64)
                            .map(|memory| room.push_back(memory))
                            .is_some()));
            tokio::select! {
                // Parts on their way first: what they free, others can use.
                biased;
                Some(done) = under_way.next(), if !under_way.is_empty() => {
                    let (number, id) = done?;
                    sent[number] = Some(id);
                }
                filled = source.fill(next), if may_gather => {
                    filled?;
                    gathered = true;
                }
            }
        }
        let parts: Vec<PartId> = sent.into_iter().flatten().collect();
        self.complete(parts, size).await?;
        self.over = true;
        Ok(size)
    }

    fn send(&self, number: usize, bytes: Bytes, room: Option<Memory>) -> Sending {
        let (inner, path, id, doing) =
            (Arc::clone(&self.inner), self.path.clone(), self.id.clone(), self.doing.clone());
        async move {
            let _room = room;
            let size = bytes.len() as u64;
            inner.budget.sent(size).await;
            let part = again(&inner.tuning, &doing, inner.tuning.limit(size), || async {
                let _slot = inner.budget.write().await;
                inner.parts.put_part(&path, &id, number, bytes.clone().into()).await
            })
            .await?;
            Ok((number, part))
        }
        .boxed()
    }

    /// Makes the parts an object. An answer that was lost is looked for: a second try would find no upload any more.
    async fn complete(&self, parts: Vec<PartId>, size: u64) -> Result<(), ArtifactError> {
        let inner = &self.inner;
        let before = self.found().await?;
        let mut tries = Tries::new(&inner.tuning);
        loop {
            let completed = async {
                let _slot = inner.budget.write().await;
                inner.parts.complete_multipart(&self.path, &self.id, parts.clone()).await
            };
            let error = match within(inner.tuning.limit(size), completed).await {
                Ok(_) => break,
                Err(error) => error,
            };
            // There is no such upload any more, and a new object is there: an earlier try has done it.
            if class(&error) == Class::NotFound
                && let Some(now) = self.found().await?
                && now.size == size
                && before.as_ref().is_none_or(|old| !same(old, &now))
            {
                break;
            }
            if let Err(error) = tries.failed(error).await {
                return Err(mapped(error, &self.doing, tries.made()));
            }
        }
        Ok(())
    }

    /// What has the object's name now.
    async fn found(&self) -> Result<Option<object_store::ObjectMeta>, ArtifactError> {
        match self.inner.head(&self.path, &self.doing).await {
            Ok(meta) => Ok(Some(meta)),
            Err(error) if error.kind == ArtifactErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Whether two answers are about one version of an object.
fn same(old: &object_store::ObjectMeta, new: &object_store::ObjectMeta) -> bool {
    old.e_tag == new.e_tag && old.last_modified == new.last_modified && old.version == new.version
}

impl Drop for Upload {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let (inner, path, id) = (Arc::clone(&self.inner), self.path.clone(), self.id.clone());
        // A destructor cannot wait. Without a runtime, the store's own rule for abandoned uploads remains.
        if tokio::runtime::Handle::try_current().is_ok() {
            spawn(TaskKind::Helper, "abort-upload", async move { abort(&inner, &path, &id).await });
        }
    }
}

async fn abort(inner: &Inner, path: &ObjectPath, id: &MultipartId) {
    let aborted = again(&inner.tuning, "abort an upload", inner.tuning.limit(0), || async {
        let _slot = inner.budget.write().await;
        match inner.parts.abort_multipart(path, id).await {
            // Aborted before, by a try whose answer was lost.
            Err(error) if class(&error) == Class::NotFound => Ok(()),
            done => done,
        }
    });
    match tokio::time::timeout(ABORT_TIME, aborted).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(%path, %error, "an upload could not be aborted; the store's rule for abandoned ones remains");
        }
        Err(_) => {
            tracing::warn!(%path, "an upload could not be aborted in time; the store's rule for abandoned ones remains");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_reach_past_the_largest_output() {
        let total: u64 = (0..10_000).map(|number| part_bytes(number) as u64).sum();
        assert!(total > 1 << 40);
        assert!(part_bytes(0) as u64 >= 5 * super::super::MIB, "no store takes smaller ones");
    }
}
