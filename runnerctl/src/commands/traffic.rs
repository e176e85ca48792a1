//! `traffic`, `audit`, and what `backend` changes.

use std::time::Duration;

use serde_json::{Value, json};
use worker_client::{convert, proto, proto::change_traffic_request::Change};

use super::{Service, is_table, run};
use crate::{
    args::{
        AuditArgs, ChangeArgs, DrainArgs, ExplainArgs, RampArgs, RollbackArgs, SetTrafficArgs,
        TrafficCommand, UndrainArgs,
    },
    exit::Exit,
    failure::Failure,
    human, json as as_json, output, table,
    value::Format,
};

/// Time between two looks at a backend that is to become empty.
const LOOK: Duration = Duration::from_millis(500);

pub(super) async fn execute(
    service: &Service,
    command: TrafficCommand,
    format: impl Fn(Option<Format>) -> Format,
) -> Result<Exit, Failure> {
    match command {
        TrafficCommand::Get(args) => {
            let traffic = service.client.traffic().await.map_err(|e| service.failure(&e))?;
            if args.policy {
                output::data(&yaml(&policy(&traffic)?)?)?;
                return Ok(Exit::OK);
            }
            show(&traffic, format(args.format.format))
        }
        TrafficCommand::Set(args) => set(service, args, format).await,
        TrafficCommand::Ramp(args) => ramp(service, args, format).await,
        TrafficCommand::Pause(args) => act(service, args, proto::RampAction::Pause, format).await,
        TrafficCommand::Resume(args) => act(service, args, proto::RampAction::Resume, format).await,
        TrafficCommand::Abort(args) => act(service, args, proto::RampAction::Abort, format).await,
        TrafficCommand::Rollback(RollbackArgs { backend, change }) => {
            let rollback = proto::Rollback { backend: backend.unwrap_or_default() };
            let traffic = ask(service, &change, None, Change::Rollback(rollback)).await?;
            show(&traffic, format(change.format.format))
        }
        TrafficCommand::Explain(args) => explain(service, *args, format).await,
    }
}

async fn ask(
    service: &Service,
    args: &ChangeArgs,
    expected_version: Option<u64>,
    change: Change,
) -> Result<proto::Traffic, Failure> {
    let request =
        proto::ChangeTrafficRequest { reason: args.reason.clone(), expected_version, change: Some(change) };
    service.client.change_traffic(request).await.map_err(|e| service.failure(&e))
}

async fn set(
    service: &Service,
    args: SetTrafficArgs,
    format: impl Fn(Option<Format>) -> Format,
) -> Result<Exit, Failure> {
    let text = if args.file.as_os_str() == "-" {
        std::io::read_to_string(std::io::stdin().lock())
            .map_err(|e| Failure::local("read standard input", &e))?
    } else {
        let doing = format!("read {}", args.file.display());
        std::fs::read_to_string(&args.file).map_err(|e| Failure::local(&doing, &e))?
    };
    // JSON is YAML, too.
    let document: Value = serde_saphyr::from_str(&text)
        .map_err(|error| Failure::usage(format!("{}: {error}", args.file.display())))?;
    let change = Change::SetPolicy(document.to_string());
    let traffic = ask(service, &args.change, args.expected_version, change).await?;
    show(&traffic, format(args.change.format.format))
}

async fn ramp(
    service: &Service,
    args: RampArgs,
    format: impl Fn(Option<Format>) -> Format,
) -> Result<Exit, Failure> {
    let steps = args.step.iter().map(|step| proto::RampStep {
        share: u32::from(step.hundredths),
        hold: Some(convert::duration_to_proto(step.hold)),
    });
    let start = proto::StartRamp {
        rule: args.rule.unwrap_or_default(),
        backend: args.backend,
        steps: steps.collect(),
    };
    let traffic = ask(service, &args.change, None, Change::StartRamp(start)).await?;
    show(&traffic, format(args.change.format.format))
}

async fn act(
    service: &Service,
    args: ChangeArgs,
    action: proto::RampAction,
    format: impl Fn(Option<Format>) -> Format,
) -> Result<Exit, Failure> {
    let traffic = ask(service, &args, None, Change::Ramp(action.into())).await?;
    show(&traffic, format(args.format.format))
}

async fn explain(
    service: &Service,
    args: ExplainArgs,
    format: impl Fn(Option<Format>) -> Format,
) -> Result<Exit, Failure> {
    let format = format(args.run.format());
    let mut spec = run::spec(args.run);
    if let Some(key) = args.sticky_key {
        spec = spec.sticky_key(key);
    }
    let explained = service.client.explain_routing(spec, args.run_id.unwrap_or_default()).await;
    let explained = explained.map_err(|e| service.failure(&e))?;
    if !is_table(format) {
        output::document(&as_json::explanation(&explained))?;
        return Ok(Exit::OK);
    }
    let to = match &explained.decision {
        Some(decision) => format!("{} ({})", decision.backend, human::visible(&explained.reason)),
        None => format!("nowhere: {}", human::visible(&explained.reason)),
    };
    let rows: Vec<_> = explained.candidates.iter().map(candidate).collect();
    let head = ["BACKEND", "HEALTH", "DRAINED", "LACKS"];
    let shadow = match explained.shadow.as_str() {
        "" => String::new(),
        shadow => format!("Shadow: {}\n", human::visible(shadow)),
    };
    output::data(&format!("Goes to {to}\n{shadow}\n{}", table::render(&head, &rows)))?;
    Ok(Exit::OK)
}

