use serde_json::json;

use super::*;

fn known() -> BTreeSet<BackendName> {
    ["dind", "k8s", "local"].map(|name| name.parse().unwrap()).into()
}

fn policy(value: serde_json::Value) -> Policy {
    serde_json::from_value(value).unwrap()
}

fn fields(value: serde_json::Value) -> Vec<(String, String)> {
    let violations = policy(value).validate(&known()).err().map(|invalid| invalid.0).unwrap_or_default();
    violations.into_iter().map(|violation| (violation.field, violation.reason)).collect()
}

fn split(canaries: &serde_json::Value) -> serde_json::Value {
    json!({ "default": { "split": { "baseline": "dind", "canaries": canaries } } })
}

#[test]
fn a_whole_policy_is_valid_and_reads_back() {
    let value = json!({
        "salt": "2026-11",
        "rules": [
            { "name": "gpu", "match": { "labels": { "gpu": "yes" } }, "to": { "backend": "k8s" } },
            { "name": "acme", "match": { "tenants": ["acme"], "images": ["tools/*"] }, "to": { "split": {
                "sticky": { "label": "workflow" }, "baseline": "dind", "canaries": [{ "backend": "k8s", "percent": 0.25 }] } } },
        ],
        "default": { "split": { "sticky": "tenant", "baseline": "dind",
            "canaries": [{ "backend": "k8s", "percent": 60 }, { "backend": "local", "percent": 40 }] } },
    });
    let policy = policy(value.clone());
    policy.validate(&known()).unwrap();
    let again: Policy = serde_json::from_str(&serde_json::to_string(&policy).unwrap()).unwrap();
    assert_eq!(again, policy);
    assert!(Policy::default().validate(&known()).is_ok());
}

#[test]
fn a_bad_split_is_told_by_its_field() {
    let field = |rest: &str, reason: &str| (format!("default.split.{rest}"), reason.to_owned());
    let canary = |backend: &str, percent: f64| json!({ "backend": backend, "percent": percent });
    for (canaries, expected) in [
        (json!([]), field("canaries", "INVALID")),
        (json!([canary("k8s", 1.0), canary("local", 1.0), canary("k8s", 1.0)]), field("canaries", "INVALID")),
        (json!([canary("nowhere", 1.0)]), field("canaries[0].backend", "INVALID")),
        (json!([canary("dind", 1.0)]), field("canaries[0].backend", "DUPLICATE")),
        (json!([canary("k8s", 1.0), canary("k8s", 1.0)]), field("canaries[1].backend", "DUPLICATE")),
        (json!([canary("k8s", 60.0), canary("local", 40.01)]), field("canaries[1].percent", "TOO_LARGE")),
    ] {
        assert_eq!(fields(split(&canaries)), [expected]);
    }
    let unknown = json!({ "default": { "split": { "baseline": "x", "canaries": [canary("k8s", 1.0)] } } });
    assert_eq!(fields(unknown), [field("baseline", "INVALID")]);
}

#[test]
fn what_no_document_has_is_refused_when_it_is_read() {
    for bad in [
        json!({ "sallt": "x" }),
        split(&json!([{ "backend": "k8s", "percent": 100.01 }])),
        split(&json!([{ "backend": "k8s", "percent": 0.001 }])),
        split(&json!([{ "backend": "No", "percent": 1 }])),
        json!({ "default": { "backend": "k8s", "split": {} } }),
        json!({ "rules": [{ "name": "x", "to": { "backend": "k8s" }, "matches": {} }] }),
    ] {
        assert!(serde_json::from_value::<Policy>(bad.clone()).is_err(), "{bad}");
    }
}

#[test]
fn a_rule_that_nothing_reaches_is_refused() {
    let rule = |name: &str, matches: &serde_json::Value| json!({ "name": name, "match": matches, "to": { "backend": "k8s" } });
    let unreachable = [("rules[1].match".to_owned(), "INVALID".to_owned())];
    for (first, second) in [
        (json!({}), json!({ "tenants": ["a"] })),
        (json!({ "tenants": ["a", "b"] }), json!({ "tenants": ["a"], "labels": { "x": "1" } })),
        (json!({ "images": ["tools/*"] }), json!({ "images": ["tools/a", "tools/b/*"] })),
        (json!({ "labels": { "x": "1" } }), json!({ "labels": { "x": "1", "y": "2" } })),
        (json!({ "images": ["a"] }), json!({ "images": ["a"] })),
    ] {
        let both = json!({ "rules": [rule("one", &first), rule("two", &second)] });
        assert_eq!(fields(both), unreachable, "{first} {second}");
    }
    for (first, second) in [
        (json!({ "tenants": ["a"] }), json!({})),
        (json!({ "tenants": ["a"] }), json!({ "tenants": ["a", "b"] })),
        (json!({ "images": ["tools/a"] }), json!({ "images": ["tools/*"] })),
        (json!({ "images": ["tools/a*"] }), json!({ "images": ["tools/*"] })),
        (json!({ "labels": { "x": "1" } }), json!({ "labels": { "x": "2" } })),
    ] {
        let both = json!({ "rules": [rule("one", &first), rule("two", &second)] });
        assert_eq!(fields(both), [], "{first} {second}");
    }
}

