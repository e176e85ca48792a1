//! Outputs: what is stored, what is left out, and what hostile programs cannot do.

mod staging_kit;

use std::{
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{PermissionsExt as _, symlink},
    },
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use runner_agent::staging::{Root, StagingErrorKind, StagingLimits, read_manifest};
use runner_core::{
    artifact::{ArtifactErrorKind, ArtifactStore as _, EntryKind, MANIFEST_NAME, read_small},
    backend::{BackendError, BackendErrorKind},
    fake::artifact::ArtifactOp,
    spec::Output,
};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use staging_kit::*;

async fn staged(outputs: Vec<Output>) -> Bench {
    let bench = Bench::new(vec![], outputs);
    bench.stage().await.unwrap();
    bench
}

fn optional(path: &str) -> Output {
    Output { required: false, ..output(path) }
}

fn fifo(at: &Path) {
    mknodat(CWD, at, FileType::Fifo, Mode::RWXU, 0).unwrap();
}

#[tokio::test]
async fn files_and_directories_are_stored_with_size_digest_and_mode() {
    let bench = staged(vec![output("/outputs/report.txt"), output("/outputs/data"), output("/result")]).await;
    bench.write("out/0/report.txt", b"report");
    bench.write("out/0/data/deep/er/x", b"xx");
    bench.write("out/0/data/empty file", b"");
    fs::create_dir(bench.at("out/0/data/empty dir")).unwrap();
    bench.write("out/1/y", b"y");
    bench.write("out/0/not-declared", b"secret");
    fs::set_permissions(bench.at("out/0/report.txt"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::set_permissions(bench.at("out/0/data/empty dir"), fs::Permissions::from_mode(0o1700)).unwrap();

    let published = bench.publish(false).await.unwrap();
    assert!(published.failure.is_none() && published.notes.is_empty(), "{published:?}");
    let manifest = published.manifest;
    assert!(!manifest.partial);
    assert_eq!(manifest.total_bytes, 9);
    let found = entries(&manifest);
    let expected = [
        ("/outputs/data|", 0, String::new(), 0o755),
        ("/outputs/data|deep", 0, String::new(), 0o755),
        ("/outputs/data|deep/er", 0, String::new(), 0o755),
        ("/outputs/data|deep/er/x", 2, digest(b"xx"), 0o644),
        ("/outputs/data|empty dir", 0, String::new(), 0o700),
        ("/outputs/data|empty file", 0, digest(b""), 0o644),
        ("/outputs/report.txt|", 6, digest(b"report"), 0o751),
        ("/result|", 0, String::new(), 0o755),
        ("/result|y", 1, digest(b"y"), 0o644),
    ];
    let expected: Vec<_> =
        expected.map(|(path, size, sha, mode)| (path.to_owned(), (size, sha, mode))).into();
    assert_eq!(found.into_iter().collect::<Vec<_>>(), expected);
    assert_eq!(
        bench.store.keys(),
        [
            "runs/t/r/1/manifest.json",
            "runs/t/r/1/outputs/0/report.txt",
            "runs/t/r/1/outputs/1/deep/er/x",
            "runs/t/r/1/outputs/1/empty file",
            "runs/t/r/1/outputs/2/y",
        ]
    );
    for entry in &manifest.entries {
        if let Some(key) = &entry.key {
            let bytes = bench.store.bytes(key).unwrap();
            assert_eq!((bytes.len() as u64, digest(&bytes)), (entry.size, entry.sha256.clone()));
        }
    }
    assert_eq!(read_manifest(&bench.store, &key(PREFIX), &bench.limits).await.unwrap(), Some(manifest));
}

#[tokio::test]
async fn unusual_names_are_stored_apart_and_staged_back_as_they_were() {
    let bench = staged(vec![output("/outputs")]).await;
    let mut names: Vec<Vec<u8>> = [
        "with space",
        "line\nbreak",
        "100%",
        "%0A",
        "line%0Abreak",
        "ünï/日本語/🦀",
        "~sha256-x/y",
        "back\\slash",
        "manifest.json",
        "-rf",
        "...",
    ]
    .map(|name| name.as_bytes().to_vec())
    .into();
    names.push(b"not \xff utf-8 % at \xfe all".to_vec());
    names.push(b"\xff/\xff".to_vec());
    names.push(b"%FF".to_vec());
    names.push("ü".repeat(127).into_bytes());
    names.push(vec![b'%'; 255]);
    names.push(format!("{}x", format!("{}/", "long".repeat(50)).repeat(8)).into_bytes());
    for name in &names {
        let at = bench.at("out/0").join(OsStr::from_bytes(name));
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        fs::write(at, name).unwrap();
    }
    let manifest = bench.publish(false).await.unwrap().manifest;
    let files: Vec<_> = manifest.entries.iter().filter(|entry| entry.kind == EntryKind::File).collect();
    assert_eq!(files.len(), names.len());
    let mut keys: Vec<_> = files.iter().map(|entry| entry.key.clone().unwrap()).collect();
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), names.len(), "no two share a key");

    let again = Bench::new(vec![artifact("/inputs/t", "runs/t/r/1/")], vec![]);
    let again = Bench { store: bench.store, ..again };
    again.stage().await.unwrap();
    for name in &names {
        let at = again.at("in/0/t/outputs").join(OsStr::from_bytes(name));
        assert_eq!(&fs::read(&at).unwrap(), name, "{at:?}");
    }
}

