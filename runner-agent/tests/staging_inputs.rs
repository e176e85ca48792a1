//! Inputs: what arrives, what is refused, and what hostile trees cannot do.

mod staging_kit;

use std::{fs, os::unix::fs::symlink, path::Path};

use bytes::Bytes;
use runner_agent::staging::{MountPlan, StagedInputs, StagingErrorKind, StagingLimits};
use runner_core::{
    artifact::{ArtifactErrorKind, ArtifactStore as _, ManifestEntry},
    backend::{BackendError, BackendErrorKind},
    fake::artifact::ArtifactOp,
    spec::{FoundOutput, Input, InputSource, RunOutput},
};
use staging_kit::*;

#[tokio::test]
async fn objects_inline_bytes_and_trees_arrive_with_their_bytes_and_modes() {
    let bench = Bench::new(
        vec![
            artifact("/inputs/a", "uploads/t/o"),
            Input { mode: Some(0o755), ..inline("/inputs/deep/er/tool", b"#!/bin/sh") },
            artifact("/inputs/src", "uploads/t/tree/"),
            inline("/etc/app.conf", b"x=1"),
            inline("/inputs/empty", b""),
        ],
        vec![],
    );
    bench.store.put_bytes(&key("uploads/t/o"), "object".into()).await.unwrap();
    bench.store.put_bytes(&key("uploads/t/tree/x"), "run me".into()).await.unwrap();
    let tool = ManifestEntry { mode: 0o4755, ..file_entry("bin/x", b"run me", "uploads/t/tree/x") };
    seal(&bench.store, "uploads/t/tree", vec![directory_entry("empty dir", 0o700), tool]).await;

    assert_eq!(bench.stage().await.unwrap(), StagedInputs { bytes: 24, files: 5 });
    let read = |path: &str| fs::read_to_string(bench.at(path)).unwrap();
    assert_eq!(read("in/1/a"), "object");
    assert_eq!(read("in/1/deep/er/tool"), "#!/bin/sh");
    assert_eq!(read("in/1/src/bin/x"), "run me");
    assert_eq!(read("in/0"), "x=1", "an input of its own is one file");
    assert_eq!(read("in/1/empty"), "");
    assert_eq!(mode(&bench.at("in/1/a")), 0o644);
    assert_eq!(mode(&bench.at("in/1/deep/er/tool")), 0o755);
    assert_eq!(mode(&bench.at("in/1/deep")), 0o755);
    assert_eq!(mode(&bench.at("in/1/src/bin/x")), 0o755, "set-uid is never staged");
    assert_eq!(mode(&bench.at("in/1/src/empty dir")), 0o700);
    assert!(bench.at("out/0").is_dir(), "/outputs exists");
    bench.assert_no_partial_files();
    let told = bench.told.0.lock().unwrap();
    let last = told.last().unwrap();
    assert_eq!((last.bytes_done, last.bytes_total, last.files_done, last.files_total), (24, 24, 5, 5));
}

#[tokio::test]
async fn the_longer_path_wins_inside_a_tree() {
    let bench = Bench::new(
        vec![
            inline("/inputs/src/a", b"mine"),
            artifact("/inputs/src", "uploads/t/outer/"),
            artifact("/inputs/src/sub", "uploads/t/inner/"),
        ],
        vec![],
    );
    put_tree(
        &bench.store,
        "uploads/t/outer",
        &[("a", b"theirs"), ("b", b"b"), ("sub/x", b"hidden"), ("sub-x", b"kept")],
    )
    .await;
    put_tree(&bench.store, "uploads/t/inner", &[("y", b"inner")]).await;
    bench.stage().await.unwrap();
    assert_eq!(fs::read(bench.at("in/0/src/a")).unwrap(), b"mine");
    assert_eq!(below(&bench.at("in/0/src")), ["a", "b", "sub", "sub-x", "sub/y"]);
}

