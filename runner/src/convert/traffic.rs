//! Where new runs go, and who changed it.

use runner_core::{
    id::{BackendName, RunId},
    service::{Explanation, GuardReport, GuardVerdict, ServiceError, TrafficChange},
    spec::{FieldViolation, InvalidSpec, RunSpec},
    store::{StoredAudit, StoredTraffic},
    traffic::{
        Candidate, Change, DecidedBy, Decision, Drained, Policy, Ramp, RampOrder, RampStatus, RampStep,
        Shadowing, Share, Tally,
    },
};
use runner_proto::v1;
use serde_json::error::Category;

use super::{Violations, Wire, duration, timestamp};

impl TryFrom<Wire<v1::ChangeTrafficRequest>> for TrafficChange {
    type Error = InvalidSpec;

    fn try_from(Wire(request): Wire<v1::ChangeTrafficRequest>) -> Result<Self, InvalidSpec> {
        use v1::change_traffic_request::Change as Asked;
        let v1::ChangeTrafficRequest { reason, expected_version: expected, change } = request;
        let mut violations = Violations::default();
        let change = match change {
            Some(Asked::SetPolicy(text)) => policy(&text, &mut violations).map(Change::SetPolicy),
            Some(Asked::Drain(backend)) => violations.parse("drain", &backend).map(Change::Drain),
            Some(Asked::Undrain(backend)) => violations.parse("undrain", &backend).map(Change::Undrain),
            Some(Asked::StartRamp(order)) => ramp_order(order, &mut violations).map(Change::StartRamp),
            Some(Asked::Ramp(action)) => match v1::RampAction::try_from(action) {
                Ok(v1::RampAction::Pause) => Some(Change::PauseRamp),
                Ok(v1::RampAction::Resume) => Some(Change::ResumeRamp),
                Ok(v1::RampAction::Abort) => Some(Change::AbortRamp),
                Ok(v1::RampAction::Unspecified) | Err(_) => {
                    violations.add("ramp", "INVALID", format!("{action} is not an action"));
                    None
                }
            },
            Some(Asked::Rollback(v1::Rollback { backend })) => {
                Some(Change::Rollback(violations.parse_optional("rollback.backend", &backend)))
            }
            None => {
                violations.add("change", "REQUIRED", "say what to change");
                None
            }
        };
        // Without a change there is a violation, and it is told.
        let change = change.unwrap_or(Change::PauseRamp);
        violations.finish(Self { change, expected, reason })
    }
}

/// The field of the request that a change is in.
pub const fn field_of(change: &Change) -> &'static str {
    match change {
        Change::SetPolicy(_) => "set_policy",
        Change::Drain(_) => "drain",
        Change::Undrain(_) => "undrain",
        Change::StartRamp(_) => "start_ramp",
        Change::PauseRamp | Change::ResumeRamp | Change::AbortRamp | Change::AdvanceRamp => "ramp",
        Change::Rollback(_) => "rollback",
    }
}

/// Names bad fields by their place in the request. The domain names them by their place in what is changed.
pub fn in_request(place: &str, error: ServiceError) -> ServiceError {
    let ServiceError::Invalid(InvalidSpec(violations)) = error else { return error };
    let named = violations.into_iter().map(|violation| {
        let field = match violation.field.as_str() {
            "reason" => violation.field,
            "backend" => place.to_owned(),
            field => format!("{place}.{field}"),
        };
        FieldViolation { field, ..violation }
    });
    ServiceError::Invalid(InvalidSpec(named.collect()))
}

/// Reads a policy. What it must hold beyond its form is checked where it is set.
fn policy(text: &str, violations: &mut Violations) -> Option<Policy> {
    let mut json = serde_json::Deserializer::from_str(text);
    let read = serde_path_to_error::deserialize(&mut json);
    match read {
        Ok(policy) => match json.end() {
            Ok(()) => Some(policy),
            Err(error) => {
                violations.add("set_policy", "INVALID", error.to_string());
                None
            }
        },
        Err(error) => {
            // What is no JSON has no places.
            let field = match (error.inner().classify(), error.path().to_string().as_str()) {
                (Category::Data, path) if path != "." => format!("set_policy.{path}"),
                _ => "set_policy".to_owned(),
            };
            violations.add(field, "INVALID", error.inner().to_string());
            None
        }
    }
}

fn share(field: String, hundredths: u32, violations: &mut Violations) -> Share {
    let share = u16::try_from(hundredths).ok().and_then(Share::from_hundredths);
    share.unwrap_or_else(|| {
        violations.add(field, "TOO_LARGE", "is in hundredths of a percent, at most 10000");
        Share::NONE
    })
}

