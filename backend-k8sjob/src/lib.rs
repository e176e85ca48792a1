//! The Kubernetes backend: attempts as Jobs of a cluster.
//!
//! An attempt becomes a Job of one pod with three containers: `fetch` brings the inputs, `main` is the program under our shim,
//! `publish` stands beside it and answers what we ask, over a channel that it opened (`runner_core::agent`). The log, the exit
//! record and the outputs come over that channel; the API server is asked for nothing but the Job, its pod and what became of
//! them, by one watch for all attempts.
//!
//! What is called the truth, in this order: the shim's exit record; else what Kubernetes says of the pod; else nothing, and the
//! attempt is lost.
//!
//! Where to start reading: [`K8sJobBackend`]; then `convert` (what of a spec becomes what of a Job), `ensure`, `observe`, `stop`;
//! `watch` and `seen` for what the cluster says.

mod api;
mod backend;
mod capability;
mod config;
mod convert;
mod ensure;
mod error;
mod events;
mod names;
mod observe;
mod seen;
mod stop;
mod template;
mod watch;

pub use self::{
    backend::{K8sJobBackend, K8sJobParts},
    config::{ApiBudgets, K8sJobConfig, PullPolicy, Toleration},
    error::OpenError,
    template::PodTemplate,
};
