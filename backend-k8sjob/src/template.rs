//! What an operator may add to the pods of a backend.
//!
//! The fields here are all that there are. None of them can take a pod out of the restricted Pod Security Standard, give a container
//! more than it has, or change what this service recognises its workloads by.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Affinity, PodDNSConfig, TopologySpreadConstraint};
use runner_agent::backend::InvalidConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

/// Labels and annotations with these beginnings are the service's.
const OURS: &[&str] = &[
    "runner.",
    "app.kubernetes.io/managed-by",
    "kueue.x-k8s.io/",
    "job-name",
    "controller-uid",
    "batch.kubernetes.io/",
];
/// Annotations with these in them take containers out of a security profile.
const PROFILES: &[&str] = &["apparmor.security.", "seccomp.security."];
/// Most labels, annotations or constraints.
const MAX_ENTRIES: usize = 64;

/// What every pod has beside what the service puts into it. Objects are in Kubernetes' own words.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PodTemplate {
    /// Labels of pods, for what selects them: network policies, monitoring.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Annotations of pods.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Where pods may go, and beside what: a `core/v1` `Affinity`.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub affinity: Map<String, Value>,
    /// How pods are spread: `core/v1` `TopologySpreadConstraint`s.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub topology_spread_constraints: Vec<Map<String, Value>>,
    /// Who schedules. None: the cluster's own scheduler.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduler_name: Option<String>,
    /// `ClusterFirst`, `Default` or `None`. None: the cluster's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns_policy: Option<String>,
    /// A `core/v1` `PodDNSConfig`.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub dns_config: Map<String, Value>,
}

/// A template as Kubernetes has it.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Typed {
    pub(crate) affinity: Option<Affinity>,
    pub(crate) topology_spread_constraints: Option<Vec<TopologySpreadConstraint>>,
    pub(crate) dns_config: Option<PodDNSConfig>,
}

impl PodTemplate {
    /// Its objects.
    ///
    /// # Errors
    /// The fields of the configuration that are no such objects, each with what is wrong.
    pub(crate) fn typed(&self) -> Result<Typed, Vec<InvalidConfig>> {
        let mut bad = Vec::new();
        let affinity = object("pod_template.affinity", &self.affinity, &mut bad);
        let dns_config = object("pod_template.dns_config", &self.dns_config, &mut bad);
        let constraints =
            self.topology_spread_constraints.iter().enumerate().filter_map(|(i, constraint)| {
                let field = format!("pod_template.topology_spread_constraints[{i}]");
                if constraint.is_empty() {
                    bad.push(InvalidConfig::new(field.clone(), "must not be empty"));
                }
                object(&field, constraint, &mut bad)
            });
        let constraints: Vec<_> = constraints.collect();
        let topology_spread_constraints = (!constraints.is_empty()).then_some(constraints);
        if bad.is_empty() {
            Ok(Typed { affinity, topology_spread_constraints, dns_config })
        } else {
            Err(bad)
        }
    }

    /// Checks what can be checked without a cluster.
    pub(crate) fn validate(&self, bad: &mut Vec<InvalidConfig>) {
        for (field, texts) in
            [("pod_template.labels", &self.labels), ("pod_template.annotations", &self.annotations)]
        {
            if texts.len() > MAX_ENTRIES {
                bad.push(InvalidConfig::new(field, format!("may have at most {MAX_ENTRIES} entries")));
            }
            for key in texts.keys() {
                if key.is_empty() || OURS.iter().any(|ours| key.starts_with(ours)) {
                    bad.push(InvalidConfig::new(field, format!("{key:?} is not for configurations to set")));
                }
            }
        }
        for key in self.annotations.keys().filter(|key| PROFILES.iter().any(|profile| key.contains(profile)))
        {
            let rule = format!("{key:?} would take containers out of their security profile");
            bad.push(InvalidConfig::new("pod_template.annotations", rule));
        }
        if self.topology_spread_constraints.len() > MAX_ENTRIES {
            let rule = format!("may have at most {MAX_ENTRIES} entries");
            bad.push(InvalidConfig::new("pod_template.topology_spread_constraints", rule));
        }
        let known = ["ClusterFirst", "Default", "None"];
        if self.dns_policy.as_ref().is_some_and(|policy| !known.contains(&policy.as_str())) {
            bad.push(InvalidConfig::new("pod_template.dns_policy", "must be ClusterFirst, Default or None"));
        }
        if self.dns_policy.as_deref() == Some("None") && self.dns_config.is_empty() {
            bad.push(InvalidConfig::new("pod_template.dns_config", "is needed where dns_policy is None"));
        }
        bad.extend(self.typed().err().unwrap_or_default());
    }
}

