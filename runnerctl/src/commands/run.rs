//! `run`.

use std::{future::Future, path::PathBuf, pin::Pin, time::Duration};

use futures::future::OptionFuture;
use serde_json::json;
use worker_client::{
    Event, Finished, Irregular, RunHandle, RunOptions, RunSpec, StreamEvent,
    proto::{self, Archive, Cause, RunState},
};

use super::{Service, is_table, is_watched};
use crate::{
    args::RunArgs,
    exit::Exit,
    failure::Failure,
    follow::{self, Screen},
    interrupt::Interrupts,
    json as as_json, output,
    progress::Bar,
    stdin::{self, InputEnd, InputOptions},
    terminal::{self, RawMode},
    value::{Format, InputArg, InputFrom, NetworkArg, OutputArg},
};

/// Wait before the second attempt, where the caller asks for retries.
const RETRY_BACKOFF: Duration = Duration::from_secs(1);

/// What has to be done beside the run itself.
struct Plan {
    /// What is uploaded or named, and how it is unpacked.
    inputs: Vec<(InputArg, Archive)>,
    skip_special: bool,
    outputs: Vec<(String, PathBuf)>,
    detach: bool,
    input: Option<InputOptions>,
    options: RunOptions,
}

pub(super) async fn execute(endpoint: &str, args: RunArgs, format: Format) -> Result<Exit, Failure> {
    // Caught from here on, so that no moment is left in which Ctrl-C leaves a run behind unseen.
    let mut interrupts = Interrupts::catch()?;
    let verbose = args.verbose || (is_watched() && !args.tty);
    let (spec, plan) = plan(args);
    let mut screen = Screen::new(format, verbose);
    let prepare = async {
        let service = Service::connect(endpoint).await?;
        let spec = upload(&service, spec, &plan).await?;
        Ok::<_, Failure>((service, spec))
    };
    let (service, spec) = tokio::select! {
        prepared = prepare => prepared?,
        () = interrupts.next() => return Ok(interrupted("nothing was started")),
    };
    let (handle, cancelled) = match start(&service, spec, &plan, &mut interrupts).await? {
        Some(started) => started,
        None => return Ok(interrupted("the run may have been accepted: runnerctl list")),
    };
    if plan.detach && !cancelled {
        if is_table(format) {
            output::data(&format!("{}\n", handle.id()))?;
        } else {
            output::document(&as_json::run(handle.run()))?;
        }
        return Ok(Exit::OK);
    }
    screen.json(&json!({ "event": "accepted", "accepted": as_json::run(handle.run()) })).await?;
    screen.tell(&format!("run {} on backend {}", handle.id(), handle.run().backend));
    match watch(&service, &handle, &plan, &mut screen, &mut interrupts, cancelled).await? {
        Watched::Ended(end) => {
            let exit = Exit::of_run(&end);
            let why = follow::explain(&end);
            if !why.is_empty() && is_table(format) {
                output::note(&why);
            }
            tokio::select! {
                downloaded = download(&service, &end, &plan) => downloaded?,
                () = interrupts.next() => return Ok(interrupted("the outputs were not all downloaded")),
            }
            Ok(exit)
        }
        Watched::Left(exit) => {
            let id = handle.id();
            let again = if plan.input.is_some() { "attach" } else { "logs -f" };
            output::note(&format!("detached; the run goes on\n  To see it again: runnerctl {again} {id}"));
            Ok(exit)
        }
    }
}

fn interrupted(what: &str) -> Exit {
    output::note(&format!("interrupted: {what}"));
    Exit::INTERRUPTED
}

/// The spec that the flags make, without its inputs.
pub(super) fn spec(args: RunArgs) -> RunSpec {
    plan(args).0
}

