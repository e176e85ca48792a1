//! SQLite's rows, as the decoder wants them.

use rusqlite::{Row, types::ValueRef};

use crate::row::{Columns, WrongType};

fn value<'a>(row: &'a Row<'_>, at: usize) -> Result<ValueRef<'a>, WrongType> {
    row.get_ref(at).map_err(|_| WrongType)
}

impl Columns for Row<'_> {
    fn int(&self, at: usize) -> Result<Option<i64>, WrongType> {
        value(self, at)?.as_i64_or_null().map_err(|_| WrongType)
    }

    fn text(&self, at: usize) -> Result<Option<&str>, WrongType> {
        value(self, at)?.as_str_or_null().map_err(|_| WrongType)
    }

    fn bytes(&self, at: usize) -> Result<Option<&[u8]>, WrongType> {
        value(self, at)?.as_blob_or_null().map_err(|_| WrongType)
    }

    fn prose(&self, at: usize) -> Result<Option<String>, WrongType> {
        Ok(self.text(at)?.map(str::to_owned))
    }
}
