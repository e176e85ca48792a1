//! Tar: ustar, with PAX and GNU extension headers for long names.
//!
//! The `tar` crate reads the fields of a header. Which header belongs to what is decided here, because the answers of its
//! iterator hide what has to be checked: how long an extension is before it is read, and where two sizes differ.

use std::io::Read;

use tar::{EntryType, Header};

use super::{
    ArchiveError,
    entries::{Entries, show},
};

const BLOCK: usize = 512;
/// Most bytes of one extension header. A path has at most 4 KiB; the rest are attributes that are left out.
const MAX_EXTENSION: u64 = 1 << 20;
/// Octal digits of a ustar size reach so far; a larger one is in the PAX header alone.
const USTAR_SIZES: u64 = 1 << 33;

/// What extension headers say of the next entry.
#[derive(Default)]
struct Extension {
    /// Seen so far, so that none comes twice and none describes nothing.
    kinds: Vec<EntryType>,
    path: Option<Vec<u8>>,
    size: Option<u64>,
}

pub(super) fn unpack(mut archive: impl Read, entries: &mut Entries<'_>) -> Result<(), ArchiveError> {
    let mut extension = Extension::default();
    loop {
        let mut header = Header::new_old();
        if !read_block(&mut archive, header.as_mut_bytes())? {
            return Err(ArchiveError::malformed("the archive is truncated: it has no end"));
        }
        if is_zero(header.as_bytes()) {
            if !extension.kinds.is_empty() {
                return Err(ArchiveError::malformed("an extension header describes no entry"));
            }
            return end(archive);
        }
        check_sum(&header)?;
        let kind = header.entry_type();
        let size = header.entry_size().map_err(ArchiveError::reading)?;
        if kind.is_pax_global_extensions() {
            // Mostly a comment, of which commit this is.
            let records = read_extension(&mut archive, size)?;
            for record in PaxRecords(&records) {
                let (key, _) = record?;
                if changes_entries(key) {
                    let what = format!("a global extension header sets {} for every entry", show(key));
                    return Err(ArchiveError::malformed(what));
                }
            }
            continue;
        }
        if kind.is_pax_local_extensions() || kind.is_gnu_longname() || kind.is_gnu_longlink() {
            if extension.kinds.contains(&kind) {
                return Err(ArchiveError::malformed(
                    "two extension headers of one kind describe the same entry",
                ));
            }
            extension.kinds.push(kind);
            let bytes = read_extension(&mut archive, size)?;
            if kind.is_pax_local_extensions() {
                extension.read_pax(&bytes)?;
            } else if kind.is_gnu_longname() {
                let name = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
                extension.set_path(name)?;
            }
            continue;
        }
        one(&mut archive, &header, size, std::mem::take(&mut extension), entries)?;
    }
}

/// One entry that is no extension.
fn one(
    archive: &mut impl Read,
    header: &Header,
    ustar_size: u64,
    extension: Extension,
    entries: &mut Entries<'_>,
) -> Result<(), ArchiveError> {
    let name = match extension.path {
        Some(path) => path,
        None => header.path_bytes().into_owned(),
    };
    let refuse = |what: &str| Err(ArchiveError::malformed(format!("{} is {what}", show(&name))));
    let size = match extension.size {
        // What does not fit into the header is zero there, or what was left of it.
        Some(size) if size != ustar_size && (size < USTAR_SIZES || ustar_size != 0) => {
            let what =
                format!("an entry with two sizes, {size} by its PAX header and {ustar_size} by its own");
            return refuse(&what);
        }
        Some(size) => size,
        None => ustar_size,
    };
    let mode = header.mode().map_err(ArchiveError::reading)?;
    // Before there was a type for directories, they were files whose names end with a slash.
    let named_directory = name.ends_with(b"/");
    match header.entry_type() {
        EntryType::Directory | EntryType::Regular | EntryType::Continuous
            if named_directory || header.entry_type().is_dir() =>
        {
            if size != 0 {
                return refuse("a directory with contents");
            }
            entries.directory(&name, mode)
        }
        EntryType::Regular | EntryType::Continuous => {
            entries.file(&name, mode, size, archive)?;
            skip_padding(archive, size)
        }
        EntryType::Symlink => refuse("a symbolic link; only files and directories are unpacked"),
        EntryType::Link => refuse("a hard link; only files and directories are unpacked"),
        EntryType::Char | EntryType::Block => refuse("a device; only files and directories are unpacked"),
        EntryType::Fifo => refuse("a FIFO; only files and directories are unpacked"),
        EntryType::GNUSparse => refuse("a sparse entry of GNU tar, which other readers do not see as one"),
        other => {
            let what = format!("an entry of the unknown type {:?}", char::from(other.as_byte()));
            refuse(&what)
        }
    }
}