fn ramp_order(order: v1::StartRamp, violations: &mut Violations) -> Option<RampOrder> {
    let v1::StartRamp { rule, backend, steps } = order;
    let backend = violations.parse("start_ramp.backend", &backend);
    let steps = steps.into_iter().enumerate().map(|(i, step)| {
        let field = format!("start_ramp.steps[{i}]");
        RampStep {
            share: share(format!("{field}.share"), step.share, violations),
            hold: violations.duration(&format!("{field}.hold"), step.hold).unwrap_or_default(),
        }
    });
    let steps = steps.collect();
    Some(RampOrder { rule: Some(rule).filter(|rule| !rule.is_empty()), backend: backend?, steps })
}

/// The state of the traffic on the wire, and what the guard says of it.
pub fn traffic(stored: &StoredTraffic, guard: &[GuardReport]) -> v1::Traffic {
    let StoredTraffic { version, traffic } = stored;
    let drained = traffic.drained.iter().map(|(backend, why)| (backend.to_string(), drained(why)));
    v1::Traffic {
        version: *version,
        // A policy has no keys but texts, so it can always be written.
        policy: serde_json::to_string(&traffic.policy).unwrap_or_default(),
        drained: drained.collect(),
        ramp: traffic.ramp.as_ref().map(ramp),
        guard: guard.iter().map(guard_report).collect(),
    }
}

fn guard_report(report: &GuardReport) -> v1::GuardReport {
    let tally = |tally: Tally| Some(v1::Tally { count: tally.failures, runs: tally.runs });
    let verdict = match report.verdict {
        GuardVerdict::TooLittle => v1::guard_report::Verdict::TooLittle,
        GuardVerdict::Fine => v1::guard_report::Verdict::Fine,
        GuardVerdict::RolledBack => v1::guard_report::Verdict::RolledBack,
    };
    v1::GuardReport {
        rule: report.rule.clone().unwrap_or_default(),
        canary: report.canary.to_string(),
        baseline: report.baseline.to_string(),
        canary_failures: tally(report.canary_failures),
        baseline_failures: tally(report.baseline_failures),
        canary_slow: tally(report.canary_slow),
        baseline_slow: tally(report.baseline_slow),
        verdict: verdict.into(),
    }
}

/// Why a backend takes no new runs.
pub fn drained(Drained { since, by, reason }: &Drained) -> v1::Drained {
    v1::Drained { since: Some(timestamp(*since)), by: by.clone(), reason: reason.clone() }
}

fn ramp(ramp: &Ramp) -> v1::Ramp {
    let status = match ramp.status {
        RampStatus::Running { .. } => v1::ramp::Status::Running,
        RampStatus::Paused { .. } => v1::ramp::Status::Paused,
        RampStatus::Finished => v1::ramp::Status::Finished,
        RampStatus::Aborted => v1::ramp::Status::Aborted,
        RampStatus::RolledBack => v1::ramp::Status::RolledBack,
    };
    let step = |step: &RampStep| v1::RampStep {
        share: u32::from(step.share.hundredths()),
        hold: Some(duration(step.hold)),
    };
    v1::Ramp {
        rule: ramp.rule.clone().unwrap_or_default(),
        backend: ramp.backend.to_string(),
        steps: ramp.steps.iter().map(step).collect(),
        step: u32::try_from(ramp.step + 1).unwrap_or(u32::MAX),
        status: status.into(),
        next_step_time: ramp.due().map(timestamp),
        share: u32::from(ramp.share().hundredths()),
    }
}

impl From<&Decision> for Wire<v1::RoutingDecision> {
    fn from(decision: &Decision) -> Self {
        // Of its shadow no caller is told.
        let Decision { backend, version, by, bucket, passed_over, shadow: _ } = decision;
        let (by, rule) = match by {
            DecidedBy::Spec => (v1::routing_decision::By::Spec, ""),
            DecidedBy::Configuration => (v1::routing_decision::By::Configuration, ""),
            DecidedBy::Default => (v1::routing_decision::By::Default, ""),
            DecidedBy::Rule(rule) => (v1::routing_decision::By::Rule, rule.as_str()),
        };
        Self(v1::RoutingDecision {
            backend: backend.to_string(),
            version: *version,
            by: by.into(),
            rule: rule.to_owned(),
            bucket: bucket.map(u32::from),
            passed_over: passed_over.iter().map(|(backend, _)| backend.to_string()).collect(),
        })
    }
}

/// Where a run would go.
pub fn explanation(explanation: &Explanation) -> v1::ExplainRoutingResponse {
    let (decision, reason) = match &explanation.decision {
        Ok(decision) => (Some(Wire::from(decision).0), decision.to_string()),
        Err(nowhere) => (None, nowhere.to_string()),
    };
    let candidate = |(backend, candidate): &(BackendName, Candidate)| {
        let Candidate { healthy, drained, lacks } = candidate;
        let lack = |lack: &FieldViolation| v1::Lack {
            field: lack.field.clone(),
            description: lack.description.clone(),
        };
        v1::Candidate {
            backend: backend.to_string(),
            healthy: *healthy,
            drained: *drained,
            lacks: lacks.iter().map(lack).collect(),
        }
    };
    v1::ExplainRoutingResponse {
        decision,
        reason,
        candidates: explanation.candidates.iter().map(candidate).collect(),
        shadow: match explanation.decision.as_ref().ok().and_then(|decision| decision.shadow.as_ref()) {
            None => String::new(),
            Some(Shadowing::On(backend)) => format!("on {backend}"),
            Some(Shadowing::No(why)) => format!("none: {}", why.as_str()),
        },
    }
}