#[tokio::test]
async fn an_empty_output_directory_is_stored_as_one() {
    let bench = staged(vec![output("/outputs")]).await;
    let manifest = bench.publish(false).await.unwrap().manifest;
    assert_eq!(manifest.entries.len(), 1);
    assert_eq!(manifest.entries[0].kind, EntryKind::Directory);
}

#[tokio::test]
async fn a_destination_takes_the_files_and_the_manifest_names_them() {
    let to = |path, uri: &str| Output { destination: Some(uri.parse().unwrap()), ..output(path) };
    let bench = staged(vec![
        to("/outputs/r.txt", "artifact:uploads/t/one/"),
        to("/outputs/d", "artifact:uploads/t/two/"),
    ])
    .await;
    bench.write("out/0/r.txt", b"r");
    bench.write("out/0/d/x/y", b"y");
    let manifest = bench.publish(false).await.unwrap().manifest;
    let keys: Vec<_> =
        manifest.entries.iter().filter_map(|entry| entry.key.as_ref()).map(|k| k.as_str()).collect();
    assert_eq!(keys, ["uploads/t/two/r/1/x/y", "uploads/t/one/r/1/r.txt"]);
    let stored = ["runs/t/r/1/manifest.json", "uploads/t/one/r/1/r.txt", "uploads/t/two/r/1/x/y"];
    assert_eq!(bench.store.keys(), stored);
}

#[tokio::test]
async fn a_required_output_that_is_absent_fails_and_the_others_are_published_as_partial() {
    let bench = staged(vec![output("/outputs/a"), output("/outputs/b/c"), optional("/outputs/d")]).await;
    bench.write("out/0/a", b"a");
    let first = bench.publish(false).await.unwrap();
    let failure = first.failure.unwrap();
    assert_eq!((failure.kind, failure.field.as_str()), (StagingErrorKind::Absent, "spec.outputs[1]"));
    assert!(first.manifest.partial);
    assert_eq!(entries(&first.manifest).keys().collect::<Vec<_>>(), ["/outputs/a|"]);
    // A restart finds it done and says the same.
    let second = bench.publish(false).await.unwrap();
    assert_eq!(second.manifest, first.manifest);
    assert_eq!(second.notes, first.notes);
    let again = second.failure.unwrap();
    assert_eq!(again.to_string(), failure.to_string());
    let error = BackendError::from(again);
    assert_eq!((error.kind, error.retryable), (BackendErrorKind::Output, false));
}

#[tokio::test]
async fn a_failed_program_s_outputs_are_published_without_asking_for_more() {
    let bench = staged(vec![output("/outputs/a"), output("/outputs/b")]).await;
    bench.write("out/0/a", b"a");
    let published = bench.publish(true).await.unwrap();
    assert!(published.failure.is_none());
    assert!(published.manifest.partial);
    assert_eq!(published.manifest.entries.len(), 1);
}

