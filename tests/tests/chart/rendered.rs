//! What a cluster would get: valid for every Kubernetes since 1.20, confined, with the documented rights, without secrets.

use std::{
    collections::BTreeSet,
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
};

use runner::config::{BackendConfig, Layers};
use runner_tests::{
    backend::Missing,
    chart::{Chart, NAMESPACE, Object, VALUES, documented_rights, folder, object, rights},
    objects::azurite::tools,
};
use serde_json::{Value, json};

use crate::{DIND_ONLY, NAME, POSTGRES, WORKLOADS, all, load};

#[test]
fn helm_finds_nothing_to_complain_about_in_any_file_of_values() {
    let Some(chart) = Chart::find("lint") else { return };
    let place = folder().display().to_string();
    for values in VALUES {
        let values = folder().join(values).display().to_string();
        let said = chart.run(&["lint", "--strict", &place, "--values", &values]);
        said.unwrap_or_else(|said| panic!("{values}: {said}"));
    }
}

#[test]
fn what_is_rendered_fits_the_oldest_kubernetes_and_the_newest() {
    let Some(chart) = Chart::find("schemas") else { return };
    let python = tools().map(|dir| dir.join("chart/bin/python3")).filter(|python| python.is_file());
    let Some(python) = python else {
        Missing("no schemas of Kubernetes: `cargo xtask test` installs them".to_owned())
            .skip("chart", "schemas");
        return;
    };
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("python/chart_schema.py");
    let check = |version: &str, objects: &Value| {
        let mut command = Command::new(&python);
        command.arg(&script).arg(version).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("start python");
        let mut to = child.stdin.take().expect("a pipe");
        to.write_all(objects.to_string().as_bytes()).expect("hand the objects over");
        drop(to);
        let output = child.wait_with_output().expect("wait for python");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(()) } else { Err(said) }
    };
    let mut every: Vec<Value> =
        all(&chart).iter().flat_map(|(_, objects)| objects).map(|object| object.0.clone()).collect();
    let whole = Value::from(every.clone());
    for version in ["1.20", "newest"] {
        check(version, &whole).unwrap_or_else(|said| panic!("{version}: {said}"));
    }
    // That the check can fail: a field that came after 1.20.
    let deployment = every.iter_mut().find(|object| object["kind"] == "Deployment").expect("a Deployment");
    deployment["spec"]["template"]["spec"]["os"] = json!({ "name": "linux" });
    let said = check("1.20", &Value::from(every)).expect_err("1.20 has no such field");
    assert!(said.contains("'os' was unexpected"), "{said}");
}

#[test]
fn every_container_is_held_to_the_restricted_standard_and_has_bounds() {
    let Some(chart) = Chart::find("confinement") else { return };
    for (values, objects) in all(&chart) {
        let pods: Vec<&Object> = objects.iter().filter(|object| object.pod().is_some()).collect();
        let kinds: Vec<&str> = pods.iter().map(|object| object.kind()).collect();
        assert_eq!(
            kinds,
            if values.contains("postgres://") { &["Deployment", "Job"][..] } else { &["Deployment"] }
        );
        for (object, pod) in pods.iter().filter_map(|object| Some((object, object.pod()?))) {
            confined(values, pod, object.kind() == "Deployment");
        }
        let spec = &object(objects, "Deployment", NAME).0["spec"];
        assert_eq!((&spec["replicas"], &spec["strategy"]["type"]), (&1.into(), &"Recreate".into()));
    }
}

fn confined(values: &str, pod: &Value, serves: bool) {
    let security = &pod["securityContext"];
    assert_eq!(security["runAsNonRoot"], true, "{values}");
    assert!(security["runAsUser"].as_u64().is_some_and(|user| user > 0), "{values}");
    assert_eq!(security["seccompProfile"]["type"], "RuntimeDefault", "{values}");
    // The service refuses keys that its group can read, which is what the other policy makes at each start.
    if serves {
        assert_eq!(security["fsGroupChangePolicy"], "OnRootMismatch", "{values}");
    }
    for forbidden in ["hostNetwork", "hostPID", "hostIPC"] {
        assert!(pod.get(forbidden).is_none(), "{values}: {forbidden}");
    }
    for container in pod["containers"].as_array().expect("containers") {
        let security = &container["securityContext"];
        let expected = json!({
            "allowPrivilegeEscalation": false, "privileged": false, "readOnlyRootFilesystem": true,
            "runAsNonRoot": true, "capabilities": { "drop": ["ALL"] },
        });
        assert_eq!(*security, expected, "{values}");
        for kind in ["requests", "limits"] {
            for what in ["cpu", "memory"] {
                assert!(!container["resources"][kind][what].is_null(), "{values}: {kind} {what}");
            }
        }
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"].into_iter().filter(|_| serves) {
            assert_eq!(container[probe]["httpGet"]["port"], "ops", "{values}: {probe}");
        }
    }
    for volume in pod["volumes"].as_array().expect("volumes") {
        assert!(volume.get("hostPath").is_none(), "{values}: {volume}");
        let bounded = volume.get("emptyDir").is_none_or(|dir| !dir["sizeLimit"].is_null());
        assert!(bounded, "{values}: {volume}");
    }
}

