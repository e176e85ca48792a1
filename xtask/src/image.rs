//! Images, made from nothing: a layer with a program, perhaps another beside it, and a configuration. Neither an engine nor a registry is needed, and the
//! same programs make the same bytes.

use std::{
    fs::{self, File},
    io::{BufWriter, Read as _, Write as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::{
    agent::{self, Roles},
    process,
};

/// Who programs run as where nobody says: nobody that a machine knows.
const USER: u32 = 65532;

/// Which images, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    agent: bool,
    service: bool,
    release: bool,
}

impl Wanted {
    /// What the words behind `cargo xtask image` ask for. `None`: something else.
    pub(crate) fn parse(words: &[String]) -> Option<Self> {
        let mut wanted = Self { agent: false, service: false, release: false };
        for word in words {
            let flag = match word.as_str() {
                "agent" => &mut wanted.agent,
                "service" => &mut wanted.service,
                "--release" => &mut wanted.release,
                _ => return None,
            };
            *flag = true;
        }
        if !wanted.agent && !wanted.service {
            (wanted.agent, wanted.service) = (true, true);
        }
        Some(wanted)
    }
}

fn place(release: bool, of: &str) -> Result<PathBuf> {
    Ok(agent::folder(release)?.join(format!("{of}-image.tar")))
}

/// Builds images into the target's folder: archives that `docker load` and `ctr images import` take.
///
/// # Errors
/// Where a program cannot be built, or an archive not be written.
pub(crate) fn run(wanted: Wanted) -> Result<()> {
    let Wanted { release, .. } = wanted;
    if wanted.agent {
        let program = agent::run(release, Roles::Pod)?;
        image(release, "runner-agent", &[("runner-agent", &program)])?;
    }
    if wanted.service {
        service(release, &agent::service(release)?, &[])?;
    }
    Ok(())
}

/// Builds the images that tests on a cluster use. The service's has the program that the other tests use, too, with the libraries that
/// it is linked to: a static one takes as long to build as everything else together.
///
/// # Errors
/// As [`run`]; where the service is not built yet, or it cannot be told which libraries it needs.
pub(crate) fn run_for_tests() -> Result<()> {
    run(Wanted { agent: true, service: false, release: false })?;
    let program = agent::folder(false)?.join("runner");
    service(false, &program, &libraries(&program)?)
}

/// The service's image: its program, these libraries where the program looks for them, and the shim, which the Docker backend puts into
/// containers and looks for beside the service.
fn service(release: bool, program: &Path, libraries: &[PathBuf]) -> Result<()> {
    let shim = agent::run(release, Roles::Shim)?;
    let mut files = vec![("runner", program), ("runner-agent-static", &shim)];
    for library in libraries {
        let name =
            library.strip_prefix("/").ok().and_then(Path::to_str).context("a library's absolute path")?;
        files.push((name, library));
    }
    image(release, "runner", &files)
}

/// The libraries that a program is linked to, and its loader, as the loader of this machine finds them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let told = process::output(Command::new("ldd").arg(program))?;
    Ok(named_libraries(&String::from_utf8_lossy(&told)))
}

/// What is named by `NAME => PATH (ADDRESS)` or `PATH (ADDRESS)`. What has no path is the kernel's own.
fn named_libraries(told: &str) -> Vec<PathBuf> {
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    told.lines().filter_map(path).collect()
}

fn image(release: bool, of: &str, programs: &[(&str, &Path)]) -> Result<()> {
    let name = format!("docker.io/library/{of}:{}", env!("CARGO_PKG_VERSION"));
    let place = place(release, of)?;
    write(programs, &name, &place)?;
    let bytes = fs::metadata(&place)?.len();
    process::say(&format!("{}: {name}, {:.1} MiB", place.display(), megabytes(bytes)));
    Ok(())
}

#[allow(clippy::cast_precision_loss, reason = "for people, to one place")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn header(bytes: u64, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Regular);
    header.set_mode(mode);
    header.set_size(bytes);
    // Times and owners are constants, so that only the program decides what the image is.
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

