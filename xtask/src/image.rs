//! Images, made from nothing: a layer with one program, and a configuration. Neither an engine nor a registry is needed, and the
//! same program makes the same bytes.

use std::{
    fs::{self, File},
    io::{BufWriter, Read as _, Write as _},
    path::{Path, PathBuf},
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

/// Builds the agent's image into the target's folder: an archive that `docker load` and `ctr images import` take.
///
/// # Errors
/// Where the agent cannot be built, or the archive not be written.
pub(crate) fn run(release: bool) -> Result<()> {
    let program = agent::run(release, Roles::Pod)?;
    let name = format!("docker.io/library/runner-agent:{}", env!("CARGO_PKG_VERSION"));
    let place = agent::folder(release)?.join("runner-agent-image.tar");
    write(&program, "runner-agent", &name, &place)?;
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

/// An image with the program at `/NAME`, which it executes as no machine's user.
fn write(program: &Path, name: &str, tag: &str, place: &Path) -> Result<()> {
    let layer = layer(program, name)?;
    let config = serde_json::to_vec(&json!({
        "architecture": architecture(),
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": { "Entrypoint": [format!("/{name}")], "User": format!("{USER}:{USER}"), "WorkingDir": "/" },
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

fn layer(program: &Path, name: &str) -> Result<PathBuf> {
    let place = aside(&program.with_extension("layer"));
    let from = File::open(program).with_context(|| format!("open {}", program.display()))?;
    let length = from.metadata()?.len();
    let mut layer = tar::Builder::new(BufWriter::new(File::create(&place)?));
    layer.append_data(&mut header(length, 0o755), name, from)?;
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
    fn an_image_is_its_program_and_nothing_else() {
        let dir = std::env::temp_dir().join(format!("xtask-image-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (program, place) = (dir.join("program"), dir.join("image.tar"));
        fs::write(&program, b"a program").unwrap();
        let made = || {
            write(&program, "program", "example.org/p:1", &place).unwrap();
            fs::read(&place).unwrap()
        };
        let archive = made();
        assert_eq!(archive, made(), "the same program makes the same bytes");
        let left: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
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
        assert_eq!(entries(layer), [("program".to_owned(), b"a program".to_vec())].into());
    }
}
