//! The shim's ends of the link: packets out, requests in. Never waits. See [`super::link`] for what goes over it.

use std::{
    cell::RefCell,
    collections::VecDeque,
    io::{IoSlice, Write as _},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    rc::Rc,
    time::Duration,
};

use runner_core::clock::{Clock as _, SystemClock};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
};
use serde::Serialize;

use super::{
    client::MAX_CONTROL_LINE,
    link::{self, HEAD, Kind, LinkReply, LinkRequest},
    protocol::{ControlReply, ControlRequest},
};

/// What may wait to be written. Beyond it frames are left out.
const MAX_QUEUED: usize = 1024 * 1024;
/// Beyond it replies are left out too: nobody has read for long.
const MAX_QUEUED_REPLIES: usize = MAX_QUEUED + 64 * 1024;
/// Requests for standard input that may wait for one another.
const MAX_WAITING: usize = 4;
/// What a pipe may hold where its user's share allows it.
const PIPE_BYTES: usize = 1024 * 1024;

/// The end that the shim writes to. Shared by the log and the loop, in one thread.
pub(crate) type SharedOut = Rc<RefCell<LinkOut>>;

/// The end that the shim writes to.
#[derive(Debug)]
pub(crate) struct LinkOut {
    /// `None`: nobody will ever read.
    pipe: Option<std::fs::File>,
    queue: VecDeque<u8>,
}

impl LinkOut {
    pub(crate) fn new(pipe: OwnedFd) -> Self {
        // It may be a terminal, a file or a pipe with other rights: smaller is slower, nothing else.
        let _ = rustix::pipe::fcntl_setpipe_size(&pipe, PIPE_BYTES);
        let pipe = rustix::io::ioctl_fionbio(&pipe, true).ok().map(|()| std::fs::File::from(pipe));
        Self { pipe, queue: VecDeque::new() }
    }

    /// Where to wait for room, while something waits for it.
    pub(crate) fn interest(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().filter(|_| !self.queue.is_empty()).map(std::os::fd::AsFd::as_fd)
    }

    /// Copies a frame, or leaves it out where too much waits already.
    pub(crate) fn frame(&mut self, header: &[u8], payload: &[u8]) {
        self.flush();
        let length = header.len() + payload.len();
        if self.pipe.is_none() || self.queue.len() + HEAD + length > MAX_QUEUED {
            return;
        }
        if let Some(head) = link::head(Kind::Frame, length, &[]) {
            self.send(&head, header, payload);
        }
    }

    /// Sends a record.
    pub(crate) fn record<T: Serialize>(&mut self, kind: Kind, record: &T) {
        self.flush();
        let Ok(payload) = serde_json::to_vec(record) else { return };
        if self.pipe.is_none() || self.queue.len() + payload.len() > MAX_QUEUED_REPLIES {
            return;
        }
        if let Some(head) = link::head(kind, payload.len(), &payload) {
            self.send(&head, &payload, &[]);
        }
    }

    fn send(&mut self, head: &[u8], one: &[u8], two: &[u8]) {
        let mut done = 0;
        if self.queue.is_empty()
            && let Some(pipe) = &mut self.pipe
        {
            match pipe.write_vectored(&[IoSlice::new(head), IoSlice::new(one), IoSlice::new(two)]) {
                Ok(count) => done = count,
                Err(error) if is_for_now(&error) => {}
                Err(_) => self.pipe = None,
            }
        }
        for part in [head, one, two] {
            let skip = done.min(part.len());
            self.queue.extend(&part[skip..]);
            done -= skip;
        }
    }

    /// Writes what can be written now.
    pub(crate) fn flush(&mut self) {
        while !self.queue.is_empty() {
            let Some(pipe) = &mut self.pipe else {
                self.queue.clear();
                return;
            };
            match pipe.write(self.queue.as_slices().0) {
                Ok(count) => drop(self.queue.drain(..count)),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if is_for_now(&error) => return,
                Err(_) => self.pipe = None,
            }
        }
    }

    /// Writes what waits, for at most `patience`: the last words.
    pub(crate) fn finish(&mut self, clock: &SystemClock, patience: Duration) {
        let end = clock.monotonic() + patience;
        loop {
            self.flush();
            let Some(fd) = self.interest() else { return };
            let left = end.saturating_sub(clock.monotonic());
            if left.is_zero() {
                return;
            }
            let timeout = Timespec {
                tv_sec: 0,
                tv_nsec: 100_000_000.min(left.as_nanos().try_into().unwrap_or(100_000_000)),
            };
            // Interrupted or not: the loop looks again.
            let _ = rustix::event::poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::OUT)], Some(&timeout));
        }
    }
}

fn is_for_now(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted)
}

/// The end that the shim reads from.
#[derive(Debug)]
pub(crate) struct LinkIn {
    /// `None`: nobody will ever write.
    pipe: Option<OwnedFd>,
    incoming: Vec<u8>,
    /// A line that was too long is passed over to its end.
    skipping: bool,
    /// Standard input, in order.
    waiting: VecDeque<LinkRequest>,
    ready: VecDeque<LinkRequest>,
    refused: Vec<LinkReply>,
}

impl LinkIn {
    pub(crate) fn new(pipe: OwnedFd) -> Self {
        let pipe = rustix::io::ioctl_fionbio(&pipe, true).ok().map(|()| pipe);
        Self {
            pipe,
            incoming: Vec::new(),
            skipping: false,
            waiting: VecDeque::new(),
            ready: VecDeque::new(),
            refused: Vec::new(),
        }
    }

    /// Where to wait for requests.
    pub(crate) fn interest(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(|pipe| pipe.as_fd())
    }

