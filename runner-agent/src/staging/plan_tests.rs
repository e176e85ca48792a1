use bytes::Bytes;
use proptest::prelude::*;
use runner_core::{
    id::TenantId,
    limits::Limits,
    spec::{Input, InputSource, Output, RunSpec},
};

use super::*;

fn file(path: &str) -> Input {
    Input {
        path: path.to_owned(),
        source: InputSource::Inline(Bytes::new()),
        sha256: None,
        mode: None,
        extract: None,
    }
}

fn tree(path: &str) -> Input {
    Input { source: InputSource::Artifact("artifact:uploads/t/x/".parse().unwrap()), ..file(path) }
}

fn output(path: &str) -> Output {
    Output { path: path.to_owned(), glob: false, destination: None, required: false, max_bytes: None }
}

fn spec(inputs: Vec<Input>, outputs: &[&str]) -> RunSpec {
    RunSpec { inputs, outputs: outputs.iter().map(|path| output(path)).collect(), ..RunSpec::default() }
}

/// (target, kind, writable) of each mount, in order.
fn mounts(spec: &RunSpec) -> Vec<(String, MountKind, bool)> {
    let plan = MountPlan::new(spec).unwrap();
    plan.mounts.into_iter().map(|mount| (mount.target, mount.kind, mount.writable)).collect()
}

fn refused(spec: &RunSpec) -> Vec<(String, String)> {
    let InvalidSpec(violations) = MountPlan::new(spec).unwrap_err();
    violations.into_iter().map(|violation| (violation.field, violation.reason)).collect()
}

use MountKind::{Directory, File};

#[test]
fn inputs_and_outputs_exist_even_where_the_spec_names_none() {
    let plan = MountPlan::new(&RunSpec::default()).unwrap();
    let found: Vec<_> =
        plan.mounts.iter().map(|mount| (mount.target.as_str(), mount.host.as_str())).collect();
    assert_eq!(found, [("/inputs", "in/0"), ("/outputs", "out/0")]);
}

#[test]
fn everything_below_inputs_and_outputs_shares_one_mount_each() {
    let spec = spec(
        vec![file("/inputs/a"), tree("/inputs/src"), file("/inputs/src/b")],
        &["/outputs/report.txt", "/outputs/deep/er/x"],
    );
    assert_eq!(
        mounts(&spec),
        [("/inputs".to_owned(), Directory, false), ("/outputs".to_owned(), Directory, true)]
    );
    let plan = MountPlan::new(&spec).unwrap();
    assert_eq!(plan.host_path(&plan.inputs[2]), PathBuf::from("in/0/src/b"));
    assert_eq!(plan.host_path(&plan.outputs[1]), PathBuf::from("out/0/deep/er/x"));
    let made: Vec<_> = plan.directories.iter().map(|place| place.relative.as_str()).collect();
    assert_eq!(made, ["deep/er"], "the parents of outputs exist before the program starts");
}

#[test]
fn an_input_elsewhere_is_a_mount_of_its_own_and_hides_nothing_else() {
    let spec = spec(vec![file("/etc/app.conf"), file("/x.txt"), tree("/data"), file("/data/more")], &[]);
    assert_eq!(
        mounts(&spec),
        [
            ("/data".to_owned(), Directory, false),
            ("/etc/app.conf".to_owned(), File, false),
            ("/inputs".to_owned(), Directory, false),
            ("/outputs".to_owned(), Directory, true),
            ("/x.txt".to_owned(), File, false),
        ]
    );
}

#[test]
fn an_output_elsewhere_is_published_from_its_parent_and_outer_parents_take_in_inner_ones() {
    let spec = spec(vec![file("/work/in.txt")], &["/work/out.txt", "/work/sub/b.txt", "/tmp/c", "/result"]);
    assert_eq!(
        mounts(&spec),
        [
            ("/inputs".to_owned(), Directory, false),
            ("/outputs".to_owned(), Directory, true),
            ("/result".to_owned(), Directory, true),
            ("/tmp".to_owned(), Directory, true),
            ("/work".to_owned(), Directory, true),
            ("/work/in.txt".to_owned(), File, false),
        ]
    );
    let plan = MountPlan::new(&spec).unwrap();
    let made: Vec<_> = plan.directories.iter().map(|place| plan.host_path(place)).collect();
    assert_eq!(made, [PathBuf::from("out/3/sub")]);
    assert_eq!(plan.outputs[3].relative, "", "an output right below the root is a directory made for it");
}