/// An image with these programs, each at `/NAME`, of which it executes the first as no machine's user.
fn write(programs: &[(&str, &Path)], tag: &str, place: &Path) -> Result<()> {
    let (first, _) = programs.first().context("an image has a program")?;
    let layer = layer(programs, place)?;
    let config = serde_json::to_vec(&json!({
        "architecture": architecture(),
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": { "Entrypoint": [format!("/{first}")], "User": format!("{USER}:{USER}"), "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", digest(&layer)?)] },
    }))?;
    let config_name = format!("{}.json", hex::encode(Sha256::digest(&config)));
    let manifest =
        serde_json::to_vec(&json!([{ "Config": config_name, "RepoTags": [tag], "Layers": ["layer.tar"] }]))?;
    // Whole under its name, or not there.
    let aside = aside(place);
    let mut archive = tar::Builder::new(BufWriter::new(File::create(&aside)?));
    for (path, bytes) in [("manifest.json", &manifest[..]), (&config_name, &config[..])] {
        archive.append_data(&mut header(bytes.len() as u64, 0o644), path, bytes)?;
    }
    let length = fs::metadata(&layer)?.len();
    archive.append_data(&mut header(length, 0o644), "layer.tar", File::open(&layer)?)?;
    archive.into_inner()?.flush()?;
    fs::rename(&aside, place)?;
    fs::remove_file(&layer)?;
    Ok(())
}

/// A name beside a file that no other process uses.
fn aside(place: &Path) -> PathBuf {
    place.with_extension(format!("{}.part", std::process::id()))
}

/// The layer, beside where the image is to be.
fn layer(programs: &[(&str, &Path)], image: &Path) -> Result<PathBuf> {
    let place = image.with_extension(format!("layer.{}.part", std::process::id()));
    let mut layer = tar::Builder::new(BufWriter::new(File::create(&place)?));
    for (name, program) in programs {
        let from = File::open(program).with_context(|| format!("open {}", program.display()))?;
        let length = from.metadata()?.len();
        layer.append_data(&mut header(length, 0o755), name, from)?;
    }
    layer.into_inner()?.flush()?;
    Ok(place)
}

fn digest(path: &Path) -> Result<String> {
    let (mut file, mut hash, mut piece) = (File::open(path)?, Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hex::encode(hash.finalize())),
            read => hash.update(&piece[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, io::Read as _};

    use super::*;

    fn entries(bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(bytes);
        let entries = archive.entries().unwrap();
        entries
            .map(|entry| {
                let mut entry = entry.unwrap();
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).unwrap();
                (entry.path().unwrap().display().to_string(), bytes)
            })
            .collect()
    }

    #[test]
    fn an_image_is_its_programs_and_nothing_else() {
        let dir = std::env::temp_dir().join(format!("xtask-image-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (program, beside, place) = (dir.join("program"), dir.join("beside"), dir.join("image.tar"));
        fs::write(&program, b"a program").unwrap();
        fs::write(&beside, b"another").unwrap();
        let made = || {
            let programs = [("program", program.as_path()), ("shim", beside.as_path())];
            write(&programs, "example.org/p:1", &place).unwrap();
            fs::read(&place).unwrap()
        };
        let archive = made();
        assert_eq!(archive, made(), "the same program makes the same bytes");
        let left: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 3, "{left:?}");
        fs::remove_dir_all(&dir).unwrap();

        let entries_of = entries(&archive);
        let manifest: serde_json::Value = serde_json::from_slice(&entries_of["manifest.json"]).unwrap();
        assert_eq!(manifest[0]["RepoTags"], json!(["example.org/p:1"]));
        let config: serde_json::Value =
            serde_json::from_slice(&entries_of[manifest[0]["Config"].as_str().unwrap()]).unwrap();
        assert_eq!(config["config"]["Entrypoint"], json!(["/program"]));
        let layer = &entries_of["layer.tar"];
        let expected = format!("sha256:{}", hex::encode(Sha256::digest(layer)));
        assert_eq!(config["rootfs"]["diff_ids"], json!([expected]));
        let expected = [("program", "a program"), ("shim", "another")];
        let expected = expected.map(|(name, bytes)| (name.to_owned(), bytes.as_bytes().to_vec()));
        assert_eq!(entries(layer), expected.into());
    }

    #[test]
    fn all_images_are_wanted_where_none_is_named() {
        let parse =
            |words: &[&str]| Wanted::parse(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        assert_eq!(parse(&[]), Some(Wanted { agent: true, service: true, release: false }));
        assert_eq!(parse(&["agent"]), Some(Wanted { agent: true, service: false, release: false }));
        assert_eq!(
            parse(&["service", "--release"]),
            Some(Wanted { agent: false, service: true, release: true })
        );
        assert_eq!(parse(&["--debug"]), None);
    }

    #[test]
    fn libraries_are_where_the_loader_finds_them() {
        let told = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(named_libraries(told), expected.map(PathBuf::from));
        assert!(named_libraries("\tstatically linked\n").is_empty());
    }
}