#[test]
fn the_schema_is_migrated_before_the_release_with_what_the_service_has_of_the_store() {
    let Some(chart) = Chart::find("migration") else { return };
    let objects = chart.render("values.yaml", POSTGRES).expect("it renders");
    let job = object(&objects, "Job", &format!("{NAME}-migrate"));
    assert_eq!(job.0["metadata"]["annotations"]["helm.sh/hook"], "pre-install,pre-upgrade");
    let pod = job.pod().expect("its pod");
    // Nothing of the release is there yet, and the Service of the release must not find it.
    assert!(pod.get("serviceAccountName").is_none() && pod["automountServiceAccountToken"] == false);
    let labels = &job.0["spec"]["template"]["metadata"]["labels"];
    assert_eq!(labels["app.kubernetes.io/component"], "migrate");
    let container = &pod["containers"][0];
    assert_eq!(container["args"], json!(["migrate"]));
    let service = objects.iter().find_map(Object::pod).expect("the service's pod");
    assert_eq!(container["image"], service["containers"][0]["image"]);
    // Its variables say what the service's configuration says.
    let variables = container["env"].as_array().expect("variables").iter();
    let env: Vec<(String, String)> = variables
        .filter_map(|one| Some((one["name"].as_str()?.to_owned(), one["value"].as_str()?.to_owned())))
        .collect();
    let ours = Layers { env, ..Layers::default() }.load().expect("it is a configuration").config.store;
    assert_eq!(ours, load(&objects).store);
    assert_eq!(ours.connections, 7);
    let without = chart.render("values.yaml", "").expect("it renders");
    assert!(without.iter().all(|object| object.kind() != "Job"));
}