#[tokio::test]
async fn another_run_s_outputs_are_an_input() {
    let first = Bench::new(vec![], vec![output("/outputs/report.txt"), output("/outputs/data")]);
    first.stage().await.unwrap();
    first.write("out/0/report.txt", b"all is well");
    first.write("out/0/data/x/y", b"1");
    fs::create_dir(first.at("out/0/data/empty")).unwrap();
    first.publish(false).await.unwrap();

    let second =
        Bench { spec: Bench::new(vec![artifact("/inputs/first", "runs/t/r/1/")], vec![]).spec, ..first };
    let dir = tempfile::tempdir().unwrap();
    let second = Bench { root: runner_agent::staging::Root::open(dir.path()).unwrap(), dir, ..second };
    second.stage().await.unwrap();
    let found = below(&second.at("in/0/first"));
    let expected = [
        "outputs",
        "outputs/data",
        "outputs/data/empty",
        "outputs/data/x",
        "outputs/data/x/y",
        "outputs/report.txt",
    ];
    assert_eq!(found, expected);
    assert_eq!(fs::read(second.at("in/0/first/outputs/report.txt")).unwrap(), b"all is well");
}

#[tokio::test]
async fn staging_again_after_success_touches_nothing() {
    let bench = Bench::new(vec![artifact("/inputs/a", "uploads/t/o")], vec![]);
    bench.store.put_bytes(&key("uploads/t/o"), "first".into()).await.unwrap();
    let staged = bench.stage().await.unwrap();
    fs::write(bench.at("out/0/kept"), b"written by the program").unwrap();
    // Even where the object is gone by now: the workload may be running on what was staged.
    bench.store.delete(&key("uploads/t/o")).await.unwrap();
    assert_eq!(bench.stage().await.unwrap(), staged);
    assert_eq!(fs::read(bench.at("in/0/a")).unwrap(), b"first");
    assert_eq!(fs::read(bench.at("out/0/kept")).unwrap(), b"written by the program");
}

#[tokio::test]
async fn staging_after_an_interruption_gives_the_same_as_staging_once() {
    let files: Vec<(String, Vec<u8>)> =
        (0..200u32).map(|n| (format!("d{}/{n}", n % 7), vec![n as u8; 3000])).collect();
    let files: Vec<(&str, &[u8])> =
        files.iter().map(|(path, bytes)| (path.as_str(), bytes.as_slice())).collect();
    let bench = Bench::new(vec![artifact("/inputs/t", "uploads/t/tree/")], vec![]);
    put_tree(&bench.store, "uploads/t/tree", &files).await;
    for interrupted_after in [0, 1, 50, 199] {
        bench.store.fail(ArtifactOp::Get, interrupted_after + 1, 1, ArtifactErrorKind::Unavailable);
        let error = bench.stage().await.unwrap_err();
        assert!(error.kind.retryable(), "{error}");
    }
    // What a killed process may have left, too.
    fs::create_dir_all(bench.at("in/0/t/d0/stale/dir")).unwrap();
    fs::create_dir_all(bench.at(".staging")).unwrap();
    fs::write(bench.at(".staging/0-0"), b"half").unwrap();
    fs::create_dir_all(bench.at(".remove-0/x/y")).unwrap();
    assert_eq!(bench.stage().await.unwrap().files, 200);
    let found = below(&bench.at("in/0/t"));
    assert_eq!(found.len(), 207);
    assert!(!bench.at("in/0/t/d0/stale").exists());
    for (path, bytes) in files {
        assert_eq!(fs::read(bench.at("in/0/t").join(path)).unwrap(), bytes);
    }
    bench.assert_no_partial_files();
}

