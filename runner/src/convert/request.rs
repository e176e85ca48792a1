//! Requests, and the tokens in them.

use std::collections::BTreeMap;

use runner_core::{
    backend::WorkloadInput,
    clock::Timestamp,
    id::{RunId, TenantId},
    limits::Limits,
    service::{RunRequest, StreamCursor, StreamOptions},
    spec::{InvalidSpec, RunSpec},
    store::{PageCursor, RunFilter},
};
use runner_proto::v1;

use super::{Violations, Wire, spec};

/// A message of `Run`, with what the domain's own checks of a spec need to know.
#[derive(Debug)]
pub struct RunCall<'a> {
    /// As it came.
    pub message: v1::RunRequest,
    /// Whose request it is.
    pub tenant: &'a TenantId,
    /// The service's.
    pub limits: &'a Limits,
}

impl TryFrom<RunCall<'_>> for RunRequest {
    type Error = InvalidSpec;

    fn try_from(RunCall { message: request, tenant, limits }: RunCall<'_>) -> Result<Self, InvalidSpec> {
        let mut violations = Violations::default();
        let run_id = violations.parse_optional("run_id", &request.run_id);
        let key = violations.parse_optional("idempotency_key", &request.idempotency_key);
        let spec = match request.spec {
            Some(message) => {
                let spec = spec::from_wire(message, &mut violations);
                // Where the form is right, admission checks the contents; here only to tell everything at once.
                if !violations.is_empty()
                    && let Err(more) = spec.validate(tenant, limits)
                {
                    violations.extend(more);
                }
                spec
            }
            None => {
                violations.add("spec", "REQUIRED", "say what to run");
                RunSpec::default()
            }
        };
        violations.finish(Self { spec, run_id, key })
    }
}

/// Reads the id of a run.
///
/// # Errors
/// A violation of `field`.
pub fn run_id(field: &str, text: &str) -> Result<RunId, InvalidSpec> {
    let mut violations = Violations::default();
    if text.is_empty() {
        violations.add(field, "REQUIRED", "say which run");
    }
    match if text.is_empty() { None } else { violations.parse(field, text) } {
        Some(id) => Ok(id),
        None => Err(violations.finish(()).err().unwrap_or(InvalidSpec(Vec::new()))),
    }
}

/// What to stream, from where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watch {
    /// Which run.
    pub run: RunId,
    /// From where.
    pub from: StreamCursor,
    /// How.
    pub options: StreamOptions,
}

impl TryFrom<Wire<v1::StreamRequest>> for Watch {
    type Error = InvalidSpec;

    fn try_from(Wire(request): Wire<v1::StreamRequest>) -> Result<Self, InvalidSpec> {
        let mut violations = Violations::default();
        let from = violations.parse_optional("cursor", &request.cursor).unwrap_or_default();
        match run_id("run_id", &request.run_id) {
            Ok(run) => {
                let options = StreamOptions { follow: !request.no_follow, logs: !request.no_logs };
                violations.finish(Self { run, from, options })
            }
            Err(mut invalid) => {
                invalid.0.extend(violations.finish(()).err().into_iter().flat_map(|more| more.0));
                Err(invalid)
            }
        }
    }
}

/// What to list.
#[derive(Debug, Clone)]
pub struct Listing {
    /// Which runs. Without the tenant.
    pub filter: RunFilter,
    /// From where.
    pub after: Option<PageCursor>,
    /// How many, at most.
    pub max: usize,
}

/// The most runs of a page.
pub const MAX_PAGE: u32 = 1000;
const DEFAULT_PAGE: usize = 100;

impl TryFrom<Wire<v1::ListRequest>> for Listing {
    type Error = InvalidSpec;

    fn try_from(Wire(request): Wire<v1::ListRequest>) -> Result<Self, InvalidSpec> {
        let mut violations = Violations::default();
        let filter = RunFilter {
            tenant: None,
            states: request
                .states
                .iter()
                .enumerate()
                .filter_map(|(i, state)| violations.state(format!("states[{i}]"), *state))
                .collect(),
            backend: violations.parse_optional("backend", &request.backend),
            labels: request.labels.into_iter().collect::<BTreeMap<_, _>>(),
            created_from: violations.timestamp("created_after", request.created_after),
            created_until: violations.timestamp("created_before", request.created_before),
        };
        if filter.states.len() > 64 || filter.labels.len() > 64 {
            violations.add(
                if filter.states.len() > 64 { "states" } else { "labels" },
                "TOO_LARGE",
                "at most 64",
            );
        }
        if request.page_size > MAX_PAGE {
            violations.add("page_size", "TOO_LARGE", format!("must be at most {MAX_PAGE}"));
        }
        let after = if request.page_token.is_empty() { None } else { read_page_token(&request.page_token) };
        if after.is_none() && !request.page_token.is_empty() {
            violations.add("page_token", "INVALID", "is not a token of this service");
        }
        let max = match request.page_size {
            0 => DEFAULT_PAGE,
            size => usize::try_from(size).unwrap_or(DEFAULT_PAGE),
        };
        violations.finish(Self { filter, after, max })
    }
}

/// A page's end as a token.
pub fn page_token(cursor: PageCursor) -> String {
    format!("{}.{}", cursor.created.as_micros(), cursor.id)
}

fn read_page_token(token: &str) -> Option<PageCursor> {
    let (created, id) = token.split_once('.')?;
    let cursor = PageCursor { created: Timestamp::from_micros(created.parse().ok()?), id: id.parse().ok()? };
    (page_token(cursor) == token).then_some(cursor)
}

/// Most bytes of standard input that go on at once.
pub const STDIN_CHUNK: usize = 64 * 1024;

/// What a message of `Attach` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attachment {
    /// Names the run. The first message, and only that.
    Open(RunId),
    /// Something for the workload. Standard input may be longer than [`STDIN_CHUNK`].
    Input(WorkloadInput),
}

impl TryFrom<Wire<v1::AttachRequest>> for Attachment {
    type Error = InvalidSpec;

    fn try_from(Wire(request): Wire<v1::AttachRequest>) -> Result<Self, InvalidSpec> {
        use v1::attach_request::Message;
        let mut violations = Violations::default();
        let found = match request.message {
            Some(Message::Open(open)) => Self::Open(run_id("open.run_id", &open.run_id)?),
            Some(Message::Stdin(bytes)) => Self::Input(WorkloadInput::Stdin(bytes)),
            Some(Message::Eof(v1::AttachEof {})) => Self::Input(WorkloadInput::Eof),
            Some(Message::Resize(size)) => {
                Self::Input(WorkloadInput::Resize(spec::terminal_from_wire("resize", &size, &mut violations)))
            }
            None => {
                violations.add("message", "REQUIRED", "say what to do: `open`, `stdin`, `eof` or `resize`");
                Self::Input(WorkloadInput::Eof)
            }
        };
        violations.finish(found)
    }
}
