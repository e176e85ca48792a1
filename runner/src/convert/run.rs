//! Runs and attempts.

use runner_core::store::{AttemptRecord, RunRecord};
use runner_proto::v1;

use super::{Wire, spec::map, state, timestamp};

impl From<&RunRecord> for Wire<v1::Run> {
    /// Without `spec` and `attempts`, as `List` answers it.
    fn from(run: &RunRecord) -> Self {
        Self(v1::Run {
            run_id: run.id.to_string(),
            tenant: run.tenant.to_string(),
            idempotency_key: run.key.as_ref().map(|key| key.as_str().to_owned()).unwrap_or_default(),
            spec: None,
            state: state(run.position.state).into(),
            backend: run.backend.to_string(),
            backend_reason: run.backend_reason.clone(),
            attempt: run.position.attempt,
            cancel_requested: run.cancel.is_some(),
            create_time: Some(timestamp(run.created)),
            start_time: run.started.map(timestamp),
            end_time: run.ended.map(timestamp),
            outcome: run.outcome.as_ref().map(|outcome| Wire::from(outcome).0),
            attempts: Vec::new(),
            labels: map(&run.spec.labels),
            decision: run.decision.as_ref().map(|decision| Wire::from(decision).0),
        })
    }
}

/// A run with its spec.
pub fn with_spec(run: &RunRecord) -> v1::Run {
    v1::Run { spec: Some(Wire::from(run.spec.as_ref()).0), ..Wire::from(run).0 }
}

/// A run with its spec and its ended attempts.
pub fn whole(run: &RunRecord, attempts: &[AttemptRecord]) -> v1::Run {
    v1::Run { attempts: attempts.iter().map(|attempt| Wire::from(attempt).0).collect(), ..with_spec(run) }
}

impl From<&AttemptRecord> for Wire<v1::Attempt> {
    fn from(attempt: &AttemptRecord) -> Self {
        let AttemptRecord { number, backend, started, ended, outcome } = attempt;
        Self(v1::Attempt {
            number: *number,
            backend: backend.to_string(),
            start_time: started.map(timestamp),
            end_time: Some(timestamp(*ended)),
            outcome: Some(Wire::from(outcome).0),
        })
    }
}
