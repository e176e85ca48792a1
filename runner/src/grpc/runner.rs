//! `runner.v1.Runner`.

use runner_core::service::RunRequest;
use runner_proto::v1::{self, runner_server::Runner};
use tonic::{Request, Response, Status, Streaming};

use super::{Api, attach, watch::Watching};
use crate::{
    convert::{
        Wire,
        request::{Listing, RunCall, Watch, page_token, run_id},
        run,
    },
    status,
};

#[tonic::async_trait]
impl Runner for Api {
    async fn run(&self, request: Request<v1::RunRequest>) -> Result<Response<v1::RunResponse>, Status> {
        let caller = self.auth.caller();
        let call = RunCall { message: request.into_inner(), tenant: &caller.tenant, limits: &self.limits };
        let request = RunRequest::try_from(call).map_err(|e| status::invalid(&e))?;
        let (record, created) = self.service.run(caller, request).await.map_err(|e| status::service(&e))?;
        Ok(Response::new(v1::RunResponse { run: Some(run::with_spec(&record)), created }))
    }

    type StreamStream = Watching;

    async fn stream(&self, request: Request<v1::StreamRequest>) -> Result<Response<Watching>, Status> {
        if self.draining.is_cancelled() {
            return Err(status::shutting_down());
        }
        let watch = Watch::try_from(Wire(request.into_inner())).map_err(|e| status::invalid(&e))?;
        let items = self
            .service
            .stream(self.auth.caller(), watch.run, watch.from, watch.options)
            .await
            .map_err(|e| status::service(&e))?;
        Ok(Response::new(Watching::new(items, self.draining.clone())))
    }

    async fn cancel(
        &self,
        request: Request<v1::CancelRequest>,
    ) -> Result<Response<v1::CancelResponse>, Status> {
        let request = request.into_inner();
        let id = run_id("run_id", &request.run_id).map_err(|e| status::invalid(&e))?;
        let record = self
            .service
            .cancel(self.auth.caller(), id, request.reason)
            .await
            .map_err(|e| status::service(&e))?;
        Ok(Response::new(v1::CancelResponse { run: Some(run::with_spec(&record)) }))
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<v1::GetResponse>, Status> {
        let id = run_id("run_id", &request.into_inner().run_id).map_err(|e| status::invalid(&e))?;
        let (record, attempts) =
            self.service.get(self.auth.caller(), id).await.map_err(|e| status::service(&e))?;
        Ok(Response::new(v1::GetResponse { run: Some(run::whole(&record, &attempts)) }))
    }

    async fn list(&self, request: Request<v1::ListRequest>) -> Result<Response<v1::ListResponse>, Status> {
        let Listing { filter, after, max } =
            Listing::try_from(Wire(request.into_inner())).map_err(|e| status::invalid(&e))?;
        let page = self
            .service
            .list(self.auth.caller(), filter, after, max)
            .await
            .map_err(|e| status::service(&e))?;
        Ok(Response::new(v1::ListResponse {
            runs: page.runs.iter().map(|record| Wire::from(record).0).collect(),
            next_page_token: page.next.map(page_token).unwrap_or_default(),
        }))
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        let id = run_id("run_id", &request.into_inner().run_id).map_err(|e| status::invalid(&e))?;
        self.service.delete(self.auth.caller(), id).await.map_err(|e| status::service(&e))?;
        Ok(Response::new(v1::DeleteResponse {}))
    }

    type AttachStream = attach::Answers;

    async fn attach(
        &self,
        request: Request<Streaming<v1::AttachRequest>>,
    ) -> Result<Response<attach::Answers>, Status> {
        if self.draining.is_cancelled() {
            return Err(status::shutting_down());
        }
        let caller = self.auth.caller().clone();
        Ok(Response::new(attach::open(
            std::sync::Arc::clone(&self.service),
            caller,
            request.into_inner(),
            self.draining.clone(),
        )))
    }
}
