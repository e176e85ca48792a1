//! What a spec's inputs come to: a list of directories and files, each at its place.

use std::{
    collections::BTreeMap,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use runner_core::{
    artifact::{ArtifactKey, ArtifactStore, ArtifactUri, EntryKind, Manifest, ManifestEntry},
    id::TenantId,
    spec::{Archive, Input, InputSource, RunSpec, path},
};

use super::{
    StagingError, StagingErrorKind, StagingLimits,
    entry_name::shown,
    error::About,
    fetch::PARTIAL,
    plan::{MountPlan, is_directory},
    publish::read_manifest_at,
    source::Source,
};

/// A file to be staged.
#[derive(Debug)]
pub(super) struct StagedFile {
    /// The input that it belongs to, by index.
    pub(super) input: usize,
    /// Relative to the staging root.
    pub(super) at: PathBuf,
    pub(super) source: Source,
    /// `None`: known when it is read.
    pub(super) size: Option<u64>,
    /// `None`: the spec promised none.
    pub(super) sha256: Option<String>,
    pub(super) mode: u32,
}

/// An archive to be unpacked, once it was brought.
#[derive(Debug)]
pub(super) struct PackedTree {
    /// The input that it is, by index.
    pub(super) input: usize,
    /// For messages.
    pub(super) what: String,
    /// Where it was brought to, relative to the staging root.
    pub(super) spool: PathBuf,
    /// The directory that it becomes, relative to the staging root.
    pub(super) at: PathBuf,
    pub(super) format: Archive,
    /// Of its files, where the spec says.
    pub(super) mode: Option<u32>,
    /// Places in it that other inputs take, relative to it.
    pub(super) hidden: Vec<String>,
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
    /// Brought among the files.
    pub(super) archives: Vec<PackedTree>,
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
        let at = plan.host_path(place);
        match &input.source {
            InputSource::Inline(bytes) => {
                let size = Some(bytes.len() as u64);
                let one = One { spec, index, at, source: Source::Inline(bytes.clone()), size };
                one.add(&mut list, limits)?;
            }
            InputSource::Artifact(uri) if uri.is_tree() => {
                let what = uri.to_string();
                let manifest = manifest_of(&what, uri.key(), artifacts, limits, &about).await?;
                let owner = uri.owner();
                let hidden = hidden(spec, input);
                let tree = Tree { index, input, what, owner, below: "", at, hidden, about: &about, limits };
                tree.add(manifest, &mut list)?;
            }
            InputSource::Run(output) => {
                let found = output.found.as_ref().ok_or_else(|| {
                    about.error(
                        StagingErrorKind::Malformed,
                        format!("{output}: admission has not looked for it"),
                    )
                })?;
                let what = output.to_string();
                let manifest = manifest_of(&what, &found.prefix, artifacts, limits, &about).await?;
                let owner = ArtifactUri::tree(found.prefix.clone()).owner();
                let below = output.path.as_deref().unwrap_or_default().trim_start_matches('/');
                let hidden = hidden(spec, input);
                let tree = Tree { index, input, what, owner, below, at, hidden, about: &about, limits };
                if found.directory {
                    tree.add(manifest, &mut list)?;
                } else {
                    tree.add_file(manifest, &mut list)?;
                }
            }
            InputSource::Https(url) => {
                // Asked of the configuration of now: it may have changed since the spec was accepted.
                if !limits.https.allows_host(url) {
                    let what = format!("inputs may not come from the host {}", url.host());
                    return Err(about.error(StagingErrorKind::Denied, what));
                }
                let one = One { spec, index, at, source: Source::Https(url.clone()), size: None };
                one.add(&mut list, limits)?;
            }
            InputSource::Artifact(uri) => {
                let meta = artifacts
                    .head(uri.key())
                    .await
                    .map_err(|error| about.store(format!("look up {uri}"), error))?;
                let source = Source::Object(uri.key().clone());
                One { spec, index, at, source, size: Some(meta.size) }.add(&mut list, limits)?;
            }
        }
    }
    Ok(list)
}

