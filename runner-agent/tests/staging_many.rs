//! A hundred thousand files of 1 KiB in one output directory, out and in again. The one test of its process, so that the peak
//! of memory that it reads is its own.

mod staging_kit;

use std::{fs, ops::Range, sync::Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use runner_agent::staging::{
    InputStaging, MountPlan, OutputPublishing, Root, StagingLimits, publish_outputs, read_manifest,
    stage_inputs,
};
use runner_core::{
    artifact::{
        ArtifactError, ArtifactErrorKind, ArtifactKey, ArtifactMeta, ArtifactStore, ByteStream, MANIFEST_NAME,
    },
    backend::NoProgress,
    clock::{Clock as _, SystemClock},
    spec::RunSpec,
};
use staging_kit::{artifact, key, output};

const FILES: u64 = 100_000;
const SIZE: usize = 1024;
/// The list of entries is held whole, once as it grows and once as JSON: about 1 KiB for each.
const ALLOWED: u64 = 192 << 20;

/// The contents of a file, which differ from those of every other.
fn contents(n: u64) -> Bytes {
    let mut bytes = vec![b'.'; SIZE];
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    bytes.into()
}

/// Keeps manifests, and knows every other object by its name.
#[derive(Debug, Default)]
struct ByName {
    manifest: Mutex<Option<Bytes>>,
    stored: Mutex<u64>,
}

impl ByName {
    fn object(&self, key: &ArtifactKey) -> Result<Bytes, ArtifactError> {
        let name = key.as_str().rsplit('/').next().unwrap_or_default();
        let found = if name == MANIFEST_NAME {
            self.manifest.lock().unwrap().clone()
        } else {
            name.parse().ok().map(contents)
        };
        found.ok_or_else(|| ArtifactError::new(ArtifactErrorKind::NotFound, key.to_string()))
    }
}

#[async_trait]
impl ArtifactStore for ByName {
    async fn put(&self, key: &ArtifactKey, _: ByteStream) -> Result<u64, ArtifactError> {
        panic!("{key} is small, and is stored as one")
    }

    async fn put_bytes(&self, key: &ArtifactKey, bytes: Bytes) -> Result<(), ArtifactError> {
        if key.as_str().ends_with(MANIFEST_NAME) {
            *self.manifest.lock().unwrap() = Some(bytes);
        } else {
            assert_eq!(bytes, self.object(key)?);
            *self.stored.lock().unwrap() += 1;
        }
        Ok(())
    }

    async fn get(
        &self,
        key: &ArtifactKey,
        _: Range<u64>,
    ) -> Result<(ArtifactMeta, ByteStream), ArtifactError> {
        let bytes = self.object(key)?;
        let meta = ArtifactMeta { key: key.clone(), size: bytes.len() as u64 };
        Ok((meta, stream::iter([Ok(bytes)]).boxed()))
    }

    async fn head(&self, key: &ArtifactKey) -> Result<ArtifactMeta, ArtifactError> {
        let size = self.object(key)?.len() as u64;
        Ok(ArtifactMeta { key: key.clone(), size })
    }

    fn list(&self, _: &ArtifactKey) -> BoxStream<'static, Result<ArtifactMeta, ArtifactError>> {
        stream::empty().boxed()
    }

    async fn delete(&self, _: &ArtifactKey) -> Result<(), ArtifactError> {
        Ok(())
    }

    async fn probe(&self) -> Result<(), ArtifactError> {
        Ok(())
    }
}

/// The most memory that this process ever had resident, in bytes.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::print_stdout, reason = "what was measured is for people")]
async fn a_hundred_thousand_small_files_are_published_and_staged_again() {
    let (clock, store, limits) = (SystemClock::new(), ByName::default(), StagingLimits::default());
    let dir = tempfile::tempdir().unwrap();
    let root = Root::open(dir.path()).unwrap();
    let spec = RunSpec { outputs: vec![output("/outputs/many")], ..RunSpec::default() };
    let plan = MountPlan::new(&spec).unwrap();
    let many = dir.path().join("out/0/many");
    fs::create_dir_all(&many).unwrap();
    for n in 0..FILES {
        fs::write(many.join(n.to_string()), contents(n)).unwrap();
    }
    let (before, begin) = (peak(), clock.monotonic());
    let published = publish_outputs(OutputPublishing {
        spec: &spec,
        plan: &plan,
        root: &root,
        attempt_prefix: &key("runs/t/r/1"),
        artifacts: &store,
        partial: false,
        limits: &limits,
        progress: &NoProgress,
    })
    .await
    .unwrap();
    let publishing = clock.monotonic() - begin;
    assert!(published.failure.is_none() && published.notes.is_empty());
    assert_eq!(*store.stored.lock().unwrap(), FILES);
    assert_eq!(published.manifest.entries.len() as u64, FILES + 1);
    drop(published);
    let json = store.manifest.lock().unwrap().as_ref().unwrap().len() as u64;
    assert!(json < limits.manifest_bytes / 8, "{json} bytes");
    let manifest = read_manifest(&store, &key("runs/t/r/1"), &limits).await.unwrap().unwrap();
    assert_eq!(manifest.total_bytes, FILES * SIZE as u64);
    drop(manifest);

    let dir = tempfile::tempdir().unwrap();
    let root = Root::open(dir.path()).unwrap();
    let spec = RunSpec { inputs: vec![artifact("/inputs/t", "runs/t/r/1/")], ..RunSpec::default() };
    let plan = MountPlan::new(&spec).unwrap();
    let begin = clock.monotonic();
    let staged = stage_inputs(InputStaging {
        spec: &spec,
        plan: &plan,
        root: &root,
        artifacts: &store,
        limits: &limits,
        progress: &NoProgress,
        owner: None,
    })
    .await
    .unwrap();
    let staging = clock.monotonic() - begin;
    assert_eq!((staged.files, staged.bytes), (FILES, FILES * SIZE as u64));
    assert_eq!(fs::read(dir.path().join("in/0/t/outputs/many/99999")).unwrap(), contents(99_999));
    let grown = peak() - before;
    println!(
        "{FILES} files: published in {publishing:.1?}, staged in {staging:.1?}, a manifest of {} MiB, {} MiB of memory",
        json >> 20,
        grown >> 20
    );
    assert!(grown < ALLOWED, "{} MiB more than before", grown >> 20);
}