#[tokio::test]
async fn a_manifest_that_is_there_is_the_answer_whatever_the_directory_holds_by_now() {
    let bench = staged(vec![output("/outputs/a")]).await;
    bench.write("out/0/a", b"first");
    let first = bench.publish(false).await.unwrap().manifest;
    bench.write("out/0/a", b"second");
    assert_eq!(bench.publish(false).await.unwrap().manifest, first);
    let stored = bench.store.bytes(first.entries[0].key.as_ref().unwrap()).unwrap();
    assert_eq!(stored, "first");
}

#[tokio::test]
async fn a_store_that_fails_at_any_point_leaves_no_manifest_and_the_next_call_completes() {
    let bench = staged(vec![output("/outputs/a"), output("/outputs/d"), optional("/outputs/none")]).await;
    bench.write("out/0/a", b"a");
    for n in 0..20 {
        bench.write(&format!("out/0/d/{n}"), b"n");
    }
    // 21 files and the manifest.
    for fault in 0..22 {
        bench.store.fail(ArtifactOp::Put, fault, 1, ArtifactErrorKind::Unavailable);
        let error = bench.publish(false).await.unwrap_err();
        assert_eq!(error.kind, StagingErrorKind::Unavailable);
        let error = BackendError::from(error);
        assert_eq!((error.kind, error.retryable), (BackendErrorKind::Output, true));
        assert_eq!(read_manifest(&bench.store, &key(PREFIX), &bench.limits).await.unwrap(), None);
        // Faults that were not reached because calls run side by side must not strike the next round.
        while bench.store.put_bytes(&key("drain"), "".into()).await.is_err() {}
    }
    let published = bench.publish(false).await.unwrap();
    assert_eq!(published.manifest.entries.len(), 22);
    assert!(published.failure.is_none());
}

#[tokio::test]
async fn links_and_special_files_are_neither_followed_nor_stored_and_are_noted() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), b"secret").unwrap();
    let bench = staged(vec![output("/outputs/d")]).await;
    bench.write("out/0/d/real", b"real");
    let at = |name: &str| bench.at("out/0/d").join(name);
    symlink(outside.path().join("secret"), at("absolute")).unwrap();
    symlink("real", at("relative")).unwrap();
    symlink(outside.path(), at("directory")).unwrap();
    symlink("/nowhere", at("dangling")).unwrap();
    symlink(".", at("loop")).unwrap();
    fifo(&at("fifo"));
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    let device =
        mknodat(CWD, at("zero"), FileType::CharacterDevice, Mode::RWXU, rustix::fs::makedev(1, 5)).is_ok();
    let published =
        tokio::time::timeout(Duration::from_secs(20), bench.publish(false)).await.unwrap().unwrap();
    assert_eq!(entries(&published.manifest).keys().collect::<Vec<_>>(), ["/outputs/d|", "/outputs/d|real"]);
    let notes = published.notes.join("\n");
    assert!(
        notes.contains("5 symbolic links") && notes.contains("1 FIFOs") && notes.contains("1 sockets"),
        "{notes}"
    );
    assert_eq!(notes.contains("1 devices"), device, "{notes}");
    assert!(published.failure.is_none());
    for stored in bench.store.keys() {
        assert_ne!(bench.store.bytes(&key(&stored)).unwrap(), "secret");
    }
    assert_eq!(bench.publish(false).await.unwrap().notes, published.notes, "a restart says the same");
}

#[tokio::test]
async fn an_output_that_is_itself_no_file_breaks_its_promise() {
    type Make = fn(&Path);
    let makes: [(&str, Make); 3] = [
        ("link", |at| symlink("/etc/passwd", at).unwrap()),
        ("directory link", |at| symlink("/etc", at).unwrap()),
        ("fifo", |at| fifo(at)),
    ];
    for (name, make) in makes {
        let bench = staged(vec![output("/outputs/x"), output("/outputs/y")]).await;
        make(&bench.at("out/0/x"));
        bench.write("out/0/y", b"y");
        let published =
            tokio::time::timeout(Duration::from_secs(20), bench.publish(false)).await.unwrap().unwrap();
        let failure = published.failure.unwrap();
        assert_eq!(
            (failure.kind, failure.field.as_str()),
            (StagingErrorKind::NotAFile, "spec.outputs[0]"),
            "{name}"
        );
        assert_eq!(entries(&published.manifest).keys().collect::<Vec<_>>(), ["/outputs/y|"], "{name}");
    }
}

