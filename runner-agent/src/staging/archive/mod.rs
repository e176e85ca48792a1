//! Unpacks archives. Bombs and traps until proven otherwise.
//!
//! An archive is refused as a whole for the first thing in it that is not a regular file or a directory, that leads
//! elsewhere, that passes a cap, or on which two readers could disagree. Refused are, each with the entry's name:
//!
//! - absolute paths, `..`, names longer than a file system takes, paths deeper than [`StagingLimits::depth`];
//! - links of both kinds, devices, FIFOs, sparse and multi-volume entries; encryption;
//! - two entries at one place, and an entry below a file;
//! - a tar entry whose PAX and ustar sizes differ, a checksum that is wrong, a directory with contents, an extension header
//!   that describes nothing or repeats another; PAX records that are not well formed; global ones that rename or resize;
//! - a zip whose entries overlap one another or the directory, whose local headers differ from its directory, which has
//!   bytes before, behind or between its parts that it does not account for, or sizes that are not those of the data;
//! - an end that is missing, and anything but zeros behind a tar's end;
//! - more entries or bytes than the inputs may have together, and more than [`StagingLimits::archive_ratio`] times the
//!   bytes of the archive.
//!
//! An archive in an archive is a file like any other. Set-uid, set-gid and sticky bits, owners, times and extended
//! attributes are left out. Memory does not grow with the size of an entry: a tar takes one header, a decoder its window (at
//! most 32 MiB), a zip its directory (at most 32 MiB as stored); and 32 bytes for each entry, to find two of one name.

mod entries;
mod tar;
mod zip;

use std::{
    fmt,
    io::{self, Read, Seek},
    path::Path,
};

use runner_core::spec::Archive;

use self::entries::Entries;
pub use self::entries::Unpacked;
use super::{StagingErrorKind, StagingLimits};

/// Most bytes that a zstd decoder keeps, as a power of two: what `zstd -20` needs.
const ZSTD_WINDOW_LOG: u32 = 25;
/// What an archive may unpack to whatever its own size is.
const RATIO_SLACK: u64 = 64 << 20;

/// Where an archive's entries go. Each call is about a path that is relative, normal and new; a directory comes before what
/// is in it, and comes again where the archive says its mode later.
pub trait EntrySink {
    /// A directory. `mode`: `None` where the archive does not say.
    ///
    /// # Errors
    /// Those of the place where it goes.
    fn directory(&mut self, path: &Path, mode: Option<u32>) -> io::Result<()>;
    /// A file with its bytes, which end where the file does.
    ///
    /// # Errors
    /// Those of the place where it goes, and those of `bytes`.
    fn file(&mut self, path: &Path, mode: u32, bytes: &mut dyn Read) -> io::Result<()>;
}

/// What an archive may have.
#[derive(Debug, Clone, Copy)]
pub struct ArchiveCaps<'a> {
    /// Of everything that is staged.
    pub limits: &'a StagingLimits,
    /// Bytes that its files may have together.
    pub bytes: u64,
    /// Files and directories that it may have.
    pub entries: u64,
    /// Places that are left out, relative to the archive: something else lies there.
    pub hidden: &'a [&'a str],
    /// Permission bits of every file. `None`: those that the archive says.
    pub mode: Option<u32>,
}

/// Why an archive was not unpacked.
#[derive(Debug)]
pub struct ArchiveError {
    /// `Malformed`, `LimitExceeded`, `Conflict` or `Unsupported`: the archive's fault. `Local`: the sink's.
    pub kind: StagingErrorKind,
    /// What was seen, with the entry.
    pub what: String,
    /// What lies below.
    pub source: Option<io::Error>,
}

impl fmt::Display for ArchiveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for ArchiveError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source as _)
    }
}

impl ArchiveError {
    fn malformed(what: impl Into<String>) -> Self {
        Self { kind: StagingErrorKind::Malformed, what: what.into(), source: None }
    }

    fn limit(what: impl Into<String>) -> Self {
        Self { kind: StagingErrorKind::LimitExceeded, ..Self::malformed(what) }
    }

    /// A failed read of the archive: its own fault, unless the kernel says otherwise.
    fn reading(error: io::Error) -> Self {
        let error = match error.downcast::<Self>() {
            Ok(told) => return told,
            Err(error) => error,
        };
        let (kind, what) = match error.kind() {
            _ if error.raw_os_error().is_some() => (StagingErrorKind::Local, "read the archive"),
            io::ErrorKind::UnexpectedEof => (StagingErrorKind::Malformed, "the archive is truncated"),
            _ => (StagingErrorKind::Malformed, "the archive's data is damaged, or not of its format"),
        };
        Self { kind, what: what.to_owned(), source: Some(error) }
    }
}

/// Unpacks an archive of `packed` bytes. `archive` stands at its beginning.
///
/// # Errors
/// See [`ArchiveError`]. What came before the fault has gone to the sink.
pub fn unpack<R: Read + Seek>(
    format: Archive,
    archive: R,
    packed: u64,
    caps: &ArchiveCaps<'_>,
    sink: &mut dyn EntrySink,
) -> Result<Unpacked, ArchiveError> {
    let most = packed.saturating_mul(caps.limits.archive_ratio).saturating_add(RATIO_SLACK);
    let mut entries = Entries::new(caps, most, sink);
    match format {
        Archive::Tar => tar::unpack(io::BufReader::with_capacity(BUFFER, archive), &mut entries)?,
        Archive::TarGz => {
            let archive = io::BufReader::with_capacity(BUFFER, archive);
            let decoder = flate2::bufread::MultiGzDecoder::new(archive);
            tar::unpack(Inflated { decoder, left: most }, &mut entries)?;
        }
        Archive::TarZst => {
            let mut decoder = zstd::stream::read::Decoder::new(archive).map_err(ArchiveError::reading)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG).map_err(ArchiveError::reading)?;
            tar::unpack(Inflated { decoder, left: most }, &mut entries)?;
        }
        Archive::Zip => zip::unpack(archive, packed, &mut entries)?,
    }
    Ok(entries.finish())
}

const BUFFER: usize = 128 * 1024;

/// A decoder that does not yield more than its archive's size allows: padding and headers count, too.
struct Inflated<R> {
    decoder: R,
    left: u64,
}

impl<R: Read> Read for Inflated<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.decoder.read(buffer)?;
        match self.left.checked_sub(read as u64) {
            Some(left) => {
                self.left = left;
                Ok(read)
            }
            None => Err(io::Error::other(ratio())),
        }
    }
}

fn ratio() -> ArchiveError {
    ArchiveError::limit(
        "the archive unpacks to more than its size allows: it is compressed too well to be trusted",
    )
}
