//! The caller's terminal.

use std::io::{self, IsTerminal as _};

use rustix::termios::{self, OptionalActions, Termios};

use crate::failure::Failure;

/// Raw mode: every key goes to the program, as it is. Dropped, the terminal is as before.
#[derive(Debug)]
pub(crate) struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Enters it; `None` where standard input is not a terminal.
    pub(crate) fn enter() -> Result<Option<Self>, Failure> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let failed = |e: rustix::io::Errno| Failure::local("set the terminal to raw mode", &e.into());
        let before = termios::tcgetattr(&stdin).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(&stdin, OptionalActions::Drain, &raw).map_err(failed)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The terminal may be gone; then there is nothing to restore.
        let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

/// Columns and rows of the caller's terminal; `None` where it has none, or an unknown size.
pub(crate) fn size() -> Option<(u32, u32)> {
    let size = termios::tcgetwinsize(io::stdout()).or_else(|_| termios::tcgetwinsize(io::stdin())).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then(|| (size.ws_col.into(), size.ws_row.into()))
}