    /// Reads what can be read now.
    pub(crate) fn fill(&mut self) {
        let mut buffer = [0; 16 * 1024];
        while let Some(pipe) = &self.pipe {
            match rustix::io::read(pipe, &mut buffer) {
                Ok(0) => self.pipe = None,
                Ok(count) => {
                    self.incoming.extend_from_slice(&buffer[..count]);
                    self.split();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.pipe = None,
            }
        }
    }

    fn split(&mut self) {
        while let Some(end) = self.incoming.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.incoming.drain(..=end).collect();
            if std::mem::take(&mut self.skipping) {
                continue;
            }
            // What is no request was left unfinished by a sender that is gone: there is nobody to tell.
            let Ok(request) = serde_json::from_slice::<LinkRequest>(&line) else { continue };
            match &request.request {
                ControlRequest::Stdin(_) | ControlRequest::Eof if self.waiting.len() >= MAX_WAITING => {
                    let why = "the program does not read what was sent before".to_owned();
                    self.refused.push(LinkReply { id: request.id, reply: ControlReply::Refused(why) });
                }
                ControlRequest::Stdin(_) | ControlRequest::Eof => self.waiting.push_back(request),
                ControlRequest::Stop { .. } | ControlRequest::Resize(_) | ControlRequest::Release { .. } => {
                    self.ready.push_back(request)
                }
            }
        }
        if self.incoming.len() > MAX_CONTROL_LINE {
            self.incoming.clear();
            self.skipping = true;
        }
    }

    /// The next request that can be served. One for standard input waits while `input_busy`; no other waits for it.
    pub(crate) fn next_request(&mut self, input_busy: bool) -> Option<LinkRequest> {
        self.ready.pop_front().or_else(|| if input_busy { None } else { self.waiting.pop_front() })
    }

    /// What was refused without being served.
    pub(crate) fn take_refused(&mut self) -> Vec<LinkReply> {
        std::mem::take(&mut self.refused)
    }
}

#[cfg(test)]
mod tests {
    use runner_core::{
        clock::Timestamp,
        log::{LogStream, codec},
    };

    use super::{
        super::link::{LinkDecoder, LinkPacket, encode_request},
        *,
    };

    fn pipe() -> (OwnedFd, OwnedFd) {
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
    }

    fn request(id: u64, request: ControlRequest) -> bytes::Bytes {
        encode_request(&LinkRequest { id, request }).unwrap()
    }

    #[test]
    fn frames_that_do_not_fit_are_left_out_whole_and_records_still_come() {
        let (read, write) = pipe();
        let mut out = LinkOut::new(write);
        let payload = vec![7; 64 * 1024];
        let mut offset = 0;
        for _ in 0..200 {
            let header = codec::data_header(LogStream::Stdout, offset, Timestamp::default(), &payload);
            out.frame(&header, &payload);
            offset += payload.len() as u64;
        }
        assert!(out.interest().is_some());
        out.record(Kind::Reply, &LinkReply { id: 3, reply: ControlReply::Ok });
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            std::io::Read::read_to_end(&mut std::fs::File::from(read), &mut all).unwrap();
            all
        });
        out.finish(&SystemClock::new(), Duration::from_secs(30));
        assert!(out.interest().is_none(), "all that waited is written");
        drop(out);
        let mut decoder = LinkDecoder::default();
        decoder.push(&reader.join().unwrap());
        let packets: Vec<LinkPacket> = std::iter::from_fn(|| decoder.next_packet()).collect();
        let (last, frames) = packets.split_last().unwrap();
        assert!(matches!(last, LinkPacket::Reply(LinkReply { id: 3, .. })));
        assert!(!frames.is_empty() && frames.len() < 200, "{}", frames.len());
        for (number, packet) in frames.iter().enumerate() {
            let LinkPacket::Frame(frame) = packet else { panic!("{packet:?}") };
            assert_eq!(frame.offset, number as u64 * 65_536, "the first ones, whole and in order");
        }
    }

    #[test]
    fn nobody_listening_is_no_obstacle() {
        let (read, write) = pipe();
        drop(read);
        let mut out = LinkOut::new(write);
        // The test's own SIGPIPE is ignored, as the shim's is.
        out.record(Kind::Reply, &LinkReply { id: 3, reply: ControlReply::Ok });
        assert!(out.interest().is_none());
    }

    #[test]
    fn what_was_left_unfinished_spoils_nothing_and_a_stop_overtakes_input() {
        let (read, write) = pipe();
        let mut link = LinkIn::new(read);
        let stdin = |id| request(id, ControlRequest::Stdin(bytes::Bytes::from_static(b"x")));
        let torn = &stdin(1)[..10];
        for bytes in [torn, &stdin(2), &stdin(3), &request(4, ControlRequest::Stop { grace_ms: 5 })] {
            rustix::io::write(&write, bytes).unwrap();
        }
        link.fill();
        let mut next = |busy| link.next_request(busy).map(|request| request.id);
        assert_eq!(
            [next(true), next(true), next(false), next(false), next(false)],
            [Some(4), None, Some(2), Some(3), None]
        );
    }

    #[test]
    fn waiting_input_and_long_lines_are_bounded() {
        let (read, write) = pipe();
        let _ = rustix::pipe::fcntl_setpipe_size(&write, PIPE_BYTES);
        let mut link = LinkIn::new(read);
        rustix::io::write(&write, &vec![b'x'; MAX_CONTROL_LINE * 2]).unwrap();
        for id in 0..6 {
            rustix::io::write(&write, &request(id, ControlRequest::Eof)).unwrap();
        }
        link.fill();
        assert_eq!(link.take_refused().iter().map(|reply| reply.id).collect::<Vec<_>>(), [4, 5]);
        assert_eq!(link.next_request(false).map(|request| request.id), Some(0));
        assert!(link.incoming.is_empty());
    }
}
