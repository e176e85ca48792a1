//! `runner.v1.Admin`.

use runner_proto::v1::{self, admin_server::Admin};
use tonic::{Request, Response, Status};

use super::Api;
use crate::convert::Wire;

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
}
