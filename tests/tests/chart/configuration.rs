//! The service's configuration through the chart: the same schema, the same meaning, and what is refused by name.

use std::path::PathBuf;

use runner::config::{BackendConfig, Environment, Layers, UnauthenticatedCallers};
use runner_tests::{
    chart::{Chart, NAMESPACE, Object, configuration, folder, object},
    service::{Service, eventually},
};
use serde_json::Value;

use crate::{NAME, WORKLOADS, all, load};

#[test]
fn the_configuration_is_what_the_service_reads() {
    let Some(chart) = Chart::find("configuration") else { return };
    for (values, objects) in all(&chart) {
        let config = load(objects);
        let pod = objects.iter().find_map(Object::pod).expect("the service's pod");
        let container = &pod["containers"][0];
        // The pod's ports are where the service listens, and the Services lead there.
        let port = |name: &str| {
            let ports = container["ports"].as_array().expect("ports");
            ports.iter().find(|port| port["name"] == name).map(|port| port["containerPort"].clone())
        };
        assert_eq!(port("api"), Some(config.listen.port().into()), "{values}");
        assert_eq!(port("ops"), Some(config.ops_listen.port().into()), "{values}");
        assert_eq!(port("agents"), config.agent_listen.map(|address| address.port().into()), "{values}");
        assert!(config.listen.ip().is_unspecified() && config.ops_listen.ip().is_unspecified(), "{values}");
        for service in objects.iter().filter(|object| object.kind() == "Service") {
            let target = service.0["spec"]["ports"][0]["targetPort"].as_str().expect("a port's name");
            assert_eq!(Some(&service.0["spec"]["ports"][0]["port"]), port(target).as_ref(), "{values}");
        }
        let mounts = container["volumeMounts"].as_array().expect("mounts");
        let data = mounts.iter().find(|mount| mount["name"] == "data").expect("the data's mount");
        // A folder of its own in the volume: the service makes it, with its own mode.
        assert_eq!(config.data_dir(), PathBuf::from(data["mountPath"].as_str().unwrap()).join("data"));
        assert_eq!(config.unauthenticated_callers, Some(UnauthenticatedCallers::Trusted), "{values}");
        let (file, _) = configuration(objects);
        let args = container["args"].to_string();
        assert!(args.contains(&file.display().to_string()), "{values}: {args}");
        let grace = pod["terminationGracePeriodSeconds"].as_u64().expect("a grace period");
        assert!(grace > runner::config::MAX_DRAIN.as_secs(), "{values}");
        for backend in &config.backends {
            let BackendConfig::K8sJob(jobs) = backend else { continue };
            assert_eq!(jobs.namespace, WORKLOADS, "{values}");
            assert_eq!(jobs.service_account.as_deref(), Some("demo-runner-workload"), "{values}");
            let url = format!("http://demo-runner-agents.{NAMESPACE}.svc:7602");
            assert!(jobs.agent_url == url || jobs.agent_url == "http://10.96.0.8:7602", "{values}");
        }
    }
    let production = load(&chart.render("values-production.yaml", "").expect("it renders"));
    assert_eq!(production.environment, Environment::Production);
}

#[test]
fn a_configuration_means_the_same_in_a_file_and_through_the_chart() {
    let Some(chart) = Chart::find("parity") else { return };
    // Numbers of every size, a list, a nested table, a duration, an escape.
    let over = r#"{"config": {
        "limits": {"log_bytes": 5000000000, "live_runs": 12345678, "attempts": {"ceiling": 7}},
        "server": {"max_upload_bytes": 4503599627370496},
        "inputs": {"https": {"hosts": ["a.example", "*.b.example:8443"]}},
        "shutdown": {"drain": "7s"},
        "log": {"filter": "info,runner_core=debug"},
        "object_store": {"url": "file:///var/lib/runner/data/a<b>&\"c", "settings": {}}
    }}"#;
    let through_the_chart = load(&chart.render("values.yaml", over).expect("it renders"));
    let over: Value = serde_json::from_str(over).expect("JSON");
    let base = chart.render("values.yaml", "").expect("it renders");
    let mut whole: Value = serde_json::from_str(&configuration(&base).1).expect("JSON");
    fn merge(tree: &mut Value, over: &Value) {
        match (tree, over) {
            (Value::Object(tree), Value::Object(over)) => {
                for (key, value) in over {
                    merge(tree.entry(key.clone()).or_insert(Value::Null), value);
                }
            }
            (tree, over) => *tree = over.clone(),
        }
    }
    merge(&mut whole, &over["config"]);
    let file = (PathBuf::from("runner.json"), whole.to_string());
    let by_hand = Layers { file: Some(file), ..Layers::default() }.load().expect("it is valid").config;
    assert_eq!(through_the_chart, by_hand);
    assert_eq!(through_the_chart.limits.log_bytes.0, 5_000_000_000);
    assert_eq!(through_the_chart.server.max_upload_bytes.0, 1 << 52);
}

#[test]
fn a_change_of_the_configuration_makes_a_new_pod() {
    let Some(chart) = Chart::find("rollout") else { return };
    let template = |over: &str| {
        let objects = chart.render("values.yaml", over).expect("it renders");
        object(&objects, "Deployment", NAME).0["spec"]["template"].clone()
    };
    assert_eq!(template(""), template(""));
    assert_ne!(template(""), template("config: { limits: { live_runs: 7 } }"));
}