fn candidate(candidate: &proto::Candidate) -> Vec<String> {
    let lacks =
        candidate.lacks.iter().map(|lack| format!("{}: {}", lack.field, human::visible(&lack.description)));
    let lacks: Vec<_> = lacks.collect();
    vec![
        candidate.backend.clone(),
        if candidate.healthy { "healthy" } else { "UNHEALTHY" }.to_owned(),
        if candidate.drained { "drained" } else { "-" }.to_owned(),
        if lacks.is_empty() { "-".to_owned() } else { lacks.join("; ") },
    ]
}

/// `backend drain`. With `--wait` it returns when the backend has no runs left.
pub(super) async fn drain(service: &Service, args: DrainArgs, format: Format) -> Result<Exit, Failure> {
    let before = service.client.traffic().await.map_err(|e| service.failure(&e))?;
    // Asked for again, it only waits.
    let traffic = if args.wait && before.drained.contains_key(&args.backend) {
        before
    } else {
        ask(service, &args.change, None, Change::Drain(args.backend.clone())).await?
    };
    if args.wait {
        wait_until_empty(service, &args.backend).await?;
    }
    show(&traffic, format)
}

/// `backend undrain`.
pub(super) async fn undrain(service: &Service, args: UndrainArgs, format: Format) -> Result<Exit, Failure> {
    let traffic = ask(service, &args.change, None, Change::Undrain(args.backend)).await?;
    show(&traffic, format)
}

async fn wait_until_empty(service: &Service, name: &str) -> Result<(), Failure> {
    let mut told = None;
    loop {
        let backends = service.client.backends().await.map_err(|e| service.failure(&e))?;
        let live =
            backends.iter().find(|backend| backend.name == name).map_or(0, |backend| backend.live_runs);
        if live == 0 {
            return Ok(());
        }
        if told.replace(live) != Some(live) {
            output::note(&format!("{name} still has {live} runs"));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// `audit`.
pub(super) async fn audit(service: &Service, args: AuditArgs, format: Format) -> Result<Exit, Failure> {
    let entries = service.client.audit(args.before.unwrap_or(0), args.limit).await;
    let entries = entries.map_err(|e| service.failure(&e))?;
    if !is_table(format) {
        let entries: Vec<_> = entries.iter().map(as_json::audit).collect();
        output::document(&json!({ "entries": entries }))?;
        return Ok(Exit::OK);
    }
    let row = |entry: &proto::AuditEntry| {
        vec![
            entry.number.to_string(),
            entry.time.as_ref().map(human::moment).unwrap_or_default(),
            human::visible(&entry.actor),
            entry.action.clone(),
            human::visible(&entry.what),
            human::visible(&entry.reason),
        ]
    };
    let rows: Vec<_> = entries.iter().map(row).collect();
    output::data(&table::render(&["NUMBER", "TIME", "WHO", "ACTION", "WHAT", "WHY"], &rows))?;
    Ok(Exit::OK)
}

/// The policy's document.
fn policy(traffic: &proto::Traffic) -> Result<Value, Failure> {
    if traffic.policy.is_empty() {
        return Ok(json!({}));
    }
    serde_json::from_str(&traffic.policy)
        .map_err(|error| Failure::new(format!("the service's policy is no JSON: {error}"), Exit::FAILURE))
}

fn yaml(document: &Value) -> Result<String, Failure> {
    serde_saphyr::to_string(document)
        .map_err(|error| Failure::new(format!("write the policy as YAML: {error}"), Exit::FAILURE))
}

fn show(traffic: &proto::Traffic, format: Format) -> Result<Exit, Failure> {
    let policy = policy(traffic)?;
    if !is_table(format) {
        output::document(&as_json::traffic(traffic, policy))?;
        return Ok(Exit::OK);
    }
    let mut drained: Vec<_> = traffic.drained.iter().collect();
    drained.sort_by_key(|(name, _)| name.as_str());
    let drained = drained.into_iter().map(|(name, why)| {
        let since = why.since.as_ref().map(human::moment).unwrap_or_default();
        format!("{name} (since {since}, by {}: {})", human::visible(&why.by), human::visible(&why.reason))
    });
    let mut text = table::facts(&[
        ("Version", traffic.version.to_string()),
        ("Drained", drained.collect::<Vec<_>>().join(", ")),
        ("Ramp", traffic.ramp.as_ref().map(ramp_line).unwrap_or_default()),
        ("Guard", traffic.guard.iter().map(guard_line).collect::<Vec<_>>().join("; ")),
    ]);
    text.push('\n');
    text.push_str(&yaml(&policy)?);
    output::data(&text)?;
    Ok(Exit::OK)
}

fn guard_line(report: &proto::GuardReport) -> String {
    let part = |tally: &Option<proto::Tally>| {
        let tally = tally.unwrap_or_default();
        format!("{} of {}", tally.count, tally.runs)
    };
    let (canary, baseline) = (part(&report.canary_failures), part(&report.baseline_failures));
    let verdict = as_json::verdict(report).to_lowercase().replace('_', " ");
    format!("{} failed {canary}, {} {baseline}: {verdict}", report.canary, report.baseline)
}

fn ramp_line(ramp: &proto::Ramp) -> String {
    let status = as_json::ramp_status(ramp).to_lowercase().replace('_', " ");
    let share = f64::from(ramp.share) / 100.0;
    let next = ramp.next_step_time.as_ref().map(|time| format!(" until {}", human::moment(time)));
    let rule = if ramp.rule.is_empty() { String::new() } else { format!(" of rule {:?}", ramp.rule) };
    format!(
        "{}{rule}: step {} of {}, {share} %, {status}{}",
        ramp.backend,
        ramp.step,
        ramp.steps.len(),
        next.unwrap_or_default()
    )
}
