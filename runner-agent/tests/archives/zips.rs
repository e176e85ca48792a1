use std::io::{Cursor, Write as _};

use runner_agent::staging::{StagingErrorKind, StagingLimits, archive::ArchiveCaps};
use runner_core::spec::Archive::Zip;
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

use crate::kit::*;

fn options() -> SimpleFileOptions {
    SimpleFileOptions::default().compression_method(CompressionMethod::Deflated).unix_permissions(0o644)
}

/// A zip as a packer writes it. A name that ends with a slash is a directory.
fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        writer.start_file(*name, options()).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

/// One entry of a zip that is built by hand.
#[derive(Clone)]
struct Entry {
    name: Vec<u8>,
    local_name: Vec<u8>,
    data: Vec<u8>,
    size: u32,
    local_size: u32,
    crc: u32,
    /// As in `st_mode`, in the upper half of the external attributes.
    mode: u32,
    flags: u16,
    method: u16,
    /// Where its local header is said to be; `None`: where it is.
    at: Option<u32>,
}

fn entry(name: &str, data: &[u8]) -> Entry {
    let mut crc = flate2::Crc::new();
    crc.update(data);
    Entry {
        name: name.as_bytes().to_vec(),
        local_name: name.as_bytes().to_vec(),
        data: data.to_vec(),
        size: data.len() as u32,
        local_size: data.len() as u32,
        crc: crc.sum(),
        mode: 0o100_644,
        flags: 0,
        method: 0,
        at: None,
    }
}

fn le16(out: &mut Vec<u8>, values: &[u16]) {
    values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
}

fn le32(out: &mut Vec<u8>, values: &[u32]) {
    values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
}

/// A zip of stored entries, built by hand.
fn built(entries: &[Entry]) -> Vec<u8> {
    built_with(entries, |count, size, start| {
        let mut end = b"PK\x05\x06".to_vec();
        le16(&mut end, &[0, 0, count, count]);
        le32(&mut end, &[size, start]);
        le16(&mut end, &[0]);
        end
    })
}

fn built_with(entries: &[Entry], end: impl Fn(u16, u32, u32) -> Vec<u8>) -> Vec<u8> {
    let mut out = Vec::new();
    let mut directory = Vec::new();
    for one in entries {
        let at = one.at.unwrap_or(out.len() as u32);
        out.extend_from_slice(b"PK\x03\x04");
        le16(&mut out, &[20, one.flags, one.method, 0, 0x21]);
        le32(&mut out, &[one.crc, one.local_size, one.local_size]);
        le16(&mut out, &[one.local_name.len() as u16, 0]);
        out.extend_from_slice(&one.local_name);
        out.extend_from_slice(&one.data);
        directory.extend_from_slice(b"PK\x01\x02");
        le16(&mut directory, &[0x0314, 20, one.flags, one.method, 0, 0x21]);
        le32(&mut directory, &[one.crc, one.size, one.size]);
        le16(&mut directory, &[one.name.len() as u16, 0, 0, 0, 0]);
        le32(&mut directory, &[one.mode << 16, at]);
        directory.extend_from_slice(&one.name);
    }
    let start = out.len() as u32;
    out.extend_from_slice(&directory);
    out.extend_from_slice(&end(entries.len() as u16, directory.len() as u32, start));
    out
}

#[test]
fn a_zip_is_unpacked_with_its_directories_and_modes() {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    writer.add_directory("d/", options().unix_permissions(0o750)).unwrap();
    writer.start_file("d/tool", options().unix_permissions(0o755)).unwrap();
    writer.write_all(&[9; 100_000]).unwrap();
    writer.start_file("x/y", options().compression_method(CompressionMethod::Stored)).unwrap();
    writer.write_all(b"stored").unwrap();
    let memory = unpacked(Zip, &writer.finish().unwrap().into_inner());
    assert_eq!(memory.0["d"], (Some(0o750), None));
    assert_eq!(memory.0["d/tool"], (Some(0o755), Some(vec![9; 100_000])));
    assert_eq!(memory.0["x/y"], (Some(0o644), Some(b"stored".to_vec())));
    assert_eq!(memory.0["x"], (None, None));
    assert_eq!(unpacked(Zip, &zip(&[])).0.len(), 0);
}

#[test]
fn one_built_by_hand_is_unpacked_so_that_what_differs_is_what_is_refused() {
    let bytes = built(&[entry("a", b"first"), entry("b/c", b"")]);
    assert_eq!(unpacked(Zip, &bytes).0["a"].1.as_deref(), Some(&b"first"[..]));
    let set_uid = Entry { mode: 0o104_755, ..entry("s", b"") };
    assert_eq!(unpacked(Zip, &built(&[set_uid])).0["s"].0, Some(0o755), "without set-uid");
    let unsaid = Entry { mode: 0, ..entry("s", b"") };
    assert_eq!(unpacked(Zip, &built(&[unsaid])).0["s"].0, Some(0o644));
}

