//! One input file on its way: read, hashed, written aside, and put into place once it is whole and right.

use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::AsFd as _,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use futures::TryStreamExt as _;
use runner_core::{
    backend::{Direction, Progress, ProgressSink},
    spec::User,
};
use sha2::{Digest as _, Sha256};

use super::{
    InputStaging, Root, StagingError, StagingErrorKind,
    error::About,
    fetch::blocking,
    root::set_owner_and_mode,
    source::{self, Opened},
    tree::StagedFile,
};

/// A file of at most this size is hashed, written and put into place in one trip to a blocking thread.
const SMALL: usize = 64 * 1024;

/// Counts what was transferred, and tells.
pub(super) struct Counter<'a> {
    pub(super) sink: &'a dyn ProgressSink,
    /// Of those whose size is known.
    pub(super) total: AtomicU64,
    pub(super) files_total: u64,
    pub(super) bytes: AtomicU64,
    pub(super) files: AtomicU64,
}

impl Counter<'_> {
    pub(super) fn tell(&self) {
        self.sink.progress(Progress {
            direction: Direction::Input,
            bytes_done: self.bytes.load(Ordering::Relaxed),
            bytes_total: self.total.load(Ordering::Relaxed),
            files_done: self.files.load(Ordering::Relaxed),
            files_total: self.files_total,
        });
    }
}

/// Brings one file to its place. Answers its size.
pub(super) async fn stage_file(
    job: &InputStaging<'_>,
    partial: PathBuf,
    file: StagedFile,
    counter: &Counter<'_>,
) -> Result<u64, StagingError> {
    let about = About::input(file.input);
    let Opened { size, mut bytes } = source::open(job, &file, &about).await?;
    if file.size.is_none() {
        counter.total.fetch_add(size.unwrap_or_default(), Ordering::Relaxed);
    }
    let mut sink = Sink::new(job.root.clone(), partial, file, job.owner);
    while let Some(chunk) = bytes.try_next().await? {
        let length = chunk.len() as u64;
        if let Some(size) = size
            && sink.done.saturating_add(length) > size
        {
            let what = format!("read {}: it has more than the {size} bytes promised", sink.what());
            return Err(about.error(StagingErrorKind::Mismatch, what));
        }
        // Sizes that were known were added up before anything was read.
        let all = counter.bytes.fetch_add(length, Ordering::Relaxed).saturating_add(length);
        if sink.file.size.is_none() && all > job.limits.input_bytes {
            let what = format!("the inputs have more than {} bytes together", job.limits.input_bytes);
            return Err(about.error(StagingErrorKind::LimitExceeded, what));
        }
        // A small file costs one trip to a blocking thread, at its end.
        if sink.held.is_none() && sink.done == 0 && chunk.len() <= SMALL {
            sink.hold(chunk);
        } else {
            sink = blocking(&about, format!("write {}", sink.what()), move || sink.write(chunk)).await?;
        }
        counter.tell();
    }
    let done = sink.done;
    if let Some(size) = size
        && done != size
    {
        let what = format!("read {}: it ended after {done} of {size} bytes", sink.what());
        return Err(about.error(StagingErrorKind::Unavailable, what));
    }
    let seen = blocking(&about, format!("write {}", sink.what()), move || sink.finish()).await?;
    if let Some((promised, found, what)) = seen {
        let what = format!("read {what}: its SHA-256 is {found}, not {promised}");
        return Err(about.error(StagingErrorKind::Mismatch, what));
    }
    counter.files.fetch_add(1, Ordering::Relaxed);
    counter.tell();
    Ok(done)
}

/// A file on its way: written aside, hashed, and renamed to its place once it is whole and right.
struct Sink {
    root: Root,
    partial: PathBuf,
    file: StagedFile,
    owner: Option<User>,
    open: Option<File>,
    hasher: Sha256,
    /// Taken so far, held bytes included.
    done: u64,
    /// A first, small chunk that is not written yet.
    held: Option<Bytes>,
}

impl Sink {
    fn new(root: Root, partial: PathBuf, file: StagedFile, owner: Option<User>) -> Self {
        Self { root, partial, file, owner, open: None, hasher: Sha256::new(), done: 0, held: None }
    }

    fn what(&self) -> String {
        self.file.source.to_string()
    }

    fn hold(&mut self, chunk: Bytes) {
        self.done += chunk.len() as u64;
        self.held = Some(chunk);
    }

    fn write(mut self, chunk: Bytes) -> io::Result<Self> {
        self.flush()?;
        self.done += chunk.len() as u64;
        self.append(&chunk)?;
        Ok(self)
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.held.take() {
            Some(held) => self.append(&held),
            None => Ok(()),
        }
    }

    fn append(&mut self, chunk: &[u8]) -> io::Result<()> {
        self.hasher.update(chunk);
        self.opened()?.write_all(chunk)
    }

    fn opened(&mut self) -> io::Result<&mut File> {
        match self.open {
            Some(ref mut file) => Ok(file),
            None => Ok(self.open.insert(self.root.create_file(&self.partial, 0o600)?)),
        }
    }

    /// Puts the file at its place. Answers (promised, found, what) where the digest is wrong; then it is not there.
    fn finish(mut self) -> io::Result<Option<(String, String, String)>> {
        self.flush()?;
        self.opened()?;
        let found = hex::encode(std::mem::take(&mut self.hasher).finalize());
        if let Some(promised) = self.file.sha256.take()
            && promised != found
        {
            return Ok(Some((promised, found, self.what())));
        }
        let (owner, mode) = (self.owner, self.file.mode);
        set_owner_and_mode(self.opened()?.as_fd(), owner, mode)?;
        self.open = None;
        self.root.rename(&self.partial, &self.file.at)?;
        Ok(None)
    }
}

impl Drop for Sink {
    /// Leaves no partial file where the transfer failed.
    fn drop(&mut self) {
        if self.open.take().is_some() {
            // Best effort: the next staging clears the directory anyway.
            let _ = self.root.remove_file(&self.partial);
        }
    }
}