impl Extension {
    fn read_pax(&mut self, bytes: &[u8]) -> Result<(), ArchiveError> {
        for record in PaxRecords(bytes) {
            let (key, value) = record?;
            match key {
                b"path" => self.set_path(value)?,
                b"size" => {
                    let size = std::str::from_utf8(value)
                        .ok()
                        .filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))
                        .and_then(|text| text.parse().ok());
                    let size = size.ok_or_else(|| ArchiveError::malformed("a PAX header has a bad size"))?;
                    if self.size.replace(size).is_some() {
                        return Err(ArchiveError::malformed("a PAX header has two sizes"));
                    }
                }
                key if key.starts_with(b"GNU.sparse.") => {
                    return Err(ArchiveError::malformed(
                        "a sparse entry, which other readers do not see as one",
                    ));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn set_path(&mut self, path: &[u8]) -> Result<(), ArchiveError> {
        if path.is_empty() || path.contains(&0) {
            return Err(ArchiveError::malformed("an extension header has an empty path, or NUL in it"));
        }
        match self.path.replace(path.to_vec()) {
            None => Ok(()),
            Some(_) => Err(ArchiveError::malformed("an entry has two long names")),
        }
    }
}

/// Keys that change where an entry lies or what it is.
fn changes_entries(key: &[u8]) -> bool {
    matches!(key, b"path" | b"size" | b"linkpath") || key.starts_with(b"GNU.sparse.")
}

/// The records of a PAX header: `LENGTH KEY=VALUE\n`, by their lengths, because a value may have newlines in it.
struct PaxRecords<'a>(&'a [u8]);

impl<'a> Iterator for PaxRecords<'a> {
    type Item = Result<(&'a [u8], &'a [u8]), ArchiveError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let record = self.record();
        if record.is_none() {
            self.0 = &[];
        }
        Some(record.ok_or_else(|| ArchiveError::malformed("a PAX header is not well formed")))
    }
}

impl<'a> PaxRecords<'a> {
    fn record(&mut self) -> Option<(&'a [u8], &'a [u8])> {
        let digits = self.0.iter().take(20).position(|byte| *byte == b' ')?;
        let text = std::str::from_utf8(&self.0[..digits]).ok()?;
        let length: usize = text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())??;
        let record = self.0.get(..length)?;
        let body = record.get(digits + 1..)?.strip_suffix(b"\n")?;
        let equals = body.iter().position(|byte| *byte == b'=')?;
        self.0 = &self.0[length..];
        Some((&body[..equals], &body[equals + 1..]))
    }
}

fn read_extension(archive: &mut impl Read, size: u64) -> Result<Vec<u8>, ArchiveError> {
    if size > MAX_EXTENSION {
        return Err(ArchiveError::limit(format!(
            "an extension header has {size} bytes, more than {MAX_EXTENSION}"
        )));
    }
    let mut bytes = Vec::new();
    archive.take(size).read_to_end(&mut bytes).map_err(ArchiveError::reading)?;
    if bytes.len() as u64 != size {
        return Err(ArchiveError::malformed("the archive is truncated"));
    }
    skip_padding(archive, size)?;
    Ok(bytes)
}

/// What fills an entry's last block.
fn skip_padding(archive: &mut impl Read, size: u64) -> Result<(), ArchiveError> {
    let mut padding = [0; BLOCK];
    let used = usize::try_from(size % BLOCK as u64).unwrap_or_default();
    if used == 0 {
        return Ok(());
    }
    archive.read_exact(&mut padding[used..]).map_err(ArchiveError::reading)
}

/// False where the archive ends before the block.
fn read_block(archive: &mut impl Read, block: &mut [u8]) -> Result<bool, ArchiveError> {
    let mut filled = 0;
    while filled < block.len() {
        match archive.read(&mut block[filled..]) {
            Ok(0) if filled == 0 => return Ok(false),
            Ok(0) => return Err(ArchiveError::malformed("the archive is truncated")),
            Ok(read) => filled += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(ArchiveError::reading(error)),
        }
    }
    Ok(true)
}

/// Behind the end there is padding, of zeros. Reading it all also makes a decoder check its own end.
fn end(mut archive: impl Read) -> Result<(), ArchiveError> {
    let mut rest = [0; 16 * BLOCK];
    loop {
        match archive.read(&mut rest) {
            Ok(0) => return Ok(()),
            Ok(read) if is_zero(&rest[..read]) => {}
            Ok(_) => return Err(ArchiveError::malformed("there is something behind the archive's end")),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(ArchiveError::reading(error)),
        }
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

fn check_sum(header: &Header) -> Result<(), ArchiveError> {
    let bytes = header.as_bytes();
    let sum = bytes[..148].iter().chain(&bytes[156..]).map(|byte| u32::from(*byte)).sum::<u32>() + 8 * 32;
    match header.cksum() {
        Ok(told) if told == sum => Ok(()),
        _ => Err(ArchiveError::malformed("a header's checksum is wrong: damaged, or not a tar archive")),
    }
}
