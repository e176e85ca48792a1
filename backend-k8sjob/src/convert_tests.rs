use runner_core::{
    id::RunId,
    spec::{Input, InputSource, Output, Resources},
};
use serde_json::Value;
use uuid::Uuid;

use super::*;
use crate::config::PullPolicy;

fn config() -> K8sJobConfig {
    K8sJobConfig {
        agent_url: "http://10.0.0.1:7602".into(),
        agent_image: "runner-agent:1".into(),
        pull_policy: PullPolicy::IfNotPresent,
        cpu_request_percent: 50,
        ..K8sJobConfig::default()
    }
}

fn spec() -> RunSpec {
    let input = |path: &str| Input {
        path: path.into(),
        source: InputSource::Inline(bytes::Bytes::from_static(b"x")),
        sha256: None,
        mode: None,
        extract: None,
    };
    RunSpec {
        image: Some("busybox:1".into()),
        command: vec!["/bin/sh".into(), "-c".into(), "secret-text".into()],
        env: [("TOKEN".to_owned(), "secret-value".to_owned())].into(),
        inputs: vec![input("/inputs/a"), input("/etc/app.conf")],
        outputs: vec![Output {
            path: "/outputs/x".into(),
            glob: false,
            destination: None,
            required: true,
            max_bytes: None,
        }],
        resources: Resources { cpu_millis: Some(500), memory_bytes: Some(64 << 20), ..Resources::default() },
        network: Network::Egress,
        timeout: Some(Duration::from_secs(100)),
        stop_grace: Some(Duration::from_secs(10)),
        ..RunSpec::default()
    }
}

fn made(config: &K8sJobConfig, spec: &RunSpec) -> (Value, ExecSpec) {
    let names = Names::new("here", &config.name);
    let attempt = AttemptId { run: RunId::new(Uuid::from_u128(7)), number: 2 };
    let with = Conversion { attempt, spec, log_limit_bytes: 1 << 20, config, names: &names };
    (serde_json::to_value(job(&with).unwrap()).unwrap(), exec_spec(&with).unwrap())
}

#[test]
fn every_pod_keeps_the_restricted_standard() {
    let (job, _) = made(&config(), &spec());
    let pod = &job["spec"]["template"]["spec"];
    assert_eq!(pod["automountServiceAccountToken"], false);
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert_eq!(pod["securityContext"]["runAsUser"], 65532);
    assert_eq!(pod["securityContext"]["fsGroup"], 65532);
    assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    for forbidden in ["hostNetwork", "hostPID", "hostIPC", "hostAliases", "serviceAccountName"] {
        assert!(pod.get(forbidden).is_none(), "{forbidden}");
    }
    let containers =
        pod["containers"].as_array().unwrap().iter().chain(pod["initContainers"].as_array().unwrap());
    let mut names = Vec::new();
    for container in containers {
        names.push(container["name"].as_str().unwrap());
        let security = &container["securityContext"];
        assert_eq!(security["allowPrivilegeEscalation"], false);
        assert_eq!(security["readOnlyRootFilesystem"], true);
        assert_eq!(security["capabilities"], serde_json::json!({ "drop": ["ALL"] }));
        for kind in ["requests", "limits"] {
            for what in ["cpu", "memory"] {
                assert!(container["resources"][kind][what].is_string(), "{kind} {what} of {container}");
            }
        }
        for forbidden in ["ports", "lifecycle", "envFrom", "volumeDevices"] {
            assert!(container.get(forbidden).is_none(), "{forbidden}");
        }
    }
    assert_eq!(names, ["main", "publish", "fetch"]);
    for volume in pod["volumes"].as_array().unwrap() {
        let limited = volume["emptyDir"]["sizeLimit"].is_string();
        assert!(limited || volume["name"] == "token", "{volume}");
        assert!(volume.get("hostPath").is_none());
    }
}

