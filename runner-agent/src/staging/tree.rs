//! What a spec's inputs come to: a list of directories and files, each at its place.

use std::{
    collections::BTreeMap,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use runner_core::{
    artifact::{ArtifactKey, ArtifactStore, ArtifactUri, EntryKind, Manifest, ManifestEntry},
    spec::{Input, InputSource, RunSpec, path},
};

use super::{
    StagingError, StagingErrorKind, StagingLimits,
    entry_name::{self, shown},
    error::About,
    plan::{MountPlan, is_directory},
    publish::read_manifest_at,
};

/// Where a file's bytes come from.
#[derive(Debug)]
pub(super) enum Source {
    Inline(Bytes),
    Object(ArtifactKey),
}

/// A file to be staged.
#[derive(Debug)]
pub(super) struct StagedFile {
    /// The input that it belongs to, by index.
    pub(super) input: usize,
    /// Relative to the staging root.
    pub(super) at: PathBuf,
    pub(super) source: Source,
    pub(super) size: u64,
    /// `None`: the spec promised none.
    pub(super) sha256: Option<String>,
    pub(super) mode: u32,
}

/// Everything to be staged.
#[derive(Debug, Default)]
pub(super) struct Worklist {
    /// Relative to the staging root, outer before inner, with their modes.
    pub(super) directories: BTreeMap<PathBuf, u32>,
    /// No two have the same place.
    pub(super) files: Vec<StagedFile>,
    /// Sum of the files' sizes.
    pub(super) bytes: u64,
}

const FILE_MODE: u32 = 0o644;
const DIRECTORY_MODE: u32 = 0o755;

/// Looks every input up, without reading any file: one that is missing is told before a byte is moved.
pub(super) async fn resolve(
    spec: &RunSpec,
    plan: &MountPlan,
    artifacts: &dyn ArtifactStore,
    limits: &StagingLimits,
) -> Result<Worklist, StagingError> {
    let mut list = Worklist::default();
    for (index, (input, place)) in spec.inputs.iter().zip(&plan.inputs).enumerate() {
        let about = About::input(index);
        if input.extract.is_some() {
            return Err(about.error(StagingErrorKind::Unsupported, "archives cannot be unpacked yet"));
        }
        let at = plan.host_path(place);
        match &input.source {
            InputSource::Inline(bytes) => {
                let file = StagedFile {
                    input: index,
                    at,
                    size: bytes.len() as u64,
                    source: Source::Inline(bytes.clone()),
                    sha256: input.sha256.clone(),
                    mode: input.mode.unwrap_or(FILE_MODE),
                };
                list.add(file, &about, limits)?;
            }
            InputSource::Artifact(uri) if uri.is_tree() => {
                let manifest =
                    read_manifest_at(artifacts, uri.key(), limits, &about).await?.ok_or_else(|| {
                        about.error(
                            StagingErrorKind::NotFound,
                            format!("look up {uri}: it has no manifest, so the tree is not complete"),
                        )
                    })?;
                let hidden: Vec<&str> = spec
                    .inputs
                    .iter()
                    .filter(|inner| {
                        inner.path.len() > input.path.len() && path::overlap(&inner.path, &input.path)
                    })
                    .map(|inner| &inner.path[input.path.len() + 1..])
                    .collect();
                let tree = Tree { index, input, uri, at, hidden, about: &about, limits };
                tree.add(manifest, &mut list)?;
            }
            InputSource::Artifact(uri) => {
                let meta = artifacts
                    .head(uri.key())
                    .await
                    .map_err(|error| about.store(format!("look up {uri}"), error))?;
                let file = StagedFile {
                    input: index,
                    at,
                    size: meta.size,
                    source: Source::Object(uri.key().clone()),
                    sha256: input.sha256.clone(),
                    mode: input.mode.unwrap_or(FILE_MODE),
                };
                list.add(file, &about, limits)?;
            }
        }
    }
    Ok(list)
}

impl Worklist {
    fn add(&mut self, file: StagedFile, about: &About, limits: &StagingLimits) -> Result<(), StagingError> {
        self.bytes = self.bytes.saturating_add(file.size);
        if self.bytes > limits.input_bytes {
            let what = format!("the inputs have more than {} bytes together", limits.input_bytes);
            return Err(about.error(StagingErrorKind::LimitExceeded, what));
        }
        self.files.push(file);
        self.check_count(about, limits)
    }

    fn check_count(&self, about: &About, limits: &StagingLimits) -> Result<(), StagingError> {
        if (self.files.len() + self.directories.len()) as u64 > limits.input_entries {
            let what = format!("the inputs have more than {} files and directories", limits.input_entries);
            return Err(about.error(StagingErrorKind::LimitExceeded, what));
        }
        Ok(())
    }
}

/// A tree input, while its manifest is looked through.
struct Tree<'a> {
    index: usize,
    input: &'a Input,
    uri: &'a ArtifactUri,
    at: PathBuf,
    /// Places in it that inputs with longer paths take, relative to it.
    hidden: Vec<&'a str>,
    about: &'a About,
    limits: &'a StagingLimits,
}

