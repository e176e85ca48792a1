//! `runner.v1.Admin`.

use runner_core::service::TrafficChange;
use runner_proto::v1::{self, admin_server::Admin};
use tonic::{Request, Response, Status};

use super::Api;
use crate::{
    convert::{Wire, parity, traffic},
    status,
};

#[tonic::async_trait]
impl Admin for Api {
    async fn list_backends(
        &self,
        _request: Request<v1::ListBackendsRequest>,
    ) -> Result<Response<v1::ListBackendsResponse>, Status> {
        let backends = self.service.backends().await;
        let backends = backends.iter().map(|backend| Wire::from(backend).0).collect();
        Ok(Response::new(v1::ListBackendsResponse { backends }))
    }

    async fn get_traffic(
        &self,
        _request: Request<v1::GetTrafficRequest>,
    ) -> Result<Response<v1::GetTrafficResponse>, Status> {
        let traffic = Some(traffic::traffic(&self.service.traffic(), &self.service.guard()));
        Ok(Response::new(v1::GetTrafficResponse { traffic }))
    }

    async fn change_traffic(
        &self,
        request: Request<v1::ChangeTrafficRequest>,
    ) -> Result<Response<v1::ChangeTrafficResponse>, Status> {
        let change = TrafficChange::try_from(Wire(request.into_inner())).map_err(|e| status::invalid(&e))?;
        let place = traffic::field_of(&change.change);
        let changed = self.service.change_traffic(self.auth.caller(), change).await;
        let traffic = changed.map_err(|error| status::service(&traffic::in_request(place, error)))?;
        let traffic = Some(traffic::traffic(&traffic, &self.service.guard()));
        Ok(Response::new(v1::ChangeTrafficResponse { traffic }))
    }

    async fn explain_routing(
        &self,
        request: Request<v1::ExplainRoutingRequest>,
    ) -> Result<Response<v1::ExplainRoutingResponse>, Status> {
        let (run, spec) = traffic::explain_request(request.into_inner()).map_err(|e| status::invalid(&e))?;
        let explained = self.service.explain(self.auth.caller(), run, &spec);
        Ok(Response::new(traffic::explanation(&explained.map_err(|e| status::service(&e))?)))
    }

    async fn list_audit(
        &self,
        request: Request<v1::ListAuditRequest>,
    ) -> Result<Response<v1::ListAuditResponse>, Status> {
        let v1::ListAuditRequest { page_size, before } = request.into_inner();
        let max = if page_size == 0 { 100 } else { usize::try_from(page_size).unwrap_or(usize::MAX) };
        let before = (before > 0).then_some(before);
        let entries = self.service.audit(before, max).await.map_err(|e| status::service(&e))?;
        Ok(Response::new(v1::ListAuditResponse { entries: entries.iter().map(traffic::audit).collect() }))
    }

    async fn list_parity(
        &self,
        request: Request<v1::ListParityRequest>,
    ) -> Result<Response<v1::ListParityResponse>, Status> {
        let page = parity::PairPage::try_from(Wire(request.into_inner())).map_err(|e| status::invalid(&e))?;
        let found = self.service.pairs(&page.filter, page.before, page.max).await;
        let found = found.map_err(|e| status::service(&e))?;
        Ok(Response::new(v1::ListParityResponse { records: found.iter().map(parity::listed).collect() }))
    }

    async fn get_parity(
        &self,
        request: Request<v1::GetParityRequest>,
    ) -> Result<Response<v1::GetParityResponse>, Status> {
        let id = parity::run_of(request.get_ref()).map_err(|e| status::invalid(&e))?;
        let found = self.service.pair(id).await.map_err(|e| status::service(&e))?;
        Ok(Response::new(v1::GetParityResponse { record: Some(parity::whole(&found)) }))
    }
}
