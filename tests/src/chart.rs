//! The Helm chart as tests see it: rendered by the real Helm, read as the objects that a cluster would get.
//!
//! Helm and the schemas of Kubernetes' objects are put below `target/test-tools/chart` by `cargo xtask test`; a `helm` in `PATH` will
//! do for everything but the schemas. Where there is none, tests are skipped visibly; `RUNNER_REQUIRE_BACKENDS` may name `chart`.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::{backend::Missing, objects::azurite::tools};

/// The files of values that the chart has.
pub const VALUES: [&str; 3] = ["values.yaml", "values-dev.yaml", "values-production.yaml"];
/// The release's namespace in everything that is only rendered.
pub const NAMESPACE: &str = "runner-system";
/// The release.
pub const RELEASE: &str = "demo";

/// The chart, and who renders it.
#[derive(Debug, Clone)]
pub struct Chart {
    helm: PathBuf,
}

/// Where the chart is.
///
/// # Panics
/// Where the tests lie nowhere.
pub fn folder() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("the tests lie in the workspace").join("charts/runner")
}

impl Chart {
    /// Finds Helm, or skips `test` visibly.
    ///
    /// # Panics
    /// Where there is none and `RUNNER_REQUIRE_BACKENDS` names `chart`.
    pub fn find(test: &str) -> Option<Self> {
        let ours = tools().map(|dir| dir.join("chart/bin/helm"));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = ours.into_iter().chain(std::env::split_paths(&path).map(|dir| dir.join("helm")));
        match { found }.find(|helm| helm.is_file()) {
            Some(helm) => Some(Self { helm }),
            None => {
                Missing("no Helm: `cargo xtask test` installs one".to_owned()).skip("chart", test);
                None
            }
        }
    }

    /// A command of Helm, with nothing of a person's own settings.
    pub fn helm(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.helm);
        command.args(args).stdin(Stdio::null());
        for name in ["KUBECONFIG", "HELM_NAMESPACE", "HELM_KUBECONTEXT", "HELM_PLUGINS"] {
            command.env_remove(name);
        }
        command
    }

    /// Runs a command of Helm. Answers what it wrote to standard output.
    ///
    /// # Errors
    /// What it wrote, where it fails.
    ///
    /// # Panics
    /// Where it cannot be started.
    pub fn run(&self, args: &[&str]) -> Result<String, String> {
        let output = self.helm(args).output().expect("start helm");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() {
            Ok(text(&output.stdout))
        } else {
            Err(text(&[output.stdout, output.stderr].concat()))
        }
    }

    /// What a cluster would get for one of [`VALUES`] and these values over it, written as YAML.
    ///
    /// # Errors
    /// What Helm says against it.
    ///
    /// # Panics
    /// Where what it renders is no YAML.
    pub fn render(&self, values: &str, over: &str) -> Result<Vec<Object>, String> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let file = dir.path().join("over.yaml");
        std::fs::write(&file, over).expect("write the values");
        let (chart, file) = (folder(), file.display().to_string());
        let values = chart.join(values).display().to_string();
        let chart = chart.display().to_string();
        let text = self.run(&[
            "template",
            RELEASE,
            &chart,
            "--namespace",
            NAMESPACE,
            "--values",
            &values,
            "--values",
            &file,
        ])?;
        Ok(objects(&text))
    }
}

/// The objects of a stream of YAML documents.
fn objects(text: &str) -> Vec<Object> {
    let documents = text.split("\n---\n").map(|document| document.trim_start_matches("---\n"));
    let full = documents
        .filter(|document| document.lines().any(|line| !line.trim().is_empty() && !line.starts_with('#')));
    full.map(|document| {
        let value = serde_saphyr::from_str(document).unwrap_or_else(|error| panic!("{error}\n{document}"));
        Object(value)
    })
    .collect()
}

/// An object of Kubernetes.
#[derive(Debug, Clone, PartialEq)]
pub struct Object(pub Value);

impl Object {
    /// Its kind.
    ///
    /// # Panics
    /// Where it has none.
    pub fn kind(&self) -> &str {
        self.0["kind"].as_str().expect("an object has a kind")
    }

    /// Its name.
    ///
    /// # Panics
    /// Where it has none.
    pub fn name(&self) -> &str {
        self.0["metadata"]["name"].as_str().expect("an object has a name")
    }

    /// Its namespace. `None`: it is in none.
    pub fn namespace(&self) -> Option<&str> {
        self.0["metadata"]["namespace"].as_str()
    }

