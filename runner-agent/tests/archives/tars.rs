use runner_agent::staging::{StagingErrorKind, StagingLimits, archive::ArchiveCaps};
use runner_core::spec::Archive::{self, TarGz, TarZst};

use crate::kit::*;

const TAR: Archive = Archive::Tar;

#[test]
fn a_tar_and_its_compressed_forms_are_unpacked_alike() {
    let tar = Tar::default()
        .dir("./")
        .dir("a/")
        .file("a/x", b"first")
        .file("./b//y", &[7; 1000])
        .file("empty", b"")
        .end();
    let memory = unpacked(TAR, &tar);
    let found: Vec<_> = memory.0.iter().map(|(path, (_, bytes))| (path.as_str(), bytes.as_deref())).collect();
    assert_eq!(
        found,
        [
            ("a", None),
            ("a/x", Some(&b"first"[..])),
            ("b", None),
            ("b/y", Some(&[7; 1000][..])),
            ("empty", Some(&b""[..])),
        ]
    );
    assert_eq!(unpacked(TarGz, &gz(&tar)), memory);
    assert_eq!(unpacked(TarZst, &zst(&tar)), memory);
    // Members and frames one behind the other are one stream.
    let (one, two) = tar.split_at(700);
    assert_eq!(unpacked(TarGz, &[gz(one), gz(two)].concat()), memory);
    assert_eq!(unpacked(TarZst, &[zst(one), zst(two)].concat()), memory);
}

#[test]
fn what_the_tar_crate_packs_is_unpacked_with_long_names_and_modes() {
    let mut builder = tar::Builder::new(Vec::new());
    let long = format!("{}/file", "directory-with-a-long-name/".repeat(8));
    for (name, mode) in [(long.as_str(), 0o750), ("tool", 0o4755)] {
        let mut header = tar::Header::new_gnu();
        header.set_size(3);
        header.set_mode(mode);
        builder.append_data(&mut header, name, &b"abc"[..]).unwrap();
    }
    let memory = unpacked(TAR, &builder.into_inner().unwrap());
    assert_eq!(memory.0[&long.replace("//", "/")], (Some(0o750), Some(b"abc".to_vec())));
    assert_eq!(memory.0["tool"].0, Some(0o755), "without set-uid");
}

#[test]
fn pax_names_are_taken_by_their_length() {
    let path = "with\nnewline=and more";
    let tar = Tar::default().pax(&[("mtime", "1.5"), ("path", path)]).file("short", b"x").end();
    assert_eq!(unpacked(TAR, &tar).0.keys().collect::<Vec<_>>(), [path]);
    let commit = Tar::default().entry("pax_global_header", b'g', pax_record("comment", "0123").as_bytes());
    assert_eq!(unpacked(TAR, &commit.file("x", b"").end()).0.len(), 1);
}

#[test]
fn traversal_is_refused() {
    for name in ["../x", "a/../../x", "a/..", "..", "./../x"] {
        malformed(TAR, &Tar::default().file(name, b"x").end(), "leads out of it");
        malformed(TAR, &Tar::default().dir(name).end(), "leads out of it");
    }
    let by_pax = Tar::default().pax(&[("path", "../x")]).file("innocent", b"x").end();
    malformed(TAR, &by_pax, "leads out of it");
    let by_long_name = Tar::default().entry("././@LongLink", b'L', b"../x\0").file("innocent", b"x").end();
    malformed(TAR, &by_long_name, "leads out of it");
}

#[test]
fn absolute_paths_are_refused() {
    for name in ["/etc/passwd", "//x"] {
        malformed(TAR, &Tar::default().file(name, b"x").end(), "is absolute");
    }
}

#[test]
fn links_are_refused_so_that_nothing_is_written_through_one() {
    let through = Tar::default().link("dir", b'2', "/etc").file("dir/passwd", b"x").end();
    malformed(TAR, &through, "symbolic link");
    malformed(TAR, &Tar::default().link("x", b'2', "y").end(), "symbolic link");
}

