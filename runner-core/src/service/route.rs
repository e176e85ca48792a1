//! Chooses the backend of a run, at admission.

use std::sync::Arc;

use super::error::ServiceError;
use crate::{
    backend::Backend,
    id::BackendName,
    spec::{FieldViolation, InvalidSpec, RunSpec},
};

/// A chosen backend, and why.
pub(super) struct Choice {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) reason: String,
}

/// Chooses. The spec's own backend wins; else it is the default. The choice is stored with the run and does not change.
///
/// # Errors
/// A violation per field: an unknown backend, or what the chosen one cannot honour.
pub(super) fn choose<'a>(
    backends: impl Iterator<Item = (&'a BackendName, &'a Arc<dyn Backend>)> + Clone,
    default: &BackendName,
    spec: &RunSpec,
) -> Result<Choice, ServiceError> {
    let (name, reason) = match &spec.routing.backend {
        Some(name) => (name, "named by the spec".to_owned()),
        None => (default, "the default backend".to_owned()),
    };
    let Some((_, backend)) = backends.clone().find(|(known, _)| *known == name) else {
        let known: Vec<&str> = backends.map(|(name, _)| name.as_str()).collect();
        let what = format!("there is no backend {name:?}; there are {known:?}", name = name.as_str());
        return Err(ServiceError::field("spec.routing.backend", "INVALID", what));
    };
    let mut lacks = backend.capabilities().lacks(spec);
    if lacks.is_empty() {
        lacks = backend.objections(spec);
    }
    let lacks: Vec<FieldViolation> = lacks
        .into_iter()
        .map(|violation| FieldViolation {
            description: format!("backend {name}: {}", violation.description),
            ..violation
        })
        .collect();
    if lacks.is_empty() {
        Ok(Choice { backend: Arc::clone(backend), reason })
    } else {
        Err(InvalidSpec(lacks).into())
    }
}
