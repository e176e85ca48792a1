use serde_json::json;
use uuid::Uuid;

use super::*;

fn name(name: &str) -> BackendName {
    name.parse().unwrap()
}

type Known = (BackendName, Candidate);

/// The default is `dind`.
struct Configured<'a>(&'a [Known], BackendName);

impl Backends for Configured<'_> {
    fn default_backend(&self) -> &BackendName {
        &self.1
    }

    fn candidate(&self, backend: &BackendName, _: &RunSpec) -> Option<Candidate> {
        self.0.iter().find(|(name, _)| name == backend).map(|(_, candidate)| candidate.clone())
    }

    fn names(&self) -> impl Iterator<Item = &BackendName> {
        self.0.iter().map(|(name, _)| name)
    }
}

fn open(backend: &str) -> Known {
    (name(backend), Candidate { healthy: true, drained: false, lacks: Vec::new() })
}

fn incapable(backend: &str) -> Known {
    let lacks = vec![FieldViolation::new("spec.resources.gpus", "UNSUPPORTED", "no GPUs")];
    (name(backend), Candidate { lacks, ..open(backend).1 })
}

fn unhealthy(backend: &str) -> Known {
    (name(backend), Candidate { healthy: false, ..open(backend).1 })
}

fn drained(backend: &str) -> Known {
    (name(backend), Candidate { drained: true, ..open(backend).1 })
}

/// All keys to the canary `k8s`.
fn all_to_the_canary() -> Policy {
    let split = json!({ "baseline": "dind", "canaries": [{ "backend": "k8s", "percent": 100 }] });
    serde_json::from_value(json!({ "default": { "split": split } })).unwrap()
}

fn place(policy: &Policy, candidates: &[Known], spec: &RunSpec) -> Result<Decision, NoBackend> {
    place_for(&Role::ALL, policy, candidates, spec)
}

fn place_for(
    roles: &[Role],
    policy: &Policy,
    candidates: &[Known],
    spec: &RunSpec,
) -> Result<Decision, NoBackend> {
    let tenant: TenantId = "a".parse().unwrap();
    let roles = roles.iter().copied().collect();
    let asked = Asked { tenant: &tenant, roles: &roles, run: RunId::new(Uuid::from_u128(1)), spec };
    choose(policy, 7, &Configured(candidates, name("dind")), asked)
}

fn placed(policy: &Policy, candidates: &[Known], spec: &RunSpec) -> (String, String) {
    let decision = place(policy, candidates, spec).unwrap();
    (decision.backend.to_string(), decision.to_string())
}

fn named(backend: &str) -> RunSpec {
    let mut spec = RunSpec::default();
    spec.routing.backend = Some(name(backend));
    spec
}