/// The spec without its inputs, which have to be uploaded first.
fn plan(args: RunArgs) -> (RunSpec, Plan) {
    let mut spec = RunSpec::command(args.command);
    if let Some(image) = args.image {
        spec = spec.image(image);
    }
    if let Some(backend) = args.backend {
        spec = spec.backend(backend);
    }
    for var in args.env {
        spec = spec.env(var.name, var.value);
    }
    for label in args.label {
        spec = spec.label(label.key, label.value);
    }
    if let Some(timeout) = args.timeout {
        spec = spec.timeout(timeout);
    }
    if let Some(grace) = args.stop_grace {
        spec = spec.stop_grace(grace);
    }
    match args.network {
        None => {}
        Some(NetworkArg::None) => spec = spec.network_none(),
        Some(NetworkArg::Egress) => spec = spec.network_egress(),
        Some(NetworkArg::Named(name)) => spec = spec.network_named(name),
    }
    if let Some(bytes) = args.memory {
        spec = spec.memory_bytes(bytes);
    }
    if let Some(millis) = args.cpu {
        spec = spec.cpu_millis(millis);
    }
    if let Some(pids) = args.pids {
        spec = spec.pids(pids);
    }
    if let Some(bytes) = args.file_size {
        spec = spec.file_size_bytes(bytes);
    }
    if let Some(user) = args.user {
        spec = spec.user(user);
    }
    if let Some(dir) = args.workdir {
        spec = spec.working_dir(dir);
    }
    if args.read_only {
        spec = spec.read_only_root();
    }
    if let Some(retries) = args.retries {
        spec = spec.retries(retries.saturating_add(1), RETRY_BACKOFF);
    }
    if args.idempotent {
        spec = spec.idempotent();
    }
    if args.tty {
        let (columns, rows) = terminal::size().unwrap_or((80, 24));
        spec = spec.terminal(columns, rows);
    } else if args.stdin {
        spec = spec.stdin();
    }
    let mut outputs = Vec::new();
    for output in args.output {
        if let OutputArg::Declared { path, glob, local } = output {
            spec = if glob { spec.output_glob(path.as_str()) } else { spec.output(path.as_str()) };
            outputs.push((path, local));
        }
    }
    let typed = args.tty && std::io::IsTerminal::is_terminal(&std::io::stdin());
    let input = InputOptions { terminal: args.tty, detach_keys: args.detach_keys };
    let inputs = args.input.into_iter().map(|input| (input, Archive::Unspecified));
    let archives = args.extract.into_iter().map(|archive| (archive.input, archive.format));
    let plan = Plan {
        inputs: inputs.chain(archives).collect(),
        skip_special: args.skip_special,
        outputs,
        detach: args.detach,
        input: (args.stdin || typed).then_some(input),
        options: RunOptions { run_id: None, idempotency_key: args.key },
    };
    (spec, plan)
}

async fn upload(service: &Service, mut spec: RunSpec, plan: &Plan) -> Result<RunSpec, Failure> {
    for (input, archive) in &plan.inputs {
        let named = |uri: &str, sha256: &str, mode| proto::Input {
            path: input.path.clone(),
            source: Some(proto::input::Source::Uri(uri.to_owned())),
            sha256: sha256.to_owned(),
            mode,
            extract: (*archive).into(),
        };
        let local = match &input.from {
            InputFrom::Stored(uri) => {
                spec = spec.input_spec(named(uri, "", 0));
                continue;
            }
            InputFrom::Https { url, sha256 } => {
                spec = spec.input_spec(named(url, sha256, 0));
                continue;
            }
            InputFrom::Local(local) => local,
        };
        let bar = Bar::new(&format!("upload {}", local.display()));
        let options = bar.options();
        let irregular = if plan.skip_special { Irregular::Skip } else { Irregular::Refuse };
        if let Some(pattern) = local_pattern(local)? {
            let base = if pattern.base().is_empty() { "." } else { pattern.base() }.to_owned();
            let matched = pattern.clone();
            let options =
                options.irregular(irregular).select(move |path| matched.matches_below(path.as_bytes()));
            let tree = service.client.upload_tree(&base, options).await;
            let tree = tree.map_err(|e| upload_failure(service, &e))?;
            drop(bar);
            if tree.files == 0 {
                return Err(Failure::usage(format!("nothing matches {pattern}")));
            }
            spec = spec.input_spec(named(&tree.uri, "", 0));
            continue;
        }
        if local.is_dir() && *archive == Archive::Unspecified {
            let tree = service.client.upload_tree(local, options.irregular(irregular)).await;
            let tree = tree.map_err(|e| upload_failure(service, &e))?;
            drop(bar);
            if !tree.skipped.is_empty() {
                output::note(&format!(
                    "left out {} special files of {}",
                    tree.skipped.len(),
                    local.display()
                ));
            }
            spec = spec.input(input.path.as_str(), tree.uri);
        } else {
            let file = service.client.upload_file(local, options).await;
            let file = file.map_err(|e| upload_failure(service, &e))?;
            // An archive's own mode says nothing of what is in it.
            let mode = if *archive == Archive::Unspecified { mode_of(local) } else { 0 };
            spec = spec.input_spec(named(&file.uri, &file.sha256, mode));
        }
    }
    Ok(spec)
}

/// The pattern that a local input is; `None` where it is a path. What exists by that very name is a path.
fn local_pattern(local: &std::path::Path) -> Result<Option<runner_glob::Pattern>, Failure> {
    let Some(text) = local.to_str().filter(|text| runner_glob::has_wildcard(text)) else { return Ok(None) };
    if local.symlink_metadata().is_ok() {
        return Ok(None);
    }
    let text = text.strip_prefix("./").unwrap_or(text);
    runner_glob::Pattern::parse(text)
        .map(Some)
        .map_err(|fault| Failure::usage(format!("the pattern {text} {fault}")))
}