#[tokio::test]
async fn a_record_of_another_start_of_the_machine_proves_nothing() {
    let bench = Bench::new(vec![inline("/inputs/a", b"whole")], vec![]);
    bench.stage().await.unwrap();
    // As after a loss of power: the record survived, the file's bytes did not.
    fs::write(bench.at(".staged.json"), r#"{"boot":"another","staged":{"bytes":5,"files":1}}"#).unwrap();
    fs::write(bench.at("in/0/a"), b"").unwrap();
    bench.stage().await.unwrap();
    assert_eq!(fs::read(bench.at("in/0/a")).unwrap(), b"whole");
}

#[tokio::test]
async fn a_missing_object_is_told_by_field_before_any_byte_moves() {
    let bench = Bench::new(vec![inline("/inputs/a", b"x"), artifact("/inputs/b", "uploads/t/none")], vec![]);
    let error = bench.stage().await.unwrap_err();
    assert_eq!((error.kind, error.field.as_str()), (StagingErrorKind::NotFound, "spec.inputs[1]"));
    assert!(!bench.at("in/0/a").exists());
    let error = BackendError::from(error);
    assert_eq!((error.kind, error.retryable), (BackendErrorKind::Input, false));
    assert!(error.context.contains("spec.inputs[1]") && error.context.contains("uploads/t/none"), "{error}");
}

#[tokio::test]
async fn a_tree_without_its_manifest_is_not_there() {
    let bench = Bench::new(vec![artifact("/inputs/b", "uploads/t/tree/")], vec![]);
    bench.store.put_bytes(&key("uploads/t/tree/x"), "x".into()).await.unwrap();
    assert_eq!(bench.stage().await.unwrap_err().kind, StagingErrorKind::NotFound);
}

#[tokio::test]
async fn an_object_that_vanishes_half_way_is_not_found() {
    let bench = Bench::new(vec![artifact("/inputs/b", "uploads/t/o")], vec![]);
    bench.store.put_bytes(&key("uploads/t/o"), "x".into()).await.unwrap();
    bench.store.vanish(&key("uploads/t/o"));
    assert_eq!(bench.stage().await.unwrap_err().kind, StagingErrorKind::NotFound);
    assert!(!bench.at("in/0/b").exists());
}

#[tokio::test]
async fn what_does_not_match_its_digest_never_appears() {
    for size in [10, 70_000, 3_000_000] {
        let bytes = vec![7u8; size];
        let wrong = Input { sha256: Some(digest(b"other")), ..artifact("/inputs/b", "uploads/t/o") };
        let bench = Bench::new(vec![wrong], vec![]);
        bench.store.put_bytes(&key("uploads/t/o"), bytes.clone().into()).await.unwrap();
        let error = bench.stage().await.unwrap_err();
        assert_eq!((error.kind, error.field.as_str()), (StagingErrorKind::Mismatch, "spec.inputs[0]"));
        assert!(
            error.context.contains(&digest(b"other")) && error.context.contains(&digest(&bytes)),
            "{error}"
        );
        assert_eq!(below(&bench.at("in/0")), [""; 0]);
        bench.assert_no_partial_files();
        assert!(!BackendError::from(error).retryable);
    }
}

#[tokio::test]
async fn inline_bytes_are_verified_too() {
    let bench = Bench::new(vec![Input { sha256: Some(digest(b"y")), ..inline("/inputs/a", b"x") }], vec![]);
    assert_eq!(bench.stage().await.unwrap_err().kind, StagingErrorKind::Mismatch);
    let bench = Bench::new(vec![Input { sha256: Some(digest(b"x")), ..inline("/inputs/a", b"x") }], vec![]);
    bench.stage().await.unwrap();
}

#[tokio::test]
async fn a_tree_s_file_that_is_not_what_its_manifest_says_is_refused() {
    let bench = Bench::new(vec![artifact("/inputs/t", "uploads/t/tree/")], vec![]);
    put_tree(&bench.store, "uploads/t/tree", &[("a", b"aaaa"), ("b", b"bbbb")]).await;
    for changed in ["bbbc", "bbb", "bbbbb"] {
        bench.store.put_bytes(&key("uploads/t/tree/b"), changed.into()).await.unwrap();
        assert_eq!(bench.stage().await.unwrap_err().kind, StagingErrorKind::Mismatch, "{changed}");
        assert!(!bench.at("in/0/t/b").exists());
    }
}

#[tokio::test]
async fn a_store_that_is_away_is_retryable_and_one_that_refuses_is_not() {
    for (fault, kind, retryable) in [
        (ArtifactErrorKind::Unavailable, StagingErrorKind::Unavailable, true),
        (ArtifactErrorKind::Denied, StagingErrorKind::Denied, false),
        (ArtifactErrorKind::Other, StagingErrorKind::Store, false),
    ] {
        for op in [ArtifactOp::Head, ArtifactOp::Get, ArtifactOp::Read] {
            let bench = Bench::new(vec![artifact("/inputs/a", "uploads/t/o")], vec![]);
            bench.store.put_bytes(&key("uploads/t/o"), vec![0; 600_000].into()).await.unwrap();
            bench.store.fail_next(op, 1, fault);
            let error = bench.stage().await.unwrap_err();
            assert_eq!((error.kind, error.field.as_str()), (kind, "spec.inputs[0]"), "{op:?}");
            let error = BackendError::from(error);
            assert_eq!((error.kind, error.retryable), (BackendErrorKind::Input, retryable));
            bench.assert_no_partial_files();
            bench.stage().await.unwrap();
        }
    }
}

#[tokio::test]
async fn every_cap_is_kept() {
    let small = [
        StagingLimits { input_bytes: 7, ..StagingLimits::default() },
        StagingLimits { input_entries: 1, ..StagingLimits::default() },
        StagingLimits { depth: 2, ..StagingLimits::default() },
        StagingLimits { manifest_bytes: 100, ..StagingLimits::default() },
    ];
    for limits in small {
        let bench = Bench::new(vec![artifact("/inputs/t", "uploads/t/tree/")], vec![]);
        put_tree(&bench.store, "uploads/t/tree", &[("a", b"aaaa"), ("b/c/d", b"bbbb")]).await;
        let bench = Bench { limits, ..bench };
        let error = bench.stage().await.unwrap_err();
        assert_eq!(error.kind, StagingErrorKind::LimitExceeded, "{:?}", bench.limits);
        assert_eq!(error.field, "spec.inputs[0]");
        let bench = Bench { limits: StagingLimits::default(), ..bench };
        bench.stage().await.unwrap();
    }
}

#[tokio::test]
async fn a_manifest_cannot_lead_out_of_its_tree_or_its_tenant() {
    let entry = |path: &str| file_entry(path, b"x", "uploads/t/tree/x");
    let encoded = |path: &str| ManifestEntry { path_encoded: true, ..entry(path) };
    let bad = vec![
        entry("../x"),
        entry("a/../../x"),
        entry("/etc/passwd"),
        entry("a//b"),
        entry("./a"),
        entry("a/"),
        entry(""),
        entry("nul\0"),
        encoded("%2e%2e/x"),
        encoded("a%2F..%2F..%2Fx"),
        encoded("%2Fetc%2Fpasswd"),
        encoded("%00"),
        encoded("%"),
        entry(&"n".repeat(256)),
        ManifestEntry { output: "../..".into(), ..entry("x") },
        ManifestEntry { key: Some(key("uploads/other/secret")), ..entry("a") },
        ManifestEntry { key: Some(key("blob/x")), ..entry("a") },
        ManifestEntry { key: None, ..entry("a") },
        ManifestEntry { sha256: String::new(), ..entry("a") },
    ];
    for entry in bad {
        let bench = Bench::new(vec![artifact("/inputs/t", "uploads/t/tree/")], vec![]);
        bench.store.put_bytes(&key("uploads/t/tree/x"), "x".into()).await.unwrap();
        bench.store.put_bytes(&key("uploads/other/secret"), "x".into()).await.unwrap();
        seal(&bench.store, "uploads/t/tree", vec![entry.clone()]).await;
        let error = bench.stage().await.unwrap_err();
        assert_eq!(error.kind, StagingErrorKind::Malformed, "{entry:?}");
        assert_eq!(below(bench.dir.path()), [""; 0], "refused before anything is made");
    }
}

#[tokio::test]
async fn one_place_has_one_entry() {
    let entry = |path: &str| file_entry(path, b"x", "uploads/t/tree/x");
    let encoded = ManifestEntry { path_encoded: true, ..entry("%61") };
    for entries in [
        vec![entry("a"), entry("a")],
        vec![entry("a"), encoded],
        vec![entry("a"), directory_entry("a", 0o755)],
        vec![entry("a/b"), entry("a"), entry("a-b")],
    ] {
        let bench = Bench::new(vec![artifact("/inputs/t", "uploads/t/tree/")], vec![]);
        bench.store.put_bytes(&key("uploads/t/tree/x"), "x".into()).await.unwrap();
        seal(&bench.store, "uploads/t/tree", entries.clone()).await;
        let error = bench.stage().await.unwrap_err();
        assert_eq!(error.kind, StagingErrorKind::Conflict, "{entries:?}");
    }
}

#[tokio::test]
async fn an_input_that_claims_a_tree_s_directory_conflicts() {
    let bench =
        Bench::new(vec![artifact("/inputs/t", "uploads/t/tree/"), inline("/inputs/t/a/b", b"x")], vec![]);
    put_tree(&bench.store, "uploads/t/tree", &[("a", b"a file, not a directory")]).await;
    let error = bench.stage().await.unwrap_err();
    assert_eq!(error.kind, StagingErrorKind::Conflict);
    assert!(!BackendError::from(error).retryable);
}

#[tokio::test]
async fn a_manifest_that_is_none_is_malformed() {
    for text in ["", "{", "[]", r#"{"entries":[{"path":1}],"total_bytes":0}"#] {
        let bench = Bench::new(vec![artifact("/inputs/t", "uploads/t/tree/")], vec![]);
        bench.store.put_bytes(&key("uploads/t/tree/manifest.json"), text.into()).await.unwrap();
        assert_eq!(bench.stage().await.unwrap_err().kind, StagingErrorKind::Malformed, "{text}");
    }
}

#[tokio::test]
async fn links_in_the_staging_root_are_not_followed() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("victim"), b"untouched").unwrap();
    let bench = Bench::new(vec![inline("/inputs/a", b"x"), inline("/inputs/d/victim", b"evil")], vec![]);
    // Whatever an earlier life of the directory may hold.
    for (name, target) in
        [(".staged.json", "victim"), (".staged.json.new", "victim"), (".staging", ""), ("in", "")]
    {
        symlink(outside.path().join(target), bench.at(name)).unwrap();
    }
    bench.stage().await.unwrap();
    assert_eq!(fs::read(bench.at("in/0/d/victim")).unwrap(), b"evil");
    assert_eq!(below(outside.path()), ["victim"]);
    assert_eq!(fs::read(outside.path().join("victim")).unwrap(), b"untouched");

    // `out` survives an interruption, so a link there is refused rather than removed.
    let bench = Bench::new(vec![], vec![]);
    symlink(outside.path(), bench.at("out")).unwrap();
    assert!(bench.stage().await.is_err());
    assert_eq!(below(outside.path()), ["victim"]);
}

