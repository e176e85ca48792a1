//! Images made from nothing: no registry is asked, nothing is downloaded.

use std::{fs, process::Command, sync::OnceLock};

use bollard::{Docker, body_full, query_parameters::ImportImageOptions};
use bytes::Bytes;
use futures::StreamExt as _;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// An image: one layer, and a configuration.
#[derive(Debug, Clone)]
pub struct TestImage {
    layer: Bytes,
    architecture: String,
    config: Value,
}

fn hex_digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// Adds an entry. Owned by root, as in most images.
fn add(
    tar: &mut tar::Builder<Vec<u8>>,
    path: &str,
    kind: tar::EntryType,
    mode: u32,
    bytes: &[u8],
    link: Option<&str>,
) {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(bytes.len() as u64);
    header.set_mtime(1_700_000_000);
    match link {
        Some(target) => tar.append_link(&mut header, path, target),
        None => tar.append_data(&mut header, path, bytes),
    }
    .expect("an archive in memory");
}

fn add_dir(tar: &mut tar::Builder<Vec<u8>>, path: &str, mode: u32) {
    add(tar, path, tar::EntryType::Directory, mode, &[], None);
}

/// The static busybox of this machine with a link for each of its programs, and the directories that programs expect.
fn busybox_layer() -> Bytes {
    let path =
        ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| fs::exists(path).unwrap_or(false));
    let path = path.expect("busybox is installed");
    let program = fs::read(path).expect("read busybox");
    let list = Command::new(path).arg("--list").output().expect("ask busybox for its programs");
    let mut tar = tar::Builder::new(Vec::new());
    for dir in ["bin", "etc", "root", "usr", "usr/bin", "var", "dev", "proc", "sys"] {
        add_dir(&mut tar, dir, 0o755);
    }
    add_dir(&mut tar, "tmp", 0o1777);
    add(&mut tar, "bin/busybox", tar::EntryType::Regular, 0o755, &program, None);
    for name in String::from_utf8_lossy(&list.stdout).lines().filter(|name| *name != "busybox") {
        add(&mut tar, &format!("bin/{name}"), tar::EntryType::Symlink, 0o777, &[], Some("busybox"));
    }
    let passwd = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
    add(&mut tar, "etc/passwd", tar::EntryType::Regular, 0o644, passwd, None);
    add(&mut tar, "etc/group", tar::EntryType::Regular, 0o644, b"root:x:0:\nnogroup:x:65534:\n", None);
    add(&mut tar, "etc/not-a-program", tar::EntryType::Regular, 0o644, b"text\n", None);
    tar.into_inner().expect("an archive in memory").into()
}

impl TestImage {
    /// Busybox, with `PATH` set, and `sh` as the command.
    pub fn busybox() -> Self {
        static LAYER: OnceLock<Bytes> = OnceLock::new();
        let config = json!({
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Cmd": ["sh"],
        });
        Self { layer: LAYER.get_or_init(busybox_layer).clone(), architecture: this_architecture(), config }
    }

    /// These files and nothing else, each executable by everybody.
    pub fn scratch(files: &[(&str, &[u8])]) -> Self {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, bytes) in files {
            add(&mut tar, path, tar::EntryType::Regular, 0o755, bytes, None);
        }
        let layer = tar.into_inner().expect("an archive in memory").into();
        Self { layer, architecture: this_architecture(), config: json!({}) }
    }

    /// With one more file, executable by everybody.
    ///
    /// # Panics
    /// Where the layer is no archive.
    #[must_use]
    pub fn and(mut self, path: &str, bytes: &[u8]) -> Self {
        let mut more = tar::Builder::new(Vec::new());
        add(&mut more, path, tar::EntryType::Regular, 0o755, bytes, None);
        let more = more.into_inner().expect("an archive in memory");
        // An archive ends with two empty blocks; what comes after them is not read.
        let end = self.layer.iter().rposition(|byte| *byte != 0).map_or(0, |last| last / 512 + 1) * 512;
        self.layer = [&self.layer[..end], &more].concat().into();
        self
    }

    /// For another machine: `arm64`, for example.
    #[must_use]
    pub fn architecture(mut self, architecture: &str) -> Self {
        architecture.clone_into(&mut self.architecture);
        self
    }

    /// With another field of the image's configuration: `Entrypoint`, `Cmd`, `Env`, `User`, `WorkingDir`, `Labels` ….
    #[must_use]
    pub fn with(mut self, field: &str, value: Value) -> Self {
        self.config[field] = value;
        self
    }

    fn configuration(&self) -> Vec<u8> {
        let config = json!({
            "architecture": self.architecture,
            "os": "linux",
            "created": "2024-01-01T00:00:00Z",
            "config": self.config,
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", hex_digest(&self.layer))] },
        });
        serde_json::to_vec(&config).expect("JSON")
    }

    /// The image's content id, `sha256:…`: the digest of its configuration.
    pub fn id(&self) -> String {
        format!("sha256:{}", hex_digest(&self.configuration()))
    }

    /// The archive that `docker load` and `ctr images import` read.
    ///
    /// # Panics
    /// Never.
    pub fn archive(&self, name: &str) -> Vec<u8> {
        let config = self.configuration();
        let config_name = format!("{}.json", hex_digest(&config));
        let manifest = json!([{ "Config": config_name, "RepoTags": [name], "Layers": ["layer.tar"] }]);
        let mut tar = tar::Builder::new(Vec::new());
        let manifest = serde_json::to_vec(&manifest).expect("JSON");
        for (path, bytes) in
            [("manifest.json", &manifest[..]), (&config_name, &config[..]), ("layer.tar", &self.layer[..])]
        {
            add(&mut tar, path, tar::EntryType::Regular, 0o644, bytes, None);
        }
        tar.into_inner().expect("an archive in memory")
    }

    /// Puts it into an engine as `name`, `repository:tag`. Returns its content id.
    ///
    /// # Panics
    /// Where the engine refuses it.
    pub async fn load(&self, docker: &Docker, name: &str) -> String {
        let body = body_full(self.archive(name).into());
        let mut loading = std::pin::pin!(docker.import_image(ImportImageOptions::default(), body, None));
        while let Some(step) = loading.next().await {
            step.expect("the engine takes the image");
        }
        let id = docker.inspect_image(name).await.expect("the engine has the image").id;
        assert_eq!(
            id.as_deref(),
            Some(self.id().as_str()),
            "the content id is the digest of the configuration"
        );
        self.id()
    }
}

/// The name that image configurations have for this machine's architecture.
fn this_architecture() -> String {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
    .to_owned()
}
