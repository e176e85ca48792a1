//! The contract's messages as JSON: field names as in the proto files, enum values without their prefix, times as
//! RFC 3339, durations in seconds, bytes as base64. Empty fields are left out.

pub(crate) mod parity;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Map, Value, json};
use worker_client::{
    Event, StreamEvent, convert,
    convert::{ProtoDuration, Timestamp},
    proto::{self, LogStream, manifest_entry::Kind, outcome::Status, staging_progress::Direction},
};

use crate::human;

/// An object without the fields that are null, empty or zero-length.
fn object(fields: impl IntoIterator<Item = (&'static str, Value)>) -> Value {
    let empty = |value: &Value| match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    };
    let kept = fields.into_iter().filter(|(_, value)| !empty(value));
    Value::Object(kept.map(|(name, value)| (name.to_owned(), value)).collect::<Map<_, _>>())
}

fn time(time: Option<&Timestamp>) -> Value {
    let time = time.and_then(|time| jiff::Timestamp::new(time.seconds, time.nanos).ok());
    time.map_or(Value::Null, |time| json!(time.to_string()))
}

fn duration(duration: Option<&ProtoDuration>) -> Value {
    let duration = duration.and_then(convert::duration_from_proto);
    duration.map_or(Value::Null, |duration| json!(duration.as_secs_f64()))
}

/// `true`, or nothing.
fn flag(set: bool) -> Value {
    if set { Value::Bool(true) } else { Value::Null }
}

/// A number, or nothing where zero means "the default".
fn non_zero(number: u64) -> Value {
    if number == 0 { Value::Null } else { json!(number) }
}

/// A run.
pub(crate) fn run(run: &proto::Run) -> Value {
    object([
        ("run_id", json!(run.run_id)),
        ("tenant", json!(run.tenant)),
        ("idempotency_key", json!(run.idempotency_key)),
        ("state", json!(human::state(run.state()))),
        ("backend", json!(run.backend)),
        ("backend_reason", json!(run.backend_reason)),
        ("decision", run.decision.as_ref().map_or(Value::Null, decision)),
        ("attempt", json!(run.attempt)),
        ("cancel_requested", json!(run.cancel_requested)),
        ("create_time", time(run.create_time.as_ref())),
        ("start_time", time(run.start_time.as_ref())),
        ("end_time", time(run.end_time.as_ref())),
        ("outcome", run.outcome.as_ref().map_or(Value::Null, outcome)),
        ("attempts", Value::Array(run.attempts.iter().map(attempt).collect())),
        ("labels", json!(run.labels)),
        ("spec", run.spec.as_ref().map_or(Value::Null, spec)),
    ])
}

fn attempt(attempt: &proto::Attempt) -> Value {
    object([
        ("number", json!(attempt.number)),
        ("backend", json!(attempt.backend)),
        ("start_time", time(attempt.start_time.as_ref())),
        ("end_time", time(attempt.end_time.as_ref())),
        ("outcome", attempt.outcome.as_ref().map_or(Value::Null, outcome)),
    ])
}

fn outcome(outcome: &proto::Outcome) -> Value {
    let (exit_code, signal) = match outcome.status {
        Some(Status::ExitCode(code)) => (json!(code), Value::Null),
        Some(Status::Signal(signal)) => (Value::Null, json!(signal)),
        None => (Value::Null, Value::Null),
    };
    let evidence = outcome.evidence.iter().map(|evidence| {
        object([
            ("source", json!(evidence.source)),
            ("detail", json!(evidence.detail)),
            ("time", time(evidence.time.as_ref())),
        ])
    });
    object([
        ("exit_code", exit_code),
        ("signal", signal),
        ("cause", json!(human::cause(outcome.cause()))),
        ("retryable", json!(outcome.retryable)),
        ("message", json!(outcome.message)),
        ("evidence", Value::Array(evidence.collect())),
        ("attempt", json!(outcome.attempt)),
        ("usage", outcome.usage.as_ref().map_or(Value::Null, usage)),
        ("outputs", outcome.outputs.as_ref().map_or(Value::Null, manifest)),
    ])
}

fn usage(usage: &proto::Usage) -> Value {
    object([
        ("wall", duration(usage.wall.as_ref())),
        ("cpu", duration(usage.cpu.as_ref())),
        ("max_memory_bytes", json!(usage.max_memory_bytes)),
        ("input_bytes", json!(usage.input_bytes)),
        ("output_bytes", json!(usage.output_bytes)),
        ("log_bytes", json!(usage.log_bytes)),
    ])
}