#[tokio::test]
async fn ten_thousand_small_files_arrive() {
    let bench = Bench::new(vec![artifact("/inputs/t", "uploads/t/tree/")], vec![]);
    let names: Vec<(String, String)> =
        (0..10_000).map(|n| (format!("{}/{n}", n % 100), format!("file {n}"))).collect();
    let files: Vec<(&str, &[u8])> =
        names.iter().map(|(path, text)| (path.as_str(), text.as_bytes())).collect();
    put_tree(&bench.store, "uploads/t/tree", &files).await;
    assert_eq!(bench.stage().await.unwrap().files, 10_000);
    for (path, text) in names.iter().step_by(97) {
        assert_eq!(&fs::read_to_string(bench.at("in/0/t").join(path)).unwrap(), text);
    }
    assert_eq!(below(&bench.at("in/0/t")).len(), 10_100);
}

#[tokio::test]
async fn a_call_that_is_dropped_leaves_a_root_that_the_next_one_completes() {
    let bench = Bench::new(vec![artifact("/inputs/t", "uploads/t/tree/")], vec![]);
    let files: Vec<(String, Vec<u8>)> = (0..50).map(|n| (n.to_string(), vec![n as u8; 200_000])).collect();
    let files: Vec<(&str, &[u8])> =
        files.iter().map(|(path, bytes)| (path.as_str(), bytes.as_slice())).collect();
    put_tree(&bench.store, "uploads/t/tree", &files).await;
    for wait in [0, 1, 3, 7, 15] {
        let _ = tokio::time::timeout(std::time::Duration::from_millis(wait), bench.stage()).await;
    }
    bench.stage().await.unwrap();
    for (path, bytes) in files {
        assert!(fs::read(bench.at("in/0/t").join(path)).unwrap() == bytes);
    }
}

