//! `artifact`.

use std::path::{Path, PathBuf};

use futures::TryStreamExt as _;
use serde_json::json;
use worker_client::{Irregular, proto};

use super::{Service, is_table};
use crate::{
    args::{ArtifactCommand, GetArtifactArgs, ListArtifactsArgs, PutArtifactArgs, RemoveArtifactArgs},
    exit::Exit,
    failure::Failure,
    human, output,
    progress::Bar,
    table,
    value::Format,
};

pub(super) async fn execute(
    service: &Service,
    command: ArtifactCommand,
    format: impl Fn(crate::args::FormatArgs) -> Format,
) -> Result<Exit, Failure> {
    match command {
        ArtifactCommand::Put(args) => put(service, &args, format(args.format)).await,
        ArtifactCommand::Get(args) => get(service, &args, format(args.format)).await,
        ArtifactCommand::Ls(args) => list(service, &args, format(args.format)).await,
        ArtifactCommand::Rm(args) => remove(service, &args, format(args.format)).await,
    }
}

async fn put(service: &Service, args: &PutArtifactArgs, format: Format) -> Result<Exit, Failure> {
    for local in &args.local {
        let bar = Bar::new(&format!("upload {}", local.display()));
        let mut options = bar.options().parallelism(args.parallel);
        if let Some(dir) = state_dir() {
            options = options.remember(dir.join("uploads"));
        }
        let (line, document) = if local.is_dir() {
            let irregular = if args.skip_special { Irregular::Skip } else { Irregular::Refuse };
            let tree = service.client.upload_tree(local, options.irregular(irregular)).await;
            let tree = tree.map_err(|e| super::run::upload_failure(service, &e))?;
            let skipped: Vec<String> = tree.skipped.iter().map(|path| path.display().to_string()).collect();
            let document = json!({
                "local": local.display().to_string(), "uri": tree.uri, "files": tree.files,
                "size": tree.total_bytes, "skipped": skipped,
            });
            (tree.uri, document)
        } else {
            let file = service.client.upload_file(local, options).await;
            let file = file.map_err(|e| super::run::upload_failure(service, &e))?;
            let document = json!({
                "local": local.display().to_string(), "uri": file.uri, "size": file.size, "sha256": file.sha256,
            });
            (file.uri, document)
        };
        drop(bar);
        // One line each, as they are done: a later failure takes nothing of it back.
        if is_table(format) {
            output::data(&format!("{line}\n"))?;
        } else {
            output::data(&format!("{document}\n"))?;
        }
    }
    Ok(Exit::OK)
}

/// Where what outlives this process is kept. `None`: there is no place for it, and nothing is kept.
fn state_dir() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state")))?;
    Some(state.join("runnerctl"))
}

async fn get(service: &Service, args: &GetArtifactArgs, format: Format) -> Result<Exit, Failure> {
    let bar = Bar::new(&format!("download {}", args.uri));
    let options = bar.options().parallelism(args.parallel);
    let client = &service.client;
    let done = if let Some(rest) = args.uri.strip_prefix("run:") {
        let (run, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let found = client.get(run).await.map_err(|e| service.failure(&e))?;
        let manifest = found.outcome.and_then(|outcome| outcome.outputs);
        let Some(manifest) = manifest else {
            return Err(Failure::new(format!("the run {run} has stored nothing"), Exit::FAILURE));
        };
        if path.is_empty() {
            client.download_outputs(&manifest, args.local.as_deref().unwrap_or(Path::new(".")), options).await
        } else {
            let local = args.local.clone().map_or_else(|| last_name(path), Ok)?;
            client.download_output(&manifest, path, local, options).await
        }
    } else if args.uri.ends_with('/') {
        client.download_tree(&args.uri, args.local.as_deref().unwrap_or(Path::new(".")), options).await
    } else {
        let mut local = args.local.clone().map_or_else(|| last_name(&args.uri), Ok)?;
        if local.is_dir() {
            local = local.join(last_name(&args.uri)?);
        }
        client.download(args.uri.as_str(), local, None, options).await.map(|file| vec![file])
    };
    let done = done.map_err(|e| service.failure(&e))?;
    drop(bar);
    if is_table(format) {
        let bytes: u64 = done.iter().map(|file| file.size).sum();
        output::note(&format!("{} files, {bytes} bytes", done.len()));
    } else {
        let files: Vec<_> = done
            .iter()
            .map(|file| json!({ "path": file.path.display().to_string(), "size": file.size, "sha256": file.sha256 }))
            .collect();
        output::document(&json!({ "files": files }))?;
    }
    Ok(Exit::OK)
}

/// The name that a download gets where none was given.
fn last_name(uri: &str) -> Result<PathBuf, Failure> {
    match uri.rsplit('/').next().filter(|name| !name.is_empty() && !matches!(*name, "." | "..")) {
        Some(name) => Ok(PathBuf::from(name)),
        None => Err(Failure::usage("say where it goes: runnerctl artifact get URI LOCAL".to_owned())),
    }
}

async fn list(service: &Service, args: &ListArtifactsArgs, format: Format) -> Result<Exit, Failure> {
    let prefix = args.prefix.clone().unwrap_or_default();
    let found: Vec<proto::Artifact> =
        service.client.list_artifacts(prefix).try_collect().await.map_err(|e| service.failure(&e))?;
    if is_table(format) {
        let rows: Vec<Vec<String>> = found
            .iter()
            .map(|one| vec![one.size.to_string(), human::visible(&one.uri).to_string()])
            .collect();
        output::data(&table::render(&["SIZE", "URI"], &rows))?;
    } else {
        let found: Vec<_> = found.iter().map(|one| json!({ "uri": one.uri, "size": one.size })).collect();
        output::document(&json!({ "artifacts": found }))?;
    }
    Ok(Exit::OK)
}

async fn remove(service: &Service, args: &RemoveArtifactArgs, format: Format) -> Result<Exit, Failure> {
    for uri in &args.uri {
        let deleted = service.client.delete_artifacts(uri.as_str()).await.map_err(|e| service.failure(&e))?;
        if !is_table(format) {
            output::data(&format!("{}\n", json!({ "uri": uri, "deleted": deleted })))?;
        }
    }
    Ok(Exit::OK)
}
