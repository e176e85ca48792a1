//! `Stream`: what a watcher is sent, as it asks for it.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use futures::{Stream, StreamExt as _, stream::BoxStream};
use runner_core::service::{ServiceError, StreamItem};
use runner_proto::v1;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::Status;

use crate::{convert::stream::Messages, status};

/// A watcher. It pulls: what waits for a reader that does not read is one frame here, and the connection's own buffer.
pub struct Watching {
    items: BoxStream<'static, Result<StreamItem, ServiceError>>,
    messages: Option<Messages>,
    draining: CancellationToken,
    drained: Pin<Box<WaitForCancellationFutureOwned>>,
    done: bool,
}

impl Watching {
    /// Sends `items`, and ends with a status that says so when `draining` is cancelled.
    pub(super) fn new(
        items: BoxStream<'static, Result<StreamItem, ServiceError>>,
        draining: CancellationToken,
    ) -> Self {
        let drained = Box::pin(draining.clone().cancelled_owned());
        Self { items, messages: None, draining, drained, done: false }
    }
}

impl Stream for Watching {
    type Item = Result<v1::StreamResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if this.done {
            return Poll::Ready(None);
        }
        loop {
            // A frame is a few messages; those of one that was begun are sent to its end.
            if let Some(message) = this.messages.as_mut().and_then(Iterator::next) {
                return Poll::Ready(Some(Ok(message)));
            }
            // Asked first, because a long replay has always one more item.
            if this.draining.is_cancelled() {
                this.done = true;
                return Poll::Ready(Some(Err(status::shutting_down())));
            }
            match this.items.poll_next_unpin(cx) {
                Poll::Ready(Some(Ok(item))) => this.messages = Some(item.into()),
                Poll::Ready(Some(Err(error))) => {
                    this.done = true;
                    return Poll::Ready(Some(Err(status::service(&error))));
                }
                Poll::Ready(None) => {
                    this.done = true;
                    return Poll::Ready(None);
                }
                Poll::Pending => {
                    if this.drained.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                }
            }
        }
    }
}