impl Worklist {
    fn add(&mut self, file: StagedFile, about: &About, limits: &StagingLimits) -> Result<(), StagingError> {
        self.bytes = self.bytes.saturating_add(file.size.unwrap_or_default());
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

/// An input of one source: a file, or an archive.
struct One<'a> {
    spec: &'a RunSpec,
    index: usize,
    at: PathBuf,
    source: Source,
    size: Option<u64>,
}

impl One<'_> {
    fn add(self, list: &mut Worklist, limits: &StagingLimits) -> Result<(), StagingError> {
        let Self { spec, index, at, source, size } = self;
        let input = &spec.inputs[index];
        let about = About::input(index);
        let (at, mode) = match input.extract {
            None => (at, input.mode.unwrap_or(FILE_MODE)),
            Some(format) => {
                let spool = Path::new(PARTIAL).join(format!("archive-{index}"));
                list.directories.insert(at.clone(), DIRECTORY_MODE);
                list.archives.push(PackedTree {
                    input: index,
                    what: source.to_string(),
                    spool: spool.clone(),
                    at,
                    format,
                    mode: input.mode,
                    hidden: hidden(spec, input).into_iter().map(str::to_owned).collect(),
                });
                (spool, 0o600)
            }
        };
        let file = StagedFile { input: index, at, source, size, sha256: input.sha256.clone(), mode };
        list.add(file, &about, limits)
    }
}

async fn manifest_of(
    what: &str,
    prefix: &ArtifactKey,
    artifacts: &dyn ArtifactStore,
    limits: &StagingLimits,
    about: &About,
) -> Result<Manifest, StagingError> {
    read_manifest_at(artifacts, prefix, limits, about).await?.ok_or_else(|| {
        let what = format!("look up {what}: it has no manifest, so it is not complete");
        about.error(StagingErrorKind::NotFound, what)
    })
}

/// Places in an input that inputs with longer paths take, relative to it.
fn hidden<'a>(spec: &'a RunSpec, input: &Input) -> Vec<&'a str> {
    spec.inputs
        .iter()
        .filter(|inner| inner.path.len() > input.path.len() && path::overlap(&inner.path, &input.path))
        .map(|inner| &inner.path[input.path.len() + 1..])
        .collect()
}

/// A tree input, while its manifest is looked through.
struct Tree<'a> {
    index: usize,
    input: &'a Input,
    /// Its URI, for messages.
    what: String,
    /// Whose objects it may name.
    owner: Option<TenantId>,
    /// The part of it that is wanted, without slashes around; empty: all of it.
    below: &'a str,
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
            let place = self.place(&entry)?;
            let Ok(relative) = place.strip_prefix(self.below) else { continue };
            // The wanted directory itself: it is there already.
            if relative.as_os_str().is_empty() {
                continue;
            }
            if !self.is_hidden(relative) {
                places.push((relative.to_owned(), entry));
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
                    self.what,
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
                    let file = self.file(entry, at)?;
                    list.add(file, self.about, self.limits)?;
                }
            }
        }
        Ok(())
    }

    /// Adds the one file that is wanted of it, at the input's own place.
    fn add_file(&self, manifest: Manifest, list: &mut Worklist) -> Result<(), StagingError> {
        for entry in manifest.entries {
            if entry.kind == EntryKind::File && self.place(&entry)? == Path::new(self.below) {
                let file = self.file(entry, self.at.clone())?;
                return list.add(file, self.about, self.limits);
            }
        }
        let what = format!("look up {}: the manifest has no such file", self.what);
        Err(self.about.error(StagingErrorKind::NotFound, what))
    }

    fn file(&self, entry: ManifestEntry, at: PathBuf) -> Result<StagedFile, StagingError> {
        Ok(StagedFile {
            input: self.index,
            at,
            source: Source::Object(self.key(&entry)?),
            size: Some(entry.size),
            mode: self.input.mode.unwrap_or(entry.mode & 0o777),
            sha256: Some(entry.sha256),
        })
    }

    /// Where the entry lies in the tree: `path` in an uploaded tree. In another run's outputs, the output's own path comes
    /// before it: `/outputs/report.txt` lies at `outputs/report.txt`.
    fn place(&self, entry: &ManifestEntry) -> Result<PathBuf, StagingError> {
        let bad = |why: &str| {
            let path = shown(&entry.path);
            let what = format!("{}: its manifest has an entry with the path {path}, which {why}", self.what);
            self.about.error(StagingErrorKind::Malformed, what)
        };
        let bytes = entry.place().ok_or_else(|| bad("is not properly encoded"))?;
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
                format!("{}: it is deeper than {} names, or a path too long", self.what, self.limits.depth);
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
            let what = format!("{}: the entry {} {why}", self.what, shown(&entry.path));
            self.about.error(StagingErrorKind::Malformed, what)
        };
        let key = entry.key.clone().ok_or_else(|| bad("has no key"))?;
        let owner = ArtifactUri::object(key.clone()).owner();
        if owner.is_none() || owner != self.owner {
            return Err(bad("names an object outside of the tree's tenant"));
        }
        if entry.sha256.len() != 64 {
            return Err(bad("has no SHA-256"));
        }
        Ok(key)
    }
}
