//! What the cluster's events say: why there is no pod, and who took one away. Asked for only where something went wrong and nothing
//! else tells. An account that may not read them costs an explanation and nothing else.

use k8s_openapi::api::core::v1::Event;
use kube::{Api, api::ListParams};

use crate::backend::{Shared, bounded};

/// Most events that are looked at: the API server keeps them for an hour, and counts repeats in one.
const MOST: u32 = 100;
/// Reasons of events of a pod that was taken off its node.
const EVICTIONS: [&str; 4] = ["Preempted", "Evicted", "TaintManagerEviction", "NodeShutdown"];
/// Reasons of events of a Job that gets no pod.
const REFUSALS: [&str; 1] = ["FailedCreate"];

impl Shared {
    /// Why a Job gets no pod, in the words of its controller.
    pub(crate) async fn refusal(&self, job: &str) -> Option<String> {
        let said = self.events("Job", job).await;
        said.iter().rev().find_map(|event| told(event, &REFUSALS))
    }

    /// Why a pod was taken off its node, in the words of who did it.
    pub(crate) async fn eviction(&self, pod: &str, uid: &str) -> Option<String> {
        let said = self.events("Pod", pod).await;
        let of_it = said.iter().filter(|event| event.involved_object.uid.as_deref() == Some(uid));
        of_it.rev().find_map(|event| told(event, &EVICTIONS))
    }

    async fn events(&self, kind: &str, name: &str) -> Vec<Event> {
        let events: Api<Event> = Api::namespaced(self.client.clone(), &self.config.namespace);
        let of_it = format!("involvedObject.kind={kind},involvedObject.name={name}");
        let parameters = ListParams::default().fields(&of_it).limit(MOST);
        match bounded("list the events", events.list(&parameters)).await {
            Ok(found) => found.items,
            Err(error) => {
                tracing::debug!(kind, name, error = error.chain(), "events cannot be read");
                Vec::new()
            }
        }
    }
}

fn told(event: &Event, reasons: &[&str]) -> Option<String> {
    let reason = event.reason.as_deref().filter(|reason| reasons.contains(reason))?;
    Some(format!("{reason}: {}", event.message.as_deref().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_events_that_explain_are_told() {
        let event = |reason: &str| Event {
            reason: Some(reason.to_owned()),
            message: Some("by somebody".to_owned()),
            ..Event::default()
        };
        assert_eq!(told(&event("Preempted"), &EVICTIONS).as_deref(), Some("Preempted: by somebody"));
        assert_eq!(told(&event("Killing"), &EVICTIONS), None);
        assert_eq!(told(&event("FailedCreate"), &EVICTIONS), None);
        assert_eq!(told(&event("FailedCreate"), &REFUSALS).as_deref(), Some("FailedCreate: by somebody"));
        assert_eq!(told(&Event::default(), &REFUSALS), None);
    }
}
