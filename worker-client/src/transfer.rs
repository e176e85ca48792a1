//! What uploads and downloads have in common: options, and the count of what has moved.

use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::walk::Irregular;

/// Bytes that are read, hashed and sent at once.
pub(crate) const CHUNK_BYTES: usize = 256 << 10;

/// How far a transfer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TransferProgress {
    /// Bytes that were moved.
    pub bytes_done: u64,
    /// Bytes that there are.
    pub bytes_total: u64,
    /// Files that are whole at their place.
    pub files_done: u64,
    /// Files that there are.
    pub files_total: u64,
}

/// Is called as bytes move, often and from several tasks. Must not block.
pub type ProgressFn = Arc<dyn Fn(TransferProgress) + Send + Sync>;

/// How files are moved.
#[derive(Clone)]
pub struct TransferOptions {
    progress: Option<ProgressFn>,
    pub(crate) parallelism: usize,
    pub(crate) irregular: Irregular,
    pub(crate) max_entries: usize,
    pub(crate) select: Option<SelectFn>,
    pub(crate) remember: Option<PathBuf>,
}

/// Says of a path in a tree, relative to its top, whether it is uploaded; a directory with all that is in it.
pub type SelectFn = Arc<dyn Fn(&str) -> bool + Send + Sync>;

impl Default for TransferOptions {
    /// 8 files at once, at most 100,000 files and directories, and what is neither is refused.
    fn default() -> Self {
        Self {
            progress: None,
            parallelism: 8,
            irregular: Irregular::Refuse,
            max_entries: 100_000,
            select: None,
            remember: None,
        }
    }
}

impl TransferOptions {
    /// Is told how far the transfer is.
    #[must_use]
    pub fn progress(mut self, on_progress: impl Fn(TransferProgress) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(on_progress));
        self
    }

    /// Files that move at once; at least 1.
    #[must_use]
    pub fn parallelism(mut self, files: usize) -> Self {
        self.parallelism = files.max(1);
        self
    }

    /// What becomes of symbolic links, devices, sockets and names that are not UTF-8 in a tree that is uploaded.
    #[must_use]
    pub fn irregular(mut self, irregular: Irregular) -> Self {
        self.irregular = irregular;
        self
    }

    /// Which files and directories of a tree are uploaded. What is left out is not looked at more than by its name.
    #[must_use]
    pub fn select(mut self, select: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        self.select = Some(Arc::new(select));
        self
    }

    /// A directory in which uploads that are under way are remembered, a small file each: the same upload, begun again by
    /// another process, goes on where the one before it ended. Notes older than two weeks are removed.
    #[must_use]
    pub fn remember(mut self, dir: impl Into<PathBuf>) -> Self {
        self.remember = Some(dir.into());
        self
    }

    /// Largest number of files and directories of an upload.
    #[must_use]
    pub fn max_entries(mut self, entries: usize) -> Self {
        self.max_entries = entries;
        self
    }
}

impl fmt::Debug for TransferOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransferOptions")
            .field("parallelism", &self.parallelism)
            .field("irregular", &self.irregular)
            .field("max_entries", &self.max_entries)
            .finish_non_exhaustive()
    }
}

/// Counts what moves.
#[derive(Clone)]
pub(crate) struct Tracker {
    counts: Arc<Counts>,
    progress: Option<ProgressFn>,
}

#[derive(Debug, Default)]
struct Counts {
    bytes_done: AtomicU64,
    files_done: AtomicU64,
    bytes_total: u64,
    files_total: u64,
}

impl Tracker {
    pub(crate) fn new(options: &TransferOptions, bytes_total: u64, files_total: u64) -> Self {
        let counts = Counts { bytes_total, files_total, ..Counts::default() };
        Self { counts: Arc::new(counts), progress: options.progress.clone() }
    }

    pub(crate) fn moved(&self, bytes: u64) {
        self.counts.bytes_done.fetch_add(bytes, Ordering::Relaxed);
        self.tell();
    }

    /// Of a file, `counted` bytes were moved as far as it looked, and `known` in truth.
    pub(crate) fn settle(&self, counted: u64, known: u64) {
        self.counts.bytes_done.fetch_add(known.saturating_sub(counted), Ordering::Relaxed);
        self.counts.bytes_done.fetch_sub(counted.saturating_sub(known), Ordering::Relaxed);
        self.tell();
    }

    pub(crate) fn file_done(&self) {
        self.counts.files_done.fetch_add(1, Ordering::Relaxed);
        self.tell();
    }

    fn tell(&self) {
        if let Some(progress) = &self.progress {
            progress(TransferProgress {
                bytes_done: self.counts.bytes_done.load(Ordering::Relaxed),
                bytes_total: self.counts.bytes_total,
                files_done: self.counts.files_done.load(Ordering::Relaxed),
                files_total: self.counts.files_total,
            });
        }
    }
}
