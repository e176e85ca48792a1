//! The engine: the few requests that are made of it, each with a time limit and a typed failure.

mod client;
mod failure;
mod transport;

pub(crate) use self::client::Attached;
pub use self::{
    client::Engine,
    failure::{EngineError, EngineErrorKind},
};
