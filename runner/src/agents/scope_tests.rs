use std::sync::Arc;

use runner_core::{
    artifact::{EntryKind, ManifestEntry},
    backend::NoProgress,
    fake::artifact::MemoryArtifacts,
    id::{AttemptId, RunId},
    spec::{Input, Output, RunSpec},
};
use uuid::Uuid;

use super::*;

fn input(source: &str) -> Input {
    let source = InputSource::Artifact(source.parse().unwrap());
    Input { path: "/inputs/x".into(), source, sha256: None, mode: None, extract: None }
}

fn attempt(inputs: Vec<Input>) -> AttemptContext {
    let output = Output {
        path: "/outputs/x".into(),
        glob: false,
        destination: Some("artifact:uploads/t/dest/".parse().unwrap()),
        required: false,
        max_bytes: None,
    };
    AttemptContext {
        attempt: AttemptId { run: RunId::new(Uuid::from_u128(7)), number: 2 },
        tenant: "t".parse().unwrap(),
        spec: Arc::new(RunSpec { inputs, outputs: vec![output], ..RunSpec::default() }),
        log_limit_bytes: 0,
        artifacts: Arc::new(MemoryArtifacts::default()),
        progress: Arc::new(NoProgress),
    }
}

fn key(text: &str) -> ArtifactKey {
    text.parse().unwrap()
}

#[test]
fn an_agent_writes_what_its_attempt_stores_and_nothing_else() {
    let attempt = attempt(Vec::new());
    let own = ArtifactKey::attempt_prefix(&attempt.tenant, attempt.attempt);
    for good in ["manifest.json", "outputs.json", "outputs/0/x"] {
        assert!(may_write(&attempt, &own.join(good).unwrap()), "{good}");
    }
    assert!(may_write(&attempt, &key("uploads/t/dest/x/y")));
    for bad in ["log/0", "manifest.json/x", "outputs"] {
        assert!(!may_write(&attempt, &own.join(bad).unwrap()), "{bad}");
    }
    let run = ArtifactKey::run_prefix(&attempt.tenant, attempt.attempt.run);
    for bad in [
        run.join("1/outputs/0/x").unwrap(),
        run.join("22/manifest.json").unwrap(),
        key("uploads/t/dest"),
        key("uploads/t/dest2/x"),
    ] {
        assert!(!may_write(&attempt, &bad), "{bad}");
    }
}

#[tokio::test]
async fn an_agent_reads_its_inputs_and_what_their_manifests_name() {
    let attempt = attempt(vec![input("artifact:uploads/t/one"), input("artifact:uploads/t/tree/")]);
    let entry = |path: &str, at: &str| ManifestEntry {
        output: String::new(),
        base: String::new(),
        path: path.into(),
        path_encoded: false,
        kind: EntryKind::File,
        size: 1,
        sha256: String::new(),
        mode: 0o644,
        key: Some(key(at)),
    };
    let manifest = Manifest {
        entries: vec![entry("a", "uploads/t/tree/files/a"), entry("b", "uploads/other/b")],
        ..Manifest::default()
    };
    let bytes = serde_json::to_vec(&manifest).unwrap().into();
    attempt.artifacts.put_bytes(&key("uploads/t/tree/manifest.json"), bytes).await.unwrap();
    for (at, readable) in [
        ("uploads/t/one", Readable::Yes),
        ("uploads/t/tree/manifest.json", Readable::Yes),
        ("uploads/t/tree/files/a", Readable::IfNamed),
        ("uploads/t/elsewhere", Readable::IfNamed),
    ] {
        assert_eq!(may_read(&attempt, &key(at)), readable, "{at}");
    }
    let named = named(&attempt).await.unwrap();
    assert_eq!(named.into_iter().collect::<Vec<_>>(), [key("uploads/t/tree/files/a")]);
}

#[test]
fn without_trees_nothing_is_looked_up() {
    let attempt = attempt(vec![input("artifact:uploads/t/one")]);
    assert_eq!(may_read(&attempt, &key("uploads/t/one/two")), Readable::No);
}
