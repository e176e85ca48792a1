//! What the loop does for those who call on the control socket: stop, input, size.

use std::time::Duration;

use bytes::Bytes;
use rustix::{
    io::Errno,
    termios::{SpecialCodeIndex, Winsize},
};

use super::{
    super::{
        control::{ConnectionId, PendingInput},
        link::Kind,
        protocol::{ControlReply, ControlRequest, ExitReason, NOT_YET},
        reader::SpoolReader,
    },
    Input, Watch,
};

impl Watch<'_> {
    /// Sends what waits to go over the link.
    pub(super) fn serve_link(&mut self) {
        let Some(link) = &self.parts.link else { return };
        let mut link = link.borrow_mut();
        link.flush();
        for reply in self.parts.control.take_link_replies() {
            link.record(Kind::Reply, &reply);
        }
    }

    pub(super) fn serve_control(&mut self) {
        self.parts.control.exchange();
        self.continue_input();
        while let Some((from, request)) = self.parts.control.next_request(self.pending.is_some()) {
            if let Some(reply) = self.serve(from, request) {
                self.parts.control.reply(from, &reply);
            }
            self.continue_input();
            // The next request of the same connection may have come with it.
            self.parts.control.exchange();
        }
    }

    /// Serves a request. `None`: the reply comes later.
    fn serve(&mut self, from: ConnectionId, request: ControlRequest) -> Option<ControlReply> {
        let refused = |why: &str| Some(ControlReply::Refused(why.to_owned()));
        match request {
            ControlRequest::Stop { grace_ms } => {
                self.stop(ExitReason::Stopped, Duration::from_millis(grace_ms));
                Some(ControlReply::Ok)
            }
            ControlRequest::Release { offset } => {
                match SpoolReader::open(self.parts.dir, offset).release(offset) {
                    Ok(_) => Some(ControlReply::Ok),
                    Err(error) => refused(&error.to_string()),
                }
            }
            ControlRequest::Resize(size) => {
                let Some(terminal) = &self.terminal else {
                    let coming = self.parts.spec.terminal.is_some() && self.seen.started.is_none();
                    return refused(if coming { NOT_YET } else { "there is no terminal" });
                };
                let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
                match rustix::termios::tcsetwinsize(terminal, size) {
                    Ok(()) => Some(ControlReply::Ok),
                    Err(error) => refused(&error.to_string()),
                }
            }
            ControlRequest::Stdin(bytes) => match self.parts.input {
                Input::Pipe(_) | Input::Terminal(_) => {
                    self.pending = Some(PendingInput { from, bytes, then_close: false });
                    None
                }
                Input::None if self.parts.spec.stdin => refused(NOT_YET),
                Input::None => refused("the run has no standard input"),
                Input::Closed => refused("standard input is closed"),
            },
            ControlRequest::Eof => match &self.parts.input {
                Input::Pipe(_) => {
                    self.pending = Some(PendingInput { from, bytes: Bytes::new(), then_close: true });
                    None
                }
                Input::Terminal(terminal) => match rustix::termios::tcgetattr(terminal) {
                    // As if it were typed: what it means is up to the terminal's mode.
                    Ok(mode) => {
                        let key = [mode.special_codes[SpecialCodeIndex::VEOF]];
                        let bytes = Bytes::copy_from_slice(&key);
                        self.pending = Some(PendingInput { from, bytes, then_close: false });
                        None
                    }
                    Err(error) => refused(&error.to_string()),
                },
                Input::None if self.parts.spec.stdin => refused(NOT_YET),
                Input::None => refused("the run has no standard input"),
                Input::Closed => Some(ControlReply::Ok),
            },
        }
    }

    fn continue_input(&mut self) {
        let Some(pending) = &mut self.pending else { return };
        let result = match &self.parts.input {
            Input::Pipe(fd) | Input::Terminal(fd) => pending.write(fd),
            Input::None | Input::Closed => Some(Err(Errno::PIPE)),
        };
        let Some(result) = result else { return };
        let (from, close) = (pending.from, pending.then_close || result.is_err());
        self.pending = None;
        if close {
            self.parts.input = Input::Closed;
        }
        let reply = match result {
            Ok(()) => ControlReply::Ok,
            Err(_) => ControlReply::Refused("the program has closed its standard input".to_owned()),
        };
        self.parts.control.reply(from, &reply);
    }
}