#[test]
fn traversal_and_absolute_paths_are_refused() {
    for name in ["../x", "a/../../x", ".."] {
        malformed(Zip, &built(&[entry(name, b"x")]), "leads out of it");
    }
    for name in ["/etc/passwd", "//x"] {
        malformed(Zip, &built(&[entry(name, b"x")]), "is absolute");
    }
    // A backslash separates nothing here.
    assert!(unpacked(Zip, &built(&[entry("..\\x", b"x")])).0.contains_key("..\\x"));
    malformed(Zip, &built(&[entry("a\0b", b"x")]), "NUL");
}

#[test]
fn links_devices_and_fifos_are_refused() {
    for kind in [0o120_000, 0o020_000, 0o060_000, 0o010_000, 0o140_000] {
        let bytes = built(&[Entry { mode: kind | 0o777, ..entry("x", b"/etc/passwd") }]);
        assert_eq!(refused(Zip, &bytes).0, StagingErrorKind::Malformed, "{kind:o}");
    }
    // A directory by its mode and a file by its name, and the other way round.
    for (name, mode) in [("x", 0o040_755), ("x/", 0o100_644)] {
        let bytes = built(&[Entry { mode, ..entry(name, b"") }]);
        assert_eq!(refused(Zip, &bytes).0, StagingErrorKind::Malformed);
    }
    malformed(Zip, &built(&[Entry { mode: 0o040_755, ..entry("d/", b"data") }]), "a directory with contents");
}

#[test]
fn two_entries_of_one_name_are_refused() {
    let bytes = built(&[entry("x", b"1"), entry("x", b"2")]);
    assert_eq!(refused(Zip, &bytes).0, StagingErrorKind::Conflict);
    let bytes = built(&[entry("x", b"1"), entry("./x", b"2")]);
    assert_eq!(refused(Zip, &bytes).0, StagingErrorKind::Conflict);
    let bytes = built(&[entry("x", b"1"), entry("x/y", b"2")]);
    assert_eq!(refused(Zip, &bytes).0, StagingErrorKind::Conflict);
}

#[test]
fn entries_that_overlap_are_refused() {
    // Both names, one body: the start of every overlap bomb.
    let first = entry("aa", &[7; 64]);
    let shared = Entry { name: b"bb".to_vec(), at: Some(0), ..first.clone() };
    assert_eq!(refused(Zip, &built(&[first.clone(), shared])).0, StagingErrorKind::Malformed);
    // The second begins in the data of the first.
    let inner = built(&[entry("in", b"side")]);
    let outer = entry("outer", &inner);
    let inside = Entry { at: Some(30 + 5), ..entry("in", b"side") };
    assert_eq!(refused(Zip, &built(&[outer, inside])).0, StagingErrorKind::Malformed);
}

#[test]
fn a_local_header_that_differs_from_the_directory_is_refused() {
    let other_name = Entry { local_name: b"evil".to_vec(), ..entry("good", b"x") };
    malformed(Zip, &built(&[other_name]), "contradicts itself");
    let other_size = Entry { local_size: 3, ..entry("good", b"1234") };
    malformed(Zip, &built(&[other_size]), "contradicts itself");
}

#[test]
fn a_hidden_entry_between_two_others_is_refused() {
    let bytes = built(&[entry("a", b"1"), entry("hidden", b"2"), entry("b", b"3")]);
    // Its line in the directory is taken out; its local header stays.
    let at = bytes.windows(6).rposition(|window| window == b"hidden").unwrap() - 46;
    let mut cut = [&bytes[..at], &bytes[at + 46 + 6..]].concat();
    let end = cut.len() - 22;
    cut[end + 8] = 2;
    cut[end + 10] = 2;
    let size = u32::from_le_bytes(cut[end + 12..end + 16].try_into().unwrap()) - 52;
    cut[end + 12..end + 16].copy_from_slice(&size.to_le_bytes());
    malformed(Zip, &cut, "contradicts itself");
}

#[test]
fn sizes_that_lie_are_refused() {
    // Deflated data that is longer, or shorter, than both headers say.
    let bytes = zip(&[("x", &[b'a'; 5000])]);
    for lie in [4999u32, 5001, 1 << 20] {
        let mut bytes = bytes.clone();
        let directory = bytes.windows(4).rposition(|window| window == b"PK\x01\x02").unwrap();
        bytes[directory + 24..directory + 28].copy_from_slice(&lie.to_le_bytes());
        bytes[22..26].copy_from_slice(&lie.to_le_bytes());
        assert_eq!(refused(Zip, &bytes).0, StagingErrorKind::Malformed, "{lie}");
    }
    let huge = Entry { size: u32::MAX - 1, local_size: u32::MAX - 1, ..entry("x", b"x") };
    assert_ne!(refused(Zip, &built(&[huge])).0, StagingErrorKind::Local);
}

