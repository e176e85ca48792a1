//! `delete`.

use serde_json::json;

use super::{Service, is_table};
use crate::{args::DeleteArgs, exit::Exit, failure::Failure, output, value::Format};

pub(super) async fn execute(service: &Service, args: DeleteArgs, format: Format) -> Result<Exit, Failure> {
    for run in args.run {
        service.client.delete(run.as_str()).await.map_err(|e| service.failure(&e))?;
        // One line each, as they are done: a later failure takes nothing of it back.
        if is_table(format) {
            output::data(&format!("{run}\n"))?;
        } else {
            output::data(&format!("{}\n", json!({ "deleted": run })))?;
        }
    }
    Ok(Exit::OK)
}