#[test]
fn the_token_is_in_no_reach_of_the_program() {
    let (job, _) = made(&config(), &spec());
    let pod = &job["spec"]["template"]["spec"];
    let main = &pod["containers"][0];
    assert_eq!(main["name"], "main");
    let mounts: Vec<&str> = main["volumeMounts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|mount| mount["name"].as_str().unwrap())
        .collect();
    assert!(!mounts.contains(&"token"), "{mounts:?}");
    assert!(main.get("env").is_none(), "not even the service's address");
    for agent in [&pod["containers"][1], &pod["initContainers"][0]] {
        let token =
            agent["volumeMounts"].as_array().unwrap().iter().find(|mount| mount["name"] == "token").unwrap();
        assert_eq!(token["readOnly"], true);
    }
}

#[test]
fn no_text_of_a_caller_becomes_a_field_of_the_job() {
    let (job, exec) = made(&config(), &spec());
    let text = job.to_string();
    for secret in ["secret-text", "secret-value", "app.conf.x"] {
        assert!(!text.contains(secret), "{secret}");
    }
    assert_eq!(exec.argv, ["/bin/sh", "-c", "secret-text"]);
    assert_eq!(exec.env["TOKEN"], "secret-value");
}

#[test]
fn the_deadlines_are_nested_and_the_service_owns_retries() {
    let (job, exec) = made(&config(), &spec());
    let spec = &job["spec"];
    let pod = spec["template"]["spec"]["activeDeadlineSeconds"].as_u64().unwrap();
    assert!(exec.timeout.as_secs() + exec.stop_grace.as_secs() < pod);
    assert!(pod < spec["activeDeadlineSeconds"].as_u64().unwrap());
    assert_eq!(
        (&spec["backoffLimit"], &spec["completions"], &spec["parallelism"]),
        (&0.into(), &1.into(), &1.into())
    );
    assert_eq!(spec["template"]["spec"]["restartPolicy"], "Never");
    assert_eq!(spec["ttlSecondsAfterFinished"], 86_400);
    assert_eq!(spec["template"]["spec"]["terminationGracePeriodSeconds"], 70);
}

#[test]
fn inputs_are_read_only_and_outputs_are_not() {
    let (job, _) = made(&config(), &spec());
    let mounts = job["spec"]["template"]["spec"]["containers"][0]["volumeMounts"].as_array().unwrap();
    let at = |path: &str| mounts.iter().find(|mount| mount["mountPath"] == path).unwrap();
    for (path, read_only) in
        [("/inputs", true), ("/etc/app.conf", true), ("/outputs", false), ("/tmp", false)]
    {
        assert_eq!(at(path)["readOnly"].as_bool().unwrap_or(false), read_only, "{path}");
    }
    assert_eq!(at("/inputs")["subPath"], at("/inputs")["subPath"].as_str().unwrap());
    assert!(at("/inputs")["subPath"].as_str().unwrap().starts_with("in/"));
}

#[test]
fn the_limits_are_the_specs_and_a_share_is_reserved() {
    let (job, _) = made(&config(), &spec());
    let resources = &job["spec"]["template"]["spec"]["containers"][0]["resources"];
    assert_eq!(resources["limits"], serde_json::json!({ "cpu": "500m", "memory": "67108864" }));
    assert_eq!(resources["requests"], serde_json::json!({ "cpu": "250m", "memory": "67108800" }));
}

#[test]
fn what_an_operator_configures_appears() {
    let config = K8sJobConfig {
        node_selector: [("pool".into(), "batch".into())].into(),
        tolerations: vec![crate::config::Toleration { key: "batch".into(), value: None, effect: None }],
        runtime_class: Some("kata".into()),
        priority_class: Some("low".into()),
        queue_name: Some("team".into()),
        image_pull_secrets: vec!["registry".into()],
        service_account: Some("workload".into()),
        pod_template: serde_json::from_value(serde_json::json!({
            "labels": { "team": "a" },
            "annotations": { "note": "b" },
            "affinity": { "podAntiAffinity": {} },
            "topology_spread_constraints": [{ "maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule" }],
            "scheduler_name": "other",
            "dns_policy": "Default",
            "dns_config": { "searches": ["example.org"] },
        }))
        .unwrap(),
        ..config()
    };
    let (job, _) = made(&config, &spec());
    let pod = &job["spec"]["template"]["spec"];
    assert_eq!(pod["nodeSelector"]["pool"], "batch");
    assert_eq!(pod["tolerations"][0], serde_json::json!({ "key": "batch", "operator": "Exists" }));
    assert_eq!((&pod["runtimeClassName"], &pod["priorityClassName"]), (&"kata".into(), &"low".into()));
    assert_eq!(pod["imagePullSecrets"][0]["name"], "registry");
    assert_eq!(
        (&pod["serviceAccountName"], &pod["automountServiceAccountToken"]),
        (&"workload".into(), &false.into())
    );
    assert_eq!(job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"], "team");
    let metadata = &job["spec"]["template"]["metadata"];
    assert_eq!(
        (&metadata["labels"]["runner.network"], &metadata["labels"]["team"]),
        (&"egress".into(), &"a".into())
    );
    assert_eq!(metadata["annotations"], serde_json::json!({ "note": "b" }));
    assert!(job["metadata"]["labels"].get("team").is_none(), "the Job is selected by the service alone");
    assert!(pod["affinity"]["podAntiAffinity"].is_object());
    assert_eq!(pod["topologySpreadConstraints"][0]["topologyKey"], "zone");
    assert_eq!((&pod["schedulerName"], &pod["dnsPolicy"]), (&"other".into(), &"Default".into()));
    assert_eq!(pod["dnsConfig"]["searches"][0], "example.org");
}

#[test]
fn root_is_refused_however_it_is_asked_for() {
    let (config, names) = (config(), Names::new("here", &config().name));
    let attempt = AttemptId { run: RunId::new(Uuid::from_u128(7)), number: 2 };
    for user in [User { uid: 0, gid: 7 }, User { uid: 7, gid: 0 }] {
        let spec = RunSpec { user: Some(user), ..spec() };
        let with = Conversion { attempt, spec: &spec, log_limit_bytes: 1, config: &config, names: &names };
        assert!(exec_spec(&with).is_err(), "{user:?}");
    }
}