#[test]
fn the_rights_are_the_documented_ones_in_the_workload_namespace_and_nobody_elses() {
    let Some(chart) = Chart::find("rights") else { return };
    let mut bound = 0;
    for (values, objects) in all(&chart) {
        let service = object(objects, "ServiceAccount", NAME);
        assert_eq!(service.0["automountServiceAccountToken"], false, "{values}");
        let pod = objects.iter().find_map(Object::pod).expect("the service's pod");
        assert_eq!(pod["serviceAccountName"], NAME, "{values}");
        let about_rights: Vec<&Object> =
            objects.iter().filter(|object| object.kind().contains("Role")).collect();
        // The token is in the pod exactly where it is good for something.
        assert_eq!(pod["automountServiceAccountToken"], !about_rights.is_empty(), "{values}");
        for one in about_rights {
            assert_eq!(one.namespace(), Some(WORKLOADS), "{values}: {}", one.kind());
            match one.kind() {
                "Role" => assert_eq!(rights(&one.0["rules"]), documented_rights(), "{values}"),
                "RoleBinding" => {
                    let subject = json!([{ "kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE }]);
                    assert_eq!(one.0["subjects"], subject, "{values}");
                    assert_eq!(one.0["roleRef"]["name"], NAME, "{values}");
                    bound += 1;
                    // The account of workloads is there, and in no binding.
                    let workload = object(objects, "ServiceAccount", &format!("{NAME}-workload"));
                    assert_eq!(workload.namespace(), Some(WORKLOADS), "{values}");
                    assert_eq!(workload.0["automountServiceAccountToken"], false, "{values}");
                }
                other => panic!("{values}: a {other}"),
            }
        }
    }
    assert!(bound >= VALUES.len());
}

#[test]
fn a_service_without_a_cluster_backend_gets_neither_rights_nor_a_port_for_agents() {
    let Some(chart) = Chart::find("no cluster") else { return };
    let objects = chart.render("values.yaml", DIND_ONLY).expect("it renders");
    assert!(objects.iter().all(|object| object.namespace() == Some(NAMESPACE)), "{objects:?}");
    let services: Vec<&str> =
        objects.iter().filter(|object| object.kind() == "Service").map(Object::name).collect();
    assert_eq!(services, [NAME]);
    assert_eq!(load(&objects).agent_listen, None);
}

#[test]
fn secrets_are_referred_to_and_never_rendered() {
    let Some(chart) = Chart::find("secrets") else { return };
    let known = BTreeSet::from([
        "ConfigMap",
        "Deployment",
        "Job",
        "LimitRange",
        "Namespace",
        "NetworkPolicy",
        "PersistentVolumeClaim",
        "ResourceQuota",
        "Role",
        "RoleBinding",
        "Service",
        "ServiceAccount",
    ]);
    for (values, objects) in all(&chart) {
        for object in objects {
            assert!(known.contains(object.kind()), "{values}: a {}", object.kind());
        }
        let pods = objects.iter().filter_map(Object::pod);
        for variable in pods.flat_map(|pod| pod["containers"][0]["env"].as_array().into_iter().flatten()) {
            let name = variable["name"].as_str().expect("a name");
            // Of the configuration, in which a credential is refused.
            let configuration = name.starts_with("RUNNER_STORE__") || name == "RUNNER_LOG__FORMAT";
            let path = name == "SSL_CERT_FILE";
            assert!(
                configuration || path || variable["valueFrom"]["secretKeyRef"].is_object(),
                "{values}: {variable}"
            );
        }
    }
    // Where a credential would be: as a Secret's name, its key, and the path that it is mounted at.
    let objects = chart.render("values-production.yaml", "").expect("it renders");
    let pod = objects.iter().find_map(Object::pod).expect("the service's pod");
    let volumes = pod["volumes"].as_array().expect("volumes");
    let secret = volumes.iter().find(|volume| volume["secret"].is_object()).expect("a Secret's volume");
    assert_eq!(secret["secret"]["secretName"], "runner-object-store");
    let config = load(&objects);
    let mounts = pod["containers"][0]["volumeMounts"].as_array().expect("mounts");
    let mount = mounts.iter().find(|mount| mount["name"] == secret["name"]).expect("its mount");
    let file = config.object_store.credentials_file.expect("a file of credentials");
    assert!(file.starts_with(mount["mountPath"].as_str().expect("a path")), "{}", file.display());
}

#[test]
fn the_chart_has_the_version_of_the_program() {
    let text = std::fs::read_to_string(folder().join("Chart.yaml")).expect("read the chart");
    let about: Value = serde_saphyr::from_str(&text).expect("YAML");
    assert_eq!(about["appVersion"], env!("CARGO_PKG_VERSION"));
    let Some(chart) = Chart::find("version") else { return };
    let objects = chart.render("values.yaml", "").expect("it renders");
    let pod = objects.iter().find_map(Object::pod).expect("the service's pod");
    assert_eq!(pod["containers"][0]["image"], format!("runner:{}", env!("CARGO_PKG_VERSION")));
    let BackendConfig::K8sJob(jobs) = &load(&objects).backends[0] else { panic!("another backend") };
    assert_eq!(jobs.agent_image, format!("runner-agent:{}", env!("CARGO_PKG_VERSION")));
    // A digest wins.
    let digest = format!("sha256:{}", "a".repeat(64));
    let over = format!("image: {{ tag: x, digest: '{digest}' }}");
    let objects = chart.render("values.yaml", &over).expect("it renders");
    let pod = objects.iter().find_map(Object::pod).expect("the service's pod");
    assert_eq!(pod["containers"][0]["image"], format!("runner@{digest}"));
}

#[test]
fn the_data_outlive_the_release_where_they_are_on_a_volume() {
    let Some(chart) = Chart::find("data") else { return };
    let objects = chart.render("values.yaml", "").expect("it renders");
    let claim = object(&objects, "PersistentVolumeClaim", NAME);
    assert_eq!(claim.0["metadata"]["annotations"]["helm.sh/resource-policy"], "keep");
    let over = "data: { persistence: { existingClaim: mine } }";
    let objects = chart.render("values.yaml", over).expect("it renders");
    assert!(objects.iter().all(|object| object.kind() != "PersistentVolumeClaim"));
    let pod = objects.iter().find_map(Object::pod).expect("the service's pod");
    assert!(pod["volumes"].to_string().contains(r#"{"claimName":"mine"}"#), "{}", pod["volumes"]);
}
