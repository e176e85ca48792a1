//! Where new runs go, over gRPC.

use runner_core::role::Role;
use runner_proto::v1::{self, change_traffic_request::Change};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::harness::{Harness, run_request, soon, spec};

fn reason(status: &Status) -> String {
    status.get_error_details().error_info().map(|info| info.reason.clone()).unwrap_or_default()
}

fn fields(status: &Status) -> Vec<String> {
    let details = status.get_error_details();
    let violations = details.bad_request().map(|bad| bad.field_violations.clone()).unwrap_or_default();
    violations.into_iter().map(|violation| violation.field).collect()
}

async fn change(harness: &Harness, change: Change) -> Result<v1::Traffic, Status> {
    let request =
        v1::ChangeTrafficRequest { reason: "a test".into(), expected_version: None, change: Some(change) };
    let answer = harness.admin().await.change_traffic(request).await?;
    Ok(answer.into_inner().traffic.expect("the traffic"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_traffic_is_changed_shown_and_audited() {
    let harness = Harness::start().await;
    soon(async {
        let mut admin = harness.admin().await;
        let traffic =
            admin.get_traffic(v1::GetTrafficRequest {}).await.unwrap().into_inner().traffic.unwrap();
        assert_eq!((traffic.version, traffic.ramp.is_none()), (0, true));

        let policy = r#"{"rules":[{"name":"all","to":{"backend":"local"}}]}"#;
        let traffic = change(&harness, Change::SetPolicy(policy.into())).await.unwrap();
        assert_eq!(traffic.version, 1);
        assert!(traffic.policy.contains(r#""name":"all""#), "{}", traffic.policy);
        let run =
            harness.runner().await.run(run_request(spec(&["exit", "0"]))).await.unwrap().into_inner().run;
        let decision = run.unwrap().decision.unwrap();
        assert_eq!((decision.by(), decision.rule.as_str()), (v1::routing_decision::By::Rule, "all"));

        change(&harness, Change::Drain("local".into())).await.unwrap();
        let refused = harness.runner().await.run(run_request(spec(&["exit", "0"]))).await.unwrap_err();
        assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "NO_BACKEND"));
        let listed = admin.list_backends(v1::ListBackendsRequest {}).await.unwrap().into_inner();
        assert_eq!(listed.backends[0].drained.as_ref().unwrap().reason, "a test");

        let explain = v1::ExplainRoutingRequest { spec: Some(spec(&["exit", "0"])), run_id: String::new() };
        let explained = admin.explain_routing(explain).await.unwrap().into_inner();
        assert_eq!(explained.reason, "no backend takes the run: local is drained");
        assert!(explained.decision.is_none() && explained.candidates[0].drained);

        let audit = admin.list_audit(v1::ListAuditRequest::default()).await.unwrap().into_inner().entries;
        let seen: Vec<_> = audit.iter().map(|entry| (entry.number, entry.action.as_str())).collect();
        assert_eq!(seen, [(2, "backend.drain"), (1, "traffic.set")]);
        let before = v1::ListAuditRequest { page_size: 1, before: 2 };
        let audit = admin.list_audit(before).await.unwrap().into_inner().entries;
        assert_eq!(audit.iter().map(|entry| entry.number).collect::<Vec<_>>(), [1]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_change_names_its_field_and_changes_nothing() {
    let harness = Harness::start().await;
    soon(async {
        let unknown =
            r#"{"default":{"split":{"baseline":"local","canaries":[{"backend":"nowhere","percent":1}]}}}"#;
        let step = v1::RampStep { share: 1, hold: None };
        let ramp = v1::StartRamp { rule: String::new(), backend: "NO".into(), steps: vec![step] };
        for (asked, field) in [
            (Change::SetPolicy(unknown.into()), "set_policy.default.split.canaries[0].backend"),
            (Change::SetPolicy("no JSON".into()), "set_policy"),
            (Change::Drain("nowhere".into()), "drain"),
            (Change::StartRamp(ramp), "start_ramp.backend"),
            (Change::Ramp(0), "ramp"),
        ] {
            let status = change(&harness, asked).await.unwrap_err();
            assert_eq!(
                (status.code(), fields(&status)),
                (Code::InvalidArgument, vec![field.to_owned()]),
                "{status}"
            );
        }
        let mut admin = harness.admin().await;
        let nothing = v1::ChangeTrafficRequest { reason: "x".into(), ..Default::default() };
        assert_eq!(fields(&admin.change_traffic(nothing).await.unwrap_err()), ["change"]);
        let silent =
            v1::ChangeTrafficRequest { change: Some(Change::Drain("local".into())), ..Default::default() };
        assert_eq!(fields(&admin.change_traffic(silent.clone()).await.unwrap_err()), ["reason"]);
        let stale = v1::ChangeTrafficRequest { reason: "x".into(), expected_version: Some(4), ..silent };
        assert_eq!(reason(&admin.change_traffic(stale).await.unwrap_err()), "VERSION_CONFLICT");
        for (asked, code) in [
            (Change::Undrain("local".into()), "NOT_DRAINED"),
            (Change::Ramp(v1::RampAction::Pause.into()), "NO_RAMP"),
            (Change::Rollback(v1::Rollback::default()), "NO_CANARY"),
        ] {
            let status = change(&harness, asked).await.unwrap_err();
            assert_eq!((status.code(), reason(&status).as_str()), (Code::FailedPrecondition, code));
        }
        let traffic =
            admin.get_traffic(v1::GetTrafficRequest {}).await.unwrap().into_inner().traffic.unwrap();
        assert_eq!(traffic.version, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_name_a_backend_is_told_so_and_nothing_is_stored() {
    let harness = Harness::start_with(|config| config.unauthenticated_roles = [Role::Worker].into()).await;
    soon(async {
        let policy = r#"{"explicit_backend":["operator"]}"#;
        change(&harness, Change::SetPolicy(policy.into())).await.unwrap();
        let unknown = r#"{"explicit_backend":["king"]}"#;
        let refused = change(&harness, Change::SetPolicy(unknown.into())).await.unwrap_err();
        assert_eq!(fields(&refused), ["set_policy.explicit_backend[0]"]);

        let named = || v1::RunSpec {
            routing: Some(v1::Routing { backend: "local".to_owned(), ..Default::default() }),
            ..spec(&["exit", "0"])
        };
        let mut runner = harness.runner().await;
        let refused = runner.run(run_request(named())).await.unwrap_err();
        assert_eq!((refused.code(), reason(&refused).as_str()), (Code::PermissionDenied, "DENIED"));
        let details = refused.get_error_details();
        assert_eq!(details.error_info().unwrap().metadata["field"], "spec.routing.backend");
        let explain = v1::ExplainRoutingRequest { spec: Some(named()), run_id: String::new() };
        let explained = harness.admin().await.explain_routing(explain).await.unwrap().into_inner();
        assert!(
            explained.decision.is_none() && explained.reason.contains("operator"),
            "{}",
            explained.reason
        );
        let listed = runner.list(v1::ListRequest::default()).await.unwrap().into_inner();
        assert!(listed.runs.is_empty(), "{:?}", listed.runs);

        // Who names none is served, and so is who names one where the policy lets workers.
        runner.run(run_request(spec(&["exit", "0"]))).await.unwrap();
        let policy = r#"{"explicit_backend":["worker"]}"#;
        change(&harness, Change::SetPolicy(policy.into())).await.unwrap();
        let run = runner.run(run_request(named())).await.unwrap().into_inner().run.unwrap();
        assert_eq!(run.decision.unwrap().by(), v1::routing_decision::By::Spec);
    })
    .await;
}