#[test]
fn hard_links_are_refused() {
    malformed(TAR, &Tar::default().file("a", b"x").link("b", b'1', "a").end(), "hard link");
    malformed(TAR, &Tar::default().link("b", b'1', "/etc/passwd").end(), "hard link");
}

#[test]
fn devices_are_refused() {
    malformed(TAR, &Tar::default().entry("d", b'3', b"").end(), "device");
    malformed(TAR, &Tar::default().entry("d", b'4', b"").end(), "device");
}

#[test]
fn fifos_are_refused() {
    malformed(TAR, &Tar::default().entry("f", b'6', b"").end(), "FIFO");
}

#[test]
fn sparse_multi_volume_and_unknown_entries_are_refused() {
    malformed(TAR, &Tar::default().entry("s", b'S', b"").end(), "sparse");
    malformed(TAR, &Tar::default().pax(&[("GNU.sparse.major", "1")]).file("s", b"x").end(), "sparse");
    for kind in *b"MVDXAZ" {
        malformed(TAR, &Tar::default().entry("m", kind, b"").end(), "unknown type");
    }
}

#[test]
fn sizes_that_pax_and_ustar_tell_differently_are_refused() {
    // To a reader that trusts the header, what the PAX size covers is further entries.
    let hidden = Tar::default().file("evil", b"x").0;
    let smuggling = Tar::default()
        .pax(&[("size", &hidden.len().to_string())])
        .raw(&header(b"innocent", b'0', 0, b""))
        .raw(&hidden)
        .end();
    malformed(TAR, &smuggling, "two sizes");
    let other_way = Tar::default().pax(&[("size", "0")]).file("innocent", &hidden).end();
    malformed(TAR, &other_way, "two sizes");
    let same = Tar::default().pax(&[("size", "5")]).file("x", b"12345").end();
    assert_eq!(unpacked(TAR, &same).0.len(), 1);
    for bad in ["-1", "+5", " 5", "5x", "", "99999999999999999999999"] {
        malformed(TAR, &Tar::default().pax(&[("size", bad)]).file("x", b"12345").end(), "bad size");
    }
    malformed(
        TAR,
        &Tar::default().pax(&[("size", "5"), ("size", "5")]).file("x", b"12345").end(),
        "two sizes",
    );
}

#[test]
fn extension_headers_that_no_two_readers_read_alike_are_refused() {
    let twice = Tar::default().pax(&[("path", "a")]).pax(&[("path", "b")]).file("x", b"").end();
    malformed(TAR, &twice, "two extension headers");
    let both = Tar::default().entry("l", b'L', b"a\0").pax(&[("path", "b")]).file("x", b"").end();
    malformed(TAR, &both, "two long names");
    malformed(TAR, &Tar::default().pax(&[("path", "a")]).end(), "describes no entry");
    for key in ["path", "size", "linkpath", "GNU.sparse.name"] {
        let global = Tar::default().entry("g", b'g', pax_record(key, "7").as_bytes()).file("x", b"").end();
        malformed(TAR, &global, "global");
    }
    for bad in ["7 path=a", "99 path=a\n", "x path=a\n", "9 path a\n", "0 \n", "6 pat\n=", "\n"] {
        let tar = Tar::default().entry("pax", b'x', bad.as_bytes()).file("x", b"").end();
        malformed(TAR, &tar, "not well formed");
    }
    malformed(TAR, &Tar::default().entry("l", b'L', b"a\0b\0").file("x", b"").end(), "NUL");
}

#[test]
fn a_huge_extension_header_is_not_read_into_memory() {
    for kind in [b'x', b'g', b'L', b'K'] {
        let tar = Tar::default().raw(&header(b"long", kind, 4 << 30, b"")).end();
        assert_eq!(refused(TAR, &tar).0, StagingErrorKind::LimitExceeded);
    }
}

