//! Zip: stored and deflated entries.

use std::io::{self, BufReader, Read, Seek, SeekFrom};

use zip::{
    System, ZipArchive,
    read::{ArchiveOffset, Config},
    result::ZipError,
};

use super::{
    ArchiveError, BUFFER,
    entries::{Entries, show},
};
use crate::staging::StagingErrorKind;

const END_SIGNATURE: &[u8; 4] = b"PK\x05\x06";
const END_BYTES: u64 = 22;
const LOCATOR_SIGNATURE: &[u8; 4] = b"PK\x06\x07";
const LOCATOR_BYTES: u64 = 20;
const END64_SIGNATURE: &[u8; 4] = b"PK\x06\x06";
const END64_BYTES: u64 = 56;
const MAX_COMMENT: u64 = 0xffff;
/// Most bytes of a central directory: it is all held in memory.
const MAX_DIRECTORY: u64 = 32 << 20;

/// Where the central directory lies, as the archive's end says.
#[derive(Debug, PartialEq, Eq)]
struct Directory {
    entries: u64,
    start: u64,
    size: u64,
}

pub(super) fn unpack<R: Read + Seek>(
    mut archive: R,
    packed: u64,
    entries: &mut Entries<'_>,
) -> Result<(), ArchiveError> {
    // Looked at before the library does, which holds as many entries as the archive claims to have.
    let directory = find_directory(&mut archive, packed)?;
    if directory.entries > entries.entries_left() {
        let what = format!("the archive has {} entries, more than the inputs may have", directory.entries);
        return Err(ArchiveError::limit(what));
    }
    if directory.size > MAX_DIRECTORY {
        let what = format!("its directory has {} bytes, more than {MAX_DIRECTORY}", directory.size);
        return Err(ArchiveError::limit(what));
    }
    archive.seek(SeekFrom::Start(0)).map_err(ArchiveError::reading)?;
    let config = Config { archive_offset: ArchiveOffset::Known(0) };
    let reader = BufReader::with_capacity(BUFFER, archive);
    let mut archive = ZipArchive::with_config(config, reader).map_err(zip)?;
    if archive.has_duplicate_names() {
        let what = "two entries of the archive have one name";
        return Err(ArchiveError { kind: StagingErrorKind::Conflict, ..ArchiveError::malformed(what) });
    }
    if archive.len() as u64 != directory.entries || archive.central_directory_start() != directory.start {
        return Err(ArchiveError::malformed("the archive has more than one end"));
    }
    archive.validate_header_consistency().map_err(zip)?;
    for index in 0..archive.len() {
        let mut file = archive.by_index(index).map_err(zip)?;
        let name = file.name_raw().to_vec();
        let refuse = |what: &str| Err(ArchiveError::malformed(format!("{} is {what}", show(&name))));
        let mode = match file.system() {
            System::Unix => file.external_attributes() >> 16,
            _ => 0,
        };
        // As in `st_mode`. Zero where whoever packed it did not say.
        let named_directory = name.ends_with(b"/");
        match mode & 0o170_000 {
            0 => {}
            0o040_000 if named_directory => {}
            0o100_000 if !named_directory => {}
            0o120_000 => return refuse("a symbolic link; only files and directories are unpacked"),
            _ => return refuse("neither a file nor a directory, or not what its name says"),
        }
        let permissions = if mode & 0o777 == 0 && mode & 0o170_000 == 0 { None } else { Some(mode & 0o777) };
        let size = file.size();
        if named_directory {
            if size != 0 {
                return refuse("a directory with contents");
            }
            entries.directory(&name, permissions.unwrap_or(0o755))?;
            continue;
        }
        entries.file(&name, permissions.unwrap_or(0o644), size, &mut file)?;
        // The end of the data is also where its checksum is compared.
        match file.read(&mut [0]) {
            Ok(0) => {}
            Ok(_) => return refuse("larger than its size"),
            Err(error) => return Err(ArchiveError::reading(error)),
        }
    }
    Ok(())
}

