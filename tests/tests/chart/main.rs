//! The Helm chart, rendered. `chart_k8sjob.rs` installs it on a cluster.

mod configuration;
mod policies;
mod rendered;

use std::sync::OnceLock;

use runner::config::{Config, Layers};
use runner_tests::chart::{Chart, Object, VALUES, configuration};

const NAME: &str = "demo-runner";
const WORKLOADS: &str = "runner-workloads";

/// A Docker backend alone: nothing of the cluster is needed.
const DIND_ONLY: &str = "
config:
  default_backend: engine
  backends:
    - { kind: dind, name: engine, host: 'tcp://engine:2376', acknowledged_for_production: engine,
        tls: { ca: /etc/runner/secrets/e/ca.pem, cert: /etc/runner/secrets/e/cert.pem, key: /etc/runner/secrets/e/key.pem } }
secretMounts: [{ secretName: engine, mountPath: /etc/runner/secrets/e }]
";

/// State in PostgreSQL, by TLS, with a password.
const POSTGRES: &str = "
config: { store: { url: 'postgres://runner@db.example.org/runner', password_file: /etc/runner/secrets/state/password, connections: 7 } }
caCertificates: { configMap: authorities }
secretMounts: [{ secretName: state, mountPath: /etc/runner/secrets/state }]
networkPolicies: { stateStore: { to: [{ ipBlock: { cidr: 192.0.2.7/32 } }] } }
";

/// Values that turn much on, beside the chart's own files.
const VARIANTS: [(&str, &str); 5] = [
    ("values.yaml", POSTGRES),
    ("values.yaml", DIND_ONLY),
    ("values.yaml", "networkPolicies: { workers: [], monitoring: [], dns: [] }"),
    (
        "values-dev.yaml",
        "
networkPolicies: { enabled: false }
config: { unauthenticated_callers: whoever reaches the port is trusted }
imagePullSecrets: [registry]
secretEnv: [{ name: AWS_ACCESS_KEY_ID, secretName: store, key: id }]
caCertificates: { secret: authorities }
podAnnotations: { a: b }
nodeSelector: { disk: fast }
tolerations: [{ key: runner, operator: Exists }]
affinity: { podAntiAffinity: {} }
priorityClassName: high
service: { clusterIP: 10.96.0.7, annotations: { a: b } }
serviceAccount: { annotations: { a: b } }
",
    ),
    (
        "values-production.yaml",
        "
bindAddress: '::'
image: { digest: 'sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef' }
config: { backends: [{ kind: k8sjob, agent_url: 'http://10.96.0.8:7602' }], default_backend: k8sjob }
agents: { clusterIP: 10.96.0.8 }
networkPolicies:
  apiServer: { to: [{ ipBlock: { cidr: 10.0.0.1/32 } }] }
  objectStore: { to: [{ ipBlock: { cidr: 192.0.2.0/24 } }] }
  extraEgress: [{ to: [{ ipBlock: { cidr: 198.51.100.0/24 } }], ports: [{ protocol: TCP, port: 2376 }] }]
data: { persistence: { storageClass: fast, keep: false } }
",
    ),
];

/// Everything that is rendered here, once: the chart's own files of values, and the variants.
fn all(chart: &Chart) -> &'static [(String, Vec<Object>)] {
    static ALL: OnceLock<Vec<(String, Vec<Object>)>> = OnceLock::new();
    ALL.get_or_init(|| render_all(chart))
}

fn render_all(chart: &Chart) -> Vec<(String, Vec<Object>)> {
    let own = VALUES.map(|values| (values, ""));
    let all = own.iter().chain(&VARIANTS);
    all.map(|(values, over)| {
        let objects = chart.render(values, over).unwrap_or_else(|said| panic!("{values} {over}: {said}"));
        (format!("{values} {over}"), objects)
    })
    .collect()
}

fn load(objects: &[Object]) -> Config {
    let file = configuration(objects);
    let layers = Layers { file: Some(file.clone()), ..Layers::default() };
    layers.load().unwrap_or_else(|error| panic!("{error}\n{}", file.1)).config
}
