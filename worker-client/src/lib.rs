//! The client of the workload runner: run something, follow it, take its results.
//!
//! ```no_run
//! use worker_client::{Client, Event, RunSpec};
//!
//! # async fn example() -> Result<(), worker_client::ClientError> {
//! let client = Client::connect("http://127.0.0.1:7600").await?;
//! let end = client
//!     .run_to_end(RunSpec::command(["sh", "-c", "echo hello; exit 7"]), |event| {
//!         if let Event::Log(frame) = event {
//!             assert_eq!(&frame.data[..], b"hello\n");
//!         }
//!     })
//!     .await?;
//! assert_eq!(end.exit_code(), Some(7));
//! # Ok(())
//! # }
//! ```
//!
//! What holds:
//!
//! - **Nothing runs twice.** [`Client::run`] chooses the run's id itself (or uses the caller's idempotency key), so the
//!   call is repeated safely when its answer is lost.
//! - **Streams are whole.** [`Client::stream`] goes on after a broken connection from the last event that it yielded. It
//!   checks the offsets of log frames: a byte is neither missing nor repeated, or the stream fails.
//! - **Transfers are verified.** Uploads and downloads are hashed while they stream. A download appears at its place
//!   only when it is whole. Memory is bounded whatever the size.
//! - **Errors are typed.** [`ClientError`] has a kind, the bad fields, and the service's reason code.
//!
//! Connections are plain HTTP: TLS comes with the authentication of callers.

mod artifacts;
mod attach;
mod beneath;
mod client;
mod clock;
pub mod convert;
mod download;
mod error;
mod http_client;
mod list;
mod manifest_path;
mod note;
mod operator;
mod outcome;
mod retry;
mod spec;
mod stream;
mod transfer;
mod upload;
mod walk;

pub use attach::{AttachInput, Attachment};
pub use client::{Builder, Client, RunHandle, RunOptions};
pub use download::Downloaded;
pub use error::{ClientError, ErrorKind, FieldViolation, QuotaViolation};
pub use list::ListFilter;
pub use manifest_path::manifest_path;
pub use outcome::Finished;
pub use retry::RetryPolicy;
/// The generated types of the contract, package `runner.v1`.
pub use runner_proto::v1 as proto;
pub use spec::RunSpec;
pub use stream::{Event, EventStream, StreamEvent, StreamOptions};
pub use transfer::{ProgressFn, SelectFn, TransferOptions, TransferProgress};
pub use upload::{UploadedFile, UploadedTree};
pub use walk::Irregular;

/// The example of the user documentation, compiled.
#[cfg(doctest)]
#[doc = include_str!("../../docs/clients.md")]
struct UserDocumentation;