#[tokio::test]
#[allow(clippy::print_stderr, reason = "a skip is told")]
async fn files_and_directories_are_given_to_the_workload_s_user() {
    use std::os::unix::fs::MetadataExt as _;

    use runner_agent::staging::{InputStaging, stage_inputs};
    use runner_core::{backend::NoProgress, spec::User};
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: giving files away needs privileges");
        return;
    }
    let bench = Bench::new(
        vec![Input { mode: Some(0o600), ..inline("/inputs/d/e/secret", b"x") }],
        vec![output("/work/deep/out.txt"), output("/work/b.txt")],
    );
    let plan: MountPlan = bench.plan();
    stage_inputs(InputStaging {
        spec: &bench.spec,
        plan: &plan,
        root: &bench.root,
        artifacts: &bench.store,
        limits: &bench.limits,
        progress: &NoProgress,
        owner: Some(User { uid: 12345, gid: 23456 }),
    })
    .await
    .unwrap();
    let owner = |path: &Path| {
        let meta = fs::metadata(path).unwrap();
        (meta.uid(), meta.gid())
    };
    for path in ["in/0", "in/0/d", "in/0/d/e", "in/0/d/e/secret", "out/0", "out/1", "out/1/deep"] {
        assert_eq!(owner(&bench.at(path)), (12345, 23456), "{path}");
    }
    assert_eq!(mode(&bench.at("in/0/d/e/secret")), 0o600);
    assert_ne!(owner(&bench.at("in")), (12345, 23456), "what holds the mounts stays ours");
}