#[test]
fn a_directory_with_contents_is_refused() {
    let hidden = Tar::default().file("evil", b"x").0;
    malformed(TAR, &Tar::default().entry("d/", b'5', &hidden).end(), "a directory with contents");
    malformed(TAR, &Tar::default().entry("d/", b'0', b"x").end(), "a directory with contents");
    assert!(unpacked(TAR, &Tar::default().entry("d/", b'0', b"").end()).0["d"].1.is_none());
}

#[test]
fn two_entries_at_one_place_are_refused() {
    for (first, second) in [
        (Tar::default().file("x", b"1"), Tar::default().file("x", b"2")),
        (Tar::default().file("x", b"1"), Tar::default().file("./x", b"2")),
        (Tar::default().file("x", b"1"), Tar::default().dir("x/")),
        (Tar::default().dir("x/"), Tar::default().file("x", b"1")),
        (Tar::default().file("x", b"1"), Tar::default().file("x/y", b"2")),
        (Tar::default().file("x/y", b"1"), Tar::default().file("x", b"2")),
        (Tar::default().file("x", b"1"), Tar::default().file("x/y/z", b"2")),
    ] {
        assert_eq!(refused(TAR, &first.raw(&second.0).end()).0, StagingErrorKind::Conflict);
    }
    assert_eq!(unpacked(TAR, &Tar::default().dir("d").file("d/x", b"").dir("d/").end()).0.len(), 2);
}

#[test]
fn truncated_archives_are_refused_wherever_they_are_cut() {
    let tar = Tar::default().dir("a").file("a/x", &[1; 700]).pax(&[("path", "long")]).file("b", b"bb").end();
    let (gzipped, zstd) = (gz(&tar), zst(&tar));
    for cut in (0..tar.len() - 1024).step_by(97) {
        malformed(TAR, &tar[..cut], "truncated");
    }
    for (format, bytes) in [(TarGz, &gzipped), (TarZst, &zstd)] {
        for cut in 0..bytes.len() {
            let kind = refused(format, &bytes[..cut]).0;
            assert_eq!(kind, StagingErrorKind::Malformed, "{format:?} cut at {cut} of {}", bytes.len());
        }
    }
}

#[test]
fn anything_but_zeros_behind_the_end_is_refused() {
    let tar = Tar::default().file("a", b"x").end();
    let second = Tar::default().file("hidden", b"y").end();
    malformed(TAR, &[&tar[..], &second].concat(), "behind the archive's end");
    malformed(TAR, &[&tar[..], b"x"].concat(), "behind the archive's end");
    malformed(TarGz, &[gz(&tar), b"garbage behind".to_vec()].concat(), "");
    malformed(TarZst, &[zst(&tar), b"garbage behind".to_vec()].concat(), "");
    assert_eq!(unpacked(TAR, &[&tar[..], &[0; 9000]].concat()).0.len(), 1);
}

#[test]
fn damage_is_seen() {
    let tar = Tar::default().file("a", &[5; 5000]).end();
    let mut bad = tar.clone();
    bad[3] ^= 1;
    malformed(TAR, &bad, "checksum");
    let mut bad = gz(&tar);
    let crc = bad.len() - 6;
    bad[crc] ^= 1;
    malformed(TarGz, &bad, "");
    malformed(TarGz, &tar, "");
    malformed(TarZst, &tar, "");
    malformed(TAR, b"not a tar archive, but long enough to be one ".repeat(20).as_slice(), "checksum");
}