#[tokio::test]
async fn an_output_is_not_reached_through_a_link() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("x"), b"secret").unwrap();
    let bench = staged(vec![output("/outputs/d/x")]).await;
    fs::remove_dir(bench.at("out/0/d")).unwrap();
    symlink(outside.path(), bench.at("out/0/d")).unwrap();
    let published = bench.publish(false).await.unwrap();
    assert_eq!(published.failure.unwrap().kind, StagingErrorKind::NotAFile);
    assert!(published.manifest.entries.is_empty());
}

#[tokio::test]
async fn a_directory_that_is_swapped_for_a_link_leads_nowhere() {
    let outside = tempfile::tempdir().unwrap();
    for n in 0..50 {
        fs::write(outside.path().join(format!("{n}")), b"secret").unwrap();
    }
    let swapping = Arc::new(AtomicBool::new(true));
    for _ in 0..8 {
        let bench = staged(vec![output("/outputs")]).await;
        for d in 0..10 {
            for n in 0..50 {
                bench.write(&format!("out/0/{d}/{n}"), b"mine");
            }
        }
        let out = bench.at("out/0");
        swapping.store(true, Ordering::SeqCst);
        let swapper = std::thread::spawn({
            let (swapping, outside) = (Arc::clone(&swapping), outside.path().to_owned());
            move || {
                while swapping.load(Ordering::SeqCst) {
                    for d in 0..10 {
                        let (here, away) = (out.join(d.to_string()), out.join(format!(".{d}")));
                        if fs::rename(&here, &away).is_ok() {
                            let _ = symlink(&outside, &here);
                            let _ = fs::remove_file(&here);
                            let _ = fs::rename(&away, &here);
                        }
                    }
                }
            }
        });
        let published = bench.publish(false).await;
        swapping.store(false, Ordering::SeqCst);
        swapper.join().unwrap();
        let manifest = published.unwrap().manifest;
        for entry in manifest.entries.iter().filter(|entry| entry.kind == EntryKind::File) {
            assert_eq!(entry.sha256, digest(b"mine"), "{}", entry.path);
        }
    }
}

#[tokio::test]
async fn a_hard_link_is_stored_as_a_file_of_its_own() {
    let bench = staged(vec![output("/outputs")]).await;
    bench.write("out/0/a", b"same");
    fs::hard_link(bench.at("out/0/a"), bench.at("out/0/b")).unwrap();
    let found = entries(&bench.publish(false).await.unwrap().manifest);
    assert_eq!(found["/outputs|a"].1, digest(b"same"));
    assert_eq!(found["/outputs|b"].1, digest(b"same"));
}

#[tokio::test]
async fn a_sparse_file_counts_with_the_size_that_it_claims() {
    let limited = |path| Output { max_bytes: Some(10 << 20), ..output(path) };
    let bench = staged(vec![limited("/outputs/huge"), limited("/outputs/fits")]).await;
    fs::File::create(bench.at("out/0/huge")).unwrap().set_len(1 << 40).unwrap();
    fs::File::create(bench.at("out/0/fits")).unwrap().set_len(10 << 20).unwrap();
    let published =
        tokio::time::timeout(Duration::from_secs(20), bench.publish(false)).await.unwrap().unwrap();
    let failure = published.failure.unwrap();
    assert_eq!((failure.kind, failure.field.as_str()), (StagingErrorKind::LimitExceeded, "spec.outputs[0]"));
    let found = entries(&published.manifest);
    assert_eq!(
        found.into_iter().collect::<Vec<_>>(),
        [("/outputs/fits|".to_owned(), (10 << 20, digest(&vec![0; 10 << 20]), 0o644))]
    );
}