/// An entry of the audit log.
pub fn audit(stored: &StoredAudit) -> v1::AuditEntry {
    let StoredAudit { seq, version, entry } = stored;
    v1::AuditEntry {
        number: *seq,
        time: Some(timestamp(entry.time)),
        actor: entry.actor.clone(),
        action: entry.action.clone(),
        what: entry.what.clone(),
        reason: entry.reason.clone(),
        version: *version,
    }
}

/// The spec of a run that is to be explained, and its id.
///
/// # Errors
/// A violation per bad field.
pub fn explain_request(request: v1::ExplainRoutingRequest) -> Result<(Option<RunId>, RunSpec), InvalidSpec> {
    let mut violations = Violations::default();
    let run = violations.parse_optional("run_id", &request.run_id);
    let spec = match request.spec {
        Some(spec) => super::spec::from_wire(spec, &mut violations),
        None => {
            violations.add("spec", "REQUIRED", "say what would run");
            RunSpec::default()
        }
    };
    violations.finish((run, spec))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(change: v1::change_traffic_request::Change) -> Result<Change, Vec<(String, String)>> {
        let request =
            v1::ChangeTrafficRequest { reason: "x".into(), expected_version: None, change: Some(change) };
        TrafficChange::try_from(Wire(request)).map(|change| change.change).map_err(|invalid| {
            invalid.0.into_iter().map(|violation| (violation.field, violation.reason)).collect()
        })
    }

    fn fields(asked: v1::change_traffic_request::Change) -> Vec<String> {
        change(asked).unwrap_err().into_iter().map(|(field, _)| field).collect()
    }

    #[test]
    fn a_policy_comes_back_as_it_was_sent() {
        use v1::change_traffic_request::Change::SetPolicy;
        let text = r#"{"salt":"s","rules":[],"default":{"split":{"sticky":"tenant","baseline":"dind",
            "canaries":[{"backend":"k8s","percent":0.25}]}}}"#;
        let Ok(Change::SetPolicy(policy)) = change(SetPolicy(text.to_owned())) else { panic!("a policy") };
        let stored = StoredTraffic {
            version: 3,
            traffic: runner_core::traffic::Traffic { policy: policy.clone(), ..Default::default() },
        };
        let wire = traffic(&stored, &[]);
        assert_eq!(wire.version, 3);
        assert_eq!(change(SetPolicy(wire.policy)), Ok(Change::SetPolicy(policy)));
    }

    #[test]
    fn what_is_wrong_with_a_policy_is_told_by_its_place() {
        use v1::change_traffic_request::Change::SetPolicy;
        let bad = |text: &str| fields(SetPolicy(text.to_owned()));
        assert_eq!(bad("{"), ["set_policy"]);
        assert_eq!(bad("{} x"), ["set_policy"]);
        assert_eq!(bad(r#"{"sallt":1}"#), ["set_policy.sallt"]);
        let rule = r#"{"rules":[{"name":"a","to":{"backend":"k8s"}},{"name":"b","to":{"backend":"NO"}}]}"#;
        assert_eq!(bad(rule), ["set_policy.rules[1].to.backend"]);
        let split = r#"{"default":{"split":{"baseline":"a","canaries":[{"backend":"b","percent":100.01}]}}}"#;
        assert_eq!(bad(split), ["set_policy.default.split.canaries[0].percent"]);
    }

    #[test]
    fn bad_changes_are_told_by_their_fields() {
        use v1::change_traffic_request::Change as Asked;
        assert_eq!(fields(Asked::Drain("NO".into())), ["drain"]);
        assert_eq!(fields(Asked::Undrain(String::new())), ["undrain"]);
        assert_eq!(fields(Asked::Ramp(9)), ["ramp"]);
        assert_eq!(fields(Asked::Rollback(v1::Rollback { backend: "-".into() })), ["rollback.backend"]);
        let step =
            |share, seconds| v1::RampStep { share, hold: Some(prost_types::Duration { seconds, nanos: 0 }) };
        let order = v1::StartRamp {
            rule: String::new(),
            backend: "k8s".into(),
            steps: vec![step(1, 1), step(10_001, -1)],
        };
        assert_eq!(
            fields(Asked::StartRamp(order)),
            ["start_ramp.steps[1].share", "start_ramp.steps[1].hold"]
        );
        let nothing = v1::ChangeTrafficRequest::default();
        assert!(TrafficChange::try_from(Wire(nothing)).is_err());
    }
}