fn zip(error: ZipError) -> ArchiveError {
    match error {
        ZipError::Io(error) => ArchiveError::reading(error),
        ZipError::UnsupportedArchive(what) => ArchiveError {
            kind: StagingErrorKind::Unsupported,
            ..ArchiveError::malformed(format!("the archive needs what is not supported: {what}"))
        },
        other => ArchiveError {
            source: Some(io::Error::other(other)),
            ..ArchiveError::malformed("the archive contradicts itself, or is not a zip archive")
        },
    }
}

/// Reads the end of the archive, which must be the end of the bytes.
fn find_directory<R: Read + Seek>(archive: &mut R, packed: u64) -> Result<Directory, ArchiveError> {
    let tail_start = packed.saturating_sub(END_BYTES + MAX_COMMENT);
    let tail = read_at(archive, tail_start, packed - tail_start)?;
    let end = (0..tail.len().saturating_sub(21))
        .rev()
        .find(|at| {
            let rest = &tail[*at..];
            rest.starts_with(END_SIGNATURE) && u64::from(u16_at(rest, 20)) + END_BYTES == rest.len() as u64
        })
        .ok_or_else(|| {
            ArchiveError::malformed(
                "the archive has no end: it is truncated, has something behind it, or is no zip",
            )
        })?;
    let end_start = tail_start + end as u64;
    let end = &tail[end..];
    if u16_at(end, 4) != u16_at(end, 6) || u16_at(end, 8) != u16_at(end, 10) {
        return Err(ArchiveError::malformed("the archive has several parts"));
    }
    let short = Directory {
        entries: u16_at(end, 10).into(),
        size: u32_at(end, 12).into(),
        start: u32_at(end, 16).into(),
    };
    let (directory, directory_end) = match read_end64(archive, end_start)? {
        Some((long, at)) => {
            // Each field of the short form is that of the long one, or says that it does not fit.
            let agrees = |short: u64, long: u64, full: u64| short == long || short == full;
            if !(agrees(short.entries, long.entries, 0xffff)
                && agrees(short.size, long.size, 0xffff_ffff)
                && agrees(short.start, long.start, 0xffff_ffff))
            {
                return Err(ArchiveError::malformed("the archive's two ends differ"));
            }
            (long, at)
        }
        None => (short, end_start),
    };
    if directory.start.checked_add(directory.size) != Some(directory_end) {
        return Err(ArchiveError::malformed("the archive's directory does not lie where its end says"));
    }
    // The least that an entry takes; a larger claim is a lie.
    if directory.entries > directory.size / 46 {
        return Err(ArchiveError::malformed(
            "the archive claims more entries than its directory has room for",
        ));
    }
    Ok(directory)
}

/// The zip64 form of the end, and where it lies. `None` where the archive has none.
fn read_end64<R: Read + Seek>(
    archive: &mut R,
    end_start: u64,
) -> Result<Option<(Directory, u64)>, ArchiveError> {
    let Some(locator_start) = end_start.checked_sub(LOCATOR_BYTES) else { return Ok(None) };
    let locator = read_at(archive, locator_start, LOCATOR_BYTES)?;
    if !locator.starts_with(LOCATOR_SIGNATURE) {
        return Ok(None);
    }
    let at = u64_at(&locator, 8);
    let fits = at.checked_add(END64_BYTES).is_some_and(|end| end <= locator_start);
    if !fits {
        return Err(ArchiveError::malformed("the archive's zip64 end does not lie where it says"));
    }
    let end = read_at(archive, at, END64_BYTES)?;
    let length = u64_at(&end, 4).saturating_add(12);
    if !end.starts_with(END64_SIGNATURE) || at.checked_add(length) != Some(locator_start) {
        return Err(ArchiveError::malformed("the archive's zip64 end does not lie where it says"));
    }
    if u64_at(&end, 24) != u64_at(&end, 32) {
        return Err(ArchiveError::malformed("the archive has several parts"));
    }
    Ok(Some((Directory { entries: u64_at(&end, 32), size: u64_at(&end, 40), start: u64_at(&end, 48) }, at)))
}

fn read_at<R: Read + Seek>(archive: &mut R, start: u64, length: u64) -> Result<Vec<u8>, ArchiveError> {
    archive.seek(SeekFrom::Start(start)).map_err(ArchiveError::reading)?;
    let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
    archive.read_exact(&mut bytes).map_err(ArchiveError::reading)?;
    Ok(bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
