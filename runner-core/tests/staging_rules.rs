//! What a spec may ask of staging.

use bytes::Bytes;
use runner_core::{
    https::HttpsPolicy,
    id::TenantId,
    limits::Limits,
    spec::{Archive, Input, InputSource, InvalidSpec, Output, RunSpec},
};

fn tenant() -> TenantId {
    "t".parse().unwrap()
}

fn limits() -> Limits {
    let hosts = vec!["data.example".parse().unwrap(), "*.mirror.example:8443".parse().unwrap()];
    Limits { https: HttpsPolicy { hosts, ..HttpsPolicy::default() }, ..Limits::default() }
}

fn input(path: &str, uri: &str) -> Input {
    let source = InputSource::from_uri(uri).unwrap();
    Input { path: path.to_owned(), source, sha256: None, mode: None, extract: None }
}

fn output(path: &str, glob: bool) -> Output {
    Output { path: path.to_owned(), glob, destination: None, required: false, max_bytes: None }
}

/// (field, reason) of each violation.
fn violations(inputs: Vec<Input>, outputs: Vec<Output>) -> Vec<(String, String)> {
    let spec = RunSpec { inputs, outputs, ..RunSpec::default() };
    match spec.validate(&tenant(), &limits()) {
        Ok(()) => Vec::new(),
        Err(InvalidSpec(found)) => found.into_iter().map(|one| (one.field, one.reason)).collect(),
    }
}

fn one(field: &str, reason: &str) -> Vec<(String, String)> {
    vec![(field.to_owned(), reason.to_owned())]
}

const SHA: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
const RUN: &str = "run:018f0000-0000-7000-8000-000000000001";

#[test]
fn an_input_by_https_comes_from_an_allowed_host_and_names_its_digest() {
    let good = Input { sha256: Some(SHA.to_owned()), ..input("/inputs/a", "https://data.example/a?b") };
    assert_eq!(violations(vec![good.clone()], vec![]), []);
    let below =
        Input { sha256: Some(SHA.to_owned()), ..input("/inputs/a", "https://x.mirror.example:8443/") };
    assert_eq!(violations(vec![below], vec![]), []);
    assert_eq!(
        violations(vec![Input { sha256: None, ..good.clone() }], vec![]),
        one("spec.inputs[0].sha256", "REQUIRED")
    );
    for url in ["https://evil.example/a", "https://data.example:8443/a", "https://127.0.0.1/a"] {
        let source = InputSource::from_uri(url).unwrap();
        let found = violations(vec![Input { source, ..good.clone() }], vec![]);
        assert_eq!(found, one("spec.inputs[0].uri", "FORBIDDEN"), "{url}");
    }
    let spec = RunSpec { inputs: vec![good], ..RunSpec::default() };
    assert!(spec.validate(&tenant(), &Limits::default()).is_err(), "by default, no host is allowed");
}

#[test]
fn a_run_s_output_is_neither_unpacked_nor_given_a_digest() {
    let good = input("/inputs/a", &format!("{RUN}/outputs/a.tar"));
    assert_eq!(violations(vec![good.clone()], vec![]), []);
    for bad in [
        Input { extract: Some(Archive::Tar), ..good.clone() },
        Input { sha256: Some(SHA.to_owned()), ..good },
    ] {
        assert_eq!(violations(vec![bad], vec![]), one("spec.inputs[0].uri", "INVALID"));
    }
}

#[test]
fn a_glob_is_absolute_and_well_formed() {
    for good in ["/outputs/*", "/outputs/**/[a-z]?.txt", "/outputs/\\*"] {
        assert_eq!(violations(vec![], vec![output(good, true)]), [], "{good}");
    }
    for bad in ["outputs/*", "*", "", "/outputs/", "/outputs/../*", "/outputs/[z-a]", "/outputs/\\"] {
        assert_eq!(
            violations(vec![], vec![output(bad, true)]),
            one("spec.outputs[0].path", "INVALID"),
            "{bad}"
        );
    }
    assert_eq!(violations(vec![], vec![output("/outputs/*", false)]), [], "a plain path with a star in it");
}

#[test]
fn globs_may_share_a_directory_with_other_outputs_but_with_no_input() {
    assert_eq!(
        violations(
            vec![],
            vec![
                output("/outputs/*.txt", true),
                output("/outputs/**/*.log", true),
                output("/outputs/a.txt", false)
            ]
        ),
        []
    );
    assert_eq!(
        violations(vec![], vec![output("/outputs/*", true), output("/outputs/*", true)]),
        one("spec.outputs[1].path", "DUPLICATE")
    );
    let inside =
        Input { source: InputSource::Inline(Bytes::new()), ..input("/work/in", "artifact:uploads/t/x") };
    assert_eq!(
        violations(vec![inside], vec![output("/work/*", true)]),
        one("spec.outputs[0].path", "DUPLICATE")
    );
}

#[test]
fn a_spec_without_globs_has_the_digest_that_it_had_before_there_were_globs() {
    let spec = RunSpec { outputs: vec![output("/outputs/a", false)], ..RunSpec::default() };
    assert!(!serde_json::to_string(&spec).unwrap().contains("glob"));
}
