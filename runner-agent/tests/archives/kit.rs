//! Builds archives, and unpacks them into memory.

use std::{
    collections::BTreeMap,
    io::{self, Cursor, Read, Write as _},
    path::Path,
};

use runner_agent::staging::{
    StagingErrorKind, StagingLimits,
    archive::{ArchiveCaps, ArchiveError, EntrySink, Unpacked, unpack},
};
use runner_core::spec::Archive;

/// What came out: path → (mode, bytes); a directory has none.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Memory(pub(crate) BTreeMap<String, (Option<u32>, Option<Vec<u8>>)>);

impl EntrySink for Memory {
    fn directory(&mut self, path: &Path, mode: Option<u32>) -> io::Result<()> {
        check(path);
        self.0.insert(path.to_string_lossy().into_owned(), (mode, None));
        Ok(())
    }

    fn file(&mut self, path: &Path, mode: u32, bytes: &mut dyn Read) -> io::Result<()> {
        check(path);
        let mut all = Vec::new();
        bytes.read_to_end(&mut all)?;
        let before = self.0.insert(path.to_string_lossy().into_owned(), (Some(mode), Some(all)));
        assert!(before.is_none(), "{path:?} comes twice");
        Ok(())
    }
}

/// What every sink may rely on.
fn check(path: &Path) {
    assert!(path.is_relative() && path.components().count() > 0, "{path:?}");
    assert!(path.components().all(|part| matches!(part, std::path::Component::Normal(_))), "{path:?}");
}

pub(crate) fn unpack_with(
    format: Archive,
    bytes: &[u8],
    caps: &ArchiveCaps<'_>,
) -> Result<(Memory, Unpacked), ArchiveError> {
    let mut memory = Memory::default();
    let unpacked = unpack(format, Cursor::new(bytes), bytes.len() as u64, caps, &mut memory)?;
    Ok((memory, unpacked))
}

pub(crate) fn caps(limits: &StagingLimits) -> ArchiveCaps<'_> {
    ArchiveCaps { limits, bytes: 1 << 30, entries: 10_000, hidden: &[], mode: None }
}

pub(crate) fn unpacked(format: Archive, bytes: &[u8]) -> Memory {
    let limits = StagingLimits::default();
    match unpack_with(format, bytes, &caps(&limits)) {
        Ok((memory, _)) => memory,
        Err(error) => panic!("{error} {:?}", error.source),
    }
}

/// The kind and the words of a refusal.
pub(crate) fn refused(format: Archive, bytes: &[u8]) -> (StagingErrorKind, String) {
    let limits = StagingLimits::default();
    refused_with(format, bytes, &caps(&limits))
}

pub(crate) fn refused_with(
    format: Archive,
    bytes: &[u8],
    caps: &ArchiveCaps<'_>,
) -> (StagingErrorKind, String) {
    match unpack_with(format, bytes, caps) {
        Ok((memory, _)) => panic!("it was unpacked: {:?}", memory.0.keys()),
        Err(error) => (error.kind, error.to_string()),
    }
}

/// Refused as malformed, with words that tell why.
#[track_caller]
pub(crate) fn malformed(format: Archive, bytes: &[u8], why: &str) {
    let (kind, what) = refused(format, bytes);
    assert_eq!(kind, StagingErrorKind::Malformed, "{what}");
    assert!(what.contains(why), "{what:?} does not tell {why:?}");
}

/// One header of a tar archive, with any name and type, checksum right.
pub(crate) fn header(name: &[u8], kind: u8, size: u64, link: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o644);
    header.set_size(size);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    let old = header.as_old_mut();
    old.name[..name.len()].copy_from_slice(name);
    old.linkname[..link.len()].copy_from_slice(link);
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_cksum();
    header.as_bytes().to_vec()
}

/// A tar archive, entry by entry.
#[derive(Default, Clone)]
pub(crate) struct Tar(pub(crate) Vec<u8>);

impl Tar {
    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// An entry of any type with its data, filled up to whole blocks.
    pub(crate) fn entry(self, name: &str, kind: u8, data: &[u8]) -> Self {
        self.raw(&header(name.as_bytes(), kind, data.len() as u64, b"")).data(data)
    }

    pub(crate) fn data(mut self, data: &[u8]) -> Self {
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(self, name: &str, data: &[u8]) -> Self {
        self.entry(name, b'0', data)
    }

    pub(crate) fn dir(self, name: &str) -> Self {
        self.entry(name, b'5', b"")
    }

    pub(crate) fn link(self, name: &str, kind: u8, to: &str) -> Self {
        self.raw(&header(name.as_bytes(), kind, 0, to.as_bytes()))
    }

    /// A PAX header of these records.
    pub(crate) fn pax(self, records: &[(&str, &str)]) -> Self {
        let data: String = records.iter().map(|(key, value)| pax_record(key, value)).collect();
        self.entry("pax", b'x', data.as_bytes())
    }

    /// The two blocks at the end.
    pub(crate) fn end(self) -> Vec<u8> {
        self.raw(&[0; 1024]).0
    }
}

pub(crate) fn pax_record(key: &str, value: &str) -> String {
    let rest = key.len() + value.len() + 3;
    let mut length = rest;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    format!("{length} {key}={value}\n")
}

pub(crate) fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn zst(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 3).unwrap()
}
