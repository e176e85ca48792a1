//! What the staging tests have in common.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "a module of several test binaries, each of which uses its own part"
)]

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Mutex,
};

use bytes::Bytes;
use runner_agent::staging::{
    InputStaging, MountPlan, OutputPublishing, Published, Root, StagedInputs, StagingError, StagingLimits,
    publish_outputs, stage_inputs,
};
use runner_core::{
    artifact::{ArtifactKey, ArtifactStore, EntryKind, MANIFEST_NAME, Manifest, ManifestEntry},
    backend::{Progress, ProgressSink},
    fake::artifact::MemoryArtifacts,
    spec::{Input, InputSource, Output, RunSpec},
};
use sha2::{Digest as _, Sha256};

#[derive(Default)]
pub struct Told(pub Mutex<Vec<Progress>>);

impl ProgressSink for Told {
    fn progress(&self, progress: Progress) {
        self.0.lock().unwrap().push(progress);
    }
}

/// A spec, its plan and a staging root of its own.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub root: Root,
    pub store: MemoryArtifacts,
    pub limits: StagingLimits,
    pub spec: RunSpec,
    pub told: Told,
}

impl Bench {
    pub fn new(inputs: Vec<Input>, outputs: Vec<Output>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        Self {
            dir,
            root,
            store: MemoryArtifacts::new(),
            limits: StagingLimits::default(),
            spec: RunSpec { inputs, outputs, ..RunSpec::default() },
            told: Told::default(),
        }
    }

    pub fn plan(&self) -> MountPlan {
        MountPlan::new(&self.spec).unwrap()
    }

    pub async fn stage(&self) -> Result<StagedInputs, StagingError> {
        let plan = self.plan();
        stage_inputs(InputStaging {
            spec: &self.spec,
            plan: &plan,
            root: &self.root,
            artifacts: &self.store,
            limits: &self.limits,
            progress: &self.told,
            owner: None,
        })
        .await
    }

    pub async fn publish(&self, partial: bool) -> Result<Published, StagingError> {
        self.publish_to(&self.store, partial).await
    }

    pub async fn publish_to(
        &self,
        store: &dyn ArtifactStore,
        partial: bool,
    ) -> Result<Published, StagingError> {
        let plan = self.plan();
        publish_outputs(OutputPublishing {
            spec: &self.spec,
            plan: &plan,
            root: &self.root,
            attempt_prefix: &key(PREFIX),
            artifacts: store,
            partial,
            limits: &self.limits,
            progress: &self.told,
        })
        .await
    }

    /// A path in the staging root.
    pub fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    /// Writes a file as the workload would.
    pub fn write(&self, path: &str, bytes: &[u8]) {
        let path = self.at(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    /// Nothing that staging makes for itself is left.
    pub fn assert_no_partial_files(&self) {
        let left: Vec<_> = fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !["in", "out", ".staged.json"].contains(&name.as_str()))
            .flat_map(|name| below(&self.at(&name)))
            .collect();
        assert_eq!(left, [""; 0]);
    }
}

pub const PREFIX: &str = "runs/t/r/1";

pub fn key(text: &str) -> ArtifactKey {
    text.parse().unwrap()
}

pub fn digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

pub fn inline(path: &str, bytes: &[u8]) -> Input {
    Input {
        path: path.to_owned(),
        source: InputSource::Inline(Bytes::copy_from_slice(bytes)),
        sha256: None,
        mode: None,
        extract: None,
    }
}

/// An object, or a tree where the key ends with `/`.
pub fn artifact(path: &str, key: &str) -> Input {
    Input { source: InputSource::Artifact(format!("artifact:{key}").parse().unwrap()), ..inline(path, b"") }
}

pub fn output(path: &str) -> Output {
    Output { path: path.to_owned(), glob: false, destination: None, required: true, max_bytes: None }
}

pub fn file_entry(path: &str, bytes: &[u8], key: &str) -> ManifestEntry {
    ManifestEntry {
        output: String::new(),
        base: String::new(),
        path: path.to_owned(),
        path_encoded: false,
        kind: EntryKind::File,
        size: bytes.len() as u64,
        sha256: digest(bytes),
        mode: 0o644,
        key: Some(key.parse().unwrap()),
    }
}

pub fn directory_entry(path: &str, mode: u32) -> ManifestEntry {
    ManifestEntry {
        kind: EntryKind::Directory,
        sha256: String::new(),
        mode,
        key: None,
        ..file_entry(path, b"", "unused")
    }
}

pub async fn seal(store: &dyn ArtifactStore, prefix: &str, entries: Vec<ManifestEntry>) {
    let total_bytes = entries.iter().map(|entry| entry.size).sum();
    let manifest = Manifest { partial: false, entries, total_bytes };
    let bytes = serde_json::to_vec(&manifest).unwrap();
    store.put_bytes(&key(prefix).join(MANIFEST_NAME).unwrap(), bytes.into()).await.unwrap();
}

/// Stores a tree of files and seals it.
pub async fn put_tree(store: &dyn ArtifactStore, prefix: &str, files: &[(&str, &[u8])]) {
    let mut entries = Vec::new();
    for (path, bytes) in files {
        let at = format!("{prefix}/{path}");
        store.put_bytes(&key(&at), Bytes::copy_from_slice(bytes)).await.unwrap();
        entries.push(file_entry(path, bytes, &at));
    }
    seal(store, prefix, entries).await;
}

/// Every path below a directory, relative to it, with what it is; sorted. Links are not followed.
pub fn below(top: &Path) -> Vec<String> {
    fn walk(top: &Path, at: &Path, found: &mut Vec<String>) {
        let Ok(entries) = fs::read_dir(at) else { return };
        for entry in entries {
            let path = entry.unwrap().path();
            found.push(path.strip_prefix(top).unwrap().to_string_lossy().into_owned());
            if fs::symlink_metadata(&path).unwrap().is_dir() {
                walk(top, &path, found);
            }
        }
    }
    let mut found = Vec::new();
    walk(top, top, &mut found);
    found.sort();
    found
}

pub fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

pub fn is_fifo(path: &Path) -> bool {
    fs::symlink_metadata(path).unwrap().file_type().is_fifo()
}

/// Path → (size, digest, mode) of a manifest's files; directories have no digest.
pub fn entries(manifest: &Manifest) -> BTreeMap<String, (u64, String, u32)> {
    manifest
        .entries
        .iter()
        .map(|entry| {
            let path = format!("{}|{}", entry.output, entry.path);
            (path, (entry.size, entry.sha256.clone(), entry.mode))
        })
        .collect()
}
