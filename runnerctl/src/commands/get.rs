//! `get`.

use worker_client::proto;

use super::{Service, is_table};
use crate::{exit::Exit, failure::Failure, human, json, output, table, value::Format};

pub(super) async fn execute(service: &Service, run: &str, format: Format) -> Result<Exit, Failure> {
    let run = service.client.get(run).await.map_err(|e| service.failure(&e))?;
    if is_table(format) {
        output::data(&describe(&run))?;
    } else {
        output::document(&json::run(&run))?;
    }
    Ok(Exit::OK)
}

fn describe(run: &proto::Run) -> String {
    let spec = run.spec.clone().unwrap_or_default();
    let moment = |time: &Option<_>| time.as_ref().map(human::moment).unwrap_or_default();
    let took = human::took(run, human::now()).map(human::duration).unwrap_or_default();
    let mut labels: Vec<_> = run.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    labels.sort();
    let cancelling = if run.cancel_requested && run.outcome.is_none() { ", cancel requested" } else { "" };
    let mut text = table::facts(&[
        ("Id", run.run_id.clone()),
        ("State", format!("{}{cancelling}", human::state(run.state()))),
        ("Ended by", run.outcome.as_ref().map(human::outcome).unwrap_or_default()),
        ("Message", run.outcome.as_ref().map(|o| human::visible(&o.message)).unwrap_or_default()),
        ("Backend", with_reason(&run.backend, &run.backend_reason)),
        ("Image", human::visible(&spec.image)),
        ("Command", human::command(spec.command.iter().chain(&spec.args), 400)),
        ("Key", human::visible(&run.idempotency_key)),
        ("Labels", human::visible(&labels.join(" "))),
        ("Created", moment(&run.create_time)),
        ("Started", moment(&run.start_time)),
        ("Ended", moment(&run.end_time)),
        ("Took", took),
    ]);
    let Some(outcome) = &run.outcome else {
        attempts(run, &mut text);
        return text;
    };
    if let Some(usage) = &outcome.usage {
        let duration = |d: &Option<_>| {
            d.as_ref()
                .and_then(worker_client::convert::duration_from_proto)
                .map(human::duration)
                .unwrap_or_default()
        };
        let bytes = |bytes: u64| if bytes == 0 { String::new() } else { human::bytes(bytes) };
        text.push_str(&table::facts(&[
            ("Cpu time", duration(&usage.cpu)),
            ("Memory", bytes(usage.max_memory_bytes)),
            ("Log", bytes(usage.log_bytes)),
        ]));
    }
    attempts(run, &mut text);
    if !outcome.evidence.is_empty() {
        text.push_str("\nEvidence:\n");
        for evidence in &outcome.evidence {
            let (source, detail) = (human::visible(&evidence.source), human::visible(&evidence.detail));
            text.push_str(&format!("  {source}: {detail}\n"));
        }
    }
    if let Some(manifest) = outcome.outputs.as_ref().filter(|manifest| !manifest.entries.is_empty()) {
        text.push_str(if manifest.partial { "\nOutputs (partial):\n" } else { "\nOutputs:\n" });
        let rows: Vec<_> = manifest.entries.iter().map(entry).collect();
        text.push_str(&table::render(&["PATH", "SIZE", "SHA-256"], &rows));
    }
    text
}

fn with_reason(backend: &str, reason: &str) -> String {
    if reason.is_empty() { backend.to_owned() } else { format!("{backend} ({reason})") }
}

/// Shown where there is more than what the run itself says.
fn attempts(run: &proto::Run, text: &mut String) {
    if run.attempts.len() < 2 && run.outcome.is_some() || run.attempts.is_empty() {
        return;
    }
    let rows: Vec<_> = run
        .attempts
        .iter()
        .map(|attempt| {
            let outcome = attempt.outcome.clone().unwrap_or_default();
            vec![
                attempt.number.to_string(),
                attempt.start_time.as_ref().map(human::moment).unwrap_or_default(),
                human::outcome(&outcome),
                human::visible(&outcome.message),
            ]
        })
        .collect();
    text.push('\n');
    text.push_str(&table::render(&["ATTEMPT", "STARTED", "ENDED BY", "MESSAGE"], &rows));
}

fn entry(entry: &proto::ManifestEntry) -> Vec<String> {
    let path =
        if entry.path.is_empty() { entry.output.clone() } else { format!("{}/{}", entry.output, entry.path) };
    match entry.kind() {
        proto::manifest_entry::Kind::Directory => {
            vec![format!("{}/", human::visible(&path)), "-".into(), "-".into()]
        }
        proto::manifest_entry::Kind::File | proto::manifest_entry::Kind::Unspecified => {
            vec![human::visible(&path), human::bytes(entry.size), entry.sha256.clone()]
        }
    }
}
