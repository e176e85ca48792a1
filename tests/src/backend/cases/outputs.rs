//! Rule 8: outputs.

use runner_core::{
    artifact::{ArtifactErrorKind, ArtifactKey, ArtifactUri, EntryKind, MANIFEST_NAME, Manifest},
    backend::{BackendErrorKind, Observation},
    outcome::{Cause, ExitStatus},
};

use super::{contents, output, upload_key};
use crate::backend::{
    bench::{Bench, within},
    observed::Observed,
    program::{Program, Then},
};

fn write(files: &[(&str, &str)], exit: i32) -> Program {
    let files = files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect();
    Program::Write { files, then: Then::Exit(exit) }
}

fn published(observed: &Observed) -> Manifest {
    let manifest = observed.published.clone().expect("outputs are published");
    assert_eq!(observed.end().outputs.as_ref(), Some(&manifest), "the end tells the same");
    manifest
}

fn file(output: &str, path: &str, text: &str) -> (String, String, Vec<u8>) {
    (output.to_owned(), path.to_owned(), text.as_bytes().to_vec())
}

/// A file, a directory with files of its own, an empty directory.
pub async fn files_and_directories_are_stored_with_size_and_digest(bench: &mut Bench) {
    let program = write(
        &[
            ("/outputs/report", "the report\n"),
            ("/outputs/dir/a", "first"),
            ("/outputs/dir/sub/b ü", "second"),
            ("/outputs/dir/none", ""),
            ("/outputs/dir/hollow/", ""),
        ],
        0,
    );
    let attempt = bench.attempt_with(&program, |spec| {
        spec.outputs.push(output("/outputs/report", true));
        spec.outputs.push(output("/outputs/dir", true));
    });
    let observed = bench.run(&attempt).await;
    assert_eq!((observed.end().cause, observed.end().status), (Cause::Exited, Some(ExitStatus::Code(0))));
    let manifest = published(&observed);
    assert!(!manifest.partial);
    let mut files = contents(bench, &manifest);
    files.sort();
    let expected = [
        file("/outputs/dir", "a", "first"),
        file("/outputs/dir", "none", ""),
        file("/outputs/dir", "sub/b ü", "second"),
        file("/outputs/report", "", "the report\n"),
    ];
    assert_eq!(files, expected);
    let hollow = |manifest: &Manifest| {
        manifest.entries.iter().any(|entry| entry.kind == EntryKind::Directory && entry.path == "hollow")
    };
    assert!(hollow(&manifest), "an empty directory is told: {manifest:?}");
    let sorted = manifest.entries.is_sorted_by_key(|entry| (entry.output.clone(), entry.path.clone()));
    assert!(sorted, "by output, then path");
    assert_eq!(observed.end().usage.output_bytes, manifest.total_bytes);
}

/// A reader never sees half a result.
pub async fn the_manifest_is_written_last(bench: &mut Bench) {
    let attempt = bench.attempt_with(&write(&[("/outputs/a", "1"), ("/outputs/b", "2")], 0), |spec| {
        spec.outputs.push(output("/outputs/a", true));
        spec.outputs.push(output("/outputs/b", true));
    });
    let manifest = published(&bench.run(&attempt).await);
    let key =
        ArtifactKey::attempt_prefix(&bench.tenant, attempt.attempt).join(MANIFEST_NAME).expect("a valid key");
    let order = bench.store.put_order();
    assert_eq!(order.last(), Some(&key.to_string()), "{order:?}");
    let stored = bench.store.peek(&key).expect("the manifest is stored");
    let stored: Manifest = serde_json::from_slice(&stored).expect("the manifest is JSON");
    assert_eq!(stored, manifest);
}

/// Its absence is no failure.
pub async fn an_optional_output_may_be_absent(bench: &mut Bench) {
    let attempt = bench.attempt_with(&Program::exit(0), |spec| {
        spec.outputs.push(output("/outputs/none", false));
    });
    let observed = bench.run(&attempt).await;
    assert_eq!((observed.end().cause, observed.end().status), (Cause::Exited, Some(ExitStatus::Code(0))));
    assert!(contents(bench, &published(&observed)).is_empty());
}

/// What was promised and is not there: `OUTPUT`, with the program's own exit code beside it. The rest is stored.
pub async fn a_required_output_that_is_absent_fails_the_run(bench: &mut Bench) {
    let attempt = bench.attempt_with(&write(&[("/outputs/there", "1")], 0), |spec| {
        spec.outputs.push(output("/outputs/none", true));
        spec.outputs.push(output("/outputs/there", true));
    });
    let observed = bench.run(&attempt).await;
    let end = observed.end();
    assert_eq!((end.cause, end.status), (Cause::Output, Some(ExitStatus::Code(0))), "{end:?}");
    assert!(!end.retryable, "the program would not write it the next time either");
    assert!(end.message.contains("/outputs/none"), "{end:?}");
    let manifest = published(&observed);
    assert!(manifest.partial);
    assert_eq!(contents(bench, &manifest), [file("/outputs/there", "", "1")]);
}

