//! Reading: small objects in one request, larger ones in ranges, several at once.

use std::{ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{
    StreamExt as _, TryStreamExt as _,
    stream::{self, BoxStream},
};
use object_store::{GetOptions, GetRange, GetResult, ObjectMeta, path::Path as ObjectPath};
use runner_core::artifact::{ArtifactError, ArtifactErrorKind, ArtifactKey, ArtifactMeta, ByteStream};

use super::{
    Inner, MIB,
    budget::Memory,
    failure::{Replaced, TooSlow, mapped},
    retry::{Tries, again, within},
};

/// What the first request asks for, in bytes. An object of this size is read by one request, as it comes.
const FIRST: u64 = 16 * MIB;
/// A range that is read ahead, in bytes: it is in memory until the reader takes it.
const AHEAD: u64 = 8 * MIB;
/// After so many bytes, the tries of a read begin again.
const PROGRESS: u64 = MIB;

pub(super) async fn get(
    inner: &Arc<Inner>,
    key: &ArtifactKey,
    range: Range<u64>,
) -> Result<(ArtifactMeta, ByteStream), ArtifactError> {
    let path = inner.path(key)?;
    let doing = format!("read {key}");
    let empty = |size| Ok((ArtifactMeta { key: key.clone(), size }, stream::empty().boxed()));
    if range.start >= range.end {
        return empty(inner.head(&path, &doing).await?.size);
    }
    let wanted = range.start..range.end.min(range.start.saturating_add(FIRST));
    let opened = open(inner, &path, &doing, wanted.clone()).await;
    let first = match opened {
        Ok(first) => first,
        // Stores answer a range behind the end, such as any of an empty object, each in their own way.
        Err(error) if matches!(error.kind, ArtifactErrorKind::Other | ArtifactErrorKind::Unavailable) => {
            let size = inner.head(&path, &doing).await?.size;
            return if size <= range.start { empty(size) } else { Err(error) };
        }
        Err(error) => return Err(error),
    };
    let meta = first.meta.clone();
    let end = range.end.min(meta.size);
    let object = Object { inner: Arc::clone(inner), path, doing, meta: Arc::new(meta) };
    let answer = ArtifactMeta { key: key.clone(), size: object.meta.size };
    let here = first.range.end.min(end);
    let direct = object.direct(range.start..here, Some(first));
    if here >= end {
        return Ok((answer, direct));
    }
    // Nothing is asked for before the reader comes to it.
    let rest = stream::once(async move { object.ahead(here..end) }).flatten();
    Ok((answer, direct.chain(rest).boxed()))
}

/// The first request, tried again as often as any.
async fn open(
    inner: &Inner,
    path: &ObjectPath,
    doing: &str,
    range: Range<u64>,
) -> Result<GetResult, ArtifactError> {
    again(&inner.tuning, doing, inner.tuning.limit(0), || {
        let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
        inner.store.get_opts(path, options)
    })
    .await
}

/// One version of an object.
#[derive(Clone)]
struct Object {
    inner: Arc<Inner>,
    path: ObjectPath,
    doing: String,
    meta: Arc<ObjectMeta>,
}

impl Object {
    /// Asks for a range of this version, and of no other.
    async fn ask(&self, range: Range<u64>) -> object_store::Result<GetResult> {
        let options = GetOptions {
            range: Some(GetRange::Bounded(range)),
            if_match: self.meta.e_tag.clone(),
            ..GetOptions::default()
        };
        let result = self.inner.store.get_opts(&self.path, options).await?;
        // Not every store that speaks S3 minds the condition.
        if result.meta.e_tag != self.meta.e_tag || result.meta.size != self.meta.size {
            return Err(Replaced.into_error(&self.path));
        }
        Ok(result)
    }

    /// The range as it comes, in one request, which is made again from where it broke off.
    fn direct(&self, range: Range<u64>, opened: Option<GetResult>) -> ByteStream {
        let state = Direct {
            tries: Tries::new(&self.inner.tuning),
            object: self.clone(),
            at: range.start,
            end: range.end,
            current: opened.map(GetResult::into_stream),
            waited: Duration::ZERO,
            got: 0,
            since_failure: 0,
        };
        let chunks = stream::try_unfold(state, |mut state| async move {
            Ok(state.next().await?.map(|chunk| (chunk, state)))
        });
        in_small_chunks(chunks).boxed()
    }

    /// The range in pieces that are read ahead, as many as memory permits; where it permits none, as it comes.
    fn ahead(self, range: Range<u64>) -> ByteStream {
        let inner = Arc::clone(&self.inner);
        let pieces = (range.end - range.start).div_ceil(AHEAD);
        let most = u64::try_from(inner.tuning.parallel).unwrap_or(1).min(pieces);
        let mut room: Vec<Memory> = Vec::new();
        while (room.len() as u64) < most
            && let Some(memory) = inner.budget.memory(AHEAD)
        {
            room.push(memory);
        }
        if room.len() < 2 {
            return self.direct(range, None);
        }
        let width = room.len();
        let object = self;
        let starts = (0..pieces).map(move |piece| range.start + piece * AHEAD);
        let end = range.end;
        let pieces = stream::iter(starts)
            .map(move |start| {
                let object = object.clone();
                async move { object.piece(start..end.min(start + AHEAD)).await }
            })
            // One fewer than there is room for: the reader still has the piece before.
            .buffered(width - 1)
            .inspect(move |_| {
                // Held until the stream ends.
                let _ = &room;
            });
        in_small_chunks(pieces).boxed()
    }

    /// A piece, whole in memory.
    async fn piece(&self, range: Range<u64>) -> Result<Bytes, ArtifactError> {
        let inner = &self.inner;
        let size = range.end - range.start;
        let bytes = again(&inner.tuning, &self.doing, inner.tuning.limit(size), || async {
            let _slot = inner.budget.read().await;
            self.ask(range.clone()).await?.bytes().await
        })
        .await?;
        inner.budget.got(size).await;
        Ok(bytes)
    }
}

/// A range that is read as it comes.
struct Direct {
    object: Object,
    at: u64,
    end: u64,
    current: Option<BoxStream<'static, object_store::Result<Bytes>>>,
    tries: Tries,
    /// Of the current request: time that the store, not the reader, took, and what came.
    waited: Duration,
    got: u64,
    since_failure: u64,
}

impl Direct {
    async fn next(&mut self) -> Result<Option<Bytes>, ArtifactError> {
        loop {
            if self.at >= self.end {
                return Ok(None);
            }
            match self.try_next().await {
                Ok(chunk) if chunk.is_empty() => {}
                Ok(mut chunk) => {
                    let length = (chunk.len() as u64).min(self.end - self.at);
                    chunk.truncate(usize::try_from(length).unwrap_or(usize::MAX));
                    self.at += length;
                    self.since_failure += length;
                    if self.since_failure >= PROGRESS {
                        self.tries.progress();
                    }
                    self.object.inner.budget.got(length).await;
                    return Ok(Some(chunk));
                }
                Err(error) => {
                    self.current = None;
                    self.since_failure = 0;
                    if let Err(error) = self.tries.failed(error).await {
                        return Err(mapped(error, &self.object.doing, self.tries.made()));
                    }
                }
            }
        }
    }

    async fn try_next(&mut self) -> object_store::Result<Bytes> {
        let inner = Arc::clone(&self.object.inner);
        let tuning = &inner.tuning;
        if self.current.is_none() {
            let asked = self.object.ask(self.at..self.end);
            self.current = Some(within(tuning.limit(0), asked).await?.into_stream());
            self.waited = Duration::ZERO;
            self.got = 0;
        }
        let Some(current) = &mut self.current else { return Ok(Bytes::new()) };
        let before = inner.clock.monotonic();
        let next = within(tuning.stall_timeout, async { current.next().await.transpose() }).await?;
        self.waited += inner.clock.monotonic().saturating_sub(before);
        let Some(chunk) = next else {
            let cut = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
            return Err(object_store::Error::Generic { store: "read", source: cut.into() });
        };
        self.got += chunk.len() as u64;
        let allowed = tuning.stall_timeout + Duration::from_secs(self.got / tuning.min_bytes_per_sec.max(1));
        if self.waited > allowed {
            return Err(TooSlow(self.waited).into_error());
        }
        Ok(chunk)
    }
}

/// A store may yield an object in one piece; whoever takes the stream counts on small ones.
fn in_small_chunks(
    chunks: impl futures::Stream<Item = Result<Bytes, ArtifactError>> + Send + 'static,
) -> impl futures::Stream<Item = Result<Bytes, ArtifactError>> + Send + 'static {
    chunks
        .map_ok(|chunk| {
            let step = usize::try_from(MIB).unwrap_or(usize::MAX);
            let cuts = (0..chunk.len()).step_by(step);
            stream::iter(cuts.map(move |at| Ok(chunk.slice(at..chunk.len().min(at + step)))))
        })
        .try_flatten()
}

#[cfg(test)]
mod tests {
    use super::{
        super::failure::{Class, class},
        *,
    };

    #[test]
    fn a_replaced_object_is_told_from_one_that_is_gone() {
        let path = ObjectPath::from("a");
        assert_eq!(class(&Replaced.into_error(&path)), Class::Replaced);
        assert_eq!(mapped(Replaced.into_error(&path), "read a", 1).kind, ArtifactErrorKind::Mismatch);
    }
}
