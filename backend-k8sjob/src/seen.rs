//! What the cluster says of an attempt: as much of its Job and its pods as anybody looks at.

use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{ContainerState, ContainerStatus, Pod},
};
use runner_core::clock::Timestamp;

use crate::{
    convert::{FETCH, MAIN, PUBLISH},
    names::{STOPPED, STOPPED_SEEN},
};

/// Reasons of a container that waits because its image cannot be had.
const IMAGE_REASONS: [&str; 6] = [
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
];
/// Reasons of a container that waits because it cannot be made.
const CREATE_REASONS: [&str; 4] =
    ["CreateContainerConfigError", "CreateContainerError", "RunContainerError", "PostStartHookError"];
/// Reasons of a pod that its node or the scheduler gave up.
const EVICTION_REASONS: [&str; 6] =
    ["Evicted", "Preempting", "Preempted", "Shutdown", "NodeShutdown", "Terminated"];

/// What a container does.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) enum Doing {
    /// Nothing is known.
    #[default]
    Unknown,
    /// It waits.
    Waiting { reason: String, message: String },
    /// It runs.
    Running,
    /// It has ended.
    Ended { reason: String, code: i32, message: String, finished: Option<Timestamp> },
}

impl Doing {
    fn of(statuses: Option<&Vec<ContainerStatus>>, name: &str) -> Self {
        let found = statuses.into_iter().flatten().find(|status| status.name == name);
        let Some(ContainerState { running, terminated, waiting }) =
            found.and_then(|status| status.state.clone())
        else {
            return Self::Unknown;
        };
        if let Some(ended) = terminated {
            return Self::Ended {
                reason: ended.reason.unwrap_or_default(),
                code: ended.exit_code,
                message: ended.message.unwrap_or_default(),
                finished: ended.finished_at.map(|time| Timestamp::from_micros(time.0.as_microsecond())),
            };
        }
        if running.is_some() {
            return Self::Running;
        }
        waiting.map_or(Self::Unknown, |waiting| Self::Waiting {
            reason: waiting.reason.unwrap_or_default(),
            message: waiting.message.unwrap_or_default(),
        })
    }

    /// In one line, for people.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Unknown => "unknown".to_owned(),
            Self::Waiting { reason, message } if message.is_empty() => format!("waiting: {reason}"),
            Self::Waiting { reason, message } => format!("waiting: {reason}: {message}"),
            Self::Running => "running".to_owned(),
            Self::Ended { reason, code, .. } => format!("ended: {reason}, exit code {code}"),
        }
    }

    /// The kernel killed it at its memory limit.
    pub(crate) fn was_out_of_memory(&self) -> bool {
        matches!(self, Self::Ended { reason, .. } if reason == "OOMKilled")
    }

    /// When it ended.
    pub(crate) fn finished(&self) -> Option<Timestamp> {
        match self {
            Self::Ended { finished, .. } => *finished,
            Self::Unknown | Self::Waiting { .. } | Self::Running => None,
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        matches!(self, Self::Ended { .. })
    }

    pub(crate) fn has_begun(&self) -> bool {
        matches!(self, Self::Running | Self::Ended { .. })
    }

    /// Why its image cannot be had.
    fn image_trouble(&self) -> Option<String> {
        match self {
            Self::Waiting { reason, .. } if IMAGE_REASONS.contains(&reason.as_str()) => Some(self.describe()),
            _ => None,
        }
    }

    /// Why it cannot be made.
    fn trouble(&self) -> Option<String> {
        match self {
            Self::Waiting { reason, .. } if CREATE_REASONS.contains(&reason.as_str()) => {
                Some(self.describe())
            }
            _ => None,
        }
    }
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct PodSeen {
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) created: Option<String>,
    pub(crate) phase: String,
    /// Somebody has asked for its deletion.
    pub(crate) deleting: bool,
    /// The node's word on the pod as a whole.
    pub(crate) reason: String,
    pub(crate) message: String,
    /// Why no node takes it.
    pub(crate) unschedulable: Option<String>,
    /// Why it is disrupted. Kubernetes 1.26 and later say so.
    pub(crate) disrupted: Option<String>,
    pub(crate) fetch: Doing,
    pub(crate) main: Doing,
    pub(crate) publish: Doing,
}