/// Reads an object. Nothing where it is empty.
fn object<T>(field: &str, from: &Map<String, Value>, bad: &mut Vec<InvalidConfig>) -> Option<T>
where
    T: DeserializeOwned + Serialize,
{
    if from.is_empty() {
        return None;
    }
    let given = Value::Object(from.clone());
    // Whatever is not known is dropped when it is read: so a word that is misspelt is missing when it is written again.
    let read = T::deserialize(&given).and_then(|read| Ok((serde_json::to_value(&read)?, read)));
    match read {
        Ok((written, read)) => match missing(&given, &written) {
            None => return Some(read),
            Some(place) => bad.push(InvalidConfig::new(field, format!("Kubernetes has no `{place}` here"))),
        },
        Err(error) => bad.push(InvalidConfig::new(field, error.to_string())),
    }
    None
}

/// The place of something that is in `given` and not in `written`.
fn missing(given: &Value, written: &Value) -> Option<String> {
    let below = |name: String, given, written: Option<&Value>| match written {
        None => Some(name),
        Some(written) => missing(given, written)
            .map(|place| if place.is_empty() { name.clone() } else { format!("{name}.{place}") }),
    };
    match (given, written) {
        (Value::Object(given), Value::Object(written)) => {
            given.iter().find_map(|(name, value)| below(name.clone(), value, written.get(name)))
        }
        (Value::Array(given), Value::Array(written)) => {
            given.iter().enumerate().find_map(|(i, value)| below(format!("[{i}]"), value, written.get(i)))
        }
        (given, written) => (given != written).then(String::new),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn template(from: Value) -> PodTemplate {
        serde_json::from_value(from).unwrap()
    }

    fn refused(from: Value) -> Vec<(String, String)> {
        let mut bad = Vec::new();
        template(from).validate(&mut bad);
        bad.into_iter().map(|bad| (bad.field.clone(), bad.rule.clone())).collect()
    }

    #[test]
    fn what_is_allowed_is_read() {
        let given = template(json!({
            "labels": { "team": "a", "job-owner": "b" },
            "annotations": { "cluster-autoscaler.kubernetes.io/safe-to-evict": "false" },
            "affinity": { "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": { "nodeSelectorTerms": [
                { "matchExpressions": [{ "key": "pool", "operator": "In", "values": ["batch"] }] },
            ] } } },
            "topology_spread_constraints": [{
                "maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": { "matchLabels": { "team": "a" } },
            }],
            "scheduler_name": "other",
            "dns_policy": "None",
            "dns_config": { "nameservers": ["192.0.2.53"] },
        }));
        let mut bad = Vec::new();
        given.validate(&mut bad);
        assert_eq!(bad, Vec::new());
        let typed = given.typed().unwrap();
        assert_eq!(typed.topology_spread_constraints.unwrap()[0].max_skew, 1);
        assert_eq!(typed.dns_config.unwrap().nameservers.unwrap(), ["192.0.2.53"]);
        assert!(typed.affinity.unwrap().node_affinity.is_some());
        assert_eq!(PodTemplate::default().typed(), Ok(Typed::default()));
    }

    #[test]
    fn what_is_misspelt_or_of_another_kind_is_named() {
        let affinity = json!({ "affinity": { "podAntiAfinity": {} } });
        let expected = "Kubernetes has no `podAntiAfinity` here";
        assert_eq!(refused(affinity), [("pod_template.affinity".to_owned(), expected.to_owned())]);
        let deep = json!({ "affinity": { "nodeAffinity": { "preferredDuringSchedulingIgnoredDuringExecution": [
            { "weight": 1, "preference": { "matchExpression": [] } },
        ] } } });
        let rule = &refused(deep)[0].1;
        assert!(
            rule.ends_with(
                "preferredDuringSchedulingIgnoredDuringExecution.[0].preference.matchExpression` here"
            ),
            "{rule}"
        );
        let constraint = json!({ "topology_spread_constraints": [{ "maxSkew": "much" }, {}] });
        let fields: Vec<_> = refused(constraint).into_iter().map(|(field, _)| field).collect();
        let place = |i: usize| format!("pod_template.topology_spread_constraints[{i}]");
        assert_eq!(fields, [place(0), place(1)]);
        assert!(serde_json::from_value::<PodTemplate>(json!({ "host_network": true })).is_err());
    }

    #[test]
    fn what_the_service_goes_by_and_what_protects_is_not_for_settings() {
        for (field, key) in [
            ("labels", "runner.attempt"),
            ("labels", "app.kubernetes.io/managed-by"),
            ("labels", "job-name"),
            ("annotations", "container.apparmor.security.beta.kubernetes.io/main"),
            ("annotations", "seccomp.security.alpha.kubernetes.io/pod"),
        ] {
            let found = refused(json!({ field: { key: "x" } }));
            assert_eq!(found.len(), 1, "{key}");
            assert!(found[0].0.ends_with(field) && found[0].1.contains(key), "{found:?}");
        }
        assert_eq!(refused(json!({ "dns_policy": "ClusterFirstWithHostNet" })).len(), 1);
        assert_eq!(refused(json!({ "dns_policy": "None" }))[0].0, "pod_template.dns_config");
    }
}
