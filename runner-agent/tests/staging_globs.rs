//! Outputs that are patterns.

mod staging_kit;

use std::{fs, os::unix::fs::symlink};

use runner_agent::staging::StagingErrorKind;
use runner_core::{artifact::EntryKind, spec::Output};
use staging_kit::*;

fn glob(pattern: &str) -> Output {
    Output { glob: true, ..output(pattern) }
}

async fn staged(outputs: Vec<Output>) -> Bench {
    let bench = Bench::new(vec![], outputs);
    bench.stage().await.unwrap();
    bench
}

async fn published(bench: &Bench) -> Vec<String> {
    let published = bench.publish(false).await.unwrap();
    assert!(published.failure.is_none(), "{:?}", published.failure);
    entries(&published.manifest).into_keys().collect()
}

#[tokio::test]
async fn what_a_pattern_matches_is_stored_below_its_base() {
    let bench = staged(vec![glob("/outputs/logs/**/*.log")]).await;
    for path in ["a.log", "x/y/b.log", "x/c.txt", ".hidden/d.log", "x/.e.log", "not-a-log"] {
        bench.write(&format!("out/0/logs/{path}"), path.as_bytes());
    }
    bench.write("out/0/elsewhere.log", b"not below the base");
    let published = bench.publish(false).await.unwrap();
    let manifest = published.manifest;
    let found: Vec<_> = manifest
        .entries
        .iter()
        .map(|entry| (entry.base.as_str(), entry.path.as_str(), entry.sha256.clone()))
        .collect();
    assert_eq!(
        found,
        [("/outputs/logs", "a.log", digest(b"a.log")), ("/outputs/logs", "x/y/b.log", digest(b"x/y/b.log")),]
    );
    assert_eq!(
        bench.store.keys(),
        ["runs/t/r/1/manifest.json", "runs/t/r/1/outputs/0/a.log", "runs/t/r/1/outputs/0/x/y/b.log"]
    );
    // Staged into another run, everything is where it was.
    let again = Bench::new(vec![artifact("/inputs/t", "runs/t/r/1/")], vec![]);
    let again = Bench { store: bench.store, ..again };
    again.stage().await.unwrap();
    assert_eq!(fs::read(again.at("in/0/t/outputs/logs/x/y/b.log")).unwrap(), b"x/y/b.log");
}

#[tokio::test]
async fn a_directory_that_matches_is_stored_with_all_that_is_in_it() {
    let bench = staged(vec![glob("/outputs/result-*")]).await;
    bench.write("out/0/result-1/.hidden/x", b"x");
    bench.write("out/0/result-2", b"a file");
    bench.write("out/0/other/result-3", b"too deep");
    fs::create_dir(bench.at("out/0/result-empty")).unwrap();
    assert_eq!(
        published(&bench).await,
        ["result-1", "result-1/.hidden", "result-1/.hidden/x", "result-2", "result-empty"]
            .map(|path| format!("/outputs/result-*|{path}"))
    );
}

#[tokio::test]
async fn what_two_outputs_name_is_stored_once() {
    let bench = staged(vec![
        glob("/outputs/*"),
        glob("/outputs/**/*.txt"),
        output("/outputs/plain.txt"),
        output("/outputs/dir"),
        glob("/outputs/dir/*"),
    ])
    .await;
    for path in ["plain.txt", "other.txt", "dir/a.txt", ".h/b.txt", "d/c.txt"] {
        bench.write(&format!("out/0/{path}"), b"x");
    }
    fs::rename(bench.at("out/0/.h"), bench.at("out/0/h")).unwrap();
    assert_eq!(
        published(&bench).await,
        [
            "/outputs/*|d",
            "/outputs/*|d/c.txt",
            "/outputs/*|h",
            "/outputs/*|h/b.txt",
            "/outputs/*|other.txt",
            "/outputs/dir|",
            "/outputs/dir|a.txt",
            "/outputs/plain.txt|",
        ]
    );
}

#[tokio::test]
async fn a_required_pattern_needs_a_match_even_if_another_output_has_it() {
    let bench = staged(vec![output("/outputs/a.txt"), glob("/outputs/*.txt"), glob("/outputs/*.csv")]).await;
    bench.write("out/0/a.txt", b"a");
    bench.write("out/0/b.log", b"b");
    let published = bench.publish(false).await.unwrap();
    let failure = published.failure.unwrap();
    assert_eq!((failure.kind, failure.field.as_str()), (StagingErrorKind::Absent, "spec.outputs[2]"));
    assert_eq!(published.manifest.entries.len(), 1);
}

#[tokio::test]
async fn names_that_no_pattern_matches_are_not_even_looked_at() {
    let bench = staged(vec![glob("/outputs/*.txt")]).await;
    bench.write("out/0/a.txt", b"a");
    symlink("/etc/passwd", bench.at("out/0/passwd")).unwrap();
    symlink("/etc/passwd", bench.at("out/0/passwd.txt")).unwrap();
    let published = bench.publish(false).await.unwrap();
    assert_eq!(published.notes.len(), 1, "{:?}", published.notes);
    assert!(published.notes[0].contains("passwd.txt"));
    assert_eq!(published.manifest.entries.len(), 1);
    assert_eq!(published.manifest.entries[0].kind, EntryKind::File);
}

#[tokio::test]
async fn a_glob_s_limit_counts_what_it_matches() {
    let bench = staged(vec![Output { max_bytes: Some(10), ..glob("/outputs/*.txt") }]).await;
    bench.write("out/0/a.txt", &[0; 10]);
    bench.write("out/0/b.bin", &[0; 1000]);
    assert!(bench.publish(false).await.unwrap().failure.is_none());
    let bench = staged(vec![Output { max_bytes: Some(9), ..glob("/outputs/*.txt") }]).await;
    bench.write("out/0/a.txt", &[0; 10]);
    let failure = bench.publish(false).await.unwrap().failure.unwrap();
    assert_eq!(failure.kind, StagingErrorKind::LimitExceeded);
}

#[tokio::test]
async fn names_that_are_not_text_are_matched_too() {
    use std::os::unix::ffi::OsStrExt as _;
    let bench = staged(vec![glob("/outputs/*.b?n")]).await;
    let name = std::ffi::OsStr::from_bytes(b"\xff.b\xfen");
    fs::write(bench.at("out/0").join(name), b"x").unwrap();
    let manifest = bench.publish(false).await.unwrap().manifest;
    assert!(manifest.entries[0].path_encoded);
    assert_eq!(manifest.entries[0].path, "%FF.b%FEn");
}
