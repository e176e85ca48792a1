//! Listing, which goes on behind the last name where it broke off.

use std::sync::Arc;

use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use object_store::{ObjectMeta, path::Path as ObjectPath};
use runner_core::artifact::{ArtifactError, ArtifactMeta};

use super::{Inner, failure::mapped, retry::Tries};

struct Listing {
    inner: Arc<Inner>,
    below: ObjectPath,
    doing: String,
    tries: Tries,
    /// The last name that was got: stores list in the order of names.
    last: Option<ObjectPath>,
    current: Option<BoxStream<'static, object_store::Result<ObjectMeta>>>,
    over: bool,
}

/// Every object below `below/`.
pub(super) fn list(
    inner: &Arc<Inner>,
    below: ObjectPath,
    doing: String,
) -> BoxStream<'static, Result<ArtifactMeta, ArtifactError>> {
    let listing = Listing {
        tries: Tries::new(&inner.tuning),
        inner: Arc::clone(inner),
        below,
        doing,
        last: None,
        current: None,
        over: false,
    };
    stream::unfold(listing, |mut listing| async move {
        let next = listing.next().await?;
        Some((next, listing))
    })
    .boxed()
}

impl Listing {
    async fn next(&mut self) -> Option<Result<ArtifactMeta, ArtifactError>> {
        if self.over {
            return None;
        }
        loop {
            let store = &self.inner.store;
            let (below, last) = (&self.below, &self.last);
            let current = self.current.get_or_insert_with(|| match last {
                None => store.list(Some(below)),
                Some(last) => store.list_with_offset(Some(below), last),
            });
            match current.next().await? {
                Ok(meta) => {
                    self.tries.progress();
                    let key = meta.location.as_ref().get(self.inner.prefix.len()..);
                    let key = key.and_then(|key| key.parse().ok());
                    let size = meta.size;
                    self.last = Some(meta.location);
                    // What is no key was not put there by us.
                    if let Some(key) = key {
                        return Some(Ok(ArtifactMeta { key, size }));
                    }
                }
                Err(error) => {
                    self.current = None;
                    if let Err(error) = self.tries.failed(error).await {
                        self.over = true;
                        return Some(Err(mapped(error, &self.doing, self.tries.made())));
                    }
                }
            }
        }
    }
}