#[tokio::test]
async fn an_output_above_its_limit_is_left_out_whole() {
    let bench =
        staged(vec![Output { max_bytes: Some(1000), ..output("/outputs/d") }, output("/outputs/e")]).await;
    for n in 0..11 {
        bench.write(&format!("out/0/d/{n}"), &[0; 100]);
    }
    bench.write("out/0/e", b"e");
    let published = bench.publish(false).await.unwrap();
    let failure = published.failure.unwrap();
    assert_eq!(failure.kind, StagingErrorKind::LimitExceeded);
    assert!(published.notes.iter().any(|note| note.contains("1000")), "{:?}", published.notes);
    assert_eq!(entries(&published.manifest).keys().collect::<Vec<_>>(), ["/outputs/e|"]);
    // Exactly at the limit is fine.
    let bench = staged(vec![Output { max_bytes: Some(1000), ..output("/outputs/d") }]).await;
    for n in 0..10 {
        bench.write(&format!("out/0/d/{n}"), &[0; 100]);
    }
    assert!(bench.publish(false).await.unwrap().failure.is_none());
    // Of a failed program it is a note, not a failure.
    let bench = staged(vec![Output { max_bytes: Some(1), ..output("/outputs/d") }]).await;
    bench.write("out/0/d", b"xx");
    let published = bench.publish(true).await.unwrap();
    assert!(published.failure.is_none() && published.notes.len() == 1, "{published:?}");
}

#[tokio::test]
async fn count_and_depth_are_capped() {
    let small = [
        StagingLimits { output_entries: 10, ..StagingLimits::default() },
        StagingLimits { depth: 3, ..StagingLimits::default() },
    ];
    for limits in small {
        let bench = Bench { limits, ..staged(vec![output("/outputs/d"), output("/outputs/e")]).await };
        for n in 0..5 {
            bench.write(&format!("out/0/d/{n}/a/b/c"), b"");
        }
        bench.write("out/0/e", b"e");
        let published = bench.publish(false).await.unwrap();
        assert_eq!(published.failure.unwrap().kind, StagingErrorKind::LimitExceeded, "{:?}", bench.limits);
        assert_eq!(entries(&published.manifest).keys().collect::<Vec<_>>(), ["/outputs/e|"]);
    }
    // FIFOs count too: a million of them would hold up the walk as files would.
    let limits = StagingLimits { output_entries: 10, ..StagingLimits::default() };
    let bench = Bench { limits, ..staged(vec![output("/outputs/d")]).await };
    fs::create_dir(bench.at("out/0/d")).unwrap();
    for n in 0..11 {
        fifo(&bench.at("out/0/d").join(n.to_string()));
    }
    assert_eq!(bench.publish(false).await.unwrap().failure.unwrap().kind, StagingErrorKind::LimitExceeded);
}

#[tokio::test]
async fn a_directory_bomb_is_refused_and_can_be_removed() {
    let bench = staged(vec![output("/outputs")]).await;
    // Deeper than PATH_MAX reaches and than a process has descriptors.
    let mut at: std::os::fd::OwnedFd = fs::File::open(bench.at("out/0")).unwrap().into();
    for _ in 0..5000 {
        rustix::fs::mkdirat(&at, "deep", Mode::RWXU).unwrap();
        at = rustix::fs::openat(&at, "deep", rustix::fs::OFlags::DIRECTORY, Mode::empty()).unwrap();
    }
    drop(at);
    let published = bench.publish(false).await.unwrap();
    assert_eq!(published.failure.unwrap().kind, StagingErrorKind::LimitExceeded);
    bench.root.remove_tree(Path::new("out")).unwrap();
    assert!(!bench.at("out").exists());
    bench.assert_no_partial_files();
}

#[tokio::test]
async fn a_file_that_grows_while_it_is_read_has_the_digest_of_what_was_stored() {
    let bench = staged(vec![output("/outputs/log")]).await;
    bench.write("out/0/log", &vec![1; 3 << 20]);
    let growing = Arc::new(AtomicBool::new(true));
    let writer = std::thread::spawn({
        let (growing, at) = (Arc::clone(&growing), bench.at("out/0/log"));
        move || {
            use std::io::Write as _;
            let mut file = fs::File::options().append(true).open(at).unwrap();
            let mut written = 0;
            while growing.load(Ordering::SeqCst) && written < (64 << 20) {
                file.write_all(&[2; 4096]).unwrap();
                written += 4096;
            }
        }
    });
    let manifest = bench.publish(false).await.unwrap().manifest;
    growing.store(false, Ordering::SeqCst);
    writer.join().unwrap();
    let entry = &manifest.entries[0];
    let stored = bench.store.bytes(entry.key.as_ref().unwrap()).unwrap();
    assert_eq!((stored.len() as u64, digest(&stored)), (entry.size, entry.sha256.clone()));
}

