//! The way to the API server: every request is counted, and waits for its budget.
//!
//! There are two clients, for the watch and for everything else, and three budgets: what is made, what is watched, and the rest.
//! So many new attempts at once neither blind the watch nor delay the end of those that run. A request that the client sends
//! again, because the server is busy, is another request: it is counted and waits as the first one did.

mod budget;
mod call;

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use futures::future::BoxFuture;
use http::Request;
use kube::{
    Client, Config,
    client::{Body, ClientBuilder, retry::RetryPolicy},
};
use runner_core::{clock::Clock, id::BackendName, service::Meter};
use tower::{BoxError, Layer, Service, buffer::BufferLayer, retry::RetryLayer};

use self::{budget::Budget, call::Call};
use crate::{config::ApiBudgets, error::OpenError};

/// How many requests may stand before a connection at once.
const QUEUE: usize = 1024;

/// The clients of a backend.
#[derive(Clone)]
pub(crate) struct Clients {
    /// For the watch, and for nothing else.
    pub(crate) watch: Client,
    /// For everything else.
    pub(crate) work: Client,
}

impl Clients {
    /// Clients of the cluster of `config`.
    ///
    /// # Errors
    /// Where they cannot be made.
    pub(crate) fn new(
        mut config: Config,
        budgets: &ApiBudgets,
        name: &BackendName,
        clock: &Arc<dyn Clock>,
        meter: &Arc<dyn Meter>,
    ) -> Result<Self, OpenError> {
        // Beneath the count it would be sent again unseen.
        config.default_retry = false;
        let budget = |what, per_second| Arc::new(Budget::new(what, per_second, Arc::clone(clock)));
        let watches = budget("watches", budgets.watches_per_second);
        let metered =
            |creates, others| Metered { name: name.clone(), meter: Arc::clone(meter), creates, others };
        let watch = metered(Arc::clone(&watches), watches);
        let work = metered(
            budget("creations", budgets.creates_per_second),
            budget("calls", budgets.others_per_second),
        );
        let connection = |config: Config| {
            ClientBuilder::try_from(config).map_err(|error| OpenError::Client(Box::new(error)))
        };
        Ok(Self {
            watch: stack(connection(config.clone())?, watch).build(),
            work: stack(connection(config)?, work).build(),
        })
    }
}

/// What is over a connection, from the outside in: requests are sent again, counted and delayed, queued.
fn stack<S>(connection: ClientBuilder<S>, metered: Metered) -> ClientBuilder<Stack<S>>
where
    S: Service<Request<Body>, Error = BoxError> + Send + 'static,
    S::Future: Send,
{
    connection
        .with_layer(&BufferLayer::new(QUEUE))
        .with_layer(&metered)
        .with_layer(&RetryLayer::new(RetryPolicy::server_retry()))
}

type Queued<S> = tower::buffer::Buffer<Request<Body>, <S as Service<Request<Body>>>::Future>;
type Stack<S> = tower::retry::Retry<RetryPolicy, MeteredService<Queued<S>>>;

/// Who counts requests, and the budgets that they wait for.
#[derive(Clone)]
struct Metered {
    name: BackendName,
    meter: Arc<dyn Meter>,
    creates: Arc<Budget>,
    others: Arc<Budget>,
}

impl<S> Layer<S> for Metered {
    type Service = MeteredService<S>;

    fn layer(&self, inner: S) -> MeteredService<S> {
        MeteredService { metered: self.clone(), inner }
    }
}

#[derive(Clone)]
struct MeteredService<S> {
    metered: Metered,
    inner: S,
}

impl<S> fmt::Debug for MeteredService<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MeteredService").field("name", &self.metered.name).finish_non_exhaustive()
    }
}

impl<S> Service<Request<Body>> for MeteredService<S>
where
    S: Service<Request<Body>, Error = BoxError> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<S::Response, BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // The one that was found ready is the one that is called.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let metered = self.metered.clone();
        let call = Call::of(request.method(), request.uri());
        Box::pin(async move {
            let budget = if call.creates() { &metered.creates } else { &metered.others };
            budget.wait().await?;
            metered.meter.backend_call(&metered.name, call.verb, call.resource);
            inner.call(request).await
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, PoisonError};

    use http::Response;
    use k8s_openapi::api::batch::v1::Job;
    use kube::{Api, api::PostParams};
    use runner_core::clock::SystemClock;
    use tower::service_fn;

    use super::*;

    #[derive(Debug, Default)]
    struct Counts(Mutex<Vec<(&'static str, &'static str)>>);

    impl Meter for Counts {
        fn backend_call(&self, _: &BackendName, verb: &'static str, resource: &'static str) {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push((verb, resource));
        }
    }

    fn metered(meter: Arc<Counts>, creates_per_second: u32) -> Metered {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        Metered {
            name: "k8sjob".parse().unwrap(),
            meter,
            creates: Arc::new(Budget::new("creations", creates_per_second, Arc::clone(&clock))),
            others: Arc::new(Budget::new("calls", 1000, clock)),
        }
    }

    /// An API server that is busy `busy` times, and then has everything.
    fn server(busy: usize, metered: Metered) -> Client {
        let left = Arc::new(Mutex::new(busy));
        let answer = service_fn(move |_: Request<Body>| {
            let left = Arc::clone(&left);
            async move {
                let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
                let (status, body) =
                    if *left > 0 { (429, "{}".to_owned()) } else { (200, r#"{"metadata":{}}"#.to_owned()) };
                *left = left.saturating_sub(1);
                Response::builder().status(status).body(Body::from(body.into_bytes())).map_err(BoxError::from)
            }
        });
        stack(ClientBuilder::new(answer, "default"), metered).build()
    }

    #[tokio::test]
    async fn a_request_that_is_sent_again_is_counted_again() {
        let counts = Arc::<Counts>::default();
        let jobs: Api<Job> = Api::namespaced(server(2, metered(Arc::clone(&counts), 1000)), "n");
        jobs.create(&PostParams::default(), &Job::default()).await.unwrap();
        jobs.get("a").await.unwrap();
        let seen = counts.0.lock().unwrap().clone();
        assert_eq!(seen, [("create", "jobs"), ("create", "jobs"), ("create", "jobs"), ("get", "jobs")]);
    }

    #[tokio::test]
    async fn where_nothing_more_may_be_made_everything_else_goes_on_and_who_waits_too_long_is_told() {
        let counts = Arc::<Counts>::default();
        let jobs: Api<Job> = Api::namespaced(server(0, metered(Arc::clone(&counts), 1)), "n");
        let (parameters, job) = (PostParams::default(), Job::default());
        let made = (0..40).map(|_| async {
            let create = jobs.create(&parameters, &job);
            tokio::time::timeout(std::time::Duration::from_millis(500), create).await
        });
        let made = futures::future::join_all(made).await;
        let refused: Vec<_> = made.iter().filter_map(|made| made.as_ref().ok()?.as_ref().err()).collect();
        // One at once, 15 that wait, and no more.
        assert_eq!(made.iter().filter(|made| matches!(made, Ok(Ok(_)))).count(), 1);
        assert_eq!(refused.len(), 24, "{refused:?}");
        let kube::Error::Service(error) = refused[0] else { panic!("{:?}", refused[0]) };
        assert!(error.to_string().contains("creations"), "{error}");
        jobs.get("a").await.unwrap();
        assert_eq!(*counts.0.lock().unwrap(), [("create", "jobs"), ("get", "jobs")]);
    }
}
