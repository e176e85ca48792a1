//! What operators ask of the service.

use crate::{client::Client, error::ClientError, proto, retry};

impl Client {
    /// Every configured backend, with its health and capabilities.
    ///
    /// # Errors
    /// Those of any call.
    pub async fn backends(&self) -> Result<Vec<proto::Backend>, ClientError> {
        let response = retry::idempotent(self.retry_policy(), || {
            let mut grpc = self.admin();
            let request = self.request(proto::ListBackendsRequest {});
            async move {
                grpc.list_backends(request).await.map_err(|e| ClientError::status("list the backends", e))
            }
        });
        Ok(response.await?.into_inner().backends)
    }

    /// Where new runs go.
    ///
    /// # Errors
    /// Those of any call.
    pub async fn traffic(&self) -> Result<proto::Traffic, ClientError> {
        let response = retry::idempotent(self.retry_policy(), || {
            let mut grpc = self.admin();
            let request = self.request(proto::GetTrafficRequest {});
            async move {
                grpc.get_traffic(request).await.map_err(|e| ClientError::status("ask for the traffic", e))
            }
        });
        Ok(response.await?.into_inner().traffic.unwrap_or_default())
    }

    /// Changes where new runs go, for operators. Never repeated by itself: a change whose answer was lost is found with
    /// [`Client::traffic`].
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where a field is bad; [`ErrorKind::FailedPrecondition`] where the change cannot be made
    /// as things are.
    pub async fn change_traffic(
        &self,
        change: proto::ChangeTrafficRequest,
    ) -> Result<proto::Traffic, ClientError> {
        let mut grpc = self.admin();
        let response = grpc.change_traffic(self.request(change)).await;
        let response = response.map_err(|e| ClientError::status("change the traffic", e))?;
        Ok(response.into_inner().traffic.unwrap_or_default())
    }

    /// Where a run with this spec would go, and why.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where a field of the spec is bad.
    pub async fn explain_routing(
        &self,
        spec: impl Into<proto::RunSpec>,
        run_id: impl Into<String>,
    ) -> Result<proto::ExplainRoutingResponse, ClientError> {
        let asked = proto::ExplainRoutingRequest { spec: Some(spec.into()), run_id: run_id.into() };
        let response = retry::idempotent(self.retry_policy(), || {
            let mut grpc = self.admin();
            let request = self.request(asked.clone());
            async move {
                grpc.explain_routing(request).await.map_err(|e| ClientError::status("explain the routing", e))
            }
        });
        Ok(response.await?.into_inner())
    }

    /// Who changed what: at most `max` entries before number `before` (0: from the newest on), newest first.
    ///
    /// # Errors
    /// Those of any call.
    pub async fn audit(&self, before: u64, max: u32) -> Result<Vec<proto::AuditEntry>, ClientError> {
        let response = retry::idempotent(self.retry_policy(), || {
            let mut grpc = self.admin();
            let request = self.request(proto::ListAuditRequest { page_size: max, before });
            async move { grpc.list_audit(request).await.map_err(|e| ClientError::status("read the audit log", e)) }
        });
        Ok(response.await?.into_inner().entries)
    }

    /// A page of runs that were sampled for a shadow, with how the two compare, newest first.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn parity_page(
        &self,
        request: proto::ListParityRequest,
    ) -> Result<Vec<proto::Parity>, ClientError> {
        let response = retry::idempotent(self.retry_policy(), || {
            let mut grpc = self.admin();
            let request = self.request(request.clone());
            async move {
                grpc.list_parity(request)
                    .await
                    .map_err(|e| ClientError::status("list runs and their shadows", e))
            }
        });
        Ok(response.await?.into_inner().records)
    }

    /// A run and its shadow, compared. Takes the id of either.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) where the run has none, or is gone.
    pub async fn parity(&self, run_id: impl Into<String>) -> Result<proto::Parity, ClientError> {
        let request = proto::GetParityRequest { run_id: run_id.into() };
        let response = retry::idempotent(self.retry_policy(), || {
            let mut grpc = self.admin();
            let request = self.request(request.clone());
            async move {
                grpc.get_parity(request)
                    .await
                    .map_err(|e| ClientError::status("compare a run with its shadow", e))
            }
        });
        Ok(response.await?.into_inner().record.unwrap_or_default())
    }
}
