//! Inputs: what exists before the program starts.

use bytes::Bytes;
use runner_core::{
    artifact::{ArtifactErrorKind, ArtifactUri, EntryKind, MANIFEST_NAME, Manifest, ManifestEntry},
    backend::BackendErrorKind,
    fake::backend::Flood,
    log::LogStream,
    outcome::{Cause, ExitStatus},
    spec::InputSource,
};

use super::{hex_digest, input, object, upload_key, with_object_input};
use crate::backend::{bench::Bench, program::Program};

/// An object of the store.
pub async fn an_object_appears_at_its_path(bench: &mut Bench) {
    let attempt = with_object_input(bench, &Program::Cat("/inputs/x".into()), b"from the store\n");
    let observed = bench.run(&attempt).await;
    assert_eq!(observed.out(), "from the store\n");
    assert_eq!(observed.end().status, Some(ExitStatus::Code(0)));
}

/// Bytes of the spec itself, at a path of several names.
pub async fn inline_bytes_appear_at_their_path(bench: &mut Bench) {
    let path = "/inputs/deep/er/a b ü";
    let bytes = Bytes::from_static(b"\x00\xffinline");
    let attempt = bench.attempt_with(&Program::Cat(path.into()), |spec| {
        spec.inputs.push(input(path, InputSource::Inline(bytes.clone())));
    });
    assert_eq!(bench.run(&attempt).await.stream(LogStream::Stdout), bytes);
}

/// A sealed tree, files of folders included.
pub async fn a_tree_appears_below_its_path(bench: &mut Bench) {
    let prefix = upload_key(bench, "tree");
    let mut manifest = Manifest::default();
    for (path, text) in [("a", "first\n"), ("sub/b", "second\n")] {
        let key = prefix.join(path).expect("a valid key");
        bench.store.seed(&key, text);
        manifest.total_bytes += text.len() as u64;
        manifest.entries.push(ManifestEntry {
            output: String::new(),
            base: String::new(),
            path: path.to_owned(),
            path_encoded: false,
            kind: EntryKind::File,
            size: text.len() as u64,
            sha256: hex_digest(text.as_bytes()),
            mode: 0o644,
            key: Some(key),
        });
    }
    let key = prefix.join(MANIFEST_NAME).expect("a valid key");
    bench.store.seed(&key, serde_json::to_vec(&manifest).expect("a manifest is JSON"));
    let source = InputSource::Artifact(ArtifactUri::tree(prefix));
    for (path, text) in [("/inputs/t/a", "first\n"), ("/inputs/t/sub/b", "second\n")] {
        let attempt = bench.attempt_with(&Program::Cat(path.into()), |spec| {
            spec.inputs.push(input("/inputs/t", source.clone()));
        });
        assert_eq!(bench.run(&attempt).await.out(), text);
    }
}

/// Larger than any buffer.
pub async fn a_large_object_is_exact(bench: &mut Bench) {
    let bytes = Flood::new(true).take(20 * 1024 * 1024 + 7);
    let attempt = with_object_input(bench, &Program::Cat("/inputs/x".into()), &bytes);
    assert!(bench.run(&attempt).await.stream(LogStream::Stdout) == bytes, "the bytes differ");
}

/// The digest that the caller expects.
pub async fn a_digest_that_matches_is_accepted(bench: &mut Bench) {
    let source = object(bench, b"bytes");
    let attempt = bench.attempt_with(&Program::Cat("/inputs/x".into()), |spec| {
        let mut input = input("/inputs/x", source);
        input.sha256 = Some(hex_digest(b"bytes"));
        spec.inputs.push(input);
    });
    assert_eq!(bench.run(&attempt).await.out(), "bytes");
}

/// Another digest: the program never starts, and trying again would not help.
pub async fn a_digest_that_does_not_match_fails_the_attempt(bench: &mut Bench) {
    let source = object(bench, b"other bytes");
    for source in [source, InputSource::Inline(Bytes::from_static(b"other bytes"))] {
        let attempt = bench.attempt_with(&Program::Cat("/inputs/x".into()), |spec| {
            let mut input = input("/inputs/x", source);
            input.sha256 = Some(hex_digest(b"bytes"));
            spec.inputs.push(input);
        });
        let error = bench.ensure_fails(&attempt).await;
        assert_eq!((error.kind, error.retryable), (BackendErrorKind::Input, false), "{}", error.chain());
        assert_ne!(bench.harness().starts(attempt.attempt), Some(1));
        assert_eq!(bench.harness().processes(attempt.attempt), Vec::<String>::new());
    }
}

/// No such object.
pub async fn an_object_that_is_missing_fails_the_attempt(bench: &mut Bench) {
    let source = InputSource::Artifact(ArtifactUri::object(upload_key(bench, "never-stored")));
    let attempt = bench.attempt_with(&Program::Cat("/inputs/x".into()), |spec| {
        spec.inputs.push(input("/inputs/x", source));
    });
    let error = bench.ensure_fails(&attempt).await;
    assert_eq!((error.kind, error.retryable), (BackendErrorKind::Input, false), "{}", error.chain());
    assert_eq!(error.kind.cause(), Cause::Input);
}

/// A store that fails for now is worth another try, and that try succeeds.
pub async fn a_store_that_is_away_fails_the_attempt_for_now(bench: &mut Bench) {
    let attempt = with_object_input(bench, &Program::Cat("/inputs/x".into()), b"bytes");
    bench.store.fail_reads(Some(ArtifactErrorKind::Unavailable));
    let error = bench.ensure_fails(&attempt).await;
    assert_eq!((error.kind, error.retryable), (BackendErrorKind::Input, true), "{}", error.chain());
    bench.store.fail_reads(None);
    assert_eq!(bench.run(&attempt).await.out(), "bytes");
}

/// Inputs are read-only, as on every backend.
pub async fn the_program_cannot_change_its_inputs(bench: &mut Bench) {
    let attempt = with_object_input(bench, &Program::TryWrite("/inputs/x".into()), b"bytes");
    assert_eq!(bench.run(&attempt).await.out(), "refused\n");
}