/// An uploaded script stays executable.
fn mode_of(local: &std::path::Path) -> u32 {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::metadata(local).map_or(0, |metadata| metadata.permissions().mode() & 0o777)
}

pub(super) fn upload_failure(service: &Service, error: &worker_client::ClientError) -> Failure {
    match error.kind() {
        worker_client::ErrorKind::Unsupported => {
            Failure::new(format!("{error}\n  To leave such files out: --skip-special"), Exit::USAGE)
        }
        // The caller's file, not the infrastructure.
        worker_client::ErrorKind::Io => Failure::usage(error.to_string()),
        _ => service.failure(error),
    }
}

/// Starts the run. An interrupt meanwhile is kept for when it is known whether there is a run to cancel; a second one
/// gives up (`None`).
async fn start(
    service: &Service,
    spec: RunSpec,
    plan: &Plan,
    interrupts: &mut Interrupts,
) -> Result<Option<(RunHandle, bool)>, Failure> {
    let starting = service.client.run_with(spec, plan.options.clone());
    tokio::pin!(starting);
    let mut cancelled = false;
    loop {
        tokio::select! {
            handle = &mut starting => {
                let handle = handle.map_err(|e| service.failure(&e))?;
                return Ok(Some((handle, cancelled)));
            }
            () = interrupts.next() => {
                if cancelled {
                    return Ok(None);
                }
                cancelled = true;
            }
        }
    }
}

enum Watched {
    Ended(Box<Finished>),
    /// The caller left; the run goes on.
    Left(Exit),
}

type Pump<'a> = Pin<Box<dyn Future<Output = Result<InputEnd, Failure>> + 'a>>;
type Cancelling<'a> = Pin<Box<dyn Future<Output = Result<proto::Run, worker_client::ClientError>> + 'a>>;

