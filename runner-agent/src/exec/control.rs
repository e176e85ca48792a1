//! The shim's side of the control socket: bounded in connections and line length, never waits.
//!
//! A connection makes one request after the other. Standard input is taken by one connection at a time: a second one's
//! bytes wait in its socket until the first one's are in the pipe, and are never interleaved with them.

use std::{
    collections::VecDeque,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use bytes::{Buf as _, Bytes};
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};

use super::{
    client::MAX_CONTROL_LINE,
    link::{LinkReply, LinkRequest},
    link_out::LinkIn,
    protocol::{ControlReply, ControlRequest, name},
};

/// Connections beyond this are closed at once.
const MAX_CONNECTIONS: usize = 8;

/// The socket's address, by way of the directory's descriptor: an address has room for 108 bytes, a path may be longer.
pub(crate) fn address(dir: &OwnedFd) -> PathBuf {
    Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name::CONTROL)
}

/// The listening socket and its connections.
#[derive(Debug)]
pub(crate) struct Control {
    listener: OwnedFd,
    connections: Vec<Connection>,
    next_id: u64,
    link: Option<LinkIn>,
    link_replies: Vec<LinkReply>,
}

/// Names a connection, so that a reply can wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConnectionId {
    /// Of the socket.
    Socket(u64),
    /// A request of the link.
    Link(u64),
}

#[derive(Debug)]
struct Connection {
    id: ConnectionId,
    socket: OwnedFd,
    incoming: Vec<u8>,
    outgoing: VecDeque<u8>,
    /// A request was taken and is not answered.
    busy: bool,
    /// The other side sends no more. Its requests are still answered.
    ended: bool,
    closed: bool,
}

/// What is to be polled of a connection.
#[derive(Debug)]
pub(crate) struct Interest<'a> {
    pub(crate) socket: BorrowedFd<'a>,
    pub(crate) read: bool,
    pub(crate) write: bool,
}

impl Control {
    /// Binds the socket in the attempt's directory, for the owner only.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn bind(dir: &OwnedFd) -> Result<Self, Errno> {
        let listener = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        // The mode must hold from the first moment, so it is the mask that sets it.
        let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
        let bound = rustix::net::bind(&listener, &SocketAddrUnix::new(address(dir))?);
        rustix::process::umask(mask);
        bound?;
        rustix::net::listen(&listener, 16)?;
        Ok(Self { listener, connections: Vec::new(), next_id: 0, link: None, link_replies: Vec::new() })
    }

    /// Takes requests from the link too.
    pub(crate) fn serve_link(&mut self, link: Option<LinkIn>) {
        self.link = link;
    }

    /// Where to wait for the link's requests.
    pub(crate) fn link_interest(&self) -> Option<BorrowedFd<'_>> {
        self.link.as_ref().and_then(LinkIn::interest)
    }

    /// Replies that are to go over the link.
    pub(crate) fn take_link_replies(&mut self) -> Vec<LinkReply> {
        std::mem::take(&mut self.link_replies)
    }

    pub(crate) fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// What to poll. A connection of which nothing is wanted is left out, for a poll would report its hang-up for ever.
    pub(crate) fn interests(&self) -> impl Iterator<Item = Interest<'_>> {
        self.connections
            .iter()
            .map(|connection| Interest {
                socket: connection.socket.as_fd(),
                read: connection.wants_more(),
                write: !connection.outgoing.is_empty(),
            })
            .filter(|interest| interest.read || interest.write)
    }

    /// Takes new connections.
    pub(crate) fn accept(&mut self) {
        while let Ok(socket) =
            rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
        {
            // One too many is dropped, which closes it.
            if self.connections.len() < MAX_CONNECTIONS {
                let id = ConnectionId::Socket(self.next_id);
                self.next_id += 1;
                self.connections.push(Connection {
                    id,
                    socket,
                    incoming: Vec::new(),
                    outgoing: VecDeque::new(),
                    busy: false,
                    ended: false,
                    closed: false,
                });
            }
        }
    }

    /// Reads and writes what can be read and written without waiting.
    pub(crate) fn exchange(&mut self) {
        if let Some(link) = &mut self.link {
            link.fill();
            self.link_replies.extend(link.take_refused());
        }
        for connection in &mut self.connections {
            connection.flush();
            connection.fill();
        }
        self.connections.retain(|connection| !connection.is_over());
    }

    /// The next whole request. One for standard input is left in its place while `input_busy`. Malformed ones are answered
    /// here.
    pub(crate) fn next_request(&mut self, input_busy: bool) -> Option<(ConnectionId, ControlRequest)> {
        if let Some(LinkRequest { id, request }) =
            self.link.as_mut().and_then(|link| link.next_request(input_busy))
        {
            return Some((ConnectionId::Link(id), request));
        }
        for connection in &mut self.connections {
            while !connection.busy {
                let Some(end) = connection.incoming.iter().position(|&byte| byte == b'\n') else {
                    if connection.incoming.len() >= MAX_CONTROL_LINE {
                        connection.answer(&ControlReply::Refused("the line is too long".to_owned()));
                        connection.flush();
                        connection.closed = true;
                    }
                    break;
                };
                match serde_json::from_slice(&connection.incoming[..end]) {
                    Ok(ControlRequest::Stdin(_) | ControlRequest::Eof) if input_busy => break,
                    Ok(request) => {
                        connection.incoming.drain(..=end);
                        connection.busy = true;
                        return Some((connection.id, request));
                    }
                    Err(error) => {
                        connection.incoming.drain(..=end);
                        connection.answer(&ControlReply::Refused(format!("malformed: {error}")));
                    }
                }
            }
        }
        self.connections.retain(|connection| !connection.is_over());
        None
    }

    /// Answers a taken request. The connection may be gone.
    pub(crate) fn reply(&mut self, id: ConnectionId, reply: &ControlReply) {
        if let ConnectionId::Link(id) = id {
            self.link_replies.push(LinkReply { id, reply: reply.clone() });
            return;
        }
        if let Some(connection) = self.connections.iter_mut().find(|connection| connection.id == id) {
            connection.busy = false;
            connection.answer(reply);
            connection.flush();
        }
    }
}

