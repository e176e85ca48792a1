//! The network policies, as text: who reaches whom. The test cluster's network enforces none.

use runner_tests::chart::{self, Chart, NAMESPACE, Object, object};
use serde_json::{Value, json};

use crate::{NAME, WORKLOADS, all};

/// Rules of the policies that select these pods, in one direction.
fn rules<'a>(
    objects: &'a [Object],
    namespace: &str,
    direction: &str,
    labels: &[(&str, &str)],
) -> Vec<&'a Value> {
    let policies = objects
        .iter()
        .filter(|object| object.kind() == "NetworkPolicy" && object.namespace() == Some(namespace));
    let selected = policies.filter(|policy| chart::selects(&policy.0["spec"]["podSelector"], labels));
    selected.flat_map(|policy| policy.0["spec"][direction].as_array().into_iter().flatten()).collect()
}

/// What a rule opens, for reading in an assertion: its ports, and its peers as JSON.
fn opened(rule: &Value, peers: &str) -> (Vec<String>, Value) {
    let ports = rule["ports"].as_array().expect("a rule names ports").iter();
    let ports =
        ports.map(|port| format!("{} {}", port["protocol"].as_str().unwrap(), port["port"])).collect();
    (ports, rule[peers].clone())
}

#[test]
fn a_workload_reaches_names_its_service_and_https_outside_where_it_may_and_nothing_reaches_it() {
    let Some(chart) = Chart::find("policies of workloads") else { return };
    let objects = chart.render("values.yaml", "").expect("it renders");
    let deny = object(&objects, "NetworkPolicy", &format!("{NAME}-deny"));
    assert_eq!(deny.namespace(), Some(WORKLOADS));
    assert_eq!(deny.0["spec"], json!({ "podSelector": {}, "policyTypes": ["Ingress", "Egress"] }));
    let egress = |objects: &[Object], network: &str| -> Vec<(Vec<String>, Value)> {
        let labels = [("runner.network", network), ("app.kubernetes.io/managed-by", "runner")];
        assert!(rules(objects, WORKLOADS, "ingress", &labels).is_empty(), "{network}");
        rules(objects, WORKLOADS, "egress", &labels).iter().map(|rule| opened(rule, "to")).collect()
    };
    let ports = |rules: &[(Vec<String>, Value)]| -> Vec<String> {
        rules.iter().flat_map(|(ports, _)| ports.clone()).collect()
    };
    for network in ["none", "a-network-of-the-operators"] {
        assert_eq!(ports(&egress(&objects, network)), ["TCP 7602", "UDP 53", "TCP 53"], "{network}");
    }
    let outside = egress(&objects, "egress");
    assert_eq!(ports(&outside), ["TCP 7602", "UDP 53", "TCP 53", "TCP 443"]);
    for (ports, to) in &outside {
        assert!(to.as_array().is_some_and(|to| !to.is_empty()), "{ports:?} are open to everybody");
    }
    // HTTPS is not a way to the cluster, its nodes or the cloud's metadata.
    let (_, https) = outside.last().expect("HTTPS");
    let except = https[0]["ipBlock"]["except"].as_array().expect("exceptions");
    for range in ["10.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"] {
        assert!(except.contains(&range.into()), "{range}");
    }
    // The agents' port is opened to the service's pod alone.
    let pod_labels = &object(&objects, "Deployment", NAME).0["spec"]["template"]["metadata"]["labels"];
    let labels: Vec<(&str, &str)> = pod_labels
        .as_object()
        .expect("labels")
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str().expect("a text")))
        .collect();
    assert!(chart::selects(&outside[0].1[0]["podSelector"], &labels), "{}", outside[0].1);
    // A pod that is no workload of ours reaches nothing at all.
    assert!(rules(&objects, WORKLOADS, "egress", &[("app", "stray")]).is_empty());
    // Where agents dial an address, the network `none` needs no names, and has none.
    let by_address = "config: { backends: [{ kind: k8sjob, agent_url: 'http://10.96.0.8:7602' }] }";
    let objects = chart.render("values.yaml", by_address).expect("it renders");
    assert_eq!(ports(&egress(&objects, "none")), ["TCP 7602"]);
    assert_eq!(ports(&egress(&objects, "egress")), ["TCP 7602", "UDP 53", "TCP 53", "TCP 443"]);
}

#[test]
fn the_service_is_reached_by_selected_workers_agents_and_monitoring_each_at_its_port() {
    let Some(chart) = Chart::find("policies of the service") else { return };
    let service = [
        ("app.kubernetes.io/name", "runner"),
        ("app.kubernetes.io/instance", chart::RELEASE),
        ("app.kubernetes.io/component", "service"),
    ];
    for (values, objects) in all(&chart) {
        if values.contains("enabled: false") {
            assert!(objects.iter().all(|object| object.kind() != "NetworkPolicy"), "{values}");
            continue;
        }
        let policy = object(objects, "NetworkPolicy", NAME);
        assert_eq!(policy.0["spec"]["policyTypes"], json!(["Ingress", "Egress"]), "{values}");
        for rule in rules(objects, NAMESPACE, "ingress", &service) {
            let (ports, from) = opened(rule, "from");
            assert_eq!(ports.len(), 1, "{values}: {rule}");
            let from = from.as_array().unwrap_or_else(|| panic!("{values}: {ports:?} is open to everybody"));
            assert!(!from.is_empty(), "{values}: {ports:?} is open to everybody");
            for peer in from {
                assert!(peer.as_object().is_some_and(|peer| !peer.is_empty()), "{values}: {peer}");
            }
        }
    }
    let objects = chart.render("values.yaml", "").expect("it renders");
    let ingress = rules(&objects, NAMESPACE, "ingress", &service);
    let [workers, agents, monitoring] = ingress[..] else { panic!("{ingress:?}") };
    let peer = |namespace: Value, pod: Value| json!([{ "namespaceSelector": namespace, "podSelector": pod }]);
    let labelled = |name: &str| json!({ "matchLabels": { name: "true" } });
    assert_eq!(
        opened(workers, "from"),
        (vec!["TCP 7600".to_owned()], peer(labelled("runner.workers"), labelled("runner.worker")))
    );
    let (ports, from) = opened(agents, "from");
    assert_eq!(ports, ["TCP 7602"]);
    assert!(chart::selects(&from[0]["podSelector"], &[("runner.network", "none")]), "{from}");
    assert!(!chart::selects(&from[0]["podSelector"], &[("app", "stray")]), "{from}");
    let (ports, from) = opened(monitoring, "from");
    assert_eq!(ports, ["TCP 7601"]);
    assert!(from.to_string().contains("monitoring"), "{from}");
    let egress = |values: &str| -> Vec<String> {
        let objects = chart.render(values, "").expect("it renders");
        let rules = rules(&objects, NAMESPACE, "egress", &service);
        rules.iter().flat_map(|rule| opened(rule, "to").0).collect()
    };
    let names_and_cluster = ["UDP 53", "TCP 53", "TCP 443", "TCP 6443"];
    assert_eq!(egress("values.yaml"), names_and_cluster);
    assert_eq!(egress("values-production.yaml"), [&names_and_cluster[..], &["TCP 443"]].concat());
}