/// Shows the run until it ends. The first interrupt cancels it, the second leaves it.
async fn watch(
    service: &Service,
    handle: &RunHandle,
    plan: &Plan,
    screen: &mut Screen,
    interrupts: &mut Interrupts,
    cancelled: bool,
) -> Result<Watched, Failure> {
    let cancel = || -> Cancelling<'_> { Box::pin(handle.cancel("interrupted in runnerctl")) };
    let mut raw = match &plan.input {
        Some(input) if input.terminal => RawMode::enter()?,
        Some(_) | None => None,
    };
    let pump: Option<Pump<'_>> = plan
        .input
        .clone()
        .map(|options| -> Pump<'_> { Box::pin(stdin::pump(&service.client, handle.id(), options)) });
    let mut pump = OptionFuture::from(pump);
    let mut interrupts_seen = u32::from(cancelled);
    let mut cancelling: OptionFuture<Cancelling<'_>> = cancelled.then(cancel).into();
    let mut events = handle.stream();
    loop {
        tokio::select! {
            event = events.next() => {
                let Some(event) = event else {
                    return Err(Failure::new("the stream ended before the run did", Exit::INFRASTRUCTURE));
                };
                let event = event.map_err(|e| lost(service, handle, &e))?;
                if let Some(end) = show(screen, handle, event).await? {
                    return Ok(Watched::Ended(Box::new(end)));
                }
            }
            () = interrupts.next() => {
                interrupts_seen += 1;
                if interrupts_seen > 1 {
                    return Ok(Watched::Left(Exit::INTERRUPTED));
                }
                cancelling = Some(cancel()).into();
                if is_table(screen.format()) {
                    output::note("cancelling; once more to leave without waiting");
                }
            }
            Some(answer) = &mut cancelling => {
                cancelling = None.into();
                if let Err(error) = answer {
                    // The next interrupt tries again.
                    interrupts_seen = 0;
                    output::note(&format!("{error}; the run goes on"));
                }
            }
            Some(input) = &mut pump => {
                pump = None.into();
                match input? {
                    InputEnd::Detached => {
                        drop(raw.take());
                        return Ok(Watched::Left(Exit::OK));
                    }
                    InputEnd::Closed => {}
                    InputEnd::Broken(error) => {
                        drop(raw.take());
                        output::note(&format!("{error}; standard input is not sent any more"));
                    }
                }
            }
        }
    }
}

/// Shows an event; answers the end of the run where it is that.
async fn show(
    screen: &mut Screen,
    handle: &RunHandle,
    event: StreamEvent,
) -> Result<Option<Finished>, Failure> {
    if let Err(failure) = screen.show(&event).await {
        // Whoever read this is gone; the run is not.
        output::note(&format!("the output has no reader any more; the run goes on: {}", handle.id()));
        return Err(failure);
    }
    let Event::Terminated(end) = event.event else { return Ok(None) };
    let state = end.state();
    Ok(Some(Finished { run_id: handle.id().to_owned(), state, outcome: end.outcome.unwrap_or_default() }))
}

/// The run can be seen no more, but goes on.
fn lost(service: &Service, handle: &RunHandle, error: &worker_client::ClientError) -> Failure {
    let id = handle.id();
    output::note(&format!("lost sight of run {id}; it may go on\n  To see it again: runnerctl logs -f {id}"));
    service.failure(error)
}

/// Takes what the run wrote, even where it failed.
async fn download(service: &Service, end: &Finished, plan: &Plan) -> Result<(), Failure> {
    let nothing = proto::Manifest::default();
    let manifest = end.outputs().unwrap_or(&nothing);
    for (path, local) in &plan.outputs {
        let bar = Bar::new(&format!("download {path}"));
        let done = service.client.download_output(manifest, path, local, bar.options()).await;
        drop(bar);
        match done {
            Ok(_) => {}
            // A failed run need not have written it; its own status says more.
            Err(error)
                if error.kind() == worker_client::ErrorKind::NotFound && end.state != RunState::Succeeded =>
            {
                // Told already, where that is why the run failed.
                if end.cause() != Cause::Output {
                    output::note(&error.to_string());
                }
            }
            Err(error) => return Err(service.failure(&error)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn planned(line: &[&str]) -> (RunSpec, Plan) {
        let cli = Cli::try_parse_from([&["runnerctl", "run"], line].concat()).expect("a valid command line");
        let Command::Run(args) = cli.command else { panic!("the command is `run`") };
        plan(*args)
    }

    #[test]
    fn every_flag_reaches_its_field() {
        let (spec, plan) = planned(&[
            "--backend",
            "b",
            "--image",
            "i",
            "--env",
            "A=1",
            "--label",
            "k=v",
            "--timeout",
            "30s",
            "--stop-grace",
            "2s",
            "--network",
            "egress",
            "--memory",
            "512MiB",
            "--cpu",
            "1.5",
            "--pids",
            "9",
            "--file-size",
            "1G",
            "--user",
            "1:2",
            "--workdir",
            "/w",
            "--read-only",
            "--retries",
            "2",
            "--idempotent",
            "--stdin",
            "--key",
            "x",
            "--output",
            "/outputs/a:b",
            "--",
            "sh",
            "-c",
            "true",
        ]);
        let spec = spec.as_proto();
        assert_eq!((spec.image.as_str(), spec.command.join(" ").as_str()), ("i", "sh -c true"));
        assert_eq!((spec.env["A"].as_str(), spec.labels["k"].as_str()), ("1", "v"));
        assert_eq!(spec.timeout.map(|timeout| timeout.seconds), Some(30));
        assert_eq!(spec.stop_grace.map(|grace| grace.seconds), Some(2));
        assert_eq!(
            spec.network.as_ref().and_then(|n| n.policy.clone()),
            Some(proto::network::Policy::Egress(true))
        );
        let resources = spec.resources.clone().expect("resources");
        assert_eq!((resources.memory_bytes, resources.cpu_millis, resources.pids), (512 << 20, 1500, 9));
        assert_eq!(resources.file_size_bytes, 1 << 30);
        assert_eq!((spec.user.as_str(), spec.working_dir.as_str(), spec.read_only_root), ("1:2", "/w", true));
        assert_eq!(spec.retry.as_ref().map(|retry| retry.max_attempts), Some(3), "two more than the first");
        assert!(spec.idempotent && spec.stdin && spec.terminal.is_none());
        assert_eq!(spec.routing.as_ref().map(|routing| routing.backend.as_str()), Some("b"));
        assert!(spec.outputs[0].required && spec.outputs[0].path == "/outputs/a");
        assert_eq!(plan.outputs, [("/outputs/a".to_owned(), PathBuf::from("b"))]);
        assert_eq!(plan.options.idempotency_key.as_deref(), Some("x"));
        assert!(plan.input.is_some_and(|input| !input.terminal));
    }

    #[test]
    fn what_is_not_said_is_left_to_the_service() {
        let (spec, plan) = planned(&["true"]);
        assert_eq!(spec, RunSpec::command(["true"]));
        assert!(plan.input.is_none() && !plan.detach);
    }

    #[test]
    fn a_terminal_takes_the_place_of_standard_input() {
        let (spec, plan) = planned(&["-it", "sh"]);
        assert!(spec.as_proto().terminal.is_some() && !spec.as_proto().stdin);
        assert!(plan.input.is_some_and(|input| input.terminal));
    }
}
