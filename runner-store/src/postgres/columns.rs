//! PostgreSQL's rows, as the decoder wants them.

use runner_core::store::StoreError;
use tokio_postgres::{Row, types::FromSql};

use crate::row::{Columns, WrongType, to_json};

fn value<'a, T: FromSql<'a>>(row: &'a Row, at: usize) -> Result<Option<T>, WrongType> {
    row.try_get(at).map_err(|_| WrongType)
}

impl Columns for Row {
    fn int(&self, at: usize) -> Result<Option<i64>, WrongType> {
        value(self, at)
    }

    fn text(&self, at: usize) -> Result<Option<&str>, WrongType> {
        value(self, at)
    }

    fn bytes(&self, at: usize) -> Result<Option<&[u8]>, WrongType> {
        value(self, at)
    }

    fn prose(&self, at: usize) -> Result<Option<String>, WrongType> {
        let Some(json) = self.text(at)? else { return Ok(None) };
        serde_json::from_str(json).map(Some).map_err(|_| WrongType)
    }
}

/// Text of people, as it is stored. The same text is always the same column, so that it can be searched for.
pub(crate) fn prose(text: &str) -> Result<String, StoreError> {
    to_json(&text)
}