#[tokio::test]
async fn removing_a_tree_follows_no_link_and_does_not_mind_permissions() {
    let outside = tempfile::tempdir().unwrap();
    fs::create_dir(outside.path().join("kept")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let root = Root::open(dir.path()).unwrap();
    fs::create_dir_all(dir.path().join("t/locked/in")).unwrap();
    fs::write(dir.path().join("t/locked/in/file"), b"x").unwrap();
    fs::set_permissions(dir.path().join("t/locked/in"), fs::Permissions::from_mode(0o0)).unwrap();
    fs::set_permissions(dir.path().join("t/locked"), fs::Permissions::from_mode(0o0)).unwrap();
    symlink(outside.path(), dir.path().join("t/link")).unwrap();
    symlink(outside.path(), dir.path().join("top-link")).unwrap();
    fifo(&dir.path().join("t/fifo"));
    root.remove_tree(Path::new("t")).unwrap();
    root.remove_tree(Path::new("top-link")).unwrap();
    root.remove_tree(Path::new("never/was")).unwrap();
    assert_eq!(below(dir.path()), [""; 0]);
    assert_eq!(below(outside.path()), ["kept"]);
    for bad in ["..", "/etc", "a/../..", ""] {
        assert!(root.remove_tree(Path::new(bad)).is_err(), "{bad}");
        assert!(root.create_file(Path::new(bad), 0o600).is_err(), "{bad}");
        assert!(root.rename(Path::new("x"), Path::new(bad)).is_err(), "{bad}");
    }
}

#[tokio::test]
async fn ten_thousand_small_files_are_stored() {
    let bench = staged(vec![output("/outputs")]).await;
    for n in 0..10_000 {
        let at = bench.at(&format!("out/0/{}", n % 100));
        fs::create_dir_all(&at).unwrap();
        fs::write(at.join(n.to_string()), n.to_string()).unwrap();
    }
    let manifest = bench.publish(false).await.unwrap().manifest;
    assert_eq!(manifest.entries.len(), 10_101);
    let bytes = read_small(&bench.store, &key(PREFIX).join(MANIFEST_NAME).unwrap(), 1 << 30).await.unwrap();
    assert_eq!(serde_json::from_slice::<runner_core::artifact::Manifest>(&bytes).unwrap(), manifest);
    bench.store.head(&key("runs/t/r/1/outputs/0/42/9942")).await.unwrap();
}

#[tokio::test]
async fn the_holes_of_a_sparse_file_are_stored_as_the_zeros_that_they_read_as() {
    use std::os::unix::fs::FileExt as _;
    let bench = staged(vec![output("/outputs/sparse")]).await;
    let file = fs::File::create(bench.at("out/0/sparse")).unwrap();
    let mut expected = vec![0u8; (5 << 20) + 777];
    for (at, text) in
        [(0usize, "start"), ((2 << 20) + 4000, "middle"), ((3 << 20) + 1, "more"), ((5 << 20) + 772, "end.!")]
    {
        file.write_at(text.as_bytes(), at as u64).unwrap();
        expected[at..at + text.len()].copy_from_slice(text.as_bytes());
    }
    let manifest = bench.publish(false).await.unwrap().manifest;
    let entry = &manifest.entries[0];
    assert_eq!((entry.size, entry.sha256.clone()), (expected.len() as u64, digest(&expected)));
    assert_eq!(bench.store.bytes(entry.key.as_ref().unwrap()).unwrap(), expected);

    // All hole, and hole to the end, with an end inside of a chunk and on its edge.
    for size in [1u64 << 20, 3 << 20, (3 << 20) + 5, 7] {
        let bench = staged(vec![output("/outputs/sparse")]).await;
        fs::File::create(bench.at("out/0/sparse")).unwrap().set_len(size).unwrap();
        let manifest = bench.publish(false).await.unwrap().manifest;
        let zeros = vec![0; usize::try_from(size).unwrap()];
        assert_eq!((manifest.entries[0].size, &manifest.entries[0].sha256), (size, &digest(&zeros)));
    }
}