#[test]
fn a_compression_bomb_is_refused_before_it_has_filled_anything() {
    let zeros = vec![0; 128 << 20];
    let tar = Tar::default().file("zeros", &zeros).end();
    for (format, bytes) in [(TarGz, gz(&tar)), (TarZst, zst(&tar))] {
        assert!(bytes.len() < 256 << 10);
        let (kind, what) = refused(format, &bytes);
        assert_eq!(kind, StagingErrorKind::LimitExceeded);
        assert!(what.contains("compressed too well"), "{what}");
    }
    // Padding behind the end counts like anything else.
    let padded = [&Tar::default().file("x", b"").end()[..], &zeros].concat();
    assert_eq!(refused(TarGz, &gz(&padded)).0, StagingErrorKind::LimitExceeded);
}

#[test]
fn a_zstd_window_that_is_too_large_is_refused() {
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(27).unwrap();
    encoder.include_contentsize(false).unwrap();
    std::io::Write::write_all(&mut encoder, &Tar::default().file("x", &[1; 4096]).end()).unwrap();
    malformed(TarZst, &encoder.finish().unwrap(), "");
}

#[test]
fn bytes_entries_and_depth_have_caps() {
    let limits = StagingLimits { depth: 3, ..StagingLimits::default() };
    let all = caps(&limits);
    let limit = |bytes: Vec<u8>, caps: &ArchiveCaps<'_>| {
        assert_eq!(refused_with(TAR, &bytes, caps).0, StagingErrorKind::LimitExceeded);
    };
    limit(Tar::default().file("a/b/c/d", b"").end(), &all);
    limit(Tar::default().file("a", &[0; 10]).end(), &ArchiveCaps { bytes: 9, ..all });
    limit(Tar::default().file("a", b"x").file("b", &[0; 9]).end(), &ArchiveCaps { bytes: 9, ..all });
    limit(Tar::default().file("a", b"").file("b", b"").end(), &ArchiveCaps { entries: 1, ..all });
    // Directories that no entry names count, too: a path of a hundred names would make a hundred.
    limit(Tar::default().file("a/b/c", b"").end(), &ArchiveCaps { entries: 2, ..all });
    // A size beyond everything is refused by its word.
    limit(Tar::default().raw(&header(b"huge", b'0', 8 << 30, b"")).0, &all);
    assert!(
        unpack_with(
            TAR,
            &Tar::default().file("a/b/c", &[0; 9]).end(),
            &ArchiveCaps { bytes: 9, entries: 3, ..all }
        )
        .is_ok()
    );
}

#[test]
fn names_that_no_file_system_takes_are_refused() {
    let long = "n".repeat(256);
    malformed(TAR, &Tar::default().pax(&[("path", &long)]).file("x", b"").end(), "too long a name");
    let deep = "directory/".repeat(400);
    malformed(TAR, &Tar::default().pax(&[("path", &deep)]).file("x", b"").end(), "too long a path");
    malformed(TAR, &Tar::default().file(".", b"x").end(), "without a name");
}

#[test]
fn an_archive_in_an_archive_is_a_file() {
    let inner = gz(&Tar::default().file("../evil", b"x").end());
    let memory = unpacked(TAR, &Tar::default().file("inner.tar.gz", &inner).end());
    assert_eq!(memory.0["inner.tar.gz"].1.as_deref(), Some(&inner[..]));
}

#[test]
fn places_of_other_inputs_are_left_out() {
    let limits = StagingLimits::default();
    let hidden = ["d/mine", "top"];
    let caps = ArchiveCaps { hidden: &hidden, ..caps(&limits) };
    let tar =
        Tar::default().file("d/mine/x", b"1").file("d/mined", b"2").file("top", b"3").file("z", b"4").end();
    let (memory, unpacked) = unpack_with(TAR, &tar, &caps).unwrap();
    assert_eq!(memory.0.keys().collect::<Vec<_>>(), ["d", "d/mined", "z"]);
    assert_eq!((unpacked.files, unpacked.bytes, unpacked.entries), (2, 2, 3));
    let file_above = Tar::default().file("d", b"x").end();
    assert_eq!(refused_with(TAR, &file_above, &caps).0, StagingErrorKind::Conflict);
}