impl PodSeen {
    pub(crate) fn new(pod: &Pod) -> Self {
        let status = pod.status.clone().unwrap_or_default();
        let condition = |kind: &str, value: &str| {
            let found =
                status.conditions.iter().flatten().find(|one| one.type_ == kind && one.status == value)?;
            let (reason, message) = (found.reason.clone()?, found.message.clone().unwrap_or_default());
            Some((reason, message))
        };
        Self {
            name: pod.metadata.name.clone().unwrap_or_default(),
            uid: pod.metadata.uid.clone().unwrap_or_default(),
            created: pod.metadata.creation_timestamp.as_ref().map(|time| time.0.to_string()),
            phase: status.phase.clone().unwrap_or_default(),
            deleting: pod.metadata.deletion_timestamp.is_some(),
            reason: status.reason.clone().unwrap_or_default(),
            message: status.message.clone().unwrap_or_default(),
            unschedulable: condition("PodScheduled", "False")
                .filter(|(reason, _)| reason == "Unschedulable")
                .map(|(_, message)| message),
            disrupted: condition("DisruptionTarget", "True")
                .map(|(reason, message)| format!("{reason}: {message}")),
            fetch: Doing::of(status.init_container_statuses.as_ref(), FETCH),
            main: Doing::of(status.container_statuses.as_ref(), MAIN),
            publish: Doing::of(status.container_statuses.as_ref(), PUBLISH),
        }
    }

    /// Nothing of it is alive, and nothing will be.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.phase.as_str(), "Succeeded" | "Failed")
    }

    /// Its program is not alive, and will not be.
    pub(crate) fn program_is_dead(&self) -> bool {
        self.is_over() || self.main.has_ended()
    }

    /// Why it was taken off its node.
    pub(crate) fn evicted(&self) -> Option<String> {
        if let Some(disrupted) = &self.disrupted {
            return Some(disrupted.clone());
        }
        EVICTION_REASONS.contains(&self.reason.as_str()).then(|| format!("{}: {}", self.reason, self.message))
    }

    /// Why the image of one of its containers cannot be had.
    pub(crate) fn image_trouble(&self) -> Option<String> {
        [&self.fetch, &self.main, &self.publish].into_iter().find_map(Doing::image_trouble)
    }

    /// Why one of its containers cannot be made.
    pub(crate) fn trouble(&self) -> Option<String> {
        [&self.fetch, &self.main, &self.publish].into_iter().find_map(Doing::trouble)
    }

    /// In a line.
    pub(crate) fn describe(&self) -> String {
        let mut text = format!(
            "{}: {}{}, fetch {}, main {}, publish {}",
            self.name,
            self.phase,
            if self.deleting { ", being deleted" } else { "" },
            self.fetch.describe(),
            self.main.describe(),
            self.publish.describe(),
        );
        let no_node = self.unschedulable.as_ref().map(|why| format!("no node takes it: {why}"));
        for more in [&self.reason, &self.message].into_iter().chain(&no_node) {
            if !more.is_empty() {
                text.push_str(": ");
                text.push_str(more);
            }
        }
        text
    }
}

/// A Job.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct JobSeen {
    pub(crate) uid: String,
    pub(crate) deleting: bool,
    /// It was stopped by us, without an agent's help.
    pub(crate) stopped: Option<Timestamp>,
    /// What was there then.
    pub(crate) stopped_seen: Option<String>,
    /// Why it failed as a Job.
    pub(crate) failed: Option<String>,
}

impl JobSeen {
    pub(crate) fn new(job: &Job) -> Self {
        let annotation = |name: &str| job.metadata.annotations.as_ref()?.get(name);
        let mark = annotation(STOPPED);
        let conditions = job.status.iter().flat_map(|status| status.conditions.iter().flatten());
        let failed = conditions.into_iter().find(|one| one.type_ == "Failed" && one.status == "True");
        Self {
            uid: job.metadata.uid.clone().unwrap_or_default(),
            deleting: job.metadata.deletion_timestamp.is_some(),
            stopped: mark.and_then(|mark| mark.parse().ok()).map(Timestamp::from_micros),
            stopped_seen: annotation(STOPPED_SEEN).cloned(),
            failed: failed.map(|one| {
                format!(
                    "{}: {}",
                    one.reason.as_deref().unwrap_or_default(),
                    one.message.as_deref().unwrap_or_default()
                )
            }),
        }
    }
}

/// An attempt.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Seen {
    pub(crate) job: Option<JobSeen>,
    /// The oldest that is not over comes first; there is more than one only where somebody deleted the first.
    pub(crate) pods: Vec<PodSeen>,
}

impl Seen {
    /// The pod that the attempt is: the first one. A later one never executes anything.
    pub(crate) fn pod(&self) -> Option<&PodSeen> {
        self.pods.first()
    }
}

#[cfg(test)]
#[path = "seen_tests.rs"]
mod tests;
