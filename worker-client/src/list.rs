//! The caller's runs, page by page.

use std::{collections::HashMap, time::SystemTime};

use futures::{Stream, TryStreamExt as _, stream};
use runner_proto::v1 as proto;

use crate::{client::Client, convert, error::ClientError, retry};

/// Which runs are listed. All that are given must hold.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ListFilter {
    request: proto::ListRequest,
}

impl ListFilter {
    /// In one of the states that were named.
    #[must_use]
    pub fn state(mut self, state: proto::RunState) -> Self {
        self.request.states.push(state.into());
        self
    }

    /// On this backend.
    #[must_use]
    pub fn backend(mut self, name: impl Into<String>) -> Self {
        self.request.backend = name.into();
        self
    }

    /// With this label.
    #[must_use]
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.labels.insert(key.into(), value.into());
        self
    }

    /// With these labels.
    #[must_use]
    pub fn labels(mut self, labels: HashMap<String, String>) -> Self {
        self.request.labels.extend(labels);
        self
    }

    /// Created at or after this time.
    #[must_use]
    pub fn created_after(mut self, time: SystemTime) -> Self {
        self.request.created_after = Some(convert::time_to_proto(time));
        self
    }

    /// Created before this time.
    #[must_use]
    pub fn created_before(mut self, time: SystemTime) -> Self {
        self.request.created_before = Some(convert::time_to_proto(time));
        self
    }

    /// Runs that are asked for at once, at most 1,000. Zero: the service's default.
    #[must_use]
    pub fn page_size(mut self, size: u32) -> Self {
        self.request.page_size = size;
        self
    }
}

impl Client {
    /// The caller's runs, newest first, without their specs and attempts. Asks for the next page when it is needed;
    /// stable while runs are added.
    ///
    /// ```no_run
    /// use futures::{StreamExt as _, TryStreamExt as _};
    /// use worker_client::{Client, ListFilter, proto::RunState};
    ///
    /// # async fn example(client: Client) -> Result<(), worker_client::ClientError> {
    /// let filter = ListFilter::default().state(RunState::Running).label("team", "docs");
    /// let newest: Vec<_> = client.list(filter).take(10).try_collect().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn list(
        &self,
        filter: ListFilter,
    ) -> impl Stream<Item = Result<proto::Run, ClientError>> + Send + Unpin + 'static {
        let client = self.clone();
        let pages = stream::try_unfold(Some(filter.request), move |request| {
            let client = client.clone();
            async move {
                let Some(mut request) = request else { return Ok::<_, ClientError>(None) };
                let page = client.list_page(request.clone()).await?;
                let next = (!page.next_page_token.is_empty()).then(|| {
                    request.page_token = page.next_page_token;
                    request
                });
                Ok(Some((stream::iter(page.runs.into_iter().map(Ok)), next)))
            }
        });
        Box::pin(pages.try_flatten())
    }

    /// One page, for callers that hand page tokens on.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) for a filter or a token that is not one.
    pub async fn list_page(&self, request: proto::ListRequest) -> Result<proto::ListResponse, ClientError> {
        let response = retry::idempotent(self.retry_policy(), || {
            let (mut grpc, request) = (self.runner(), self.request(request.clone()));
            async move { grpc.list(request).await.map_err(|e| ClientError::status("list the runs", e)) }
        });
        Ok(response.await?.into_inner())
    }
}
