//! `cancel --all`: every run that matches, after a look at them.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::json;
use worker_client::{ClientError, ErrorKind, ListFilter, proto};

use super::{Service, cancel, is_table, list};
use crate::{
    args::{CancelArgs, StateArg},
    exit::Exit,
    failure::Failure,
    human, output,
    progress::Count,
    table,
    value::Format,
};

/// Runs that are shown before the question.
const SHOWN: usize = 20;
const PAGE: u32 = 1000;
/// The states of runs that have not ended.
const LIVE: [StateArg; 4] = [StateArg::Queued, StateArg::Preparing, StateArg::Running, StateArg::Publishing];

/// What came of one run.
enum Done {
    Asked,
    /// It had ended, or was gone.
    Over,
    Failed(ClientError),
}

/// Asks for the end of every run that matches. What was interrupted goes on when it is asked for again: runs that were cancelled do not
/// match any more, and asking twice is harmless.
pub(super) async fn execute(service: &Service, args: CancelArgs, format: Format) -> Result<Exit, Failure> {
    let runs = matching(service, &args).await?;
    if runs.is_empty() {
        output::note("no run matches");
        return result(&[], format);
    }
    preview(&runs);
    if !args.yes && !confirmed(runs.len())? {
        output::note("nothing was cancelled");
        return Ok(Exit::FAILURE);
    }
    let count = Count::new("cancelling", runs.len());
    let ids: Vec<String> = runs.into_iter().map(|run| run.run_id).collect();
    let cancelling = stream::iter(ids).map(|id| async {
        let done = one(service, &id, &args).await;
        count.step();
        (id, done)
    });
    let done: Vec<_> = cancelling.buffer_unordered(usize::from(args.parallel)).collect().await;
    drop(count);
    result(&done, format)
}

async fn matching(service: &Service, args: &CancelArgs) -> Result<Vec<proto::Run>, Failure> {
    let states = if args.state.is_empty() { LIVE.to_vec() } else { args.state.clone() };
    if let Some(over) = states.iter().find(|state| !LIVE.contains(state)) {
        return Err(Failure::usage(format!(
            "--state: a run that is {over:?} has ended; there is nothing to cancel"
        )));
    }
    let mut filter = ListFilter::default().page_size(PAGE);
    for state in states {
        filter = filter.state(state.into());
    }
    if let Some(backend) = &args.backend {
        filter = filter.backend(backend);
    }
    for label in &args.label {
        filter = filter.label(label.key.as_str(), label.value.as_str());
    }
    // One that is cancelled already needs no second word, unless it is waited for.
    let wanted = |run: &proto::Run| std::future::ready(args.wait || !run.cancel_requested);
    let runs: Vec<_> = service
        .client
        .list(filter)
        .try_filter(wanted)
        .try_collect()
        .await
        .map_err(|e| service.failure(&e))?;
    let Some(image) = &args.image else { return Ok(runs) };
    // Lists have no specs.
    let whole =
        stream::iter(runs).map(|run| list::with_spec(service, run)).buffered(usize::from(args.parallel));
    let has =
        |run: &proto::Run| std::future::ready(run.spec.as_ref().is_some_and(|spec| spec.image == *image));
    whole.try_filter(has).try_collect().await.map_err(|e| service.failure(&e))
}

fn preview(runs: &[proto::Run]) {
    let now = human::now();
    let rows: Vec<_> = runs.iter().take(SHOWN).map(|run| list::row(run, now)[..5].to_vec()).collect();
    let mut text = table::render(&["ID", "STATE", "CAUSE/EXIT", "BACKEND", "AGE"], &rows);
    if runs.len() > SHOWN {
        text.push_str(&format!("and {} more\n", runs.len() - SHOWN));
    }
    let mut stderr = io::stderr().lock();
    // Where nobody reads it, there is nobody to show it to.
    let _ = write!(stderr, "{text}");
    drop(stderr);
    output::note(&format!("{} runs match", runs.len()));
}

fn confirmed(runs: usize) -> Result<bool, Failure> {
    if !io::stdin().is_terminal() {
        return Err(Failure::usage("standard input is no terminal, so nobody can be asked: give --yes"));
    }
    let mut stderr = io::stderr().lock();
    let asked = write!(stderr, "Cancel these {runs} runs? [y/N] ").and_then(|()| stderr.flush());
    asked.map_err(|e| Failure::local("ask on standard error", &e))?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer).map_err(|e| Failure::local("read the answer", &e))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

async fn one(service: &Service, id: &str, args: &CancelArgs) -> Done {
    let asked = async {
        let run = service.client.cancel(id, args.reason.as_str()).await?;
        if args.wait && !cancel::is_over(&run) {
            cancel::until_ended(service, id).await?;
        }
        Ok::<_, ClientError>(run)
    };
    match asked.await {
        Ok(run) if cancel::is_over(&run) && run.state() != proto::RunState::Cancelled => Done::Over,
        Ok(_) => Done::Asked,
        Err(error) if error.kind() == ErrorKind::NotFound => Done::Over,
        Err(error) => Done::Failed(error),
    }
}

fn result(done: &[(String, Done)], format: Format) -> Result<Exit, Failure> {
    let ids = |wanted: fn(&Done) -> bool| -> Vec<&str> {
        done.iter().filter(|(_, done)| wanted(done)).map(|(id, _)| id.as_str()).collect()
    };
    let (asked, over) = (ids(|done| matches!(done, Done::Asked)), ids(|done| matches!(done, Done::Over)));
    let failed: Vec<_> = done
        .iter()
        .filter_map(|(id, done)| match done {
            Done::Failed(error) => Some((id, error)),
            Done::Asked | Done::Over => None,
        })
        .collect();
    for (id, error) in &failed {
        output::note(&format!("{id}: {error}"));
    }
    let exit = if failed.is_empty() { Exit::OK } else { Exit::FAILURE };
    if is_table(format) {
        let text = format!("{} cancelled, {} had ended, {} failed\n", asked.len(), over.len(), failed.len());
        output::data(&text)?;
    } else {
        let failed: Vec<_> =
            failed.iter().map(|(id, error)| json!({ "run_id": id, "error": error.to_string() })).collect();
        output::document(&json!({ "cancelled": asked, "ended": over, "failed": failed }))?;
    }
    Ok(exit)
}