#[test]
fn a_wrong_checksum_is_refused() {
    malformed(Zip, &built(&[Entry { crc: 7, ..entry("x", b"contents") }]), "");
}

/// An archive whose zip64 end says these three, and whose short end says that they do not fit.
fn zip64(entries: &[Entry], lie: impl Fn(u64, u64, u64) -> (u64, u64, u64)) -> Vec<u8> {
    built_with(entries, |count, size, start| {
        let (long_count, long_size, long_start) = lie(count.into(), size.into(), start.into());
        let at = u64::from(start) + u64::from(size);
        let mut end = b"PK\x06\x06".to_vec();
        end.extend_from_slice(&44u64.to_le_bytes());
        le16(&mut end, &[45, 45]);
        le32(&mut end, &[0, 0]);
        for value in [long_count, long_count, long_size, long_start] {
            end.extend_from_slice(&value.to_le_bytes());
        }
        end.extend_from_slice(b"PK\x06\x07");
        le32(&mut end, &[0]);
        end.extend_from_slice(&at.to_le_bytes());
        le32(&mut end, &[1]);
        end.extend_from_slice(b"PK\x05\x06");
        le16(&mut end, &[0, 0, 0xffff, 0xffff]);
        le32(&mut end, &[u32::MAX, u32::MAX]);
        le16(&mut end, &[0]);
        end
    })
}

#[test]
fn a_zip64_end_that_lies_is_refused() {
    let entries = [entry("a", b"1"), entry("b", b"2")];
    assert_eq!(unpacked(Zip, &zip64(&entries, |count, size, start| (count, size, start))).0.len(), 2);
    for lie in [
        |count, size, start| (count + 1, size, start),
        |_, size, start| (u64::MAX, size, start),
        |_, size, start| (1 << 40, size, start),
        |count, size, start| (count, size + 1, start),
        |count, _, start| (count, u64::MAX, start),
        |count, size, start| (count, size, start + 1),
        |count, size, _| (count, size, u64::MAX),
        |count, size, start| (count - 1, size, start),
    ] {
        let kind = refused(Zip, &zip64(&entries, lie)).0;
        assert!(matches!(kind, StagingErrorKind::Malformed | StagingErrorKind::LimitExceeded), "{kind:?}");
    }
}

#[test]
fn encryption_and_unknown_methods_are_refused() {
    let encrypted = Entry { flags: 1, ..entry("x", b"0123456789abcdef") };
    assert_ne!(refused(Zip, &built(&[encrypted])).0, StagingErrorKind::Local);
    for method in [1, 12, 14, 93, 95, 99, 1000] {
        let kind = refused(Zip, &built(&[Entry { method, ..entry("x", b"abc") }])).0;
        assert!(
            matches!(kind, StagingErrorKind::Unsupported | StagingErrorKind::Malformed),
            "{method} {kind:?}"
        );
    }
}

#[test]
fn truncated_zips_and_trailing_garbage_are_refused() {
    let bytes = zip(&[("a", b"first"), ("b", &[1; 2000])]);
    for cut in 0..bytes.len() {
        let kind = refused(Zip, &bytes[..cut]).0;
        assert_eq!(kind, StagingErrorKind::Malformed, "cut at {cut}");
    }
    malformed(Zip, &[&bytes[..], b"x"].concat(), "no end");
    malformed(Zip, &[&bytes[..], &bytes].concat(), "");
    malformed(Zip, &[b"#!/bin/sh\n", &bytes[..]].concat(), "");
}

#[test]
fn a_zip_bomb_is_refused_and_a_zip_in_a_zip_is_a_file() {
    let zeros = vec![0; 100 << 20];
    let bomb = zip(&[("zeros", &zeros)]);
    let (kind, what) = refused(Zip, &bomb);
    assert_eq!(kind, StagingErrorKind::LimitExceeded);
    assert!(what.contains("compressed too well"), "{what}");
    let nested = unpacked(Zip, &zip(&[("bomb.zip", &bomb)]));
    assert_eq!(nested.0["bomb.zip"].1.as_deref(), Some(&bomb[..]));
}

#[test]
fn entries_bytes_and_the_directory_have_caps() {
    let limits = StagingLimits { depth: 2, ..StagingLimits::default() };
    let all = caps(&limits);
    let many: Vec<Entry> = (0..100).map(|n| entry(&format!("{n}"), b"")).collect();
    for (bytes, caps) in [
        (built(&many), ArchiveCaps { entries: 99, ..all }),
        (built(&[entry("a", b"12345")]), ArchiveCaps { bytes: 4, ..all }),
        (built(&[entry("a/b/c", b"")]), all),
    ] {
        assert_eq!(refused_with(Zip, &bytes, &caps).0, StagingErrorKind::LimitExceeded);
    }
}