fn manifest(manifest: &proto::Manifest) -> Value {
    let entries = manifest.entries.iter().map(|entry| {
        let kind = match entry.kind() {
            Kind::File => "FILE",
            Kind::Directory => "DIRECTORY",
            Kind::Unspecified => "",
        };
        object([
            ("output", json!(entry.output)),
            ("path", json!(entry.path)),
            ("path_encoded", flag(entry.path_encoded)),
            ("kind", json!(kind)),
            ("size", json!(entry.size)),
            ("sha256", json!(entry.sha256)),
            ("mode", json!(format!("{:04o}", entry.mode))),
            ("uri", json!(entry.uri)),
        ])
    });
    object([
        ("partial", json!(manifest.partial)),
        ("entries", Value::Array(entries.collect())),
        ("total_bytes", json!(manifest.total_bytes)),
    ])
}

fn spec(spec: &proto::RunSpec) -> Value {
    let secrets = spec.secrets.iter().map(|secret| {
        let (env, path) = match &secret.target {
            Some(proto::secret_ref::Target::Env(env)) => (json!(env), Value::Null),
            Some(proto::secret_ref::Target::Path(path)) => (Value::Null, json!(path)),
            None => (Value::Null, Value::Null),
        };
        object([("ref", json!(secret.r#ref)), ("env", env), ("path", path)])
    });
    let outputs = spec.outputs.iter().map(|output| {
        object([
            ("path", json!(output.path)),
            ("destination", json!(output.destination)),
            ("required", json!(output.required)),
            ("max_bytes", non_zero(output.max_bytes)),
        ])
    });
    let terminal = |terminal: &proto::Terminal| json!({"columns": terminal.columns, "rows": terminal.rows});
    object([
        ("image", json!(spec.image)),
        ("command", json!(spec.command)),
        ("args", json!(spec.args)),
        ("env", json!(spec.env)),
        ("secrets", Value::Array(secrets.collect())),
        ("working_dir", json!(spec.working_dir)),
        ("inputs", Value::Array(spec.inputs.iter().map(input).collect())),
        ("outputs", Value::Array(outputs.collect())),
        ("resources", spec.resources.as_ref().map_or(Value::Null, resources)),
        ("network", spec.network.as_ref().map_or(Value::Null, network)),
        ("user", json!(spec.user)),
        ("read_only_root", flag(spec.read_only_root)),
        ("timeout", duration(spec.timeout.as_ref())),
        ("stop_grace", duration(spec.stop_grace.as_ref())),
        ("retry", spec.retry.as_ref().map_or(Value::Null, retry)),
        ("terminal", spec.terminal.as_ref().map_or(Value::Null, terminal)),
        ("stdin", flag(spec.stdin)),
        ("labels", json!(spec.labels)),
        ("routing", spec.routing.as_ref().map_or(Value::Null, routing)),
        ("idempotent", flag(spec.idempotent)),
    ])
}

fn input(input: &proto::Input) -> Value {
    let (uri, inline) = match &input.source {
        Some(proto::input::Source::Uri(uri)) => (json!(uri), Value::Null),
        Some(proto::input::Source::Inline(bytes)) => (Value::Null, json!(STANDARD.encode(bytes))),
        None => (Value::Null, Value::Null),
    };
    let extract = match input.extract() {
        proto::Archive::Unspecified => "",
        archive => archive.as_str_name().strip_prefix("ARCHIVE_").unwrap_or_default(),
    };
    object([
        ("path", json!(input.path)),
        ("uri", uri),
        ("inline", inline),
        ("sha256", json!(input.sha256)),
        ("mode", if input.mode == 0 { Value::Null } else { json!(format!("{:04o}", input.mode)) }),
        ("extract", json!(extract)),
    ])
}

fn resources(resources: &proto::Resources) -> Value {
    object([
        ("profile", json!(resources.profile)),
        ("cpu_millis", non_zero(resources.cpu_millis.into())),
        ("memory_bytes", non_zero(resources.memory_bytes)),
        ("ephemeral_storage_bytes", non_zero(resources.ephemeral_storage_bytes)),
        ("pids", non_zero(resources.pids.into())),
        ("gpus", non_zero(resources.gpus.into())),
        ("file_size_bytes", non_zero(resources.file_size_bytes)),
    ])
}

fn network(network: &proto::Network) -> Value {
    match &network.policy {
        Some(proto::network::Policy::None(_)) | None => json!("none"),
        Some(proto::network::Policy::Egress(_)) => json!("egress"),
        Some(proto::network::Policy::Named(name)) => json!({ "named": name }),
    }
}

fn retry(retry: &proto::RetryPolicy) -> Value {
    object([
        ("max_attempts", non_zero(retry.max_attempts.into())),
        ("initial_backoff", duration(retry.initial_backoff.as_ref())),
        ("max_backoff", duration(retry.max_backoff.as_ref())),
        ("causes", Value::Array(retry.causes().map(|cause| json!(human::cause(cause))).collect())),
    ])
}

fn routing(routing: &proto::Routing) -> Value {
    object([("backend", json!(routing.backend)), ("sticky_key", json!(routing.sticky_key))])
}

/// A backend.
pub(crate) fn backend(backend: &proto::Backend) -> Value {
    let capabilities = backend.capabilities.as_ref().map_or(Value::Null, |capabilities| {
        let mut object: Map<String, Value> = human::capabilities(capabilities)
            .map(|(name, has)| (name.to_owned(), Value::Bool(has)))
            .collect();
        object.insert("images".to_owned(), json!(capabilities.images));
        object.insert("named_networks".to_owned(), json!(capabilities.named_networks));
        Value::Object(object)
    });
    object([
        ("name", json!(backend.name)),
        ("kind", json!(backend.kind)),
        ("healthy", json!(backend.healthy)),
        ("detail", json!(backend.detail)),
        ("capabilities", capabilities),
        ("active_attempts", json!(backend.active_attempts)),
        ("max_attempts", json!(backend.max_attempts)),
        ("live_runs", json!(backend.live_runs)),
        ("drained", backend.drained.as_ref().map_or(Value::Null, drained)),
    ])
}

fn drained(drained: &proto::Drained) -> Value {
    object([
        ("since", time(drained.since.as_ref())),
        ("by", json!(drained.by)),
        ("reason", json!(drained.reason)),
    ])
}

/// A share, in percents.
fn percent(hundredths: u32) -> Value {
    json!(f64::from(hundredths) / 100.0)
}

/// How far a ramp is.
pub(crate) fn ramp_status(ramp: &proto::Ramp) -> &'static str {
    ramp.status().as_str_name().strip_prefix("STATUS_").unwrap_or_default()
}

fn ramp(ramp: &proto::Ramp) -> Value {
    let step = |step: &proto::RampStep| {
        object([("percent", percent(step.share)), ("hold", duration(step.hold.as_ref()))])
    };
    object([
        ("rule", json!(ramp.rule)),
        ("backend", json!(ramp.backend)),
        ("steps", Value::Array(ramp.steps.iter().map(step).collect())),
        ("step", json!(ramp.step)),
        ("status", json!(ramp_status(ramp))),
        ("next_step_time", time(ramp.next_step_time.as_ref())),
        ("percent", percent(ramp.share)),
    ])
}

/// Where new runs go. `policy` is the traffic's own, read.
pub(crate) fn traffic(traffic: &proto::Traffic, policy: Value) -> Value {
    let backends = traffic.drained.iter().map(|(name, why)| (name.clone(), drained(why)));
    object([
        ("version", json!(traffic.version)),
        ("policy", policy),
        ("drained", Value::Object(backends.collect())),
        ("ramp", traffic.ramp.as_ref().map_or(Value::Null, ramp)),
        ("guard", Value::Array(traffic.guard.iter().map(guard).collect())),
    ])
}

/// What the guard thinks of a canary.
pub(crate) fn verdict(report: &proto::GuardReport) -> &'static str {
    report.verdict().as_str_name().strip_prefix("VERDICT_").unwrap_or_default()
}

fn guard(report: &proto::GuardReport) -> Value {
    let tally = |tally: &Option<proto::Tally>| {
        tally.as_ref().map_or(Value::Null, |tally| json!({ "count": tally.count, "runs": tally.runs }))
    };
    object([
        ("rule", json!(report.rule)),
        ("canary", json!(report.canary)),
        ("baseline", json!(report.baseline)),
        ("canary_failures", tally(&report.canary_failures)),
        ("baseline_failures", tally(&report.baseline_failures)),
        ("canary_slow", tally(&report.canary_slow)),
        ("baseline_slow", tally(&report.baseline_slow)),
        ("verdict", json!(verdict(report))),
    ])
}

fn decision(decision: &proto::RoutingDecision) -> Value {
    object([
        ("backend", json!(decision.backend)),
        ("version", json!(decision.version)),
        ("by", json!(decision.by().as_str_name().strip_prefix("BY_").unwrap_or_default())),
        ("rule", json!(decision.rule)),
        ("bucket", json!(decision.bucket)),
        ("passed_over", json!(decision.passed_over)),
    ])
}

/// Where a run would go.
pub(crate) fn explanation(explained: &proto::ExplainRoutingResponse) -> Value {
    let lack =
        |lack: &proto::Lack| object([("field", json!(lack.field)), ("description", json!(lack.description))]);
    let candidate = |candidate: &proto::Candidate| {
        object([
            ("backend", json!(candidate.backend)),
            ("healthy", json!(candidate.healthy)),
            ("drained", json!(candidate.drained)),
            ("lacks", Value::Array(candidate.lacks.iter().map(lack).collect())),
        ])
    };
    object([
        ("decision", explained.decision.as_ref().map_or(Value::Null, decision)),
        ("reason", json!(explained.reason)),
        ("shadow", json!(explained.shadow)),
        ("candidates", Value::Array(explained.candidates.iter().map(candidate).collect())),
    ])
}

/// An entry of the audit log.
pub(crate) fn audit(entry: &proto::AuditEntry) -> Value {
    object([
        ("number", json!(entry.number)),
        ("time", time(entry.time.as_ref())),
        ("actor", json!(entry.actor)),
        ("action", json!(entry.action)),
        ("what", json!(entry.what)),
        ("reason", json!(entry.reason)),
        ("version", json!(entry.version)),
    ])
}

/// One event of a stream: what kind it is is in `event`.
pub(crate) fn event(event: &StreamEvent) -> Value {
    let at = event.time.map(convert::time_to_proto);
    let (name, body) = match &event.event {
        Event::StateChanged(change) => {
            let state = human::state(change.state());
            (
                "state_changed",
                object([
                    ("state", json!(state)),
                    ("attempt", json!(change.attempt)),
                    ("reason", json!(change.reason)),
                ]),
            )
        }
        Event::Log(frame) => ("log", log(frame)),
        Event::LogTruncated(mark) => {
            let body = object([
                ("attempt", json!(mark.attempt)),
                ("offset", json!(mark.offset)),
                ("dropped_bytes", json!(mark.dropped_bytes)),
                ("reason", json!(mark.reason)),
            ]);
            ("log_truncated", body)
        }
        Event::Staging(progress) => ("staging", staging(progress)),
        Event::Outputs(outputs) => ("outputs", manifest(outputs)),
        Event::Notice(notice) => ("notice", json!({ "text": notice.text })),
        Event::Terminated(end) => {
            let outcome = end.outcome.as_ref().map_or(Value::Null, outcome);
            ("terminated", object([("state", json!(human::state(end.state()))), ("outcome", outcome)]))
        }
    };
    let mut line = Map::new();
    line.insert("event".to_owned(), json!(name));
    line.insert("cursor".to_owned(), json!(event.cursor));
    line.insert("time".to_owned(), time(at.as_ref()));
    line.insert(name.to_owned(), body);
    Value::Object(line)
}

fn log(frame: &proto::LogFrame) -> Value {
    let stream = match frame.stream() {
        LogStream::Stdout => "stdout",
        LogStream::Stderr => "stderr",
        LogStream::Terminal => "terminal",
        LogStream::Unspecified => "",
    };
    object([
        ("attempt", json!(frame.attempt)),
        ("offset", json!(frame.offset)),
        ("stream", json!(stream)),
        ("time", time(frame.time.as_ref())),
        ("data", json!(STANDARD.encode(&frame.data))),
    ])
}

fn staging(progress: &proto::StagingProgress) -> Value {
    let direction = match progress.direction() {
        Direction::Input => "INPUT",
        Direction::Output => "OUTPUT",
        Direction::Image => "IMAGE",
        Direction::Unspecified => "",
    };
    object([
        ("direction", json!(direction)),
        ("bytes_done", json!(progress.bytes_done)),
        ("bytes_total", non_zero(progress.bytes_total)),
        ("files_done", json!(progress.files_done)),
        ("files_total", non_zero(progress.files_total)),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_bytes_are_base64_and_empty_fields_are_left_out() {
        let frame = proto::LogFrame {
            attempt: 1,
            offset: 3,
            stream: LogStream::Stderr.into(),
            time: Some(Timestamp { seconds: 0, nanos: 500_000_000 }),
            data: vec![0xff, 0, b'\n'].into(),
        };
        let line = event(&StreamEvent { cursor: "c".into(), time: None, event: Event::Log(frame) });
        assert_eq!(
            line.to_string(),
            r#"{"cursor":"c","event":"log","log":{"attempt":1,"data":"/wAK","offset":3,"stream":"stderr","time":"1970-01-01T00:00:00.5Z"},"time":null}"#
        );
    }

    #[test]
    fn a_run_is_one_document() {
        let outcome = proto::Outcome {
            status: Some(Status::ExitCode(0)),
            cause: proto::Cause::Exited.into(),
            ..proto::Outcome::default()
        };
        let document = run(&proto::Run {
            run_id: "r".into(),
            state: proto::RunState::Succeeded.into(),
            outcome: Some(outcome),
            ..proto::Run::default()
        });
        assert_eq!(document["state"], "SUCCEEDED");
        assert_eq!(document["outcome"]["exit_code"], 0);
        assert_eq!(document["outcome"]["cause"], "EXITED");
        assert!(document.get("labels").is_none());
    }
}