impl Tree<'_> {
    fn add(&self, manifest: Manifest, list: &mut Worklist) -> Result<(), StagingError> {
        debug_assert!(is_directory(self.input));
        list.directories.insert(self.at.clone(), DIRECTORY_MODE);
        let mut places = Vec::with_capacity(manifest.entries.len());
        for entry in manifest.entries {
            let relative = self.place(&entry)?;
            if !self.is_hidden(&relative) {
                places.push((relative, entry));
            }
        }
        places.sort_by(|a, b| a.0.cmp(&b.0));
        let mut last_file: Option<&Path> = None;
        for (i, (relative, entry)) in places.iter().enumerate() {
            let twice = i > 0 && places[i - 1].0 == *relative;
            // Sorted by names, what lies below a file comes right behind it.
            if twice || last_file.is_some_and(|file| relative.starts_with(file)) {
                let what = format!(
                    "{}: its manifest gives one place to two entries: {}",
                    self.uri,
                    shown(&relative.to_string_lossy())
                );
                return Err(self.about.error(StagingErrorKind::Conflict, what));
            }
            match entry.kind {
                EntryKind::Directory => {}
                EntryKind::File => last_file = Some(relative),
            }
        }
        for (relative, entry) in places {
            let at = self.at.join(&relative);
            match entry.kind {
                EntryKind::Directory => {
                    list.directories.insert(at, entry.mode & 0o777);
                    list.check_count(self.about, self.limits)?;
                }
                EntryKind::File => {
                    let key = self.key(&entry)?;
                    let mode = self.input.mode.unwrap_or(entry.mode & 0o777);
                    let file = StagedFile {
                        input: self.index,
                        at,
                        source: Source::Object(key),
                        size: entry.size,
                        sha256: Some(entry.sha256),
                        mode,
                    };
                    list.add(file, self.about, self.limits)?;
                }
            }
        }
        Ok(())
    }

    /// Where the entry lies in the tree: `path` in an uploaded tree. In another run's outputs, the output's own path comes
    /// before it: `/outputs/report.txt` lies at `outputs/report.txt`.
    fn place(&self, entry: &ManifestEntry) -> Result<PathBuf, StagingError> {
        let bad = |why: &str| {
            let path = shown(&entry.path);
            let what = format!("{}: its manifest has an entry with the path {path}, which {why}", self.uri);
            self.about.error(StagingErrorKind::Malformed, what)
        };
        let below = entry_name::decode(entry).ok_or_else(|| bad("is not properly encoded"))?;
        let mut bytes = entry.output.trim_start_matches('/').as_bytes().to_vec();
        if !below.is_empty() {
            if !bytes.is_empty() {
                bytes.push(b'/');
            }
            bytes.extend_from_slice(below.as_bytes());
        }
        if bytes.is_empty() {
            return Err(bad("is empty"));
        }
        let mut depth = 0;
        for name in bytes.split(|byte| *byte == b'/') {
            depth += 1;
            if matches!(name, b"" | b"." | b"..") || name.contains(&0) || name.len() > path::MAX_NAME_BYTES {
                return Err(bad("is not relative and normal"));
            }
        }
        if depth > self.limits.depth || bytes.len() > path::MAX_BYTES {
            let what =
                format!("{}: it is deeper than {} names, or a path too long", self.uri, self.limits.depth);
            return Err(self.about.error(StagingErrorKind::LimitExceeded, what));
        }
        Ok(PathBuf::from(std::ffi::OsStr::from_bytes(&bytes)))
    }

    fn is_hidden(&self, relative: &Path) -> bool {
        self.hidden.iter().any(|hidden| relative.starts_with(hidden))
    }

    /// A manifest is written by the tenant, so what it names is checked: only the tenant's own objects.
    fn key(&self, entry: &ManifestEntry) -> Result<ArtifactKey, StagingError> {
        let bad = |why: &str| {
            let what = format!("{}: the entry {} {why}", self.uri, shown(&entry.path));
            self.about.error(StagingErrorKind::Malformed, what)
        };
        let key = entry.key.clone().ok_or_else(|| bad("has no key"))?;
        let owner = ArtifactUri::object(key.clone()).owner();
        if owner.is_none() || owner != self.uri.owner() {
            return Err(bad("names an object outside of the tree's tenant"));
        }
        if entry.sha256.len() != 64 {
            return Err(bad("has no SHA-256"));
        }
        Ok(key)
    }
}