#[test]
fn the_spec_goes_before_the_rules_and_these_before_the_default() {
    let spec = RunSpec::default();
    let both = [open("dind"), open("k8s")];
    assert_eq!(placed(&Policy::default(), &both, &spec), ("dind".into(), "the default backend".into()));
    let mut policy = all_to_the_canary();
    let (backend, reason) = placed(&policy, &both, &spec);
    assert_eq!(backend, "k8s");
    assert!(reason.starts_with("policy 7, its default, bucket "), "{reason}");
    let rule = json!({ "name": "r", "match": { "tenants": ["a"] }, "to": { "backend": "dind" } });
    policy.rules = vec![serde_json::from_value(rule).unwrap()];
    assert_eq!(placed(&policy, &both, &spec), ("dind".into(), r#"policy 7, rule "r""#.into()));
    assert_eq!(placed(&policy, &both, &named("k8s")), ("k8s".into(), "named by the spec".into()));
}

#[test]
fn a_spec_names_its_backend_where_the_policy_lets_its_caller() {
    let both = [open("dind"), open("k8s")];
    let mut policy = all_to_the_canary();
    let allowed = |policy: &Policy, roles: &[Role]| place_for(roles, policy, &both, &named("dind"));
    for anybody in [&[][..], &[Role::Worker], &Role::ALL] {
        assert_eq!(allowed(&policy, anybody).unwrap().backend, name("dind"));
    }
    policy.explicit_backend = Some([Role::Operator].into());
    for roles in [&[Role::Operator][..], &[Role::Worker, Role::Operator], &Role::ALL] {
        assert_eq!(allowed(&policy, roles).unwrap().by, DecidedBy::Spec);
    }
    let error = allowed(&policy, &[Role::Worker, Role::Viewer]).unwrap_err();
    let expected =
        "the policy lets a spec name its backend where the caller is: operator; this one is: worker, viewer";
    assert_eq!(error, NoBackend::Denied(expected.to_owned()));
    assert!(matches!(allowed(&policy, &[]), Err(NoBackend::Denied(_))));
    policy.explicit_backend = Some([].into());
    assert!(matches!(allowed(&policy, &Role::ALL), Err(NoBackend::Denied(_))));
    // What names none goes where everybody's goes.
    let decision = place_for(&[Role::Worker], &policy, &both, &RunSpec::default()).unwrap();
    assert_eq!(decision.backend, name("k8s"));
}

#[test]
fn one_that_takes_no_runs_is_passed_over() {
    let (policy, spec) = (all_to_the_canary(), RunSpec::default());
    for (canary, why) in [
        (drained("k8s"), "k8s is drained"),
        (incapable("k8s"), "k8s cannot honour the spec"),
        (unhealthy("k8s"), "k8s does not answer"),
    ] {
        let (backend, reason) = placed(&policy, &[open("dind"), canary], &spec);
        assert_eq!(backend, "dind");
        assert!(reason.ends_with(why), "{reason}");
    }
    assert_eq!(placed(&policy, &[open("dind")], &spec).0, "dind", "it is not configured any more");
}

#[test]
fn where_none_answers_the_run_waits_for_the_one_that_comes_first() {
    let (policy, spec) = (all_to_the_canary(), RunSpec::default());
    let decision = place(&policy, &[unhealthy("dind"), unhealthy("k8s")], &spec).unwrap();
    assert_eq!((decision.backend, decision.passed_over), (name("k8s"), Vec::new()));
    let decision = place(&policy, &[unhealthy("dind"), drained("k8s")], &spec).unwrap();
    let expected = vec![(name("k8s"), PassedOver::Drained)];
    assert_eq!((decision.backend, decision.passed_over), (name("dind"), expected));
}

#[test]
fn a_spec_that_nobody_can_honour_is_told_what_each_lacks() {
    let spec = RunSpec::default();
    let error = place(&all_to_the_canary(), &[incapable("dind"), incapable("k8s")], &spec).unwrap_err();
    let NoBackend::Incapable(invalid) = error else { panic!("{error:?}") };
    let told: Vec<_> =
        invalid.0.iter().map(|lack| (lack.field.as_str(), lack.description.as_str())).collect();
    let field = "spec.resources.gpus";
    assert_eq!(told, [(field, "backend k8s: no GPUs"), (field, "backend dind: no GPUs")]);
    let error = place(&all_to_the_canary(), &[drained("dind"), incapable("k8s")], &spec).unwrap_err();
    let expected = "no backend takes the run: k8s cannot honour the spec (no GPUs), dind is drained";
    assert_eq!(error, NoBackend::Closed(expected.to_owned()));
}

#[test]
fn a_backend_that_the_spec_names_is_never_another_one() {
    let both = [drained("dind"), open("k8s")];
    let error = place(&Policy::default(), &both, &named("dind")).unwrap_err();
    assert_eq!(error, NoBackend::Closed("no backend takes the run: dind is drained".to_owned()));
    let error = place(&Policy::default(), &both, &named("nowhere")).unwrap_err();
    let NoBackend::Incapable(invalid) = error else { panic!("{error:?}") };
    assert_eq!((invalid.0.len(), invalid.0[0].field.as_str()), (1, "spec.routing.backend"));
    let one = [unhealthy("dind"), open("k8s")];
    assert_eq!(placed(&Policy::default(), &one, &named("dind")).0, "dind", "it waits for it");
}

#[test]
fn a_decision_is_read_back_as_it_was_stored() {
    let decision = Decision {
        backend: name("dind"),
        version: 3,
        by: DecidedBy::Rule("r".to_owned()),
        bucket: Some(17),
        passed_over: vec![(name("k8s"), PassedOver::Drained)],
        shadow: None,
    };
    let text = serde_json::to_string(&decision).unwrap();
    assert_eq!(serde_json::from_str::<Decision>(&text).unwrap(), decision);
    assert_eq!(decision.to_string(), r#"policy 3, rule "r", bucket 17, k8s is drained"#);
}