/// Its exit code stays the truth, and its outputs are there for a person to look at.
pub async fn a_failed_program_publishes_what_it_wrote(bench: &mut Bench) {
    let attempt = bench.attempt_with(&write(&[("/outputs/half", "some")], 3), |spec| {
        spec.outputs.push(output("/outputs/half", true));
        spec.outputs.push(output("/outputs/none", true));
    });
    let observed = bench.run(&attempt).await;
    let end = observed.end();
    assert_eq!((end.cause, end.status), (Cause::Exited, Some(ExitStatus::Code(3))), "{end:?}");
    let manifest = published(&observed);
    assert!(manifest.partial);
    assert_eq!(contents(bench, &manifest), [file("/outputs/half", "", "some")]);
}

/// Where the caller wants it, and each attempt apart from the others.
pub async fn a_destination_is_honoured(bench: &mut Bench) {
    let prefix = upload_key(bench, "results");
    let attempt = bench.attempt_with(&write(&[("/outputs/dir/a", "1")], 0), |spec| {
        let mut output = output("/outputs/dir", true);
        output.destination = Some(ArtifactUri::tree(prefix.clone()));
        spec.outputs.push(output);
    });
    let manifest = published(&bench.run(&attempt).await);
    assert_eq!(contents(bench, &manifest), [file("/outputs/dir", "a", "1")]);
    let keys: Vec<_> = manifest.entries.iter().filter_map(|entry| entry.key.as_ref()).collect();
    let own = prefix.of_attempt(attempt.attempt).expect("a key");
    assert!(keys.iter().all(|key| key.as_str().starts_with(&format!("{own}/"))), "{keys:?}");
}

/// Above `max_bytes` the run fails; nothing is silently cut.
pub async fn an_output_above_its_limit_is_not_stored(bench: &mut Bench) {
    let attempt = bench.attempt_with(&write(&[("/outputs/big", "123456")], 0), |spec| {
        let mut output = output("/outputs/big", true);
        output.max_bytes = Some(5);
        spec.outputs.push(output);
    });
    let observed = bench.run(&attempt).await;
    let end = observed.end();
    assert_eq!(
        (end.cause, end.status, end.retryable),
        (Cause::Output, Some(ExitStatus::Code(0)), false),
        "{end:?}"
    );
    if let Some(manifest) = &observed.published {
        assert!(manifest.partial && contents(bench, manifest).is_empty(), "{manifest:?}");
    }
}

/// Every observer sees the same manifest, however often it is observed, and through a restart.
pub async fn publishing_again_changes_nothing(bench: &mut Bench) {
    let attempt = bench.attempt_with(&write(&[("/outputs/a", "1")], 0), |spec| {
        spec.outputs.push(output("/outputs/a", true));
    });
    bench.ensure(&attempt).await;
    let shared = &*bench;
    let (one, other) = futures::future::join(shared.observe(&attempt, 0), shared.observe(&attempt, 0)).await;
    let manifest = published(&one);
    assert_eq!(published(&other), manifest);
    bench.reopen().await;
    assert_eq!(published(&bench.observe(&attempt, 0).await), manifest);
    assert_eq!(contents(bench, &manifest), [file("/outputs/a", "", "1")]);
}

/// A store that fails for now: told as worth another try, and nothing is lost by it.
pub async fn a_store_that_is_away_loses_nothing(bench: &mut Bench) {
    use futures::StreamExt as _;
    let attempt = bench.attempt_with(&write(&[("/outputs/a", "1")], 0), |spec| {
        spec.outputs.push(output("/outputs/a", true));
    });
    bench.store.fail_writes(Some(ArtifactErrorKind::Unavailable));
    bench.ensure(&attempt).await;
    let mut stream = bench.backend().observe(&attempt, 0);
    let mut failure = None;
    while let Some(observation) = within("observe", stream.next()).await {
        match observation {
            Ok(Observation::Published { manifest }) => panic!("published into a failing store: {manifest:?}"),
            Ok(Observation::Ended(end)) => failure = Some((end.cause, end.retryable)),
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.kind, BackendErrorKind::Output, "{}", error.chain());
                failure = Some((error.kind.cause(), error.retryable));
            }
        }
    }
    drop(stream);
    assert_eq!(failure, Some((Cause::Output, true)), "it fails, and that may pass");
    bench.store.fail_writes(None);
    let manifest = published(&bench.observe(&attempt, 0).await);
    assert_eq!(contents(bench, &manifest), [file("/outputs/a", "", "1")]);
}