impl Connection {
    /// One that waits for its reply, or whose request waits for its turn, is not read: the sender is held back.
    fn wants_more(&self) -> bool {
        !self.busy && !self.ended && !self.closed && !self.incoming.contains(&b'\n')
    }

    fn is_over(&self) -> bool {
        self.closed || self.ended && !self.busy && self.outgoing.is_empty() && !self.incoming.contains(&b'\n')
    }

    fn answer(&mut self, reply: &ControlReply) {
        // A sender that does not read its answers is not kept.
        if self.outgoing.len() > 4 * MAX_CONTROL_LINE {
            self.closed = true;
            return;
        }
        // A reply is two words or a text: it always has a JSON form.
        self.outgoing.extend(serde_json::to_vec(reply).unwrap_or_default());
        self.outgoing.push_back(b'\n');
    }

    fn flush(&mut self) {
        while !self.outgoing.is_empty() && !self.closed {
            match rustix::io::write(&self.socket, self.outgoing.as_slices().0) {
                Ok(count) => {
                    self.outgoing.drain(..count);
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(_) => self.closed = true,
            }
        }
    }

    fn fill(&mut self) {
        let mut buffer = [0; 16 * 1024];
        while self.wants_more() && self.incoming.len() < MAX_CONTROL_LINE {
            match rustix::io::read(&self.socket, &mut buffer) {
                Ok(0) => self.ended = true,
                Ok(count) => self.incoming.extend_from_slice(&buffer[..count]),
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(_) => self.closed = true,
            }
        }
    }
}

/// Bytes on their way to standard input.
#[derive(Debug)]
pub(crate) struct PendingInput {
    pub(crate) from: ConnectionId,
    pub(crate) bytes: Bytes,
    /// Close the pipe when they are written.
    pub(crate) then_close: bool,
}

impl PendingInput {
    /// Writes what can be written without waiting. `Some`: it is done, with this result.
    pub(crate) fn write(&mut self, to: &OwnedFd) -> Option<Result<(), Errno>> {
        while !self.bytes.is_empty() {
            match rustix::io::write(to, &self.bytes) {
                Ok(count) => self.bytes.advance(count),
                Err(Errno::AGAIN) => return None,
                Err(Errno::INTR) => {}
                Err(error) => return Some(Err(error)),
            }
        }
        Some(Ok(()))
    }
}