#[test]
fn names_and_sizes_of_rules_are_checked() {
    let rule = |name: &str, image: &str| json!({ "name": name, "match": { "images": [image] }, "to": { "backend": "nowhere" } });
    let value = json!({ "salt": "a\nb", "rules": [rule("", "a"), rule("x", "*b"), rule("x", "c**")] });
    let expected = [
        ("salt", "INVALID"),
        ("rules[0].name", "REQUIRED"),
        ("rules[0].to.backend", "INVALID"),
        ("rules[1].match.images", "INVALID"),
        ("rules[1].to.backend", "INVALID"),
        ("rules[2].name", "DUPLICATE"),
        ("rules[2].match.images", "INVALID"),
        ("rules[2].to.backend", "INVALID"),
    ];
    assert_eq!(fields(value), expected.map(|(field, reason)| (field.to_owned(), reason.to_owned())));
    let many: Vec<_> = (0..=MAX_RULES).map(|i| json!({ "name": format!("r{i}"), "match": { "labels": { "i": i.to_string() } }, "to": { "backend": "k8s" } })).collect();
    assert_eq!(fields(json!({ "rules": many })), [("rules".to_owned(), "TOO_LARGE".to_owned())]);
}

#[test]
fn a_guard_that_makes_no_sense_is_refused() {
    assert!(policy(json!({ "guard": {} })).validate(&known()).is_ok());
    let bad = json!({ "guard": { "window_seconds": 59, "error_percent": 0, "slow_start_seconds": 0 } });
    let expected = ["window_seconds", "error_percent", "slow_start_seconds"];
    assert_eq!(fields(bad), expected.map(|name| (format!("guard.{name}"), "INVALID".to_owned())));
}

#[test]
fn a_rule_matches_what_it_says() {
    let matches: Match = serde_json::from_value(
        json!({ "tenants": ["a"], "images": ["x", "tools/*"], "labels": { "k": "v" } }),
    )
    .unwrap();
    let spec = |image: Option<&str>, label: &str| RunSpec {
        image: image.map(str::to_owned),
        labels: [("k".to_owned(), label.to_owned())].into(),
        ..RunSpec::default()
    };
    let tenant = |name: &str| name.parse::<TenantId>().unwrap();
    for (is, name, image, label) in [
        (true, "a", Some("x"), "v"),
        (true, "a", Some("tools/y:1"), "v"),
        (false, "b", Some("x"), "v"),
        (false, "a", Some("xy"), "v"),
        (false, "a", None, "v"),
        (false, "a", Some("x"), "w"),
    ] {
        assert_eq!(matches.matches(&tenant(name), &spec(image, label)), is, "{name} {image:?} {label}");
    }
    assert!(Match::default().matches(&tenant("z"), &spec(None, "")));
}

#[test]
fn shadows_that_make_no_sense_are_refused() {
    let shadow = |more: serde_json::Value| {
        let mut shadow = json!({ "backend": "k8s", "percent": 5 });
        shadow.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "rules": [{ "name": "r", "to": { "backend": "dind" } }], "shadow": shadow })
    };
    assert_eq!(fields(shadow(json!({ "rules": ["r"], "match": { "images": ["a*"] } }))), []);
    for (bad, field) in [
        (json!({ "backend": "nowhere" }), "backend"),
        (json!({ "at_once": 0 }), "at_once"),
        (json!({ "at_once": 257 }), "at_once"),
        (json!({ "patience_seconds": 0 }), "patience_seconds"),
        (json!({ "rules": ["r", "other"] }), "rules"),
        (json!({ "match": { "images": ["a*b"] } }), "match.images"),
    ] {
        assert_eq!(fields(shadow(bad)), [(format!("shadow.{field}"), "INVALID".to_owned())]);
    }
}