/// Stores what a run wrote, and its manifest.
async fn put_run(bench: &Bench) {
    let mut entries = vec![];
    for (output, base, path, bytes) in [
        ("/outputs/d", "", "x/y", &b"deep"[..]),
        ("/outputs/report.txt", "", "", b"report"),
        ("/logs/**", "/logs", "a/b.log", b"log"),
    ] {
        let at = format!("{PREFIX}/{output}/{path}").replace("//", "/").replace("**", "g");
        let at = at.trim_end_matches('/');
        bench.store.put_bytes(&key(at), Bytes::copy_from_slice(bytes)).await.unwrap();
        entries.push(ManifestEntry {
            output: output.to_owned(),
            base: base.to_owned(),
            mode: 0o750,
            ..file_entry(path, bytes, at)
        });
    }
    entries.push(ManifestEntry { output: "/outputs/d".to_owned(), ..directory_entry("", 0o700) });
    entries.push(ManifestEntry { output: "/outputs/d".to_owned(), ..directory_entry("empty", 0o700) });
    seal(&bench.store, PREFIX, entries).await;
}

fn run_output(path: &str, output: Option<&str>, directory: bool) -> Input {
    let source = InputSource::Run(RunOutput {
        run: "018f0000-0000-7000-8000-000000000001".parse().unwrap(),
        path: output.map(str::to_owned),
        found: Some(FoundOutput { prefix: key(PREFIX), directory }),
    });
    Input { source, ..inline(path, b"") }
}

#[tokio::test]
async fn another_run_s_outputs_lie_at_the_input_s_place() {
    let bench = Bench::new(
        vec![
            run_output("/inputs/file", Some("/outputs/report.txt"), false),
            run_output("/inputs/dir", Some("/outputs/d"), true),
            run_output("/inputs/outputs", Some("/outputs"), true),
            run_output("/inputs/deep", Some("/outputs/d/x/y"), false),
            run_output("/inputs/all", None, true),
            run_output("/inputs/log", Some("/logs/a"), true),
        ],
        vec![],
    );
    put_run(&bench).await;
    bench.stage().await.unwrap();
    for (path, text) in [
        ("file", "report"),
        ("dir/x/y", "deep"),
        ("outputs/report.txt", "report"),
        ("outputs/d/x/y", "deep"),
        ("deep", "deep"),
        ("all/logs/a/b.log", "log"),
        ("all/outputs/report.txt", "report"),
        ("log/b.log", "log"),
    ] {
        assert_eq!(fs::read_to_string(bench.at(&format!("in/0/{path}"))).unwrap(), text, "{path}");
    }
    assert!(bench.at("in/0/dir/empty").is_dir());
    assert_eq!(mode(&bench.at("in/0/file")), 0o750);
    assert!(!bench.at("in/0/dir/outputs").exists());
}

#[tokio::test]
async fn another_run_s_output_that_is_gone_by_now_fails_as_its_input() {
    let bench = Bench::new(vec![run_output("/inputs/x", Some("/outputs/nothing"), false)], vec![]);
    let gone = bench.stage().await.unwrap_err();
    assert_eq!((gone.kind, gone.field.as_str()), (StagingErrorKind::NotFound, "spec.inputs[0]"));
    put_run(&bench).await;
    assert_eq!(bench.stage().await.unwrap_err().kind, StagingErrorKind::NotFound);
}
