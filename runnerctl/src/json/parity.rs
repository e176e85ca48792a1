//! Runs and their shadows as JSON.

use serde_json::{Value, json};
use worker_client::proto::{self, parity_side::Status};

use super::{duration, flag, non_zero, object, time};
use crate::human;

/// How a run compares with its shadow, in a word.
pub(crate) fn verdict(record: &proto::Parity) -> &'static str {
    record.verdict().as_str_name().strip_prefix("VERDICT_").unwrap_or_default()
}

fn kind(found: &proto::ParityDifference) -> &'static str {
    found.kind().as_str_name().strip_prefix("KIND_").unwrap_or_default()
}

/// What a difference is about, for people: `output /outputs/f`.
pub(crate) fn what(found: &proto::ParityDifference) -> String {
    let kind = kind(found).to_lowercase();
    if found.what.is_empty() { kind } else { format!("{kind} {}", human::visible(&found.what)) }
}

/// How one of the two ended, in a word or two.
pub(crate) fn ending(side: &proto::ParitySide) -> String {
    let status = match side.status {
        Some(Status::ExitCode(code)) => Some(proto::outcome::Status::ExitCode(code)),
        Some(Status::Signal(signal)) => Some(proto::outcome::Status::Signal(signal)),
        None => None,
    };
    human::outcome(&proto::Outcome { cause: side.cause, status, ..proto::Outcome::default() })
}

/// A run and its shadow.
pub(crate) fn record(record: &proto::Parity) -> Value {
    let differences = record.differences.iter().map(|found| {
        object([
            ("kind", json!(kind(found))),
            ("what", json!(found.what)),
            ("primary", json!(found.primary)),
            ("shadow", json!(found.shadow)),
        ])
    });
    object([
        ("number", json!(record.number)),
        ("run_id", json!(record.run_id)),
        ("shadow_id", json!(record.shadow_id)),
        ("tenant", json!(record.tenant)),
        ("image", json!(record.image)),
        ("primary_backend", json!(record.primary_backend)),
        ("shadow_backend", json!(record.shadow_backend)),
        ("end_time", time(record.end_time.as_ref())),
        ("verdict_time", time(record.verdict_time.as_ref())),
        ("verdict", json!(verdict(record))),
        ("skipped", json!(record.skipped)),
        ("differences", Value::Array(differences.collect())),
        ("more_differences", non_zero(record.more_differences)),
        ("log_compared", flag(record.log_compared)),
        ("primary", record.primary.as_ref().map_or(Value::Null, side)),
        ("shadow", record.shadow.as_ref().map_or(Value::Null, side)),
    ])
}

fn side(side: &proto::ParitySide) -> Value {
    let (exit_code, signal) = match side.status {
        Some(Status::ExitCode(code)) => (json!(code), Value::Null),
        Some(Status::Signal(signal)) => (Value::Null, json!(signal)),
        None => (Value::Null, Value::Null),
    };
    object([
        ("exit_code", exit_code),
        ("signal", signal),
        ("cause", json!(human::cause(side.cause()))),
        ("files", json!(side.files)),
        ("output_bytes", json!(side.output_bytes)),
        ("log", side.log.as_ref().map_or(Value::Null, log)),
        ("queued", duration(side.queued.as_ref())),
        ("preparing", duration(side.preparing.as_ref())),
        ("running", duration(side.running.as_ref())),
        ("publishing", duration(side.publishing.as_ref())),
    ])
}

fn log(log: &proto::ParityLog) -> Value {
    let streams = log
        .streams
        .iter()
        .map(|(name, stream)| (name.clone(), json!({ "bytes": stream.bytes, "sha256": stream.sha256 })));
    object([
        ("bytes", json!(log.bytes)),
        ("dropped", non_zero(log.dropped)),
        ("sha256", json!(log.sha256)),
        ("streams", Value::Object(streams.collect())),
    ])
}
