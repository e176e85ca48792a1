//! The direction of dependencies: the table of `docs/ARCHITECTURE.md`, checked against `cargo metadata`.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::process;

/// What each of our crates may depend on, of ours. Development dependencies are free: tests look at everything.
const ALLOWED: &[(&str, &[&str])] = &[
    ("runner-proto", &[]),
    ("runner-glob", &[]),
    ("runner-core", &["runner-glob"]),
    ("runner-store", &["runner-core"]),
    ("runner-artifacts", &["runner-core"]),
    ("runner-agent", &["runner-core", "runner-glob", "runner-proto"]),
    ("backend-local", &["runner-core", "runner-agent"]),
    ("backend-dind", &["runner-core", "runner-agent"]),
    ("backend-k8sjob", &["runner-core", "runner-agent"]),
    (
        "runner",
        &[
            "runner-core",
            "runner-proto",
            "runner-store",
            "runner-artifacts",
            "runner-agent",
            "backend-local",
            "backend-dind",
            "backend-k8sjob",
        ],
    ),
    ("worker-client", &["runner-proto"]),
    ("runnerctl", &["runner-glob", "worker-client"]),
    (
        "runner-tests",
        &[
            "runner-core",
            "runner-proto",
            "runner-store",
            "runner-artifacts",
            "runner-agent",
            "backend-local",
            "backend-dind",
            "backend-k8sjob",
            "runner",
            "worker-client",
        ],
    ),
    ("xtask", &[]),
];

/// What a crate must never depend on directly, of others': the domain knows no transport, substrate or database.
const FORBIDDEN: &[(&str, &[&str])] = &[
    (
        "runner-core",
        &["tonic", "prost", "kube", "bollard", "sqlx", "rusqlite", "object_store", "axum", "hyper"],
    ),
    ("runner-store", &["tonic", "kube", "bollard", "object_store"]),
    ("runner-artifacts", &["tonic", "kube", "bollard", "rusqlite"]),
    ("backend-local", &["tonic", "kube", "bollard", "rusqlite", "object_store"]),
    ("backend-dind", &["tonic", "kube", "rusqlite", "object_store"]),
    ("backend-k8sjob", &["tonic", "bollard", "rusqlite", "object_store"]),
    ("worker-client", &["kube", "bollard", "rusqlite", "object_store"]),
    ("runnerctl", &["kube", "bollard", "rusqlite", "object_store"]),
];

/// Checks, and fails with every arrow that is not allowed.
pub(crate) fn run() -> Result<()> {
    let json = process::output(process::cargo()?.args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_slice(&json).context("read cargo's metadata")?;
    let faults = faults(&arrows(&metadata)?);
    if !faults.is_empty() {
        bail!("dependency directions:\n  {}", faults.join("\n  "));
    }
    process::say("dependency directions: as docs/ARCHITECTURE.md allows");
    Ok(())
}

/// The direct dependencies, but for development, of each package of the workspace.
fn arrows(metadata: &Value) -> Result<BTreeMap<String, Vec<String>>> {
    let text = |value: &Value, key: &str| -> Result<String> {
        Ok(value[key].as_str().with_context(|| format!("cargo's metadata lacks {key}"))?.to_owned())
    };
    let packages = metadata["packages"].as_array().context("cargo's metadata lacks packages")?;
    packages
        .iter()
        .map(|package| {
            let dependencies =
                package["dependencies"].as_array().context("cargo's metadata lacks dependencies")?;
            let names = dependencies.iter().filter(|one| one["kind"] != "dev").map(|one| text(one, "name"));
            Ok((text(package, "name")?, names.collect::<Result<Vec<_>>>()?))
        })
        .collect()
}

fn faults(arrows: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let mut faults = Vec::new();
    for (package, dependencies) in arrows {
        let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| name == package) else {
            faults.push(format!("{package} is not in the table: say what it may depend on"));
            continue;
        };
        for dependency in dependencies {
            if arrows.contains_key(dependency) && !allowed.contains(&dependency.as_str()) {
                faults.push(format!("{package} must not depend on {dependency}"));
            }
            let forbidden = FORBIDDEN.iter().find(|(name, _)| name == package);
            if forbidden.is_some_and(|(_, names)| names.contains(&dependency.as_str())) {
                faults.push(format!("{package} must not know {dependency}"));
            }
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrows_of(package: &str, dependencies: &[&str]) -> BTreeMap<String, Vec<String>> {
        let mut arrows: BTreeMap<String, Vec<String>> =
            ALLOWED.iter().map(|(name, _)| ((*name).to_owned(), Vec::new())).collect();
        arrows.insert(package.to_owned(), dependencies.iter().map(|name| (*name).to_owned()).collect());
        arrows
    }

    #[test]
    fn an_allowed_arrow_passes() {
        assert_eq!(faults(&arrows_of("backend-local", &["runner-core", "tokio"])), Vec::<String>::new());
    }

    #[test]
    fn a_backend_may_not_know_another_part_of_the_house() {
        assert_eq!(faults(&arrows_of("backend-local", &["runner-store"])).len(), 1);
    }

    #[test]
    fn the_domain_may_not_know_a_transport() {
        assert_eq!(faults(&arrows_of("runner-core", &["tonic"])), ["runner-core must not know tonic"]);
    }

    #[test]
    fn a_crate_that_nobody_thought_about_is_a_fault() {
        assert_eq!(faults(&arrows_of("newcomer", &[])).len(), 1);
    }
}
