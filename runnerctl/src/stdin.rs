//! Standard input and terminal sizes on their way to a run.

use std::fmt;

use bytes::{Bytes, BytesMut};
use tokio::{
    io::AsyncReadExt as _,
    signal::unix::{SignalKind, signal},
};
use worker_client::{AttachInput, Client, ClientError, ErrorKind};

use crate::{failure::Failure, terminal, value::DetachKeys};

/// Bytes that are read at once.
const PIECE_BYTES: usize = 32 << 10;

/// Why the input ended before the run did.
#[derive(Debug)]
pub(crate) enum InputEnd {
    /// The detach keys.
    Detached,
    /// The run takes none any more, or never did. Its output goes on.
    Closed,
    /// The connection broke; what was sent is not sent again.
    Broken(ClientError),
}

/// What is sent.
#[derive(Debug, Clone)]
pub(crate) struct InputOptions {
    /// The run's terminal has the size of the caller's, and the detach keys are looked for.
    pub(crate) terminal: bool,
    pub(crate) detach_keys: DetachKeys,
}

/// Sends standard input until it ends, and then waits until the run closes its side.
pub(crate) async fn pump(client: &Client, run_id: &str, options: InputOptions) -> Result<InputEnd, Failure> {
    let mut attachment = match client.attach(run_id).await {
        Ok(attachment) => attachment,
        Err(error) => return Ok(ended(error)),
    };
    let input = attachment.input();
    let send = send(input, options);
    tokio::pin!(send);
    let mut sending = true;
    loop {
        tokio::select! {
            end = &mut send, if sending => match end? {
                Sent::Detached => return Ok(InputEnd::Detached),
                Sent::All | Sent::Closed => sending = false,
            },
            taken = attachment.acknowledged() => match taken {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(InputEnd::Closed),
                Err(error) => return Ok(ended(error)),
            },
        }
    }
}

fn ended(error: ClientError) -> InputEnd {
    match error.kind() {
        ErrorKind::FailedPrecondition => InputEnd::Closed,
        _ => InputEnd::Broken(error),
    }
}

enum Sent {
    /// Everything, up to the end of standard input.
    All,
    /// The run takes no more.
    Closed,
    Detached,
}

async fn send(mut input: AttachInput, options: InputOptions) -> Result<Sent, Failure> {
    let mut stdin = tokio::io::stdin();
    let mut resized = signal(SignalKind::window_change()).map_err(|e| Failure::local("catch signals", &e))?;
    let mut detector = Detector::new(options.detach_keys.clone());
    let mut buffer = BytesMut::with_capacity(PIECE_BYTES);
    if options.terminal
        && let Some((columns, rows)) = terminal::size()
        && input.resize(columns, rows).await.is_err()
    {
        return Ok(Sent::Closed);
    }
    loop {
        buffer.reserve(PIECE_BYTES);
        tokio::select! {
            read = stdin.read_buf(&mut buffer) => {
                let read = read.map_err(|e| Failure::local("read standard input", &e))?;
                if read == 0 {
                    return Ok(if input.eof().await.is_ok() { Sent::All } else { Sent::Closed });
                }
                let piece = buffer.split().freeze();
                let (piece, detached) = if options.terminal { detector.filter(piece) } else { (piece, false) };
                if input.stdin(piece).await.is_err() {
                    return Ok(Sent::Closed);
                }
                if detached {
                    return Ok(Sent::Detached);
                }
            }
            _ = resized.recv(), if options.terminal => {
                if let Some((columns, rows)) = terminal::size()
                    && input.resize(columns, rows).await.is_err()
                {
                    return Ok(Sent::Closed);
                }
            }
        }
    }
}

/// Finds the detach keys in what is typed, across reads. What turns out not to be them is sent on.
struct Detector {
    keys: DetachKeys,
    matched: usize,
}

impl Detector {
    fn new(keys: DetachKeys) -> Self {
        Self { keys, matched: 0 }
    }

    /// What is to be sent, and whether the keys were found.
    fn filter(&mut self, typed: Bytes) -> (Bytes, bool) {
        let keys = &self.keys.0;
        if keys.is_empty() || (self.matched == 0 && !typed.contains(&keys[0])) {
            return (typed, false);
        }
        let mut out = BytesMut::with_capacity(typed.len() + self.matched);
        for byte in typed {
            if byte == keys[self.matched] {
                self.matched += 1;
                if self.matched == keys.len() {
                    self.matched = 0;
                    return (out.freeze(), true);
                }
            } else {
                out.extend_from_slice(&keys[..self.matched]);
                self.matched = usize::from(byte == keys[0]);
                if self.matched == 0 {
                    out.extend_from_slice(&[byte]);
                }
            }
        }
        (out.freeze(), false)
    }
}

impl fmt::Debug for Detector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What is typed may be a password: not even how far it matches is shown.
        f.debug_struct("Detector").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn type_in(pieces: &[&[u8]]) -> (Vec<u8>, bool) {
        let mut detector = Detector::new(DetachKeys::default());
        let mut sent = Vec::new();
        for piece in pieces {
            let (out, detached) = detector.filter(Bytes::copy_from_slice(piece));
            sent.extend_from_slice(&out);
            if detached {
                return (sent, true);
            }
        }
        (sent, false)
    }

    #[test]
    fn detach_keys_are_found_across_reads_and_nothing_else_is_lost() {
        assert_eq!(type_in(&[b"ls\x10\x11more"]), (b"ls".to_vec(), true));
        assert_eq!(type_in(&[b"ls\x10", b"\x11"]), (b"ls".to_vec(), true));
        assert_eq!(type_in(&[b"\x10", b"x", b"\x11"]), (b"\x10x\x11".to_vec(), false));
        assert_eq!(type_in(&[b"\x10\x10\x11"]), (b"\x10".to_vec(), true));
        assert_eq!(type_in(&[b"plain"]), (b"plain".to_vec(), false));
    }
}