#[test]
fn places_that_would_break_the_workload_are_refused_by_field() {
    for at in ["/etc", "/usr", "/var", "/tmp", "/proc/x", "/dev/null", "/sys", "/outputs", "/outputs/x"] {
        let expected = [("spec.inputs[0].path".to_owned(), "FORBIDDEN".to_owned())];
        assert_eq!(refused(&spec(vec![tree(at)], &[])), expected, "{at}");
    }
    for at in ["/etc/x", "/usr/local/out/x", "/bin", "/home", "/proc/x", "/dev/shm/x", "/inputs", "/inputs/x"]
    {
        let expected = [("spec.outputs[0].path".to_owned(), "FORBIDDEN".to_owned())];
        assert_eq!(refused(&spec(vec![], &[at])), expected, "{at}");
    }
    assert_eq!(refused(&spec(vec![file("/inputs")], &[]))[0].1, "INVALID");
    assert_eq!(refused(&spec(vec![file("/a"), file("/a/b")], &[]))[0].0, "spec.inputs[1].path");
    assert_eq!(refused(&spec(vec![file("/inputs/a"), tree("/inputs/a/b")], &[]))[0].0, "spec.inputs[1].path");
}

#[test]
fn destinations_stay_apart_and_out_of_what_the_service_writes() {
    let to = |destinations: &[&str]| RunSpec {
        outputs: destinations
            .iter()
            .enumerate()
            .map(|(i, uri)| Output {
                destination: Some(uri.parse().unwrap()),
                ..output(&format!("/outputs/{i}"))
            })
            .collect(),
        ..RunSpec::default()
    };
    assert!(MountPlan::new(&to(&["artifact:uploads/t/a/", "artifact:uploads/t/ab/"])).is_ok());
    assert_eq!(refused(&to(&["artifact:uploads/t/a/", "artifact:uploads/t/a/b/"]))[0].1, "DUPLICATE");
    assert_eq!(refused(&to(&["artifact:runs/t/a/"]))[0].1, "FORBIDDEN");
    let long = format!("artifact:uploads/t/{}/", "a/".repeat(300).trim_end_matches('/'));
    assert_eq!(refused(&to(&[&long]))[0].1, "TOO_LARGE");
}

/// Few names, so that paths nest and collide often.
fn any_path() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec!["inputs", "outputs", "a", "b", "work", "tmp", "etc", "home", "var"]);
    prop::collection::vec(name, 1..4).prop_map(|names| format!("/{}", names.join("/")))
}

