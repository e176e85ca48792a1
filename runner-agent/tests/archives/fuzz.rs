//! Mutations of good archives, of patterns and of manifests. Whatever comes out, nothing panics, nothing leads elsewhere, and
//! no cap is passed.
//!
//! Each target runs for a second. `RUNNER_FUZZ_SECONDS=600` lets each run longer; `RUNNER_FUZZ_SEED=N` repeats a run, whose
//! seed is printed.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the seed is for people")]

use std::time::Duration;

use runner_agent::staging::StagingLimits;
use runner_core::{
    artifact::Manifest,
    clock::{Clock as _, SystemClock},
    spec::Archive,
};

use crate::kit::*;

/// Xorshift64*, by Vigna: enough to be everywhere, and the same for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound.max(1) as u64).unwrap_or_default()
    }
}

/// Numbers and signatures that parsers look at.
const TELLING: &[&[u8]] = &[
    b"\0",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b"\x80",
    b"PK\x01\x02",
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"PK\x06\x06",
    b"PK\x06\x07",
    b"../",
    b"/",
    b"./",
    b"ustar",
    b"7777777",
    b"x",
    b"g",
    b"L",
    b"\x1f\x8b\x08",
    b"\x28\xb5\x2f\xfd",
    b"**",
    b"[",
    b"]",
    b"\\",
    b"9 path=a\n",
    b"{",
    b"\"",
];

fn mutate(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len());
        match random.below(6) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            1 if !bytes.is_empty() => bytes[at] = u8::try_from(random.below(256)).unwrap_or_default(),
            2 => {
                let telling = TELLING[random.below(TELLING.len())];
                let end = (at + telling.len()).min(bytes.len());
                bytes.splice(at..end, telling.iter().copied());
            }
            3 => bytes.truncate(at),
            4 => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len());
                let until = from + random.below(other.len() - from);
                bytes.splice(at..at, other[from..until].iter().copied());
            }
            _ => {
                let until = at + random.below(bytes.len() - at);
                bytes.drain(at..until);
            }
        }
    }
    bytes
}

/// Names the input where a target panics.
struct Told<'a> {
    target: &'a str,
    seed: u64,
    round: u64,
}

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self { target, seed, round } = self;
            eprintln!("{target}: failed in round {round}; repeat it with RUNNER_FUZZ_SEED={seed}");
        }
    }
}

fn fuzz(target: &str, seeds: &[Vec<u8>], try_one: impl Fn(&[u8])) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let clock = SystemClock::new();
    let seed = number("RUNNER_FUZZ_SEED").unwrap_or_else(|| u64::from(std::process::id()) << 20 | 1);
    let time = Duration::from_secs(number("RUNNER_FUZZ_SECONDS").unwrap_or(1));
    let begin = clock.monotonic();
    let mut told = Told { target, seed, round: 0 };
    let mut random = Random(seed.max(1));
    seeds.iter().for_each(|seed| try_one(seed));
    while clock.monotonic().saturating_sub(begin) < time {
        let bytes = mutate(&mut random, seeds);
        try_one(&bytes);
        told.round += 1;
    }
    println!("{target}: {} rounds, seed {seed}", told.round);
    assert!(told.round > 0);
}

fn archives(format: Archive, seeds: &[Vec<u8>]) {
    let limits = StagingLimits { depth: 8, ..StagingLimits::default() };
    let caps = runner_agent::staging::archive::ArchiveCaps { bytes: 1 << 20, entries: 50, ..caps(&limits) };
    fuzz(&format!("{format:?}"), seeds, |bytes| {
        // The sink itself checks each path; see the kit.
        if let Ok((memory, unpacked)) = unpack_with(format, bytes, &caps) {
            let sum: usize = memory.0.values().filter_map(|(_, bytes)| bytes.as_ref()).map(Vec::len).sum();
            assert!(unpacked.bytes == sum as u64 && sum <= 1 << 20 && memory.0.len() <= 50);
            assert_eq!(unpacked.entries, memory.0.len() as u64);
        }
    });
}

fn tars() -> Vec<Vec<u8>> {
    vec![
        Tar::default().dir("a/").file("a/x", b"first").file("b/y", &[7; 600]).end(),
        Tar::default().pax(&[("path", "long name"), ("size", "3")]).file("short", b"abc").end(),
        Tar::default().entry("././@LongLink", b'L', b"another long name\0").file("short", b"abc").end(),
        Tar::default().entry("g", b'g', pax_record("comment", "x").as_bytes()).link("l", b'2', "to").end(),
    ]
}

#[test]
fn mutated_tars_do_no_harm() {
    archives(Archive::Tar, &tars());
}

#[test]
fn mutated_gzipped_tars_do_no_harm() {
    archives(Archive::TarGz, &tars().iter().map(|tar| gz(tar)).collect::<Vec<_>>());
}

#[test]
fn mutated_zstd_tars_do_no_harm() {
    archives(Archive::TarZst, &tars().iter().map(|tar| zst(tar)).collect::<Vec<_>>());
}

#[test]
fn mutated_zips_do_no_harm() {
    use std::io::{Cursor, Write as _};
    let pack = |large: bool| {
        let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
        let options = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Deflated)
            .large_file(large);
        for (name, bytes) in [("a/x", &b"first"[..]), ("b", &[7; 600]), ("c", b"")] {
            writer.start_file(name, options).unwrap();
            writer.write_all(bytes).unwrap();
        }
        writer.add_directory("d/", options).unwrap();
        writer.set_comment("a comment").unwrap();
        writer.finish().unwrap().into_inner()
    };
    archives(Archive::Zip, &[pack(false), pack(true)]);
}

#[test]
fn mutated_patterns_do_no_harm() {
    let seeds = ["/outputs/**/*.txt", "/o/[a-z][!0-9]?\\*", "/o/[[:alpha:]]x*y", "a/*/**/b"];
    let seeds: Vec<Vec<u8>> = seeds.iter().map(|seed| seed.as_bytes().to_vec()).collect();
    fuzz("patterns", &seeds, |bytes| {
        let Ok(text) = std::str::from_utf8(bytes) else { return };
        if let Ok(pattern) = runner_glob::Pattern::parse(text) {
            for path in &seeds {
                pattern.matches(path);
            }
            pattern.matches(bytes);
        }
    });
}

#[test]
fn mutated_manifests_do_no_harm() {
    let seed = r#"{"partial":false,"entries":[{"output":"/outputs/*","base":"/outputs","path":"%FFx","path_encoded":true,
        "kind":"file","size":3,"sha256":"00","mode":420,"key":"runs/t/r/1/outputs/0/x"}],"total_bytes":3}"#;
    fuzz("manifests", &[seed.as_bytes().to_vec()], |bytes| {
        if let Ok(manifest) = serde_json::from_slice::<Manifest>(bytes) {
            for entry in &manifest.entries {
                let place = entry.place();
                assert_eq!(place.is_some(), entry.path_bytes().is_some());
            }
            let again: Manifest = serde_json::from_slice(&serde_json::to_vec(&manifest).unwrap()).unwrap();
            assert_eq!(again, manifest);
        }
    });
}