    /// Its specification of a pod, where it makes pods.
    pub fn pod(&self) -> Option<&Value> {
        self.0.pointer("/spec/template/spec")
    }
}

/// The one object of this kind and name.
///
/// # Panics
/// Where there is none.
pub fn object<'a>(objects: &'a [Object], kind: &str, name: &str) -> &'a Object {
    let found = objects.iter().find(|object| object.kind() == kind && object.name() == name);
    found.unwrap_or_else(|| {
        let all: Vec<_> = objects.iter().map(|object| (object.kind(), object.name())).collect();
        panic!("no {kind} {name} in {all:?}")
    })
}

/// The service's configuration as the chart writes it: the file's name and text.
///
/// # Panics
/// Where there is none.
pub fn configuration(objects: &[Object]) -> (PathBuf, String) {
    let map = objects.iter().find(|object| object.kind() == "ConfigMap").expect("a ConfigMap");
    let data = map.0["data"].as_object().expect("its data");
    let (name, text) = data.iter().next().expect("a file");
    (PathBuf::from(name), text.as_str().expect("a text").to_owned())
}

/// A right: API group, resource, verb.
pub type Right = (String, String, String);

/// The rights that docs/k8sjob.md says the service needs, sorted: the rows of the table below "What it may do".
///
/// # Panics
/// Where there is no such table.
pub fn documented_rights() -> Vec<Right> {
    let doc = folder().join("../../docs/k8sjob.md");
    let doc = std::fs::read_to_string(doc).expect("read docs/k8sjob.md");
    let (_, after) = doc.split_once("## What it may do").expect("the part about rights");
    let part = after.split_once("\n## ").map_or(after, |(part, _)| part);
    let mut rights = Vec::new();
    for row in part.lines().filter(|line| line.starts_with("| ")).skip(1) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let words =
            |cell: &str| -> Vec<String> { cell.split('`').skip(1).step_by(2).map(str::to_owned).collect() };
        // The core group has no name.
        let group = words(cells[0]).pop().unwrap_or_default();
        for resource in words(cells[1]) {
            rights.extend(words(cells[2]).into_iter().map(|verb| (group.clone(), resource.clone(), verb)));
        }
    }
    assert!(!rights.is_empty(), "docs/k8sjob.md has no table of rights");
    rights.sort();
    rights
}

/// What rules grant, sorted, each once.
///
/// # Panics
/// Where a rule is more than groups, resources and verbs, or has a wildcard.
pub fn rights(rules: &Value) -> Vec<Right> {
    let texts = |value: &Value| -> Vec<String> {
        let list = value.as_array().map(Vec::as_slice).unwrap_or_default();
        list.iter().map(|text| text.as_str().expect("a text").to_owned()).collect()
    };
    let mut rights = Vec::new();
    for rule in rules.as_array().expect("rules") {
        for key in rule.as_object().expect("a rule").keys() {
            assert!(["apiGroups", "resources", "verbs"].contains(&key.as_str()), "{key} in {rule}");
        }
        for group in texts(&rule["apiGroups"]) {
            for resource in texts(&rule["resources"]) {
                for verb in texts(&rule["verbs"]) {
                    assert!(group != "*" && resource != "*" && verb != "*", "{rule}");
                    rights.push((group.clone(), resource.clone(), verb));
                }
            }
        }
    }
    rights.sort();
    rights.dedup();
    rights
}

/// Whether a label selector selects something with these labels.
///
/// # Panics
/// Where it is none, or has an operator that the chart has no use for.
pub fn selects(selector: &Value, labels: &[(&str, &str)]) -> bool {
    let value = |name: &Value| labels.iter().find(|(label, _)| name == label).map(|(_, value)| *value);
    let exact = selector["matchLabels"].as_object().into_iter().flatten();
    let mut exact = exact.map(|(name, wanted)| value(&Value::from(name.as_str())) == wanted.as_str());
    let expressions = selector["matchExpressions"].as_array().into_iter().flatten();
    let mut expressions = expressions.map(|expression| {
        let found = value(&expression["key"]);
        let listed = || {
            let values = expression["values"].as_array().expect("values");
            found.is_some_and(|found| values.iter().any(|value| value == found))
        };
        match expression["operator"].as_str() {
            Some("Exists") => found.is_some(),
            Some("NotIn") => !listed(),
            other => panic!("{other:?} in {selector}"),
        }
    });
    assert!(selector.is_object(), "{selector}");
    exact.all(|fits| fits) && expressions.all(|fits| fits)
}