#[test]
fn values_that_cannot_be_are_refused_by_their_names() {
    let Some(chart) = Chart::find("refusals") else { return };
    let jobs = |more: &str| format!("config: {{ backends: [{{ kind: k8sjob, {more} }}] }}");
    for (over, named) in [
        ("confg: {}", "confg is not allowed"),
        ("config: { limits: { logbytes: 1 } }", "config.limits: Additional property logbytes"),
        ("config: { limits: { live_runs: many } }", "config.limits.live_runs"),
        ("config: { listen: '0.0.0.0:1' }", "config: Additional property listen"),
        ("config: { data_dir: /elsewhere }", "config: Additional property data_dir"),
        ("config: { unauthenticated_callers: 'yes' }", "config.unauthenticated_callers"),
        ("config: { backends: [{ kind: mainframe }] }", "config.backends.0.kind"),
        (&jobs("slots: many"), "config.backends.0.slots"),
        (&jobs("namespace: elsewhere"), "config.backends[0].namespace"),
        (&jobs("kubeconfig: /etc/runner/secrets/k/config"), "config.backends[0].agent_url"),
        ("networkPolicies: { enabled: false }", "config.unauthenticated_callers"),
        (
            "{ networkPolicies: { enabled: false }, config: { unauthenticated_callers: whoever reaches the port is trusted,
                backends: [{ kind: k8sjob, enforces_network_policies: true }] } }",
            "config.backends[0].enforces_network_policies",
        ),
        // Peers that would let everybody in.
        ("networkPolicies: { workers: [{ podSelector: {} }] }", "networkPolicies.workers.0.podSelector"),
        ("networkPolicies: { workers: [{ namespaceSelector: { matchLabels: { a: b } } }] }", "podSelector is required"),
        ("networkPolicies: { workers: [{ ipBlock: { cidr: 0.0.0.0/0 } }] }", "Additional property ipBlock"),
        ("networkPolicies: { monitoring: [{}] }", "networkPolicies.monitoring.0"),
        ("networkPolicies: { workers: null }", "workers is required"),
        ("resources: { limits: { memory: null } }", "memory is required"),
        ("resources: { limits: { memory: lots } }", "resources.limits.memory"),
        ("secretEnv: [{ name: A, value: plain }]", "Additional property value"),
        ("secretMounts: [{ secretName: a, mountPath: /var/lib/runner }]", "secretMounts.0.mountPath"),
        ("image: { digest: latest }", "image.digest"),
        ("workloads: { namespace: runner-system }", "workloads.namespace"),
        ("config: { object_store: { url: 's3://bucket' } }", "caCertificates.configMap"),
        ("config: { store: { url: 'postgres://runner@db/runner' } }", "config.store.ca_file"),
        ("migration: { deadlineSeconds: 1 }", "migration.deadlineSeconds"),
        ("caCertificates: { configMap: a, secret: b }", "caCertificates.secret"),
    ] {
        let said = chart.render("values.yaml", over).map(|_| ()).expect_err(over);
        assert!(said.contains(named), "{over}: {said}");
    }
}

/// Takes the words out of a schema: `runner config schema` has them. In tables, as opposed to what is in lists, nothing is required:
/// what is not there has a default.
fn plain(schema: &mut Value, table: bool) {
    let Some(schema) = schema.as_object_mut() else { return };
    for words in ["$schema", "title", "description", "examples"] {
        schema.remove(words);
    }
    if table {
        schema.remove("required");
    }
    for below in schema.get_mut("properties").and_then(Value::as_object_mut).into_iter().flatten() {
        plain(below.1, table);
    }
    for one in ["items", "additionalProperties"] {
        schema.get_mut(one).into_iter().for_each(|below| plain(below, false));
    }
    for several in ["anyOf", "oneOf"] {
        let below = schema.get_mut(several).and_then(Value::as_array_mut);
        below.into_iter().flatten().for_each(|below| plain(below, false));
    }
}

/// The chart's schema of the configuration is the service's own, without what the chart itself decides.
/// `RUNNER_UPDATE_BASELINE=1` brings the file up to date.
#[test]
fn the_schema_of_the_values_has_the_services_own_schema_of_the_configuration() {
    let mut own = runner::config::layers::schema();
    plain(&mut own, true);
    let top = own.as_object_mut().expect("a schema");
    let properties = top["properties"].as_object_mut().expect("properties");
    for decided in ["data_dir", "listen", "ops_listen", "agent_listen"] {
        properties.remove(decided).unwrap_or_else(|| panic!("the configuration has no {decided}"));
    }
    let place = folder().join("values.schema.json");
    let text = std::fs::read_to_string(&place).expect("read the chart's schema");
    let mut chart: Value = serde_json::from_str(&text).expect("JSON");
    if std::env::var_os("RUNNER_UPDATE_BASELINE").is_some() {
        chart["properties"]["config"] = own;
        let text = serde_json::to_string_pretty(&chart).expect("JSON") + "\n";
        std::fs::write(place, text).expect("write the chart's schema");
        return;
    }
    assert_eq!(chart["properties"]["config"], own, "run this test once with RUNNER_UPDATE_BASELINE=1");
}

#[tokio::test]
async fn a_service_that_trusts_whoever_reaches_it_says_so_when_it_starts() {
    let words = UnauthenticatedCallers::Trusted.as_str();
    for (settings, said) in [(&[("RUNNER_UNAUTHENTICATED_CALLERS", words)][..], true), (&[], false)] {
        let service = Service::start_with(settings).await;
        // It answers that it is ready a moment before it says so.
        let log = eventually("the line of the start", async || {
            let log = service.log();
            log.lines().find(|line| line.contains("the service is ready")).map(str::to_owned)
        })
        .await;
        assert_eq!(log.contains(words), said, "{log}");
    }
}
