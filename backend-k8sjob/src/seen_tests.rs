use super::*;

fn pod(status: serde_json::Value) -> PodSeen {
    let pod = serde_json::json!({
        "metadata": { "name": "p", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z" },
        "status": status,
    });
    PodSeen::new(&serde_json::from_value(pod).unwrap())
}

fn container(name: &str, state: serde_json::Value) -> serde_json::Value {
    serde_json::json!({
        "name": name, "state": state, "image": "i", "imageID": "", "ready": false, "restartCount": 0,
    })
}

#[test]
fn each_container_is_told_apart() {
    let seen = pod(serde_json::json!({
        "phase": "Running",
        "initContainerStatuses": [container("fetch", serde_json::json!({ "terminated": { "exitCode": 0, "reason": "Completed" } }))],
        "containerStatuses": [
            container("publish", serde_json::json!({ "running": {} })),
            container("main", serde_json::json!({ "terminated": {
                "exitCode": 137, "reason": "OOMKilled", "finishedAt": "2026-01-01T00:00:01Z",
            } })),
        ],
    }));
    assert!(seen.fetch.has_ended() && seen.publish == Doing::Running && !seen.is_over());
    assert!(seen.main.was_out_of_memory() && seen.program_is_dead());
    assert_eq!(seen.main.finished(), Some(Timestamp::from_micros(1_767_225_601_000_000)));
    assert_eq!((seen.evicted(), seen.image_trouble(), seen.trouble()), (None, None, None));
}

#[test]
fn an_image_that_cannot_be_had_is_told_from_a_container_that_cannot_be_made() {
    let waiting = |reason: &str| {
        let state = serde_json::json!({ "waiting": { "reason": reason, "message": "why" } });
        pod(serde_json::json!({ "phase": "Pending", "containerStatuses": [container("main", state)] }))
    };
    for reason in ["ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName"] {
        let seen = waiting(reason);
        assert!(seen.image_trouble().unwrap().contains("why") && seen.trouble().is_none(), "{reason}");
    }
    let seen = waiting("CreateContainerConfigError");
    assert!(seen.image_trouble().is_none() && seen.trouble().is_some());
    let seen = waiting("PodInitializing");
    assert!(seen.image_trouble().is_none() && seen.trouble().is_none());
}

#[test]
fn evictions_are_known_by_reason_or_by_condition() {
    let by_node =
        pod(serde_json::json!({ "phase": "Failed", "reason": "Evicted", "message": "low on memory" }));
    assert!(by_node.evicted().unwrap().contains("low on memory") && by_node.program_is_dead());
    let by_condition = pod(serde_json::json!({ "phase": "Running", "conditions": [
        { "type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "m" },
    ] }));
    assert!(by_condition.evicted().unwrap().contains("PreemptionByScheduler"));
    let deadline = pod(serde_json::json!({ "phase": "Failed", "reason": "DeadlineExceeded" }));
    assert_eq!(deadline.evicted(), None);
}

#[test]
fn a_pod_without_a_node_says_why() {
    let seen = pod(serde_json::json!({ "phase": "Pending", "conditions": [
        { "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes" },
    ] }));
    assert_eq!(seen.unschedulable.as_deref(), Some("0/1 nodes"));
    assert!(seen.describe().ends_with("no node takes it: 0/1 nodes"), "{}", seen.describe());
}

#[test]
fn a_jobs_mark_and_failure_are_read() {
    let job: Job = serde_json::from_value(serde_json::json!({
        "metadata": { "uid": "u", "annotations": { STOPPED: "17", STOPPED_SEEN: "it was pending" } },
        "status": { "conditions": [
            { "type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "too long" },
        ] },
    }))
    .unwrap();
    let seen = JobSeen::new(&job);
    assert_eq!(seen.stopped, Some(Timestamp::from_micros(17)));
    assert_eq!(seen.stopped_seen.as_deref(), Some("it was pending"));
    assert_eq!(seen.failed.as_deref(), Some("DeadlineExceeded: too long"));
    assert_eq!(JobSeen::new(&Job::default()), JobSeen::default());
}