fn any_spec() -> impl Strategy<Value = RunSpec> {
    let input = (any_path(), any::<bool>())
        .prop_map(|(path, is_tree)| if is_tree { tree(&path) } else { file(&path) });
    let output = any_path().prop_map(|path| output(&path));
    (prop::collection::vec(input, 0..6), prop::collection::vec(output, 0..6))
        .prop_map(|(inputs, outputs)| RunSpec { inputs, outputs, ..RunSpec::default() })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, max_global_rejects: 100_000, ..ProptestConfig::default() })]

    #[test]
    fn every_path_has_one_innermost_mount_and_no_writable_one_holds_an_input(spec in any_spec()) {
        let tenant: TenantId = "t".parse().unwrap();
        prop_assume!(spec.validate(&tenant, &Limits::default()).is_ok());
        let plan = MountPlan::new(&spec);
        prop_assume!(plan.is_ok());
        let plan = plan.unwrap();
        let mut targets: Vec<_> = plan.mounts.iter().map(|mount| &mount.target).collect();
        let mut hosts: Vec<_> = plan.mounts.iter().map(|mount| &mount.host).collect();
        targets.sort();
        hosts.sort();
        targets.dedup();
        hosts.dedup();
        prop_assert_eq!((targets.len(), hosts.len()), (plan.mounts.len(), plan.mounts.len()));
        for (i, mount) in plan.mounts.iter().enumerate() {
            for outer in &plan.mounts[i + 1..] {
                prop_assert!(!is_below(&mount.target, &outer.target), "outer mounts come first");
            }
        }
        let paths = spec.inputs.iter().map(|input| (&input.path, false)).zip(&plan.inputs);
        let paths = paths.chain(spec.outputs.iter().map(|output| (&output.path, true)).zip(&plan.outputs));
        for ((path, writable), place) in paths {
            // Asked of the definition, not of the code: of all mounts at or above it, the longest.
            let innermost = plan.mounts.iter().filter(|mount| {
                path == &mount.target || path.starts_with(&format!("{}/", mount.target))
            }).max_by_key(|mount| mount.target.len());
            let mount = &plan.mounts[place.mount];
            prop_assert_eq!(innermost, Some(mount));
            prop_assert_eq!(mount.writable, writable);
            let joined = if place.relative.is_empty() {
                mount.target.clone()
            } else {
                format!("{}/{}", mount.target, place.relative)
            };
            prop_assert_eq!(&joined, path);
            prop_assert!(mount.kind == MountKind::Directory || place.relative.is_empty());
        }
        for place in &plan.directories {
            prop_assert!(plan.mounts[place.mount].writable);
        }
    }

    #[test]
    fn a_plan_depends_on_nothing_but_the_spec(spec in any_spec()) {
        prop_assert_eq!(MountPlan::new(&spec), MountPlan::new(&spec));
    }
}

fn glob(pattern: &str) -> Output {
    Output { glob: true, ..output(pattern) }
}

#[test]
fn a_glob_is_published_from_its_base_which_exists_at_the_start() {
    let spec = RunSpec {
        outputs: vec![
            glob("/outputs/logs/**/*.log"),
            glob("/work/a/*.csv"),
            output("/work/a/b/x"),
            glob("/tmp/*.t"),
        ],
        ..RunSpec::default()
    };
    let found = mounts(&spec);
    let found: Vec<_> =
        found.iter().map(|(target, kind, writable)| (target.as_str(), *kind, *writable)).collect();
    assert_eq!(
        found,
        [
            ("/inputs", Directory, false),
            ("/outputs", Directory, true),
            ("/tmp", Directory, true),
            ("/work/a", Directory, true),
        ]
    );
    let plan = MountPlan::new(&spec).unwrap();
    let host = |place: &Place| plan.host_path(place).to_str().unwrap().to_owned();
    assert_eq!(
        plan.outputs.iter().map(host).collect::<Vec<_>>(),
        ["out/0/logs", "out/2", "out/2/b/x", "out/1"]
    );
    assert_eq!(plan.directories.iter().map(host).collect::<Vec<_>>(), ["out/0/logs", "out/2/b"]);
}

#[test]
fn an_output_that_is_a_directory_is_not_made_for_a_glob_in_it() {
    let spec =
        RunSpec { outputs: vec![output("/outputs/d"), glob("/outputs/d/*.txt")], ..RunSpec::default() };
    assert!(MountPlan::new(&spec).unwrap().directories.is_empty());
}

#[test]
fn a_glob_names_a_directory_of_its_own_before_its_first_wildcard() {
    for (pattern, reason) in [
        ("/*", "FORBIDDEN"),
        ("/**/x", "FORBIDDEN"),
        ("/home/*", "FORBIDDEN"),
        ("/etc/*.conf", "FORBIDDEN"),
        ("/proc/*/maps", "FORBIDDEN"),
        ("/inputs/*", "FORBIDDEN"),
        ("/outputs/[z-a]", "INVALID"),
        ("outputs/*", "INVALID"),
    ] {
        let spec = RunSpec { outputs: vec![glob(pattern)], ..RunSpec::default() };
        let expected = [("spec.outputs[0].path".to_owned(), reason.to_owned())];
        assert_eq!(refused(&spec), expected, "{pattern}");
    }
}
